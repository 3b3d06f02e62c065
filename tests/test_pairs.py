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
from nanoaipo.rows import pair_messages, prompt_messages, without_end_marks


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


# what is asked and answered in every layout
SYSTEM = system("Be brief.")
QUESTION = user("Two?")
YES = answer("2")
NO = answer("three")
ANSWERS = {"chosen": "2", "rejected": "three"}
PAIR = {"prompt": "Two?", "chosen": "2", "rejected": "three"}

# the same with a turn before the question
TALK = [user("Hi."), answer("Hello."), QUESTION]
HISTORY = [["Hi.", "Hello."]]
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

OBEY = [SYSTEM, QUESTION]
LISTS = {"prompt": TALK, "chosen": [YES], "rejected": [NO]}
ONE_MESSAGE = {"prompt": [QUESTION], "chosen": YES, "rejected": NO}
NULLS = {"prompt": None, "messages": None, "question": "Two?"} | ANSWERS
ENDED = {"prompt": "Two?", "chosen": "2<|im_end|>\n<|endoftext|>", "rejected": "three </s>"}

# conversations, which begin with the prompt
BOTH_TALK = {"chosen": [*TALK, YES], "rejected": [*TALK, NO]}
BOTH_ASK = {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}
BOTH_OBEY = {"chosen": [*OBEY, YES], "rejected": [*OBEY, NO]}
ONE_OBEYS = {"chosen": [*OBEY, YES], "rejected": "three"}
AS_MESSAGES = {"messages": [QUESTION, YES]} | BOTH_ASK


@pytest.mark.parametrize(
    "row, prompt",
    [
        pytest.param(PAIR, [QUESTION], id="all are texts"),
        pytest.param(LISTS, TALK, id="all are lists of messages"),
        pytest.param(ONE_MESSAGE, [QUESTION], id="an answer is one message"),
        pytest.param(BOTH_TALK, TALK, id="no column holds the prompt"),
        pytest.param(BOTH_TALK | {"prompt": TALK}, TALK, id="answers repeat the prompt"),
        pytest.param(BOTH_TALK | {"prompt": "Hi. "}, TALK, id="the prompt is the first question"),
        pytest.param(BOTH_TALK | {"prompt": "Two?"}, TALK, id="the prompt is the last question"),
        pytest.param(BOTH_OBEY | {"prompt": "Two?"}, OBEY, id="both have the system message"),
        pytest.param(ONE_OBEYS | {"prompt": "Two?"}, OBEY, id="one has it, the other is a text"),
        pytest.param(BOTH_ASK | {"prompt": OBEY}, OBEY, id="the prompt alone has it"),
        pytest.param(AS_MESSAGES, [QUESTION], id="messages repeat the chosen conversation"),
        pytest.param(NULLS, [QUESTION], id="columns of other rows are null"),
        pytest.param(ENDED, [QUESTION], id="answers have the end tokens of other models"),
    ],
)
def test_texts_messages_and_conversations_are_a_prompt_and_one_answer_each(row, prompt):
    assert pair_messages("here", row) == (prompt, [YES], [NO])


# the files of others; a system message may stand in a column

TOLD = {"system": "Be brief."}
ANTHROPIC_HH = {"chosen": HH + " 2", "rejected": HH + " three"}
OPENAI = {
    "input": {"messages": TALK, "tools": [], "parallel_tool_calls": True},
    "preferred_output": [YES],
    "non_preferred_output": [NO],
}
ORCA = {"question": "Two?"} | ANSWERS
STACK_EXCHANGE = {"question": "Two?", "response_j": "2", "response_k": "three"}

ALPACA = {"instruction": "Add.", "input": "1 1"} | ANSWERS
ALPACA_OUTPUT = {"instruction": "Two?", "input": "", "output": "2", "rejected": "three"}
ALPACA_HISTORY = {"instruction": "Two?", "input": "", "history": HISTORY} | ANSWERS

SHAREGPT = {
    "conversations": [{"from": "human", "value": "Two?"}],
    "chosen": {"from": "gpt", "value": "2"},
    "rejected": {"from": "gpt", "value": "three"},
}
SHAREGPT_ROLES = {
    "prompt": [{"role": "human", "content": "Two?"}],
    "chosen": [{"role": "gpt", "content": "2"}],
    "rejected": [{"role": "gpt", "content": "three"}],
}

MS_SWIFT = {"messages": [*OBEY, YES], "rejected_response": "three"}
MS_SWIFT_MESSAGES = {"messages": [*TALK, YES], "rejected_messages": [NO]}
MS_SWIFT_OLD = {"query": "Two?", "history": HISTORY, "response": "2", "rejected_response": "three"}


