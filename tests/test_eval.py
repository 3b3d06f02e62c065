"""Scores against published ones and against plain re-computations; judging through a scripted endpoint, whatever befalls it."""
import collections
import csv
import glob
import gzip
import itertools
import json
import math
import os
import random
import re
import runpy
import signal
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from nanoaipo import stats
from nanoaipo.benchmarks import alpaca_eval
from nanoaipo.benchmarks.answers import answers_of
from nanoaipo.benchmarks import arena_hard
from nanoaipo.benchmarks.mt_bench import rating_of
from nanoaipo import files
from nanoaipo import questions
from nanoaipo.benchmarks import BENCHMARKS
from conftest import ROOT, build_model, run
from test_judge import KEY, Judge
from test_rank import build_judge
from test_rankers import build_reward

SHARED = ROOT.parent / "shared" / "data" / "eval"
ALPACA, MT, ARENA = (SHARED / name for name in ("alpaca_eval", "mt_bench", "arena_hard_v0.1"))
published = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there: published judgments were not scored")
JUDGED = ("gpt-3.5-turbo-1106", "FuseChat-Llama-3.1-8B-Instruct")


def write(path, rows):
    """Rows as JSONL, or as an array in a .json file; gzip where the name says so. Returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(r) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def score(bench, path, name="", answers="", lc_data="", baseline=""):
    return BENCHMARKS[bench].score(str(path), name, str(answers), (str(lc_data), str(baseline)))


def judge_by(url, tmp_path, bench, **settings):
    judgments = tmp_path / ("j.json" if bench == "alpaca_eval" else "j.jsonl")
    asked = dict(bench=bench, answers=tmp_path / "answers.json", baseline=tmp_path / "baseline.json", bench_data=tmp_path / "bench", judge_model="gpt-j",
                 judge_url=url, judgments=judgments, lc_data=tmp_path / "lc", out=tmp_path / "score.json", judge_concurrency=8) | settings
    return ["eval.py", *(f"--{k}={v}" for k, v in asked.items() if v != "")]


def done(*command):
    result = run(*command, env={"OPENAI_API_KEY": KEY})
    assert result.returncode == 0 and KEY not in result.stdout + result.stderr, result.stderr
    return result


def loaded(path):
    return [row for _, row in files.read_records(str(path))]


# ---------------------------------------------------------------------------------------------- published scores


@published
@pytest.mark.parametrize("model", JUDGED)
def test_alpaca_eval_scores_are_those_of_the_leaderboard(model):
    row = {r[""]: r for r in csv.DictReader(open(ALPACA / "leaderboard.csv"))}[model]
    scores = score("alpaca_eval", ALPACA / model / "annotations.json.gz", answers=ALPACA / model / "model_outputs.json.gz", lc_data=ALPACA)
    for ours, theirs in (("win_rate", "win_rate"), ("standard_error", "standard_error"), ("discrete_win_rate", "discrete_win_rate")):
        assert scores[ours] == pytest.approx(float(row[theirs]), abs=1e-4)
    assert scores["avg_length"] == int(row["avg_length"]) and scores["n"] == int(row["n_total"]) and scores["model"] == model
    assert scores["lc_win_rate"] == pytest.approx(float(row["length_controlled_winrate"]), abs=0.15)
    assert not row["lc_standard_error"] or scores["lc_standard_error"] == pytest.approx(float(row["lc_standard_error"]), abs=0.01)


@published
def test_answers_alone_have_the_published_lengths():
    rows = {r[""]: r for r in csv.DictReader(open(ALPACA / "leaderboard.csv"))}
    for path in glob.glob(str(ALPACA / "outputs_only" / "*.json.gz")):
        found, name = answers_of(path)
        expected = {"Snorkel-Mistral-PairRM-DPO": 2736, "SPPO-Llama-3-Instruct-8B-PairRM": 2066}[os.path.basename(path)[:-8]]
        assert int(statistics.mean(len(texts[0]) for texts, _ in found.values())) == expected and (name not in rows or int(rows[name]["avg_length"]) == expected)


@published
def test_order_and_log_probs_give_every_published_preference():
    checked = 0
    for row in loaded(ALPACA / JUDGED[0] / "annotations.json.gz"):
        if not row["raw_completion"]:
            continue
        swapped = random.Random("is_switched_outputs" + row["instruction"] + "0").choices([False, True])[0]
        ours = alpaca_eval.preference_of({"logprobs": row["raw_completion"]["logprobs"], "reply": ""})
        assert (3 - ours if swapped else ours) == pytest.approx(row["preference"], abs=1e-9)
        checked += 1
    assert checked > 790


@published
def test_difficulty_goes_by_instruction_not_by_row(tmp_path):
    rows = loaded(ALPACA / JUDGED[0] / "annotations.json.gz")
    whole = score("alpaca_eval", ALPACA / JUDGED[0] / "annotations.json.gz", lc_data=ALPACA)
    random.Random(0).shuffle(rows)
    assert score("alpaca_eval", write(tmp_path / "s.json", rows), lc_data=ALPACA) == pytest.approx(whole, abs=1e-7)
    shuffled = write(tmp_path / "other.json", random.Random(1).sample(loaded(ALPACA / "baseline_gpt4_1106_preview.json.gz"), 805))
    assert score("alpaca_eval", tmp_path / "s.json", lc_data=ALPACA, baseline=shuffled)["lc_win_rate"] == pytest.approx(whole["lc_win_rate"])
    rows = [r for k, r in enumerate(loaded(ALPACA / JUDGED[0] / "annotations.json.gz")) if k not in (3, 40, 99, 200, 333)]
    scores = score("alpaca_eval", write(tmp_path / "d.json", rows), lc_data=ALPACA)
    place = {r["instruction"]: r["index"] for r in loaded(ALPACA / "instructions.json")}
    gamma = [float(r["instruction_difficulty"]) for r in csv.DictReader(open(ALPACA / "instruction_difficulty_recovered.csv"))]
    aligned, by_row = (oracle(rows, [gamma[k] for k in keys], gamed()) for keys in ([place[r["instruction"]] for r in rows], range(800)))
    assert scores["missing"] == 5 and scores["lc_win_rate"] == pytest.approx(aligned, abs=1e-3) and abs(by_row - aligned) > 1e-2


@published
@pytest.mark.parametrize("model, expected, turns", [("mamba_0_5_dpo_ep1", 7.12, (7.594, 6.650)), ("mamba_0_5_dpo_ep3", 7.31, (7.738, 6.888))])
def test_mt_bench_scores_are_the_published_ones(model, expected, turns):
    scores = score("mt_bench", MT / "judgments" / f"{model}.jsonl.gz")
    assert round(scores["score"], 2) == expected and (scores["turn_1"], scores["turn_2"]) == pytest.approx(turns, abs=6e-4)
    assert (scores["n"], scores["invalid"], scores["missing"]) == (160, 0, 0) and len(scores["categories"]) == 8 and scores["judge"] == "gpt-4"


@published
def test_a_real_file_with_a_model_judged_twice_and_an_unreadable_rating_is_told_so(tmp_path):
    path = MT / "judgments" / "quirks_minus_one_and_duplicates.jsonl.gz"
    rows = collections.defaultdict(list)
    for row in loaded(path):
        rows[row["model"]].append(row)
    with pytest.raises(SystemExit, match="of 3 models .*--answer_name says which"):
        score("mt_bench", path)
    seen = collections.Counter()
    for name, own in rows.items():
        once = list({(r["question_id"], r["turn"]): r for r in own[::-1]}.values())
        if len(once) < len(own):
            seen["twice"] += 1
            with pytest.raises(SystemExit, match=r"gz:\d+: judges question \d+, turn \d again, as .*gz:\d+ did; remove"):
                score("mt_bench", path, name)
        scores, valid = score("mt_bench", write(tmp_path / "once.jsonl", once), name), [r["score"] for r in once if r["score"] != -1]
        assert scores["score"] == pytest.approx(statistics.mean(valid)) and scores["invalid"] == len(once) - len(valid)
        seen["invalid"] += scores["invalid"]
    assert seen == {"twice": 1, "invalid": 1}


@published
def test_arena_hard_scores_are_the_published_ones():
    model = "gpt-3.5-turbo-0125"
    scores = score("arena_hard", ARENA / "battles" / f"{model}.jsonl.gz", answers=ARENA / "model_answer" / f"{model}.jsonl.gz")
    assert (round(scores["win_rate"], 2), scores["avg_tokens"], scores["n"]) == (23.34, 329, 500)
    assert 2 < scores["win_rate"] - scores["ci"][0] < 5 and 2 < scores["ci"][1] - scores["win_rate"] < 5
    (partial,) = glob.glob(str(ARENA / "judgments_partial" / "*.gz"))
    scores = score("arena_hard", partial)
    none = sum(g["score"] not in ("A>>B", "A>B", "A=B", "B>A", "B>>A") for r in loaded(partial) for g in r["games"])
    assert round(scores["win_rate"], 4) == 12.8931 and scores["invalid"] == none > 0 and scores["judge"] == "gpt-4-1106-preview"


# ---------------------------------------------------------------------------------------------- the length-controlled fit


def gamed(path=ALPACA / "df_gamed_reconstructed.csv"):
    return [(math.tanh(float(r["std_delta_len"])), float(r["instruction_difficulty"]), 0.0, float(r["preference"])) for r in csv.DictReader(open(path))]


def oracle(rows, gamma, extra):
    """The length-controlled win rate by scikit-learn: fractional targets as rows with both labels, weighted."""
    from sklearn.linear_model import LogisticRegression
    longer = [len(r["output_1"]) - len(r["output_2"]) for r in rows]
    sd = statistics.stdev(longer) or 1
    table = [(math.tanh(d / sd), g, 1.0, r["preference"] - 1, 1.0) for d, g, r in zip(longer, gamma, rows)] + [(*e, 0.1) for e in extra]
    x, y, w = np.array([t[:3] for t in table]), np.array([t[3] for t in table]), np.array([t[4] for t in table])
    fit = LogisticRegression(l1_ratio=1.0, solver="liblinear", fit_intercept=False, C=10 ** (4 / 9), tol=1e-9, max_iter=100000, random_state=0)
    fit.fit(np.vstack([x, x]), np.repeat([1, 0], len(y)), np.concatenate([w * y, w * (1 - y)]))
    return 100 * statistics.mean(1 / (1 + math.exp(-fit.coef_[0][1] * g - fit.coef_[0][2])) for g in gamma)


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """(folder of the two tables, 60 annotated rows, difficulties): an AlpacaEval of our own, whose judge likes length."""
    folder, draw = tmp_path_factory.mktemp("alpaca"), random.Random(0)
    gamma = [draw.gauss(0, 1) for _ in range(60)]
    rows = [{"instruction": f"task {k}", "output_1": "b" * 100, "output_2": "m" * (100 + draw.randint(-80, 160)), "generator_1": "base", "generator_2": "mine",
             "annotator": "a judge"} for k in range(60)]
    for r, g in zip(rows, gamma):
        r["preference"] = 1 + 1 / (1 + math.exp(-(len(r["output_2"]) - 100) / 60 - g / 2 + draw.gauss(0, 1)))
    with open(folder / "df_gamed.csv", "w") as f:
        f.write("preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n")
        f.writelines(f"{draw.random()},{k},{draw.gauss(0, 1)},{g},False,x\n" for _ in range(2) for k, g in enumerate(gamma))
    write(folder / "alpaca_eval_gpt4_baseline.json", [{"instruction": r["instruction"], "output": r["output_1"], "generator": "base"} for r in rows])
    return folder, rows, gamma


def test_the_length_controlled_fit_is_that_of_scikit_learn(alpaca, tmp_path):
    folder, rows, gamma = alpaca
    scores = score("alpaca_eval", write(tmp_path / "a.json.gz", rows), lc_data=folder)
    assert scores["lc_win_rate"] == pytest.approx(oracle(rows, gamma, gamed(folder / "df_gamed.csv")), abs=0.02) and abs(scores["lc_win_rate"] - scores["win_rate"]) > 3
    won = [r["preference"] - 1 for r in rows]
    assert scores["win_rate"] == pytest.approx(100 * statistics.mean(won)) and scores["standard_error"] == pytest.approx(100 * statistics.stdev(won) / 60 ** 0.5)
    shuffled = random.Random(3).sample(rows, 50)
    expected = oracle(shuffled, [gamma[int(r["instruction"][5:])] for r in shuffled], gamed(folder / "df_gamed.csv"))
    assert score("alpaca_eval", write(tmp_path / "b.json", shuffled), lc_data=folder)["lc_win_rate"] == pytest.approx(expected, abs=0.02)


def test_a_known_effect_of_length_is_taken_out_and_odd_data_stay_finite():
    draw, one = np.random.default_rng(0), np.ones((4000, 1))
    longer = draw.normal(0, 100, 4000)
    won = (draw.random(4000) < 1 / (1 + np.exp(2 * np.tanh((longer + 60) / 100) - 0.4))).astype(float)
    x = np.tanh((longer + 60) / (longer + 60).std(ddof=1))
    assert won.mean() < 0.45 and abs(stats.length_controlled(longer + 60, won, one)[0] - 1 / (1 + math.exp(-0.4))) < 0.02 < abs(x.mean())
    assert stats.length_controlled(longer, (longer < 0) * 1.0, one)[0] == pytest.approx(0.5, abs=0.05)       # perfectly separable
    assert stats.length_controlled(np.zeros(4000), won, one)[0] == pytest.approx(won.mean(), abs=0.001)      # nothing to control
    assert 0.5 < stats.length_controlled(np.array([9.0]), np.array([1.0]), one[:1])[0] < 1
    some = np.where(np.arange(4000) % 3, won, np.nan)
    assert stats.length_controlled(longer, some, one)[0] == pytest.approx(stats.length_controlled(longer, won, one)[0], abs=0.02)


def test_preferences_of_0_are_ties_and_null_is_invalid(alpaca, tmp_path):
    odd = [r | {"preference": p} for r, p in zip(alpaca[1], (0, 1.5, None, 1.2, 1.9, 2))]
    scores = score("alpaca_eval", write(tmp_path / "a.json", odd), lc_data=alpaca[0])
    assert scores["win_rate"] == pytest.approx(100 * (0.5 + 0.5 + 0.2 + 0.9 + 1) / 5) and scores["discrete_win_rate"] == 60 and scores["lc_win_rate"] > 0
    assert (scores["n"], scores["invalid"], scores["missing"]) == (5, 1, 799)
    assert scores["avg_length"] == int(statistics.mean(len(r["output_2"]) for r in odd)) and score("alpaca_eval", write(tmp_path / "1.json", odd[-1:]), lc_data=alpaca[0])["n"] == 1


# ---------------------------------------------------------------------------------------------- small files of each format


def game(verdict):
    return {"user_prompt": "", "judgment": "", "score": verdict}


def arena(**games):
    return [{"question_id": k, "model": "m", "judge": "j", "games": [game(v) for v in pair]} for k, pair in games.items()]


def test_arena_hard_weighs_strong_verdicts_three_times_and_leaves_out_a_game_without_one(tmp_path):
    rows = arena(a=("A>>B", "A>>B"), b=("A>B", "B>A"), c=(None, "A>B"), d=("A<B", "A=B"), e=("B>>A", "A>>A"))     # the baseline is A in game 1 only
    scores = score("arena_hard", write(tmp_path / "j.jsonl.gz", rows))
    assert scores["win_rate"] == pytest.approx(100 * (3 + 1 + 0.5 + 3) / (6 + 2 + 1 + 1 + 3)) and (scores["n"], scores["invalid"]) == (5, 3)
    winners = ["model_a"] * 3 + ["model_b"] * 3 + ["model_a", "model_a", "model_b", "tie (bothbad)"] + ["model_b"] * 3
    battles = [{"question_id": q, "model_a": "base", "model_b": "m", "winner": w} for q, w in zip("aaaaaabbcdeee", winners)]
    same = score("arena_hard", write(tmp_path / "b.jsonl", battles))
    assert same["win_rate"] == scores["win_rate"] and same["ci"] == scores["ci"] and same["model"] == "m"


def test_arena_hard_2_leaves_out_the_question_and_reads_what_0_1_does_not(tmp_path):
    kinds = {"a": "hard_prompt", "b": "hard_prompt", "c": "creative_writing", "d": "creative_writing"}
    rows = [{"uid": r["question_id"], "category": kinds[r["question_id"]]} | {k: v for k, v in r.items() if k != "question_id"}
            for r in arena(a=("A<B", "A>B"), b=(None, "A>>B"), c=("A<<B", "A>B"), d=("A=B", "B>A"))]
    rows[1]["games"][0] = None
    scores = score("arena_hard", write(tmp_path / "j.jsonl", rows))
    assert scores["win_rate"] == pytest.approx(100 * (2 + 4 + 0.5) / 8) and (scores["n"], scores["invalid"]) == (3, 1)
    assert {k: (v["n"], v["win_rate"]) for k, v in scores["categories"].items()} == {"hard_prompt": (1, 100), "creative_writing": (2, pytest.approx(75))}


def test_the_bootstrap_draws_questions(tmp_path):
    draw = random.Random(0)
    both = {f"q{k}": draw.choice([("A>>B", "B>>A"), ("B>>A", "A>>B"), ("B>A", "A>B")]) for k in range(60)}       # the games of a question agree
    worth = {"B>>A": (3, 3), "A>>B": (0, 3), "B>A": (1, 1)}
    scores, counts = score("arena_hard", write(tmp_path / "j.jsonl", arena(**both))), [worth[first] for first, _ in both.values()]
    drawn = [[sum(c[k] for c in some) for k in (0, 1)] for some in (draw.choices(counts, k=60) for _ in range(4000))]
    cuts = statistics.quantiles((100 * a / b for a, b in drawn), n=40)
    assert scores["ci"] == pytest.approx([cuts[0], cuts[-1]], abs=1.5) and scores["ci"][1] - scores["ci"][0] > 22      # games alone: 18


def rating(question, turn, value, **other):
    return {"question_id": question, "model": "m", "judge": ["gpt-4", "single-v1"], "user_prompt": "", "judgment": "", "score": value, "turn": turn, "tstamp": 86400.0} | other


def test_mt_bench_is_the_mean_of_all_ratings_but_those_that_could_not_be_read(tmp_path):
    rows = [rating(81, 1, 9), rating(81, 2, 4), rating(111, 1, 5), rating(111, 2, -1), rating(160, 1, 10), rating(7, 1, 1)]
    scores = score("mt_bench", write(tmp_path / "j.jsonl", rows + [rating(81, 1, 1, model="other")]), "m")
    assert scores["score"] == pytest.approx(29 / 5) and (scores["turn_1"], scores["turn_2"], scores["date"]) == (25 / 4, 4, "1970-01-02")
    assert scores["categories"] == {"writing": 6.5, "math": 5, "humanities": 10, "other": 1} and (scores["n"], scores["invalid"], scores["missing"]) == (5, 1, 154)


@pytest.mark.parametrize("reply, value", [("So [[7]].", 7), ("[8] or [[7.5]]", 7.5), ("Rating: [7]", 7), ("seven", -1), ("", -1), ("[[x]]", -1)])
def test_the_rating_of_a_reply(reply, value):
    assert rating_of(reply) == value


@pytest.mark.parametrize("reply, old, new", [
    ("[[A>>B]]", "A>>B", "A>>B"), ("[[A>B]], as I said: [[A>B]]", "A>B", "A>B"), ("[[A>B]] no [[B>A]]", None, "B>A"), ("[[A>> B]]", None, None),
    ("[[a>b]]", None, "A>B"), ("[A=B]", None, "A=B"), ("A>B", None, None)])
def test_the_verdict_of_a_reply(reply, old, new):
    assert arena_hard.verdict_of(reply, False) == old and arena_hard.verdict_of(reply, True) == new


@pytest.mark.parametrize("top, text, preference", [
    ({"m": 0.75, "M": 0.25}, "M", 1.25), ({"M": 0.9, "x": 0.1}, "m", 2.0), ({"m": 0.2}, "M", 1.0), ({"x": 1.0}, "m", None),
    (None, "m", 1.0), (None, "The best is **M**.", 2.0), (None, "I'm for M, not m", 1.0), (None, "I'm sure.", None), (None, "", None)])
def test_the_preference_of_a_reply(top, text, preference):
    logprobs = top and {"content": [{"token": "?", "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in top.items()]}]}
    assert alpaca_eval.preference_of({"reply": text, "logprobs": logprobs}) == (preference if preference is None else pytest.approx(preference))


ANNOTATION = {"instruction": "task 0", "output_1": "a", "output_2": "bb", "generator_2": "m", "annotator": "j", "preference": 1.5}
WRONG = {
    "no_json": ("mt_bench", b'{"question_id": 81', "w.jsonl:1: not JSON"), "cut": ("mt_bench", gzip.compress(b'{"a": 1}\n' * 99)[:-9], "not JSON"),
    "cut_array": ("alpaca_eval", gzip.compress(b'[{"a": 1}]')[:-9], "not JSON"), "no_gzip": ("mt_bench", b"{}", "not JSON: Not a gzipped"),
    "empty": ("mt_bench", b"", "judgments of 0 models"), "empty_array": ("alpaca_eval", b"[]", "judgments of 0 models"), "empty_arena": ("arena_hard", b"", "of 0 models"),
    "other_bench": ("mt_bench", arena(a=("A>B", "A>B")), "w.jsonl:1: field 'score' is missing"), "other": ("arena_hard", [rating(81, 1, 5)], "not judgments as arena_hard"),
    "text_for_number": ("mt_bench", [rating(81, 1, "high")], "not judgments as mt_bench"), "one_game": ("arena_hard", [arena(a=("A>B",))[0]], "not judgments as arena_hard"),
    "no_text": ("alpaca_eval", [ANNOTATION | {"output_2": ["x"]}], "w.jsonl:1: 'output_2' has to be a text"), "no_object": ("mt_bench", [3], "w.jsonl:1: a record"),
    "beyond_2": ("alpaca_eval", [ANNOTATION | {"preference": 3}], "a preference is between 1 and 2"), "all_null": ("alpaca_eval", [ANNOTATION | {"preference": None}], "not one"),
    "no_rating": ("mt_bench", [rating(81, 1, -1)], "not one rating"), "no_verdict": ("arena_hard", arena(a=(None, "x")), "not one verdict on m"),
    "two_judges": ("mt_bench", [rating(81, 1, 5), rating(82, 1, 5, judge=["gpt-5", "single-v1"])], "judged by gpt-4 and by gpt-5; two judges are never"),
    "two_annotators": ("alpaca_eval", [ANNOTATION, ANNOTATION | {"instruction": "x", "annotator": "k"}], "two judges are never"),
    "two_arena": ("arena_hard", arena(a=("A>B", "A>B")) + [arena(b=("A>B", "A>B"))[0] | {"judge": "k"}], "two judges are never"),
    "twice": ("arena_hard", arena(a=("A>B", "A>B")) * 2, "w.jsonl:2: judges a again"), "unknown": ("alpaca_eval", [ANNOTATION | {"instruction": "?"}], "is not one of AlpacaEval's"),
    "no_table": ("alpaca_eval", [ANNOTATION], "holds no df_gamed*.csv"), "no_bench": ("alpaca", b"[]", "--bench=alpaca: there are win_rate"),
    "stamp": ("mt_bench", [rating(81, 1, 5, tstamp=math.inf)], "not judgments as mt_bench"),
    "no_name": ("mt_bench", [rating(81, 1, 5)], "no judgments of --answer_name=q")}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_cannot_be_scored_are_named_in_one_line_and_leave_nothing(case, alpaca, tmp_path):
    bench, content, message = WRONG[case]
    path = tmp_path / ("w.json" + "l" * (bench != "alpaca_eval" or "array" not in case) + ".gz" * (case in ("cut", "cut_array", "no_gzip")))
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    extra = {"lc_data": tmp_path if case == "no_table" else alpaca[0]} if bench == "alpaca_eval" else {"answer_name": "q"} if case == "no_name" else {}
    result = run("eval.py", bench=bench, judgments=path, out=tmp_path / "s.json", **extra)
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1 and os.listdir(tmp_path) == [path.name]


# ---------------------------------------------------------------------------------------------- a judge that is asked


class Grader(Judge):
    """The scripted endpoint: say(messages) gives text, or (text, {token: probability}); trouble may answer first. Counts what it answered."""

    def __init__(self, say, trouble=lambda server, handler: False, port=0):
        self.paid, self.say, self.trouble, self.lock = collections.Counter(), say, trouble, threading.Lock()
        super().__init__(port, misbehave=Grader.grade)

    def grade(self, handler, text):
        if self.trouble(self, handler):
            return True
        said = self.say(handler.body["messages"])
        text, top = said if isinstance(said, tuple) else (said, {})
        content = [{"token": text, "logprob": 0.0, "bytes": None, "top_logprobs": [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top.items()]}]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if top and handler.body.get("logprobs"):
            choice["logprobs"] = {"content": content}
        with self.lock:
            self.paid[json.dumps(handler.body["messages"])] += 1
        handler.reply({"id": "x", "object": "chat.completion", "created": 0, "model": "x", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}})
        return True


PROMPT = "<|im_start|>system\nYou judge.\n<|im_end|>\n<|im_start|>user\nTask: {instruction}\nm: {output_1}|\nM: {output_2}|\n<|im_end|>"


def longer_wins(messages):
    m, M = re.search(r"\nm: (.*)\|\nM: (.*)\|", messages[-1]["content"], re.DOTALL).groups()
    return ("m" if len(m) > len(M) else "M"), {"m": 0.8 if len(m) > len(M) else 0.1, "M": 0.1 if len(m) > len(M) else 0.8}


def alpaca_bench(alpaca, tmp_path, n=60):
    """What judging AlpacaEval needs; answer 0 is that of the baseline, answer 1 has placeholders in it."""
    folder, rows, _ = alpaca
    texts = [rows[0]["output_1"], "{output_1} {instruction} " + "x" * 99, *(r["output_2"] for r in rows[2:])]
    write(tmp_path / "answers.json", [{"instruction": r["instruction"], "output": t, "generator": "mine"} for r, t in zip(rows[:n], texts)][::-1])
    write(tmp_path / "baseline.json", loaded(folder / "alpaca_eval_gpt4_baseline.json"))
    for name, text in (("alpaca_eval_clf_gpt4_turbo", PROMPT), ("alpaca_eval_clf_cot_gpt4_turbo", "<|im_start|>user\nExplain.<|im_end|>")):      # as in a clone of theirs
        os.makedirs(tmp_path / "bench" / "evaluators_configs" / name)
        (tmp_path / "bench" / "evaluators_configs" / name / "alpaca_eval_clf.txt").write_text(text)
    return texts[:n]


def test_alpaca_eval_judged_by_log_probs_is_scored_by_the_same_command(alpaca, tmp_path):
    texts, server = alpaca_bench(alpaca, tmp_path), Grader(longer_wins)
    command = judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0])
    done(*command)
    rows, scores = loaded(tmp_path / "j.json"), json.load(open(tmp_path / "score.json"))
    assert [r["output_2"] for r in rows] == texts and len(server.paid) == sum(server.paid.values()) == 59
    assert all(r["preference"] == pytest.approx(1.5 if k == 0 else 2 - 1 / 9 if len(r["output_2"]) > 100 else 1 + 1 / 9 if len(r["output_2"]) < 100 else r["preference"])
               for k, r in enumerate(rows))
    switched = [random.Random(f"is_switched_outputs{r['instruction']}0").choices([False, True])[0] for r in rows]
    shown = {m[1]["content"].split("\n")[0][6:]: m[1]["content"] for m in map(json.loads, server.paid)}
    assert all(f"\nm: {r['output_2' if s else 'output_1']}|\nM: {r['output_1' if s else 'output_2']}|" in shown[r["instruction"]] for r, s in zip(rows[1:], switched[1:]))
    assert all((b["temperature"], b["max_tokens"], b["top_logprobs"], b["model"]) == (1.0, 1, 5, "gpt-j") and "about" not in b for b in server.bodies)
    assert (scores["n"], scores["missing"], scores["judge"], scores["model"]) == (60, 745, "gpt-j", "mine") and "verdicts_from_text" not in scores
    assert scores["win_rate"] == pytest.approx(100 * statistics.mean(r["preference"] - 1 for r in rows)) and 0 < scores["lc_win_rate"] < 100
    assert server.keys == {f"Bearer {KEY}"} and not any(KEY in f.read_text() for f in tmp_path.rglob("*") if f.is_file())
    assert "nothing to do" in done(*command).stdout and sum(server.paid.values()) == 59
    other = run(*command, "--bench_data=elsewhere")                     # another prompt of the judge is another judgment
    assert other.returncode == 1 and "was made with another 'bench_data'" in other.stderr
    if SHARED.is_dir():
        assert {*loaded(ALPACA / JUDGED[1] / "annotations.json.gz")[0]} <= {*rows[0], "dataset"}


def test_without_log_probs_the_text_decides_and_the_table_says_so(alpaca, tmp_path):
    alpaca_bench(alpaca, tmp_path)
    done(*judge_by(Grader(lambda messages: longer_wins(messages)[0]).url, tmp_path, "alpaca_eval", lc_data=alpaca[0]))
    assert {r["preference"] for r in loaded(tmp_path / "j.json")} == {1, 1.5, 2} and json.load(open(tmp_path / "score.json"))["verdicts_from_text"] == 59


@pytest.mark.parametrize("named", ["logprobs", "top_logprobs"])
def test_a_judge_that_refuses_parameters_is_asked_without_them_and_no_question_is_lost(alpaca, tmp_path, named):
    def refuses(server, handler):
        for name in (named, "temperature", "max_tokens"):
            if name in handler.body:
                code = "unsupported_value" if name == "temperature" else "unsupported_parameter"
                handler.reply({"error": {"message": f"Unsupported: '{name}'", "type": "invalid_request_error", "param": name, "code": code}}, 400)
                return True

    alpaca_bench(alpaca, tmp_path)
    server = Grader(lambda messages: longer_wins(messages)[0], refuses)
    told = done(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0])).stdout
    assert all(f"does not take this {name}" in told for name in (named, "temperature", "max_tokens"))
    assert set(server.paid.values()) == {1} and len(server.paid) == 59 and json.load(open(tmp_path / "score.json"))["n"] == 60
    accepted = [b for b in server.bodies if not {named, "temperature", "max_tokens"} & b.keys()]
    assert len(accepted) == 59 and all(b["max_completion_tokens"] == 1 and not {"logprobs", "top_logprobs"} & b.keys() for b in accepted)


def mt_bench(tmp_path):
    """Two questions in the layout of FastChat's data folder, and answers to them."""
    folder = tmp_path / "bench" / "mt_bench"
    write(folder / "question.jsonl", [{"question_id": 81, "category": "writing", "turns": ["write {x}", "again"]}, {"question_id": 111, "category": "math", "turns": ["1+1?", "2+2?"]}])
    for place, one in (("vicuna_bench", "V"), ("mt_bench", "R")):
        write(tmp_path / "bench" / place / "reference_answer" / "gpt-4.jsonl", [{"question_id": 111 if one == "R" else 1, "model_id": "gpt-4", "choices": [{"turns": [one + "1", one + "2"]}]}])
    one, two = "Q {question}|A {answer}", "Q {question_1}, {question_2}|A {answer_1}, {answer_2}"
    write(tmp_path / "bench" / "judge_prompts.jsonl", [{"name": n, "system_prompt": n.upper(), "prompt_template": t} for n, t in (
        ("single-v1", one), ("single-math-v1", one + "|R {ref_answer_1}"), ("single-v1-multi-turn", two), ("single-math-v1-multi-turn", two + "|R {ref_answer_1}, {ref_answer_2}"))])
    return write(tmp_path / "answers.jsonl", [{"question_id": k, "model_id": "mine", "choices": [{"index": 0, "turns": [f"{k} one {{answer}}", f"{k} two"]}]} for k in (81, 111)])


