"""WildBench: points and rewards, checklists in the judge's question, published numbers."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from benchmark_files import Grader, judge_by, read, read_json, score, succeed, write
from conftest import run

from nanoaipo.benchmarks import wild_bench
from nanoaipo.benchmarks.answers import read_answers
from nanoaipo.errors import InputError

# ---- points ----


def points(session, value, text="an answer", **other):
    """A record with points, as the official files have it."""
    row = {"session_id": session, "model_test": "m", "score": value, "model_output": text}
    return row | other


def test_wb_score_is_20_times_the_mean_points_above_5(tmp_path):
    folder = tmp_path / "eval=gpt-4o-2024-05-13"
    rows = [
        points("a", "8", "four"),
        points("b", "5.5", "seven.."),
        points("c", "3", ""),  # counts, but has no length
        points("d", None),
    ]

    scores = score("wild_bench", write(folder / "m.json", rows))

    assert (scores["model"], scores["judge"]) == ("m", "gpt-4o-2024-05-13")
    assert (scores["n"], scores["invalid"], scores["missing"]) == (3, 1, 1020)
    assert scores["score"] == pytest.approx(5.5)
    assert scores["wb_score"] == pytest.approx(10)
    assert scores["avg_length"] == 5.5
    half = 1.96 * (2.5 / 3**0.5)  # sample standard deviation of 8, 5.5, 3
    assert scores["score_ci"] == pytest.approx([5.5 - half, 5.5 + half], abs=1e-3)
    assert "categories" not in scores  # the official files do not say


def test_a_task_counts_in_each_of_its_categories_and_these_have_weights(tmp_path):
    rows = [
        points("a", 6, tags=["Math", "Data Analysis"]),  # two tags of one category
        points("b", 7, tags=["Math", "Editing"]),
        points("c", 9, tags=["Role playing"]),
        points("d", 1, "", tags=["Editing"]),  # empty: in no category
    ]

    scores = score("wild_bench", write(tmp_path / "j.json", rows))

    assert scores["categories"] == {"Math & Data Analysis": 30, "Creative Tasks": 60}
    assert scores["macro"] == pytest.approx((1 * 30 + 0.5 * 60) / 1.5)


def test_the_weights_give_a_published_mean_over_the_categories():
    # gemma-7b-it in leaderboard/data_dir/score.json of the official repository
    published = {
        "Planning & Reasoning": 1.0164424514200299,
        "Information/Advice seeking": 1.272277227722773,
        "Coding & Debugging": 0.18009478672985857,
        "Math & Data Analysis": -0.36507936507936556,
        "Creative Tasks": 2.119170984455959,
    }
    rows = [{"tags": [tag]} for tag in ("Planning", "Advice seeking", "Coding & Debugging")]
    rows += [{"tags": [tag]} for tag in ("Data Analysis", "Brainstorming")]

    found = wild_bench.by_category(rows, list(published.values()), [True] * 5)

    assert found["categories"] == published
    assert found["macro"] == pytest.approx(0.661975914869064)


# ---- pairs ----


def pair(session, winner, extent, ours=10, theirs=10, **other):
    """A record of a pair, whose responses have so many characters."""
    row = {
        "session_id": session,
        "model_A": "base",
        "model_B": "m",
        "winner": winner,
        "extent": extent,
        "model_outputs": {"base": "b" * theirs, "m": "m" * ours},
    }
    return row | other


def rewards(tmp_path, *rows):
    """Rewards without a margin, and with the official ones."""
    scores = score("wild_bench", write(tmp_path / "ref=base" / "m.json", rows))
    return [scores[key] for key in ("reward", "reward_500", "reward_1000", "reward_1500")]


@pytest.mark.parametrize(
    "winner, extent, ours, theirs, expected",
    [
        ("m", 2, 10, 10, [100, 100, 100, 100]),
        ("m", 1, 10, 10, [50, 50, 50, 50]),
        ("tie", 0, 10, 10, [0, 0, 0, 0]),
        ("base", 1, 10, 10, [-50, -50, -50, -50]),
        ("base", 2, 10, 10, [-100, -100, -100, -100]),
        # a slight win of the longer one, by 500 characters and by one more
        ("m", 1, 600, 100, [50, 50, 50, 50]),
        ("m", 1, 601, 100, [50, 0, 50, 50]),
        ("base", 1, 100, 1101, [-50, 0, 0, -50]),
        ("base", 1, 1101, 100, [-50, -50, -50, -50]),  # the shorter one
        ("m", 2, 5000, 100, [100, 100, 100, 100]),  # no slight one
        ("m", 2, 10, 0, [0, 0, 0, 0]),  # the official tables leave out empty responses
    ],
)
def test_a_slight_win_of_a_response_that_is_longer_by_the_margin_is_a_tie(
    tmp_path, winner, extent, ours, theirs, expected
):
    assert rewards(tmp_path, pair("a", winner, extent, ours, theirs)) == expected


def test_published_counts_of_verdicts_give_the_published_reward(tmp_path):
    # claude-3-5-sonnet-20240620 against gpt-4-turbo, K 500, in the official leaderboard/data_dir;
    # of 1,024 pairs 933 have a verdict there, the others an empty response or one that is cut
    cut = {"base": "b", "m": "long" + wild_bench.CUT}
    counts = [("m", 2, 102), ("m", 1, 234), ("tie", 0, 340), ("base", 1, 133), ("base", 2, 124)]
    rows = []
    for winner, extent, n in counts:
        rows += [pair(f"{winner} {extent} {k}", winner, extent) for k in range(n)]
    rows += [pair(f"cut {k}", "m", 2, model_outputs=cut) for k in range(91)]

    scores = score("wild_bench", write(tmp_path / "ref=base" / "m.json", rows))

    assert scores["reward_500"] == pytest.approx(100 * 0.02783203125)
    assert (scores["n"], scores["cut_or_empty"], scores["baseline"]) == (1024, 91, "base")
    assert scores["verdicts"] == {
        "much_better": 102,
        "better": 234,
        "tie": 340 + 91,
        "worse": 133,
        "much_worse": 124,
    }


def test_whom_a_pair_is_about_is_said_by_the_path_or_by_a_name(tmp_path):
    rows = [
        pair("a", "m", 2),
        pair("b", "m", 2, model_A="m", model_B="base"),
        pair("c", None, None),
    ]
    path = write(tmp_path / "eval=j" / "ref=base" / "m.json", rows)
    elsewhere = write(tmp_path / "j.json", rows)

    assert score("wild_bench", path)["reward"] == 100
    assert score("wild_bench", elsewhere, "m")["reward"] == 100
    assert score("wild_bench", elsewhere, "base")["reward"] == -100
    assert score("wild_bench", path)["invalid"] == 1
    with pytest.raises(InputError, match="judgments of 2 models .*--answer_name says which"):
        score("wild_bench", elsewhere)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([points("a", 11)], "a score is between 1 and 10, or null"),
        ([points("a", None)], "not one score that is not null"),
        ([points("a", 5), points("a", 6)], "judges a again"),
        ([pair("a", None, None)], "not one verdict that is not null"),
        (
            [
                pair("a", "tie", 0, model_test="m"),
                pair("b", "tie", 0, model_test="m", model_outputs={"m": "x", "other": "y"}),
            ],
            "m against base and other; one file each",
        ),
        ([points("a", 5, judge="j"), points("b", 5, judge="k")], "judged by j and by k"),
        (
            [points("a", 5, served_model="j-1"), points("b", 5, served_model="j-2")],
            "judged by 'j-1' and by 'j-2'",
        ),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused_in_one_line(tmp_path, rows, message):
    path = write(tmp_path / "j.json", rows)

    done = run("eval.py", bench="wild_bench", judgments=path, out=tmp_path / "s.json")

    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# ---- what judges say ----


@pytest.mark.parametrize(
    "reply, choice",
    [
        ('{"analysis of A": "good", "choice": "A++"}', ("A", 2)),
        ('```\n{"choice": "A+",}\n```', ("A", 1)),  # no JSON, but as the template shows it
        ('{"choice" : "[B+]"}', ("B", 1)),
        ('{"reason": "he says \\"choice\\": \\"A++\\"", "choice": "B++"}', ("B", 2)),
        ('<think>"choice": "A++"</think>{"choice": "A=B"}', (None, 0)),
        ('{"choice": "B+"}\n<scratchpad>"choice": "A++"</scratchpad>', ("B", 1)),
        ('{"choice": "A"}', None),
        ('{"choice": "A++ or A+"}', None),
        ("A++", None),
        ('<think>"choice": "A++"', None),
        ("", None),
    ],
)
def test_the_last_choice_behind_the_thought_counts(reply, choice):
    row = {"model_A": "A", "model_B": "B", "winner": None, "extent": None, "result": reply}

    wild_bench.read_result(row)

    if choice is None:
        assert (row["winner"], row["extent"]) == (None, None)
    else:
        assert (row["winner"], row["extent"]) == (choice[0] or "tie", choice[1])


@pytest.mark.parametrize(
    "reply, value",
    [
        ('{"strengths": "-", "score": "7"}', 7),
        ('{"score": 10}', 10),
        ('{"score": [8]}', 8),
        ('{"score": "6/10",\n}', 6),
        ('{"score": 6.5', 6.5),  # cut
        ('{"score": "0"}', None),
        ('{"score": "11"}', None),
        ('{"score": "7-8"}', None),
        ('{"score": "-7"}', None),
        ("7", None),
        ('<think>{"score": 3}</think>{"score": "4"}', 4),
        ('<reasoning>{"score": 3}', None),  # cut
    ],
)
def test_the_last_score_behind_the_thought_counts(reply, value):
    row = {"score": None, "result": reply}

    wild_bench.read_result(row)

    assert row["score"] == value


# ---- judging ----

LONG = "word " * 1000 + "and no end"
TASKS = {  # session: (turns, answer of the model, answer of the baseline)
    "s1": (["Hi", "Hello.", "A poem?"], "Roses {$checklist} {$history}", "No."),
    "s2": (["Two and two?"], "Four.", "Five, I think."),
    "s3": (["A tree?"], "", "Oak."),
    "s4": (["A novel?"], LONG, "Once."),
    "s5": (["Nothing?"], "", " "),
}
POINTS_TEMPLATE = "H:{$history}|Q:{$user_query}|R:{$model_output}|C:{$checklist}|"
PAIR_TEMPLATE = "H:{$history}|Q:{$user_query}|A:{$candidate_A}|B:{$candidate_B}|C:{$checklist}|"


@pytest.fixture
def bench(tmp_path):
    """Write the benchmark's files in their own layouts, and the answers; return the settings."""
    evaluation = tmp_path / "bench" / "evaluation"
    evaluation.mkdir(parents=True)
    (evaluation / "eval_template.score.v2.md").write_text(POINTS_TEMPLATE)
    (evaluation / "eval_template.pairwise.v2.md").write_text(PAIR_TEMPLATE)

    tasks = []
    for session, (turns, _, _) in TASKS.items():
        roles = ["user", "assistant", "user"]
        conversation = [{"role": r, "content": t} for r, t in zip(roles, turns)]
        task = {
            "id": session,
            "session_id": session,
            "conversation_input": conversation,
            "checklist": ["Is it one?", "Is it short?"],
            "primary_tag": "Math",
            "secondary_tags": ["Editing"],
        }
        tasks.append(task)
    data = tmp_path / "bench" / "data" / "v2"
    data.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(tasks)
    pyarrow.parquet.write_table(table, data / "test-00000-of-00001.parquet")

    # the model's as generate.py has them, the baseline's as the official data set has them
    ours = [
        {"id": session, "session_id": session, "responses": [{"text": answer}]}
        for session, (_, answer, _) in TASKS.items()
    ]
    theirs = [
        {"session_id": session, "output": [answer], "generator": "base"}
        for session, (_, _, answer) in TASKS.items()
    ]
    write(tmp_path / "baseline.json", theirs)
    answers = write(tmp_path / "mine.jsonl", ours)
    return {"answers": answers, "lc_data": "", "judgments": tmp_path / "j.json"}


