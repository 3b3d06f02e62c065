"""Pairs in the layouts that people's files have: what is trained, and what is dropped and told."""

import json

import pytest
from conftest import PLAIN, build_model, build_tokenizer
from templates import DEEPSEEK_V31, R1_DISTILL
from test_files import write_lines

from nanoaipo import chat
from nanoaipo.errors import InputError
from nanoaipo.messages import Dropped, UnusableRow, as_messages, template_columns
from nanoaipo.pairs import read_pairs
from nanoaipo.rows import pair_messages, prompt_messages


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


QUESTION = user("Two?")
YES, NO = answer("2"), answer("three")
TALK = [user("Hi."), answer("Hello."), QUESTION]
SYSTEM = system("Be brief.")
HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Two?\n\nAssistant:"
SHOUTING = PLAIN.replace("m['content']", "m['content'].upper()")


@pytest.fixture(scope="module")
def loaded(tiny_model):
    """(tokenizer, ids that end a turn) of the tiny model."""
    return chat.load_tokenizer(tiny_model)


# ---------------------------------------------------------------------------------------- messages


def test_null_keys_are_dropped_also_inside_and_others_stay():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    messages = [
        {"role": "user", "content": "a", "name": None, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "b", "tool_call_id": "7", "tool_calls": None},
    ]

    first, second, third = as_messages(messages, "here")

    assert first == user("a")
    called = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert second == answer("") | {"tool_calls": [called], "reasoning_content": "hm"}
    assert third == {"role": "tool", "content": "b", "tool_call_id": "7"}


def test_parts_of_text_are_joined_and_sharegpts_names_are_read():
    parts = [{"type": "text", "text": "a ", "image": None}, {"type": "text", "text": "b"}]
    talk = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q", "weight": None},
        {"from": "gpt", "value": "r"},
    ]

    assert as_messages([{"role": "user", "content": parts}], "here") == [user("a b")]
    assert as_messages(talk, "here") == [system("s"), user("q"), answer("r")]
    assert as_messages(talk[2], "here") == [answer("r")]
    assert as_messages("q", "here") == [user("q")]


@pytest.mark.parametrize(
    "value, reason, message",
    [
        (3, "no_messages", "here has to be a text or a list of messages"),
        (str([QUESTION]), "no_messages", "here is messages written as a text"),
        (json.dumps([QUESTION]), "no_messages", "here is messages written as a text"),
        ([{"from": "observation", "value": "a"}], "unknown_role", "1 is of the role 'observation'"),
        ([], "no_messages", "here has to be a text or a list of messages"),
        (["a"], "no_messages", "here has to be a text or a list of messages"),
        ([{"role": 1, "content": "a"}], "no_messages", "here has to be a text or a list"),
        ([{"from": 1, "value": "a"}], "no_messages", "here has to be a text or a list"),
        ([QUESTION, answer(None)], "no_content", r"here: message 2 \(assistant\) has no content"),
        ([user([])], "no_content", "here: message 1 has no content"),
        ([user([{"type": "image_url", "image_url": {}}])], "not_text", "message 1 holds an image"),
        ([QUESTION, user([{"type": "video"}])], "not_text", "message 2 holds a video"),
        ([user([7])], "not_text", "message 1 holds a part of no type"),
        ([user([{"type": "text", "text": None}])], "not_text", "holds a part without its text"),
    ],
)
def test_what_is_no_message_of_text_is_refused_by_name(value, reason, message):
    with pytest.raises(UnusableRow, match=message) as error:
        as_messages(value, "here")

    assert error.value.reason == reason


# ------------------------------------------------------------------------------------------- pairs