def in_parts(role, text):
    """A message as LLaMA-Factory writes it."""
    return {"role": role, "content": [{"type": "text", "value": text}]}


LLAMA_FACTORY = {
    "chosen_messages": [in_parts("user", "Two?"), in_parts("assistant", "2")],
    "rejected_messages": [in_parts("user", "Two?"), in_parts("assistant", "three")],
}


@pytest.mark.parametrize(
    "row, prompt",
    [
        pytest.param(ANTHROPIC_HH, TALK, id="HH has conversations in one text"),
        pytest.param({"prompt": HH} | ANSWERS, TALK, id="HH has the prompt in one text"),
        pytest.param(OPENAI, TALK, id="OpenAI has messages within input"),
        pytest.param(ORCA | TOLD, OBEY, id="Orca has a system column"),
        pytest.param(ORCA | {"system": ""}, [QUESTION], id="Orca has an empty system column"),
        pytest.param(STACK_EXCHANGE, [QUESTION], id="StackExchange prefers j to k"),
        pytest.param(ALPACA, [user("Add.\n\n1 1")], id="Alpaca has an input below"),
        pytest.param(ALPACA_OUTPUT, [QUESTION], id="Alpaca has its output as the chosen answer"),
        pytest.param(ALPACA_HISTORY, TALK, id="Alpaca has a history of pairs"),
        pytest.param(PAIR | {"history": TALK[:2]}, TALK, id="a history is messages"),
        pytest.param(SHAREGPT, [QUESTION], id="ShareGPT has from and value"),
        pytest.param(SHAREGPT_ROLES, [QUESTION], id="ShareGPT has names of its own for roles"),
        pytest.param(MS_SWIFT, OBEY, id="ms-swift ends messages with chosen"),
        pytest.param(MS_SWIFT_MESSAGES, TALK, id="ms-swift has both answers as messages"),
        pytest.param(MS_SWIFT_OLD, TALK, id="ms-swift had query and history"),
        pytest.param(MS_SWIFT_OLD | TOLD, [SYSTEM, *TALK], id="ms-swift had a system column"),
        pytest.param(LLAMA_FACTORY, [QUESTION], id="LLaMA-Factory has parts of text"),
    ],
)
def test_a_pair_of_another_tools_file_is_a_prompt_and_one_answer_each(row, prompt):
    assert pair_messages("here", row) == (prompt, [YES], [NO])


def test_what_ends_like_an_end_token_in_html_stays():
    row = PAIR | {"chosen": "<s>2</s>"}

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
    with pytest.raises(UnusableRow, match=f"'prompt' is rendered .*{mark}") as error:
        pair_messages("here", PAIR | {"prompt": prompt})

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


NO_REJECTED = {"prompt": "a", "chosen": "b", "x": 1}
TWO_ANSWERS = {"chosen": [QUESTION, YES, QUESTION, YES], "rejected": [QUESTION, NO]}
ANSWERED = {"prompt": [QUESTION, YES]} | ANSWERS
CONTROL_TEXT = r"holds the control token <\|end\|>; if it is rendered with a chat template already"


