"""Messages, and responses given as text, to ids. What training makes of them: test_train.py."""

import datetime
import json

import pytest
from conftest import CHATML, PLAIN, build_model, build_tokenizer
from templates import (
    DEEPSEEK_V31,
    EXAONE_DEEP,
    GEMMA4,
    GPT_OSS,
    KIMI_K2,
    LLAMA32,
    MISTRAL_SMALL3,
    NEMOTRON_NANO,
    OLMO3_THINK,
    QWEN3,
    R1_DISTILL,
    SMOLLM3,
)
from transformers.utils import chat_template_utils

from nanoaipo import chat
from nanoaipo.errors import InputError
from nanoaipo.messages import UnusableRow
from nanoaipo.response_text import Template, render_response

QUESTION = [{"role": "user", "content": "is it?"}]


def test_text_that_spells_a_control_token_stays_text(tiny_model):
    tokenizer, eos_ids = chat.load_tokenizer(tiny_model)
    control = chat.control_pattern(tokenizer)
    end = tokenizer.eos_token

    ids = chat.encode(tokenizer, f"a {end}b", control)

    assert not eos_ids & set(ids)
    assert tokenizer.decode(ids).replace(" ", "") == f"a{end}b"
    assert control.search(f"x{end}")
    assert not control.search("x")


def test_plain_text_is_encoded_as_the_tokenizer_does(tiny_model):
    tokenizer, _ = chat.load_tokenizer(tiny_model)
    control = chat.control_pattern(tokenizer)

    ids = chat.encode(tokenizer, "plain text", control)

    assert ids == tokenizer("plain text", add_special_tokens=False).input_ids


def test_a_conversation_with_control_text_is_rendered_around_it(tiny_model):
    tokenizer, eos_ids = chat.load_tokenizer(tiny_model)
    control = chat.control_pattern(tokenizer)
    messages = [
        {"role": "user", "content": "say <|end|>"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "again"},
    ]

    ids = chat.render(tokenizer, messages, "here", control)

    # three ends of turn, and the one in the text is none
    assert sum(i in eos_ids for i in ids) == 3
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )


def test_a_model_that_is_not_there_is_named_with_its_setting(tmp_path):
    with pytest.raises(InputError, match="--judge=.*none: no model folder and no hub model"):
        chat.load_tokenizer(str(tmp_path / "none"), "judge")


# ------------------------------------------------------------------------- responses given as text

THOUGHT = "<think>\nso\n</think>\n\nyes"
EMPTY = "<think>\n\n</think>\n\nyes"
NO_THINKING = {"enable_thinking": False}


def written(template, content, arguments=None, prompt=QUESTION, **keys):
    """(Text of the prompt, text of the response) as they are trained; None: it is rewritten."""
    tokenizer = build_tokenizer(template, "<|pad|>")
    control = chat.control_pattern(tokenizer)
    prompt_ids = chat.render(tokenizer, prompt, "here", arguments=arguments)
    response = [{"role": "assistant", "content": content, **keys}]
    eos_ids = {tokenizer.eos_token_id}
    chat_template = Template(tokenizer, control, arguments, "here")
    try:
        ids = render_response(chat_template, eos_ids, prompt, prompt_ids, response)
    except UnusableRow as e:
        assert str(e).startswith("here: ")
        if e.reason == "refused_by_template":
            raise
        return tokenizer.decode(prompt_ids), None
    return tokenizer.decode(prompt_ids), tokenizer.decode(ids)