LAYOUTS = {  # name: (row, the prompt that is asked)
    "texts": ({"prompt": "Two?", "chosen": "2", "rejected": "three"}, [QUESTION]),
    "messages": ({"prompt": TALK, "chosen": [YES], "rejected": [NO]}, TALK),
    "one message each": ({"prompt": [QUESTION], "chosen": YES, "rejected": NO}, [QUESTION]),
    "prompt repeated": ({"prompt": TALK, "chosen": TALK + [YES], "rejected": TALK + [NO]}, TALK),
    "no prompt": ({"chosen": TALK + [YES], "rejected": TALK + [NO]}, TALK),
    "first question": ({"prompt": "Hi. ", "chosen": TALK + [YES], "rejected": TALK + [NO]}, TALK),
    "last question": ({"prompt": "Two?", "chosen": TALK + [YES], "rejected": TALK + [NO]}, TALK),
    "system in both": (
        {"prompt": "Two?", "chosen": [SYSTEM, QUESTION, YES], "rejected": [SYSTEM, QUESTION, NO]},
        [SYSTEM, QUESTION],
    ),
    "system in the prompt alone": (
        {"prompt": [SYSTEM, QUESTION], "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        [SYSTEM, QUESTION],
    ),
    "chosen a conversation, rejected a text": (
        {"prompt": "Two?", "chosen": [SYSTEM, QUESTION, YES], "rejected": "three"},
        [SYSTEM, QUESTION],
    ),
    "messages that are the chosen conversation": (
        {"messages": [QUESTION, YES], "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        [QUESTION],
    ),
    "openai": (
        {
            "input": {"messages": TALK, "tools": [], "parallel_tool_calls": True},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
        TALK,
    ),
    "hh": ({"chosen": HH + " 2", "rejected": HH + " three"}, TALK),
    "hh with a prompt": ({"prompt": HH, "chosen": "2", "rejected": "three"}, TALK),
    "orca": (
        {"system": "Be brief.", "question": "Two?", "chosen": "2", "rejected": "three"},
        [SYSTEM, QUESTION],
    ),
    "orca without a system message": (
        {"system": "", "question": "Two?", "chosen": "2", "rejected": "three"},
        [QUESTION],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 1", "chosen": "2", "rejected": "three"},
        [user("Add.\n\n1 1")],
    ),
    "alpaca with its output": (
        {"instruction": "Two?", "input": "", "output": "2", "rejected": "three"},
        [QUESTION],
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Two?"}],
            "chosen": {"from": "gpt", "value": "2"},
            "rejected": {"from": "gpt", "value": "three"},
        },
        [QUESTION],
    ),
    "sharegpt's names as roles": (
        {
            "prompt": [{"role": "human", "content": "Two?"}],
            "chosen": [{"role": "gpt", "content": "2"}],
            "rejected": [{"role": "gpt", "content": "three"}],
        },
        [QUESTION],
    ),
    "alpaca with a history": (
        {
            "instruction": "Two?",
            "input": "",
            "history": [["Hi.", "Hello."]],
            "chosen": "2",
            "rejected": "three",
        },
        TALK,
    ),
    "a history of messages": (
        {"prompt": "Two?", "history": TALK[:2], "chosen": "2", "rejected": "three"},
        TALK,
    ),
    "ms-swift's older files": (
        {
            "system": "Be brief.",
            "query": "Two?",
            "response": "2",
            "rejected_response": "three",
            "history": [["Hi.", "Hello."]],
        },
        [SYSTEM] + TALK,
    ),
    "ms-swift": (
        {"messages": [SYSTEM, QUESTION, YES], "rejected_response": "three"},
        [SYSTEM, QUESTION],
    ),
    "ms-swift with both as messages": (
        {"messages": TALK + [YES], "rejected_messages": [NO]},
        TALK,
    ),
    "llama-factory's parts": (
        {
            "chosen_messages": [
                {"role": "user", "content": [{"type": "text", "value": "Two?"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "2"}]},
            ],
            "rejected_messages": [
                {"role": "user", "content": [{"type": "text", "value": "Two?"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "three"}]},
            ],
        },
        [QUESTION],
    ),
    "stack exchange": (
        {"question": "Two?", "response_j": "2", "response_k": "three"},
        [QUESTION],
    ),
    "answers with the end tokens of other models": (
        {"prompt": "Two?", "chosen": "2<|im_end|>\n<|endoftext|>", "rejected": "three </s>"},
        [QUESTION],
    ),
    "columns of other rows": (
        {"prompt": None, "messages": None, "question": "Two?", "chosen": "2", "rejected": "three"},
        [QUESTION],
    ),
}


@pytest.mark.parametrize("row, prompt", LAYOUTS.values(), ids=LAYOUTS)
def test_a_pair_of_any_layout_is_a_prompt_and_one_answer_each(row, prompt):
    assert pair_messages("here", row) == (prompt, [YES], [NO])


def test_what_ends_like_an_end_token_in_html_stays():
    row = {"prompt": "Two?", "chosen": "<s>2</s>", "rejected": "three"}

    assert pair_messages("here", row) == ([QUESTION], [answer("<s>2</s>")], [NO])


@pytest.mark.parametrize(
    "prompt, mark",
    [
        ("<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", r"<\|im_start\|>"),
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>", r"<\|begin_of_text\|>"),
        ("<s>[INST] Two? [/INST]", r"<s>\[INST\]"),
        ("<bos><start_of_turn>user\nTwo?", "<bos>"),
        ("<|user|>\nTwo?</s>\n<|assistant|>\n", r"<\|user\|>"),
        ("Human: Two? Assistant:", "Human: ... Assistant:"),
        ("Do.\n\n### Instruction:\nTwo?\n\n### Response:\n", "### Response:"),
    ],
)
def test_a_prompt_that_another_models_template_has_written_is_refused(prompt, mark):
    row = {"prompt": prompt, "chosen": "2", "rejected": "three"}

    with pytest.raises(UnusableRow, match=f"'prompt' is rendered .*{mark}") as error:
        pair_messages("here", row)

    assert error.value.reason == "rendered"


@pytest.mark.parametrize(
    "labels", [("A", "B"), ("response_b", "response_a")], ids=["letters", "names"]
)
def test_answers_that_are_labels_of_other_columns_are_refused(labels):
    columns = {"prompt": "Two?", "response_a": "2", "response_b": "three"}
    chosen, rejected = labels

    with pytest.raises(UnusableRow, match="name the columns response_. and response_."):
        pair_messages("here", columns | {"chosen": chosen, "rejected": rejected})


def test_answers_of_one_letter_are_answers_where_no_column_is_named_so():
    row = {"prompt": "A or B?", "chosen": "A", "rejected": "B", "score_a": 0.5, "score_b": 0.1}

    assert pair_messages("here", row)[1:] == ([answer("A")], [answer("B")])


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "Two?", "history": "Hi."}, "'history' has to be a list of"),
        ({"prompt": "Two?", "history": [["Hi."]]}, "'history' has to be a list of"),
        ({"prompt": "Two?", "image": "a.png"}, "holds image, and only text is read"),
        ({"conversations": [QUESTION, YES, NO]}, "ends with two messages of the assistant"),
    ],
)
def test_a_prompt_that_is_more_than_its_column_is_not_cut(row, message):
    with pytest.raises(UnusableRow, match=message):
        prompt_messages("here", row)


