"""What benchmarks share: files that cannot be scored, wrong settings, an endpoint in trouble."""

import collections
import glob
import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from benchmark_files import (
    ARENA,
    MT,
    Grader,
    alpaca,  # noqa: F401  (a fixture)
    alpaca_bench,
    arena,
    arena_bench,
    game,
    judge_by,
    key_is_in_a_file,
    longer_wins,
    model_answer,
    mt_bench,
    names_in,
    published,
    rating,
    read,
    read_json,
    score,
    succeed,
    write,
)
from conftest import ROOT, run

from nanoaipo import endpoints, questions
from nanoaipo.benchmarks.answers import read_answers
from nanoaipo.benchmarks.judging import count_replies

# ---- files that cannot be scored ----

ANNOTATION = {
    "instruction": "task 0",
    "output_1": "a",
    "output_2": "bb",
    "generator_2": "m",
    "annotator": "j",
    "preference": 1.5,
}
OTHER_ANNOTATOR = ANNOTATION | {"instruction": "x", "annotator": "k"}
ONE = arena(a=("A>B", "A>B"))
BATTLE = {"question_id": "a", "model_a": "gpt-4-0314", "model_b": "m", "winner": "model_a"}
OUTPUT = {"dataset": "", "instruction": "task 0", "output": "a", "generator": "m"}
OTHER_JUDGE = arena(b=("A>B", "A>B"))[0] | {"judge": "k"}
SERVED_A = {"served_model": "j-2025"}
SERVED_B = {"served_model": "j-2026"}
BY_TWO = "w.jsonl: judged by 'j-2025' and by 'j-2026' ({}) under one name; two judges are never"
# case: (benchmark, bytes or rows of the file, message)
WRONG = {
    "no_json": ("mt_bench", b'{"question_id": 81', "w.jsonl:1: not JSON"),
    "cut": ("mt_bench", gzip.compress(b'{"a": 1}\n' * 99)[:-9], "not JSON"),
    "cut_array": ("alpaca_eval", gzip.compress(b'[{"a": 1}]')[:-9], "not JSON"),
    "no_gzip": ("mt_bench", b"{}", "not JSON: Not a gzipped"),
    "empty": ("mt_bench", b"", "judgments of 0 models"),
    "empty_array": ("alpaca_eval", b"[]", "judgments of 0 models"),
    "empty_arena": ("arena_hard", b"", "of 0 models"),
    "other_bench": ("mt_bench", ONE, "w.jsonl:1: looks like --bench=arena_hard, not mt_bench"),
    "other": ("arena_hard", [rating(81, 1, 5)], "1: looks like --bench=mt_bench, not arena_hard"),
    "battles": ("mt_bench", [BATTLE], "w.jsonl:1: looks like --bench=arena_hard, not mt_bench"),
    "annotations": ("mt_bench", [ANNOTATION], "1: looks like --bench=alpaca_eval, not mt_bench"),
    "outputs": ("alpaca_eval", [OUTPUT], "w.jsonl:1: an answer, not a judgment: --answers takes"),
    "model_answer": ("mt_bench", [model_answer(81, "m", ["a"])], "1: an answer, not a judgment"),
    "answers_of_ours": (
        "wild_bench",
        [{"id": "a", "responses": [{"text": "a"}]}],
        "1: an answer, not a judg",
    ),
    "of_none": ("arena_hard", [{"a": 1}], "not judgments as arena_hard has them (KeyError: 'mod"),
    "text_for_number": ("mt_bench", [rating(81, 1, "high")], "not judgments as mt_bench"),
    "one_game": ("arena_hard", arena(a=("A>B",)), "not judgments as arena_hard"),
    "no_text": (
        "alpaca_eval",
        [ANNOTATION | {"output_2": ["x"]}],
        "w.jsonl:1: 'output_2' has to be a text",
    ),
    "no_object": ("mt_bench", [3], "w.jsonl:1: a record"),
    "beyond_2": (
        "alpaca_eval",
        [ANNOTATION | {"preference": 3}],
        "a preference is between 1 and 2",
    ),
    "all_null": ("alpaca_eval", [ANNOTATION | {"preference": None}], "not one"),
    "no_rating": ("mt_bench", [rating(81, 1, -1)], "not one rating"),
    "no_verdict": ("arena_hard", arena(a=(None, "x")), "not one verdict on m"),
    "two_judges": (
        "mt_bench",
        [rating(81, 1, 5), rating(82, 1, 5, judge=["gpt-5", "single-v1"])],
        "judged by gpt-4 and by gpt-5; two judges are never",
    ),
    "two_annotators": ("alpaca_eval", [ANNOTATION, OTHER_ANNOTATOR], "two judges are never"),
    "two_arena": ("arena_hard", [*ONE, OTHER_JUDGE], "two judges are never"),
    "two_served": (
        "mt_bench",
        [rating(k, 1, 5, **(SERVED_A if k < 83 else SERVED_B)) for k in (81, 82, 83, 84, 85)],
        BY_TWO.format("2 and 3 judgments"),
    ),
    "two_served_alpaca": (
        "alpaca_eval",
        [ANNOTATION | SERVED_A, ANNOTATION | SERVED_B | {"instruction": "task 1"}],
        BY_TWO.format("1 and 1 judgments"),
    ),
    "two_served_arena": (
        "arena_hard",
        [ONE[0] | {"games": [game("A>B") | SERVED_A, game("A>B") | SERVED_B]}],
        BY_TWO.format("1 and 1 judgments"),
    ),
    "twice": ("arena_hard", ONE * 2, "w.jsonl:2: judges a again"),
    "unknown": (
        "alpaca_eval",
        [ANNOTATION | {"instruction": "?"}],
        "is not one of AlpacaEval's",
    ),
    "no_table": ("alpaca_eval", [ANNOTATION], "holds no df_gamed*.csv"),
    "no_bench": ("alpaca", b"[]", "--bench=alpaca: there are win_rate"),
    "stamp": ("mt_bench", [rating(81, 1, 5, tstamp=math.inf)], "not judgments as mt_bench"),
    "no_name": ("mt_bench", [rating(81, 1, 5)], "no judgments of --answer_name=q"),
}


