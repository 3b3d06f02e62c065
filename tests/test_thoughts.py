"""Thought and answer of a response: from text, and from sampled ids."""

import pytest
from conftest import PLAIN, build_tokenizer

from nanoaipo import responses, thoughts

GPT_OSS = (
    "<|channel|>analysis<|message|>so<|end|>"
    "<|start|>assistant<|channel|>final<|message|>yes<|return|>"
)


@pytest.mark.parametrize(
    "text, thought, answer",
    [
        ("yes", None, "yes"),
        ("<think>\nso\n</think>\n\nyes", "so", "yes"),
        ("\n<think>so</think>yes", "so", "yes"),
        ("so\n</think>\n\nyes", "so", "yes"),  # the template had opened it
        ("<think>\n\n</think>\n\nyes", "", "yes"),
        ("<think>\nso", "so", ""),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("[THINK]so[/THINK]yes", "so", "yes"),
        (GPT_OSS.removesuffix("<|return|>"), "so", "yes"),
        ("<|channel|>final<|message|>yes", "", "yes"),
        ("<|channel|>analysis<|message|>so", "so", ""),
        ("<|channel>thought\nso<channel|>yes", "so", "yes"),
        ("◁think▷so◁/think▷yes", "so", "yes"),
        ("so\n[BEGIN FINAL RESPONSE]\nyes", "so", "yes"),
        # marks around the answer
        ("<think>so</think>\n<answer>\nyes\n</answer>", "so", "yes"),
        ("<think>so</think><response>yes</response>", "so", "yes"),
        ("<|START_RESPONSE|>yes<|END_RESPONSE|>", None, "yes"),
        ("<answer>yes</answer>", None, "<answer>yes</answer>"),
        # marks that the answer speaks of
        ("write <think> and </think>", None, "write <think> and </think>"),
        ("<think>so</think>use <think>", "so", "use <think>"),
    ],
)
def test_a_thought_ends_where_the_answer_begins(text, thought, answer):
    assert thoughts.split_thought(text) == (thought, answer)


def test_a_response_without_marks_is_a_thought_where_the_prompt_has_opened_one():
    assert thoughts.opens_thought("<|assistant|><think>\n")
    assert not thoughts.opens_thought("<|assistant|><think>\n\n</think>\n\n")
    assert thoughts.closes_thought("<|assistant|><think>\n\n</think>\n\n")
    assert thoughts.opens_thought("<seed:think><seed:cot_budget_reflect>")
    assert not thoughts.closes_thought("<seed:think><seed:cot_budget_reflect>")
    assert thoughts.closes_thought("<|assistant|></think>")
    assert thoughts.split_thought("so it goes", opened=True) == ("so it goes", "")
    assert thoughts.split_thought("so</think>yes", opened=True) == ("so", "yes")


def test_a_thought_put_before_its_answer_is_found_again():
    assert thoughts.split_thought(thoughts.with_thought("so", "yes")) == ("so", "yes")


# ----------------------------------------------------------------------------------- sampled ids

MARKS = ["<think>", "</think>", "[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|start|>"]


@pytest.fixture(scope="module", params=["text", "special"])
def tokenizer(request):
    """One token per byte; the marks of thoughts are plain text, or special tokens."""
    tokenizer = build_tokenizer(PLAIN, "<|pad|>")
    if request.param == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS, "<|return|>"]})
    return tokenizer


def record_of(tokenizer, text, prompt="<|assistant|>", finished=True):
    prompt_ids = tokenizer(prompt).input_ids
    return responses.response_record(tokenizer, prompt_ids, tokenizer(text).input_ids, finished, 0)


@pytest.mark.parametrize(
    "prompt, thinking, answer",
    [
        ("<|assistant|>", "<think>so it is</think>", "\n\nyes<|end|>"),
        ("<|assistant|>", "[THINK]so it is[/THINK]", "yes<|end|>"),
        ("<|assistant|>", "<think>so it is</think>", "\n<answer>\nyes\n</answer><|end|>"),
        ("<seed:think><seed:cot_budget_reflect>", "so it is</seed:think>", "yes<|end|>"),
        ("<|assistant|><think>\n", "so it is\n</think>", "yes<|end|>"),
        ("<|assistant|>", "<|channel|>analysis<|message|>so it is<|end|>"
         "<|start|>assistant<|channel|>final<|message|>", "yes<|end|>"),
    ],
)  # fmt: skip
def test_the_text_is_the_answer_and_the_ids_stay_whole(tokenizer, prompt, thinking, answer):
    record = record_of(tokenizer, thinking + answer, prompt)

    n_thought = len(tokenizer(thinking).input_ids)
    assert record["text"] == "yes"
    assert record["thought"] == "so it is"
    assert record["thought_tokens"] == n_thought
    assert record["finished"]
    assert record["ids"] == tokenizer(thinking + answer).input_ids
    assert responses.answer_length(record) == len(tokenizer(answer).input_ids)


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("<|assistant|>", "<think>so it"),
        ("<|assistant|>", "<think>so it<|end|>"),  # the end token within the thought
        ("<|assistant|><think>\n", "so it"),
    ],
)
def test_a_thought_that_does_not_end_is_an_unfinished_response(tokenizer, prompt, text):
    record = record_of(tokenizer, text, prompt)

    assert record["text"] == ""
    assert not record["finished"]
    assert responses.answer_length(record) == 0


def test_a_response_without_a_thought_stays_as_the_policy_wrote_it(tokenizer):
    record = record_of(tokenizer, " yes \n<|end|>")

    assert record["text"] == " yes \n"
    assert record.keys() == {"text", "ids", "finished", "logp"}
    assert responses.answer_length(record) == len(record["ids"])


def test_a_response_of_text_alone_is_told_apart_too():
    assert responses.response_from_text("yes", True) == {"text": "yes", "finished": True}
    record = responses.response_from_text("<think>so</think>yes", True)
    assert record == {"text": "yes", "finished": True, "thought": "so"}
    assert not responses.response_from_text("<think>so", True)["finished"]


def test_lengths_of_thoughts_are_reported_apart(tokenizer, tmp_path, capsys):
    thinking = record_of(tokenizer, "<think>so</think>yes<|end|>")
    plain = record_of(tokenizer, "yes<|end|>")
    n = thinking["thought_tokens"]

    rows = [{"responses": [thinking, plain]}]
    counts = responses.count_and_print(str(tmp_path / "c.jsonl"), {"prompts": 1}, rows)

    assert counts["tokens"] == n + 8
    assert counts["thought_tokens"] == n
    assert f"of {(n + 8) / 2:.1f} tokens ({n / 2:.1f} of them thoughts)" in capsys.readouterr().out
    counts = responses.count_and_print("c.jsonl", {"prompts": 1}, [{"responses": [plain]}])
    assert "thought_tokens" not in counts