@pytest.mark.parametrize(
    "template, arguments, content, opening, response",
    [
        # the template's own empty thought, once
        (QWEN3, None, "yes", "", "<think>\n\n</think>\n\nyes<|end|>\n"),
        (QWEN3, NO_THINKING, "yes", "<think>\n\n</think>\n\n", "yes<|end|>\n"),
        (SMOLLM3, None, "yes", "", "yes<|end|>\n"),
        (SMOLLM3, NO_THINKING, "yes", "<think>\n\n</think>\n", "yes<|end|>\n"),
        # a thought of the response, once
        (QWEN3, None, THOUGHT, "", THOUGHT + "<|end|>\n"),
        (QWEN3, None, "<think>so</think>yes", "", THOUGHT + "<|end|>\n"),
        (SMOLLM3, None, THOUGHT, "", THOUGHT + "<|end|>\n"),
        (R1_DISTILL, None, THOUGHT, "<think>\n", "so\n</think>\n\nyes<|end|>"),
        (R1_DISTILL, None, "so\n</think>\n\nyes", "<think>\n", "so\n</think>\n\nyes<|end|>"),
        (OLMO3_THINK, None, THOUGHT, "<think>", "\nso\n</think>\n\nyes<|end|>\n"),
        (OLMO3_THINK, None, "so</think>yes", "<think>", "so</think>yes<|end|>\n"),
        # an answer inside the thought that the template opens, and a second thought
        (R1_DISTILL, None, "yes", "<think>\n", None),
        (OLMO3_THINK, None, "yes", "<think>", None),
        (QWEN3, NO_THINKING, THOUGHT, "<think>\n\n</think>\n\n", None),
        (SMOLLM3, NO_THINKING, THOUGHT, "<think>\n\n</think>\n", None),
        # a thought that does not end
        (QWEN3, None, "<think>\nso", "", None),
        (SMOLLM3, None, "<think>\nso", "", None),
        (R1_DISTILL, None, "<think>\nso", "<think>\n", None),
        # the generation prompt closes a thought, or opens one, that a turn has not
        (GEMMA4, None, "yes", "<|channel>thought\n<channel|>", "yes<|end|>\n"),
        (GEMMA4, None, THOUGHT, "<|channel>thought\n<channel|>", None),
        (DEEPSEEK_V31, None, "yes", "</think>", "yes<|end|>"),
        (DEEPSEEK_V31, {"thinking": True}, THOUGHT, "<think>", "\nso\n</think>\n\nyes<|end|>"),
        (DEEPSEEK_V31, {"thinking": True}, "yes", "<think>", None),
        # a turn that opens a thought, or has an empty one, whatever the response begins with
        (NEMOTRON_NANO, None, THOUGHT, "<think>\n\n", "so\n</think>\n\nyes<|end|>"),
        (NEMOTRON_NANO, None, "yes", "<think>\n\n", None),
        (KIMI_K2, None, "yes", "", "<think></think>yes<|end|>"),
        (KIMI_K2, None, EMPTY, "", "<think></think>yes<|end|>"),
        (KIMI_K2, None, THOUGHT, "", THOUGHT + "<|end|>"),
        # other marks than the template's
        (EXAONE_DEEP, None, THOUGHT, "<thought>\n", "so\n</thought>\n\nyes<|end|>"),
        (SMOLLM3, None, "so\n</think>\n\nyes", "", THOUGHT + "<|end|>\n"),
        # an empty thought that the response brings
        (R1_DISTILL, None, EMPTY, "<think>\n", "\n</think>\n\nyes<|end|>"),
        (QWEN3, None, EMPTY, "", "<think>\n\n</think>\n\nyes<|end|>\n"),
        (QWEN3, NO_THINKING, EMPTY, "<think>\n\n</think>\n\n", "yes<|end|>\n"),
    ],
)
def test_a_response_is_what_the_template_writes_behind_the_prompt(
    template, arguments, content, opening, response
):
    prompt_text, response_text = written(template, content, arguments)

    assert prompt_text.endswith("<|assistant|>" + opening)
    assert response_text == response


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    "template, opening, response",
    [
        (QWEN3, "<|assistant|>", THOUGHT + "<|end|>\n"),
        (SMOLLM3, "<|assistant|>", THOUGHT + "<|end|>\n"),
        (R1_DISTILL, "<|assistant|><think>\n", "so\n</think>\n\nyes<|end|>"),
        (EXAONE_DEEP, "<|assistant|><thought>\n", "so\n</thought>\n\nyes<|end|>"),
        (GPT_OSS, "<|start|>assistant", "<|channel|>analysis<|message|>so<|end|>"
         "<|start|>assistant<|channel|>final<|message|>yes<|end|>"),
    ],
)  # fmt: skip
def test_a_thought_under_a_key_of_its_own_is_trained_too(template, opening, response, key):
    prompt_text, response_text = written(template, "yes", **{key: "so"})

    assert prompt_text.endswith(opening)
    assert response_text == response
    assert written(template, THOUGHT)[1] == response