def asked(server):
    """The questions that a grader got."""
    return [body["messages"][0]["content"] for body in server.bodies]


def test_official_answers_have_a_list_and_are_known_by_their_session(tmp_path, bench):
    answers, name = read_answers(str(tmp_path / "baseline.json"))

    assert name == "base"
    assert answers["s2"].texts == ["Five, I think."]


def test_points_are_asked_with_history_and_checklist_and_empty_answers_are_not(tmp_path, bench):
    server = Grader(lambda messages: '{"strengths": "-", "score": "9"}')
    server.who = {"model": "gpt-j-2025"}

    command = judge_by(server.url, tmp_path, "wild_bench", **bench | {"baseline": ""})
    stdout = succeed(*command)

    assert sorted(asked(server)) == sorted(
        [
            "H:USER: Hi\n\nASSISTANT: Hello.\n\n|Q:A poem?|R:Roses {$checklist} {$history}|"
            "C:- Is it one?\n- Is it short?\n|",
            "H:|Q:Two and two?|R:Four.|C:- Is it one?\n- Is it short?\n|",
            f"H:|Q:A novel?|R:{LONG}|C:- Is it one?\n- Is it short?\n|",  # not cut here
        ]
    )
    for body in server.bodies:
        assert (body["temperature"], body["max_tokens"]) == (0, 1024)
    rows = read(tmp_path / "j.json")
    assert [row["score"] for row in rows] == [9, 9, 1, 9, 1]
    scores = read_json(tmp_path / "score.json")
    assert scores["score"] == pytest.approx((3 * 9 + 2 * 1) / 5)
    assert (scores["judge"], scores["served_model"]) == ("gpt-j", "gpt-j-2025")
    assert scores["categories"] == {"Creative Tasks": 80, "Math & Data Analysis": 80}
    assert "wb_score" in stdout