def wrong_file_name(bench, case):
    """An array goes to a .json file, what is cut or not gzipped to a .gz."""
    name = "w.jsonl"
    if bench == "alpaca_eval" and "array" in case:
        name = "w.json"
    if case in ("cut", "cut_array", "no_gzip"):
        name += ".gz"
    return name


@pytest.mark.parametrize("case", WRONG)
def test_files_that_cannot_be_scored_are_named_in_one_line_and_leave_nothing(
    case, alpaca, tmp_path
):
    bench, content, message = WRONG[case]
    path = tmp_path / wrong_file_name(bench, case)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    settings = {"bench": bench, "judgments": path, "out": tmp_path / "s.json"}
    if bench == "alpaca_eval":
        settings["lc_data"] = alpaca[0]
    if case == "no_table":
        settings["lc_data"] = tmp_path
    if case == "no_name":
        settings["answer_name"] = "q"

    result = run("eval.py", **settings)

    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == [path.name]


# ---- settings that are wrong ----


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"judgments": ""}, "--judgments=: the judge_model's go to a .json file"),
        ({"judgments": "j.jsonl"}, "go to a .json file"),
        ({"answers": ""}, "--answers is not set"),
        (
            {"out": "{0}/j.jsonl", "judgments": "{0}/j.json"},
            "has to differ from --judgments in more than the ending",
        ),
        ({"bench_data": ""}, "--bench_data is not set"),
        ({"bench_data": "{0}/nowhere"}, "holds no *alpaca_eval_clf*.txt"),
        ({"baseline": ""}, "cannot be had from the hub"),
        ({"answers": "{0}/two.json"}, "answers of 2 models"),
        ({"answers": "{0}/odd.json"}, "odd.json:1: no answer as"),
        ({"answers": "{0}/other.json"}, "answers none of"),
    ],
)
def test_what_is_set_up_wrongly_is_refused_before_anyone_is_paid(
    alpaca, tmp_path, settings, message
):
    alpaca_bench(alpaca, tmp_path, 5)
    first = read(tmp_path / "answers.json")[0]
    write(tmp_path / "two.json", [first, first | {"instruction": "y", "generator": "z"}])
    write(tmp_path / "odd.json", [first | {"instruction": ["x"]}])
    write(tmp_path / "other.json", [first | {"instruction": "x"}])
    settings = {key: value.format(tmp_path) for key, value in settings.items()}
    server = Grader(longer_wins)

    result = run(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0], **settings))

    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not server.bodies


