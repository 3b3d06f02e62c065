"""Arena-Hard: published scores, verdicts and their weights, games by a judge that is asked."""

import glob
import random
import re
import statistics

import pytest
from benchmark_files import (
    ARENA,
    SHARED,
    Grader,
    arena,
    arena_bench,
    judge_by,
    published,
    read,
    read_json,
    score,
    succeed,
    write,
)
from conftest import run

from nanoaipo.benchmarks import arena_hard
from nanoaipo.errors import InputError

# ---- published ----


@published
def test_arena_hard_scores_are_the_published_ones():
    name = "gpt-3.5-turbo-0125.jsonl.gz"
    scores = score("arena_hard", ARENA / "battles" / name, answers=ARENA / "model_answer" / name)
    low, high = scores["ci"]
    assert round(scores["win_rate"], 2) == 23.34
    assert (scores["avg_tokens"], scores["n"]) == (329, 500)
    assert 2 < scores["win_rate"] - low < 5
    assert 2 < high - scores["win_rate"] < 5

    (partial,) = glob.glob(str(ARENA / "judgments_partial" / "*.gz"))
    scores = score("arena_hard", partial)
    unread = 0
    for row in read(partial):
        for game in row["games"]:
            unread += game["score"] not in ("A>>B", "A>B", "A=B", "B>A", "B>>A")
    assert round(scores["win_rate"], 4) == 12.8931
    assert scores["invalid"] == unread > 0
    assert scores["judge"] == "gpt-4-1106-preview"


# ---- verdicts ----


def test_arena_hard_weighs_strong_verdicts_three_times_and_leaves_out_a_game_without_one(tmp_path):
    rows = arena(  # the baseline is A in game 1 only
        a=("A>>B", "A>>B"),
        b=("A>B", "B>A"),
        c=(None, "A>B"),
        d=("A<B", "A=B"),
        e=("B>>A", "A>>A"),
    )

    scores = score("arena_hard", write(tmp_path / "j.jsonl.gz", rows))

    share = (3 + 1 + 0.5 + 3) / (6 + 2 + 1 + 1 + 3)
    assert scores["win_rate"] == pytest.approx(100 * share)
    assert (scores["n"], scores["invalid"]) == (5, 3)

    # the same games in a battles file, where a strong verdict is three battles
    winners = {
        "a": ["model_a"] * 3 + ["model_b"] * 3,
        "b": ["model_a", "model_a"],
        "c": ["model_b"],
        "d": ["tie (bothbad)"],
        "e": ["model_b"] * 3,
    }
    battles = []
    for question, names in winners.items():
        battle = {"question_id": question, "model_a": "base", "model_b": "m"}
        battles += [battle | {"winner": name} for name in names]
    same = score("arena_hard", write(tmp_path / "b.jsonl", battles))
    assert same["win_rate"] == scores["win_rate"]
    assert same["ci"] == scores["ci"]
    assert same["model"] == "m"


def test_arena_hard_2_leaves_out_the_question_and_reads_what_0_1_does_not(tmp_path):
    rows = arena(a=("A<B", "A>B"), b=(None, "A>>B"), c=("A<<B", "A>B"), d=("A=B", "B>A"))
    kinds = ("hard_prompt", "hard_prompt", "creative_writing", "creative_writing")
    for row, kind in zip(rows, kinds):
        row["uid"] = row.pop("question_id")
        row["category"] = kind
    rows[1]["games"][0] = None

    scores = score("arena_hard", write(tmp_path / "j.jsonl", rows))

    assert scores["win_rate"] == pytest.approx(100 * (2 + 4 + 0.5) / 8)
    assert (scores["n"], scores["invalid"]) == (3, 1)
    parts = {name: (part["n"], part["win_rate"]) for name, part in scores["categories"].items()}
    assert parts == {"hard_prompt": (1, 100), "creative_writing": (2, pytest.approx(75))}


def category_rows(games, kinds):
    """Records of v2.0: {key: games} and a category for each."""
    rows = arena(**games)
    for row, kind in zip(rows, kinds, strict=True):
        row["uid"] = row.pop("question_id")
        row["category"] = kind
    return rows


