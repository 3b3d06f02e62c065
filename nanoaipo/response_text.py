r"""Responses given as text, to ids: what the model's template writes behind the prompt.

The steps of render_response, with Qwen3's template, the question "Two?" and the response
"<think>1 + 1</think>2":

1. before    the prompt, with the assistant's turn opened
                 <|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n
2. parts     what the response thinks, and what it answers
                 "1 + 1" and "2"
3. replies   the response as a message, in two ways: templates look for a thought under a key of
             its own, or in the content
                 {"content": "2", "reasoning_content": "1 + 1"}
                 {"content": "<think>1 + 1</think>2"}
4. written   the template writes the prompt and a reply; what stands behind `before` is the
             response, if it holds the thought and the answer
                 <think>\n1 + 1\n</think>\n\n2<|im_end|>\n
5. framed    else the response stands in for another reply, in the turn that the template writes
             around that. DeepSeek-R1's needs it: it opens a thought for the model to go on, and
             leaves thoughts out of the turns it writes
6. ids       those of `before` and `written`, without the prompt's; an end token is added where
             the template writes none

Where a response has no thought, Qwen3's template writes an empty one, and its ids are trained too.
"""

import dataclasses
import os
import re

from nanoaipo.chat import shield, shielded_ids, unused_name, with_stand_ins, written_by_template
from nanoaipo.messages import UnusableRow, found_field
from nanoaipo.thoughts import (
    begins_thought,
    closes_thought,
    marks_at_end,
    marks_of,
    opens_thought,
    split_thought,
    with_thought,
)

# keys of a message under which people and templates have a thought
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclasses.dataclass
class Template:
    """A model's chat template, with what one row hands to it."""

    tokenizer: object
    control: re.Pattern  # of chat.control_pattern
    arguments: dict  # of chat.row_arguments
    where: str  # the place that errors name

    def write(self, messages, opens=False):
        """The text of a conversation, with the assistant's turn opened at its end if `opens`."""
        return written_by_template(self.tokenizer, messages, self.where, self.arguments, opens)


@dataclasses.dataclass
class Parts:
    """What a response consists of."""

    thought: str | None  # None: it does not think
    answer: str
    content: str  # the thought between its marks, and the answer


def render_response(template, eos_ids, prompt, prompt_ids, response):
    """Ids of a response that came as text: what the template writes behind the prompt.

    prompt, response: messages. prompt_ids: of the same template. A thought stands between marks in
    the content of the response, or under one of THOUGHT_KEYS. The ids end as the template ends a
    turn; an end token is added only where the template has none.

    Raises UnusableRow where the template would not write the response so: it rewrites the answer
    (reason rewritten), it opens a thought and the response has none (no_thought), it closes one and
    the response thinks again (unwanted_thought), or the response is a thought without an answer
    (no_answer), or it refuses the conversation (refused_by_template).
    """
    # 1. the prompt; text that spells control tokens goes as a stand-in, see chat.py
    name = unused_name(prompt + response)
    prompt = [shield(message, template.control, name) for message in prompt]
    before = template.write(prompt, opens=True)

    # 2. thought and answer
    parts = parts_of(response[0], before)
    check_parts(template.where, parts, before)
    parts = shield_parts(parts, template.control, name)

    # 3. the response as a message
    without_thought = {key: v for key, v in response[0].items() if key not in THOUGHT_KEYS}
    without_thought = shield(without_thought, template.control, name)  # its calls of tools
    in_content = without_thought | {"content": parts.content}
    replies = [in_content]
    if parts.thought is not None:
        by_key = dict.fromkeys(THOUGHT_KEYS, parts.thought)
        replies.append(without_thought | by_key | {"content": parts.answer})
    if parts.thought:  # gpt-oss refuses a thought in the content
        replies.reverse()

    # 4. what the template writes behind the prompt
    written = written_behind(template, prompt, before, replies, parts)

    # 5. or how it frames another reply
    if written is None:
        written = framed(template, prompt, in_content, name)
    if written is None or not holds(written, parts, opens_thought(before)):
        raise no_place(template.where, before, parts.thought)

    # 6. read behind the prompt, unless that changes the prompt's own tokens
    ids = shielded_ids(template.tokenizer, before + written, name)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:
        ids = shielded_ids(template.tokenizer, written, name)

    # the turn's end, unless the template or the response has one
    ends_turn = re.search(rf"(?:{template.control.pattern})\s*$", written)
    if not ends_turn and not eos_ids & set(ids):
        ids = ids + [end_token(template.tokenizer, eos_ids)]
    return ids


# -------------------------------------------------------------------------- 2. thought and answer


