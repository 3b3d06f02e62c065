"""The columns that people's files of prompts and candidates have, to our records."""

import hashlib
import json

from nanoaipo.chat import as_messages
from nanoaipo.errors import InputError
from nanoaipo.files import read_records

PROMPT_FIELDS = ("prompt", "messages", "instruction", "turns", "chosen")  # the first one there is

# ---------------------------------------------------------------------------------------- prompts


def read_prompts(path, field=""):
    """Prompts as a list of records with `id` and `prompt` (messages), in file order.

    path: JSONL, a JSON array, or NAME:SPLIT or NAME:CONFIG:SPLIT of a Hugging Face data set. field:
    the column that holds the prompt; empty takes the first of prompt, messages, instruction (with
    its input), turns (the first of them), chosen (all but its last message). A prompt without id,
    question_id or uid gets one from its text. Raises InputError for a row without a prompt, an id
    that comes twice, and if there is no row.
    """
    prompts = []
    first_seen = {}  # id -> where
    for where, row in read_records(path):
        key = field or prompt_field(row)
        messages = prompt_messages(where, row, key)

        # an id of its own has to be unique; of rows with the same text each gets one
        prompt_id = row.get("id", row.get("question_id", row.get("uid")))
        has_id = prompt_id is not None  # 0 is an id too
        if has_id:
            prompt_id = str(prompt_id)
        else:
            prompt_id = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]
        if prompt_id in first_seen and has_id:
            raise InputError(
                f"{where}: id '{prompt_id}' is already that of {first_seen[prompt_id]}; "
                "ids join records and must differ"
            )
        if prompt_id in first_seen:
            prompt_id += f"-{len(prompts)}"

        first_seen[prompt_id] = where
        row["id"] = prompt_id
        row["prompt"] = messages
        prompts.append(row)

    if not prompts:
        raise InputError(f"{path}: no prompts in it")
    return prompts


def prompt_field(row):
    """The column of a row that holds its prompt."""
    for field in PROMPT_FIELDS:
        if row.get(field) is not None:
            return field
    return "prompt"


def prompt_messages(where, row, key):
    """The messages that a row asks, from its column `key`; `turns` is removed if it is another."""
    # each kind of column to a text or messages
    value = row.get(key)
    turns = row.pop("turns", None)  # whoever finds turns in a record asks them
    if key == "turns":
        row["turns"] = turn_texts(turns)
        value = None
        if row["turns"] and all(isinstance(text, str) for text in row["turns"]):
            value = row["turns"][0]
    if key == "instruction" and isinstance(value, str):
        value = with_input(row, value)
    if key == "chosen" and isinstance(value, str):  # a response alone, not a conversation
        value = None

    messages = as_messages(value)
    if not messages:
        raise InputError(
            f"{where}: '{key}' has to be a text or a list of messages with role and content; "
            "--prompt_field names the column"
        )

    # a whole conversation: ask for its last answer
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise InputError(f"{where}: '{key}' holds no prompt before the assistant's message")
    return messages


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


# ------------------------------------------------------------------------------------- candidates


def read_candidates(path):
    """Yield (where, record) of candidates, brought to the form in nanoaipo/files.py.

    Responses may come as bare texts. Pairs that others have ranked are candidates too: chosen and
    rejected become their two responses. Raises InputError for a row that is neither.
    """
    for n, (where, row) in enumerate(read_records(path, "prompt")):
        row["id"] = str(row.get("id", n))
        row["prompt"] = as_messages(row["prompt"])
        if not row["prompt"]:
            raise InputError(
                f"{where}: 'prompt' has to be a text or a list of messages with role and content"
            )

        # responses, as objects
        if "responses" not in row:
            row["responses"] = responses_of_pair(where, row)
        responses = row["responses"]
        if isinstance(responses, list):
            responses = [{"text": r} if isinstance(r, str) else r for r in responses]
        if not isinstance(responses, list) or not all(map(is_response, responses)):
            raise InputError(
                f"{where}: 'responses' has to be a list of texts, "
                "or of objects with a text (and ids, a list)"
            )
        row["responses"] = responses
        yield where, row


def responses_of_pair(where, row):
    """Chosen and rejected as two responses, with their ids where the pair has them.

    Both are taken out of the row: the next ranking may turn them around.
    """
    responses = []
    for side in ("chosen", "rejected"):
        messages = as_messages(row.pop(side, None))
        if not messages:
            raise InputError(f"{where}: neither 'responses' nor 'chosen' and 'rejected' in it")
        response = {"text": messages[-1]["content"]}
        ids = row.pop(side + "_ids", None)
        if ids is not None:
            response["ids"] = ids
        responses.append(response)
    return responses


def is_response(value):
    """Whether a value is a response: an object with a text and, if it has ids, a list of them."""
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("text"), str) and isinstance(value.get("ids", []), list)