def test_mt_bench_asks_with_the_template_of_the_category_and_the_judges_own_references(tmp_path):
    answers, replies = mt_bench(tmp_path), {"SINGLE-V1": "Good. [[7]]", "SINGLE-MATH-V1": "Rating: [4]", "SINGLE-V1-MULTI-TURN": "no idea", "SINGLE-MATH-V1-MULTI-TURN": "[[2.5]]"}
    server = Grader(lambda messages: replies[messages[0]["content"]])
    settings = dict(answers=answers, baseline="", lc_data="")
    done(*judge_by(server.url, tmp_path, "mt_bench", judge_model="gpt-4", **settings))
    rows, scores = loaded(tmp_path / "j.jsonl"), json.load(open(tmp_path / "score.json"))
    assert [(r["question_id"], r["turn"], r["judge"][1], r["score"]) for r in rows] == [
        (81, 1, "single-v1", 7), (81, 2, "single-v1-multi-turn", -1), (111, 1, "single-math-v1", 4), (111, 2, "single-math-v1-multi-turn", 2.5)]
    assert [r["user_prompt"] for r in rows] == ["Q write {x}|A 81 one {answer}", "Q write {x}, again|A 81 one {answer}, 81 two", "Q 1+1?|A 111 one {answer}|R R1",
                                                "Q 1+1?, 2+2?|A 111 one {answer}, 111 two|R R1, R2"]
    assert (scores["score"], scores["turn_1"], scores["turn_2"], scores["n"], scores["invalid"], scores["missing"]) == (4.5, 5.5, 2.5, 3, 1, 156)
    assert all((b["temperature"], b["max_tokens"]) == (0, 2048) and "logprobs" not in b for b in server.bodies)
    write(tmp_path / "bench" / "mt_bench" / "reference_answer" / "gpt-j.jsonl", [{"question_id": 111, "model_id": "gpt-j", "choices": [{"turns": ["own", "too"]}]}])
    done(*judge_by(server.url, tmp_path, "mt_bench", judgments=tmp_path / "k.jsonl", out=tmp_path / "t.json", **settings))
    assert [r["user_prompt"].split("|R ")[1] for r in loaded(tmp_path / "k.jsonl")[2:]] == ["own", "own, too"]
    if SHARED.is_dir():
        assert {*loaded(MT / "judgments" / "mamba_0_5_dpo_ep1.jsonl.gz")[0]} == {*rows[0]}


