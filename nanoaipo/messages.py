r"""Values of people's files, brought to messages: lists of {"role": ..., "content": ...}.

value                     for example                               becomes
a text                    "Two?"                                    one message of the user
Anthropic HH's text       "\n\nHuman: Two?\n\nAssistant: 2"         one message for each speaker
a message                 {"role": "user", "content": "Two?"}       a list of it
a list of messages        [{"role": "user", "content": "Two?"}]     itself
ShareGPT's messages       [{"from": "human", "value": "Two?"}]      of role and content
content in parts          [{"type": "text", "text": "Two?"}]        one text
keys that are null        {"role": "user", "tool_calls": null}      no keys

Anything else, an image for example, makes its row unusable. Which columns of a row hold such
values: nanoaipo/rows.py.
"""

import collections
import re

from nanoaipo.errors import InputError
from nanoaipo.files import SURROGATE, holds_surrogate, load_json
from nanoaipo.processes import print0

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
ROLES = (  # that templates know
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
    "environment",
)
TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's types of a part that is text

# arguments that apply_chat_template takes for itself, and that we set
RENDERERS_OWN = (
    "conversation",
    "messages",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
)

# ----------------------------------------------------------------------------------- unusable rows


class UnusableRow(InputError):
    """A row that gives no prompt or no pair; `reason` is the word under which it is counted."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class Dropped:
    """Rows that cannot be used: their number by reason, and what is wrong with the first of each.

    As a text "3 rows dropped: 2 no_prompt (pairs.jsonl:7: ...), 1 identical (pairs.jsonl:9: ...)".
    """

    def __init__(self):
        self.counts = collections.Counter()
        self.first = {}  # reason -> message

    def add(self, reason, message):
        """Count one more row; the message begins with its place."""
        self.counts[reason] += 1
        self.first.setdefault(reason, str(message))

    def reasons(self):
        """The numbers and the first row of each reason, as a text."""
        return ", ".join(
            f"{n} {reason} ({self.first[reason]})" for reason, n in self.counts.items()
        )

    def check_left(self, path, rows, what="prompt"):
        """Raise InputError, which names the reasons, where no row of a file is left."""
        if not rows:
            raise InputError(f"{path}: no {what} is left ({self.reasons() or 'no rows'})")

    def print(self, path):
        """Print what was dropped of a file, if anything was; the first process does."""
        if self.counts:
            print0(f"{path}: {self}")

    def __str__(self):
        n = self.counts.total()
        rows = "1 row" if n == 1 else f"{n} rows"
        return f"{rows} dropped: {self.reasons()}"


# ---------------------------------------------------------------------------------------- messages


def as_messages(value, name, role="user"):
    """A list of chat messages from a text, from one message or from a list of them.

    name: what the value is called, such as "pairs.jsonl:7: 'prompt'". role: whose a text is. Keys
    that are null are no keys; others stay, because templates read them (tool_calls, name,
    reasoning_content). Raises UnusableRow for what is none of these, or holds more than text.
    """
    if isinstance(value, str):
        check_not_messages_as_text(value, name)
        return hh_messages(value) or [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise no_messages(name)
    return [as_message(message, f"{name}: message {n}", name) for n, message in enumerate(value, 1)]


def check_not_messages_as_text(text, name):
    """Raise UnusableRow for a list of messages that a table has turned into a text."""
    # "[{'role': 'user', 'content': 'Two?'}]", or the same as JSON
    begins = re.match(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:", text)
    if begins and re.search(r"['\"]role['\"]", text):
        raise UnusableRow(
            "no_messages", f"{name} is messages written as a text; give the list of messages itself"
        )


def no_messages(name):
    """The error of a value that is neither a text nor messages."""
    message = f"{name} has to be a text or a list of messages with role and content"
    return UnusableRow("no_messages", message)


def as_message(value, name, list_name):
    """One message of a list: null keys dropped, OpenAI's names of keys, its content one text."""
    if not isinstance(value, dict):
        raise no_messages(list_name)
    message = without_nulls(value)

    # ShareGPT's names
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
        message["content"] = message.pop("value", None)

    # a role that templates know
    role = message.get("role")
    if not isinstance(role, str):
        raise no_messages(list_name)
    role = SHAREGPT_ROLES.get(role, role)
    if role not in ROLES:  # most would write it as it is
        raise UnusableRow(
            "unknown_role", f"{name} is of the role '{role}', which is none of {', '.join(ROLES)}"
        )
    message["role"] = role

    # one text
    content = message.get("content")
    if isinstance(content, list):
        content = join_parts(content, name)
    # a call of tools stands beside no content
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if content is None:
        raise UnusableRow("no_content", f"{name} ({role}) has no content")
    if not isinstance(content, str):
        raise no_messages(list_name)
    message["content"] = content
    return message