UNUSABLE = {  # reason: (row, what the message says)
    "no_rejected": (
        {"prompt": "a", "chosen": "b", "x": 1},
        "the columns are prompt, chosen, x; wan",
    ),
    "no_chosen": ({"prompt": "a", "chosen": None, "rejected": "b"}, "field 'chosen' is missing"),
    "no_prompt": ({"chosen": "b", "rejected": "c"}, "field 'prompt' is missing"),
    "no_messages": ({"prompt": "a", "chosen": 7, "rejected": "c"}, "'chosen' has to be"),
    "no_content": ({"prompt": [user(None)], "chosen": "b", "rejected": "c"}, "'prompt': message 1"),
    "not_text": ({"prompt": "a", "images": ["x"], "chosen": "b", "rejected": "c"}, "holds images"),
    "not_one_answer": (
        {"chosen": [QUESTION, YES, QUESTION, YES], "rejected": [QUESTION, NO]},
        "'chosen' has to be one message of the assistant",
    ),
    "prompt_differs": (
        {"prompt": "Three?", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        "the prompt is another one",
    ),
    "prompt_ends_with_assistant": (
        {"prompt": [QUESTION, YES], "chosen": [YES], "rejected": [NO]},
        "the prompt ends with a message of the assistant",
    ),
    "no_json": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "tools": "[weather"},
        "'tools' is a text, and not one of JSON",
    ),
    "control_text": (
        {"prompt": "<|end|>a", "chosen": "b", "rejected": "c"},
        r"holds the control token <\|end\|>; if it is rendered with a chat template already",
    ),
    "identical": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    "too_long": ({"prompt": "a" * 300, "chosen": "b", "rejected": "c"}, "--max_length=200"),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_row_that_cannot_be_used_is_dropped_and_told_with_its_place(
    reason, loaded, tmp_path, capsys
):
    row, message = UNUSABLE[reason]
    good = {"prompt": "Two?", "chosen": "2", "rejected": "three"}
    path = write_lines(tmp_path / "pairs.jsonl", good, row, good)

    pairs, counts = read_pairs(path, *loaded, 200)

    assert len(pairs) == counts["pairs"] == 2
    assert counts[reason] == 1
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert f"1 row dropped: 1 {reason} ({path}:2: " in line

    with pytest.raises(InputError, match=message) as error:
        read_pairs(write_lines(tmp_path / "bad.jsonl", row), *loaded, 200)
    assert "bad.jsonl: no pair is left to train on (1 " in str(error.value)