# ---- an endpoint in trouble ----


def test_whatever_befalls_the_endpoint_each_question_is_paid_for_once(alpaca, tmp_path):
    """Busy, cut connections, HTML, JSON without an answer in turns; then a verdict."""
    tries = collections.Counter()
    odd_replies = {
        1: (b"<html>busy</html>", 200),
        2: ({"choices": []}, 200),
        3: ({"error": {"message": "busy"}}, 503),
    }

    def trouble(server, handler):
        task = task_of(handler)
        tries[task] += 1
        kind = (tries[task] + task) % 5
        if tries[task] > 3 or kind == 4:
            return False
        if kind == 0:
            handler.connection.close()
        else:
            handler.reply(*odd_replies[kind])
        return True

    alpaca_bench(alpaca, tmp_path, 20)
    server = Grader(longer_wins, trouble)

    succeed(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0]))

    assert len(server.paid) == 19
    assert set(server.paid.values()) == {1}
    assert sum(tries.values()) == 52
    assert read_json(tmp_path / "score.json")["n"] == 20


def task_of(handler):
    """The number of the instruction that a request is about."""
    line = handler.body["messages"][1]["content"].split("\n")[0]
    return int(line.removeprefix("Task: task "))


def test_a_usage_that_is_not_in_numbers_counts_as_none():
    odd = [{"usage": {"prompt_tokens": "7"}}, {"usage": {"prompt_tokens": 1.5}}, {"usage": None}]

    counts = count_replies([*odd, {"usage": {"prompt_tokens": 7}}])

    assert counts == {"replies": 4, "refused": 0, "prompt_tokens": 7, "completion_tokens": 0}


def test_what_never_has_an_answer_in_it_is_an_error_that_is_asked_again(alpaca, tmp_path):
    def echo(server, handler):
        if task_of(handler) != 3:
            return False
        handler.reply(f"<html>{handler.headers['Authorization']}</html>".encode())
        return True

    alpaca_bench(alpaca, tmp_path, 10)
    server = Grader(longer_wins, echo)
    stdout = succeed(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0]))

    assert "'refused': 1" in stdout
    assert len(server.bodies) == 8 + 4
    assert read(tmp_path / "j.json")[3]["preference"] is None
    assert read_json(tmp_path / "score.json")["invalid"] == 1
    assert not key_is_in_a_file(tmp_path)

    # without judgments and scores, the same command asks for the one that is missing
    for name in ("j.json", "score.json"):
        os.remove(tmp_path / name)
    server = Grader(longer_wins)
    succeed(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0]))
    assert len(server.bodies) == 1
    assert read_json(tmp_path / "score.json")["n"] == 10


def test_no_answer_in_time_is_tried_again(tmp_path, monkeypatch):
    import openai

    client = openai.OpenAI
    monkeypatch.setattr(openai, "OpenAI", lambda **settings: client(**settings | {"timeout": 1.0}))
    slept = threading.Event()

    def slow_once(server, handler):
        if slept.is_set():
            return False
        slept.set()
        time.sleep(3)
        return True

    server = Grader(lambda messages: "fine", slow_once)
    question = {"model": "x", "messages": [{"role": "user", "content": "?"}]}

    (reply,) = questions.ask(
        [question], str(tmp_path / "a.jsonl"), endpoints.endpoint(server.url, 1)
    )

    assert reply["reply"] == "fine"
    assert len(server.bodies) >= 2


