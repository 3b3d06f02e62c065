"""A model's answers in the benchmarks' own formats, from those of generate.py --task=answers.

Where the questions of NAME.jsonl are a benchmark's, NAME.model_answer.jsonl (MT-Bench, Arena-Hard)
or NAME.model_outputs.json (AlpacaEval) stands beside it.
"""

import functools
import itertools
import json
import os
import re

from nanoaipo.files import json_line, read_records, shard_path
from nanoaipo.processes import RANK, WORLD_SIZE
from nanoaipo.responses import answer_length


def write_official_files(out, name):
    """Write these files beside `out`, one for all processes, in the order of the questions.

    Every process calls it once its shard is written; those that find a shard missing write nothing.
    name: the model's.
    """
    shards = [shard_path(out, rank) for rank in range(WORLD_SIZE)]
    if not all(map(os.path.exists, shards)):
        return

    # whose question it is shows in its fields
    model_answers = []
    model_outputs = []
    for row in in_order(shards):
        if "turns" in row or row.get("uid") is not None:
            model_answers.append(model_answer(row, name))
        if row.get("instruction") is not None:
            model_outputs.append(model_output(row, name))

    stem = out.removesuffix("jsonl")
    if model_answers:
        write_whole(stem + "model_answer.jsonl", "".join(map(json_line, model_answers)))
    if model_outputs:
        text = json.dumps(model_outputs, ensure_ascii=False, indent=1)
        write_whole(stem + "model_outputs.json", text)


def in_order(shards):
    """The records of all shards in the order of their prompts, which were dealt out in turn."""
    for deal in itertools.zip_longest(*map(read_records, shards)):
        for where_and_row in deal:
            if where_and_row:  # the last deal may be short
                yield where_and_row[1]


def write_whole(path, text):
    """Write a file under a name of this process's own, then rename it: others may write it too."""
    own_path = f"{path}.{RANK}.tmp"
    with open(own_path, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(own_path, path)


def model_output(row, name):
    """An answer as AlpacaEval keeps it."""
    return {
        "dataset": row.get("dataset", ""),
        "instruction": row["instruction"],
        "output": row["responses"][0]["text"],
        "generator": name,
    }


def model_answer(row, name):
    """An answer, stripped, as FastChat's MT-Bench, Arena-Hard v0.1 or Arena-Hard v2.0 keeps it."""
    answers = row["responses"] + row.get("later_responses", [])
    # FastChat and Arena-Hard strip
    texts = [answer["text"].strip() for answer in answers]
    n_policy_tokens = answer_length(answers[0])
    if "turns" not in row:
        return v2_answer(row, name, texts[0], n_policy_tokens)

    record = {
        "question_id": row.get("question_id", row["id"]),
        "answer_id": f"{name}-{row['id']}",
        "model_id": name,
        "tstamp": 0,
    }
    turns = texts
    if len(texts) == 1:  # Arena-Hard's: with its length
        n_tokens, counter = token_length(texts[0], "cl100k_base", n_policy_tokens)
        record["token_len_by"] = counter
        turns = [{"content": texts[0], "token_len": n_tokens}]
    record["choices"] = [{"index": 0, "turns": turns}]
    return record


def v2_answer(row, name, text, n_policy_tokens):
    """An answer as Arena-Hard v2.0 keeps it: with a uid, without turns, with the answer's style."""
    n_tokens, counter = token_length(text, "o200k_base", n_policy_tokens)
    answer = {"role": "assistant", "content": {"answer": text}}
    return {
        "uid": row["uid"],
        "ans_id": f"{name}-{row['id']}",
        "model": name,
        "tstamp": 0,
        # show_result.py sums these by their position
        "metadata": {"token_len": n_tokens, **markdown_style(text)},
        "token_len_by": counter,
        "messages": [*row["prompt"], answer],
    }


def token_length(text, encoding_name, n_policy_tokens):
    """(Tokens of a text, who counted them): tiktoken, or the policy's tokenizer without it."""
    encoding = load_encoding(encoding_name)
    if encoding is None:
        return n_policy_tokens, "the policy's tokenizer"
    return len(encoding.encode(text, disallowed_special=())), f"tiktoken {encoding_name}"


@functools.cache
def load_encoding(name):
    """A tiktoken encoding; None without the package, or without its file in cache or network."""
    try:
        import tiktoken

        return tiktoken.get_encoding(name)
    except Exception:  # the network's errors come in many classes
        return None


def markdown_style(text):
    """Arena-Hard v2.0's counts of Markdown's headers, lists and bold texts, outside code blocks."""
    plain = text
    for code in re.findall(r"```([^`]*)```", text):
        plain = plain.replace(code, "")

    def count(pattern):
        return len(re.findall(pattern, plain, re.MULTILINE))

    return {
        "header_count": {f"h{k}": count(rf"^#{{{k}}}\s") for k in range(1, 7)},
        "list_count": {
            "ordered": count(r"^\s*\d+\.\s"),
            "unordered": count(r"^\s*[-*+]\s"),
        },
        "bold_count": {
            "**": count(r"\*\*[^*\n]+\*\*"),
            "__": count(r"__[^_\n]+__"),
        },
    }
