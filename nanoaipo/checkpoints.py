"""Checkpoints: what a training step changes. All else follows from the settings and the pairs.

A checkpoint is the folder OUTPUT_DIR/step_NNNNNN, named after the steps done. Any number of
processes can go on from it: torch.distributed.checkpoint deals its rows anew. Its manifest holds
size and hash of each file; one that is damaged is passed over for the one before it.
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
from nanoaipo.processes import RANK, WORLD_SIZE, print0
from nanoaipo.stages import describe_files, once_seen, whole_hashes

MANIFEST = "manifest.json"  # {name: {bytes, sha256}} of a checkpoint's files


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


def save_checkpoint(output_dir, steps_done, trained, optimizer, keep):
    """Write a checkpoint under a temporary name, then rename it, and remove all but `keep`."""
    import torch.distributed.checkpoint as dcp  # half a second, so not before it is needed

    folder = os.path.join(output_dir, f"step_{steps_done:06d}")
    temporary = folder + ".tmp"
    dcp.save(training_state(trained, optimizer), checkpoint_id=temporary)

    # size and hash of every file, each from the process that has just written it
    files = {}
    for described in gather(describe_files(own_files(temporary), temporary)):
        files |= described
    if RANK == 0:
        write_json(os.path.join(temporary, MANIFEST), files)
        os.replace(temporary, folder)
        for old in find_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)


def own_files(folder):
    """What dcp.save has written in this process: __RANK_N.distcp, in the first .metadata too."""
    paths = glob.glob(os.path.join(glob.escape(folder), f"__{RANK}_*"))
    if RANK == 0:
        paths.append(os.path.join(folder, ".metadata"))
    return sorted(paths)


def gather(value):
    """The values of all processes, in each of them."""
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


def find_damage(folder):
    """What is wrong with a file of this checkpoint, the same text in all processes, or None.

    Each process reads its share of the files.
    """
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as f:
            files = json.load(f)
        names = sorted(files)[RANK::WORLD_SIZE]
        damage = first_damage(folder, {name: files[name] for name in names})
    except (OSError, ValueError, LookupError, TypeError):  # none, or one that is damaged
        damage = f"{MANIFEST} is not whole"
    found = [text for text in gather(damage) if text is not None]
    return found[0] if found else None


def first_damage(folder, files):
    """What is wrong with the first of these files, {name: {bytes, sha256}}, that is not as written.

    None where all are. Sizes first, which cost nothing.
    """
    paths = [os.path.join(folder, name) for name in files]
    for name, path in zip(files, paths):
        if not os.path.exists(path) or os.path.getsize(path) != files[name]["bytes"]:
            return f"{name} is not whole"
    for name, digest in zip(files, whole_hashes(paths)):
        if digest != files[name]["sha256"]:
            return f"{name} is damaged, not the bytes that were written"
    return None


def check_seen(folder, names):
    """Raise InputError unless this node sees these files of a checkpoint."""
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise InputError(f"{path}: this node does not see it: do nodes share this folder?")


def load_newest_checkpoint(output_dir, trained, optimizer):
    """Fill weights and moments from the newest whole checkpoint; return its steps, 0 without one.

    Damaged ones are removed, with a message.
    """
    # the first process lists them for all: other nodes may see the folder as it was a minute ago
    listed = [{folder: os.listdir(folder) for folder in find_checkpoints(output_dir)}]
    dist.broadcast_object_list(listed)
    for folder, names in reversed(listed[0].items()):
        once_seen(functools.partial(check_seen, folder, names))
        damage = find_damage(folder)  # which returns when all processes have looked
        if damage is None:
            import torch.distributed.checkpoint as dcp

            dcp.load(training_state(trained, optimizer), checkpoint_id=folder)
            print0(f"going on from {folder}")
            return int(folder[-6:])
        print0(f"{folder}: passed over, {damage}")
        if RANK == 0:
            shutil.rmtree(folder)
    return 0