def test_an_endpoint_that_refuses_everything_ends_in_one_line_without_judgments(alpaca, tmp_path):
    def refuse(server, handler):
        handler.reply({"error": {"message": "no such model"}}, 400)
        return True

    alpaca_bench(alpaca, tmp_path, 5)
    server = Grader(longer_wins, refuse)

    result = run(*judge_by(server.url, tmp_path, "alpaca_eval", lc_data=alpaca[0]))

    assert result.returncode == 1
    assert "not one reply to 4 questions; the first: Error code: 400" in result.stderr
    assert "Traceback" not in result.stderr
    assert not {"j.json", "score.json"} & names_in(tmp_path)


def without_stamp(path):
    """Judgments as text, without the time at which they were made."""
    rows = read(path)
    for row in rows:
        del row["tstamp"]
    return json.dumps(rows)


def test_killed_midway_with_its_server_and_run_again_the_judgments_are_the_same(alpaca, tmp_path):
    alpaca_bench(alpaca, tmp_path)
    lc_data = alpaca[0]
    whole = Grader(longer_wins)
    files = {"judgments": tmp_path / "whole.json", "out": tmp_path / "w.json"}
    succeed(*judge_by(whole.url, tmp_path, "alpaca_eval", lc_data=lc_data, **files))

    # a server that dies after 25 replies, and then the process that asks it
    dead = threading.Event()

    def die(server, handler):
        if sum(server.paid.values()) >= 25:
            dead.set()
        if dead.is_set():
            handler.connection.close()
        return dead.is_set()

    first = Grader(longer_wins, die)
    command = judge_by(first.url, tmp_path, "alpaca_eval", lc_data=lc_data)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert dead.wait(60)
    first.shutdown()
    first.server_close()
    time.sleep(0.5)  # by now it waits for a server that is gone
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    path = tmp_path / "j.replies"
    kept = path.read_bytes().count(b"\n")
    assert not {"j.json", "score.json"} & names_in(tmp_path)
    assert 10 <= kept <= sum(first.paid.values()) < 59

    # the kill may have cut a line; the same command asks another server for the rest
    path.write_bytes(path.read_bytes() + b'{"key": "cut')
    second = Grader(longer_wins)
    succeed(*judge_by(second.url, tmp_path, "alpaca_eval", lc_data=lc_data))
    assert kept + sum(second.paid.values()) == 59
    assert set(second.paid.values()) == {1}
    assert without_stamp(tmp_path / "j.json") == without_stamp(tmp_path / "whole.json")
    scores = read_json(tmp_path / "score.json")
    assert scores == read_json(tmp_path / "w.json")
    assert scores["n"] == 60


# ---- who really judged ----


def set_up(bench, alpaca, tmp_path):
    """Write what judging by a benchmark takes; a judge that gives it verdicts, and settings."""
    if bench == "alpaca_eval":
        alpaca_bench(alpaca, tmp_path, 5)
        return Grader(longer_wins), {"lc_data": alpaca[0]}
    if bench == "mt_bench":
        settings = {"answers": mt_bench(tmp_path), "baseline": "", "lc_data": ""}
        return Grader(lambda messages: "[[7]]"), settings
    return Grader(lambda messages: "[[A>B]]"), arena_bench(tmp_path, {"a": "x", "b": "y"})


def judgments_of(bench, tmp_path):
    """The objects of a judgments file that each hold what one reply said."""
    if bench == "alpaca_eval":
        return [row for row in read(tmp_path / "j.json") if row["raw_completion"]]
    rows = read(tmp_path / "j.jsonl")
    if bench == "mt_bench":
        return rows
    return [game for row in rows for game in row["games"]]


