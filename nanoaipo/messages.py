"""Messages, prompts and pairs in the layouts that people's files have, brought to one form.

prompt      a text; messages; a question, an instruction with its input, a benchmark's turns;
            with a system or history column or without; missing where chosen and rejected are
            conversations
chosen,     a text (Anthropic HH's "\\n\\nHuman: ...\\n\\nAssistant: ..." too), a message, a
rejected    conversation; OpenAI calls them preferred_output and non_preferred_output; in ms-swift's
            files the chosen one ends the column messages
messages    OpenAI's role and content, ShareGPT's from and value; contents in parts of text
tools,      what TRL hands to the chat template
chat_template_kwargs
"""

import collections
import json
import re

from nanoaipo.errors import InputError

PROMPT_FIELDS = (  # the first one there is
    "prompt",
    "messages",
    "conversations",
    "instruction",
    "turns",
    "question",
    "query",
    "input",
    "chosen",
    "chosen_messages",
)
CHOSEN_FIELDS = (
    "chosen",
    "preferred_output",
    "chosen_response",
    "chosen_messages",
    "response_j",  # of StackExchange's pairs, where j is the better one
    "output",
    "response",
)
REJECTED_FIELDS = (
    "rejected",
    "non_preferred_output",
    "rejected_response",
    "rejected_messages",
    "response_k",
)
SYSTEM_FIELDS = ("system", "system_prompt")
MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")

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
TEXT_PARTS = ("text", "input_text", "output_text")

# a text that a chat template has written already begins so, or begins and ends so
TEMPLATE_OPENS = re.compile(
    r"\s*(<\|im_start\|>|<\|begin_of_text\|>|<\|start_header_id\|>|<start_of_turn>|<bos>"
    r"|<s>\s*\[INST\]|\[INST\]|<\|(?:system|user|assistant)\|>|<｜(?:begin|User|Assistant))"
)
WORDS_OPEN = re.compile(
    r"\s*(?:Human|User|USER):.*(?:Assistant|ASSISTANT):\s*$"
    r"|.*### Instruction:.*### Response:\s*$",
    re.DOTALL,
)
END_MARKS = (  # what ends a turn in the templates of others
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "</s>",
)

