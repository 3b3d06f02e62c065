"""nanoaipo/packing.py on this device: taking tokens by index, and attention by both kernels."""

import torch

from bench.gpu.device import DEVICE, ON_GPU, apart
from bench.gpu.models import random_pairs
from bench.gpu.report import Skip
from nanoaipo import packing


def without_cudnn(report):
    """cuDNN's attention is off, which would plan anew for every shape."""
    if not ON_GPU:
        raise Skip("CUDA only")
    report.holds("pick_device has turned cuDNN off", not torch.backends.cuda.cudnn_sdp_enabled())


def take(report):
    """The gradient of rows that are taken once, twice or never, against index_add in float64.

    An embedding's backward has one kernel for few indices and one for many.
    """
    sizes = [(200, 250, 8)]
    if ON_GPU:
        sizes = [(2000, 2500, 256), (9000, 11_000, 512)]
    for n_rows, n_taken, width in sizes:
        torch.manual_seed(0)
        once = torch.randperm(n_rows)[: n_rows - 100]
        again = torch.randperm(n_rows)[: n_taken - len(once)]
        index = torch.cat([once, again]).to(DEVICE)

        for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
            x = torch.randn(n_rows, 2, width // 2, device=DEVICE, dtype=dtype).requires_grad_()
            grad = torch.randn(n_taken, 2, width // 2, device=DEVICE, dtype=dtype)
            exact = torch.zeros(x.shape, device=DEVICE, dtype=torch.float64)
            exact.index_add_(0, index, grad.double())

            packing.take(x, index).backward(grad)
            first = x.grad
            x.grad = None
            packing.take(x, index).backward(grad)

            name = f"{str(dtype).removeprefix('torch.')} gradient"
            report.below(name, apart(first, exact), limit)
            report.holds("the gradient has the same bits twice", torch.equal(first, x.grad))


def varlen(report):
    """packed_varlen in bfloat16 against packed_sdpa in float32: output and gradients.

    Grouped heads, heads of 8 to 256, windows down to two tokens (with one, alone with itself, a
    token has no gradient in q and k).
    """
    if not ON_GPU:
        raise Skip("the kernel is CUDA's")
    pairs = random_pairs(7, longest=150)
    for heads, kv_heads, width in ((4, 2, 64), (4, 4, 96), (8, 1, 128), (2, 2, 256), (4, 2, 8)):
        for window in (None, 16, 2):
            shape = (heads, kv_heads, width)
            exact = attention("packed_sdpa", torch.float32, pairs, shape, window)
            results = attention("packed_varlen", torch.bfloat16, pairs, shape, window)
            for name, result in results.items():
                report.below(name, apart(result, exact[name]), 2e-2)


def attention(kernel, dtype, pairs, shape, window):
    """{name: tensor}: output and gradients of a kernel for random heads, rounded to bfloat16.

    shape: (query heads, key heads, width of a head).
    """
    heads, kv_heads, width = shape
    row, _, _ = packing.pack(pairs, kernel)
    n_tokens = row["input_ids"].shape[1]
    segments = {}
    for key, value in row["segments"].items():
        if isinstance(value, list):
            value = [rows.to(DEVICE) for rows in value]
        elif isinstance(value, torch.Tensor):
            value = value.to(DEVICE)
        segments[key] = value

    rng = torch.Generator().manual_seed(0)
    inputs = {}
    for name, n_heads in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
        x = torch.randn(1, n_heads, n_tokens, width, generator=rng).to(DEVICE, torch.bfloat16)
        inputs[name] = x.to(dtype).requires_grad_()
    grad = torch.randn(1, n_tokens, heads, width, generator=rng).to(DEVICE, dtype)

    function = getattr(packing, kernel)
    output, _ = function(
        torch.nn.Identity(),
        **inputs,
        attention_mask=None,
        scaling=width**-0.5,
        segments=segments,
        sliding_window=window,
    )
    output.backward(grad)
    return {"output": output} | {f"d {name}": x.grad for name, x in inputs.items()}
