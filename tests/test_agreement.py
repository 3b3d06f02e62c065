"""Judging the judge: rank.py --meta, against numbers worked out by hand."""

import json
import math

import pytest
from benchmark_files import ALPACA, JUDGED, published
from conftest import run, torchrun, write_pairs
from test_judge import KEY, Judge, choice
from test_rank import build_judge
from test_rankers import build_reward

from nanoaipo import agreement, files
from nanoaipo.errors import InputError

# lengths of the responses of three prompts, the right one's first
MATH = {"prompt": "Two and two?", "chosen": ["aaaa"], "rejected": ["b", "bb", "bbb"]}
FACTS = {"prompt": "A fruit?", "chosen": ["a"], "rejected": ["b" * 5, "bb", "bbb"]}
LEVEL = {"prompt": "A tree?", "chosen": ["aaa"], "rejected": ["bbb", "b", "bb"]}


def write_rows(path, *rows):
    """Write rows as JSON lines; the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(tmp_path, *rows):
    """What read_preferences makes of such a file."""
    return agreement.read_preferences(str(write_rows(tmp_path / "m.jsonl", *rows)))


def measure(tmp_path, **settings):
    """Run rank.py on m.jsonl in a folder; the finished process."""
    settings = {"meta": tmp_path / "m.jsonl", "out": tmp_path / "a.json"} | settings
    return run("rank.py", **settings)


def measure_judge(tmp_path, url, **settings):
    """The same with a judge at this address, one vote on each response."""
    options = {"ranker": "judge", "ranker_model": "j", "judge_url": url, "judge_votes": 1}
    options |= {"meta": tmp_path / "m.jsonl", "out": tmp_path / "a.json"} | settings
    command = [f"--{key}={value}" for key, value in options.items()]
    return run("rank.py", *command, env={"OPENAI_API_KEY": KEY})


def measured(tmp_path):
    """The numbers that it wrote."""
    return json.loads((tmp_path / "a.json").read_text())


# ---- numbers ----


@pytest.mark.parametrize(
    "scores, n_right, expected",
    [
        ([2, 1], 1, 1),
        ([1, 2], 1, 0),
        ([2, 2], 1, 1 / 2),
        ([3, 1, 2, 0], 1, 1),
        ([3, 1, 4, 0], 1, 0),
        ([3, 1, 3, 0], 1, 1 / 2),
        ([3, 3, 3, 0], 1, 1 / 3),
        ([3, 3, 3, 3], 1, 1 / 4),
        ([3, 3, 4, 0], 1, 0),
        # all of several right ones have to be above all wrong ones
        ([5, 2, 1], 2, 1),
        ([5, 2, 3], 2, 0),
        ([5, 2, 2], 2, 1 / 2),
        ([5, 2, 2, 2, 1], 2, 1 / 3),
        ([0.1 + 0.2, 0.3], 1, 1 / 2),
    ],
)
def test_the_right_ones_have_to_be_above_the_wrong_ones_and_level_ones_share(
    scores, n_right, expected
):
    assert agreement.outcome(scores, n_right) == pytest.approx(expected)


@pytest.mark.parametrize("scores", [[math.nan, 1], [1, math.nan], [2, 1, math.nan]])
def test_a_row_with_a_score_that_could_not_be_read_has_no_outcome(scores):
    assert math.isnan(agreement.outcome(scores, 1))


def test_accuracy_has_wilsons_interval_and_counts_what_is_unreadable_and_tied():
    numbers = agreement.accuracy([1.0, 0.5, 1.0, 0.5, math.nan])

    # 3 of 4: (.75 + .4802 +- 1.96 sqrt((.1875 + .2401) / 4)) / 1.9604
    assert numbers == {
        "accuracy": 75.0,
        "accuracy_ci": [pytest.approx(30.06, abs=0.01), pytest.approx(95.44, abs=0.01)],
        "n": 4,
        "unreadable": 1,
        "tied": 2,
    }
    assert agreement.accuracy([math.nan])["accuracy"] is None
    assert agreement.accuracy([])["n"] == 0


def test_rows_are_split_by_whether_the_longest_response_is_right():
    def row(right, wrong):
        responses = [{"text": "x" * n} for n in right + wrong]
        return {"id": "p", "responses": responses, "n_right": len(right)}

    rows = [
        row([9], [5]),
        row([9], [5, 6, 7]),
        row([5], [9]),
        row([5], [4, 9]),
        row([3], [1, 8, 2]),
        row([5], [5]),
        row([2, 9], [5]),
    ]
    scores = [[1, 0], [1, 0, 0, 2], [0, 1], [1, 0, 0], [0, 0, 0, 1], [1, 0], [2, 1, 0]]

    numbers = agreement.agreement(rows, scores)

    # right: 1, 0 and 1; wrong: 0, 1 and 0; as long: 1
    assert numbers["longer_is_right"]["accuracy"] == pytest.approx(200 / 3)
    assert numbers["longer_is_right"]["n"] == 3
    assert numbers["longer_is_wrong"]["accuracy"] == pytest.approx(100 / 3)
    assert numbers["longer_is_wrong"]["n"] == 3
    assert numbers["accuracy"] == pytest.approx(400 / 7)
    assert "subsets" not in numbers


def ties_row(row_id, n_right, n_wrong):
    responses = [{"text": f"{k}"} for k in range(n_right + n_wrong)]
    return {"id": row_id, "subset": "Ties", "responses": responses, "n_right": n_right}


def test_ties_have_reward_bench_2s_score_and_the_subsets_a_mean_with_it():
    rows = [
        ties_row("ref:0", 1, 2),
        ties_row("tied:0", 2, 1),
        ties_row("ref:1", 1, 1),
        ties_row("tied:1", 2, 1),
        ties_row("tied:2", 2, 1),  # its ref is unreadable
        ties_row("ref:2", 1, 1),
        ties_row("math", 1, 1) | {"subset": "Math"},
    ]
    scores = [[5, 1, 2], [5, 4, 2], [1, 3], [4, 2, 1], [0, 0, 1], [1, math.nan], [2, 1]]

    numbers = agreement.agreement(rows, scores)

    # question 0: gaps 3 and 2, spread 1; question 1: gaps -2 and 1, spread 2
    margin = (math.tanh(2 / 1 - 1) + math.tanh(-2 / 2 - 1)) / 2
    ties = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin
    assert numbers["subsets"]["Ties"]["ties_score"] == pytest.approx(100 * ties)
    assert numbers["subsets"]["Ties"]["accuracy"] == pytest.approx(60)
    assert numbers["subsets"]["Ties"]["unreadable"] == 1
    assert numbers["subset_mean"] == pytest.approx((100 * ties + 100) / 2)

    # a spread of 0 divides nothing, and a question without its other half is none
    assert agreement.ties_score(rows[:2], [[1, 1, 1], [1, 1, 1]]) == 0
    assert agreement.ties_score(rows[:2], [[2, 1, 1], [2, 2, 1]]) == pytest.approx(101)
    assert agreement.ties_score(rows[:1], scores[:1]) is None


# ---- files ----


def test_pairs_of_any_layout_and_lists_of_responses_are_read(tmp_path):
    rows = read_rows(
        tmp_path,
        MATH | {"id": "m:1", "num_correct": 1, "subset": "Math"},
        {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        {
            "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}],
        },
        {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
        {"system": "Be brief.", "question": "Hi", "chosen": ["yes", "yea"], "rejected": "no"},
        {"prompt": "Hi", "chosen": "<think>no?</think>yes", "rejected": ["<think>a</think>no"]},
    )

    texts = [[response["text"] for response in row["responses"]] for row in rows]
    assert texts == [
        ["aaaa", "b", "bb", "bbb"],
        ["yes", "no"],
        ["yes", "no"],
        ["yes", "no"],
        ["yes", "yea", "no"],
        ["yes", "no"],
    ]
    assert [row["n_right"] for row in rows] == [1, 1, 1, 1, 2, 1]
    assert [row["id"] for row in rows] == ["m:1", "1", "2", "3", "4", "5"]
    assert [row["prompt"][-1]["content"] for row in rows] == ["Two and two?"] + 5 * ["Hi"]
    assert rows[4]["prompt"][0] == {"role": "system", "content": "Be brief."}


def annotation(preference, output_1="a", output_2="b", **other):
    """An annotation as AlpacaEval's files have it."""
    row = {"instruction": "Hi", "output_1": output_1, "output_2": output_2}
    return row | {"preference": preference} | other


