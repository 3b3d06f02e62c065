"""Style control of Arena-Hard: the official arithmetic, what a pool is, what is refused."""

import math
import random
import shutil

import numpy as np
import pytest
from benchmark_files import ARENA, game, model_answer, published, read, read_json, write
from conftest import run
from sklearn.linear_model import LogisticRegression

from nanoaipo.benchmarks import arena_hard, style_control
from nanoaipo.errors import InputError

BASELINE = "gpt-4-0314"

# ---- published ----


@published
def test_the_official_script_has_the_same_number(tmp_path):
    """gpt-3.5-turbo-0125 as a pool of one: show_result.py --style-control says 22.5015 for it."""
    name = "gpt-3.5-turbo-0125.jsonl.gz"
    battles = shutil.copy(ARENA / "battles" / name, tmp_path / "battles.jsonl.gz")
    for answers in (name, f"{BASELINE}.jsonl.gz"):
        shutil.copy(ARENA / "model_answer" / answers, tmp_path / answers)

    scores = arena_hard.score(str(battles), "", pool=str(tmp_path))

    assert scores["sc_win_rate"] == pytest.approx(22.5015, abs=0.05)
    low, high = scores["sc_win_rate_ci"]
    assert 2 < scores["sc_win_rate"] - low < 5
    assert 2 < high - scores["sc_win_rate"] < 5
    assert round(scores["win_rate"], 2) == 23.34


# ---- a pool of our own ----

# model: what it is worth, in logits, and how long its answers are
MODELS = {"plain": (-0.5, 1.0), "wordy": (-0.5, 3.0), "strong": (0.8, 1.5), "short": (0.8, 0.5)}
N_QUESTIONS = 300


def answer_text(rng, factor):
    """(Text, counts of its headers, lists and bold words, as many as its length allows)."""
    counts = [min(3, int(rng.expovariate(1 / factor))) for _ in range(3)]
    lines = ["# h"] * counts[0] + ["- l"] * counts[1] + ["**b**"] * counts[2]
    return "\n".join(lines), counts


def answer_row(model, key, text, n_tokens, is_v2):
    """A record of an official answers file."""
    if not is_v2:
        return model_answer(key, model, [{"content": text, "token_len": n_tokens}])
    messages = [{"role": "assistant", "content": {"answer": text}}]
    return {"uid": key, "model": model, "messages": messages, "metadata": {"token_len": n_tokens}}


def judgment_row(model, key, verdicts, is_v2):
    """A record of an official judgments file."""
    games = [game(verdict) for verdict in verdicts]
    row = {"question_id": key, "model": model, "judge": "j", "games": games}
    if is_v2:
        row["uid"] = row.pop("question_id")
        row["category"] = "arena-hard-v0.1"
    return row


def verdict(rng, logit):
    """What a judge says of the model as A: stronger where it is surer."""
    margin = logit + math.log(1 / rng.random() - 1)
    for limit, label in ((2, "A>>B"), (0.2, "A>B"), (-0.2, "A=B"), (-2, "B>A")):
        if margin > limit:
            return label
    return "B>>A"


def make_pool(folder, is_v2=False):
    """Answers and judgments of MODELS by a judge that likes length, in the official layout.

    Returns {model: {question: (two verdicts on the model as A, counts, the baseline's counts)}}.
    """
    rng = random.Random(0)
    answers = {name: [] for name in (BASELINE, *MODELS)}
    judgments = {name: [] for name in MODELS}
    truth = {name: {} for name in MODELS}
    for k in range(N_QUESTIONS):
        key = f"q{k}"
        text, markdown = answer_text(rng, 1)
        theirs = [rng.randint(80, 400), *markdown]
        answers[BASELINE].append(answer_row(BASELINE, key, text, theirs[0], is_v2))
        for name, (strength, factor) in MODELS.items():
            text, markdown = answer_text(rng, factor)
            ours = [int(factor * rng.randint(80, 400)), *markdown]
            answers[name].append(answer_row(name, key, text, ours[0], is_v2))
            logit = strength + 1.5 * (ours[0] - theirs[0]) / (ours[0] + theirs[0])
            verdicts = [verdict(rng, logit), verdict(rng, logit)]
            truth[name][key] = verdicts, ours, theirs
            # game 1 shows the baseline as A
            first = verdicts[0].translate(str.maketrans("AB", "BA")).replace("B=A", "A=B")
            judgments[name].append(judgment_row(name, key, [first, verdicts[1]], is_v2))

    for name, rows in answers.items():
        write(folder / "model_answer" / f"{name}.jsonl", rows)
    for name, rows in judgments.items():
        write(folder / "model_judgment" / "j" / f"{name}.jsonl", rows)
    return truth


def score(folder, model, **settings):
    judgments = folder / "model_judgment" / "j" / f"{model}.jsonl"
    return arena_hard.score(str(judgments), "", pool=str(folder), **settings)