@pytest.mark.parametrize("bench", ["alpaca_eval", "mt_bench", "arena_hard"])
def test_judgments_and_table_name_the_model_that_the_server_names(bench, alpaca, tmp_path):
    server, settings = set_up(bench, alpaca, tmp_path)
    server.who = {"model": "gpt-j-2025-04-14", "system_fingerprint": "fp_1"}

    stdout = succeed(*judge_by(server.url, tmp_path, bench, **settings))

    assert "'gpt-j' was answered by 'gpt-j-2025-04-14'\n" in stdout
    assert re.search(r"^ +judge  gpt-j$", stdout, re.MULTILINE)
    assert re.search(r"^ +served_model  gpt-j-2025-04-14$", stdout, re.MULTILINE)
    assert re.search(r"^ +fingerprints  fp_1 4$", stdout, re.MULTILINE)
    scores = read_json(tmp_path / "score.json")
    assert (scores["judge"], scores["served_model"]) == ("gpt-j", "gpt-j-2025-04-14")
    assert scores["fingerprints"] == {"fp_1": 4}
    judgments = judgments_of(bench, tmp_path)
    assert len(judgments) == 4
    for row in judgments:
        assert row["served_model"] == "gpt-j-2025-04-14"
        assert row["system_fingerprint"] == "fp_1"


@pytest.mark.parametrize("bench", ["alpaca_eval", "mt_bench", "arena_hard"])
def test_a_judge_that_becomes_another_model_midway_gives_no_score(bench, alpaca, tmp_path):
    server, settings = set_up(bench, alpaca, tmp_path)

    def moves_on(server, handler):
        server.who = {"model": "j-2025" if len(server.bodies) <= 3 else "j-2026"}
        return False

    server.trouble = moves_on
    command = judge_by(server.url, tmp_path, bench, judge_concurrency=1, **settings)

    first = run(*command)
    again = run(*command)

    assert (first.returncode, again.returncode) == (1, 1)
    message = "j.replies: 'gpt-j' was answered by 'j-2025' and now by 'j-2026' (3 and 1 replies)"
    assert message in first.stderr
    assert message in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1
    assert len(server.bodies) == 4
    assert not {"j.json", "j.jsonl", "score.json"} & names_in(tmp_path)


def test_a_judge_that_is_another_model_when_it_is_asked_to_go_on_gives_no_score(tmp_path):
    settings = arena_bench(tmp_path, {"a": "x", "b": "y"})
    server = Grader(lambda messages: "[[A>B]]" if len(messages) > 2 else "well")

    def moves_on(server, handler):
        server.who = {"model": f"j-with-{len(handler.body['messages'])}-messages"}
        return False

    server.trouble = moves_on

    done = run(*judge_by(server.url, tmp_path, "arena_hard", **settings))

    assert done.returncode == 1
    assert "by 'j-with-2-messages' and now by 'j-with-4-messages' (4 and " in done.stderr
    assert not {"j.jsonl", "score.json"} & names_in(tmp_path)


@pytest.mark.parametrize("bench", ["alpaca_eval", "mt_bench", "arena_hard"])
def test_a_judge_whose_model_nobody_names_is_unknown_in_the_table(bench, alpaca, tmp_path):
    server, settings = set_up(bench, alpaca, tmp_path)
    server.who = {}

    stdout = succeed(*judge_by(server.url, tmp_path, bench, **settings))

    assert re.search(r"^ +served_model  -$", stdout, re.MULTILINE)
    scores = read_json(tmp_path / "score.json")
    assert scores["served_model"] is None
    assert not {"served_unknown", "fingerprints"} & scores.keys()


def test_judgments_that_do_not_say_and_fingerprints_that_change_are_counted(tmp_path):
    rows = [
        rating(81, 1, 5, served_model="j-2025", system_fingerprint="fp_1"),
        rating(81, 2, 5, served_model="j-2025", system_fingerprint="fp_2"),
        rating(82, 1, 5, served_model="j-2025", system_fingerprint="fp_2"),
        rating(82, 2, 5, served_model=None, system_fingerprint=None),
        rating(83, 1, -1),  # refused: nobody answered
    ]

    scores = score("mt_bench", write(tmp_path / "j.jsonl", rows))

    assert (scores["served_model"], scores["served_unknown"]) == ("j-2025", 1)
    assert scores["fingerprints"] == {"fp_1": 1, "fp_2": 2}
    assert (scores["n"], scores["invalid"]) == (4, 1)


# ---- the official files themselves ----


