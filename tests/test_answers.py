"""Answers to benchmarks' questions, turn after turn, and the benchmarks' own files of them."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import PLAIN, ROOT, build_tokenizer, run, torchrun
from test_generate import kill_midway, read_counts, read_rows, write_rows
from test_loop import world  # noqa: F401 (a fixture)

from configurator import declared
from nanoaipo import chat
from nanoaipo.benchmarks import write_answers
from nanoaipo.benchmarks.official_files import model_answer
from nanoaipo.errors import InputError

ANSWERS = ("generate.py", "config/tiny.py", "--task=answers", "--n_prompts=0")
QUESTIONS = [
    {"question_id": 1, "category": "math", "turns": ["What color is the sky?", "And the sea?"]},
    {"question_id": 2, "category": "writing", "turns": ["Name a fruit."]},
    {"question_id": 3, "category": "reasoning", "turns": ["What color is the sky?", "Is it cold?"]},
]


def all_responses(row):
    """The responses to every turn of a question."""
    return row["responses"] + row["later_responses"]


def settings_of_generate(tmp_path, model):
    """The settings of generate.py at their defaults, but for those of a small file of questions."""
    every = {key: value for key, (value, *_) in declared("generate.py").items()}
    changed = {
        "model": model,
        "prompts": f"{tmp_path}/q.jsonl",
        "out": f"{tmp_path}/a.jsonl",
        "n_prompts": 0,
        "max_new_tokens": 16,
    }
    return SimpleNamespace(**every | changed)


# --------------------------------------------------------------------------------- turn after turn


@pytest.fixture(scope="module")
def answered(world, tmp_path_factory):
    """A folder with q.jsonl, the questions, and a.jsonl, their answers."""
    folder = tmp_path_factory.mktemp("answers")
    write_rows(folder / "q.jsonl", QUESTIONS)
    done = run(
        *ANSWERS,
        f"--prompts={folder}/q.jsonl",
        f"--out={folder}/a.jsonl",
        "--max_new_tokens=16",
    )
    assert done.returncode == 0
    return folder


def test_answers_come_turn_after_turn_in_the_official_formats(answered):
    ours = read_rows(answered / "a.jsonl")
    official = read_rows(answered / "a.model_answer.jsonl")

    assert [len(all_responses(row)) for row in ours] == [2, 1, 2]
    assert [row["question_id"] for row in official] == [1, 2, 3]
    assert {row["model_id"] for row in official} == {"base"}
    for k in (0, 2):
        texts = [response["text"] for response in all_responses(ours[k])]
        assert official[k]["choices"][0]["turns"] == texts

    # one turn: Arena-Hard's form
    (response,) = all_responses(ours[1])
    turn = {"content": response["text"], "token_len": len(response["ids"])}
    assert official[1]["choices"][0]["turns"] == [turn]

    # temperature 0 in both categories
    assert ours[0]["responses"][0]["text"] == ours[2]["responses"][0]["text"]


def test_the_second_answer_is_greedy_after_both_turns(answered):
    from transformers import AutoModelForCausalLM

    tokenizer, _ = chat.load_tokenizer(str(ROOT / "tiny/world/base"))
    policy = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/world/base")
    row = read_rows(answered / "a.jsonl")[0]
    first, second = all_responses(row)
    conversation = [
        *row["prompt"],
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "And the sea?"},
    ]

    ids = chat.render(tokenizer, conversation, "here")
    logits = policy(torch.tensor([ids + second["ids"]])).logits[0, len(ids) - 1 : -1]  # (T, V)

    assert logits.argmax(-1).tolist() == second["ids"]


def test_answers_to_alpaca_eval_are_its_model_outputs(world, tmp_path):
    (tmp_path / "i.json").write_text(json.dumps([{"instruction": "Name a fruit.", "dataset": "d"}]))

    done = run(
        *ANSWERS,
        f"--prompts={tmp_path}/i.json",
        f"--out={tmp_path}/b.jsonl",
        "--temperature=0",
    )

    assert done.returncode == 0
    (output,) = json.loads((tmp_path / "b.model_outputs.json").read_text())
    assert output.keys() == {"dataset", "instruction", "output", "generator"}
    assert output["output"] == read_rows(tmp_path / "b.jsonl")[0]["responses"][0]["text"]


def test_questions_whose_answers_may_be_too_long_for_the_model_are_refused(answered):
    done = run(
        *ANSWERS,
        f"--prompts={answered}/q.jsonl",
        f"--out={answered}/c.jsonl",
        "--max_new_tokens=4096",
    )

    assert done.returncode == 1
    assert "'1' may take " in done.stderr
    assert "lower --max_new_tokens" in done.stderr


def test_processes_write_one_official_file_in_the_order_of_the_questions(world, tmp_path):
    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    command = (
        *ANSWERS,
        f"--prompts={tmp_path}/q.jsonl",
        f"--out={tmp_path}/d.jsonl",
        "--max_new_tokens=16",
        "--answer_name=me",
    )

    two = torchrun(2, *command)

    assert two.returncode == 0
    assert len(read_rows(tmp_path / "d.jsonl")) == 3
    assert not list(tmp_path.glob("*.tmp"))
    official = tmp_path / "d.model_answer.jsonl"
    one = tmp_path / "one.jsonl"
    official.rename(one)
    names = [(row["question_id"], row["model_id"]) for row in read_rows(one)]
    assert names == [(1, "me"), (2, "me"), (3, "me")]

    # a process whose shard is complete writes the official file that is missing
    again = run(*command, env={"RANK": "1", "WORLD_SIZE": "2"})
    assert "nothing to do" in again.stdout
    assert official.read_bytes() == one.read_bytes()


def test_a_kill_costs_one_block_of_answers_and_every_turn_is_there(world, tmp_path):
    questions = []
    for k in range(24):
        turns = [f"What is {k} plus 2?", "And 3 more?"]
        question = {
            "question_id": k,
            "category": ("writing", "math", "other")[k % 3],
            "turns": turns[: 1 + k % 2],
        }
        questions.append(question)
    write_rows(tmp_path / "q.jsonl", questions)
    command = (*ANSWERS, "--max_new_tokens=16", "--block=3", f"--prompts={tmp_path}/q.jsonl")
    part = tmp_path / "cut.jsonl.tmp"

    assert run(*command, f"--out={tmp_path}/whole.jsonl").returncode == 0
    kill_midway((*command, f"--out={tmp_path}/cut.jsonl"), part, 6)

    assert 6 <= part.read_bytes().count(b"\n") < 24
    assert not (tmp_path / "cut.model_answer.jsonl").exists()

    done = run(*command, f"--out={tmp_path}/cut.jsonl")
    assert done.returncode == 0
    assert "goes on behind " in done.stdout
    for name in ("jsonl", "model_answer.jsonl"):
        cut = tmp_path / f"cut.{name}"
        assert cut.read_bytes() == (tmp_path / f"whole.{name}").read_bytes()
    n_later = [len(row["later_responses"]) for row in read_rows(tmp_path / "cut.jsonl")]
    assert n_later == [0, 1] * 12
    assert read_counts(tmp_path, "cut")["responses"] == 36


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def test_a_question_that_cannot_be_asked_is_dropped_and_counted(tmp_path, monkeypatch, capsys):
    rows = [
        {"question_id": 1, "turns": ["a"]},
        {"question_id": 2},
        {"question_id": 3, "prompt": "b", "system": "Be brief."},
        {"question_id": 4, "prompt": "c", "tools": "{"},
        {"question_id": 5, "prompt": "d"},
    ]
    tokenizer = build_tokenizer(NO_SYSTEM + PLAIN, "<|pad|>")
    monkeypatch.setattr(write_answers, "context_length", lambda model: 512)

    def sample(requests, **settings):
        return [[(tokenizer("said").input_ids, True, -1.0)] for _ in requests]

    def answer(rows):
        write_rows(tmp_path / "q.jsonl", rows)
        manifest = {"settings": {}, "inputs": {}}
        settings = settings_of_generate(tmp_path, "model")
        write_answers.write_answers(manifest, tokenizer, lambda max_tokens: sample, settings)
        return manifest["counts"]

    counts = answer(rows)

    assert [row["id"] for row in read_rows(tmp_path / "a.jsonl")] == ["1", "5"]
    reasons = {"no_prompt": 1, "refused_by_template": 1, "no_json": 1}
    assert reasons.items() <= counts.items()
    assert counts["prompts"] == 2
    printed = capsys.readouterr().out
    assert "q.jsonl: 3 rows dropped: 1 no_prompt (" in printed
    assert "refuses the prompt: no system" in printed

    with pytest.raises(InputError, match=r"q.jsonl: no prompt is left \(1 refused_by_template \("):
        answer(rows[2:3])


def test_answers_ask_for_no_more_room_than_they_may_take(world, tmp_path, monkeypatch):
    rows = [
        {"question_id": 1, "turns": ["a", "b"]},
        {"prompt": "c", "turns": 2, "category": ["x"]},
    ]
    write_rows(tmp_path / "q.jsonl", rows)
    tokenizer, _ = chat.load_tokenizer(str(ROOT / "tiny/world/base"))
    rooms = []
    calls = []  # the texts of each call of the engine

    def start_engine(max_tokens):
        rooms.append(max_tokens)
        return sample

    def sample(requests, **settings):
        calls.append([tokenizer.decode(ids) for ids, _ in requests])
        return [[(tokenizer(f"said {k}").input_ids, True, -1.0)] for k in range(len(requests))]

    # Mistral-Nemo was built for 1,024,000 tokens: no cache holds that
    monkeypatch.setattr(write_answers, "context_length", lambda model: 1_024_000)
    settings = settings_of_generate(tmp_path, "Mistral-Nemo")
    manifest = {"settings": {}, "inputs": {}}
    write_answers.write_answers(manifest, tokenizer, start_engine, settings)

    assert len(rooms) == 1
    assert rooms[0] < 300
    assert [len(texts) for texts in calls] == [2, 1]
    assert "said 0" in calls[1][0]
    question, prompt = read_rows(tmp_path / "a.jsonl")
    assert len(question["later_responses"]) == 1
    assert "later_responses" not in prompt


# -------------------------------------------------------------------------------- Arena-Hard's form

TIKTOKEN = """
class get_encoding:
    def __init__(self, name):
        self.n_tokens = {"cl100k_base": 100, "o200k_base": 200}[name]

    def encode(self, text, disallowed_special):
        return [0] * self.n_tokens