def official_rates(truth, is_v2):
    """{model: win rate} by the official recipe: single battles, doubled so that ties are halves."""
    names = list(truth)
    features = []
    styles = []
    wins = []
    outcomes = {"A>>B": [1, 1] * 3, "A>B": [1, 1], "A=B": [1, 0], "B>A": [0, 0], "B>>A": [0, 0] * 3}
    for name, questions in truth.items():
        for verdicts, ours, theirs in questions.values():
            a = np.array(ours, dtype=float)
            b = np.array(theirs, dtype=float)
            if is_v2:
                a[1:] /= a[0] + 1
                b[1:] /= b[0] + 1
            style = (a - b) / (a + b + np.array([0, 1, 1, 1]))
            for label in verdicts:
                for outcome in outcomes[label]:
                    features.append([float(name == other) for other in names])
                    styles.append(style)
                    wins.append(outcome)
    styles = np.array(styles)
    styles = (styles - styles.mean(0)) / styles.std(0)
    fit = LogisticRegression(C=1e6, fit_intercept=False, tol=1e-10, max_iter=10000)
    fit.fit(np.column_stack([features, styles]), wins)
    strengths = fit.coef_[0][: len(names)]
    return dict(zip(names, 100 / (1 + np.exp(-strengths))))


@pytest.mark.parametrize("is_v2", [False, True])
def test_each_model_of_a_pool_has_the_rate_of_the_official_recipe(tmp_path, is_v2):
    truth = make_pool(tmp_path, is_v2)
    rates = official_rates(truth, is_v2)

    for name in MODELS:
        scores = score(tmp_path, name)
        assert scores["sc_win_rate"] == pytest.approx(rates[name], abs=0.05)
        assert scores["sc_win_rate_ci"][0] < rates[name] < scores["sc_win_rate_ci"][1]


def test_control_takes_out_what_length_has_won(tmp_path):
    make_pool(tmp_path)

    scores = {name: score(tmp_path, name) for name in MODELS}

    # two models of one worth each: in the plain rates the longer one is ahead
    for longer, shorter in (("wordy", "plain"), ("strong", "short")):
        plain = scores[longer]["win_rate"] - scores[shorter]["win_rate"]
        controlled = scores[longer]["sc_win_rate"] - scores[shorter]["sc_win_rate"]
        assert plain > 10
        assert abs(controlled) < 6


def test_a_score_belongs_to_its_pool(tmp_path):
    make_pool(tmp_path)
    whole = score(tmp_path, "plain")
    plain = arena_hard.score(str(tmp_path / "model_judgment" / "j" / "plain.jsonl"), "")
    assert whole["pool"] == "plain, short, strong, wordy"
    assert plain.items() <= whole.items()

    (tmp_path / "model_judgment" / "j" / "wordy.jsonl").unlink()
    smaller = score(tmp_path, "plain")

    assert smaller["pool"] == "plain, short, strong"
    assert smaller["pool_sha256"] != whole["pool_sha256"]
    assert abs(smaller["sc_win_rate"] - whole["sc_win_rate"]) > 1
    assert plain.items() <= smaller.items()


def test_the_model_that_is_scored_and_the_baseline_need_not_lie_in_the_pool(tmp_path):
    pool = tmp_path / "pool"
    make_pool(pool)
    inside = score(pool, "plain")
    ours = (pool / "model_answer" / "plain.jsonl").rename(tmp_path / "ours.jsonl")
    theirs = (pool / "model_answer" / f"{BASELINE}.jsonl").rename(tmp_path / "theirs.jsonl")
    judgments = pool / "model_judgment" / "j" / "plain.jsonl"
    judgments = judgments.rename(tmp_path / "judgments.jsonl")

    outside = arena_hard.score(
        str(judgments), "", answers=str(ours), baseline=str(theirs), pool=str(pool)
    )

    assert outside["pool"] == inside["pool"]
    assert outside["sc_win_rate"] == pytest.approx(inside["sc_win_rate"])


def test_what_differs_in_nothing_and_never_wins_still_has_a_score(tmp_path):
    answers = [answer_row(BASELINE, f"q{k}", "same", 7, False) for k in range(50)]
    write(tmp_path / "baseline.jsonl", answers)
    write(tmp_path / "m.jsonl", [row | {"model_id": "m"} for row in answers])
    rows = [judgment_row("m", f"q{k}", ("A>>B", "B>>A"), False) for k in range(50)]
    judgments = write(tmp_path / "judgments.jsonl", rows)

    scores = arena_hard.score(judgments, "", pool=str(tmp_path))

    assert scores["win_rate"] == 0
    assert 0 < scores["sc_win_rate"] < 1


