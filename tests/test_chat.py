"""Messages to token ids. What training makes of them: test_train.py."""

import pytest

from nanoaipo import chat
from nanoaipo.errors import InputError


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
