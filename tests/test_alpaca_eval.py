"""AlpacaEval 2.0: published scores, the length-controlled fit, and annotations by a judge."""

import glob
import json
import math
import os
import random
import statistics

import numpy as np
import pytest
from benchmark_files import (
    ALPACA,
    JUDGED,
    SHARED,
    Grader,
    alpaca,  # noqa: F401  (a fixture)
    alpaca_bench,
    judge_by,
    key_is_in_a_file,
    longer_wins,
    longer_wins_in_words,
    published,
    read,
    read_csv,
    read_json,
    score,
    succeed,
    top_list,
    write,
)
from conftest import run
from test_judge import KEY

from nanoaipo.benchmarks import alpaca_eval
from nanoaipo.benchmarks.answers import read_answers

# ---- published ----


def leaderboard():
    return {row[""]: row for row in read_csv(ALPACA / "leaderboard.csv")}


@published
@pytest.mark.parametrize("model", JUDGED)
def test_alpaca_eval_scores_are_those_of_the_leaderboard(model):
    row = leaderboard()[model]
    folder = ALPACA / model

    scores = score(
        "alpaca_eval",
        folder / "annotations.json.gz",
        answers=folder / "model_outputs.json.gz",
        lc_data=ALPACA,
    )

    for name in ("win_rate", "standard_error", "discrete_win_rate"):
        assert scores[name] == pytest.approx(float(row[name]), abs=1e-4)
    assert scores["avg_length"] == int(row["avg_length"])
    assert scores["n"] == int(row["n_total"])
    assert scores["model"] == model
    published_lc = float(row["length_controlled_winrate"])
    assert scores["lc_win_rate"] == pytest.approx(published_lc, abs=0.15)
    if row["lc_standard_error"]:
        published_error = float(row["lc_standard_error"])
        assert scores["lc_standard_error"] == pytest.approx(published_error, abs=0.01)


@published
def test_answers_alone_have_the_published_lengths():
    expected = {"Snorkel-Mistral-PairRM-DPO": 2736, "SPPO-Llama-3-Instruct-8B-PairRM": 2066}
    rows = leaderboard()

    for path in glob.glob(str(ALPACA / "outputs_only" / "*.json.gz")):
        answers, name = read_answers(path)
        mean = int(statistics.mean(len(answer.texts[0]) for answer in answers.values()))

        assert mean == expected[os.path.basename(path).removesuffix(".json.gz")]
        if name in rows:
            assert int(rows[name]["avg_length"]) == mean


@published
def test_order_and_log_probs_give_every_published_preference():
    checked = 0
    for row in read(ALPACA / JUDGED[0] / "annotations.json.gz"):
        if not row["raw_completion"]:
            continue
        rng = random.Random("is_switched_outputs" + row["instruction"] + "0")
        switched = rng.choices([False, True])[0]
        reply = {"logprobs": row["raw_completion"]["logprobs"], "reply": ""}

        ours = alpaca_eval.preference_of(reply)

        if switched:
            ours = 3 - ours
        assert ours == pytest.approx(row["preference"], abs=1e-9)
        checked += 1
    assert checked > 790


@published
def test_difficulty_goes_by_instruction_not_by_row(tmp_path):
    path = ALPACA / JUDGED[0] / "annotations.json.gz"
    rows = read(path)
    whole = score("alpaca_eval", path, lc_data=ALPACA)

    # rows in another order
    shuffled = write(tmp_path / "s.json", random.Random(0).sample(rows, len(rows)))
    assert score("alpaca_eval", shuffled, lc_data=ALPACA) == pytest.approx(whole, abs=1e-7)

    # a baseline in another order: the official one counts
    baseline = read(ALPACA / "baseline_gpt4_1106_preview.json.gz")
    baseline = write(tmp_path / "other.json", random.Random(1).sample(baseline, 805))
    scores = score("alpaca_eval", shuffled, lc_data=ALPACA, baseline=baseline)
    assert scores["lc_win_rate"] == pytest.approx(whole["lc_win_rate"])

    # five rows missing: the oracle by instruction, and by row, which is wrong
    rows = [row for k, row in enumerate(rows) if k not in (3, 40, 99, 200, 333)]
    scores = score("alpaca_eval", write(tmp_path / "d.json", rows), lc_data=ALPACA)
    index = {row["instruction"]: row["index"] for row in read(ALPACA / "instructions.json")}
    recovered = read_csv(ALPACA / "instruction_difficulty_recovered.csv")
    difficulty = [float(row["instruction_difficulty"]) for row in recovered]
    gamed = read_gamed(ALPACA / "df_gamed_reconstructed.csv")
    aligned = oracle(rows, [difficulty[index[row["instruction"]]] for row in rows], gamed)
    by_row = oracle(rows, difficulty[:800], gamed)
    assert scores["missing"] == 5
    assert scores["lc_win_rate"] == pytest.approx(aligned, abs=1e-3)
    assert abs(by_row - aligned) > 1e-2