ARENA_CONFIG = 'temperature: 0\nmax_tokens: 99\nsystem_prompt: "Judge."\nprompt_template: ["{question_1}?\\nA: {answer_1}\\nB: {answer_2}"]\n'


def arena_bench(tmp_path, texts):
    (tmp_path / "bench" / "config").mkdir(parents=True)
    (tmp_path / "bench" / "config" / "judge_config.yaml").write_text(ARENA_CONFIG)
    write(tmp_path / "bench" / "data" / "question.jsonl", [{"question_id": k, "turns": [{"content": k}]} for k in texts])
    for name in ("answers", "baseline"):
        write(tmp_path / f"{name}.jsonl", [{"question_id": k, "model_id": name, "choices": [{"turns": [{"content": f"{name} {t}", "token_len": 8}]}]} for k, t in texts.items()])
    return dict(answers=tmp_path / "answers.jsonl", baseline=tmp_path / "baseline.jsonl", lc_data="")


def test_arena_hard_plays_two_games_and_asks_once_more_for_a_verdict(tmp_path):
    def say(messages):
        key, first = messages[1]["content"][0], "A: answers" in messages[1]["content"]
        if len(messages) == 4:
            return "" if key == "s" else "[[A>B]]"
        return {"w": "[[A>>B]]" if first else "[[B>A]]", "s": "hm" if first else "[[A>B]] or [[B>A]]", "g": "let me think {x}" if first else "[[B>>A]]"}[key]

    settings, server = arena_bench(tmp_path, {"w": "1", "s": "2", "g": "{answer_1}"}), Grader(say)
    done(*judge_by(server.url, tmp_path, "arena_hard", **settings))
    rows, scores = loaded(tmp_path / "j.jsonl"), json.load(open(tmp_path / "score.json"))
    assert {r["question_id"]: [g["score"] for g in r["games"]] for r in rows} == {"w": ["B>A", "A>>B"], "s": [None, None], "g": ["B>>A", "A>B"]}
    assert rows[2]["games"][1]["judgment"] == "let me think {x}\n[[A>B]]" and rows[2]["games"][1]["user_prompt"] == "g?\nA: answers {answer_1}\nB: baseline {answer_1}"
    assert sum(server.paid.values()) == 8 and [b for b in server.bodies if len(b["messages"]) == 4][0]["messages"][3]["content"].startswith("continue your judgment")
    assert (scores["win_rate"], scores["n"], scores["invalid"], scores["avg_tokens"], scores["judge"]) == (100, 2, 2, 8, "gpt-j")
    if SHARED.is_dir():
        theirs = loaded(glob.glob(str(ARENA / "judgments_partial" / "*.gz"))[0])[0]
        assert {*theirs} <= {*rows[0]} and {*theirs["games"][0]} == {*rows[0]["games"][0]}