def without_nulls(value):
    """A value without the keys that are null, also inside: tables fill in what a row lacks."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def texts_in(value):
    """Yield every text in a value: in its lists and objects, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)


def join_parts(parts, name):
    """The text of a content in parts; raises UnusableRow, which names the kind, for other parts."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = "part of no type"
        text = None
        if isinstance(part, dict):
            kind = part.get("type", kind)
            text = part.get("text", part.get("value"))  # LLaMA-Factory calls it value
        if kind in TEXT_PARTS and isinstance(text, str):
            texts.append(text)
            continue

        # what it is instead: an image_url is an image
        if kind in TEXT_PARTS:
            kind = "part without its text"
        kind = str(kind).removesuffix("_url")
        article = "an" if kind[:1] in "aeiou" else "a"
        raise UnusableRow("not_text", f"{name} holds {article} {kind}, and only text is read")
    if not texts:
        raise UnusableRow("no_content", f"{name} has no content")
    return "".join(texts)


def hh_messages(text):
    """The messages of a conversation as Anthropic's HH writes it, or None for any other text.

    It begins with "\\n\\nHuman:", and a prompt ends with "\\n\\nAssistant:".
    """
    if not text.lstrip(" ").startswith("\n\nHuman:"):
        return None
    roles = {"Human": "user", "Assistant": "assistant"}

    # "\n\nHuman: Two?\n\nAssistant:" is split into "", "Human", " Two?", "Assistant", ""
    _, *pieces = re.split(r"\n\n(Human|Assistant):", text)
    messages = []
    for speaker, content in zip(pieces[::2], pieces[1::2]):
        messages.append({"role": roles[speaker], "content": content.strip()})
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


# ----------------------------------------------------------------------------------------- columns


def found_field(row, fields):
    """The first of these columns that a row has, or None; a null is none."""
    for field in fields:
        if row.get(field) is not None:
            return field
    return None


def column_names(row):
    """The names of a row's columns, as a text for messages."""
    return ", ".join(str(key) for key, value in row.items() if value is not None) or "none"


def template_columns(where, row):
    """What a row hands to the chat template: its tools, and its chat_template_kwargs.

    Either may be a text of JSON. Raises UnusableRow for what is no list of tools, no object of
    arguments, and for arguments that are not the template's.
    """
    tools = row.get("tools")
    if not tools and isinstance(row.get("input"), dict):  # OpenAI's layout
        tools = row["input"].get("tools")
    tools = from_json(tools, f"{where}: 'tools'")
    if tools and not isinstance(tools, list):
        raise UnusableRow("no_json", f"{where}: 'tools' has to be a list")
    if tools:
        tools = [from_json(tool, f"{where}: one of 'tools'") for tool in tools]

    name = f"{where}: 'chat_template_kwargs'"
    arguments = from_json(row.get("chat_template_kwargs"), name) or {}
    if not isinstance(arguments, dict):
        raise UnusableRow("no_json", f"{name} has to be an object")
    taken = found_field(arguments, RENDERERS_OWN)
    if taken:
        raise UnusableRow("no_json", f"{name} holds '{taken}', which is not the template's")
    if tools:
        arguments["tools"] = tools
    return arguments


def from_json(value, name):
    """A value without nulls; a text is read as JSON, and UnusableRow raised if it is none."""
    if isinstance(value, str) and value.strip():
        try:
            value = load_json(value.encode())
        except ValueError as e:
            raise UnusableRow("no_json", f"{name} is a text, and not one of JSON: {e}") from e
        if holds_surrogate(value):
            raise UnusableRow("no_json", f"{name} {SURROGATE}")
    return without_nulls(value)
