"""vLLM in a process of its own, because it takes none in which the GPU is used already.

    python -m bench.gpu.engine JOB.json RESULTS.json

sample_by_vllm writes the job, starts this and reads the results. No page that touches the device is
imported here.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from bench.gpu.report import Skip
from bench.gpu.scripts import ROOT
from nanoaipo.chat import load_tokenizer
from nanoaipo.engines import load_engine


def sample_by_vllm(model, calls, dtype):
    """(Seconds of loading, a list with (results, seconds) of each call) of vLLM.

    calls: a list of (requests, settings), as nanoaipo.engines has them. Raises Skip where there is
    no vLLM that could run, RuntimeError if it fails.
    """
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vllm is not installed")
    if torch.version.cuda and not torch.cuda.is_available():
        raise Skip("this build of vllm is for a GPU")

    folder = tempfile.mkdtemp()
    job = os.path.join(folder, "job.json")
    results = os.path.join(folder, "results.json")
    with open(job, "w", encoding="utf-8") as f:
        json.dump({"model": model, "dtype": dtype, "calls": calls}, f)

    command = [sys.executable, "-m", "bench.gpu.engine", job, results]
    status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
    if status != 0:
        raise RuntimeError(f"vLLM ended with status {status}, see log.txt")
    with open(results, encoding="utf-8") as f:
        answer = json.load(f)
    return answer["loading"], answer["calls"]


def main():
    job_path, results_path = sys.argv[1:]
    with open(job_path, encoding="utf-8") as f:
        job = json.load(f)
    _, eos_ids = load_tokenizer(job["model"])

    t0 = time.time()
    sample = load_engine(
        "vllm",
        job["model"],
        eos_ids,
        512,
        dtype=job["dtype"],
        seed=0,
        tensor_parallel=1,
        gpu_memory=0.5,  # the process that waits holds some of it
        generate_rows=1,
    )
    answer = {"loading": time.time() - t0, "calls": []}

    for requests, settings in job["calls"]:
        t0 = time.time()
        results = sample(requests, **settings)
        answer["calls"].append((results, time.time() - t0))
    with open(results_path, "w", encoding="utf-8") as f:
        json.dump(answer, f)


if __name__ == "__main__":
    main()