@pytest.mark.parametrize(
    "row, reason, message",
    [
        (NO_REJECTED, "no_rejected", "the columns are prompt, chosen, x; wan"),
        (PAIR | {"chosen": None}, "no_chosen", "field 'chosen' is missing"),
        (ANSWERS, "no_prompt", "field 'prompt' is missing"),
        (PAIR | {"chosen": 7}, "no_messages", "'chosen' has to be"),
        (PAIR | {"prompt": [user(None)]}, "no_content", "'prompt': message 1"),
        (PAIR | {"images": ["x"]}, "not_text", "holds images"),
        (TWO_ANSWERS, "not_one_answer", "'chosen' has to be one message of the assistant"),
        (BOTH_ASK | {"prompt": "Three?"}, "prompt_differs", "the prompt is another one"),
        (ANSWERED, "prompt_ends_with_assistant", "the prompt ends with a message of the assistant"),
        (PAIR | {"tools": "[weather"}, "no_json", "'tools' is a text, and not one of JSON"),
        (PAIR | {"prompt": "<|end|>a"}, "control_text", CONTROL_TEXT),
        (PAIR | {"rejected": "2"}, "identical", "are the same"),
        (PAIR | {"prompt": "a" * 300}, "too_long", "--max_length=200"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_and_told_with_its_place(
    row, reason, message, loaded, tmp_path, capsys
):
    path = write_lines(tmp_path / "pairs.jsonl", PAIR, row, PAIR)

    pairs, counts = read_pairs(path, *loaded, 200)

    assert len(pairs) == counts["pairs"] == 2
    assert counts[reason] == 1
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert f"1 row dropped: 1 {reason} ({path}:2: " in line

    with pytest.raises(InputError, match=message) as error:
        read_pairs(write_lines(tmp_path / "bad.jsonl", row), *loaded, 200)
    assert "bad.jsonl: no pair is left (1 " in str(error.value)


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
    path = write_lines(tmp_path / "pairs.jsonl", PAIR, PAIR | TOLD)

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
    path = write_lines(tmp_path / "pairs.jsonl", PAIR | {"chosen": chosen})

    with pytest.raises(InputError, match=rf"no pair is left \(1 {reason} \("):
        read_pairs(path, tokenizer, {tokenizer.eos_token_id}, 200)


def test_tools_and_template_settings_of_a_row_and_of_the_run_reach_the_template(loaded, tmp_path):
    tokenizer, eos_ids = loaded
    plain = tokenizer.chat_template
    tools = [{"type": "function", "function": {"name": "weather", "strict": None}}]
    path = write_lines(
        tmp_path / "pairs.jsonl",
        PAIR | {"tools": tools, "chat_template_kwargs": {"mood": "glad"}},
        PAIR | {"tools": json.dumps(tools)},
        PAIR,
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


def test_log_probs_that_came_with_texts_are_not_those_of_our_tokens(loaded, tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", PAIR | {"chosen_logp": -7.5, "margin": 2.0})

    (pair,), _ = read_pairs(path, *loaded, 200)

    assert pair["margin"] == 2.0
    assert "chosen_logp" not in pair


def test_tools_that_the_template_does_not_write_are_refused(loaded, tmp_path, capsys):
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    path = write_lines(
        tmp_path / "pairs.jsonl",
        PAIR,
        PAIR | {"tools": ['{"name": "weather"}']},
        PAIR | {"chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}]},
    )

    pairs, counts = read_pairs(path, *loaded, 200)

    assert len(pairs) == 1
    assert counts["no_tools"] == 2
    assert f"{path}:2: this model's chat template writes no tools" in capsys.readouterr().out


def test_the_end_token_of_a_model_behind_a_text_is_no_part_of_it(loaded, tmp_path):
    ended = {"prompt": "Two?", "chosen": "2<|end|>\n", "rejected": "three <|end|>"}

    (first, second), _ = read_pairs(write_lines(tmp_path / "p.jsonl", PAIR, ended), *loaded, 200)

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
    none = {"prompt_ids": None, "chosen_ids": None, "rejected_ids": None}
    above = {"prompt_ids": [1], "chosen_ids": [len(tokenizer)], "rejected_ids": [2]}
    path = write_lines(tmp_path / "pairs.jsonl", PAIR, PAIR | none)
    other = write_lines(tmp_path / "other.jsonl", PAIR, PAIR | above)

    (first, second), _ = read_pairs(path, tokenizer, eos_ids, 200)
    assert first == second

    with pytest.raises(InputError, match="other.jsonl:2: .* the pairs are another model's"):
        read_pairs(other, tokenizer, eos_ids, 200)
    pairs, _ = read_pairs(other, tokenizer, eos_ids, 200, n_tokens=len(tokenizer) + 1)
    assert len(pairs) == 2


def test_ids_above_the_models_vocabulary_end_the_run_whatever_the_tokenizer_has(loaded, tmp_path):
    tokenizer, eos_ids = loaded
    path = write_lines(tmp_path / "pairs.jsonl", PAIR)

    # the first of the prompt that is too large: T of "Two?"
    above = tokenizer.convert_tokens_to_ids("T")
    message = f"pairs.jsonl:1: 'prompt_ids' has the id {above}, and this model has {above} tokens"
    with pytest.raises(InputError, match=message):
        read_pairs(path, tokenizer, eos_ids, 200, n_tokens=above)


def test_an_end_token_that_the_tokenizer_has_no_text_for_is_cut_from_no_answer(loaded, tmp_path):
    tokenizer, eos_ids = loaded
    marked = PAIR | {"chosen": "2<|end|>", "rejected": "three "}
    path = write_lines(tmp_path / "pairs.jsonl", PAIR, marked)
    size = len(tokenizer) + 2

    pairs, _ = read_pairs(path, tokenizer, eos_ids | {size - 1}, 200, n_tokens=size)
    assert pairs[0]["chosen_ids"] == pairs[1]["chosen_ids"]

    # nor is white space where no end token has a text
    assert tokenizer.decode(pairs[1]["rejected_ids"]).endswith("three <|end|>")
    messages = [answer("three ")]
    assert without_end_marks(messages, []) == messages


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

    (pair,), _ = read_pairs(write_lines(tmp_path / "p.jsonl", PAIR), tokenizer, {300}, 200)

    assert pair["chosen_ids"][-1] == 300 > len(tokenizer)