def test_when_only_the_second_request_of_a_game_is_refused_the_others_still_count(tmp_path):
    long = lambda server, handler: len(handler.body["messages"]) == 4 and handler.reply({"error": {"message": "context length"}}, 400) is None
    server = Grader(lambda messages: "hm" if messages[1]["content"][0] == "s" else "[[A=B]]", long)
    done(*judge_by(server.url, tmp_path, "arena_hard", **arena_bench(tmp_path, {"s": "1", "t": "2"})))
    assert json.load(open(tmp_path / "score.json"))["n"] == 1 and json.load(open(tmp_path / "j.manifest.json"))["counts"]["refused"] == 2


def test_whatever_befalls_the_endpoint_each_question_is_paid_for_once(alpaca, tmp_path):
    """Busy, cut connections, HTML and JSON without an answer in turns; a reply of any kind but a verdict is not one."""
    def trouble(server, handler):
        task = int(re.search(r"task (\d+)", handler.body["messages"][1]["content"])[1])
        server.tries[task] += 1
        kind = (server.tries[task] + task) % 5 if server.tries[task] < 4 else 4
        if kind == 0:
            handler.connection.close()
        elif kind < 4:
            handler.reply((b"<html>busy</html>", {"choices": []}, {"error": {"message": "busy"}})[kind - 1], 503 if kind == 3 else 200)
        return kind < 4

    alpaca_bench(alpaca, tmp_path, 20)
    server = Grader(longer_wins, trouble)
    server.tries = collections.Counter()
    done(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0]))
    assert len(server.paid) == 19 and set(server.paid.values()) == {1} and sum(server.tries.values()) == 52 and json.load(open(tmp_path / "score.json"))["n"] == 20


