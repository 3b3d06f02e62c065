"""MT-Bench: published scores, ratings, and judgments by a judge that is asked."""

import collections
import statistics

import pytest
from benchmark_files import (
    MT,
    SHARED,
    Grader,
    judge_by,
    model_answer,
    mt_bench,
    published,
    rating,
    read,
    read_json,
    score,
    succeed,
    write,
)

from nanoaipo.benchmarks.mt_bench import rating_of
from nanoaipo.errors import InputError

# ---- published ----


@published
@pytest.mark.parametrize(
    "model, expected, turns",
    [
        ("mamba_0_5_dpo_ep1", 7.12, (7.594, 6.650)),
        ("mamba_0_5_dpo_ep3", 7.31, (7.738, 6.888)),
    ],
)
def test_mt_bench_scores_are_the_published_ones(model, expected, turns):
    scores = score("mt_bench", MT / "judgments" / f"{model}.jsonl.gz")

    assert round(scores["score"], 2) == expected
    assert (scores["turn_1"], scores["turn_2"]) == pytest.approx(turns, abs=6e-4)
    assert (scores["n"], scores["invalid"], scores["missing"]) == (160, 0, 0)
    assert len(scores["categories"]) == 8
    assert scores["judge"] == "gpt-4"


@published
def test_a_real_file_with_a_model_judged_twice_and_an_unreadable_rating_is_told_so(tmp_path):
    path = MT / "judgments" / "quirks_minus_one_and_duplicates.jsonl.gz"
    rows = collections.defaultdict(list)
    for row in read(path):
        rows[row["model"]].append(row)
    with pytest.raises(InputError, match="of 3 models .*--answer_name says which"):
        score("mt_bench", path)

    seen = collections.Counter()
    for model, own in rows.items():
        # of a turn that is judged twice, the first judgment
        first = list({(r["question_id"], r["turn"]): r for r in own[::-1]}.values())
        if len(first) < len(own):
            seen["twice"] += 1
            again = r"gz:\d+: judges question \d+, turn \d again, as .*gz:\d+ did; remove"
            with pytest.raises(InputError, match=again):
                score("mt_bench", path, model)

        scores = score("mt_bench", write(tmp_path / "once.jsonl", first), model)

        valid = [row["score"] for row in first if row["score"] != -1]
        assert scores["score"] == pytest.approx(statistics.mean(valid))
        assert scores["invalid"] == len(first) - len(valid)
        seen["invalid"] += scores["invalid"]
    assert seen == {"twice": 1, "invalid": 1}


# ---- ratings ----


def test_mt_bench_is_the_mean_of_all_ratings_but_those_that_could_not_be_read(tmp_path):
    rows = [
        rating(81, 1, 9),
        rating(81, 2, 4),
        rating(111, 1, 5),
        rating(111, 2, -1),
        rating(160, 1, 10),
        rating(7, 1, 1),
        rating(81, 1, 1, model="other"),
    ]

    scores = score("mt_bench", write(tmp_path / "j.jsonl", rows), "m")

    assert scores["score"] == pytest.approx(29 / 5)
    assert (scores["turn_1"], scores["turn_2"]) == (25 / 4, 4)
    assert scores["date"] == "1970-01-02"
    assert scores["categories"] == {"writing": 6.5, "math": 5, "humanities": 10, "other": 1}
    assert (scores["n"], scores["invalid"], scores["missing"]) == (5, 1, 154)


@pytest.mark.parametrize(
    "reply, value",
    [
        ("So [[7]].", 7),
        ("[8] or [[7.5]]", 7.5),
        ("Rating: [7]", 7),
        ("seven", -1),
        ("", -1),
        ("[[x]]", -1),
    ],
)
def test_the_rating_of_a_reply(reply, value):
    assert rating_of(reply) == value


# ---- a judge that is asked ----


def test_mt_bench_asks_with_the_template_of_the_category_and_the_judges_own_references(tmp_path):
    answers = mt_bench(tmp_path)
    replies = {
        "SINGLE-V1": "<think>\n[[3]]?\n</think>\n\nGood. [[7]]",
        "SINGLE-MATH-V1": "<thinking>\n[[9]]?\n</thinking>\nRating: [4]",
        "SINGLE-V1-MULTI-TURN": "<think>\nno idea, [[9]] is",  # cut in its thought
        "SINGLE-MATH-V1-MULTI-TURN": "[[2.5]]",
    }
    server = Grader(lambda messages: replies[messages[0]["content"]])
    settings = {"answers": answers, "baseline": "", "lc_data": ""}

    succeed(*judge_by(server.url, tmp_path, "mt_bench", judge_model="gpt-4", **settings))

    rows = read(tmp_path / "j.jsonl")
    assert [(r["question_id"], r["turn"], r["judge"][1], r["score"]) for r in rows] == [
        (81, 1, "single-v1", 7),
        (81, 2, "single-v1-multi-turn", -1),
        (111, 1, "single-math-v1", 4),
        (111, 2, "single-math-v1-multi-turn", 2.5),
    ]
    assert [row["user_prompt"] for row in rows] == [
        "Q write {x}|A 81 one {answer}",
        "Q write {x}, again|A 81 one {answer}, 81 two",
        "Q 1+1?|A 111 one {answer}|R R1",
        "Q 1+1?, 2+2?|A 111 one {answer}, 111 two|R R1, R2",
    ]
    for body in server.bodies:
        assert (body["temperature"], body["max_tokens"]) == (0, 2048)
        assert "logprobs" not in body

    scores = read_json(tmp_path / "score.json")
    assert (scores["score"], scores["turn_1"], scores["turn_2"]) == (4.5, 5.5, 2.5)
    assert (scores["n"], scores["invalid"], scores["missing"]) == (3, 1, 156)

    # another judge, who has reference answers of its own
    own = model_answer(111, "gpt-j", ["own", "too"])
    write(tmp_path / "bench" / "mt_bench" / "reference_answer" / "gpt-j.jsonl", [own])
    settings |= {"judgments": tmp_path / "k.jsonl", "out": tmp_path / "t.json"}
    succeed(*judge_by(server.url, tmp_path, "mt_bench", **settings))
    math_rows = read(tmp_path / "k.jsonl")[2:]
    assert [row["user_prompt"].split("|R ")[1] for row in math_rows] == ["own", "own, too"]

    if SHARED.is_dir():
        theirs = read(MT / "judgments" / "mamba_0_5_dpo_ep1.jsonl.gz")[0]
        assert {*theirs, "served_model", "system_fingerprint"} == {*rows[0]}
