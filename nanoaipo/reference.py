"""The cache of reference log-probabilities: one safetensors file, (pairs, 2), chosen and rejected.

It carries what it was made from, so that a file of another model, dtype or version, or of other
pairs, is recognised.
"""

import os

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanoaipo.processes import RANK, print0


def read_cache(path, made_from, indices):
    """The tensor in the file, or None if it cannot serve for the pairs with these indices."""
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("made_from") != made_from:
                return None
            reference = f.get_tensor("reference")  # (pairs, 2)
    except SafetensorError:
        return None
    if not reference[indices].all():  # 0 stands for a pair that was not computed
        return None
    return reference


def load_reference(path, made_from, indices, device):
    """Log-probs (pairs, 2) from the cache, or None, on all processes, if one of them cannot use it.

    made_from: text that has to be that of save_reference. indices: the pairs that are needed.
    """
    reference = None
    if os.path.exists(path):
        reference = read_cache(path, made_from, indices)
        if reference is None:
            print0(
                f"{path}: not whole, or made by another model, dtype or version, "
                "or for other pairs; computed again"
            )

    # all or none: another run may be writing the file
    usable = torch.tensor(int(reference is not None), device=device)
    dist.all_reduce(usable, dist.ReduceOp.MIN)
    if not usable:
        return None
    return reference.to(device)


def save_reference(path, made_from, reference):
    """Write the cache from the first process: under a name of its own, then renamed."""
    if RANK == 0:
        temporary = f"{path}.{os.getpid()}"
        save_file({"reference": reference.cpu()}, temporary, {"made_from": made_from})
        os.replace(temporary, path)