def test_the_categories_of_arena_hard_2_are_never_one_number_unsaid(tmp_path, capsys):
    games = {"a": ("A<B", "A>B"), "b": (None, "A>>B"), "c": ("A=B", "A=B")}
    kinds = ("hard_prompt", "creative_writing", "hard_prompt")
    judgments = write(tmp_path / "j.jsonl", category_rows(games, kinds))
    uids = ("a", "b", "c")
    answers = write(tmp_path / "answers.jsonl", [answer_2(uid, "m", "text") for uid in uids])

    scores = score("arena_hard", judgments, answers=answers)

    # a category without any verdict is there, too
    hard, creative = (scores["categories"][kind] for kind in ("hard_prompt", "creative_writing"))
    assert (hard["n"], hard["invalid"], hard["win_rate"]) == (2, 0, 75)
    assert (creative["n"], creative["invalid"], creative["win_rate"]) == (0, 1, None)
    assert (hard["avg_tokens"], creative["avg_tokens"]) == (8, 8)
    assert "of all categories together" in scores["pooled"]

    # the same file with one category has no number of all
    rows = [row for row in category_rows(games, kinds) if row["category"] == "hard_prompt"]
    scores = score("arena_hard", write(tmp_path / "hard.jsonl", rows))
    assert (scores["category"], scores["win_rate"], scores["n"]) == ("hard_prompt", 75, 2)
    assert "pooled" not in scores
    assert "category" not in score("arena_hard", write(tmp_path / "v1.jsonl", arena(**games)))


def test_the_table_has_a_line_for_each_category(tmp_path):
    games = {"a": ("A<B", "A>B"), "b": ("A=B", "A=B")}
    rows = category_rows(games, ("hard_prompt", "creative_writing"))
    judgments = write(tmp_path / "j.jsonl", rows)

    done = run("eval.py", bench="arena_hard", judgments=judgments, out=tmp_path / "s.json")

    lines = [line.split("  ") for line in done.stdout.splitlines()]
    table = {line[-2].strip(): line[-1] for line in lines if len(line) > 1}
    assert table["hard_prompt"].startswith("invalid 0, n 1, win_rate 100.00, ci 100.00 to 100.00")
    assert table["creative_writing"].startswith("invalid 0, n 1, win_rate 50.00")
    names = list(table)
    assert names.index("pooled") == names.index("win_rate") - 2  # said before the number


def test_the_bootstrap_draws_questions(tmp_path):
    rng = random.Random(0)
    agreeing = [("A>>B", "B>>A"), ("B>>A", "A>>B"), ("B>A", "A>B")]  # games of a question agree
    games = {f"q{k}": rng.choice(agreeing) for k in range(60)}
    worth = {"B>>A": (3, 3), "A>>B": (0, 3), "B>A": (1, 1)}  # of game 1: won, weight

    scores = score("arena_hard", write(tmp_path / "j.jsonl", arena(**games)))

    counts = [worth[first] for first, _ in games.values()]
    rates = []
    for _ in range(4000):
        some = rng.choices(counts, k=60)
        rates.append(100 * sum(won for won, _ in some) / sum(weight for _, weight in some))
    cuts = statistics.quantiles(rates, n=40)
    assert scores["ci"] == pytest.approx([cuts[0], cuts[-1]], abs=1.5)
    assert scores["ci"][1] - scores["ci"][0] > 22  # games drawn one by one: 18


@pytest.mark.parametrize(
    "reply, v01, v2",
    [
        ("[[A>>B]]", "A>>B", "A>>B"),
        ("[[A>B]], as I said: [[A>B]]", "A>B", "A>B"),
        ("[[A>B]] no [[B>A]]", None, "B>A"),
        ("[[A>> B]]", None, None),
        ("[[a>b]]", None, "A>B"),
        ("[A=B]", None, "A=B"),
        ("A>B", None, None),
    ],
)
def test_the_verdict_of_a_reply(reply, v01, v2):
    assert arena_hard.verdict_of(reply, False) == v01
    assert arena_hard.verdict_of(reply, True) == v2


# ---- a judge that is asked ----


