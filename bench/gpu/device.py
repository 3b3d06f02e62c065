"""The device that all checks run on, and how time and memory are measured there."""

import functools
import gc
import math
import time

import torch

from nanoaipo.policy import matmul_rate
from nanoaipo.processes import pick_device

DEVICE = pick_device()
ON_GPU = DEVICE.type == "cuda"


def wait():
    """Return when the device has done all that it was asked to do."""
    if ON_GPU:
        torch.cuda.synchronize()


def empty_cache():
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def seconds_of(f):
    """Seconds of one call."""
    wait()
    t0 = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - t0


def best_seconds(f, rounds=3):
    """Seconds of the fastest of several calls, behind one that warms up."""
    f()
    return min(seconds_of(f) for _ in range(rounds))


def peak_gib(f):
    """GiB above what is there before, at the worst moment of a call; 0 on a CPU."""
    if not ON_GPU:
        f()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    wait()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


@functools.cache
def matrix_rate(dtype):
    """FLOP/s of large matrix products in this dtype, here."""
    return matmul_rate(DEVICE, dtype, 8192 if ON_GPU else 256)


def apart(a, b):
    """||a - b|| / ||b|| in float64; infinite where either is not finite."""
    a = a.detach().double().flatten().cpu()
    b = b.detach().double().flatten().cpu()
    ratio = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
    return ratio if math.isfinite(ratio) else math.inf