def test_the_annotators_of_a_pair_vote_on_it_as_in_alpaca_evals_files(tmp_path, capsys):
    rows = read_rows(
        tmp_path,
        annotation(2, annotator="human 1"),  # 2, 2, 1 on one pair: for b
        annotation(1, annotator="human 2"),
        annotation(1.3, "c", "d", instruction="Name", input="a tree"),  # weighted: for c
        annotation(2, annotator="human 3"),
        annotation(1, "e", "f"),  # even: left out
        annotation(2, "e", "f"),
        annotation(0, "g", "h"),  # AlpacaEval's tie: left out
        annotation(None, "i", "j"),  # no verdict: left out
        annotation(None, "k", "l"),  # of two, one verdict
        annotation(1, "k", "l"),
        MATH,
    )

    texts = [[response["text"] for response in row["responses"]] for row in rows]
    assert texts == [["b", "a"], ["c", "d"], ["k", "l"], ["aaaa", "b", "bb", "bbb"]]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Hi"}]
    assert rows[1]["prompt"] == [{"role": "user", "content": "Name\n\na tree"}]
    assert len({row["id"] for row in rows}) == 4
    assert "3 rows dropped: 3 undecided (" in capsys.readouterr().out


@published
@pytest.mark.parametrize("model", JUDGED)
def test_a_published_file_of_annotations_says_how_often_the_longer_output_won(model):
    path = str(ALPACA / model / "annotations.json.gz")
    annotations = [row for _, row in files.read_records(path)]
    decided = [row for row in annotations if row["preference"] not in (None, 0, 1.5)]

    rows = agreement.read_preferences(path)
    scores = [[len(response["text"]) for response in row["responses"]] for row in rows]
    numbers = agreement.agreement(rows, scores)

    # counted without our code
    won = 0.0
    for row in decided:
        longer = len(row["output_2"]) - len(row["output_1"])
        for_2 = row["preference"] > 1.5
        won += 0.5 if longer == 0 else (longer > 0) == for_2
    assert numbers["n"] == len(decided)
    assert numbers["accuracy"] == pytest.approx(100 * won / len(decided))
    assert numbers["longer_is_right"]["accuracy"] == 100
    assert numbers["longer_is_wrong"]["accuracy"] == 0


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "Hi", "chosen": "a"}, "no_responses (FILE:1: neither"),
        ({"prompt": "Hi", "chosen": ["a"], "rejected": []}, "FILE:1: 'rejected' has to be a text"),
        ({"prompt": "Hi", "chosen": ["a"], "rejected": ["b", 1]}, "'rejected' has to be a text or"),
        ({"chosen": ["a"], "rejected": ["b"]}, "no_messages (FILE:1: 'chosen'"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "identical (FILE:1: a response is both"),
        ({"prompt": "Hi", "chosen": ["a"], "rejected": ["b", "a"]}, "identical (FILE:1"),
        (MATH | {"num_correct": 2}, "FILE:1: 'num_correct' is 2, and 'chosen' holds 1"),
        (annotation(1.5), "undecided (FILE:1: its annotators prefer neither output"),
        (annotation("1"), "preference (FILE:1: 'preference' has to be a number"),
        (annotation(1, output_2=None), "FILE:1: 'output_2' has to be a text"),
        (annotation(1, output_2="a"), "identical (FILE:1"),
    ],
)
def test_a_row_that_is_no_preference_is_left_out_and_named(tmp_path, capsys, row, message):
    message = message.replace("FILE", str(tmp_path / "m.jsonl"))

    with pytest.raises(InputError) as error:
        read_rows(tmp_path, row)
    assert message in str(error.value)

    assert len(read_rows(tmp_path, row, MATH)) == 1
    assert "1 row dropped: 1 " in capsys.readouterr().out


