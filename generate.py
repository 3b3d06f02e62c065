"""Sample candidate responses from a policy: prompts -> candidates.

    python generate.py config/aipo_nemo.py --model=MODEL --prompts=prompts.jsonl --out=candidates.jsonl
    torchrun --nproc-per-node=8 generate.py ...            8 GPUs, 8 engines, each its share of the prompts, 8 shards

Tokens in, tokens out: the engine gets the ids of the rendered prompt and its ids are what training will see. Prompts that
are too long or spell a control token are dropped and counted in the manifest.
"""
import random
import sys

from configurator import configure
from data import RANK, WORLD_SIZE, begin, control_text, derive_seed, load_tokenizer, read_prompts, render, writing
from engines import load_engine

# ---- settings ----
model = ""                              # policy: Hugging Face folder or hub name
prompts = ""                            # JSONL, a JSON array, or NAME:SPLIT of a Hugging Face dataset
prompt_field = ""                       # column of the prompt; empty: the first of prompt, messages, instruction
n_prompts = 0                           # prompts to take, others at every iteration until all are used up; 0: all
iteration = 0                           # t; chooses the prompts and enters the seeds
out = ""                                # candidates file to write (JSONL)
engine = "auto"                         # vllm, transformers, or auto: vllm where it is installed
n_responses = 5                         # responses per prompt (AIPO: N = 5)
temperature = 0.4                       # 0 is greedy (AIPO's repository: 0.4)
top_k = 50                              # 0: off (AIPO's repository: 50)
top_p = 1.0                             # nucleus
max_new_tokens = 2048                   # longest response, end token included
max_prompt_tokens = 512                 # longer prompts are dropped, template included (AIPO: 512)
dtype = "bfloat16"                      # of the computation; float32 on CPUs
seed = 0                                # of the run
generate_rows = 512                     # responses sampled at once (transformers)
tensor_parallel = 1                     # GPUs per engine (vllm)
gpu_memory = 0.9                        # share of a GPU's memory the engine may take (vllm)
config = configure(globals())


def main():
    manifest = begin(out, ".jsonl", config, "model", "prompts")
    if manifest is None:
        return
    tokenizer, ends = load_tokenizer(model)
    control = control_text(tokenizer)
    counts, pool = {"prompts": 0, "control_text": 0, "too_long": 0}, []
    for row in read_prompts(prompts, prompt_field):
        if any(control.search(m["content"]) for m in row["prompt"]):
            counts["control_text"] += 1
            continue
        row["prompt_ids"] = render(tokenizer, row["prompt"], f"{prompts}: prompt '{row['id']}'")
        if len(row["prompt_ids"]) > max_prompt_tokens:
            counts["too_long"] += 1
            continue
        pool.append(row)
    pool or sys.exit(f"{prompts}: no prompt is left ({counts['control_text']} with control text, {counts['too_long']} above max_prompt_tokens)")
    if n_prompts:
        random.Random(seed).shuffle(pool)
        first = max(iteration - 1, 0) * n_prompts
        pool = [pool[k % len(pool)] for k in range(first, first + min(n_prompts, len(pool)))]
    counts["prompts"], rows = len(pool), pool[RANK::WORLD_SIZE]

    requests = [(row["prompt_ids"], derive_seed(seed, iteration, row["id"])) for row in rows]
    responses = []
    if requests:                                                        # fewer prompts than processes
        sample = load_engine(engine, model, ends, max_prompt_tokens + max_new_tokens, config)
        responses = sample(requests, n_responses=n_responses, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens)
    with writing(out, manifest) as write:
        for row, sampled in zip(rows, responses):
            write(row | {"responses": [
                {"text": tokenizer.decode(ids, skip_special_tokens=True), "ids": ids, "finished": finished, "logp": logp}
                for ids, finished, logp in sampled]})
        lengths = [len(ids) for sampled in responses for ids, *_ in sampled]
        counts |= {"responses": len(lengths), "tokens": sum(lengths), "finished": sum(f for s in responses for _, f, _ in s)}
        manifest["counts"] = counts
    print(f"{len(rows)} prompts, {len(lengths)} responses of {sum(lengths) / max(1, len(lengths)):.1f} tokens,",
          f"{counts['finished'] / max(1, len(lengths)):.0%} finished -> {out}")


if __name__ == "__main__":
    main()
