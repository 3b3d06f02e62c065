"""Does train.py stay as fast and small with more pairs, and with two processes for two threads?

    python bench/scaling.py

Tokens a second over the reference pass and all steps and peak memory, for 1,000, 10,000 and 50,000
pairs of a tiny model; then 20M parameters on one process with two threads and on two processes with
one.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "tests"))

NUMBERS_OF_PAIRS = (1_000, 10_000, 50_000)
SHAPE = dict(  # 20M parameters
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def train(folder, processes=1, threads=1, **settings):
    """(tokens a second, GiB at the peak of one process) of a run of train.py."""
    out = os.path.join(tempfile.mkdtemp(dir=folder), "policy")
    settings = {
        "out": out,
        "loss": "dpo",
        "dtype": "float32",
        "recompute": 0,
        "checkpoint_every": 0,
        "gather_chunk": 256,
        **settings,
    }
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command.append(os.path.join(HERE, "..", "train.py"))
    command += [f"--{key}={value}" for key, value in settings.items()]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)

    with open(f"{out}/metrics.jsonl") as f:
        steps = [json.loads(line) for line in f]
    seconds = float(re.search(r"reference log-probs in ([\d.]+) s", done.stdout)[1])
    seconds += sum(r["seconds"] for r in steps)
    n_tokens = sum(r["tokens"] for r in steps)
    return n_tokens / seconds, max(r["memory_gib"] for r in steps)


def write_random_pairs(path, n, rng):
    """n pairs of random ids, responses of 8 to 40 tokens."""
    with open(path, "w") as f:
        for _ in range(n):
            pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
            n_tokens = (8, rng.randint(8, 40), rng.randint(8, 40))
            for key, k in zip(("prompt_ids", "chosen_ids", "rejected_ids"), n_tokens):
                pair[key] = rng.choices(range(6, 262), k=k)
            f.write(json.dumps(pair) + "\n")


def more_pairs(folder):
    """A tiny model with more and more pairs."""
    from conftest import build_model

    model = f"{folder}/tiny"
    build_model(model)
    rng = random.Random(0)
    for n in NUMBERS_OF_PAIRS:
        path = f"{folder}/{n}.jsonl"
        write_random_pairs(path, n, rng)
        rate, memory = train(folder, model=model, pairs=path, batch_size=100)
        print(f"{n:6,} pairs  {rate:8,.0f} tok/s  {memory:.3f} GiB", flush=True)


def two_processes(folder, rounds=2):
    """The same two cores as two threads and as two processes."""
    bench_train = os.path.join(HERE, "train.py")
    make = [sys.executable, bench_train, "--make", folder, json.dumps(SHAPE), "32"]
    subprocess.run(make, check=True)
    settings = {"model": f"{folder}/model", "pairs": f"{folder}/pairs.jsonl"}
    settings |= {"batch_size": 8, "tokens_per_microbatch": 2048}
    for _ in range(rounds):
        for processes, threads in ((1, 2), (2, 1)):
            rate, memory = train(folder, processes, threads, **settings)
            print(
                f"20M parameters, {processes} process(es) with {threads} thread(s)  "
                f"{rate:8,.0f} tok/s  {memory:.2f} GiB each",
                flush=True,
            )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        more_pairs(folder)
        two_processes(folder)