def test_an_empty_file_holds_no_preference(tmp_path):
    with pytest.raises(InputError, match="no preference is left"):
        read_rows(tmp_path)


# ---- the command ----


def test_a_judge_that_likes_length_is_right_where_the_longer_one_is(tmp_path):
    pair = {"prompt": "A name?", "chosen": "aa", "rejected": "b", "subset": "Pairs"}
    rows = [MATH | {"subset": "Math"}, FACTS | {"subset": "Facts"}, LEVEL | {"subset": "Facts"}]
    write_rows(tmp_path / "m.jsonl", *rows, pair)
    server = Judge()

    done = measure_judge(tmp_path, server.url)

    # 1 + 0 + 1/2 + 1 of 4; LEVEL has no longest one
    assert done.returncode == 0, done.stderr
    numbers = measured(tmp_path)
    assert numbers["accuracy"] == pytest.approx(62.5)
    assert (numbers["n"], numbers["unreadable"], numbers["tied"]) == (4, 0, 1)
    assert numbers["longer_is_right"]["accuracy"] == 100
    assert numbers["longer_is_wrong"]["accuracy"] == 0
    subsets = {name: subset["accuracy"] for name, subset in numbers["subsets"].items()}
    assert subsets == {"Facts": 25, "Math": 100, "Pairs": 100}
    assert numbers["subset_mean"] == 75
    assert numbers["judge"] == "judge j"
    assert numbers["served_model"] == "j"
    assert numbers["counts"]["replies"] == sum(server.asked.values()) == 14

    lines = done.stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("all ")]
    assert line.split()[1:] == (
        "62.5 (21.9 to 90.8), 4 100.0 (34.2 to 100.0), 2 0.0 (0.0 to 79.3), 1 0 1".split()
    )
    assert "mean of the subsets: 75.0 %" in lines

    again = measure_judge(tmp_path, server.url)
    assert "nothing to do" in again.stdout


