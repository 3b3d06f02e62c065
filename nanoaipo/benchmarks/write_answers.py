"""Answers to a benchmark's questions, turn after turn: generate.py --task=answers.

A record carries the answer to the first turn in `responses`, those to further turns in
`later_responses`.
"""

import functools

from nanoaipo.chat import control_pattern, render, row_arguments, template_arguments
from nanoaipo.engines import context_length
from nanoaipo.errors import InputError
from nanoaipo.messages import Dropped, UnusableRow
from nanoaipo.processes import RANK, WORLD_SIZE
from nanoaipo.prompts import read_prompts
from nanoaipo.responses import count_and_print, response_record
from nanoaipo.seeds import derive_seed
from nanoaipo.stages import write_blocks

# temperatures of FastChat's categories
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
}
TURN_TOKENS = 32  # at most, that a chat template adds to a turn


def write_answers(manifest, tokenizer, start_engine, s):
    """Write one answer to each turn of each prompt, block by block.

    start_engine(max_tokens): an engine's `sample`; s: the settings of generate.py. A block holds
    all turns of its questions. A row that holds no prompt, or one that the template refuses, is
    dropped and counted by reason. Raises InputError where none is left, and where the model has no
    room for all turns of a question.
    """
    # all questions, whose first turn is rendered
    dropped = Dropped()
    rows = read_prompts(s.prompts, s.prompt_field, dropped)
    if s.n_prompts:
        rows = rows[: s.n_prompts]
    limit = context_length(s.model)
    arguments = template_arguments(s.template_kwargs, s.date)
    rows, longest = render_and_measure(rows, tokenizer, limit, arguments, dropped, s)
    dropped.check_left(s.prompts, rows)
    dropped.print(s.prompts)

    # this process's share
    rows = rows[RANK::WORLD_SIZE]
    counts = {"prompts": len(rows)}
    if RANK == 0:  # every process reads all prompts; the first counts for all
        counts.update(dropped.counts)

    sample = None
    if rows:  # there may be more processes than questions
        # an earlier turn's answer is rendered again from its text, perhaps to more tokens
        sample = start_engine(min(limit, 2 * longest))
    answer = functools.partial(
        answer_block, sample=sample, tokenizer=tokenizer, arguments=arguments, s=s
    )
    count = functools.partial(count_and_print, s.out, counts)
    write_blocks(s.out, manifest, rows, s.block, answer, count)


def render_and_measure(rows, tokenizer, limit, arguments, dropped, s):
    """(Questions with their prompt_ids, tokens that the longest may take with its answers).

    limit: tokens of the model's context. arguments: of the chat template. dropped: a
    messages.Dropped, which gets the questions that the template refuses.
    """
    control = control_pattern(tokenizer)
    longest = 0
    rendered = []
    for row in rows:
        where = f"{s.prompts}: prompt '{row['id']}'"
        try:
            own = row_arguments(tokenizer, where, row, arguments)
            row["prompt_ids"] = render(tokenizer, row["prompt"], where, control, arguments=own)
        except UnusableRow as e:
            dropped.add(e.reason, e)
            continue
        rendered.append(row)

        # the last turn is asked after all the others and their answers
        n_tokens = len(row["prompt_ids"]) + s.max_new_tokens
        for turn in turns_of(row)[1:]:
            n_tokens += len(tokenizer(turn).input_ids) + TURN_TOKENS + s.max_new_tokens
        if n_tokens > limit:
            raise InputError(
                f"{s.prompts}: '{row['id']}' may take {n_tokens} tokens with its answers, "
                f"this model has {limit}: lower --max_new_tokens"
            )
        longest = max(longest, n_tokens)
    return rendered, longest


def answer_block(rows, sample, tokenizer, arguments, s):
    """The records of a block of questions with one answer to each of their turns.

    Each turn is asked after the answers to those before it, at the temperature of its category.
    """
    control = control_pattern(tokenizer)
    conversations = [list(row["prompt"]) for row in rows]
    answers = [[] for _ in rows]
    n_turns = [len(turns_of(row)) for row in rows]
    temperatures = [temperature_of(row, s.temperature) for row in rows]

    def request(k, turn):
        """A conversation as ids, and the seed of what answers it."""
        row = rows[k]
        where = f"{s.prompts}: prompt '{row['id']}'"
        own = row_arguments(tokenizer, where, row, arguments)
        ids = render(tokenizer, conversations[k], where, control, arguments=own)
        return ids, derive_seed(s.seed, s.iteration, row["id"], turn)

    for turn in range(max(n_turns)):
        going = [k for k in range(len(rows)) if turn < n_turns[k]]
        if turn > 0:  # the first turn is the prompt
            for k in going:
                question = {"role": "user", "content": turns_of(rows[k])[turn]}
                conversations[k].append(question)

        # one call of the engine for each temperature
        for temperature in sorted({temperatures[k] for k in going}):
            asked = [k for k in going if temperatures[k] == temperature]
            requests = [request(k, turn) for k in asked]
            sampled = sample(
                requests,
                n_responses=1,
                temperature=temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                max_new_tokens=s.max_new_tokens,
            )

            # the answer enters the conversation as text, as a user would see it
            for k, (prompt_ids, _), (response,) in zip(asked, requests, sampled):
                answer = response_record(tokenizer, prompt_ids, *response)
                answers[k].append(answer)
                conversations[k].append({"role": "assistant", "content": answer["text"]})

    return [with_answers(row, responses) for row, responses in zip(rows, answers)]


def turns_of(row):
    """The texts of a question's turns; a plain prompt has one, whose text is in the prompt."""
    return row.get("turns", [""])


def temperature_of(row, temperature):
    """FastChat's temperature of a question's category, or the one given."""
    if "turns" not in row:
        return temperature
    return TEMPERATURES.get(str(row.get("category")), temperature)


def with_answers(row, answers):
    """A question's record with the answers to its turns."""
    record = row | {"responses": answers[:1]}
    if "turns" in row:
        record["later_responses"] = answers[1:]
    return record