def test_pairs_are_shown_in_an_order_that_the_task_decides_and_cut_behind_1000_words(
    tmp_path, bench
):
    def first_is_better(messages):
        return '{"choice": "A++"}'

    server = Grader(first_is_better)

    succeed(*judge_by(server.url, tmp_path, "wild_bench", **bench))

    rows = {row["session_id"]: row for row in read(tmp_path / "j.json")}
    by_query = {}
    for question in asked(server):
        by_query[question.split("|Q:")[1].split("|")[0]] = question
    assert set(by_query) == {"A poem?", "Two and two?", "A novel?"}
    for session in ("s1", "s2", "s4"):
        row = rows[session]
        outputs = row["model_outputs"]
        shown = f"|A:{outputs[row['model_A']]}|B:{outputs[row['model_B']]}|"
        assert shown in by_query[TASKS[session][0][-1]]
        assert (row["winner"], row["extent"]) == (row["model_A"], 2)
    assert rows["s4"]["model_outputs"]["mine.jsonl"] == "word " * 999 + "word... (truncated)"

    # empty answers lose to any other, and tie with each other
    assert (rows["s3"]["winner"], rows["s3"]["extent"]) == ("base", 2)
    assert (rows["s5"]["winner"], rows["s5"]["extent"]) == ("tie", 0)
    scores = read_json(tmp_path / "score.json")
    assert (scores["n"], scores["cut_or_empty"], scores["baseline"]) == (5, 3, "base")

    # both orders occur, by the task alone
    orders = [wild_bench.pair_record(f"t{k}", {"m": "x", "b": "y"}) for k in range(200)]
    assert 70 < sum(row["model_A"] == "m" for row in orders) < 130
    again = wild_bench.pair_record("t3", {"m": "other", "b": "texts"})
    assert again["model_A"] == orders[3]["model_A"]


