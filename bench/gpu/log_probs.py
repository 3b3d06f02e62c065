"""losses.py on this device: the log-prob gather, and what is summed from it."""

import torch

from bench.gpu.device import DEVICE, ON_GPU, apart
from losses import logprob, segment_sums, wpo_weights


def softmax_in_place(report):
    """softmax and log_softmax with their own input for `out`, as the gather calls them.

    CUDA has one kernel for short rows and others for long ones.
    """
    torch.manual_seed(0)
    widths = (7, 1025)
    if ON_GPU:
        widths = (7, 1000, 1024, 1025, 2048, 32_000, 50_257, 128_256, 256_000)
    for width in widths:
        for softmax in (torch.softmax, torch.log_softmax):
            x = 4 * torch.randn(64, width, device=DEVICE)
            exact = softmax(x.double(), -1)
            softmax(x, -1, out=x)
            report.below(f"{softmax.__name__} from float64", apart(x, exact), 1e-5)


def gather(report):
    """Log-probs, their gradients and WPO's squares against log_softmax in float64."""
    for softcap in (None, 5.0):
        compare_gather(report, torch.float32, softcap, limit=2e-6, gradient_limit=2e-5)
        compare_gather(report, torch.bfloat16, softcap, limit=1e-5, gradient_limit=6e-3)


def compare_gather(report, dtype, softcap, limit, gradient_limit):
    """Both ways of the gather, with a last chunk that is not full, and with the logits kept."""
    T, D, V = (3000, 512, 32_003) if ON_GPU else (300, 32, 500)
    name = str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    hidden = (0.3 * torch.randn(T, D, device=DEVICE)).to(dtype)
    weight = (0.3 * torch.randn(V, D, device=DEVICE)).to(dtype)
    labels = torch.randint(V, (T,), device=DEVICE)
    grad = torch.randn(T, device=DEVICE)

    # in float64, of the same rounded numbers
    exact_hidden = hidden.double().requires_grad_()
    exact_weight = weight.double().requires_grad_()
    logits = exact_hidden @ exact_weight.T  # (T, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_softmax = logits.log_softmax(-1)
    exact = log_softmax.gather(-1, labels[:, None])[:, 0]
    exact_squares = (2 * log_softmax).logsumexp(-1)
    (exact * grad).sum().backward()

    for chunk in (T // 3 + 24, T):
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_()
        logp, log_squares = logprob(h, w, labels, chunk, softcap, squares=True)
        (logp * grad).sum().backward()
        report.below(f"{name} log-probs", apart(logp, exact), limit)
        report.below(f"{name} log of squares", apart(log_squares, exact_squares), 1e-4)
        report.below(f"{name} d hidden", apart(h.grad, exact_hidden.grad), gradient_limit)
        report.below(f"{name} d weight", apart(w.grad, exact_weight.grad), gradient_limit)


def segments(report):
    """Sums over responses, LD-DPO's too, their gradient, and WPO's weights, against the CPU."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 700, (64,))
    n_tokens = int(lengths.sum())
    logp = -torch.rand(n_tokens)
    log_squares = -torch.rand(n_tokens)

    here = segment_results(logp.to(DEVICE), log_squares.to(DEVICE), lengths.to(DEVICE))
    on_cpu = segment_results(logp, log_squares, lengths)

    for name, result in here.items():
        report.below(name, apart(result, on_cpu[name]), 1e-5)


def segment_results(logp, log_squares, lengths):
    """{name: tensor} of all that losses.py computes from segments."""
    logp = logp.clone().requires_grad_()
    sums = segment_sums(logp, lengths)  # (2B,)
    ld_sums = segment_sums(logp, lengths, 0.5)  # (2B,)
    places = torch.arange(len(lengths), device=logp.device)
    (sums * places + ld_sums).sum().backward()
    weights = wpo_weights(logp.detach(), log_squares, lengths)  # (B,)
    return {"sums": sums, "LD sums": ld_sums, "gradient": logp.grad, "WPO weights": weights}
