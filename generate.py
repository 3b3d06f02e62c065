"""Sample from a policy: prompts to candidate responses, block by block.

    python generate.py config/aipo_nemo.py --model=MODEL --prompts=prompts.jsonl --out=new.jsonl
    torchrun --nproc-per-node=8 generate.py ...     8 GPUs: 8 engines, each writes a shard
    python generate.py --task=instructions ...      new prompts (nanoaipo/instruct.py)
    python generate.py --task=answers ...           to a benchmark's questions (nanoaipo/benchmarks)

Tokens in, tokens out: the engine gets the ids of the rendered prompt, and the ids it returns are
what training will see. Prompts that are too long or spell a control token are dropped and counted
in the manifest. A killed stage goes on behind its last whole block when it is run again. With
--engine=openai a model behind an endpoint responds, in text.
"""

import os
import random
from types import SimpleNamespace

from configurator import configure, run_script
from nanoaipo.benchmarks.official_files import write_official_files
from nanoaipo.benchmarks.write_answers import write_answers
from nanoaipo.chat import (
    control_pattern,
    load_tokenizer,
    render,
    row_arguments,
    template_arguments,
    token_ids,
)
from nanoaipo.engines import context_length, load_engine
from nanoaipo.errors import InputError
from nanoaipo.instruct import compile_unfit, write_instructions
from nanoaipo.messages import Dropped, UnusableRow, template_columns, texts_in
from nanoaipo.processes import RANK, WORLD_SIZE
from nanoaipo.prompts import read_prompts
from nanoaipo.responses import ask_for_responses, count_and_print, response_record
from nanoaipo.seeds import derive_seed
from nanoaipo.stages import open_stage, write_blocks

# fmt: off
# ---- settings ----
task = "candidates"                     # candidates; instructions: new prompts; answers: all turns
model = ""                              # policy: folder or hub name; name at engine_url (openai)
prompts = ""                            # JSONL, a JSON array, or NAME:SPLIT of a dataset on the hub
prompt_field = ""                       # column; else prompt, messages, instruction, turns, chosen
n_prompts = 0                           # prompts to take (or write), others each iteration; 0: all
iteration = 0                           # t; chooses the prompts and enters the seeds
out = ""                                # candidates or prompts file to write (JSONL)
engine = "auto"                         # vllm, transformers, openai; auto: vllm where installed
engine_url = ""                         # OpenAI-compatible endpoint, key in OPENAI_API_KEY (openai)
n_responses = 5                         # responses per prompt (AIPO: N = 5)
temperature = 0.4                       # 0 is greedy (AIPO's repository: 0.4)
top_k = 50                              # 0: off (AIPO's repository: 50)
top_p = 1.0                             # nucleus
max_new_tokens = 2048                   # longest response, end token included
max_prompt_tokens = 512                 # longer ones are dropped, template included (AIPO: 512)
min_prompt_tokens = 0                   # shorter ones are dropped, without the template (AIPO: 3)
template_kwargs = ""                    # of the chat template, JSON: {"enable_thinking": false}
date = ""                               # day in the chat template, YYYY-MM-DD; empty: today's
answer_name = ""                        # model's name in official files; empty: end of its path
instruction_temperature = 0.5           # of new instructions (AIPO: 0.5, top_p 0.9, top_k 50)
instruction_examples = 8                # of the pool, shown in a call (AIPO: 8)
instruction_unfit = (r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b"
                     r"|^(write a program|detailed instructions:|task definition:|"
                     r"[^\w\s]|[^\x00-\x7f])")   # regex of what is dropped (AIPO)
instruction_similarity = 0.7            # three-word Jaccard index that makes two one; 0: off (AIPO)
dtype = "bfloat16"                      # of the computation; take float32 on CPUs
seed = 0                                # of the run
block = 2048                            # prompts sampled and kept at once; a kill costs one block
generate_rows = 512                     # responses sampled at once (transformers)
tensor_parallel = 1                     # GPUs per engine (vllm)
gpu_memory = 0.9                        # share of a GPU's memory the engine may take (vllm)
config = configure(globals())
# fmt: on


# ---- prompts ----


