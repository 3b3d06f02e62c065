"""The columns that people's files of pairs have, to token ids ready for training.
"""
import array
import sys

from nanoaipo.chat import control_pattern, as_messages, render, render_response
from nanoaipo.files import read_records


def read_pairs(path, tokenizer, ends, max_length):
    """Pairs ready for training: (list of records with prompt_ids, chosen_ids, rejected_ids, ..., no text; counts of what was dropped).

    Pairs that carry ids keep them; others are rendered here. Nothing is ever truncated: a pair with a sequence above
    max_length tokens, or whose prompt spells a control token, is dropped and counted.
    """
    pairs, counts, control, known = [], {"pairs": 0, "too_long": 0, "control_text": 0}, control_pattern(tokenizer), len(tokenizer)
    for place, pair in read_records(path, "prompt", "chosen", "rejected"):
        for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            pair[key] = as_messages(pair[key], role) or sys.exit(f"{place}: '{key}' has to be a text or a list of messages with role and content")
            if key != "prompt" and pair[key][:-1] == pair["prompt"]:
                pair[key] = pair[key][-1:]                              # a whole conversation, as UltraFeedback has it
            if key != "prompt" and [m["role"] for m in pair[key]] != ["assistant"]:
                sys.exit(f"{place}: '{key}' has to be one message of the assistant, or the prompt and that message")
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        if not any(key in pair for key in names):
            if any(control.search(m["content"]) for m in pair["prompt"]):
                counts["control_text"] += 1
                continue
            pair["prompt_ids"] = render(tokenizer, pair["prompt"], place)
            for key in ("chosen", "rejected"):
                pair[key + "_ids"] = render_response(tokenizer, ends, control, pair["prompt"], pair["prompt_ids"], pair[key])
        for key in names:
            pair.get(key) or sys.exit(f"{place}: '{key}' is missing or empty; a pair has either all ids or none")
            if not all(isinstance(i, int) and 0 <= i < known for i in pair[key]):
                sys.exit(f"{place}: '{key}' has ids that this model's tokenizer does not know; the pairs are another model's")
        if len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) > max_length:
            counts["too_long"] += 1
            continue
        pairs.append({k: array.array("i", v) if k in names else v for k, v in pair.items() if k not in ("prompt", "chosen", "rejected", "scores")})
    counts["pairs"] = len(pairs)
    pairs or sys.exit(f"{path}: no pair is left to train on ({', '.join(f'{v} {k}' for k, v in counts.items())})")
    return pairs, counts
