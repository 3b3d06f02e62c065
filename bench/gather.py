"""The log-prob gather against log_softmax and gather: time forward and backward, and peak memory.

    python bench/gather.py                   on a CPU in float32
    python bench/gather.py --device=cuda     on a GPU in bfloat16

Memory is above the inputs; on a CPU it is read as the high-water mark of a process of its own. On a
GPU Liger's fused linear cross-entropy takes part where it is installed (its loss sums over tokens:
one weight for all, as in SFT).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from losses import logprob  # noqa: E402

T = 4096  # tokens
D = 512  # hidden width
ROUNDS = 2
VOCABULARIES = (32_000, 128_000, 256_000)


def ours(hidden, weight, labels):
    chunk = 1024 if hidden.is_cuda else 256
    return logprob(hidden, weight, labels, chunk)


def naive(hidden, weight, labels):
    logits = (hidden @ weight.T).float()  # (T, V)
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def liger(hidden, weight, labels):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    fused = LigerFusedLinearCrossEntropyFunction
    return -fused.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")[0]


def inputs(V, device, dtype):
    """(hidden (T, D), weight (V, D), labels (T,)); the first two want gradients."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=rng).mul_(0.2).to(device, dtype).requires_grad_()
    weight = torch.randn(V, D, generator=rng).mul_(0.2).to(device, dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=rng).to(device)
    return hidden, weight, labels


def once(f, hidden, weight, labels):
    """Seconds of one forward and backward pass."""
    hidden.grad = None
    weight.grad = None
    t0 = time.perf_counter()
    f(hidden, weight, labels).sum().backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - t0


def status(field):
    """Bytes of a field of Linux's account of this process."""
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(field):
                return int(line.split()[1]) * 1024


def peak(f, V, device, dtype):
    """Bytes above the inputs at the worst moment of one pass, gradients included."""
    if device == "cuda":
        arguments = inputs(V, device, dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(f, *arguments)
        return torch.cuda.max_memory_allocated() - before

    command = [sys.executable, __file__, f"--peak={f.__name__}", f"--vocabulary={V}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def print_peak_here(name, V):
    """Print the peak of one pass of a function in this process, which does nothing else."""
    arguments = inputs(V, "cpu", torch.float32)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the high-water mark starts here
    before = status("VmRSS")
    once(globals()[name], *arguments)
    print(status("VmHWM") - before)


def compare(device, dtype, functions):
    """Time the functions in alternating rounds and print the best of each."""
    machine = f"{torch.get_num_threads()} threads"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    print(
        f"{device} {machine}, torch {torch.__version__}, {dtype}, T={T}, D={D}, "
        f"best of {ROUNDS} alternating rounds"
    )
    for V in VOCABULARIES:
        arguments = inputs(V, device, dtype)
        memory = {f.__name__: peak(f, V, device, dtype) for f in functions}
        seconds = {f.__name__: [] for f in functions}
        for _ in range(ROUNDS + 1):  # the first warms up
            for f in functions:
                seconds[f.__name__].append(once(f, *arguments))
        best = {name: min(times[1:]) for name, times in seconds.items()}

        for name in best:
            line = (
                f"V={V:7,}  {name:6}  {best[name] * 1e3:9.1f} ms  {memory[name] / 2**20:8.0f} MiB"
            )
            if name != "ours":
                line += f"   naive/ours: time {best[name] / best['ours']:.2f}"
                line += f", memory {memory[name] / memory['ours']:.1f}"
            print(line, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak", help="a function: print what one pass of it needs")
    parser.add_argument("--vocabulary", type=int)
    arguments = parser.parse_args()

    if arguments.peak:
        print_peak_here(arguments.peak, arguments.vocabulary)
    elif arguments.device == "cpu":
        compare("cpu", torch.float32, [ours, naive])
    else:
        functions = [ours, naive]
        if importlib.util.find_spec("liger_kernel"):
            functions.append(liger)
        else:
            print("Liger is left out: liger_kernel is not installed")
        compare("cuda", torch.bfloat16, functions)


if __name__ == "__main__":
    main()
