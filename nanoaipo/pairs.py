"""Pairs of any layout (nanoaipo/rows.py) to token ids ready for training."""

import array
import math
import sys

from nanoaipo.chat import check_writes_tools, control_pattern, render, row_arguments
from nanoaipo.errors import InputError
from nanoaipo.files import read_records
from nanoaipo.messages import Dropped, UnusableRow, template_columns, texts_in
from nanoaipo.response_text import Template, render_response
from nanoaipo.rows import pair_messages, without_end_marks

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
NUMBERS = ("z", "q_w", "q_l", "g_w", "g_l", "chosen_logp", "rejected_logp")


def read_pairs(path, tokenizer, eos_ids, max_length, arguments=None, n_tokens=None):
    """Pairs ready for training: (records without their text, counts of what was dropped).

    arguments: of the chat template. n_tokens: the size of the model's vocabulary; None: the
    tokenizer's. A record has prompt_ids, chosen_ids and rejected_ids, arrays of int, and the row's
    id and numbers. Pairs that carry ids keep them; others are rendered here.

    Nothing is ever truncated. A row is dropped, and counted by reason, if it is no pair, if its
    prompt spells a control token, if the template refuses it, if both responses are the same, or if
    a sequence is above max_length tokens. Raises InputError for what is no record, for another
    model's ids, and if no pair is left.
    """
    control = control_pattern(tokenizer)
    if n_tokens is None:
        n_tokens = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    pairs = []
    dropped = Dropped()
    for where, row in read_records(path):
        try:
            # the sampled ids where they came along
            if all(row.get(key) is None for key in IDS):
                row |= render_pair(where, row, tokenizer, eos_ids, control, arguments)
            check_ids(where, row, n_tokens)
            check_numbers(where, row)
            check_pair(where, row, max_length)
        except UnusableRow as e:
            dropped.add(e.reason, e)
            continue
        pairs.append(without_text(row))

    dropped.check_left(path, pairs, "pair")
    dropped.print(path)
    counts = {"pairs": len(pairs), "too_long": 0, "control_text": 0}
    counts.update(dropped.counts)
    return pairs, counts


def render_pair(where, row, tokenizer, eos_ids, control, arguments):
    """The columns of a pair that came as text; raises UnusableRow, with the reason."""
    prompt, chosen, rejected = pair_messages(where, row)
    arguments = row_arguments(tokenizer, where, row, arguments)
    if any(message.get("tool_calls") for message in chosen + rejected):
        check_writes_tools(tokenizer, where)

    # an end token behind an answer is no part of its text; the model may have one without a text
    named = tokenizer.convert_ids_to_tokens(sorted(eos_ids))
    end_tokens = [token for token in named if token]
    chosen = without_end_marks(chosen, end_tokens)
    rejected = without_end_marks(rejected, end_tokens)

    # a template would turn such text into the control token itself
    for text in texts_in([prompt, template_columns(where, row)]):
        found = control.search(text)
        if found:
            raise UnusableRow(
                "control_text",
                f"{where}: the prompt holds the control token {found[0]}; if it is rendered with a "
                "chat template already, give the messages instead",
            )

    template = Template(tokenizer, control, arguments, where)
    prompt_ids = render(tokenizer, prompt, where, arguments=arguments)
    columns = {"prompt_ids": prompt_ids}
    for name, response in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        columns[name] = render_response(template, eos_ids, prompt, prompt_ids, response)

    # log-probs that came with texts are those of other tokens
    return columns | {"chosen_logp": None, "rejected_logp": None}


def check_ids(where, pair, n_tokens):
    """Raise InputError unless a pair has all three kinds of ids, each below n_tokens."""
    for key in IDS:
        if not pair.get(key):
            raise InputError(
                f"{where}: '{key}' is missing or empty; a pair has either all ids or none"
            )
        if not isinstance(pair[key], list):
            raise InputError(f"{where}: '{key}' has to be a list of the numbers of tokens")
        for i in pair[key]:
            if type(i) is not int or not 0 <= i < n_tokens:  # not isinstance: True is an int too
                raise InputError(
                    f"{where}: '{key}' has the id {i!r}, and this model has {n_tokens} tokens "
                    "(vocab_size in config.json): its tokenizer or the pairs are another model's"
                )


def check_numbers(where, pair):
    """Raise UnusableRow for a label or log-prob that is not finite: nothing could be learned.

    z may be infinite, from a judge that is certain: training cuts it.
    """
    for key in NUMBERS:
        value = pair.get(key)
        if not isinstance(value, (int, float)) or abs(value) <= sys.float_info.max:
            continue
        if key != "z" or value not in (math.inf, -math.inf):
            raise UnusableRow("not_finite", f"{where}: '{key}' is {value}, which is not finite")


def check_pair(where, pair, max_length):
    """Raise UnusableRow if both responses are the same, or a sequence is above max_length."""
    if pair["chosen_ids"] == pair["rejected_ids"]:
        raise UnusableRow("identical", f"{where}: chosen and rejected are the same")

    # both sequences begin with the prompt
    longest = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
    n_tokens = len(pair["prompt_ids"]) + longest
    if n_tokens > max_length:
        raise UnusableRow(
            "too_long",
            f"{where}: {n_tokens} tokens, above --max_length={max_length} or what the model takes",
        )


def without_text(pair):
    """A pair as training holds it: ids as arrays, its id and its numbers."""
    record = {}
    for key, value in pair.items():
        if key == "id" or isinstance(value, (int, float)):
            record[key] = value
    for key in IDS:
        record[key] = array.array("i", pair[key])  # 4 bytes per id, a list takes 8 and an object
    return record