def test_a_reply_without_a_verdict_is_invalid(tmp_path, bench):
    def says_nothing_of_trees(messages):
        if "Two and two?" in json.dumps(messages):
            return "I cannot say."
        return '{"score": "4"}'

    server = Grader(says_nothing_of_trees)

    succeed(*judge_by(server.url, tmp_path, "wild_bench", **bench | {"baseline": ""}))

    scores = read_json(tmp_path / "score.json")
    assert (scores["n"], scores["invalid"]) == (4, 1)


def test_files_that_do_not_fit_together_are_refused_before_anyone_is_paid(tmp_path, bench):
    folder = str(tmp_path / "bench")
    few = write(tmp_path / "few.json", [{"session_id": "s1", "output": "x", "generator": "base"}])
    none = write(tmp_path / "none.json", [{"session_id": "z", "output": "x", "generator": "m"}])

    with pytest.raises(InputError, match="few.json: no answer to 's2'"):
        wild_bench.judge(None, folder, bench["answers"], few, "gpt-j")
    with pytest.raises(InputError, match="answers none of WildBench's tasks"):
        wild_bench.judge(None, folder, none, "", "gpt-j")
    with pytest.raises(InputError, match="a pair is of two models"):
        wild_bench.judge(None, folder, few, few, "gpt-j")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no eval_template.score.v2.md; it is in https"):
        wild_bench.judge(None, str(tmp_path / "empty"), few, "", "gpt-j")