# ---- the length-controlled fit ----


def read_gamed(path):
    """[(features, target)] of the rows that regularise the fit."""
    gamed = []
    for row in read_csv(path):
        longer = math.tanh(float(row["std_delta_len"]))
        features = (longer, float(row["instruction_difficulty"]), 0.0)
        gamed.append((features, float(row["preference"])))
    return gamed


def oracle(rows, difficulty, gamed):
    """The length-controlled win rate by scikit-learn: a fraction is two rows with weights."""
    from sklearn.linear_model import LogisticRegression

    difference = [len(row["output_1"]) - len(row["output_2"]) for row in rows]
    sd = statistics.stdev(difference) or 1
    features = [(math.tanh(d / sd), gamma, 1.0) for d, gamma in zip(difference, difficulty)]
    features += [x for x, _ in gamed]
    targets = [row["preference"] - 1 for row in rows] + [y for _, y in gamed]
    weights = [1.0] * len(rows) + [0.1] * len(gamed)
    x = np.array(features)
    y = np.array(targets)
    w = np.array(weights)

    fit = LogisticRegression(
        l1_ratio=1.0,
        solver="liblinear",
        fit_intercept=False,
        C=10 ** (4 / 9),
        tol=1e-9,
        max_iter=100000,
        random_state=0,
    )
    labels = np.repeat([1, 0], len(y))
    fit.fit(np.vstack([x, x]), labels, np.concatenate([w * y, w * (1 - y)]))

    _, slope, intercept = fit.coef_[0]
    p = [1 / (1 + math.exp(-slope * gamma - intercept)) for gamma in difficulty]
    return 100 * statistics.mean(p)


def test_the_length_controlled_fit_is_that_of_scikit_learn(alpaca, tmp_path):
    folder, rows, difficulty = alpaca
    gamed = read_gamed(folder / "df_gamed.csv")

    scores = score("alpaca_eval", write(tmp_path / "a.json.gz", rows), lc_data=folder)

    expected = oracle(rows, difficulty, gamed)
    assert scores["lc_win_rate"] == pytest.approx(expected, abs=0.02)
    assert abs(scores["lc_win_rate"] - scores["win_rate"]) > 3
    won = [row["preference"] - 1 for row in rows]
    assert scores["win_rate"] == pytest.approx(100 * statistics.mean(won))
    assert scores["standard_error"] == pytest.approx(100 * statistics.stdev(won) / 60**0.5)

    # some of the rows, in another order
    some = random.Random(3).sample(rows, 50)
    their_difficulty = [difficulty[int(row["instruction"].split()[1])] for row in some]
    scores = score("alpaca_eval", write(tmp_path / "b.json", some), lc_data=folder)
    expected = oracle(some, their_difficulty, gamed)
    assert scores["lc_win_rate"] == pytest.approx(expected, abs=0.02)


def test_preferences_of_0_are_ties_and_null_is_invalid(alpaca, tmp_path):
    folder, rows, _ = alpaca
    preferences = (0, 1.5, None, 1.2, 1.9, 2)
    odd = [row | {"preference": p} for row, p in zip(rows, preferences)]

    scores = score("alpaca_eval", write(tmp_path / "a.json", odd), lc_data=folder)

    assert scores["win_rate"] == pytest.approx(100 * (0.5 + 0.5 + 0.2 + 0.9 + 1) / 5)
    assert scores["discrete_win_rate"] == 60
    assert scores["lc_win_rate"] > 0
    assert (scores["n"], scores["invalid"], scores["missing"]) == (5, 1, 799)
    assert scores["avg_length"] == int(statistics.mean(len(row["output_2"]) for row in odd))

    single = score("alpaca_eval", write(tmp_path / "1.json", odd[-1:]), lc_data=folder)
    assert single["n"] == 1


# ---- a judge that is asked ----


@pytest.mark.parametrize(
    "top, text, preference",
    [
        ({"m": 0.75, "M": 0.25}, "M", 1.25),
        ({"M": 0.9, "x": 0.1}, "m", 2.0),
        ({"m": 0.2}, "M", 1.0),
        ({"x": 1.0}, "m", None),
        (None, "m", 1.0),
        (None, "The best is **M**.", 2.0),
        (None, "I'm for M, not m", 1.0),
        (None, "I'm sure.", None),
        (None, "I’m sorry, I can’t judge these.", None),
        (None, "", None),
        (None, "<think>Is it m?</think>M", 2.0),
        (None, "<think>Is it m?", None),
        (None, "<thinking>Is it m?</thinking>M", 2.0),
    ],
)
def test_the_preference_of_a_reply(top, text, preference):
    logprobs = None
    if top:
        logprobs = {"content": [{"token": "?", "top_logprobs": top_list(top)}]}

    ours = alpaca_eval.preference_of({"reply": text, "logprobs": logprobs})

    if preference is None:
        assert ours is None
    else:
        assert ours == pytest.approx(preference)


