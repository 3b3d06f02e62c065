"""Messages to token ids by the model's own template.

Tokens in, tokens out: a prompt is rendered once, to ids; the engine returns ids; training sees
exactly those, with the end token if and only if the model produced it.
"""

import contextlib
import datetime
import hashlib
import json
import re

from nanoaipo.errors import InputError, reason_of
from nanoaipo.messages import RENDERERS_OWN, found_field
from nanoaipo.model_folders import check_has_model
from nanoaipo.thoughts import closes_thought, marks_of, opens_thought, split_thought


def load_tokenizer(model, setting="model"):
    """(tokenizer, ids that end a turn) of a chat model.

    Raises InputError, which names the setting, if it cannot be loaded, has no chat template or no
    end token.
    """
    from transformers import AutoTokenizer

    check_has_model(model, setting)
    try:
        # not mistral_common's, which comes with vllm and has no template
        tokenizer = AutoTokenizer.from_pretrained(model, mistral_format=False)
    except (OSError, ValueError) as e:
        raise InputError(
            f"--{setting}={model}: no model folder and no hub model that can be loaded "
            f"({reason_of(e)})"
        ) from e
    if not tokenizer.chat_template:
        raise InputError(
            f"--{setting}={model}: its tokenizer has no chat template; "
            "take the instruction-tuned model"
        )

    eos_ids = configured_eos_ids(model)
    if tokenizer.eos_token_id is not None:
        eos_ids.add(tokenizer.eos_token_id)
    if not eos_ids:
        raise InputError(
            f"--{setting}={model}: no end token: its tokenizer, generation_config.json and "
            "config.json name none; set eos_token in tokenizer_config.json"
        )
    return tokenizer, eos_ids


def configured_eos_ids(model):
    """The end tokens that a model's generation config names, else its config, as a set.

    Gemma and Llama 3 end turns with a token of their own, which is not the tokenizer's.
    """
    from transformers import GenerationConfig

    named = None
    with contextlib.suppress(OSError):  # a model may have no such config
        named = GenerationConfig.from_pretrained(model).eos_token_id
    if named is None:
        named = config_value(model, "eos_token_id")
    if named is None:
        return set()
    if isinstance(named, list):
        return set(named)
    return {named}


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
    """Ids from 0 up to this are the model's: its tokenizer may have gaps, or be the smaller one."""
    highest = max(tokenizer.added_tokens_decoder, default=-1)
    return max(len(tokenizer), highest + 1, config_value(model, "vocab_size") or 0)


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
    arguments = {}
    if template_kwargs:
        try:
            arguments = json.loads(template_kwargs)
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


