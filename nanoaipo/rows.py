r"""Rows of prompts and pairs in the layouts that people's files have, brought to messages.

layout              columns
TRL                 prompt, chosen, rejected: texts, messages or conversations
                    chosen, rejected: conversations, and the prompt is what both begin with
Anthropic HH        chosen, rejected: texts "\n\nHuman: ...\n\nAssistant: ..."
OpenAI              input {messages, tools}, preferred_output, non_preferred_output
Orca                system, question, chosen, rejected
StackExchange       question, response_j (the better one), response_k
Alpaca              instruction, input, output, rejected
self-instruct       instruction, instances [{input}]
ShareGPT            conversations, chosen, rejected
LLaMA-Factory       the columns of Alpaca or ShareGPT, with history
                    chosen_messages, rejected_messages: conversations
ms-swift            messages that end with the chosen answer, rejected_response (or _messages)
                    query, response, rejected_response, with history
MT-Bench            turns: texts or [{content}]; Arena-Hard's too

Each may have a system message in a column of its own. What a column's value may look like:
nanoaipo/messages.py.
"""

import re

from nanoaipo.messages import UnusableRow, as_messages, column_names, found_field

# of each group, the first column that a row has is read
PROMPT_FIELDS = (
    "prompt",
    "messages",
    "conversations",
    "instruction",
    "turns",
    "question",
    "query",
    "input",
    "chosen",  # a conversation begins with the prompt
    "chosen_messages",
)
CHOSEN_FIELDS = (
    "chosen",
    "preferred_output",
    "chosen_response",
    "chosen_messages",
    "response_j",
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

# a text that a chat template has written already begins with its first mark
TEMPLATE_OPENS = re.compile(
    r"""\s*(
      <\|im_start\|>                      # ChatML, Qwen: "<|im_start|>user\nTwo?<|im_end|>\n"
    | <\|begin_of_text\|>                 # Llama 3: "<|begin_of_text|><|start_header_id|>user"
    | <\|start_header_id\|>
    | <start_of_turn> | <bos>             # Gemma: "<bos><start_of_turn>user\nTwo?"
    | <s>\s*\[INST\] | \[INST\]           # Llama 2, Mistral: "<s>[INST] Two? [/INST]"
    | <\|(?:system|user|assistant)\|>     # Zephyr, Phi, OLMo: "<|user|>\nTwo?</s>\n"
    | <｜(?:begin|User|Assistant)         # DeepSeek: "<｜begin▁of▁sentence｜><｜User｜>Two?"
    )""",
    re.VERBOSE,
)
WORDS_OPEN = re.compile(r"\s*(?:Human|User|USER):")  # Vicuna: "USER: Two? ASSISTANT:"
# what ends a turn in the templates of others
END_MARKS = (
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

# ----------------------------------------------------------------------------------------- prompts


def prompt_messages(where, row, field=""):
    """The messages of the column that holds a row's prompt; empty takes the first there is.

    They may end with an answer where the column is a whole conversation. Raises UnusableRow.
    """
    # what the column holds
    field = field or found_field(row, PROMPT_FIELDS)
    if field is None:
        raise UnusableRow("no_prompt", f"{where}: {why_no_prompt(row)}")
    check_no_media(where, row)
    value = prompt_value(where, row, field)
    messages = as_messages(value, f"{where}: '{field}'")

    # one text: no answer, and not what a template has made of a prompt
    if len(messages) == 1 and isinstance(value, str):
        if field in CHOSEN_FIELDS:
            raise UnusableRow(
                "no_prompt",
                f"{where}: '{field}' has to be a conversation where no column holds the prompt",
            )
        check_not_rendered(where, field, value)

    # the turns before a single question
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


def why_no_prompt(row):
    """What is wrong with a row that has no prompt."""
    return (
        "'prompt' has to be a text or a list of messages with role and content; "
        f"the columns are {column_names(row)}; wanted is one of {', '.join(PROMPT_FIELDS)}, "
        "or the one that --prompt_field names"
    )


def check_no_media(where, row):
    """Raise UnusableRow for a row with images, videos or sounds beside its text."""
    field = next((field for field in MEDIA_FIELDS if row.get(field)), None)
    if field:
        raise UnusableRow("not_text", f"{where}: holds {field}, and only text is read")


def prompt_value(where, row, field):
    """What the column of a prompt holds, brought to a text or messages where it is neither."""
    value = row.get(field)
    if isinstance(value, dict) and "messages" in value:  # OpenAI's input
        value = value["messages"]
    if field == "turns":
        return first_turn(value)
    if field == "instruction" and isinstance(value, str):
        return with_input(where, row, value)
    return value


def first_turn(turns):
    """The first turn of a benchmark's question; None if one of them is no text."""
    texts = turn_texts(turns)
    if not texts or not all(isinstance(text, str) for text in texts):
        return None
    return texts[0]


def turn_texts(turns):
    """The turns of a question of MT-Bench or Arena-Hard: texts, or objects with a content."""
    if not isinstance(turns, list):
        turns = [turns]
    return [turn.get("content") if isinstance(turn, dict) else turn for turn in turns]


def with_input(where, row, instruction):
    """An instruction and, as rows of Alpaca and self-instruct may have one, its input below it."""
    extra = row.get("input")
    instances = row.get("instances")
    if not extra and isinstance(instances, list):
        inputs = [i["input"] for i in instances if isinstance(i, dict) and i.get("input")]
        extra = next(iter(inputs), None)
    if not extra:
        return instruction
    if isinstance(extra, (dict, list)):
        raise UnusableRow("no_prompt", f"{where}: 'input' has to be a text")
    return f"{instruction}\n\n{extra}"


def check_not_rendered(where, field, text):
    """Raise UnusableRow for a text that a chat template has written already, of any model."""
    opens = TEMPLATE_OPENS.match(text)
    ended = text.rstrip()
    if opens:
        mark = opens[1]
    # or, where the marks are words, begins and ends with them (Vicuna, Alpaca)
    elif WORDS_OPEN.match(text) and ended.endswith(("Assistant:", "ASSISTANT:")):
        mark = "Human: ... Assistant:"
    elif "### Instruction:" in ended and ended.endswith("### Response:"):
        mark = "### Instruction: ... ### Response:"
    else:
        return
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


def with_system(row, messages):
    """The messages behind the system message of a column of its own, unless they have one."""
    field = found_field(row, SYSTEM_FIELDS)
    if field is None or not isinstance(row[field], str) or not row[field].strip():
        return messages
    if messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": row[field]}] + messages


# ------------------------------------------------------------------------------------------- pairs


def pair_messages(where, row):
    """(prompt, chosen, rejected) of a row of any layout: messages, and one answer each, in lists.

    Where chosen and rejected are conversations, the prompt is what both begin with (as in TRL's
    extract_prompt), and a prompt column has to be part of it. Raises UnusableRow.
    """
    check_no_media(where, row)

    # the prompt, where a column of its own holds it
    asked = None
    field = found_field(row, PROMPT_FIELDS)
    if field is not None and field not in CHOSEN_FIELDS:
        asked = prompt_messages(where, row, field)

    # both as conversations: an answer alone follows the prompt
    chosen, rejected = both_sides(where, row, asked)
    conversations = [side for side in (chosen, rejected) if len(side) > 1]
    if conversations:
        before = conversations[0][:-1]
    elif asked:
        before = asked
    else:
        raise UnusableRow("no_prompt", f"{where}: {why_no_pair(row, 'prompt')}")
    if len(chosen) == 1:
        chosen = before + chosen
    if len(rejected) == 1:
        rejected = before + rejected

    # what both begin with, and one answer behind it
    n = common_length(chosen[:-1], rejected[:-1])
    prompt = chosen[:n]
    chosen = chosen[n:]
    rejected = rejected[n:]
    check_one_answer(where, "chosen", chosen)
    check_one_answer(where, "rejected", rejected)

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
    return with_system(row, prompt), without_end_marks(chosen), without_end_marks(rejected)


def why_no_pair(row, field):
    """What is wrong with a row that lacks a column of a pair."""
    return (
        f"field '{field}' is missing; the columns are {column_names(row)}; wanted are prompt, "
        "chosen and rejected (texts or messages), chosen and rejected (conversations), "
        "messages that end with the chosen answer and rejected_response, "
        "or input, preferred_output and non_preferred_output"
    )


def both_sides(where, row, asked):
    """(chosen, rejected): messages of an answer alone, or of a conversation that ends with it.

    asked: the messages of a prompt's own column, or None.
    """
    rejected = side_messages(where, row, REJECTED_FIELDS)

    # without a column of its own, the chosen answer ends the conversation (ms-swift)
    is_ended = asked is not None and len(asked) > 1 and asked[-1]["role"] == "assistant"
    if found_field(row, CHOSEN_FIELDS) is None and is_ended:
        chosen = asked
    else:
        chosen = side_messages(where, row, CHOSEN_FIELDS)
    check_no_labels(where, chosen, rejected, row)
    return chosen, rejected


def side_messages(where, row, fields):
    """The messages of chosen or rejected, an answer alone or a conversation."""
    field = found_field(row, fields)
    if field is None:
        raise UnusableRow(f"no_{fields[0]}", f"{where}: {why_no_pair(row, fields[0])}")
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
    if not label:
        return None
    for column, value in row.items():
        if isinstance(value, str) and f"_{column}".lower().endswith(f"_{label}"):
            return column
    return None


def common_length(first, second):
    """How many messages two conversations begin with in common."""
    n = 0
    for one, other in zip(first, second):
        if one != other:
            break
        n += 1
    return n


def check_one_answer(where, name, messages):
    """Raise UnusableRow unless what follows the prompt is one message of the assistant."""
    if [message["role"] for message in messages] != ["assistant"]:
        raise UnusableRow(
            "not_one_answer",
            f"{where}: '{name}' has to be one message of the assistant, "
            "or the prompt and that message",
        )
    check_not_rendered(where, name, messages[0]["content"])


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


def without_end_marks(messages, marks=END_MARKS):
    """Answers without the end tokens that some files write behind them; a template writes its own.

    An answer that strikes text out in HTML, <s>so</s>, keeps its end.
    """
    answers = []
    for message in messages:
        content = message["content"]
        if "<s>" not in content:
            content = without_marks_at_end(content, marks)
        answers.append(message | {"content": content})
    return answers


def without_marks_at_end(text, marks):
    """A text without the marks at its end, and the space around them: "2<|im_end|>\\n</s>" is 2.

    No regular expression, whose time would grow with the square of a long text.
    """
    end = length_without_space(text, len(text))
    kept = len(text)
    while True:
        found = [mark for mark in marks if text.endswith(mark, 0, end)]
        if not found:
            return text[:kept]
        end = length_without_space(text, end - max(map(len, found)))
        kept = end


def length_without_space(text, end):
    """Where the last character of text[:end] that is no white space ends."""
    while end > 0 and text[end - 1].isspace():
        end -= 1
    return end