def test_arena_hard_plays_two_games_and_asks_once_more_for_a_verdict(tmp_path):
    replies = {  # of game 1, which shows the baseline first, and of game 2
        "w": ("<think>[[A>B]]?</think>[[B>A]]", "So.\n<analysis>[[B>A]]</analysis>[[A>>B]]"),
        "s": ("[[A>B]] or [[B>A]]", "<think>[[A>B]]?"),  # the second is cut in its thought
        "g": ("[[B>>A]]", "let me think {x}"),
    }
    asked_on = {"w": "[[A>B]]", "s": "", "g": "[[A>B]]"}

    def say(messages):
        question = messages[1]["content"][0]
        if len(messages) == 4:
            return asked_on[question]
        is_second = "A: answers" in messages[1]["content"]
        return replies[question][is_second]

    settings = arena_bench(tmp_path, {"w": "1", "s": "2", "g": "{answer_1}"})
    server = Grader(say)

    succeed(*judge_by(server.url, tmp_path, "arena_hard", **settings))

    rows = read(tmp_path / "j.jsonl")
    verdicts = {row["question_id"]: [game["score"] for game in row["games"]] for row in rows}
    assert verdicts == {"w": ["B>A", "A>>B"], "s": [None, None], "g": ["B>>A", "A>B"]}
    game = rows[2]["games"][1]
    assert game["judgment"] == "let me think {x}\n[[A>B]]"
    assert game["user_prompt"] == "g?\nA: answers {answer_1}\nB: baseline {answer_1}"

    assert sum(server.paid.values()) == 8
    asked_again = [body for body in server.bodies if len(body["messages"]) == 4]
    assert asked_again[0]["messages"][3]["content"].startswith("continue your judgment")

    scores = read_json(tmp_path / "score.json")
    assert (scores["win_rate"], scores["n"], scores["invalid"]) == (100, 2, 2)
    assert (scores["avg_tokens"], scores["judge"]) == (8, "gpt-j")

    if SHARED.is_dir():
        (partial,) = glob.glob(str(ARENA / "judgments_partial" / "*.gz"))
        theirs = read(partial)[0]
        assert {*theirs} <= {*rows[0]}
        game = theirs["games"][0]
        assert {*game, "served_model", "system_fingerprint"} == {*rows[0]["games"][0]}


def test_when_only_the_second_request_of_a_game_is_refused_the_others_still_count(tmp_path):
    def too_long(server, handler):
        if len(handler.body["messages"]) < 4:
            return False
        handler.reply({"error": {"message": "context length"}}, 400)
        return True

    def say(messages):
        if messages[1]["content"][0] == "s":
            return "hm"
        return "[[A=B]]"

    server = Grader(say, too_long)
    settings = arena_bench(tmp_path, {"s": "1", "t": "2"})

    succeed(*judge_by(server.url, tmp_path, "arena_hard", **settings))

    assert read_json(tmp_path / "score.json")["n"] == 1
    assert read_json(tmp_path / "j.manifest.json")["counts"]["refused"] == 2


# ---- v2.0, whose system prompts are code ----

JUDGE_UTILS = """\
raise SystemExit("this file is read, never run")
STRICT = "Judge hard prompts."
JUDGE_SETTINGS = {
    "hard_prompt": {"baseline": "o3-mini-2025-01-31", "system_prompt": STRICT},
    "creative_writing": {"system_prompt": "Judge " "fiction."},
    "arena-hard-v0.1": {"system_prompt": STRICT},
}
"""
ARENA_2_CONFIG = """\
judge_model: gpt-4.1
temperature: 0.0
max_tokens: 16000
prompt_template: "{QUESTION}?\\nA: {ANSWER_A}\\nB: {ANSWER_B}"
"""
CATEGORIES = {"h": "hard_prompt", "c": "creative_writing"}
NAMES = {"h": "o3-mini-2025-01-31", "c": "gemini-2.0-flash-001"}


def answer_2(uid, model, text):
    """A record of an answers file, as v2.0 has it."""
    messages = [
        {"role": "user", "content": uid},
        {"role": "assistant", "content": {"answer": text}},
    ]
    return {"uid": uid, "model": model, "messages": messages, "metadata": {"token_len": 8}}


