"""The win rate against other answers: judges, intervals, variety, the length-controlled rate."""

import itertools
import math
import random
import runpy
import statistics
import sys

import numpy as np
import pytest

# test_docs takes the five names that are not used here
from benchmark_files import (  # noqa: F401
    ALPACA,
    ARENA,
    Grader,
    mt_bench,
    published,
    read,
    read_json,
    write,
)
from conftest import ROOT, build_model
from test_judge import KEY, Judge, choice, verdict
from test_rank import build_judge
from test_rankers import build_reward

from nanoaipo import stats


def write_answers(path, texts, order=1, **columns):
    """Write candidates with one response each, a text or a record; the path as text.

    order=-1: in reverse. columns: a value of each record's own, such as its answer.
    """
    rows = []
    for k, text in enumerate(texts):
        response = {"text": text} if isinstance(text, str) else text
        row = {"id": f"p{k}", "prompt": f"prompt {k}", "responses": [response]}
        for name, values in columns.items():
            row[name] = values[k]
        rows.append(row)
    return write(path, rows[::order])


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairrm")
    build_judge(folder)
    return folder


def evaluate(tmp_path, ours, theirs, **settings):
    """Run eval.py in this process, as starting torch takes longer than all else.

    Returns (path of the scores, message of the exit or None).
    """
    n = len(list(tmp_path.glob("e*.json")))
    out = tmp_path / f"e{n}.json"
    settings |= {"answers": ours, "baseline": theirs, "out": out}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *arguments])
        patch.setenv("OPENAI_API_KEY", KEY)
        try:
            runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        except SystemExit as e:
            return out, e.code
    return out, None


def rate(tmp_path, ours, theirs, **settings):
    """The scores of answers against others."""
    out, message = evaluate(tmp_path, ours, theirs, **settings)
    assert not message
    return read_json(out)


def refusal(tmp_path, ours, theirs):
    """The message with which answers that cannot be compared are refused."""
    out, message = evaluate(tmp_path, ours, theirs)
    assert message
    assert not out.exists()
    return message


def random_text(rng, low, high):
    n = rng.randint(low, high)
    return " ".join(rng.choices("the cat sat on a mat and saw two red dogs".split(), k=n))


def random_texts(rng, n, low, high):
    return [random_text(rng, low, high) for _ in range(n)]


# ---- scores of the judged answers ----


def share_of_distinct(grams):
    """Share of distinct pairs of words among those of all answers."""
    every = list(itertools.chain.from_iterable(grams))
    return len(set(every)) / len(every)


def jackknife_of_distinct_2(texts):
    """Distinct-2 and half its interval, one answer left out at a time."""
    n = len(texts)
    grams = [list(itertools.pairwise(text.split())) for text in texts]
    without = [share_of_distinct(grams[:k] + grams[k + 1 :]) for k in range(n)]
    half = 1.96 * ((n - 1) * statistics.pvariance(without)) ** 0.5
    return share_of_distinct(grams), half


