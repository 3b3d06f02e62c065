"""People's files of prompts and candidates (layouts: nanoaipo/rows.py), to our records."""

import hashlib
import json
import math

from nanoaipo.errors import InputError
from nanoaipo.files import read_records
from nanoaipo.messages import Dropped, UnusableRow, as_messages, found_field
from nanoaipo.rows import (
    CHOSEN_FIELDS,
    PROMPT_FIELDS,
    REJECTED_FIELDS,
    pair_messages,
    prompt_messages,
    turn_texts,
    with_system,
)
from nanoaipo.thoughts import split_thought

# ---------------------------------------------------------------------------------------- prompts


def read_prompts(path, field="", dropped=None):
    """Prompts as a list of records with `id` and `prompt` (messages), in file order.

    path: what read_records reads. field: the column that holds the prompt; empty takes the first of
    PROMPT_FIELDS: an instruction is asked with its input, of turns the first, of a conversation all
    but its last answer. A prompt without id, question_id or uid gets one from its text.

    dropped: a messages.Dropped, which gets the rows that hold no prompt; without it the first of
    them is an error. Raises InputError for an id that comes twice, and if no prompt is left.
    """
    prompts = []
    first_seen = {}  # id -> where
    for where, row in read_records(path):
        try:
            messages = asked_messages(where, row, field)
        except UnusableRow as e:
            if dropped is None:
                raise
            dropped.add(e.reason, e)
            continue

        # an id of its own has to be unique; of rows with the same text each gets one
        prompt_id = own_id(row, ("id", "question_id", "uid"))
        if prompt_id is None:
            prompt_id = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]
            if prompt_id in first_seen:
                prompt_id += f"-{len(prompts)}"
        elif prompt_id in first_seen:
            raise InputError(
                f"{where}: id '{prompt_id}' is already that of {first_seen[prompt_id]}; "
                "ids join records and must differ"
            )

        first_seen[prompt_id] = where
        row["id"] = prompt_id
        row["prompt"] = messages
        prompts.append(row)

    dropped = dropped or Dropped()  # without one, nothing was dropped
    dropped.check_left(path, prompts)
    return prompts


def own_id(row, fields):
    """The id in the first of these columns that holds one, as a text, or None.

    0 is an id; an empty text is none, and neither is the NaN that tables fill in.
    """
    for field in fields:
        value = row.get(field)
        is_nan = isinstance(value, float) and math.isnan(value)
        if value is not None and value != "" and not is_nan:
            return str(value)
    return None


def asked_messages(where, row, field):
    """The messages that a row asks; its `turns` are removed if another column is asked."""
    field = field or found_field(row, PROMPT_FIELDS) or ""
    turns = row.pop("turns", None)  # whoever finds turns in a record asks them
    if field == "turns":
        row["turns"] = turn_texts(turns)
    messages = prompt_messages(where, row, field)

    # a whole conversation: ask for its last answer
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UnusableRow(
            "no_prompt", f"{where}: '{field}' holds no prompt before the assistant's message"
        )
    return with_system_of_chosen(where, row, with_system(row, messages))


def with_system_of_chosen(where, row, messages):
    """A prompt behind the system message that only the row's chosen conversation begins with."""
    field = found_field(row, CHOSEN_FIELDS)
    if field is None or not isinstance(row[field], list) or len(row[field]) < 2:
        return messages
    try:
        system, first, *_ = as_messages(row[field], f"{where}: '{field}'")
    except UnusableRow:  # what is chosen is not asked
        return messages
    if system["role"] != "system" or messages[0]["role"] == "system":
        return messages
    if first["content"].strip() != messages[0]["content"].strip():
        return messages
    return [system] + messages


# ------------------------------------------------------------------------------------- candidates

RESPONSE_TYPES = {
    "text": str,
    "ids": list,
    "finished": (bool, int),
    "thought": str,
    "thought_tokens": int,
}


def read_candidates(path, dropped=None):
    """Yield (where, record) of candidates, brought to the form in nanoaipo/files.py.

    Responses may come as bare texts. Pairs that others have ranked are candidates too: chosen and
    rejected become their two responses. A response from elsewhere that holds a thought keeps it
    apart, as `thought`. A row without an id is told apart by its number.

    dropped: a messages.Dropped, which gets the rows whose messages or responses cannot be used;
    without it the first of them is an error. Raises InputError for a row's own id that is another
    row's number.
    """
    own_ids = set()
    numbers = set()  # as texts, of rows without an id
    for n, (where, row) in enumerate(read_records(path)):
        # the prompt and its responses, from columns of either layout
        try:
            if row.get("responses") is None:
                row["prompt"], row["responses"] = responses_of_pair(where, row)
            else:
                row["prompt"] = with_system(row, prompt_messages(where, row))
            row["responses"] = as_responses(where, row["responses"])
        except UnusableRow as e:
            if dropped is None:
                raise
            dropped.add(e.reason, e)
            continue

        # a number must not be taken for an id, nor an id for a number
        row_id = own_id(row, ("id",))
        if row_id is None:
            row_id = str(n)
            numbers.add(row_id)
        else:
            own_ids.add(row_id)
        row["id"] = row_id
        if row_id in own_ids and row_id in numbers:
            raise InputError(
                f"{where}: '{row_id}' is the id of one row and the number of another, "
                "which has no id; give all rows an id, or none"
            )

        # rankers read the answer, not the thought before it
        row["responses"] = [with_thought_apart(response) for response in row["responses"]]
        yield where, row


def as_responses(where, values):
    """Responses as objects, from bare texts or objects, without null keys; raises UnusableRow."""
    if not isinstance(values, list):
        values = [None]
    responses = []
    for value in values:
        if isinstance(value, str):
            value = {"text": value}
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if item is not None}
        if not is_response(value):
            raise UnusableRow(
                "no_responses",
                f"{where}: 'responses' has to be a list of texts, "
                "or of objects with text (and ids, a list; finished, true or false; thought, a "
                "text; thought_tokens, a number)",
            )
        responses.append(value)
    return responses


def responses_of_pair(where, row):
    """(Prompt, two responses) of a pair, chosen and rejected, with their ids where it has them.

    Both are taken out of the row: the next ranking may turn them around.
    """
    fields = [found_field(row, CHOSEN_FIELDS), found_field(row, REJECTED_FIELDS)]
    if None in fields or not all(row[field] for field in fields):
        raise UnusableRow(
            "no_responses",
            f"{where}: neither 'responses' nor 'chosen' and 'rejected' in it; an answer of another "
            "column, such as AlpacaEval's 'output', has to be written as 'responses': [output]",
        )
    prompt, chosen, rejected = pair_messages(where, row)

    responses = []
    for field, side, (message,) in zip(fields, ("chosen", "rejected"), (chosen, rejected)):
        del row[field]
        response = {"text": message["content"]}
        if message.get("reasoning_content"):
            response["thought"] = message["reasoning_content"]
        ids = row.pop(side + "_ids", None)
        if ids is not None:
            response["ids"] = ids
        responses.append(response)
    return prompt, responses


def is_response(value):
    """Whether a value is a response: an object with a text, and its other keys of their types."""
    if not isinstance(value, dict) or "text" not in value:
        return False
    for key, kind in RESPONSE_TYPES.items():
        if key in value and not isinstance(value[key], kind):
            return False
    return True


def with_thought_apart(response):
    """A response whose text is the answer alone; what was thought before it is its `thought`."""
    if response.get("thought") is not None:
        return response
    thought, answer = split_thought(response["text"])
    if thought is None:
        return response
    return response | {"text": answer, "thought": thought}