def judge_official(server, tmp_path, bench, bench_data, answers, baseline):
    """Judgments of answers by the official files of a benchmark, and their scores."""
    settings = {
        "bench_data": bench_data,
        "answers": write(tmp_path / f"{bench}-answers.jsonl", answers),
        "baseline": baseline,
        "lc_data": "",
        "judgments": tmp_path / f"{bench}.jsonl",
        "out": tmp_path / f"{bench}-scores.json",
    }
    succeed(*judge_by(server.url, tmp_path, bench, **settings))
    return read(settings["judgments"]), read_json(settings["out"])


@published
def test_the_official_files_themselves_are_judged_in_their_own_layouts(tmp_path):
    def say(messages):
        if "<|User Prompt|>" in messages[1]["content"]:  # Arena-Hard
            return "[[B>>A]]"
        return "[[6]]"

    server = Grader(say)

    # MT-Bench
    mine = [model_answer(key, "mine", [f"{key}", "{x}"]) for key in range(81, 161)]
    rows, scores = judge_official(server, tmp_path, "mt_bench", MT, mine, "")
    assert (scores["score"], scores["n"], scores["missing"]) == (6, 160, 0)
    theirs = {}
    for row in read(MT / "judgments" / "mamba_0_5_dpo_ep1.jsonl.gz"):
        theirs[row["question_id"], row["turn"]] = row
    for row in rows:
        same = theirs[row["question_id"], row["turn"]]
        assert row["judge"][1] == same["judge"][1]
        assert before_the_answer(row) == before_the_answer(same)
        assert len(before_the_answer(row)) > 50

    # Arena-Hard
    (partial,) = glob.glob(str(ARENA / "judgments_partial" / "*.gz"))
    theirs = read(partial)[:40]
    judged = {row["question_id"] for row in theirs}
    answers = read(ARENA / "model_answer" / "gpt-3.5-turbo-0125.jsonl.gz")
    answers = [row for row in answers if row["question_id"] in judged]
    baseline = ARENA / "model_answer" / "gpt-4-0314.jsonl.gz"
    rows, scores = judge_official(server, tmp_path, "arena_hard", ARENA, answers, baseline)
    assert (scores["win_rate"], scores["n"], scores["invalid"]) == (50, 40, 0)
    ours = {row["question_id"]: row for row in rows}
    for row in theirs:
        assert baseline_parts(row) == baseline_parts(ours[row["question_id"]])


def before_the_answer(row):
    """The part of MT-Bench's prompt that does not depend on the model."""
    return re.split(r"Assistant's Answer\]|### Assistant A:\n", row["user_prompt"])[0]


def baseline_parts(row):
    """The parts of both games' prompts that hold the baseline: it is A in game 1, B in game 2."""
    end_of_a = "<|The End of Assistant A's Answer|>"
    first, second = row["games"]
    return first["user_prompt"].split(end_of_a)[0], second["user_prompt"].split(end_of_a)[1]


def test_official_answers_with_a_text_or_nothing_as_their_metadata_are_read(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": {"answer": "a"}}]
    rows = []
    for k, metadata in enumerate(("temperature 0.7", None, {"token_len": 7})):
        rows.append({"uid": str(k), "model": "m", "messages": messages, "metadata": metadata})
    rows.append({"instruction": "i", "output": "a", "generator": "m", "metadata": "x", "uid": None})
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(rows))

    answers, name = read_answers(str(path))

    assert name == "m"
    assert list(answers) == ["0", "1", "2", "i"]
    assert [answer.tokens for answer in answers.values()] == [None, None, 7, None]
    assert {tuple(answer.texts) for answer in answers.values()} == {("a",)}


def test_token_counts_of_arena_hard_answers_are_found_wherever_they_stand(tmp_path):
    within = model_answer("1", "m", [{"content": "a", "token_len": 5}])
    beside = model_answer("2", "m", [{"content": "a"}]) | {"conv_metadata": {"token_len": 6}}
    nowhere = model_answer("3", "m", [{"content": "a"}]) | {"conv_metadata": None}
    path = tmp_path / "answers.jsonl"
    write(path, [within, beside, nowhere])

    answers, _ = read_answers(str(path))

    assert [answer.tokens for answer in answers.values()] == [5, 6, None]