def test_a_thought_under_a_key_where_the_template_thinks_not_is_noticed():
    assert written(QWEN3, "yes", NO_THINKING, reasoning_content="so")[1] is None
    assert written(DEEPSEEK_V31, "yes", reasoning_content="so")[1] is None


def test_a_response_without_the_thought_that_the_template_opens_is_told_what_to_do():
    tokenizer = build_tokenizer(R1_DISTILL, "<|pad|>")
    control = chat.control_pattern(tokenizer)
    chat_template = Template(tokenizer, control, {}, "here")
    response = [{"role": "assistant", "content": "yes"}]

    with pytest.raises(UnusableRow) as refusal:
        render_response(chat_template, {1}, QUESTION, [], response)

    # and what it says helps
    message = str(refusal.value)
    assert "opens a thought, and the response has none" in message
    assert "--template_kwargs" in message
    _, _, empty = message.partition("an empty one is ")
    empty = empty.partition(")")[0].replace("\\n", "\n")
    assert written(R1_DISTILL, empty + "yes")[1] == "\n</think>\n\nyes<|end|>"


@pytest.mark.parametrize("template", [PLAIN, CHATML, QWEN3, SMOLLM3])
@pytest.mark.parametrize("content", ["a [<|pad|>] b", "<|end|>", "x<|end|>", " <|user|>"])
def test_responses_that_spell_control_tokens_end_as_others_do(template, content):
    tokenizer = build_tokenizer(template, "<|pad|>")
    control = chat.control_pattern(tokenizer)
    chat_template = Template(tokenizer, control, {}, "here")
    prompt_ids = chat.render(tokenizer, QUESTION, "here")
    end = tokenizer.eos_token_id
    other = tokenizer.pad_token_id

    # the turn ends with <|end|>, which is not the tokenizer's end token
    tokenizer.eos_token = "<|pad|>"
    tails = []
    for text in ("plain", content):
        response = [{"role": "assistant", "content": text}]
        ids = render_response(chat_template, {end, other}, QUESTION, prompt_ids, response)
        tails.append(ids[ids.index(end) :])
        assert other not in ids
        assert ids.count(end) == 1
        assert text in tokenizer.decode(ids)

    assert tails[0] == tails[1]


@pytest.mark.parametrize("rewriting", [".upper()", ".replace('b', 'c')", "[:6]"])
def test_a_template_that_rewrites_answers_is_noticed(rewriting):
    template = OLMO3_THINK.replace("message.content", "message.content" + rewriting)
    template = template.replace("<think>", "")

    assert written(template, "aaa bbb ccc")[1] is None


def test_a_template_that_moves_the_system_message_frames_the_response_all_the_same():
    # Mistral-Nemo's: the system message stands in the last turn if that is the user's
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
        "{{ m.content }}<|assistant|>"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content }}<|end|>{% endif %}{% endfor %}"
    )
    prompt = [{"role": "system", "content": "Be brief."}, *QUESTION]

    prompt_text, response = written(template, "yes", prompt=prompt)

    assert prompt_text == "<|user|>Be brief.\nis it?<|assistant|>"
    assert response == " yes<|end|>"


