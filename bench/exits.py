"""Do runs of train.py with two processes always end with exit code 0, however slow the machine?

    python bench/exits.py [--runs=100] [--load=2]

gloo once aborted a process in so many that ended while its peer was still at work (see
stop_processes in nanoaipo/processes.py). Here two processes train a tiny model on a CPU for two
steps, again and again, while `load` others keep the cores busy. They are forks of this process, so
that a run takes a second and not ten. The last line counts the exit codes; the bench ends with 1 if
there are others than 0.
"""

import argparse
import collections
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "loss": "dpo",
    "dtype": "float32",
    "recompute": 0,
    "batch_size": 8,
    "checkpoint_every": 1,
    "gather_chunk": 256,
}


def import_everything():
    """Import what train.py does, but for our own modules, which read their rank when imported."""
    import peft  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


def fork_train(rank, port, folder, log):
    """Start one of two processes of train.py; its number."""
    pid = os.fork()
    if pid:
        return pid

    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    settings = SETTINGS | {"model": f"{folder}/model", "pairs": f"{folder}/pairs.jsonl"}
    settings["out"] = f"{folder}/policy"
    sys.argv = ["train.py", *(f"--{key}={value}" for key, value in settings.items())]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    sys.exit()  # as a script ends: with Python's finalization


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def run_once(folder):
    """The exit codes of the two processes of a run; minus the signal where one ended them."""
    with open(f"{folder}/log", "w") as log:
        port = free_port()
        pids = [fork_train(rank, port, folder, log) for rank in (0, 1)]
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    shutil.rmtree(f"{folder}/policy", ignore_errors=True)
    shutil.rmtree(f"{folder}/policy.tmp", ignore_errors=True)
    return [os.waitstatus_to_exitcode(status) for status in statuses]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--load", type=int, default=2)
    args = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT))
    keep_busy = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(keep_busy) for _ in range(args.load)]
    import_everything()

    # no `with` around the runs: a fork that ends would leave it, too
    folder = tempfile.mkdtemp()
    make = f"from conftest import *; build_model('{folder}/model')"
    make += f"; write_pairs('{folder}/pairs.jsonl', 16)"
    subprocess.run([sys.executable, "-c", make], cwd=ROOT / "tests", check=True)

    counts = collections.Counter()
    begun = time.time()
    for run in range(1, args.runs + 1):
        codes = run_once(folder)
        counts.update(codes)
        if any(codes):
            print(f"run {run}: exit codes {codes}", Path(f"{folder}/log").read_text(), flush=True)
    seconds = time.time() - begun
    for process in busy:
        process.kill()
    shutil.rmtree(folder)

    load = os.getloadavg()[0]
    print(
        f"{args.runs} runs of two processes in {seconds:.0f} s, load average {load:.1f}: "
        f"exit codes {dict(counts)}"
    )
    sys.exit(int(set(counts) != {0}))


if __name__ == "__main__":
    main()