def arena_2_bench(tmp_path):
    """Write what judging two answers takes, one of each category, in the layout of a clone."""
    bench = tmp_path / "bench"
    for folder, name, text in (
        ("utils", "judge_utils.py", JUDGE_UTILS),
        ("config", "arena-hard-v2.0.yaml", ARENA_2_CONFIG),
    ):
        (bench / folder).mkdir(parents=True)
        (bench / folder / name).write_text(text)

    # a clone has v0.1's questions too
    other = {"uid": "other", "category": "arena-hard-v0.1", "prompt": "other"}
    write(bench / "data" / "arena-hard-v0.1" / "question.jsonl", [other])
    data = bench / "data" / "arena-hard-v2.0"
    questions = [{"uid": k, "category": kind, "prompt": k} for k, kind in CATEGORIES.items()]
    write(data / "question.jsonl", questions)
    for name in NAMES.values():
        rows = [answer_2(uid, name, f"{name} {{x}}") for uid in NAMES]
        write(data / "model_answer" / f"{name}.jsonl", rows)
    return write(tmp_path / "answers.jsonl", [answer_2(uid, "mine", "mine") for uid in NAMES])


def test_arena_hard_2_compares_each_category_with_its_own_baseline(tmp_path):
    answers = arena_2_bench(tmp_path)

    def say(messages):
        asked = messages[1]["content"]
        if asked.startswith("c?\nA: mine"):
            return "hm, [a>>b]"
        return {"h": "[[B>A]] no: [[b>>a]]", "c": "no verdict"}[asked[0]]

    server = Grader(say)
    command = judge_by(server.url, tmp_path, "arena_hard", answers=answers, baseline="", lc_data="")

    succeed(*command)

    # what the judge was asked: nobody a second time, though one gave no verdict
    asked = {tuple(message["content"] for message in body["messages"]) for body in server.bodies}
    systems = {"h": "Judge hard prompts.", "c": "Judge fiction."}
    expected = set()
    for uid, name in NAMES.items():
        theirs = f"{name} {{x}}"
        for a, b in ((theirs, "mine"), ("mine", theirs)):
            expected.add((systems[uid], f"{uid}?\nA: {a}\nB: {b}"))
    assert asked == expected
    assert len(server.bodies) == 4
    assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(0, 16000)}

    # the official format
    rows = read(tmp_path / "j.jsonl")
    for row, uid in zip(rows, NAMES, strict=True):
        assert (row["uid"], row["category"]) == (uid, CATEGORIES[uid])
        assert (row["model"], row["judge"], row["baseline"]) == ("mine", "gpt-j", NAMES[uid])
    verdicts = [[game["score"] for game in row["games"]] for row in rows]
    assert verdicts == [["B>>A", "B>>A"], [None, "A>>B"]]
    game = rows[1]["games"][0]
    assert game["judgment"] == {"answer": "no verdict"}
    assert [message["role"] for message in game["prompt"]] == ["system", "user"]

    scores = read_json(tmp_path / "score.json")
    assert (scores["win_rate"], scores["n"], scores["invalid"]) == (50, 1, 1)
    assert (scores["judge"], scores["served_model"]) == ("gpt-j", "x")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("config/arena-hard-v2.0.yaml", None, "holds no arena-hard-v2.0.y*ml"),
        ("utils/judge_utils.py", None, "holds no judge_utils.py"),
        ("utils/judge_utils.py", "JUDGE_SETTINGS = load()", "no system_prompt of"),
        ("utils/judge_utils.py", "JUDGE_SETTINGS = {}", "no system_prompt of"),
        ("config/arena-hard-v2.0.yaml", "temperature: 0", "'prompt_template' is missing"),
        ("data/arena-hard-v2.0/model_answer/o3-mini-2025-01-31.jsonl", None, "are not in"),
    ],
)
def test_what_a_clone_of_arena_hard_2_lacks_is_named(tmp_path, name, text, message):
    answers = arena_2_bench(tmp_path)
    path = tmp_path / "bench" / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)

    with pytest.raises(InputError, match=re.escape(message)):
        arena_hard.judge(None, str(tmp_path / "bench"), answers, "", "gpt-j")