def test_dropped_rows_are_told_in_one_line_with_the_first_of_each_reason():
    dropped = Dropped()
    dropped.add("no_prompt", "a.jsonl:7: this")
    dropped.add("identical", "a.jsonl:8: that")
    dropped.add("no_prompt", "a.jsonl:9: this too")

    told = "3 rows dropped: 2 no_prompt (a.jsonl:7: this), 1 identical (a.jsonl:8: that)"
    assert str(dropped) == told


def test_a_prompt_that_the_template_refuses_is_dropped(tmp_path):
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    tokenizer, eos_ids = chat.load_tokenizer(build_model(tmp_path / "model"))
    tokenizer.chat_template = refuses + tokenizer.chat_template
    row = {"prompt": "Two?", "chosen": "2", "rejected": "three"}
    path = write_lines(tmp_path / "pairs.jsonl", row, row | {"system": "Be brief."})

    pairs, counts = read_pairs(path, tokenizer, eos_ids, 200)

    assert counts["pairs"] == len(pairs) == 1
    assert counts["refused_by_template"] == 1


@pytest.mark.parametrize(
    "template, chosen, reason",
    [
        pytest.param(R1_DISTILL, "2", "no_thought", id="it has to think"),
        pytest.param(R1_DISTILL, "<think>so</think>", "no_answer", id="it only thinks"),
        pytest.param(DEEPSEEK_V31, "<think>so</think>2", "unwanted_thought", id="it may not think"),
        pytest.param(SHOUTING, "two", "rewritten", id="its words are changed"),
    ],
)
def test_a_response_that_the_template_would_not_write_so_is_dropped(
    template, chosen, reason, tmp_path
):
    tokenizer = build_tokenizer(template, "<|pad|>")
    row = {"prompt": "Two?", "chosen": chosen, "rejected": "three"}
    path = write_lines(tmp_path / "pairs.jsonl", row)

    with pytest.raises(InputError, match=rf"no pair is left to train on \(1 {reason} \("):
        read_pairs(path, tokenizer, {tokenizer.eos_token_id}, 200)


def test_tools_and_template_settings_of_a_row_and_of_the_run_reach_the_template(loaded, tmp_path):
    tokenizer, eos_ids = loaded
    plain = tokenizer.chat_template
    tools = [{"type": "function", "function": {"name": "weather", "strict": None}}]
    row = {"prompt": "Two?", "chosen": "2", "rejected": "three"}
    path = write_lines(
        tmp_path / "pairs.jsonl",
        row | {"tools": tools, "chat_template_kwargs": {"mood": "glad"}},
        row | {"tools": json.dumps(tools)},
        row,
    )

    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}{{ mood }}" + plain
    try:
        pairs, _ = read_pairs(path, tokenizer, eos_ids, 200, {"mood": "calm"})
    finally:
        tokenizer.chat_template = plain

    first, second, third = (tokenizer.decode(pair["prompt_ids"]) for pair in pairs)
    assert '{"name": "weather"}' in first
    assert "glad" in first
    assert '{"name": "weather"}' in second
    assert "calm" in second
    assert "weather" not in third