def written_by_template(tokenizer, messages, where, arguments, opens=False):
    """The text of a conversation; raises InputError, which names `where`, if it is refused."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=opens, tokenize=False, **(arguments or {})
        )
    except (TemplateError, TypeError, ValueError) as e:  # the latter two: of odd arguments
        raise InputError(
            f"{where}: this model's chat template refuses the prompt: {reason_of(e)}"
        ) from e


def render(tokenizer, messages, where, control=None, opens=True, arguments=None):
    """Ids of a conversation, with the assistant's turn opened at its end if `opens`.

    arguments: of the template, from template_arguments and the row's own columns.

    The template writes the BOS, and none is added. Text of a message that spells a control token
    becomes that token, so callers drop such prompts, or pass the pattern `control`: then it stays
    text. Raises InputError, which names `where`, if the template refuses the messages (Gemma-2: a
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


def shield(message, control, name, marks=()):
    """A message with stand-ins for what spells a control token, `marks` of a thought aside."""

    def stand_in(match):
        if any(match[0] in mark for mark in marks):
            return match[0]
        return f"{name}{match[0].encode().hex()}."

    return message | {"content": control.sub(stand_in, message["content"])}


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


# ----------------------------------------------------------------------- responses given as text


class RewrittenError(InputError):
    """A chat template would not write a response as it was given."""


def render_response(
    tokenizer,
    eos_ids,
    control,
    prompt,
    prompt_ids,
    response,
    arguments=None,
    where="a response given as text",
):
    """Ids of a response that came as text: what the template writes behind the prompt.

    It ends as the template ends a turn; an end token is added only where the template has none.
    Raises RewrittenError where the template would not write the response so: it rewrites the
    answer, it opens a thought and the response has none, it closes one and the response thinks
    again, or the response is a thought that does not end. Raises InputError if it refuses the
    conversation. Both name `where`.
    """
    name = unused_name(prompt + response)
    marks = marks_of(response[0]["content"]) or ()
    prompt = [shield(message, control, name) for message in prompt]
    reply = shield(response[0], control, name, marks)
    before = written_by_template(tokenizer, prompt, where, arguments, opens=True)
    if marks and closes_thought(before):
        raise RewrittenError(
            f"{where}: the response thinks, and the template tells the model not to "
            "(--template_kwargs)"
        )

    # a template that drops thoughts, or rewrites earlier turns, still shows how it frames a turn
    text = written_by_template(tokenizer, [*prompt, reply], where, arguments)
    _, answer = split_thought(reply["content"])
    if answer.strip() not in text:
        raise RewrittenError(f"{where}: this model's chat template rewrites the response")
    opened = opens_thought(before)
    written = text.removeprefix(before)
    if not text.startswith(before) or not holds(written, reply, opened):
        written = framed(tokenizer, prompt, reply, name, where, arguments)
    if written is None or not holds(written, reply, opened):
        raise RewrittenError(
            f"{where}: this model's chat template leaves no place for the response "
            "(a thought without an end, or none where the template opens one)"
        )

    # read behind the prompt, unless that changes the prompt's own tokens
    ids = shielded_ids(tokenizer, before + written, name)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:
        ids = shielded_ids(tokenizer, written, name)

    ends_turn = re.search(rf"(?:{control.pattern})\s*$", written)
    if not ends_turn and not eos_ids & set(ids):
        ids = ids + [end_token(tokenizer, eos_ids)]
    return ids


def holds(written, reply, opened):
    """Whether what stands behind a prompt is a reply's thought, if it has one, and its answer.

    opened: whether the prompt ends inside a thought.
    """
    thought, answer = split_thought(reply["content"])
    written_thought, written_answer = split_thought(written, opened)
    same_thought = (written_thought or "") == (thought or "")  # an empty one is none
    return same_thought and answer.strip() in written_answer


def framed(tokenizer, prompt, reply, name, where, arguments):
    """A reply in what the template writes before and behind any, or None where it cannot tell."""
    # stand-ins show where the last message and the reply end up
    last = prompt[-1] | {"content": prompt[-1]["content"] + name + "p"}
    any_reply = reply | {"content": name + "r"}
    conversation = [*prompt[:-1], last]
    opened = written_by_template(tokenizer, conversation, where, arguments, opens=True)
    text = written_by_template(tokenizer, [*conversation, any_reply], where, arguments)
    _, _, opening = opened.rpartition(name + "p")
    _, _, turn = text.rpartition(name + "p")
    head, is_there, ending = turn.partition(name + "r")
    if not is_there:
        return None

    # what the generation prompt has written already is not written again
    if head.startswith(opening):
        return head.removeprefix(opening) + reply["content"] + ending
    if not opening.startswith(head) or not opens_thought(opening):
        return None
    content = reply["content"]
    mark = opening.removeprefix(head)  # such as <think> and a line break
    if content.lstrip().startswith(mark.strip()):
        content = content.lstrip().removeprefix(mark.strip())
        content = content.removeprefix(mark[len(mark.rstrip()) :])
    return content + ending


def end_token(tokenizer, eos_ids):
    """The id of the end token: the tokenizer's, or the first that the model's configs name."""
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    return min(eos_ids)