def test_each_category_of_v2_has_a_baseline_and_a_fit_of_its_own(tmp_path):
    kinds = {"hard_prompt": "o3-mini-2025-01-31", "creative_writing": "gemini-2.0-flash-001"}
    rng = random.Random(0)
    judgments = []
    answers = {name: [] for name in ("m", *kinds.values())}
    for kind, baseline in kinds.items():
        for k in range(60):
            key = f"{kind} {k}"
            answers[baseline].append(answer_row(baseline, key, "a", 100, True))
            answers["m"].append(answer_row("m", key, "a", rng.randint(50, 400), True))
            label = rng.choice(["A>B", "A>B", "B>A"]) if kind == "hard_prompt" else "A=B"
            first = label.translate(str.maketrans("AB", "BA"))
            judgments.append(judgment_row("m", key, (first, label), True) | {"category": kind})
    for name, rows in answers.items():
        write(tmp_path / "model_answer" / f"{name}.jsonl", rows)
    path = write(tmp_path / "judgments.jsonl", judgments)

    scores = arena_hard.score(path, "", pool=str(tmp_path))

    assert "sc_win_rate" not in scores  # two baselines have no score in common
    parts = scores["categories"]
    assert parts["creative_writing"]["sc_win_rate"] == pytest.approx(50)
    assert parts["hard_prompt"]["sc_win_rate"] == pytest.approx(
        parts["hard_prompt"]["win_rate"], abs=1
    )


# ---- the command, and what it refuses ----


def evaluate(folder, **settings):
    arguments = {
        "bench": "arena_hard",
        "judgments": folder / "model_judgment" / "j" / "plain.jsonl",
        "pool": folder,
        "out": folder / "score.json",
    }
    arguments |= settings
    return run("eval.py", *(f"--{key}={value}" for key, value in arguments.items()))


def test_the_command_shows_both_rates_and_knows_a_pool_that_has_changed(tmp_path):
    make_pool(tmp_path)

    first = evaluate(tmp_path)
    again = evaluate(tmp_path)
    (tmp_path / "model_judgment" / "j" / "wordy.jsonl").unlink()
    changed = evaluate(tmp_path)

    assert first.returncode == 0, first.stderr
    rates = [line.split()[0] for line in first.stdout.splitlines() if "win_rate" in line]
    assert rates == ["win_rate", "sc_win_rate", "sc_win_rate_ci"]
    assert len(read_json(tmp_path / "score.json")["pool_sha256"]) == 64
    assert "complete, nothing to do" in again.stdout
    assert changed.returncode == 1
    assert "was made with another 'pool'" in changed.stderr


def test_only_arena_hard_has_a_pool(tmp_path):
    done = evaluate(tmp_path, bench="mt_bench")

    assert done.returncode == 1
    assert "only arena_hard has style control" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def remove_an_answer(folder):
    path = folder / "model_answer" / "wordy.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def remove_a_length(folder):
    rows = [answer_row("wordy", f"q{k}", "a", None, False) for k in range(N_QUESTIONS)]
    write(folder / "model_answer" / "wordy.jsonl", rows)


def count_characters(folder):
    rows = [answer_row("wordy", f"q{k}", "a b c d", 7, False) for k in range(N_QUESTIONS)]
    write(folder / "model_answer" / "wordy.jsonl", rows)


def copy_answers(folder):
    answers = folder / "model_answer"
    shutil.copy(answers / "wordy.jsonl", answers / "wordy_copy.jsonl")


def copy_judgments(folder):
    judgments = folder / "model_judgment" / "j"
    shutil.copy(judgments / "wordy.jsonl", judgments / "wordy_copy.jsonl")


def change_judge(folder):
    for path in (folder / "model_judgment" / "j").iterdir():
        if path.stem != "plain":
            path.write_text(path.read_text().replace('"judge": "j"', '"judge": "k"'))


def change_served_model(folder):
    path = folder / "model_judgment" / "j" / "wordy.jsonl"
    rows = read(path)
    for name, played in zip(("k1", "k2"), rows[0]["games"]):
        played["served_model"] = name
    write(path, rows)


def change_baseline(folder):
    path = folder / "model_judgment" / "j" / "wordy.jsonl"
    path.write_text(path.read_text().replace('"games"', '"baseline": "short", "games"', 1))


@pytest.mark.parametrize(
    "change, message",
    [
        (shutil.rmtree, "no such folder"),
        (remove_an_answer, "no answer of wordy to 'q0'"),
        (count_characters, "wordy.jsonl: token_len counts characters"),
        (copy_answers, "answers of wordy, which another file of the pool has too"),
        (copy_judgments, "judges q0 again"),
        (change_judge, "no judgments by j, but by k; judges are never mixed"),
        (change_served_model, "judged by 'k1' and by 'k2'"),
        (change_baseline, "a pool has one baseline"),
    ],
)
def test_a_pool_that_would_mix_or_lack_something_is_refused(tmp_path, change, message):
    pool = tmp_path / "pool"
    make_pool(pool)
    judgments = shutil.copy(pool / "model_judgment" / "j" / "plain.jsonl", tmp_path / "j.jsonl")
    change(pool)

    with pytest.raises(InputError, match=message):
        arena_hard.score(str(judgments), "", pool=str(pool))


def test_a_length_that_nobody_can_count_is_refused(tmp_path, monkeypatch):
    make_pool(tmp_path)
    remove_a_length(tmp_path)
    monkeypatch.setattr(style_control, "load_encoding", lambda name: None)

    with pytest.raises(InputError, match="wordy.jsonl: an answer has no token_len"):
        score(tmp_path, "plain")