def test_a_pairwise_judge_is_measured_in_both_orders(tmp_path):
    write_rows(tmp_path / "m.jsonl", MATH, FACTS)
    server = Judge()

    done = measure_judge(tmp_path, server.url, judge_mode="pairwise")

    assert done.returncode == 0, done.stderr
    assert measured(tmp_path)["accuracy"] == 50
    assert sum(server.asked.values()) == 2 * 4 * 3


def test_a_judge_that_says_a_each_time_has_ties_alone(tmp_path):
    def says_a(server, handler, text):
        handler.reply(choice("Better: A"))
        return True

    write_rows(tmp_path / "m.jsonl", MATH, {"prompt": "Hi", "chosen": "yes", "rejected": "no"})

    done = measure_judge(tmp_path, Judge(misbehave=says_a).url, judge_mode="pairwise")

    assert done.returncode == 0, done.stderr
    numbers = measured(tmp_path)
    assert numbers["accuracy"] == pytest.approx(100 * (1 / 4 + 1 / 2) / 2)
    assert numbers["tied"] == 2


def test_rows_that_a_judge_gives_no_readable_score_are_counted_and_no_part_of_the_accuracy(
    tmp_path,
):
    def silent(server, handler, text):
        if "\nbb\n" not in text or "fruit" not in text:
            return False
        handler.reply(choice("I cannot say."))
        return True

    write_rows(tmp_path / "m.jsonl", MATH, FACTS)

    done = measure_judge(tmp_path, Judge(misbehave=silent).url)

    assert done.returncode == 0, done.stderr
    numbers = measured(tmp_path)
    assert (numbers["accuracy"], numbers["n"], numbers["unreadable"]) == (100, 1, 1)
    assert numbers["counts"] == {"replies": 8, "unreadable_replies": 1}