def parts_of(message, before):
    """The parts of a response given as a message.

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
        return Parts(None, answer, answer)
    if thought is None:
        return Parts(None, answer, content)

    marks = marks_of(content)
    opened = marks_at_end(before)
    if opened and opened != marks:
        content = with_thought(thought, answer, opened)
    if not opened and not begins_thought(content):  # of a model whose template opens the thought
        content = with_thought(thought, answer, marks)
    return Parts(thought, answer, content)


def check_parts(where, parts, before):
    """Raise UnusableRow for a response that no template can write behind this prompt."""
    if parts.thought is not None and not parts.answer.strip():
        raise UnusableRow("no_answer", f"{where}: the response is a thought without an answer")
    if parts.thought and closes_thought(before):
        raise UnusableRow(
            "unwanted_thought",
            f"{where}: the response thinks, and the template tells the model not to "
            "(--template_kwargs)",
        )


def shield_parts(parts, control, name):
    """Parts with stand-ins for what spells a control token, the marks of the thought aside."""
    marks = marks_of(parts.content) or ()
    thought = parts.thought
    if thought is not None:
        thought = with_stand_ins(thought, control, name)
    answer = with_stand_ins(parts.answer, control, name)
    return Parts(thought, answer, with_stand_ins(parts.content, control, name, marks))


# -------------------------------------------------------------------- 4. what the template writes


def written_behind(template, prompt, before, replies, parts):
    """What the template writes behind a rendered prompt for the first of the replies that fits.

    None where none does: a template that drops thoughts, or that writes a turn otherwise when it is
    not the last. Raises UnusableRow if the answer is in none of what it writes.
    """
    texts = []
    for reply in replies:
        text = template.write([*prompt, reply])
        texts.append(text)
        written = text.removeprefix(before)
        if text.startswith(before) and holds(written, parts, opens_thought(before)):
            return written

    if not any(parts.answer.strip() in text for text in texts):
        raise UnusableRow(
            "rewritten", f"{template.where}: this model's chat template rewrites the response"
        )
    return None


def holds(written, parts, opened):
    """Whether what stands behind a prompt is a thought, if there is one, and its answer.

    opened: whether the prompt ends inside a thought.
    """
    thought, answer = split_thought(written, opened)
    if begins_thought(answer) or (opened and begins_thought(written)):
        return False  # a second thought
    same_thought = (thought or "") == (parts.thought or "")  # an empty one is none
    return same_thought and parts.answer.strip() in answer


# ------------------------------------------------------------------------- 5. the frame of a turn

# With DeepSeek-R1's template and the reply "<think>1 + 1</think>2":
#
#   opening   <｜Assistant｜><think>\n              what follows the prompt for the model to go on
#   head      <｜Assistant｜>                       what stands before any reply
#   ending    <｜end▁of▁sentence｜>                 what stands behind it
#   framed    1 + 1</think>2<｜end▁of▁sentence｜>   what the ids are read from


def framed(template, prompt, reply, name):
    """A reply in what the template writes before and behind any, or None where it cannot tell."""
    frame = frame_of(template, prompt, reply, name)
    if frame is None:
        return None
    opening, head, ending = frame
    head = head_behind(opening, head)
    if head is None:
        return None

    # a thought of the reply stands in for an empty one of every turn
    content = reply["content"]
    if begins_thought(content) and closes_thought(head):
        head, _, _ = head.rpartition(marks_at_end(head)[0])

    if opens_thought(opening):
        content = without_opened_mark(content, opening)
    return head + content + ending


def frame_of(template, prompt, reply, name):
    """(Opening, head, ending) of a turn, or None where the reply is not in what is written."""
    # stand-ins show where the last message and the reply end up
    last = prompt[-1] | {"content": prompt[-1]["content"] + name + "p"}
    any_reply = reply | {"content": name + "r"}
    conversation = [*prompt[:-1], last]
    opened = template.write(conversation, opens=True)
    text = template.write([*conversation, any_reply])

    _, _, opening = opened.rpartition(name + "p")
    _, _, turn = text.rpartition(name + "p")
    head, is_there, ending = turn.partition(name + "r")
    if not is_there:
        return None
    return opening, head, ending


def head_behind(opening, head):
    """What the head of a turn has beyond the opening, or None where the two go apart."""
    if head.startswith(opening):
        return head.removeprefix(opening)

    # the opening may have a thought that a turn has not, or that a turn closes at once
    marks = marks_at_end(opening)
    if marks is None:
        return None
    header, _, _ = opening.rpartition(marks[0])
    if head.startswith(header) and head.removeprefix(header).strip() in ("", marks[1]):
        return ""
    return None


def without_opened_mark(content, opening):
    """A content without the mark, and the space behind it, that the opening has written already."""
    begins, _ = marks_at_end(opening)
    if not content.lstrip().startswith(begins):
        return content
    content = content.lstrip().removeprefix(begins)
    space = opening[len(opening.rstrip()) :]
    return content[len(os.path.commonprefix([space, content])) :]


def no_place(where, before, thought):
    """The error of a response that the template writes nowhere behind a rendered prompt."""
    if opens_thought(before) and thought is None:
        begins, ends = marks_at_end(before)
        return UnusableRow(
            "no_thought",
            f"{where}: this model's chat template opens a thought, and the response has none: "
            f"begin it with one (an empty one is {begins}\\n\\n{ends}\\n\\n), or let "
            "--template_kwargs turn thinking off",
        )
    return UnusableRow(
        "rewritten",
        f"{where}: this model's chat template leaves no place for the response's thought",
    )


# ------------------------------------------------------------------------------- 6. the end token


def end_token(tokenizer, eos_ids):
    """The id of the end token: the tokenizer's, or the first that the model's configs name."""
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    return min(eos_ids)
