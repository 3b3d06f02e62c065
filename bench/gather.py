"""The log-prob gather against log_softmax and gather, side by side: time forward and backward, and peak memory above the inputs.

    python bench/gather.py

On a CPU in float32, the memory read as the process's high-water mark in a process of its own; with a CUDA GPU in bfloat16,
against Liger's fused linear cross-entropy too where it is installed (its loss sums over tokens: one weight for all, as in SFT).
"""
import importlib.util
import json
import os
import subprocess
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from losses import logprob

T, D, ROUNDS = 4096, 512, 2


def ours(hidden, weight, labels):
    return logprob(hidden, weight, labels, 1024 if hidden.is_cuda else 256)


def naive(hidden, weight, labels):
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def liger(hidden, weight, labels):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    return -LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")[0]


def inputs(V, device, dtype):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=draw).mul_(0.2).to(device, dtype).requires_grad_() for n in (T, V))
    return hidden, weight, torch.randint(V, (T,), generator=draw).to(device)


def once(f, hidden, weight, labels):
    """Seconds of one forward and backward pass."""
    hidden.grad = weight.grad = None
    began = time.perf_counter()
    f(hidden, weight, labels).sum().backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def status(field):
    """Bytes of a field of Linux's account of this process."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def peak(f, V, device, dtype):
    """Bytes above the inputs at the worst moment of one pass, gradients included."""
    if device == "cuda":
        arguments = inputs(V, device, dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(f, *arguments)
        return torch.cuda.max_memory_allocated() - before
    done = subprocess.run([sys.executable, __file__, f.__name__, str(V)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main(device, dtype, functions):
    print(f"{device} {torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} threads'}, torch {torch.__version__}, "
          f"{dtype}, T={T}, D={D}, best of {ROUNDS} alternating rounds")
    for V in (32_000, 128_000, 256_000):
        arguments, memory = inputs(V, device, dtype), {f.__name__: peak(f, V, device, dtype) for f in functions}
        seconds = {f.__name__: [] for f in functions}
        for _ in range(ROUNDS + 1):                                     # the first warms up
            for f in functions:
                seconds[f.__name__].append(once(f, *arguments))
        best = {name: min(s[1:]) for name, s in seconds.items()}
        for name in best:
            print(f"V={V:7,}  {name:6}  {best[name] * 1e3:9.1f} ms  {memory[name] / 2**20:8.0f} MiB" + (
                f"   naive/ours: time {best[name] / best['ours']:.2f}, memory {memory[name] / memory['ours']:.1f}" if name != "ours" else ""), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:                                               # one pass, alone, for its memory
        arguments = inputs(int(sys.argv[2]), "cpu", torch.float32)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")                                                # the high-water mark starts here
        before = status("VmRSS")
        once(globals()[sys.argv[1]], *arguments)
        print(status("VmHWM") - before)
        sys.exit()
    main("cpu", torch.float32, (ours, naive))
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU half was not run")
        sys.exit(0)
    main("cuda", torch.bfloat16, (ours, naive, liger) if importlib.util.find_spec("liger_kernel") else (ours, naive))