def test_not_one_readable_verdict_is_an_error(tmp_path):
    def silent(server, handler, text):
        handler.reply(choice("I cannot say."))
        return True

    write_rows(tmp_path / "m.jsonl", MATH)

    done = measure_judge(tmp_path, Judge(misbehave=silent).url)

    assert done.returncode == 1
    assert "--ranker=judge: not one readable verdict on" in done.stderr
    assert not (tmp_path / "a.json").exists()


def test_repeats_ask_a_judge_anew_and_show_each_run(tmp_path):
    def wavers(server, handler, text):
        """From the second time on it likes the short ones."""
        points = 4 if "\nb\n" in text else 1
        if server.asked[text] == 1:
            return False
        handler.reply(choice(f"Score: {points}"))
        return True

    write_rows(tmp_path / "m.jsonl", MATH, {"prompt": "Hi", "chosen": "yes", "rejected": "b"})

    done = measure_judge(tmp_path, Judge(misbehave=wavers).url, meta_repeats=2)

    assert done.returncode == 0, done.stderr
    assert measured(tmp_path)["runs"] == [100, 0, 0]
    assert measured(tmp_path)["accuracy"] == 100
    assert "of each run: 100.0 (34.2 to 100.0), 2; 0.0 (0.0 to 65.8), 2; 0.0" in done.stdout


def test_every_ranker_is_as_right_as_its_own_pairs_say(tmp_path):
    write_pairs(tmp_path / "m.jsonl", 40)
    pairrm = build_judge(tmp_path / "pairrm")
    reward = build_reward(tmp_path / "reward")
    models = {
        "pairrm": pairrm,
        "reward": reward,
        "annotators": f"pairrm:{pairrm} reward:{reward}",
    }
    given = [row for _, row in files.read_records(str(tmp_path / "m.jsonl"))]

    for ranker, model in models.items():
        out = tmp_path / f"{ranker}.jsonl"
        settings = {"ranker": ranker, "ranker_model": model}
        done = measure(tmp_path, out=tmp_path / f"{ranker}.json", **settings)
        assert done.returncode == 0, done.stderr
        ranked = run("rank.py", candidates=tmp_path / "m.jsonl", out=out, **settings)
        assert ranked.returncode == 0, ranked.stderr

        # a pair that stays as it was is one in which the ranker agrees
        kept = 0
        pairs = [pair for _, pair in files.read_records(str(out))]
        for pair in pairs:
            kept += pair["chosen"] == given[int(pair["id"])]["chosen"]
        numbers = json.loads((tmp_path / f"{ranker}.json").read_text())
        assert 0 < kept < len(pairs)
        assert numbers["n"] == len(pairs) == 40
        assert numbers["accuracy"] == pytest.approx(100 * kept / len(pairs))


def test_the_answer_ranker_is_measured_too(tmp_path):
    right = {"prompt": "2+2?", "answer": "4", "chosen": "4", "rejected": "5"}
    both = {"prompt": "2+3?", "answer": "5", "chosen": "5", "rejected": "It is 5."}
    write_rows(tmp_path / "m.jsonl", right, both)

    done = measure(tmp_path, ranker="answer")

    assert done.returncode == 0, done.stderr
    assert measured(tmp_path)["accuracy"] == 75
    assert measured(tmp_path)["judge"] == "answer"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"out": "pairs.jsonl"}, "--out=pairs.jsonl: has to be a .json file"),
        ({"meta": "/nowhere.jsonl"}, "/nowhere.jsonl: no such file"),
        ({"meta_repeats": -1}, "--meta_repeats=-1: at least 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path, settings, message):
    write_rows(tmp_path / "m.jsonl", MATH)

    done = measure(tmp_path, ranker="answer", **settings)

    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_several_processes_are_refused(tmp_path):
    write_rows(tmp_path / "m.jsonl", MATH)

    done = torchrun(
        2, "rank.py", ranker="answer", meta=tmp_path / "m.jsonl", out=tmp_path / "a.json"
    )

    assert done.returncode == 1
    assert "--meta: is for one process; start it without torchrun" in done.stderr
