"""Does train.py stay as fast and as small when there are more pairs, and with two processes instead of two threads?

    python bench/scaling.py

Tokens a second over the reference pass and all steps and peak memory, for 1,000, 10,000 and 50,000 pairs of a tiny model; then 20M parameters on
one process with two threads and on two processes with one.
"""
import json
import os
import random
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))
HERE = os.path.dirname(os.path.abspath(__file__))


def train(folder, processes=1, threads=1, **settings):
    """(tokens a second, GiB at the peak of one process) of a run of train.py."""
    out = tempfile.mkdtemp(dir=folder)
    settings = {"out": f"{out}/policy", "loss": "dpo", "dtype": "float32", "recompute": False, "checkpoint_every": 0, "gather_chunk": 256, **settings}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *launcher, os.path.join(HERE, "..", "train.py"), *(f"--{k}={v}" for k, v in settings.items())],
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    done.returncode == 0 or sys.exit(done.stdout + done.stderr)
    steps = [json.loads(line) for line in open(f"{out}/policy/metrics.jsonl")]
    seconds = float(re.search(r"reference log-probs in ([\d.]+) s", done.stdout)[1]) + sum(r["seconds"] for r in steps)
    return sum(r["tokens"] for r in steps) / seconds, max(r["memory_gib"] for r in steps)


if __name__ == "__main__":
    from conftest import build_model
    with tempfile.TemporaryDirectory() as folder:
        build_model(f"{folder}/tiny")
        draw = random.Random(0)
        for n in (1_000, 10_000, 50_000):
            with open(f"{folder}/{n}.jsonl", "w") as f:
                for _ in range(n):
                    ids = [draw.choices(range(6, 262), k=k) for k in (8, draw.randint(8, 40), draw.randint(8, 40))]
                    f.write(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r", **dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids))}) + "\n")
            rate, memory = train(folder, model=f"{folder}/tiny", pairs=f"{folder}/{n}.jsonl", batch_size=100)
            print(f"{n:6,} pairs  {rate:8,.0f} tok/s  {memory:.3f} GiB", flush=True)
        shape = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True)
        subprocess.run([sys.executable, os.path.join(HERE, "train.py"), "--make", folder, json.dumps(shape), "32"], check=True)
        for _ in range(2):
            for processes, threads in ((1, 2), (2, 1)):
                rate, memory = train(folder, processes, threads, model=f"{folder}/model", pairs=f"{folder}/pairs.jsonl", batch_size=8, tokens_per_microbatch=2048)
                print(f"20M parameters, {processes} process(es) with {threads} thread(s)  {rate:8,.0f} tok/s  {memory:.2f} GiB each", flush=True)
