"""Responses as candidates and answers files hold them: from an engine here, or from an endpoint."""

import os

from nanoaipo.errors import InputError
from nanoaipo.files import shard_path
from nanoaipo.questions import ask, endpoint


def response_record(tokenizer, ids, finished, logp):
    """The record of an engine's response; the text stays as the policy wrote it."""
    return {
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "ids": ids,
        "finished": finished,
        "logp": logp,
    }


def ask_for_responses(rows, out, *, model, url, n_responses, temperature, top_p, max_new_tokens):
    """Prompts with n_responses texts each, of a model behind an OpenAI-compatible endpoint.

    What it refuses to answer is missing among the responses. Raises InputError when this is the
    first block of `out` and nothing in it was answered.
    """
    questions = []
    for row in rows:
        for k in range(n_responses):
            question = {
                "model": model,
                "messages": row["prompt"],
                "temperature": temperature,
                "top_p": top_p,
                "max_tokens": max_new_tokens,
                "about": [row["id"], k],
            }
            questions.append(question)

    # twice, because an error may pass: the second time asks only what has an error for a reply
    for _ in range(2):
        replies = ask(questions, out, endpoint(url, concurrency=16))

    # answers have a `finish`, errors have none; an endpoint that never answered is a wrong setting
    is_first_block = os.path.getsize(shard_path(out) + ".tmp") == 0
    if is_first_block and not any("finish" in reply for reply in replies):
        raise InputError(
            f"{url}: not one answer to {len(questions)} questions; the first reply: {replies[0]}"
        )

    records = []
    for k, row in enumerate(rows):
        responses = []
        for reply in replies[k * n_responses : (k + 1) * n_responses]:
            if "finish" in reply:
                finished = reply["finish"] == "stop"
                responses.append({"text": reply["reply"], "finished": finished})
        records.append(row | {"responses": responses})
    return records


def count_and_print(out, counts, records):
    """The counts of a finished file of responses, added to those of its prompts and printed."""
    totals = {"responses": 0, "tokens": 0, "finished": 0}
    for record in records:
        for response in record["responses"] + record.get("later_responses", []):
            totals["responses"] += 1
            totals["tokens"] += len(response.get("ids", ()))  # an endpoint gives no ids
            totals["finished"] += response["finished"]

    n_responses = max(1, totals["responses"])
    mean_tokens = totals["tokens"] / n_responses
    share_finished = totals["finished"] / n_responses
    print(
        f"{counts['prompts']} prompts, {totals['responses']} responses of "
        f"{mean_tokens:.1f} tokens, {share_finished:.0%} finished -> {shard_path(out)}"
    )
    return counts | totals