def test_log_probs_of_no_other_token_leave_the_preference_to_the_text():
    logprobs = {"content": [{"token": "M", "logprob": 0.0}]}

    assert alpaca_eval.preference_of({"reply": "M", "logprobs": logprobs}) == 2.0


def test_alpaca_eval_judged_by_log_probs_is_scored_by_the_same_command(alpaca, tmp_path):
    texts = alpaca_bench(alpaca, tmp_path)
    server = Grader(longer_wins)
    command = judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0])

    succeed(*command)

    # judgments: all but the equal answer have been asked for, once, the longer one wins
    rows = read(tmp_path / "j.json")
    assert [row["output_2"] for row in rows] == texts
    assert len(server.paid) == sum(server.paid.values()) == 59
    assert rows[0]["preference"] == 1.5
    for row in rows[1:]:
        if len(row["output_2"]) > 100:
            assert row["preference"] == pytest.approx(2 - 1 / 9)
        if len(row["output_2"]) < 100:
            assert row["preference"] == pytest.approx(1 + 1 / 9)

    # the coin flip says which answer stands first
    prompts = {}
    for messages in map(json.loads, server.paid):
        prompt = messages[1]["content"]
        prompts[prompt.split("\n")[0].removeprefix("Task: ")] = prompt
    for row in rows[1:]:
        rng = random.Random(f"is_switched_outputs{row['instruction']}0")
        first, second = row["output_1"], row["output_2"]
        if rng.choices([False, True])[0]:
            first, second = second, first
        assert f"\nm: {first}|\nM: {second}|" in prompts[row["instruction"]]

    # the requests, with the key in their header only
    for body in server.bodies:
        assert (body["temperature"], body["max_tokens"], body["top_logprobs"]) == (1.0, 1, 5)
        assert body["model"] == "gpt-j"
        assert "about" not in body
    assert server.keys == {f"Bearer {KEY}"}
    assert not key_is_in_a_file(tmp_path)

    # the scores
    scores = read_json(tmp_path / "score.json")
    assert (scores["n"], scores["missing"]) == (60, 745)
    assert (scores["judge"], scores["model"]) == ("gpt-j", "mine")
    assert "verdicts_from_text" not in scores
    mean = statistics.mean(row["preference"] - 1 for row in rows)
    assert scores["win_rate"] == pytest.approx(100 * mean)
    assert 0 < scores["lc_win_rate"] < 100

    # the same command again has nothing to do; another prompt of the judge is another judgment
    assert "nothing to do" in succeed(*command)
    assert sum(server.paid.values()) == 59
    other = run(*command, "--bench_data=elsewhere")
    assert other.returncode == 1
    assert "was made with another 'bench_data'" in other.stderr

    if SHARED.is_dir():
        theirs = read(ALPACA / JUDGED[1] / "annotations.json.gz")[0]
        assert {*theirs} <= {*rows[0], "dataset"}


def test_without_log_probs_the_text_decides_and_the_table_says_so(alpaca, tmp_path):
    alpaca_bench(alpaca, tmp_path)
    server = Grader(longer_wins_in_words)

    succeed(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0]))

    assert {row["preference"] for row in read(tmp_path / "j.json")} == {1, 1.5, 2}
    assert read_json(tmp_path / "score.json")["verdicts_from_text"] == 59


@pytest.mark.parametrize("named", ["logprobs", "top_logprobs"])
def test_a_judge_that_refuses_parameters_is_asked_without_them_and_no_question_is_lost(
    alpaca, tmp_path, named
):
    refused = (named, "temperature", "max_tokens")

    def refuses(server, handler):
        for name in refused:
            if name not in handler.body:
                continue
            code = "unsupported_parameter"
            if name == "temperature":
                code = "unsupported_value"
            error = {
                "message": f"Unsupported: '{name}'",
                "type": "invalid_request_error",
                "param": name,
                "code": code,
            }
            handler.reply({"error": error}, 400)
            return True
        return False

    alpaca_bench(alpaca, tmp_path)
    server = Grader(longer_wins_in_words, refuses)

    stdout = succeed(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0]))

    for name in refused:
        assert f"does not take this {name}" in stdout
    assert set(server.paid.values()) == {1}
    assert len(server.paid) == 59
    assert read_json(tmp_path / "score.json")["n"] == 60
    accepted = [body for body in server.bodies if not {*refused} & body.keys()]
    assert len(accepted) == 59
    for body in accepted:
        assert body["max_completion_tokens"] == 1
        assert not {"logprobs", "top_logprobs"} & body.keys()