def test_what_never_has_an_answer_in_it_is_an_error_that_is_asked_again(alpaca, tmp_path):
    alpaca_bench(alpaca, tmp_path, 10)
    echo = lambda server, handler: "task 3\n" in handler.body["messages"][1]["content"] and handler.reply(
        f"<html>{handler.headers['Authorization']}</html>".encode()) is None
    server = Grader(longer_wins, echo)
    assert "'refused': 1" in done(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0])).stdout
    assert len(server.bodies) == 8 + 4 and loaded(tmp_path / "j.json")[3]["preference"] is None and json.load(open(tmp_path / "score.json"))["invalid"] == 1
    assert not any(KEY in f.read_text() for f in tmp_path.rglob("*") if f.is_file())
    for name in ("j.json", "score.json"):
        os.remove(tmp_path / name)
    server = Grader(longer_wins)
    done(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0]))
    assert len(server.bodies) == 1 and json.load(open(tmp_path / "score.json"))["n"] == 10


def test_no_answer_in_time_is_tried_again(tmp_path, monkeypatch):
    import openai
    client = openai.OpenAI
    monkeypatch.setattr(openai, "OpenAI", lambda **settings: client(**settings | {"timeout": 1.0}))
    slow = threading.Event()
    server = Grader(lambda messages: "fine", lambda server, handler: not slow.is_set() and (slow.set() or time.sleep(3) or True))
    (reply,) = questions.ask([{"model": "x", "messages": [{"role": "user", "content": "?"}]}], str(tmp_path / "a.jsonl"), questions.endpoint(server.url, 1))
    assert reply["reply"] == "fine" and len(server.bodies) >= 2


