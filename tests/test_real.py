"""What `make real` asks its model: real/prompts.py, and what real/prepare.py makes of it.

The model has to be downloaded, so it is met by `make real` alone.
"""

import collections
import json

import pytest
from conftest import ROOT

from nanoaipo.files import read_records
from nanoaipo.following import instructions_of, share_followed
from nanoaipo.grading import is_right
from real import prepare
from real.prompts import questions, requests

LESS = ("at_most_words", "at_most_sentences", "at_most_paragraphs", "no")
MORE = ("at_least_words", "at_least_sentences", "at_least_paragraphs", "contains")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{name: rows} of the files that build_prompts writes."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "WORLD", str(folder))
        prepare.build_prompts()

    files = {}
    for path in folder.glob("*.jsonl"):
        files[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
    return files


def request_of(row):
    """The text of a row without its instruction."""
    content = row["prompt"]
    if not isinstance(content, str):
        content = content[-1]["content"]
    return content.split("\n\n")[0]


def test_no_request_or_question_comes_twice():
    texts = requests() + [question for question, _ in questions()]
    assert len(set(texts)) == len(texts)


def test_an_answer_that_states_the_right_one_is_right():
    for question, answer in questions():
        one = answer if isinstance(answer, str) else answer[0]
        assert is_right(f"It is {one}.", answer), question


def test_nothing_held_out_is_trained_on(written):
    trained = {request_of(row) for row in written["prompts"]}
    held_out = {request_of(row) for row in written["heldout"]}
    assert not trained & held_out
    assert {request_of(row) for row in written["requests"]} <= trained


def test_the_guard_of_other_runs_asks_what_is_held_out_here(written):
    """So that a model of `make real` was trained on none of prompts/guard.jsonl."""
    held_out = {request_of(row): row["answer"] for row in written["heldout"]}
    guard = [row for _, row in read_records(str(ROOT / "prompts" / "guard.jsonl"))]

    kinds = collections.Counter()
    for row in guard:
        instructions = instructions_of(row["answer"])
        kinds[instructions is None] += 1
        if instructions is None:
            assert row["answer"] == held_out[row["prompt"]]
        else:
            assert request_of(row) in held_out
            share_followed("Any text.", instructions)  # none is of an unknown kind
    assert kinds == {True: 100, False: 100}


def test_as_much_asks_for_less_as_for_more(written):
    counts = collections.Counter()
    for row in written["prompts"]:
        instruction = row["answer"]["follow"][0]
        counts[next(iter(instruction))] += 1
    less = sum(counts[name] for name in LESS)
    more = sum(counts[name] for name in MORE)
    assert 0.8 < less / more < 1.25


def test_who_follows_a_trained_question_gives_the_right_answer(written):
    rows = [row for row in written["prompts"] if row["id"].startswith("question")]
    answers = dict(questions())
    assert len(rows) > 60
    for row in rows:
        answer = answers[request_of(row)]
        wordings = answer if isinstance(answer, list) else [answer]
        assert {"contains_any": wordings} in row["answer"]["follow"]


def test_an_echo_of_the_instruction_and_an_empty_phrase_do_not_answer_a_request(written):
    requested = [row for row in written["prompts"] if row["id"].startswith("request")]
    for row in requested:
        for text in (
            'The last words of your answer must be "I hope this helps."',
            "Certainly! I hope this helps.",
            f"Certainly! {request_of(row)} " * 3,
        ):
            assert not is_right(text, row["answer"])


def test_the_guard_is_questions_as_they_are(written):
    guard = [row for row in written["heldout"] if instructions_of(row["answer"]) is None]
    assert len(guard) == prepare.N_HELD_OUT
    for row in guard:
        assert row["prompt"] == request_of(row)