def read_pool(prepare, *arguments):
    """(Prompts that can be asked, the messages.Dropped of all others).

    prepare(where, row, *arguments) makes a row ready, or raises UnusableRow. Raises InputError when
    no prompt is left.
    """
    pool = []
    dropped = Dropped()
    for row in read_prompts(prompts, prompt_field, dropped):
        try:
            prepare(f"{prompts}: prompt '{row['id']}'", row, *arguments)
        except UnusableRow as e:
            dropped.add(e.reason, e)
            continue
        pool.append(row)

    dropped.check_left(prompts, pool)
    dropped.print(prompts)
    return pool, dropped


def add_prompt_ids(where, row, tokenizer, control, room, arguments):
    """Render a row's prompt to its prompt_ids; raises UnusableRow if it does not fit or render.

    control: a pattern that finds the text of a control token. room: tokens that the model's context
    leaves for a prompt; max_prompt_tokens is a limit too. arguments: of the chat template.
    """
    own = row_arguments(tokenizer, where, row, arguments)

    # a template would turn such text into the control token itself
    for text in texts_in([row["prompt"], template_columns(where, row)]):
        found = control.search(text)
        if found:
            raise UnusableRow("control_text", f"{where}: holds the control token {found[0]}")

    # the ids that the engine gets, and training too
    row["prompt_ids"] = render(tokenizer, row["prompt"], where, arguments=own)
    n_tokens = len(row["prompt_ids"])
    max_tokens = min(max_prompt_tokens, room)
    if n_tokens > max_tokens:
        raise UnusableRow(
            "too_long",
            f"{where}: {n_tokens} tokens; max_prompt_tokens and max_new_tokens leave {max_tokens}",
        )

    # too short an instruction asks for nothing
    if min_prompt_tokens:
        n_tokens = len(token_ids(tokenizer, row["prompt"][-1]["content"]))
        if n_tokens < min_prompt_tokens:
            raise UnusableRow(
                "too_short",
                f"{where}: {n_tokens} tokens; min_prompt_tokens is {min_prompt_tokens}",
            )


def check_needs_no_template(where, row):
    """Raise UnusableRow for a row with tools or other arguments of a chat template."""
    if template_columns(where, row):
        raise UnusableRow(
            "for_template",
            f"{where}: tools and chat_template_kwargs are for the chat template, "
            "which --engine=openai leaves to the server",
        )


def count_prompts(rows, dropped):
    """Counts of the manifest: the prompts of this process, and those that were dropped of all."""
    counts = {"prompts": len(rows), "control_text": 0, "too_long": 0, "too_short": 0}
    if RANK == 0:  # every process reads all prompts; the first counts for all
        counts.update(dropped.counts)
    return counts


def take_share(pool):
    """This process's share of the iteration's prompts; none comes twice before all were used."""
    if n_prompts:
        # one order for the whole run; an iteration starts where the one before has ended
        random.Random(seed).shuffle(pool)
        start = max(iteration - 1, 0) * n_prompts
        stop = start + min(n_prompts, len(pool))
        pool = [pool[k % len(pool)] for k in range(start, stop)]
    return pool[RANK::WORLD_SIZE]


# ---- the engine ----


def start_engine(eos_ids, max_tokens):
    """The function that samples from the policy; max_tokens: of prompt and response together."""
    return load_engine(
        engine,
        model,
        eos_ids,
        max_tokens,
        dtype=dtype,
        seed=seed,
        tensor_parallel=tensor_parallel,
        gpu_memory=gpu_memory,
        generate_rows=generate_rows,
    )


def sample_block(rows, sample, tokenizer):
    """Prompts with n_responses each, by an engine here."""
    requests = []
    for row in rows:
        # the seed depends on nothing that was computed before, so a restart repeats itself
        requests.append((row["prompt_ids"], derive_seed(seed, iteration, row["id"])))

    sampled = sample(
        requests,
        n_responses=n_responses,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
    )

    # fields of the prompt that are not ours travel along
    records = []
    for row, drawn in zip(rows, sampled):
        responses = []
        for ids, finished, logp in drawn:
            response = response_record(tokenizer, row["prompt_ids"], ids, finished, logp)
            responses.append(response)
        records.append(row | {"responses": responses})
    return records


