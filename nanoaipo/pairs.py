"""The columns that people's files of pairs have, to token ids ready for training."""

import array

from nanoaipo.chat import as_messages, control_pattern, render, render_response
from nanoaipo.errors import InputError
from nanoaipo.files import read_records

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
NOT_TRAINED_ON = ("prompt", "chosen", "rejected", "scores")  # left out of memory


def read_pairs(path, tokenizer, eos_ids, max_length):
    """Pairs ready for training: (records without their text, counts of what was dropped).

    A record has prompt_ids, chosen_ids and rejected_ids, arrays of int. Pairs that carry ids keep
    them; others are rendered here. Nothing is ever truncated: a pair with a sequence above
    max_length tokens, or whose prompt spells a control token, is dropped and counted. Raises
    InputError for what is no pair, or another model's, and if no pair is left.
    """
    control = control_pattern(tokenizer)
    n_tokens = len(tokenizer)  # added tokens included; slow, so computed once
    pairs = []
    counts = {"pairs": 0, "too_long": 0, "control_text": 0}
    for where, pair in read_records(path, "prompt", "chosen", "rejected"):
        read_messages(where, pair)

        # ids: the sampled ones where they came along
        if not any(key in pair for key in IDS):
            if any(control.search(message["content"]) for message in pair["prompt"]):
                counts["control_text"] += 1
                continue
            add_ids(where, pair, tokenizer, eos_ids, control)
        check_ids(where, pair, n_tokens)

        # both sequences begin with the prompt
        longest = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        if len(pair["prompt_ids"]) + longest > max_length:
            counts["too_long"] += 1
            continue
        pairs.append(without_text(pair))

    counts["pairs"] = len(pairs)
    if not pairs:
        reasons = ", ".join(f"{n} {key}" for key, n in counts.items())
        raise InputError(f"{path}: no pair is left to train on ({reasons})")
    return pairs, counts


def read_messages(where, pair):
    """Bring the prompt of a pair to messages, chosen and rejected to one message each."""
    for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        messages = as_messages(pair[key], role)
        if not messages:
            raise InputError(
                f"{where}: '{key}' has to be a text or a list of messages with role and content"
            )
        pair[key] = messages

        if key == "prompt":
            continue
        if messages[:-1] == pair["prompt"]:  # a whole conversation, as UltraFeedback has it
            pair[key] = messages[-1:]
        if [message["role"] for message in pair[key]] != ["assistant"]:
            raise InputError(
                f"{where}: '{key}' has to be one message of the assistant, "
                "or the prompt and that message"
            )


def add_ids(where, pair, tokenizer, eos_ids, control):
    """Render a pair that came as text."""
    prompt = pair["prompt"]
    prompt_ids = render(tokenizer, prompt, where)
    pair["prompt_ids"] = prompt_ids
    for key in ("chosen", "rejected"):
        pair[key + "_ids"] = render_response(
            tokenizer, eos_ids, control, prompt, prompt_ids, pair[key]
        )


def check_ids(where, pair, n_tokens):
    """Raise InputError unless a pair has all three kinds of ids, each below n_tokens."""
    for key in IDS:
        if not pair.get(key):
            raise InputError(
                f"{where}: '{key}' is missing or empty; a pair has either all ids or none"
            )
        if not all(isinstance(i, int) and 0 <= i < n_tokens for i in pair[key]):
            raise InputError(
                f"{where}: '{key}' has ids that this model's tokenizer does not know; "
                "the pairs are another model's"
            )


def without_text(pair):
    """A pair as training holds it: ids as arrays, the text left out."""
    record = {key: value for key, value in pair.items() if key not in NOT_TRAINED_ON}
    for key in IDS:
        record[key] = array.array("i", pair[key])  # 4 bytes per id, a list takes 8 and an object
    return record
