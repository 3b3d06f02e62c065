"""train.py itself on this device, started as its users start it, on a small model."""

import json
import os

import torch
from safetensors.torch import load_file

from bench.gpu.device import ON_GPU, apart
from bench.gpu.models import worded
from bench.gpu.scripts import Run

# ---------------------------------------------------------------------------- runs


def start_training(folder, on_cpu=False, **settings):
    """A run of train.py on the model and the pairs in this folder (of models.worded)."""
    data = {"model": f"{folder}/model", "pairs": f"{folder}/pairs.jsonl"}
    return Run("train.py", "policy", on_cpu, **data, **settings)


def steps_of(run):
    """The records in a run's metrics.jsonl, of all steps that it has finished so far."""
    for folder in (run.out, f"{run.out}.tmp"):
        path = f"{folder}/metrics.jsonl"
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                return [json.loads(line) for line in f if line.endswith("\n")]
    return []


def weights_of(run):
    """What a run has saved: {name: tensor}."""
    return load_file(f"{run.out}/model.safetensors")


def compare_steps(report, name, run, other, limit, norm_limit):
    """Note how far losses and norms of gradients of two runs are apart, step by step.

    Norms relative to the other's, losses too where those are above 1.
    """
    for step, exact in zip(steps_of(run), steps_of(other)):
        difference = abs(step["loss"] - exact["loss"]) / max(1, abs(exact["loss"]))
        report.below(f"{name} losses", difference, limit)
        norm_difference = abs(step["grad_norm"] / exact["grad_norm"] - 1)
        report.below(f"{name} norms of gradients", norm_difference, norm_limit)


# ---------------------------------------------------------------------------- checks


def steps(report):
    """Steps of AIPO, and of adapters with WPO, against the same in float32 on the CPU."""
    settings = dict(
        loss="aipo",
        lr=1e-4,
        batch_size=4,
        tokens_per_microbatch=2048,
        gather_chunk=512,
        checkpoint_every=0,
    )
    folder = worded()

    # all at once, because starting takes longest
    on_cpu = start_training(folder, on_cpu=True, dtype="float32", **settings)
    bfloat16 = start_training(folder, dtype="bfloat16", **settings)
    compared = {"bfloat16": (bfloat16, on_cpu)}
    if ON_GPU:
        compared["float32"] = (start_training(folder, dtype="float32", **settings), on_cpu)
        settings |= {"lora_rank": 4, "wpo": True}
        compared["adapters"] = (
            start_training(folder, dtype="bfloat16", **settings),
            start_training(folder, on_cpu=True, dtype="float32", **settings),
        )
    for run, exact in compared.values():
        run.wait()
        exact.wait()

    for name, (run, exact) in compared.items():
        report.holds("each has all its steps", len(steps_of(run)) == len(steps_of(exact)) > 0)
        if name == "float32":
            compare_steps(report, name, run, exact, limit=2e-3, norm_limit=1e-2)
        else:
            compare_steps(report, name, run, exact, limit=3e-2, norm_limit=1e-1)

    saved = weights_of(bfloat16).values()
    report.holds("bfloat16 is saved", all(tensor.dtype == torch.bfloat16 for tensor in saved))
    report.holds("what is saved is finite", all(tensor.isfinite().all() for tensor in saved))


def resume(report):
    """A run that is killed behind a checkpoint and started again ends as one left alone."""
    settings = dict(
        dtype="bfloat16",
        loss="dpo",
        lr=1e-4,
        epochs=4,
        batch_size=4,
        tokens_per_microbatch=2048,
        gather_chunk=512,
        checkpoint_every=1,
    )
    folder = worded()
    killed = start_training(folder, **settings)
    undisturbed = start_training(folder, **settings)
    killed.wait_for(lambda: os.path.exists(f"{killed.out}.tmp/step_000004"))
    killed.kill()
    n_before = len(steps_of(killed))
    killed.start()
    killed.wait()
    undisturbed.wait()

    n_steps = len(steps_of(undisturbed))
    report.holds("it was killed within the run", 0 < n_before < n_steps)
    report.holds("it went on from a checkpoint", "going on from" in killed.log())
    report.holds("it has all steps once", len(steps_of(killed)) == n_steps)

    # the same bits on a CPU; on a GPU some gradients are added up in any order
    for step, other in zip(steps_of(killed), steps_of(undisturbed)):
        report.below("losses", abs(step["loss"] - other["loss"]), 5e-2)
    start = load_file(f"{folder}/model/model.safetensors")
    ours = movement(weights_of(killed), start)
    theirs = movement(weights_of(undisturbed), start)
    report.below("what the weights moved", apart(ours, theirs), 0.5)


def movement(weights, start):
    """How far all weights have come from the start, as one vector."""
    moved = [weights[key].float() - start[key].float() for key in start]
    return torch.cat([tensor.flatten() for tensor in moved])
