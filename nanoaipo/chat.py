"""Messages to token ids by the model's own template.

Tokens in, tokens out: a prompt is rendered once, to ids; the engine returns ids; training sees
exactly those, with the end token if and only if the model produced it.
"""

import datetime
import hashlib
import json
import re

from nanoaipo.errors import InputError, reason_of
from nanoaipo.files import load_json
from nanoaipo.messages import RENDERERS_OWN, UnusableRow, found_field, template_columns
from nanoaipo.model_folders import check_has_model, find_file, read_json


def load_tokenizer(model, setting="model"):
    """(tokenizer, ids that end a turn) of a chat model.

    Raises InputError, which names the setting, if it or its config.json cannot be loaded, if it has
    no chat template or no end token, or if an end token is none of the model's tokens.
    """
    from transformers import AutoTokenizer

    check_has_model(model, setting)
    try:
        # not mistral_common's, which comes with vllm and has no template
        tokenizer = AutoTokenizer.from_pretrained(
            model, mistral_format=False, trust_remote_code=False
        )
        n_tokens = vocabulary_size(model, tokenizer)
    except Exception as e:  # of a folder's files: OSError, ValueError, KeyError, and Exception
        raise InputError(
            f"--{setting}={model}: no model folder and no hub model that can be loaded "
            f"({reason_of(e)})"
        ) from e

    # without it the BOS that a template asks for would be left out, in silence
    if find_file(model, "tokenizer_config.json") is None:
        raise InputError(
            f"--{setting}={model}: it has no tokenizer_config.json, which names the special tokens "
            "of its chat template; fetch it again"
        )

    # one chat template
    if not tokenizer.chat_template:
        raise InputError(
            f"--{setting}={model}: its tokenizer has no chat template; "
            "take the instruction-tuned model"
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise InputError(
            f"--{setting}={model}: none of its tokenizer's chat templates ({names}) is named "
            "default; name one so in tokenizer_config.json"
        )

    # what ends a turn: the model's end tokens and the tokenizer's
    eos_ids = configured_eos_ids(model, n_tokens, setting)
    if tokenizer.eos_token_id is not None:
        check_eos_id(model, tokenizer.eos_token_id, n_tokens, "its tokenizer", setting)
        eos_ids.add(tokenizer.eos_token_id)
    if not eos_ids:
        raise InputError(
            f"--{setting}={model}: no end token: its tokenizer, generation_config.json and "
            "config.json name none; set eos_token in tokenizer_config.json"
        )
    return tokenizer, eos_ids


def configured_eos_ids(model, n_tokens, setting="model"):
    """The end tokens that a model's generation config names, else its config, as a set.

    Gemma and Llama 3 end turns with a token of their own, which is not the tokenizer's. Raises
    InputError for what is no id of the model, which has n_tokens tokens.
    """
    named = None
    source = "generation_config.json"
    path = find_file(model, source)
    if path is not None:  # a model may have no such config
        named = read_json(path).get("eos_token_id")
    if named is None:
        source = "config.json"
        named = config_value(model, "eos_token_id")
    if named is None:
        return set()

    ids = named if isinstance(named, list) else [named]
    for i in ids:
        check_eos_id(model, i, n_tokens, source, setting)
    return set(ids)


def check_eos_id(model, eos_id, n_tokens, source, setting="model"):
    """Raise InputError, which names the source, unless an end token is an id of the model."""
    is_whole = isinstance(eos_id, int) and not isinstance(eos_id, bool)
    if not is_whole or not 0 <= eos_id < n_tokens:
        raise InputError(
            f"--{setting}={model}: {source} names the eos_token_id {json.dumps(eos_id)}, but the "
            f"model's tokens (vocab_size in config.json) are the whole numbers 0 to {n_tokens - 1}"
        )


def config_value(model, key):
    """A value of a model's config.json or, where that wraps several models, of its text config."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(model)
    except (OSError, ValueError):  # who loads the model will tell
        return None
    if config.get(key) is None:
        config = config.get("text_config") or {}
    return config.get(key)


def vocabulary_size(model, tokenizer):
    """Ids from 0 up to this are the model's: its tokenizer may have gaps, be smaller or larger.

    Where config.json does not tell, it is that of the architecture, as when the model is loaded.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    size = getattr(config, "vocab_size", None)
    if size is None:
        size = max(tokenizer.get_vocab().values()) + 1
    return size


# ------------------------------------------------------------------------- text of control tokens


def control_pattern(tokenizer):
    """A pattern that finds the text of any control token."""
    tokens = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in tokens if token.special}
    longest_first = sorted(texts, key=len, reverse=True)  # of two with one beginning, the longer
    nothing = "(?!)"  # a tokenizer without such tokens
    return re.compile("|".join(map(re.escape, longest_first)) or nothing)


