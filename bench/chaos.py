"""Does a run that is killed again and again come to the same bytes?

    python bench/chaos.py [--kills=50] [--seed=0] [--processes=1]

A small run of two iterations on the embedded world is made once undisturbed, and measured. Then it
is started and killed at random moments, by SIGKILL and SIGTERM, sent to all its processes or to the
shell alone, until it is done; and so again, until the kills are used up. Every start has to go on
or to end the run. Prompts, candidates, pairs, weights and scores have to have the bytes of the
undisturbed run, and nothing else may be left. The last line says so; else the exit code is 1.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--n_prompts=32",
    "--n_responses=3",
    "--iterations=2",
    "--n_eval=16",
    "--max_new_tokens=24",
    "--batch_size=8",
    "--block=8",
    "--checkpoint_every=1",
)
WAYS = (
    (signal.SIGKILL, "all"),
    (signal.SIGTERM, "all"),
    (signal.SIGKILL, "the shell"),
    (signal.SIGTERM, "the shell"),
)


def start(out, processes):
    """Start the run, in a process group of its own; OUT.log gets what it prints."""
    env = os.environ | {
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
        "VIRTUAL_ENV": sys.prefix,
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", "iterate.sh", "config/tiny.py", f"--out={out}", *SMALL]
    with open(f"{out}.log", "w") as log:
        return subprocess.Popen(
            [*command, f"--processes={processes}"],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def artefacts(out):
    """{path in the run: hash} of all that an iteration leaves, but for logs of times."""
    found = {}
    for path in sorted(Path(out).glob("iter_*/**/*")):
        if path.is_dir():
            continue
        digest = ""
        is_result = path.suffix in (".jsonl", ".safetensors") or path.name == "eval.json"
        if is_result and path.name != "metrics.jsonl":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(out))] = digest
    return found


def is_done(process, out):
    """Whether the run, which has ended, is complete; if it failed the program ends, too."""
    if process.returncode == 0:
        return True
    text = Path(f"{out}.log").read_text()
    if "locked by process" in text:  # what outlived the shell is still at work
        time.sleep(1)
        return False
    sys.exit(f"exit code {process.returncode}\n{text}")


def kill(process, number, whom):
    """Send the signal, and wait until the shell is gone."""
    if whom == "all":
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        out = f"{folder}/undisturbed"
        process = start(out, args.processes)
        process.wait()
        is_done(process, out)
        seconds = time.time() - begun
        expected = artefacts(out)
        print(f"undisturbed: {seconds:.0f} s, {len(expected)} files", flush=True)

        n_kills = 0
        n_runs = 0
        while n_kills < args.kills:
            out = f"{folder}/killed"
            done = False
            while not done:
                process = start(out, args.processes)
                delay = rng.uniform(0, seconds / 3)
                number, whom = WAYS[n_kills % len(WAYS)]
                try:
                    process.wait(delay if n_kills < args.kills else None)
                    done = is_done(process, out)
                except subprocess.TimeoutExpired:
                    kill(process, number, whom)
                    n_kills += 1
                    there = len(artefacts(out))
                    print(f"{n_kills}: {number.name} to {whom} at {delay:.1f} s, {there} files")
                    sys.stdout.flush()

            # the same files with the same bytes, and no other
            n_runs += 1
            found = artefacts(out)
            for name in sorted(expected.keys() | found.keys()):
                if expected.get(name) != found.get(name):
                    sys.exit(f"{name}: {found.get(name)}, undisturbed {expected.get(name)}")
            shutil.rmtree(out)
            print(f"run {n_runs}: the same {len(found)} files", flush=True)
    print(f"{n_kills} kills, {n_runs} runs, all with the bytes of the undisturbed one")


if __name__ == "__main__":
    main()