def similarity_over_all_pairs(texts):
    """Self-similarity and half its interval, from the cosines of all pairs of answers."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    n = len(texts)
    vectors = TfidfVectorizer(token_pattern=r"(?u)\w+").fit_transform(texts).toarray()
    cosines = vectors @ vectors.T
    means = []  # of the cosines of one answer to the others
    for i in range(n):
        means.append(statistics.mean(cosines[i, j] for j in range(n) if j != i))
    return statistics.mean(means), 2 * 1.96 * statistics.stdev(means) / n**0.5


def test_intervals_and_variety_are_those_of_plain_recomputation(pairrm, tmp_path):
    rng = random.Random(0)
    ours = random_texts(rng, 40, 2, 12)
    theirs = random_texts(rng, 40, 2, 12)
    ours[3] = theirs[3]
    our_path = write_answers(tmp_path / "a.jsonl", ours, answer=["cat"] * 40)
    their_path = write_answers(tmp_path / "b.jsonl", theirs, order=-1)

    scores = rate(tmp_path, our_path, their_path, eval_ranker_model=pairrm)

    assert scores["length_unit"] == "characters"
    assert scores["ties"] == 1
    assert (scores["n"], scores["invalid"]) == (40, 0)
    assert scores["length"] == statistics.mean(map(len, ours))
    assert scores["baseline_length"] == statistics.mean(map(len, theirs))
    measured = {
        "length": [len(text) for text in ours],
        "accuracy": [100 * ("cat" in text.split()) for text in ours],
    }
    for name, values in measured.items():
        mean = statistics.mean(values)
        half = 1.96 * statistics.stdev(values) / 40**0.5
        assert scores[name] == pytest.approx(mean)
        assert scores[name + "_ci"] == pytest.approx([mean - half, mean + half])

    swapped = rate(tmp_path, their_path, our_path, eval_ranker_model=pairrm)
    assert scores["win_rate"] + swapped["win_rate"] == pytest.approx(100)
    assert scores["win_rate"] not in (0, 50, 100)

    distinct, half = jackknife_of_distinct_2(ours)
    assert scores["distinct_2"] == pytest.approx(distinct)
    assert scores["distinct_2_ci"] == pytest.approx([distinct - half, distinct + half])

    similarity, half = similarity_over_all_pairs(ours)
    assert scores["self_similarity"] == pytest.approx(similarity)
    high = scores["self_similarity_ci"][1]
    assert high - scores["self_similarity"] == pytest.approx(half)


def test_equal_answers_tie_without_a_judge_and_few_of_them_still_give_scores(tmp_path):
    response = {"text": "x", "ids": [5, 6], "finished": False}
    path = write_answers(tmp_path / "a.jsonl", [response])

    scores = rate(tmp_path, path, path, eval_ranker_model="nowhere")

    assert (scores["win_rate"], scores["lc_win_rate"], scores["ties"]) == (50, 50, 1)
    assert (scores["length"], scores["length_unit"]) == (2, "tokens")
    assert scores["accuracy"] is None
    assert scores["finished"] == 0
    assert "distinct_2" not in scores


# ---- each ranker can evaluate ----


@pytest.fixture
def answers(tmp_path):
    """Texts of 12 answers and of as many others, of which the first are equal, and their files."""
    rng = random.Random(1)
    ours = random_texts(rng, 12, 2, 9)
    ours[1] += " "
    theirs = random_texts(rng, 12, 2, 9)
    ours[0] = theirs[0]
    our_path = write_answers(tmp_path / "a.jsonl", ours, answer=["dogs"] * 12)
    their_path = write_answers(tmp_path / "b.jsonl", theirs)
    return ours, theirs, our_path, their_path


def test_a_reward_model_can_evaluate(answers, tmp_path):
    _, _, our_path, their_path = answers
    model = build_reward(tmp_path / "reward")

    scores = rate(tmp_path, our_path, their_path, eval_ranker="reward", eval_ranker_model=model)

    assert scores["n"] == 12
    assert scores["ties"] == 1


def test_the_right_answer_can_evaluate(answers, tmp_path):
    ours, theirs, our_path, their_path = answers

    scores = rate(tmp_path, our_path, their_path, eval_ranker="answer")

    assert scores["judge"] == "answer"
    won = []
    for text, other in zip(ours, theirs):
        won.append((1 + ("dogs" in text.split()) - ("dogs" in other.split())) / 2)
    assert scores["win_rate"] == pytest.approx(100 * statistics.mean(won))


def test_instructions_are_counted_beside_right_answers_and_can_evaluate(tmp_path, capsys):
    short = {"follow": [{"at_most_words": 2}, {"no": ","}]}
    truths = [short, short, short, "cat", "dog", None]
    ours = ["one two", "one, two", "one, two, three", "a cat", "a cat", "x"]
    theirs = ["one, two", "one two", "one, two, three, four", "a dog", "a hen", "y"]
    our_path = write_answers(tmp_path / "a.jsonl", ours[:5], answer=truths)
    their_path = write_answers(tmp_path / "b.jsonl", theirs)

    scores = rate(tmp_path, our_path, their_path, eval_ranker="answer")

    assert scores["win_rate"] == pytest.approx(100 * (1 + 0 + 0.5 + 1 + 0.5) / 5)
    assert scores["accuracy"] == 50
    assert scores["followed"] == pytest.approx(100 / 3)
    assert scores["followed_share"] == 50
    half = 1.96 * statistics.stdev([100, 0, 0]) / 3**0.5
    assert scores["followed_ci"] == pytest.approx([100 / 3 - half, 100 / 3 + half])
    printed = capsys.readouterr().out
    assert "accuracy 50.00 %, followed 33.33 % (share 50.00 %), " in printed
    assert "by answer ->" in printed

    # where prompts carry neither, there is neither
    path = write_answers(tmp_path / "c.jsonl", ["x"])
    scores = rate(tmp_path, path, path)
    assert scores["accuracy"] is scores["followed"] is scores["followed_share"] is None
    printed = capsys.readouterr().out
    assert "accuracy" not in printed
    assert "followed" not in printed
    assert "no guard: no prompt carries an 'answer'" in printed


def test_a_win_rate_above_half_with_a_lower_guard_raises_an_alarm(tmp_path, capsys):
    """By a judge that likes length, as the one of tests/test_judge.py does."""
    n = 12
    truth = [{"follow": [{"at_most_words": 2}]}] * n + ["cat"] * n
    short = [f"one {k}" for k in range(n)] + [f"the cat {k}" for k in range(n)]
    long = [f"{k} and many more words" for k in range(n)] + [
        f"a much longer dog {k}" for k in range(n)
    ]
    good = write_answers(tmp_path / "a.jsonl", short, answer=truth)
    bad = write_answers(tmp_path / "b.jsonl", long, answer=truth)
    server = Judge()
    settings = {"eval_ranker": "judge", "eval_ranker_model": "gpt-j", "judge_url": server.url}

    scores = rate(tmp_path, bad, good, **settings)
    printed = capsys.readouterr().out

    assert scores["win_rate"] == 100
    assert (scores["n_accuracy"], scores["n_followed"]) == (n, n)
    before = scores["guard_of_baseline"]
    assert (before["accuracy"], before["followed"], scores["accuracy"]) == (100, 100, 0)
    for words in ("accuracy", "share of prompts followed"):
        assert f"(100.0 % wins), but the {words} is 0.0 %, and 100.0 % in the baseline's" in printed

    rate(tmp_path, good, bad, **settings)
    assert "GUARD ALARM" not in capsys.readouterr().out

    # three prompts are too few to tell
    few = write_answers(tmp_path / "c.jsonl", long[:3], answer=truth[:3])
    rate(tmp_path, few, good, **settings)
    assert "GUARD ALARM" not in capsys.readouterr().out


def test_the_guard_alone_grades_answers_that_nobody_judges(tmp_path, capsys):
    short = {"follow": [{"at_most_words": 2}, {"no": ","}]}
    truths = ["cat", "cat", "cat", "cat", short, short, None]
    texts = ["a cat", "the cat", "one cat", "a dog", "one, two", "one two", "x"]
    path = write_answers(tmp_path / "a.jsonl", texts, answer=truths)

    scores = rate(tmp_path, path, "", bench="guard")

    assert (scores["bench"], scores["judge"]) == ("guard", "answer")
    assert (scores["n"], scores["n_accuracy"], scores["n_followed"]) == (6, 4, 2)
    assert (scores["accuracy"], scores["followed"], scores["followed_share"]) == (75, 50, 75)
    half = 1.96 * statistics.stdev([100, 100, 100, 0]) / 2
    assert scores["accuracy_ci"] == pytest.approx([75 - half, 75 + half])
    assert not scores.keys() & {"win_rate", "length", "finished"}
    printed = capsys.readouterr().out
    assert f"guard: accuracy 75.00 % ({75 - half:.2f} to {75 + half:.2f}), n 4 ->" in printed
    assert "guard: followed 50.00 % " in printed

    # where all are right, or all wrong, the interval is Wilson's: 3 / (3 + 1.96^2) and the like
    path = write_answers(tmp_path / "c.jsonl", ["cat"] * 4, answer=["cat"] * 3 + [short])
    scores = rate(tmp_path, path, "", bench="guard")
    assert scores["accuracy_ci"] == pytest.approx([100 * 3 / (3 + 1.96**2), 100])
    assert scores["followed_ci"] == pytest.approx([100 / (1 + 1.96**2), 100])
    path = write_answers(tmp_path / "d.jsonl", ["dog"] * 9, answer=["cat"] * 9)
    scores = rate(tmp_path, path, "", bench="guard")
    assert scores["accuracy_ci"] == pytest.approx([0, 100 * 1.96**2 / (9 + 1.96**2)])
    assert scores["followed_ci"] is None

    # a guard of what carries no answer is a slip
    unanswered = write_answers(tmp_path / "b.jsonl", ["x"])
    _, message = evaluate(tmp_path, unanswered, "", bench="guard")
    assert message == f"{unanswered}: no prompt in it carries an 'answer'"


def test_the_right_answer_evaluates_without_a_model_and_wants_an_answer(tmp_path, answers):
    _, _, our_path, their_path = answers
    unanswered = write_answers(tmp_path / "c.jsonl", ["x"])
    other = write_answers(tmp_path / "d.jsonl", ["y"])

    out, message = evaluate(tmp_path, our_path, their_path, eval_ranker="answer")
    _, unanswered_message = evaluate(tmp_path, unanswered, other, eval_ranker="answer")

    assert not message
    manifest = read_json(out.with_suffix(".manifest.json"))
    assert manifest["settings"]["eval_ranker_model"] == ""
    assert "eval_ranker_model" not in manifest["inputs"]
    assert "prompt 'p0' has no 'answer'" in unanswered_message


@pytest.mark.parametrize(
    "answer, reason",
    [
        ([], "a list of no answers"),
        ({"accept": ["cat"]}, "KeyError: 'among'"),
        ({"accept": ["cat"], "among": "("}, "unterminated subpattern"),
        ({"follow": [{"at_most_word": 3}]}, "no check 'at_most_word'; there are at_most_words, "),
        ({"follow": [{"bullets": "3"}]}, "'bullets' takes a whole number above 0, not '3'"),
    ],
)
def test_an_answer_of_no_kind_is_one_line_that_names_the_prompt(tmp_path, answer, reason):
    path = write_answers(tmp_path / "a.jsonl", ["a cat", "a dog"], answer=["cat", answer])

    message = refusal(tmp_path, path, path)

    assert message.startswith("prompt 'p1': its 'answer' is not as nanoaipo/grading.py has it (")
    assert reason in message
    assert "\n" not in message


def test_a_judge_at_an_endpoint_can_evaluate(answers, tmp_path):
    ours, theirs, our_path, their_path = answers

    def no_verdict(server, handler, text):
        if f"\n{ours[2]}\n" not in text and f"\n{ours[5]}\n" not in text:
            return False
        message = {"role": "assistant", "content": "?"}
        handler.reply({"choices": [{"message": message}]})
        return True

    server = Judge(misbehave=no_verdict)
    settings = {"eval_ranker": "judge", "eval_ranker_model": "gpt-j", "judge_url": server.url}

    scores = rate(tmp_path, our_path, their_path, **settings)

    won = []  # this judge likes the longer answer
    for k, (text, other) in enumerate(zip(ours, theirs)):
        if k in (2, 5):
            continue
        won.append(0.5 if text == other else float(len(text) > len(other)))
    assert scores["win_rate"] == pytest.approx(100 * statistics.mean(won))
    assert (scores["n"], scores["invalid"]) == (10, 2)
    assert len(server.bodies) == 22
    low, high = scores["lc_win_rate_ci"]
    assert low <= scores["lc_win_rate"] <= high
    assert scores["judge"] == "judge gpt-j"


def test_a_win_rate_names_the_model_that_answered_to_the_judges_name(answers, tmp_path, capsys):
    _, _, our_path, their_path = answers

    def snapshot(server, handler, text):
        who = {"model": "gpt-j-2025-04-14", "system_fingerprint": "fp_1"}
        handler.reply(choice(verdict(text)) | who)
        return True

    server = Judge(misbehave=snapshot)
    settings = {"eval_ranker": "judge", "eval_ranker_model": "gpt-j", "judge_url": server.url}

    scores = rate(tmp_path, our_path, their_path, **settings)

    assert "by judge gpt-j (served gpt-j-2025-04-14) ->" in capsys.readouterr().out
    assert (scores["judge"], scores["served_model"]) == ("judge gpt-j", "gpt-j-2025-04-14")
    assert scores["fingerprints"] == {"fp_1": 22}


def test_a_judge_here_can_evaluate(answers, tmp_path):
    _, _, our_path, their_path = answers
    settings = {
        "eval_ranker": "judge",
        "eval_ranker_model": build_model(tmp_path / "judge", max_position_embeddings=4096),
        "engine": "transformers",
        "dtype": "float32",
        "verdict_tokens": 12,
    }

    scores = rate(tmp_path, our_path, their_path, **settings)

    # its weights are random: only the equal answers have a verdict
    assert (scores["n"], scores["invalid"], scores["ties"]) == (1, 11, 1)
    assert len(read(tmp_path / "e0.replies")) == 22


def test_answers_that_do_not_fit_together_are_refused(tmp_path):
    one = write_answers(tmp_path / "a.jsonl", ["x"])
    two = write_answers(tmp_path / "b.jsonl", ["x", "y"])
    none = write(tmp_path / "c.jsonl", [])
    no_response = {"id": "p0", "prompt": "x", "responses": []}
    empty = write(tmp_path / "d.jsonl", [no_response])
    twice = write(tmp_path / "e.jsonl", read(one) * 2)

    assert "no answer to 1 of the prompts" in refusal(tmp_path, two, one)
    assert "no answers in it" in refusal(tmp_path, none, one)
    assert "no answer in it" in refusal(tmp_path, empty, one)
    assert "id 'p0' is there twice" in refusal(tmp_path, twice, one)
    assert not list(tmp_path.glob("e*.json"))


def test_outputs_as_alpaca_eval_has_them_are_compared_once_each_is_a_list(tmp_path):
    rows = [{"instruction": f"task {k}", "output": "w" * k, "generator": "m"} for k in range(1, 9)]
    official = write(tmp_path / "model_outputs.json", rows)

    message = refusal(tmp_path, official, official)
    assert message.startswith(f"{official}:1: neither 'responses' nor")
    assert message.endswith("'output', has to be written as 'responses': [output]")

    rows = [{"instruction": row["instruction"], "responses": [row["output"]]} for row in rows]
    path = write(tmp_path / "a.jsonl", rows)
    out, message = evaluate(tmp_path, path, path)
    assert not message
    assert read_json(out)["n"] == 8


# ---- the length-controlled win rate ----


def intercept_only(difference, won):
    """The length-controlled win rate with no column but the intercept."""
    return stats.length_controlled(difference, won, np.ones((len(won), 1)))[0]


def test_the_interval_of_the_length_controlled_rate_is_a_bootstrap(tmp_path):
    rng = random.Random(2)
    texts = {"yes": [], "no": []}
    for texts_of_one in texts.values():
        for _ in range(80):
            texts_of_one.append("w" * rng.randint(10, 60))
    truth = []  # the longer answer is more often the right one
    for a, b in zip(texts["yes"], texts["no"]):
        p = 1 / (1 + math.exp(-(len(a) - len(b)) / 20))
        truth.append("yes" if rng.random() < p else "no")
    paths = {}
    for name, some in texts.items():
        stated = [f"answer: {name} {text}" for text in some]
        paths[name] = write_answers(tmp_path / f"{name}.jsonl", stated, answer=truth)

    scores = rate(tmp_path, paths["yes"], paths["no"], eval_ranker="answer", eval_ranker_model="-")

    won = np.array([t == "yes" for t in truth], float)
    # "no" is a character shorter than "yes"
    longer = [len(b) - 1 - len(a) for a, b in zip(texts["yes"], texts["no"])]
    longer = np.array(longer, float)
    rates = []
    for _ in range(1000):
        k = np.array(rng.choices(range(80), k=80))
        rates.append(100 * intercept_only(longer[k], won[k]))
    low, high = np.percentile(rates, [2.5, 97.5])
    assert scores["lc_win_rate"] == pytest.approx(100 * intercept_only(longer, won))
    assert scores["lc_win_rate_ci"] == pytest.approx([low, high], abs=2.5)
    assert abs(scores["win_rate"] - 100 * won.mean()) < 1e-9
    assert high - low > 10


def test_a_known_effect_of_length_is_taken_out_and_odd_data_stay_finite():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 100, 4000)
    longer = noise + 60
    p = 1 / (1 + np.exp(2 * np.tanh(longer / 100) - 0.4))
    won = (rng.random(4000) < p).astype(float)

    # shorter answers win, and at equal length the odds are exp(0.4)
    assert won.mean() < 0.45
    assert abs(intercept_only(longer, won) - 1 / (1 + math.exp(-0.4))) < 0.02
    assert abs(np.tanh(longer / longer.std(ddof=1)).mean()) > 0.02

    # perfectly separable, and nothing to control
    separable = (noise < 0) * 1.0
    assert intercept_only(noise, separable) == pytest.approx(0.5, abs=0.05)
    assert intercept_only(np.zeros(4000), won) == pytest.approx(won.mean(), abs=0.001)

    # a single answer, and answers that all win or all lose
    assert 0.5 < intercept_only(np.array([9.0]), np.array([1.0])) < 1
    assert 0 < intercept_only(np.array([9.0]), np.array([0.0])) < 0.5
    assert 0.9 < intercept_only(np.arange(8.0), np.ones(8)) < 1
    assert 0 < intercept_only(np.arange(8.0), np.zeros(8)) < 0.1

    # two thirds of the verdicts
    some = np.where(np.arange(4000) % 3, won, np.nan)
    assert intercept_only(noise, some) == pytest.approx(intercept_only(noise, won), abs=0.02)