def token_ids(tokenizer, text):
    """Ids of a text as the tokenizer reads it, no special token added."""
    return tokenizer(text, add_special_tokens=False).input_ids


def encode(tokenizer, text, control):
    """Ids of plain text: what the pattern `control` finds stays text."""
    # cut behind its first character, so that no piece holds the whole text of a control token
    ids = []
    start = 0
    for match in control.finditer(text):
        cut = match.start() + 1
        ids += token_ids(tokenizer, text[start:cut])
        start = cut
    return ids + token_ids(tokenizer, text[start:])


# ------------------------------------------------------------------------------------- rendering


def template_arguments(template_kwargs, date):
    """What a run hands to every chat template, as keyword arguments.

    template_kwargs: a JSON object such as {"enable_thinking": false}, or empty. date: YYYY-MM-DD,
    what a template that asks for the day is told; empty: today. Raises InputError for other texts.
    """
    # the run's own, which must not be those that we set
    arguments = {}
    if template_kwargs:
        try:
            arguments = load_json(template_kwargs.encode())
        except ValueError as e:
            raise InputError(f"--template_kwargs={template_kwargs}: not JSON: {e}") from e
        if not isinstance(arguments, dict):
            raise InputError(f"--template_kwargs={template_kwargs}: has to be a JSON object")
        taken = found_field(arguments, RENDERERS_OWN)
        if taken:
            raise InputError(
                f"--template_kwargs={template_kwargs}: '{taken}' is not the template's"
            )

    # templates call strftime_now("%d %B %Y"); a variable of that name hides transformers' function
    if date:
        try:
            day = datetime.datetime.strptime(date, "%Y-%m-%d")
        except ValueError as e:
            raise InputError(f"--date={date}: has to be a day such as 2026-11-27") from e
        arguments["strftime_now"] = day.strftime
    return arguments


def row_arguments(tokenizer, where, row, arguments=None):
    """What the template of a row's prompt is handed: a run's arguments, then the row's own.

    Raises UnusableRow for columns that cannot be handed on, and for tools that the template would
    leave out in silence.
    """
    arguments = (arguments or {}) | template_columns(where, row)
    if arguments.get("tools"):
        check_writes_tools(tokenizer, where)
    return arguments


def check_writes_tools(tokenizer, where):
    """Raise UnusableRow if a template knows no tools."""
    if "tool" not in str(tokenizer.chat_template):
        raise UnusableRow("no_tools", f"{where}: this model's chat template writes no tools")


def written_by_template(tokenizer, messages, where, arguments, opens=False):
    """The text of a conversation; raises UnusableRow, which names `where`, if it is refused."""
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=opens, tokenize=False, **(arguments or {})
        )
    except Exception as e:  # a template is a program, and can fail in any way
        raise UnusableRow(
            "refused_by_template",
            f"{where}: this model's chat template refuses the prompt: {reason_of(e)}",
        ) from e


def render(tokenizer, messages, where, control=None, opens=True, arguments=None):
    """Ids of a conversation, with the assistant's turn opened at its end if `opens`.

    arguments: of the template, as template_arguments or row_arguments gives them.

    The template writes the BOS, and none is added. Text of a message that spells a control token
    becomes that token, so callers drop such prompts, or pass the pattern `control`: then it stays
    text. Raises UnusableRow, which names `where`, if the template refuses the messages (Gemma-2: a
    system one).
    """
    name = unused_name(messages)
    if control:
        messages = [shield(message, control, name) for message in messages]
    text = written_by_template(tokenizer, messages, where, arguments, opens)
    return shielded_ids(tokenizer, text, name)


# Text that spells a control token goes through the template as a stand-in: a name that no message
# holds, the text in hex, and a full stop.


def unused_name(messages):
    """A text that none of the messages holds."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]


def shield(value, control, name):
    """A message, or a value in one, with stand-ins for what spells a control token."""
    if isinstance(value, str):
        return with_stand_ins(value, control, name)
    if isinstance(value, list):
        return [shield(item, control, name) for item in value]
    if isinstance(value, dict):
        return {key: shield(item, control, name) for key, item in value.items()}
    return value


def with_stand_ins(text, control, name, marks=()):
    """A text with stand-ins for what spells a control token, `marks` of a thought aside."""

    def stand_in(match):
        if any(match[0] in mark for mark in marks):
            return match[0]
        return f"{name}{match[0].encode().hex()}."

    return control.sub(stand_in, text)


def shielded_ids(tokenizer, text, name):
    """Ids of what the template wrote, where stand-ins are plain text again."""

    # cut behind the first character, so that no piece holds the whole text of a control token
    def spell(match):
        spelled = bytes.fromhex(match[1]).decode()
        return spelled[0] + name + spelled[1:]

    ids = []
    for piece in re.sub(rf"{name}([0-9a-f]+)\.", spell, text).split(name):
        ids += token_ids(tokenizer, piece)
    return ids