def test_a_conversation_that_the_template_refuses_is_named():
    template = PLAIN.replace(
        "{{ '<|' + m",
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{{ '<|' + m",
    )
    prompt = [*QUESTION, {"role": "assistant", "content": "It is"}]

    with pytest.raises(InputError, match="^here: .* refuses the prompt: Roles must alternate$"):
        written(template, "so.", prompt=prompt)
    with pytest.raises(InputError, match="^here: .* refuses the prompt: "):
        written(template, "so.", {"tokenize": True})


# ------------------------------------------------------------------------------ template arguments


def test_the_templates_date_is_the_runs():
    arguments = chat.template_arguments("", "2026-02-03")

    assert "Today is 03 February 2026" in written(SMOLLM3, "yes", arguments)[0]


class FakeClock:
    """The class datetime as a template's strftime_now sees it, on a day of our choice."""

    year = 2026

    def now(self):
        return datetime.datetime(self.year, 2, 4)


@pytest.mark.parametrize("template", [SMOLLM3, GPT_OSS, MISTRAL_SMALL3, LLAMA32])
def test_a_runs_date_fixes_the_bytes_whatever_the_day(template, monkeypatch):
    arguments = chat.template_arguments("", "2026-02-03")
    tokenizer = build_tokenizer(template, "<|pad|>")
    clock = FakeClock()
    monkeypatch.setattr(chat_template_utils, "datetime", clock)

    undated = []
    dated = []
    for clock.year in (2026, 2027):
        undated.append(chat.render(tokenizer, QUESTION, "here"))
        dated.append(chat.render(tokenizer, QUESTION, "here", arguments=arguments))

    assert undated[0] != undated[1]  # the clock is the template's
    assert dated[0] == dated[1]
    assert "2026" in tokenizer.decode(dated[0])


def test_template_arguments_are_a_json_object_and_a_day():
    assert chat.template_arguments('{"enable_thinking": false}', "") == NO_THINKING
    with pytest.raises(InputError, match="--template_kwargs=.*: not JSON"):
        chat.template_arguments("{thinking}", "")
    with pytest.raises(InputError, match="--template_kwargs=.*: has to be a JSON object"):
        chat.template_arguments("[1]", "")
    with pytest.raises(InputError, match="--template_kwargs=.*: 'tokenize' is not the template's"):
        chat.template_arguments('{"tokenize": true}', "")
    with pytest.raises(InputError, match="--date=3.2.2026: has to be a day"):
        chat.template_arguments("", "3.2.2026")


# ------------------------------------------------------------------------------------ end tokens


def change_json(path, **changed):
    values = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))


