"""Checkpoints: what a training step changes. All else follows from the settings and the pairs.

A checkpoint is the folder OUTPUT_DIR/step_NNNNNN, named after the steps done. Any number of
processes can go on from it: torch.distributed.checkpoint deals its rows anew.
"""

import functools
import glob
import json
import os
import shutil

import torch
import torch.distributed as dist

from nanoaipo.errors import InputError
from nanoaipo.files import write_json
from nanoaipo.processes import RANK, print0
from nanoaipo.stages import once_seen


def training_state(trained, optimizer):
    """Weights that train and their moments, as tensors that can be saved, and filled in place.

    trained: {name: parameter}, the parameters of the optimizer, an AdamW. AdamW makes its moments
    at its first step; they are made here if they are wanted before.
    """
    state = {}
    for name, parameter in trained.items():
        if parameter not in optimizer.state:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        state[f"{name}.weight"] = parameter.detach()
        for moment, tensor in optimizer.state[parameter].items():
            state[f"{name}.{moment}"] = tensor
    return state


def find_checkpoints(output_dir):
    """The folders of checkpoints, oldest first."""
    pattern = os.path.join(glob.escape(output_dir), "step_*[0-9]")  # step_*.tmp is not whole
    return sorted(glob.glob(pattern))


def file_sizes(folder):
    """{name: bytes} of the files in a folder."""
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}


def save_checkpoint(output_dir, steps_done, trained, optimizer, keep):
    """Write a checkpoint under a temporary name, then rename it, and remove all but `keep`."""
    import torch.distributed.checkpoint as dcp  # half a second, so not before it is needed

    folder = os.path.join(output_dir, f"step_{steps_done:06d}")
    temporary = folder + ".tmp"
    dcp.save(training_state(trained, optimizer), checkpoint_id=temporary)
    if RANK == 0:
        write_json(os.path.join(temporary, "sizes.json"), file_sizes(temporary))
        os.replace(temporary, folder)
        for old in find_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)


def first_broken_file(folder):
    """The name of a file of this checkpoint that is not whole, or None."""
    there = file_sizes(folder)
    if "sizes.json" not in there:
        return "sizes.json"
    with open(os.path.join(folder, "sizes.json"), encoding="utf-8") as f:
        sizes = json.load(f)
    for name, size in sizes.items():
        if there.get(name) != size:
            return name
    return None


def newest_checkpoint(output_dir):
    """The folder of the newest whole checkpoint, or None; broken ones are removed, with a message.

    For one process alone.
    """
    for folder in reversed(find_checkpoints(output_dir)):
        broken = first_broken_file(folder)
        if broken is None:
            return folder
        print(f"{folder}: passed over, {broken} is not whole", flush=True)
        shutil.rmtree(folder)
    return None


def check_seen(folder):
    """Raise InputError unless all files of a checkpoint are seen from this node."""
    if not os.path.isdir(folder) or first_broken_file(folder):
        raise InputError(
            f"{folder}: is not whole as this node sees it: do nodes share this folder?"
        )


def load_newest_checkpoint(output_dir, trained, optimizer):
    """Fill weights and moments from the newest whole checkpoint; return its steps, 0 without one.

    Broken ones are removed, with a message.
    """
    # the first process chooses for all: other nodes may see the folder as it was a minute ago
    chosen = [None]
    if RANK == 0:
        chosen = [newest_checkpoint(output_dir)]
    dist.broadcast_object_list(chosen)
    (folder,) = chosen
    if folder is None:
        return 0

    import torch.distributed.checkpoint as dcp

    once_seen(functools.partial(check_seen, folder))
    dcp.load(training_state(trained, optimizer), checkpoint_id=folder)
    print0(f"going on from {folder}")
    return int(folder[-6:])
