"""Messages to token ids by the model's own template.

Tokens in, tokens out: a prompt is rendered once, to ids; the engine returns ids; training sees
exactly those, with the end token if and only if the model produced it.
"""

import contextlib
import datetime
import hashlib
import json
import os
import re

from nanoaipo.errors import InputError, reason_of
from nanoaipo.messages import RENDERERS_OWN, found_field
from nanoaipo.model_folders import check_has_model
from nanoaipo.thoughts import (
    begins_thought,
    closes_thought,
    marks_at_end,
    marks_of,
    opens_thought,
    split_thought,
    with_thought,
)


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
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise InputError(
            f"--{setting}={model}: none of its tokenizer's chat templates ({names}) is named "
            "default; name one so in tokenizer_config.json"
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


def shield(message, control, name):
    """A message with stand-ins for what spells a control token."""
    return message | {"content": with_stand_ins(message["content"], control, name)}


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


# ----------------------------------------------------------------------- responses given as text


# keys of a message under which people and templates have a thought
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


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

    It ends as the template ends a turn; an end token is added only where the template has none. A
    thought stands between marks in the content, or in one of THOUGHT_KEYS.

    Raises RewrittenError where the template would not write the response so: it rewrites the
    answer, it opens a thought and the response has none, it closes one and the response thinks
    again, or the response is a thought without an answer. Raises InputError if it refuses the
    conversation. Both name `where`.
    """
    name = unused_name(prompt + response)
    prompt = [shield(message, control, name) for message in prompt]
    before = written_by_template(tokenizer, prompt, where, arguments, opens=True)
    thought, answer, content = parts_of(response[0], before)

    # what no template can write
    if thought is not None and not answer.strip():
        raise RewrittenError(f"{where}: the response is a thought without an answer")
    if thought and closes_thought(before):
        raise RewrittenError(
            f"{where}: the response thinks, and the template tells the model not to "
            "(--template_kwargs)"
        )

    # the thought in the content, and under its keys
    marks = marks_of(content) or ()
    reply = {key: value for key, value in response[0].items() if key not in THOUGHT_KEYS}
    reply["content"] = with_stand_ins(content, control, name, marks)
    answer = with_stand_ins(answer, control, name)
    replies = [reply]
    if thought is not None:
        thought = with_stand_ins(thought, control, name)
        by_key = reply | dict.fromkeys(THOUGHT_KEYS, thought) | {"content": answer}
        replies.append(by_key)
    if thought:  # gpt-oss refuses a thought in the content
        replies.reverse()

    written = written_behind(tokenizer, prompt, before, replies, thought, answer, where, arguments)
    if written is None:
        written = framed(tokenizer, prompt, reply, name, where, arguments)
    if written is None or not holds(written, thought, answer, opens_thought(before)):
        raise RewrittenError(f"{where}: {why_no_place(before, thought)}")

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


def parts_of(message, before):
    """(Thought or None, answer, content with both) of a response given as a message.

    before: the rendered prompt. Where it opens a thought, the content has the marks of that one;
    where it closes one, an empty thought of the response is none.
    """
    content = message["content"]
    thought, answer = split_thought(content)
    key = found_field(message, THOUGHT_KEYS)
    if thought is None and key is not None:
        thought = str(message[key]).strip()
        content = with_thought(thought, answer)

    if thought == "" and closes_thought(before):
        return None, answer, answer
    if thought is None:
        return None, answer, content

    marks = marks_of(content)
    opened = marks_at_end(before)
    if opened and opened != marks:
        content = with_thought(thought, answer, opened)
    if not opened and not begins_thought(content):  # of a model whose template opens the thought
        content = with_thought(thought, answer, marks)
    return thought, answer, content


def written_behind(tokenizer, prompt, before, replies, thought, answer, where, arguments):
    """What the template writes behind a rendered prompt for the first of the replies that fits.

    None where none does: a template that drops thoughts, or that writes a turn otherwise when it is
    not the last. Raises RewrittenError if the answer is in none of what it writes.
    """
    has_answer = False
    for reply in replies:
        text = written_by_template(tokenizer, [*prompt, reply], where, arguments)
        has_answer = has_answer or answer.strip() in text
        written = text.removeprefix(before)
        if text.startswith(before) and holds(written, thought, answer, opens_thought(before)):
            return written
    if not has_answer:
        raise RewrittenError(f"{where}: this model's chat template rewrites the response")
    return None


def holds(written, thought, answer, opened):
    """Whether what stands behind a prompt is a thought, if there is one, and its answer.

    opened: whether the prompt ends inside a thought.
    """
    written_thought, written_answer = split_thought(written, opened)
    if begins_thought(written_answer) or (opened and begins_thought(written)):
        return False  # a second thought
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
    _, _, opening = opened.rpartition(name + "p")  # <|assistant|>, perhaps with <think>
    _, _, turn = text.rpartition(name + "p")
    head, is_there, ending = turn.partition(name + "r")
    if not is_there:
        return None

    # the generation prompt may have a thought that a turn has not, or that a turn closes at once
    marks = marks_at_end(opening)
    if head.startswith(opening):
        head = head.removeprefix(opening)
    elif marks:
        header, _, _ = opening.rpartition(marks[0])
        if not head.startswith(header) or head.removeprefix(header).strip() not in ("", marks[1]):
            return None
        head = ""
    else:
        return None

    # a thought of the reply stands in for an empty one of every turn
    content = reply["content"]
    if begins_thought(content) and closes_thought(head):
        head, _, _ = head.rpartition(marks_at_end(head)[0])

    # what the generation prompt has written already is not written again
    if opens_thought(opening) and content.lstrip().startswith(marks[0]):
        content = content.lstrip().removeprefix(marks[0])
        space = opening[len(opening.rstrip()) :]
        content = content[len(os.path.commonprefix([space, content])) :]
    return head + content + ending


def why_no_place(before, thought):
    """Why a template cannot write a response behind a rendered prompt, and what to do."""
    if opens_thought(before) and thought is None:
        begins, ends = marks_at_end(before)
        return (
            "this model's chat template opens a thought, and the response has none: begin it with "
            f"one (an empty one is {begins}\\n\\n{ends}\\n\\n), or let --template_kwargs turn "
            "thinking off"
        )
    return "this model's chat template leaves no place for the response's thought"


def end_token(tokenizer, eos_ids):
    """The id of the end token: the tokenizer's, or the first that the model's configs name."""
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    return min(eos_ids)