"""
TIKTOKEN_OFFLINE = """
def get_encoding(name):
    raise ConnectionError("no network")
"""


@pytest.fixture(scope="module")
def arena_hard_answers(world, tmp_path_factory):
    """A function (tiktoken's source, name of a question) -> (official answer, our record)."""
    folder = tmp_path_factory.mktemp("arena_hard")
    questions = {
        "old": {
            "question_id": "q1",
            "category": "arena-hard-v0.1",
            "turns": [{"content": "Name a fruit."}],
        },
        "new": {
            "uid": "u1",
            "category": "hard_prompt",
            "subcategory": "x",
            "prompt": "Name a fruit.",
        },
    }

    def answer(source, name):
        own = folder / f"{name}-{'offline' if source == TIKTOKEN_OFFLINE else 'online'}"
        own.mkdir()
        (own / "tiktoken.py").write_text(source)
        write_rows(own / "q.jsonl", [questions[name]])
        done = run(
            *ANSWERS,
            "--max_new_tokens=8",
            f"--prompts={own}/q.jsonl",
            f"--out={own}/a.jsonl",
            "--answer_name=me",
            env={"PYTHONPATH": str(own)},
        )
        assert done.returncode == 0, done.stderr
        (official,) = read_rows(own / "a.model_answer.jsonl")
        (ours,) = read_rows(own / "a.jsonl")
        return official, ours

    return answer


def test_arena_hard_answers_are_counted_by_tiktoken_or_say_that_they_are_not(arena_hard_answers):
    # v0.1: FastChat's form
    old, _ = arena_hard_answers(TIKTOKEN, "old")
    content = old["choices"][0]["turns"][0]["content"]
    assert old == {
        "question_id": "q1",
        "answer_id": "me-q1",
        "model_id": "me",
        "tstamp": 0,
        "token_len_by": "tiktoken cl100k_base",
        "choices": [{"index": 0, "turns": [{"content": content, "token_len": 100}]}],
    }

    # v2.0: a uid, messages and style
    new, ours = arena_hard_answers(TIKTOKEN, "new")
    text = ours["responses"][0]["text"].strip()
    fields = {"uid", "ans_id", "model", "messages", "tstamp", "metadata", "token_len_by"}
    assert new.keys() == fields
    assert new["uid"] == ours["id"] == "u1"
    assert new["model"] == "me"
    assert new["messages"] == [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": {"answer": text}},
    ]
    assert new["token_len_by"] == "tiktoken o200k_base"
    assert new["metadata"]["token_len"] == 200
    # show_result.py sums by position
    order = ["token_len", "header_count", "list_count", "bold_count"]
    assert list(new["metadata"]) == order

    # without tiktoken's encodings
    old, _ = arena_hard_answers(TIKTOKEN_OFFLINE, "old")
    new, offline = arena_hard_answers(TIKTOKEN_OFFLINE, "new")
    assert old["token_len_by"] == "the policy's tokenizer"
    assert new["token_len_by"] == "the policy's tokenizer"
    assert offline["responses"] == ours["responses"]
    assert new["metadata"]["token_len"] == len(ours["responses"][0]["ids"])


def test_the_style_of_an_answer_is_counted_outside_its_code():
    text = " # H\n## I\n1. a\n - b\n* c\n**d** __e__ ```\n# no\n- no```\n"
    row = {"id": "a", "uid": "a", "prompt": [], "responses": [{"text": text, "ids": [1]}]}

    answer = model_answer(row, "me")

    stripped = answer["messages"][0]["content"]["answer"]
    assert stripped.startswith("# H")
    assert not stripped.endswith("\n")
    style = answer["metadata"]
    assert style["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert style["list_count"] == {"ordered": 1, "unordered": 2}
    assert style["bold_count"] == {"**": 1, "__": 1}


def test_an_answer_of_several_turns_is_stripped_and_not_counted():
    row = {
        "id": "b",
        "turns": ["x", "y"],
        "responses": [{"text": " s "}],
        "later_responses": [{"text": "t\n"}],
    }

    answer = model_answer(row, "me")

    assert answer["choices"][0]["turns"] == ["s", "t"]
    assert "token_len_by" not in answer
