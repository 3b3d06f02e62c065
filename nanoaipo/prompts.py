"""The columns that people's files of prompts and candidates have, to our records.
"""
import hashlib
import json
import sys

from nanoaipo.chat import as_messages
from nanoaipo.files import read_records


def read_prompts(path, field=""):
    """Prompts as a list of records with `id` and `prompt` (messages), in file order.

    path: JSONL, a JSON array, or NAME:SPLIT or NAME:CONFIG:SPLIT of a Hugging Face dataset. field: the column that holds the prompt; empty
    takes the first of prompt, messages, instruction (with its input), turns (the first of them), chosen (all but its last message).
    A prompt without id, question_id or uid gets one from its text.
    """
    prompts, seen = [], {}
    for place, row in read_records(path):
        key = field or next((f for f in ("prompt", "messages", "instruction", "turns", "chosen") if row.get(f) is not None), "prompt")
        value = row.get(key)
        turns = row.pop("turns", None)                                  # beside another prompt they are not what is asked
        if key == "turns":                                              # MT-Bench, Arena-Hard: texts, or objects with one
            row["turns"] = [t.get("content") if isinstance(t, dict) else t for t in (turns if isinstance(turns, list) else [turns])]
            value = row["turns"][0] if row["turns"] and all(isinstance(t, str) for t in row["turns"]) else None
        if key == "instruction" and isinstance(value, str):             # Alpaca, self-instruct: some come with an input
            extra = row.get("input") or next((i["input"] for i in row.get("instances") or () if isinstance(i, dict) and i.get("input")), "")
            value = f"{value}\n\n{extra}" if extra else value
        messages = as_messages(value) if key != "chosen" or isinstance(value, list) else None
        messages or sys.exit(f"{place}: '{key}' has to be a text or a list of messages with role and content; --prompt_field names the column")
        if messages[-1]["role"] == "assistant":                         # a whole conversation: ask for its last answer
            messages = messages[:-1] or sys.exit(f"{place}: '{key}' holds no prompt before the assistant's message")
        row["id"] = row.get("id", row.get("question_id", row.get("uid")))
        given = row.get("id") is not None                               # 0 is an id too
        name = str(row["id"]) if given else hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]
        if name in seen:
            given and sys.exit(f"{place}: id '{name}' is already that of {seen[name]}; ids join records and must differ")
            name += f"-{len(prompts)}"
        seen[name] = place
        prompts.append({**row, "id": name, "prompt": messages})
    return prompts or sys.exit(f"{path}: no prompts in it")


def read_candidates(path):
    """Yield (place, record) of candidates: id a string, prompt messages, responses objects with a text; they may have been bare texts.

    Pairs that others have ranked (chosen, rejected) are candidates too: their two responses.
    """
    for n, (place, row) in enumerate(read_records(path, "prompt")):
        row["id"] = str(row.get("id", n))
        row["prompt"] = as_messages(row["prompt"]) or sys.exit(f"{place}: 'prompt' has to be a text or a list of messages with role and content")
        if "responses" not in row:
            sides = [as_messages(row.pop(k, None)) for k in ("chosen", "rejected")]
            all(sides) or sys.exit(f"{place}: neither 'responses' nor 'chosen' and 'rejected' in it")
            row["responses"] = [m[-1]["content"] for m in sides]
        responses = row["responses"] if isinstance(row["responses"], list) else [None]
        row["responses"] = [{"text": r} if isinstance(r, str) else r for r in responses]
        if not all(isinstance(r, dict) and isinstance(r.get("text"), str) and isinstance(r.get("ids", []), list) for r in row["responses"]):
            sys.exit(f"{place}: 'responses' has to be a list of texts, or of objects with a text (and ids, a list)")
        yield place, row