RENDERERS_OWN = (  # arguments that apply_chat_template takes for itself, and that we set
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
    role = message.get("role")
    if not isinstance(role, str):
        raise no_messages(list_name)
    role = SHAREGPT_ROLES.get(role, role)
    if role not in ROLES:  # most templates would write it as it is
        raise UnusableRow(
            "unknown_role", f"{name} is of the role '{role}', which is none of {', '.join(ROLES)}"
        )
    message["role"] = role

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
    _, *pieces = re.split(r"\n\n(Human|Assistant):", text)  # speaker, text, speaker, text, ...
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


def columns_of(row):
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
            value = json.loads(value)
        except ValueError as e:
            raise UnusableRow("no_json", f"{name} is a text, and not one of JSON: {e}") from e
    return without_nulls(value)


def with_system(row, messages):
    """The messages behind the system message of a column of its own, unless they have one."""
    field = found_field(row, SYSTEM_FIELDS)
    if field is None or not isinstance(row[field], str) or not row[field].strip():
        return messages
    if messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": row[field]}] + messages


# ----------------------------------------------------------------------------------------- prompts


def prompt_messages(where, row, field=""):
    """The messages of the column that holds a row's prompt; empty takes the first there is.

    They may end with an answer where the column is a whole conversation. Raises UnusableRow.
    """
    field = field or found_field(row, PROMPT_FIELDS)
    if field is None:
        raise UnusableRow("no_prompt", f"{where}: {no_prompt(row)}")
    check_no_media(where, row)
    value = row.get(field)

    # each kind of column to a text or messages
    if isinstance(value, dict) and "messages" in value:  # OpenAI's input
        value = value["messages"]
    if field == "turns":
        texts = turn_texts(value)
        value = None
        if texts and all(isinstance(text, str) for text in texts):
            value = texts[0]
    if field == "instruction" and isinstance(value, str):
        value = with_input(row, value)

    messages = as_messages(value, f"{where}: '{field}'")
    if field in CHOSEN_FIELDS and len(messages) == 1 and isinstance(value, str):
        raise UnusableRow(
            "no_prompt",
            f"{where}: '{field}' has to be a conversation where no column holds the prompt",
        )
    if len(messages) == 1 and isinstance(value, str):
        check_not_rendered(where, field, value)
    if len(messages) == 1 and field not in CHOSEN_FIELDS:
        messages = history_messages(where, row) + messages

    # older files of LLaMA-Factory end with both answers
    if [message["role"] for message in messages[-2:]] == ["assistant", "assistant"]:
        raise UnusableRow(
            "prompt_ends_with_assistant",
            f"{where}: '{field}' ends with two messages of the assistant; of a pair, one belongs "
            "into 'chosen' and one into 'rejected'",
        )
    return messages


def check_no_media(where, row):
    """Raise UnusableRow for a row with images, videos or sounds beside its text."""
    field = next((field for field in MEDIA_FIELDS if row.get(field)), None)
    if field:
        raise UnusableRow("not_text", f"{where}: holds {field}, and only text is read")


def check_not_rendered(where, field, text):
    """Raise UnusableRow for a text that a chat template has written already, of any model."""
    opens = TEMPLATE_OPENS.match(text)
    mark = opens[1] if opens else "Human: ... Assistant:, ### Instruction: ... ### Response:"
    if opens or WORDS_OPEN.match(text):
        raise UnusableRow(
            "rendered",
            f"{where}: '{field}' is rendered with a chat template already ({mark}); give the "
            "messages or the bare text instead",
        )


def history_messages(where, row):
    """The turns before a prompt, from a column of [question, answer] pairs or of messages."""
    history = row.get("history")
    if not history:
        return []
    name = f"{where}: 'history'"
    if not isinstance(history, list):
        raise UnusableRow("no_messages", f"{name} has to be a list of [question, answer]")
    if isinstance(history[0], dict):
        return as_messages(history, name)

    messages = []
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UnusableRow("no_messages", f"{name} has to be a list of [question, answer]")
        question, answer = turn
        messages += as_messages(question, name) + as_messages(answer, name, "assistant")
    return messages


def no_prompt(row):
    """What is wrong with a row that has no prompt."""
    return (
        "'prompt' has to be a text or a list of messages with role and content; "
        f"the columns are {columns_of(row)}; wanted is one of {', '.join(PROMPT_FIELDS)}, "
        "or the one that --prompt_field names"
    )


def turn_texts(turns):
    """The turns of a question of MT-Bench or Arena-Hard: texts, or objects with a content."""
    if not isinstance(turns, list):
        turns = [turns]
    return [turn.get("content") if isinstance(turn, dict) else turn for turn in turns]


def with_input(row, instruction):
    """An instruction and, as rows of Alpaca and self-instruct may have one, its input below it."""
    extra = row.get("input")
    if not extra:
        instances = [i for i in row.get("instances") or () if isinstance(i, dict)]
        extra = next((i["input"] for i in instances if i.get("input")), None)
    if not extra:
        return instruction
    return f"{instruction}\n\n{extra}"


# ------------------------------------------------------------------------------------------- pairs


def pair_messages(where, row):
    """(prompt, chosen, rejected) of a row of any layout: messages, and one answer each, in lists.

    Where chosen and rejected are conversations, the prompt is what both begin with (as in TRL's
    extract_prompt), and a prompt column has to be part of it. Raises UnusableRow.
    """
    check_no_media(where, row)
    asked = None
    field = found_field(row, PROMPT_FIELDS)
    if field is not None and field not in CHOSEN_FIELDS:
        asked = prompt_messages(where, row, field)

    # without a column of its own, the chosen answer ends the conversation (ms-swift)
    rejected = side_messages(where, row, REJECTED_FIELDS)
    is_ended = asked is not None and len(asked) > 1 and asked[-1]["role"] == "assistant"
    if found_field(row, CHOSEN_FIELDS) is None and is_ended:
        chosen = asked
    else:
        chosen = side_messages(where, row, CHOSEN_FIELDS)
    check_no_labels(where, chosen, rejected, row)

    # both as conversations: an answer alone follows the prompt
    conversations = [side for side in (chosen, rejected) if len(side) > 1]
    if conversations:
        before = conversations[0][:-1]
    elif asked:
        before = asked
    else:
        raise UnusableRow("no_prompt", f"{where}: {no_pair(row, 'prompt')}")
    if len(chosen) == 1:
        chosen = before + chosen
    if len(rejected) == 1:
        rejected = before + rejected

    # what both begin with, and one answer behind it
    n = common_length(chosen[:-1], rejected[:-1])
    prompt = chosen[:n]
    for name, answer in (("chosen", chosen[n:]), ("rejected", rejected[n:])):
        if [message["role"] for message in answer] != ["assistant"]:
            raise UnusableRow(
                "not_one_answer",
                f"{where}: '{name}' has to be one message of the assistant, "
                "or the prompt and that message",
            )
        check_not_rendered(where, name, answer[0]["content"])

    # the prompt column may hold more in front (a system message), or its first question alone
    if asked and conversations:
        prompt = reconcile(where, asked, prompt)
    if not prompt:
        raise UnusableRow("no_prompt", f"{where}: chosen and rejected have no prompt in common")
    if prompt[-1]["role"] == "assistant":
        raise UnusableRow(
            "prompt_ends_with_assistant",
            f"{where}: the prompt ends with a message of the assistant, and no template opens "
            "another one behind it",
        )
    return with_system(row, prompt), without_end_marks(chosen[n:]), without_end_marks(rejected[n:])


def side_messages(where, row, fields):
    """The messages of chosen or rejected, an answer alone or a conversation."""
    field = found_field(row, fields)
    if field is None:
        raise UnusableRow(f"no_{fields[0]}", f"{where}: {no_pair(row, fields[0])}")
    return as_messages(row[field], f"{where}: '{field}'", "assistant")


def check_no_labels(where, chosen, rejected, row):
    """Raise UnusableRow where both answers are labels of other columns, such as A and B."""
    columns = []
    for side in (chosen, rejected):
        label = side[-1]["content"].strip().lower()
        columns.append(labelled_column(row, label))
    if None not in columns:
        raise UnusableRow(
            "no_chosen",
            f"{where}: chosen and rejected name the columns {' and '.join(columns)}; "
            "wanted are the answers themselves",
        )


def labelled_column(row, label):
    """The column of text that a label names by its whole name or its end (B: response_b)."""
    for column, value in row.items():
        if label and isinstance(value, str) and f"_{column}".lower().endswith(f"_{label}"):
            return column
    return None


def without_end_marks(messages, marks=END_MARKS):
    """Answers without the end tokens that some files write behind them; a template writes its own.

    An answer that strikes text out in HTML, <s>so</s>, keeps its end.
    """
    any_mark = "|".join(map(re.escape, marks))
    answers = []
    for message in messages:
        content = message["content"]
        if "<s>" not in content:
            content = re.sub(rf"(?:\s*(?:{any_mark}))+\s*$", "", content)
        answers.append(message | {"content": content})
    return answers


def no_pair(row, field):
    """What is wrong with a row that lacks a column of a pair."""
    return (
        f"field '{field}' is missing; the columns are {columns_of(row)}; wanted are prompt, "
        "chosen and rejected (texts or messages), chosen and rejected (conversations), "
        "messages that end with the chosen answer and rejected_response, "
        "or input, preferred_output and non_preferred_output"
    )


def common_length(first, second):
    """How many messages two conversations begin with in common."""
    n = 0
    for one, other in zip(first, second):
        if one != other:
            break
        n += 1
    return n


def reconcile(where, asked, prompt):
    """The whole prompt, from a prompt column and what both conversations begin with.

    The longer one, if the other is a part of it. Raises UnusableRow if they say different things.
    """
    texts = spoken(prompt)
    if spoken(asked)[-len(texts) :] == texts:
        return asked

    if asked[-1]["role"] == "assistant":  # a column `messages` may be the chosen conversation
        asked = asked[:-1]
    wanted = spoken(asked)
    for start in range(len(texts) - len(wanted) + 1):
        if texts[start : start + len(wanted)] == wanted:
            return prompt
    raise UnusableRow(
        "prompt_differs",
        f"{where}: the prompt is another one than that of the conversations in chosen and rejected",
    )


def spoken(messages):
    """Who says what, the white space around it aside."""
    return [(message["role"], message["content"].strip()) for message in messages]
