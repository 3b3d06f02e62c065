"""Check every path on a GPU against one that is known to be right, then measure: bench/gpu.sh.

This page is the driver. It starts a worker (worker.py), which runs one check after another. A check
that crashes, hangs or loses the device ends its worker, and another one takes the checks behind it.
The checks are functions in the other pages, one page for each part of the project:

    log_probs.py  attention.py  policy.py  training.py  ranking.py  sampling.py  speed.py
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

from bench.gpu.report import line, markdown, write_down
from bench.gpu.scripts import ROOT

BUDGET = 465  # seconds; a check for which too few are left is skipped

# fmt: off
# in this order, so what comes last is skipped first; seconds that each takes on one H100
CHECKS = {
    "log_probs.softmax_in_place":       2,
    "log_probs.gather":                 4,
    "log_probs.segments":               1,
    "attention.without_cudnn":          1,
    "attention.take":                   1,
    "attention.varlen":                 2,
    "policy.float32":                   4,
    "policy.bfloat16":                  6,
    "policy.without_pairs":             1,
    "policy.checkpoint":                2,
    "policy.saved":                     3,
    "ranking.pairrm":                   20,
    "ranking.reward_model":             2,
    "sampling.transformers_engine":     4,
    "sampling.generate":                20,
    "sampling.vllm":                    70,
    "training.steps":                   36,
    "training.resume":                  60,
    "speed.card":                       2,
    "speed.pairrm":                     25,
    "speed.train":                      30,
    "speed.train_compiled":             65,
    "speed.train_kept":                 60,
    "speed.gather":                     5,
    "speed.generate":                   12,
    "speed.micro_batch":                95,
    "speed.recompute":                  30,
    "speed.vllm":                       90,
}
# fmt: on


# ---------------------------------------------------------------------------- workers


def run_checks(checks, out, budget, dry):
    """Run the checks {dotted name of a function: seconds} in workers; a record for each.

    out: folder of results.jsonl and log.txt. dry: hide the GPUs from the workers.
    """
    results = os.path.join(out, "results.jsonl")
    open(results, "w").close()
    deadline = time.time() + budget
    records = []
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(out, "log.txt"), "w") as log:
        env = os.environ | {"TMPDIR": folder}  # models, checkpoints, compiled kernels
        if dry:
            env["CUDA_VISIBLE_DEVICES"] = ""
        while len(records) < len(checks):
            names = list(checks)[len(records) :]
            arguments = [f"{name}={checks[name]}" for name in names]
            status = run_worker([results, str(deadline), *arguments], env, log)
            records = read_results(results)

            # a worker that fails has written nothing about the check that it was at
            if status != 0 and len(records) < len(checks):
                record = {"name": list(checks)[len(records)], "status": "FAIL", "seconds": 0}
                record["reason"] = f"its process ended with status {status}, see log.txt"
                if status == 1:
                    record["reason"] += " (it took too long)"
                write_down(record, results)
                records.append(record)
    return records


def run_worker(arguments, env, log):
    """Run a worker to its end; its exit status. What it leaves running is ended too."""
    command = [sys.executable, "-m", "bench.gpu.worker", *arguments]
    worker = subprocess.Popen(command, cwd=ROOT, env=env, stderr=log, start_new_session=True)
    try:
        return worker.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)  # the session that was started for it
        worker.wait()


def read_results(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(text) for text in f]


# ---------------------------------------------------------------------------- the machine


def environment():
    """{what: text} of the card and the versions, without touching the card."""
    import torch

    from nanoaipo.stages import commit, version

    described = {"commit": os.environ.get("COMMIT") or commit() or "unknown"}
    described["card"] = nvidia_smi("name") or "none"
    if described["card"] != "none":
        described["driver"] = nvidia_smi("driver_version")
        described["power limit"] = nvidia_smi("power.limit")
        described["memory"] = nvidia_smi("memory.total")
        described["CUDA"] = torch.version.cuda or "none"
        described["cuDNN"] = str(torch.backends.cudnn.version())
    described["CPUs"] = str(os.cpu_count())
    described["python"] = sys.version.split()[0]
    for package in ("torch", "transformers", "peft", "triton", "vllm"):
        described[package] = version(package) or "none"
    return described


def nvidia_smi(field):
    """A field of the first GPU as nvidia-smi prints it, "" without one."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    if done.returncode != 0:
        return ""
    return done.stdout.strip()


# ---------------------------------------------------------------------------- the command


def choose(only):
    """The checks {name: seconds} of these pages or names, comma-separated; of "" all."""
    wanted = [part for part in only.split(",") if part]
    pages = [name.split(".")[0] for name in CHECKS]
    for part in wanted:
        if part not in CHECKS and part not in pages:
            sys.exit(f"--only={part}: there are {', '.join(CHECKS)}")

    chosen = {}
    for name, seconds in CHECKS.items():
        if not wanted or name in wanted or name.split(".")[0] in wanted:
            chosen[name] = seconds
    return chosen


def main():
    parser = argparse.ArgumentParser(prog="bash bench/gpu.sh")
    parser.add_argument("--only", default="", help="pages or checks, comma-separated")
    parser.add_argument("--dry", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--out", default="out/gpu", help="folder of what it writes")
    arguments = parser.parse_args()

    checks = {f"bench.gpu.{name}": seconds for name, seconds in choose(arguments.only).items()}
    budget = BUDGET
    if arguments.dry:
        checks = dict.fromkeys(checks, 100)  # a CPU may take its time
        budget = 3600

    described = environment()
    if not arguments.dry and described["card"] == "none":
        sys.exit("no GPU here: --dry runs at tiny sizes on a CPU")
    for what, text in described.items():
        print(f"{what:12} {text}", flush=True)

    out = os.path.abspath(arguments.out)
    os.makedirs(out, exist_ok=True)
    t0 = time.time()
    records = run_checks(checks, out, budget, arguments.dry)

    print(f"\n{time.time() - t0:.0f} s in all")
    for record in records:
        print(line(record)[:100])
    table = os.path.join(out, "results.md")
    with open(table, "w", encoding="utf-8") as f:
        f.write(markdown(described, records, arguments.dry))
    print(f"-> {table}")
    if any(record["status"] == "FAIL" for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