def test_an_endpoint_that_refuses_everything_ends_in_one_line_without_judgments(alpaca, tmp_path):
    alpaca_bench(alpaca, tmp_path, 5)
    server = Grader(longer_wins, lambda server, handler: handler.reply({"error": {"message": "no such model"}}, 400) is None)
    result = run(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0]))
    assert result.returncode == 1 and "not one reply to 4 questions; the first: Error code: 400" in result.stderr and "Traceback" not in result.stderr
    assert not {"j.json", "score.json"} & set(os.listdir(tmp_path))


@pytest.mark.parametrize("settings, message", [
    ({"judgments": ""}, "--judgments=: the judge_model's go to a .json file"), ({"judgments": "j.jsonl"}, "go to a .json file"), ({"answers": ""}, "--answers is not set"),
    ({"out": "{0}/j.jsonl", "judgments": "{0}/j.json"}, "has to differ from --judgments in more than the ending"), ({"bench_data": ""}, "--bench_data is not set"),
    ({"bench_data": "{0}/nowhere"}, "holds no *alpaca_eval_clf*.txt"), ({"baseline": ""}, "cannot be had from the hub"),
    ({"answers": "{0}/two.json"}, "answers of 2 models"), ({"answers": "{0}/odd.json"}, "odd.json:1: no answer as"), ({"answers": "{0}/other.json"}, "answers none of")])
