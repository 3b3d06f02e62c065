"""generate.py against the bare engine: the same vLLM, prompts, seeds and settings.

    python bench/generate.py          the embedded world's base model (tiny/prepare.py), any vLLM
    python bench/generate.py --prompts=1000 --rounds=3 --model=MODEL --max_new_tokens=2048 \\
                             --dtype=bfloat16 --block=512

Prints tokens per second after start-up, the two sides alternating, each in a process of its own.
Bare is one llm.generate call on ids, whose outputs are dropped. Ours is counted from the loaded
engine to the finished file: requests, ids to text, records, and, with fewer prompts in a block than
there are, the gaps between blocks too.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

settings = {
    "prompts": "1000",
    "rounds": "3",
    "model": os.path.join(ROOT, "tiny/world/base"),
    "max_new_tokens": "64",
    "dtype": "float32",
    "block": "2048",
}
for argument in sys.argv[1:]:
    key, equals, value = argument.lstrip("-").partition("=")
    if equals:
        settings[key] = value


def load_generate(folder):
    """generate.py as a module, with the settings of this comparison."""
    import generate

    own = {
        "model": settings["model"],
        "prompts": f"{folder}/prompts.jsonl",
        "out": f"{folder}/ours.jsonl",
        "engine": "vllm",
        "n_responses": 5,
        "temperature": 1.0,
        "max_new_tokens": int(settings["max_new_tokens"]),
        "dtype": settings["dtype"],
        "block": int(settings["block"]),
    }
    vars(generate).update(own)
    generate.config.update(own)
    return generate


def ours(folder):
    """(Seconds, tokens) of generate.py, from the loaded engine to the finished file."""
    from nanoaipo.files import read_records

    generate = load_generate(folder)
    load_engine = generate.load_engine
    t0 = None

    def load_and_start_clock(*args, **kwargs):
        nonlocal t0
        sample = load_engine(*args, **kwargs)
        t0 = time.perf_counter()
        return sample

    generate.load_engine = load_and_start_clock
    generate.main()
    seconds = time.perf_counter() - t0

    n_tokens = 0
    for _, row in read_records(generate.out):
        for response in row["responses"]:
            n_tokens += len(response["ids"])
    return seconds, n_tokens


def bare(folder):
    """(Seconds, tokens) of one llm.generate call on the same requests."""
    from nanoaipo.engines import start_vllm
    from nanoaipo.seeds import derive_seed

    generate = load_generate(folder)
    tokenizer, eos_ids = generate.load_tokenizer(generate.model)
    rows, _ = generate.read_pool(tokenizer, generate.max_prompt_tokens, {})
    llm = start_vllm(
        generate.model,
        generate.max_prompt_tokens + generate.max_new_tokens,
        dtype=generate.dtype,
        seed=generate.seed,
        tensor_parallel=generate.tensor_parallel,
        gpu_memory=generate.gpu_memory,
    )
    from vllm import SamplingParams

    prompts = []
    params = []
    for row in rows:
        prompts.append({"prompt_token_ids": row["prompt_ids"]})
        params.append(
            SamplingParams(
                n=generate.n_responses,
                temperature=generate.temperature,
                top_k=generate.top_k,
                top_p=generate.top_p,
                max_tokens=generate.max_new_tokens,
                seed=derive_seed(generate.seed, generate.iteration, row["id"]),
                logprobs=0,
                stop_token_ids=sorted(eos_ids),
                detokenize=False,
            )
        )

    t0 = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - t0

    n_tokens = 0
    for output in outputs:
        for response in output.outputs:
            n_tokens += len(response.token_ids)
    return seconds, n_tokens


SIDES = {"ours": ours, "bare": bare}


def run_side(name):
    """(Seconds, tokens) of a side in a process of its own, on the first of the world's prompts."""
    n_prompts = int(settings["prompts"])
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(ROOT, "tiny/world/prompts.jsonl")) as f:
            lines = f.readlines()[:n_prompts]
        with open(f"{folder}/prompts.jsonl", "w") as f:
            f.writelines(lines)

        command = [sys.executable, __file__, "--side", name, folder]
        command += [f"--{key}={value}" for key, value in settings.items()]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    best = dict.fromkeys(SIDES, 0)
    for n in range(int(settings["rounds"])):
        # alternate who comes first
        names = ("ours", "bare") if n % 2 else ("bare", "ours")
        for name in names:
            seconds, n_tokens = run_side(name)
            rate = n_tokens / seconds
            print(f"round {n + 1} {name}: {n_tokens} tokens, {rate:.0f} tokens/s", flush=True)
            best[name] = max(rate, best[name])
    share = best["ours"] / best["bare"]
    print(f"{best['ours']:.0f} against {best['bare']:.0f} tokens/s, {share:.1%} of the bare engine")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        name, folder = sys.argv[2:4]
        print(json.dumps(SIDES[name](folder)), flush=True)
    else:
        main()