# ---- the tasks ----


def make_candidates(manifest):
    """n_responses to each prompt, from an engine here."""
    # prompts that leave room for max_new_tokens
    tokenizer, eos_ids = load_tokenizer(model)
    limit = context_length(model)
    room = limit - max_new_tokens
    control = control_pattern(tokenizer)
    arguments = template_arguments(template_kwargs, date)
    pool, dropped = read_pool(add_prompt_ids, tokenizer, control, room, arguments)
    rows = take_share(pool)

    # responses, block by block
    sample = None
    if rows:  # there may be more processes than prompts
        sample = start_engine(eos_ids, min(max_prompt_tokens + max_new_tokens, limit))
    counts = count_prompts(rows, dropped)

    def respond(block_of_rows):
        return sample_block(block_of_rows, sample, tokenizer)

    def count(records):
        return count_and_print(out, counts, records)

    write_blocks(out, manifest, rows, block, respond, count)


def make_candidates_by_endpoint(manifest):
    """n_responses to each prompt, as text. None is too long here: the server knows its limits."""
    pool, dropped = read_pool(check_needs_no_template)
    rows = take_share(pool)
    for row in rows:
        row.pop("prompt_ids", None)  # they would be another model's

    counts = count_prompts(rows, dropped)

    def respond(block_of_rows):
        return ask_for_responses(
            block_of_rows,
            out,
            model=model,
            url=engine_url,
            n_responses=n_responses,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
        )

    def count(records):
        return count_and_print(out, counts, records)

    write_blocks(out, manifest, rows, block, respond, count)


def make_instructions(manifest):
    """n_prompts new prompts, written by the policy after the pool's."""
    tokenizer, eos_ids = load_tokenizer(model)
    control = control_pattern(tokenizer)
    arguments = template_arguments(template_kwargs, date)
    pool, _ = read_pool(add_prompt_ids, tokenizer, control, max_prompt_tokens, arguments)

    def start(max_tokens):
        return start_engine(eos_ids, max_tokens)

    write_instructions(pool, manifest, tokenizer, start, SimpleNamespace(**config))


def make_answers(manifest):
    """One answer to each turn of each prompt."""
    tokenizer, eos_ids = load_tokenizer(model)

    def start(max_tokens):
        return start_engine(eos_ids, max_tokens)

    write_answers(manifest, tokenizer, start, SimpleNamespace(**config))


TASKS = {
    "candidates": make_candidates,
    "instructions": make_instructions,
    "answers": make_answers,
}


def check_settings():
    """Raise InputError for settings that make no sense, before anything is read."""
    if task not in TASKS:
        raise InputError(f"--task={task}: there are {', '.join(TASKS)}")
    for key in ("n_responses", "max_new_tokens", "block", "generate_rows", "instruction_examples"):
        if config[key] < 1:
            raise InputError(f"--{key}={config[key]}: has to be 1 at least")
    template_arguments(template_kwargs, date)

    # of new instructions
    if task == "instructions" and not n_prompts:
        raise InputError("--n_prompts is not set: how many instructions to write")
    if task == "instructions":
        compile_unfit(instruction_unfit)
    if not 0 <= instruction_similarity <= 1:
        raise InputError(
            f"--instruction_similarity={instruction_similarity}: has to be between 0 and 1"
        )

    # of an endpoint
    if engine == "openai" and (task != "candidates" or not engine_url):
        raise InputError("--engine=openai: writes candidates, wants --engine_url")
    if engine == "openai" and template_kwargs:
        raise InputError("--template_kwargs: --engine=openai leaves the template to the server")


def main():
    check_settings()
    make = TASKS[task]
    if engine == "openai":
        make = make_candidates_by_endpoint
    manifest = open_stage(out, ".jsonl", config, "model", "prompts")
    if manifest is not None:  # else the file is complete
        make(manifest)

    if task == "answers":  # for a complete file too, as a kill may come between it and these
        name = answer_name or os.path.basename(model.rstrip("/"))
        write_official_files(out, name)


if __name__ == "__main__":
    run_script(main)