def test_what_is_set_up_wrongly_is_refused_before_anyone_is_paid(alpaca, tmp_path, settings, message):
    alpaca_bench(alpaca, tmp_path, 5)
    for name, odd in (("two", {"generator": "z"}), ("odd", {"instruction": ["x"]}), ("other", {"instruction": "x"})):
        rows = loaded(tmp_path / "answers.json")[:1]
        write(tmp_path / f"{name}.json", rows * (name == "two") + [rows[0] | {"instruction": "y"} | odd])
    server = Grader(longer_wins)
    result = run(*judge_by(server.url, tmp_path, "alpaca_eval", **{"lc_data": alpaca[0]} | {k: v.format(tmp_path) for k, v in settings.items()}))
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1 and not server.bodies


def test_killed_midway_with_its_server_and_run_again_the_judgments_are_the_same(alpaca, tmp_path):
    alpaca_bench(alpaca, tmp_path)
    whole = Grader(longer_wins)
    done(*judge_by(whole.url, tmp_path, "alpaca_eval", lc_data=alpaca[0], judgments=tmp_path / "whole.json", out=tmp_path / "w.json"))
    dead = threading.Event()

    def dies(server, handler):
        sum(server.paid.values()) >= 25 and dead.set()
        dead.is_set() and handler.connection.close()
        return dead.is_set()

    first, command = Grader(longer_wins, dies), judge_by("{}", tmp_path, "alpaca_eval", lc_data=alpaca[0])
    process = subprocess.Popen([sys.executable, *(c.format(first.url) for c in command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert dead.wait(60)
    first.shutdown()
    first.server_close()
    time.sleep(0.5)                                                     # now it waits for a server that is gone
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    path = tmp_path / "j.replies"
    before = path.read_bytes().count(b"\n")
    assert not {"j.json", "score.json"} & set(os.listdir(tmp_path)) and 10 <= before <= sum(first.paid.values()) < 59
    path.write_bytes(path.read_bytes() + b'{"key": "cut')
    second = Grader(longer_wins)
    done(*(c.format(second.url) for c in command))
    assert before + sum(second.paid.values()) == 59 and set(second.paid.values()) == {1}
    ours, theirs = ([{k: v for k, v in r.items() if k != "tstamp"} for r in loaded(tmp_path / name)] for name in ("j.json", "whole.json"))
    assert json.dumps(ours) == json.dumps(theirs)
    scores = [json.load(open(tmp_path / name)) for name in ("score.json", "w.json")]
    assert scores[0] == scores[1] and scores[0]["n"] == 60


@published
def test_the_official_files_themselves_are_judged_in_their_own_layouts(tmp_path):
    server = Grader(lambda messages: "[[B>>A]]" if "<|User Prompt|>" in messages[1]["content"] else "[[6]]")
    (partial,) = glob.glob(str(ARENA / "judgments_partial" / "*.gz"))
    known = [r["question_id"] for r in loaded(partial)][:40]
    mine = [{"question_id": k, "model_id": "mine", "choices": [{"turns": [f"{k}", "{x}"]}]} for k in range(81, 161)]
    some = [r for r in loaded(ARENA / "model_answer" / "gpt-3.5-turbo-0125.jsonl.gz") if r["question_id"] in known]
    for bench, folder, texts, baseline in (("mt_bench", MT, mine, ""), ("arena_hard", ARENA, some, ARENA / "model_answer" / "gpt-4-0314.jsonl.gz")):
        done(*judge_by(server.url, tmp_path, bench, bench_data=folder, answers=write(tmp_path / f"{bench}-a.jsonl", texts), baseline=baseline, lc_data="",
                       judgments=tmp_path / f"{bench}.jsonl", out=tmp_path / f"{bench}-s.json"))
    mt, hard = (json.load(open(tmp_path / f"{bench}-s.json")) for bench in ("mt_bench", "arena_hard"))
    assert (mt["score"], mt["n"], mt["missing"]) == (6, 160, 0) and (hard["win_rate"], hard["n"], hard["invalid"]) == (50, 40, 0)
    theirs = {(r["question_id"], r["turn"]): r for r in loaded(MT / "judgments" / "mamba_0_5_dpo_ep1.jsonl.gz")}
    for row in loaded(tmp_path / "mt_bench.jsonl"):
        same = theirs[row["question_id"], row["turn"]]
        asked = [re.split(r"Assistant's Answer\]|### Assistant A:\n", r["user_prompt"])[0] for r in (row, same)]
        assert row["judge"][1] == same["judge"][1] and asked[0] == asked[1] and len(asked[0]) > 50
    ours = {r["question_id"]: r for r in loaded(tmp_path / "arena_hard.jsonl")}
    for row in loaded(partial)[:40]:                                    # the baseline is A in game 1, B in game 2
        cut = [[g["user_prompt"].split("<|The End of Assistant A's Answer|>")[n] for n, g in enumerate(r["games"])] for r in (row, ours[row["question_id"]])]
        assert cut[0] == cut[1]


# ---------------------------------------------------------------------------------------------- the win rate by a judge here


def answers(path, texts, order=1, **extra):
    rows = [{"id": f"p{k}", "prompt": f"prompt {k}", "responses": [t if isinstance(t, dict) else {"text": t}]} | {n: v[k] for n, v in extra.items()} for k, t in enumerate(texts)]
    return write(path, rows[::order])


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairrm")
    build_judge(folder)
    return folder


def rate(tmp_path, ours, theirs, ok=True, **settings):
    name = tmp_path / f"e{len(list(tmp_path.glob('e*.json')))}.json"
    told, settings = "", settings | {"answers": ours, "baseline": theirs, "out": name}
    with pytest.MonkeyPatch.context() as patch:                         # in this process: starting torch takes longer than all else
        patch.setattr(sys, "argv", ["eval.py", *(f"--{k}={v}" for k, v in settings.items())])
        patch.setenv("OPENAI_API_KEY", KEY)
        try:
            runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        except SystemExit as e:
            told = e.code
    assert ok == (not told) == name.exists(), told
    return json.load(open(name)) if ok else told


def words(draw, n):
    return " ".join(draw.choices("the cat sat on a mat and saw two red dogs".split(), k=n))


def test_intervals_and_variety_are_those_of_plain_recomputation(pairrm, tmp_path):
    from sklearn.feature_extraction.text import TfidfVectorizer
    draw = random.Random(0)
    ours, theirs = ([words(draw, draw.randint(2, 12)) for _ in range(40)] for _ in range(2))
    ours[3] = theirs[3]
    paths = answers(tmp_path / "a.jsonl", ours, answer=["cat"] * 40), answers(tmp_path / "b.jsonl", theirs, order=-1)
    scores = rate(tmp_path, *paths, eval_ranker_model=pairrm)
    assert scores["length_unit"] == "characters" and scores["ties"] == 1 and (scores["n"], scores["invalid"]) == (40, 0)
    assert scores["length"] == statistics.mean(map(len, ours)) and scores["baseline_length"] == statistics.mean(map(len, theirs))
    for name, values in (("length", [len(t) for t in ours]), ("accuracy", [100 * ("cat" in t.split()) for t in ours])):
        half = 1.96 * statistics.stdev(values) / 40 ** 0.5
        assert scores[name + "_ci"] == pytest.approx([scores[name] - half, scores[name] + half]) and scores[name] == pytest.approx(statistics.mean(values))
    both = rate(tmp_path, *paths[::-1], eval_ranker_model=pairrm)
    assert scores["win_rate"] + both["win_rate"] == pytest.approx(100) and scores["win_rate"] not in (0, 50, 100)
    # distinct-2 and its jackknife, one answer left out at a time
    grams = [list(itertools.pairwise(t.split())) for t in ours]
    distinct = lambda some: len({g for p in some for g in p}) / sum(map(len, some))
    without = [distinct(grams[:k] + grams[k + 1:]) for k in range(40)]
    half = 1.96 * (39 / 40 * sum((v - statistics.mean(without)) ** 2 for v in without)) ** 0.5
    assert scores["distinct_2"] == pytest.approx(distinct(grams)) and scores["distinct_2_ci"] == pytest.approx([distinct(grams) - half, distinct(grams) + half])
    cosines = (v := TfidfVectorizer(token_pattern=r"(?u)\w+").fit_transform(ours).toarray()) @ v.T
    assert scores["self_similarity"] == pytest.approx(np.mean([cosines[i, j] for i in range(40) for j in range(40) if i != j]))
    h = [statistics.mean(cosines[i, j] for j in range(40) if i != j) for i in range(40)]
    assert scores["self_similarity_ci"][1] - scores["self_similarity"] == pytest.approx(2 * 1.96 * statistics.stdev(h) / 40 ** 0.5)


def test_equal_answers_tie_without_a_judge_and_few_of_them_still_give_scores(tmp_path):
    path = answers(tmp_path / "a.jsonl", [{"text": "x", "ids": [5, 6], "finished": False}])
    scores = rate(tmp_path, path, path, eval_ranker_model="nowhere")
    assert (scores["win_rate"], scores["lc_win_rate"], scores["ties"], scores["length"], scores["length_unit"], scores["accuracy"]) == (50, 50, 1, 2, "tokens", None)
    assert scores["finished"] == 0 and "distinct_2" not in scores


@pytest.mark.parametrize("ranker", ["reward", "answer", "endpoint", "local"])
def test_each_ranker_can_evaluate(ranker, tmp_path):
    draw = random.Random(1)
    ours, theirs = ([words(draw, draw.randint(2, 9)) + " " * (k == 1) for k in range(12)] for _ in range(2))
    ours[0] = theirs[0]
    paths = answers(tmp_path / "a.jsonl", ours, answer=["dogs"] * 12), answers(tmp_path / "b.jsonl", theirs)
    if ranker == "reward":
        scores = rate(tmp_path, *paths, eval_ranker="reward", eval_ranker_model=build_reward(tmp_path / "reward"))
        assert scores["n"] == 12 and scores["ties"] == 1
    elif ranker == "answer":
        scores = rate(tmp_path, *paths, eval_ranker="answer", eval_ranker_model="-")
        right = [[("dogs" in t.split()) for t in texts] for texts in (ours, theirs)]
        assert scores["win_rate"] == pytest.approx(100 * statistics.mean((1 + a - b) / 2 for a, b in zip(*right)))
    elif ranker == "local":
        model = build_model(tmp_path / "judge", max_position_embeddings=4096)
        scores = rate(tmp_path, *paths, eval_ranker="judge", eval_ranker_model=model, engine="transformers", dtype="float32", verdict_tokens=12)
        assert (scores["n"], scores["invalid"], scores["ties"]) == (1, 11, 1) and len(loaded(tmp_path / "e0.replies")) == 22      # it is random
    else:
        garbage = lambda server, handler, text: (f"\n{ours[2]}\n" in text or f"\n{ours[5]}\n" in text) and handler.reply(
            {"choices": [{"message": {"role": "assistant", "content": "?"}}]}) is None
        server = Judge(misbehave=garbage)
        scores = rate(tmp_path, *paths, eval_ranker="judge", eval_ranker_model="gpt-j", judge_url=server.url)
        pairs = [(len(a), len(b)) for k, (a, b) in enumerate(zip(ours, theirs)) if k not in (2, 5)]
        won = [0.5 if a == b else float(a > b) for a, b in pairs]
        assert scores["win_rate"] == pytest.approx(100 * statistics.mean(won)) and (scores["n"], scores["invalid"]) == (10, 2) and len(server.bodies) == 22
        assert scores["lc_win_rate_ci"][0] <= scores["lc_win_rate"] <= scores["lc_win_rate_ci"][1] and scores["judge"] == "judge gpt-j"


def test_the_interval_of_the_length_controlled_rate_is_a_bootstrap(tmp_path):
    draw = random.Random(2)
    ours, theirs = (["w" * draw.randint(10, 60) for _ in range(80)] for _ in range(2))
    truth = ["yes" if draw.random() < 1 / (1 + math.exp(-(len(a) - len(b)) / 20)) else "no" for a, b in zip(ours, theirs)]
    paths = [answers(tmp_path / f"{n}.jsonl", [f"answer: {n} {t}" for t in texts], answer=truth) for n, texts in (("yes", ours), ("no", theirs))]
    scores = rate(tmp_path, *paths, eval_ranker="answer", eval_ranker_model="-")
    won, longer = np.array([t == "yes" for t in truth], float), np.array([len(b) - 1 - len(a) for a, b in zip(ours, theirs)], float)
    fit = lambda k: 100 * stats.length_controlled(longer[k], won[k], np.ones((len(k), 1)))[0]
    low, high = np.percentile([fit(np.array(draw.choices(range(80), k=80))) for _ in range(1000)], [2.5, 97.5])
    assert scores["lc_win_rate"] == pytest.approx(fit(np.arange(80))) and scores["lc_win_rate_ci"] == pytest.approx([low, high], abs=2.5)
    assert abs(scores["win_rate"] - 100 * won.mean()) < 1e-9 and high - low > 10


def test_answers_that_do_not_fit_together_are_refused(tmp_path):
    one, two = answers(tmp_path / "a.jsonl", ["x"]), answers(tmp_path / "b.jsonl", ["x", "y"])
    assert "no answer to 1 of the prompts" in rate(tmp_path, two, one, ok=False) and "no answers in it" in rate(tmp_path, write(tmp_path / "c.jsonl", []), one, ok=False)
    assert "no answer in it" in rate(tmp_path, write(tmp_path / "d.jsonl", [{"id": "p0", "prompt": "x", "responses": []}]), one, ok=False)
    assert "id 'p0' is there twice" in rate(tmp_path, write(tmp_path / "e.jsonl", loaded(one) * 2), one, ok=False)
    assert not list(tmp_path.glob("e*.json"))
