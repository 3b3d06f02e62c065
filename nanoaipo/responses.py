"""Responses as candidates and answers files hold them: from an engine here, or from an endpoint."""

import os

from nanoaipo.endpoints import endpoint
from nanoaipo.errors import InputError
from nanoaipo.files import shard_path
from nanoaipo.questions import ask
from nanoaipo.thoughts import split_thought, split_thought_ids


def response_record(tokenizer, prompt_ids, ids, finished, logp):
    """The record of an engine's response; the text stays as the policy wrote it.

    Where the policy thinks before it answers, `text` is the answer alone, and `thought` and
    `thought_tokens` tell of the thought, which the ids hold too. A thought that does not end is an
    unfinished response with an empty text.
    """
    thought, answer, thought_tokens, thought_ended = split_thought_ids(tokenizer, prompt_ids, ids)
    record = {
        "text": answer,
        "ids": ids,
        "finished": finished and thought_ended,
        "logp": logp,
    }
    if thought is not None:
        record["thought"] = thought
        record["thought_tokens"] = thought_tokens
    return record


def answer_length(response):
    """Tokens of a response without its thought, the end token included; 0 where ids are unknown."""
    return len(response.get("ids", ())) - response.get("thought_tokens", 0)


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
            f"{url}: not one answer to {len(questions)} questions; "
            f"the first reply: {replies[0]['error']}"
        )

    records = []
    for k, row in enumerate(rows):
        responses = []
        for reply in replies[k * n_responses : (k + 1) * n_responses]:
            if "finish" in reply:
                ended = reply["finish"] == "stop"
                responses.append(response_from_text(reply["reply"], ended, reply.get("thought")))
        records.append(row | {"responses": responses})
    return records


def response_from_text(text, finished, thought=None):
    """The record of a response of which only the text is known, and perhaps the thought apart."""
    answer = text
    if thought is None:
        thought, answer = split_thought(text)
    if thought is None:
        return {"text": text, "finished": finished}
    # an unfinished thought leaves no answer
    return {"text": answer, "finished": finished and bool(answer), "thought": thought}


def count_and_print(out, counts, records):
    """The counts of a finished file of responses, added to those of its prompts and printed."""
    totals = {"responses": 0, "tokens": 0, "finished": 0}
    thought_tokens = 0
    for record in records:
        for response in record["responses"] + record.get("later_responses", []):
            totals["responses"] += 1
            totals["tokens"] += len(response.get("ids", ()))  # an endpoint gives no ids
            totals["finished"] += response["finished"]
            thought_tokens += response.get("thought_tokens", 0)

    n_responses = max(1, totals["responses"])
    mean_tokens = totals["tokens"] / n_responses
    share_finished = totals["finished"] / n_responses
    thoughts = ""
    if thought_tokens:
        totals["thought_tokens"] = thought_tokens
        thoughts = f" ({thought_tokens / n_responses:.1f} of them thoughts)"
    print(
        f"{counts['prompts']} prompts, {totals['responses']} responses of "
        f"{mean_tokens:.1f} tokens{thoughts}, {share_finished:.0%} finished -> {shard_path(out)}"
    )
    return counts | totals