def test_end_tokens_come_from_config_json_where_no_generation_config_names_them(tmp_path):
    build_model(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    for changed in (
        {"eos_token_id": [1, 5]},
        {"eos_token_id": 5},
        {"eos_token_id": None, "text_config": {"eos_token_id": [5]}},
    ):
        change_json(tmp_path / "config.json", **changed)

        _, eos_ids = chat.load_tokenizer(str(tmp_path))

        assert eos_ids == {1, 5}  # 1 is the tokenizer's


def test_a_model_without_any_end_token_is_refused(tmp_path):
    build_model(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    change_json(tmp_path / "config.json", eos_token_id=None)
    change_json(tmp_path / "tokenizer_config.json", eos_token=None)

    with pytest.raises(InputError, match="no end token.*set eos_token in tokenizer_config.json"):
        chat.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("named", ["<|end|>", -1, 262, [1, 262], [1, None], True, 1.0, {"a": 1}])
def test_an_end_token_that_is_no_id_of_the_model_is_refused(tmp_path, named):
    build_model(tmp_path)
    change_json(tmp_path / "generation_config.json", eos_token_id=named)

    with pytest.raises(InputError) as refusal:
        chat.load_tokenizer(str(tmp_path))

    wrong = named[1] if isinstance(named, list) else named
    message = str(refusal.value)
    assert message.startswith(f"--model={tmp_path}: generation_config.json names the eos_token_id")
    assert f" {json.dumps(wrong)}, but" in message
    assert message.endswith("are the whole numbers 0 to 261")

    # neither may config.json name it
    (tmp_path / "generation_config.json").unlink()
    change_json(tmp_path / "config.json", eos_token_id=named)
    with pytest.raises(InputError, match="--model=.*eos_token_id"):
        chat.load_tokenizer(str(tmp_path))


def test_a_tokenizer_whose_end_token_the_model_lacks_is_refused(tmp_path):
    build_model(tmp_path, vocab_size=300)
    tokenizer = build_tokenizer(PLAIN, "<|pad|>")
    tokenizer.add_tokens([f"<{n}>" for n in range(300)])
    tokenizer.add_special_tokens({"eos_token": "<|over|>"})
    tokenizer.save_pretrained(tmp_path)

    with pytest.raises(InputError, match="its tokenizer names the eos_token_id 562, but .* to 299"):
        chat.load_tokenizer(str(tmp_path), "judge")


def test_end_tokens_are_read_beside_settings_that_contradict_each_other(tmp_path):
    build_model(tmp_path)
    change_json(
        tmp_path / "generation_config.json",
        eos_token_id=[1, 5],
        num_beams=1,
        num_return_sequences=3,
        do_sample=False,
    )

    _, eos_ids = chat.load_tokenizer(str(tmp_path))

    assert eos_ids == {1, 5}


# ------------------------------------------------------------------------- what else a folder says


@pytest.mark.parametrize(
    "config",
    [
        None,
        "{",
        "[]",
        '{"model_type": "of_its_own"}',
        '{"model_type": "of_its_own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}',
        '{"model_type": "llama", "vocab_size": "many"}',
    ],
)
def test_a_config_that_transformers_cannot_read_is_told_in_one_line(tmp_path, config):
    build_model(tmp_path)
    (tmp_path / "config.json").unlink()
    if config is not None:
        (tmp_path / "config.json").write_text(config)

    with pytest.raises(InputError, match="^--model=.* that can be loaded") as refusal:
        chat.load_tokenizer(str(tmp_path))

    assert "\n" not in str(refusal.value)


def test_a_tokenizer_without_its_settings_is_refused_for_its_bos_would_be_lost(tmp_path):
    build_model(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    (tmp_path / "tokenizer_config.json").unlink()

    with pytest.raises(InputError, match="--model=.*: it has no tokenizer_config.json"):
        chat.load_tokenizer(str(tmp_path))

    # a broken tokenizer raises errors of other kinds
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="^--model=.* that can be loaded"):
        chat.load_tokenizer(str(tmp_path))


def test_of_named_templates_the_default_is_taken(tmp_path):
    build_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": PLAIN}, {"name": "rag", "template": "other"}]
    change_json(tmp_path / "tokenizer_config.json", chat_template=named)
    tokenizer, _ = chat.load_tokenizer(str(tmp_path))

    text = tokenizer.decode(chat.render(tokenizer, QUESTION, "here"))
    assert text == "<s><|user|>is it?<|end|><|assistant|>"

    # none of them is
    named[0]["name"] = "chat"
    change_json(tmp_path / "tokenizer_config.json", chat_template=named)
    with pytest.raises(InputError, match=r"chat templates \(chat, rag\) is named default; name"):
        chat.load_tokenizer(str(tmp_path))


def test_an_adapter_is_to_be_merged_first(tmp_path):
    build_tokenizer(PLAIN, "<|pad|>").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')

    with pytest.raises(InputError, match="--model=.*an adapter and no model; first merge it"):
        chat.load_tokenizer(str(tmp_path))


def test_the_vocabulary_is_the_models_and_not_the_tokenizers(tmp_path):
    build_model(tmp_path, vocab_size=300)
    tokenizer, _ = chat.load_tokenizer(str(tmp_path))

    assert len(tokenizer) < 300
    assert chat.vocabulary_size(str(tmp_path), tokenizer) == 300
    change_json(tmp_path / "config.json", vocab_size=200)
    assert chat.vocabulary_size(str(tmp_path), tokenizer) == 200

    # the text model's, of a model that also sees
    config = {"model_type": "gemma3", "text_config": {"vocab_size": 320}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert chat.vocabulary_size(str(tmp_path), tokenizer) == 320

    # Gemma 3's own files leave it to the architecture
    config["text_config"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert chat.vocabulary_size(str(tmp_path), tokenizer) == 262208