def test_tools_that_the_template_does_not_write_are_refused(loaded, tmp_path, capsys):
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    row = {"prompt": "Two?", "chosen": "2", "rejected": "three"}
    path = write_lines(
        tmp_path / "pairs.jsonl",
        row,
        row | {"tools": ['{"name": "weather"}']},
        row | {"chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}]},
    )

    pairs, counts = read_pairs(path, *loaded, 200)

    assert len(pairs) == 1
    assert counts["no_tools"] == 2
    assert f"{path}:2: this model's chat template writes no tools" in capsys.readouterr().out


def test_the_end_token_of_a_model_behind_a_text_is_no_part_of_it(loaded, tmp_path):
    row = {"prompt": "Two?", "chosen": "2", "rejected": "three"}
    ended = {"prompt": "Two?", "chosen": "2<|end|>\n", "rejected": "three <|end|>"}

    (first, second), _ = read_pairs(write_lines(tmp_path / "p.jsonl", row, ended), *loaded, 200)

    assert first == second


def test_openais_tools_stand_beside_the_messages():
    tools = [{"type": "function"}]

    assert template_columns("here", {"input": {"messages": [], "tools": tools}}) == {"tools": tools}
    assert template_columns("here", {"tools": ['{"type": "function"}']}) == {"tools": tools}
    assert template_columns("here", {"tools": None, "chat_template_kwargs": None}) == {}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"tools": {"name": "weather"}}, "here: 'tools' has to be a list"),
        ({"chat_template_kwargs": "no"}, "here: 'chat_template_kwargs' is a text, and not one"),
        ({"chat_template_kwargs": [1]}, "here: 'chat_template_kwargs' has to be an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "here: .* holds 'tokenize', which is not"),
    ],
)
def test_columns_that_no_template_can_take_make_a_row_unusable(row, message):
    with pytest.raises(UnusableRow, match=message):
        template_columns("here", row)


def test_nulls_that_tables_fill_in_reach_no_template():
    row = {"tools": [], "chat_template_kwargs": {"enable_thinking": False, "lang": None}}

    assert template_columns("here", row) == {"enable_thinking": False}


def test_ids_of_another_model_end_the_run_and_null_ids_are_none(loaded, tmp_path):
    tokenizer, eos_ids = loaded
    row = {"prompt": "Two?", "chosen": "2", "rejected": "three"}
    none = {"prompt_ids": None, "chosen_ids": None, "rejected_ids": None}
    above = {"prompt_ids": [1], "chosen_ids": [len(tokenizer)], "rejected_ids": [2]}
    path = write_lines(tmp_path / "pairs.jsonl", row, row | none)
    other = write_lines(tmp_path / "other.jsonl", row, row | above)

    (first, second), _ = read_pairs(path, tokenizer, eos_ids, 200)
    assert first == second

    with pytest.raises(InputError, match="other.jsonl:2: .* the pairs are another model's"):
        read_pairs(other, tokenizer, eos_ids, 200)
    pairs, _ = read_pairs(other, tokenizer, eos_ids, 200, n_tokens=len(tokenizer) + 1)
    assert len(pairs) == 2


def test_an_end_token_above_the_tokenizers_length_is_an_id_of_it(tmp_path):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # bytes are 0 to 255 and the end token is 300
    vocabulary = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary | {"<|end|>": 300}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    row = {"prompt": "Two?", "chosen": "2", "rejected": "three"}

    (pair,), _ = read_pairs(write_lines(tmp_path / "p.jsonl", row), tokenizer, {300}, 200)

    assert pair["chosen_ids"][-1] == 300 > len(tokenizer)
