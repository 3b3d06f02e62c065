"""Every objective of preference optimisation, over a fused log-prob gather. Mathematics only: no model, no settings, no collectives.

Per pair, float32, shape (B,); w is chosen, l is rejected; lengths count response tokens with the end token, log-probs
are sums over those tokens in nats (AIPO 2409.08845, Eq. 5 and 9):

    logp_w, logp_l    under the policy            s_theta = logp_w - logp_l     margin of the policy
    ref_w, ref_l      under the reference         s_ref   = ref_w - ref_l       margin of the reference
    r_w, r_l          log-ratios, beta * r is     s       = s_theta - s_ref     what DPO looks at
                      the implicit reward         n       = r_w / len_w - r_l / len_l
    avg_w, avg_l      per-token averages          nll     = -avg_w
    z, p = sig(z)     log-odds and probability that chosen beats rejected; without z labels are hard, p = 1
    q_w, q_l          win rate against all candidates (SPPO)         g_w, g_l    scalar rewards (REBEL)
"""
import contextlib
import inspect

import torch
from torch.nn.functional import logsigmoid, relu, softplus

sig, sp = torch.sigmoid, softplus

# ---------------------------------------------------------------------------------------------- log-prob gather


@contextlib.contextmanager
def exact_bf16():
    """On a CPU, float32 products of values that are bfloat16 anyway: the same sums, up to three times as fast."""
    flags = torch.backends.mkldnn.matmul
    before, flags.fp32_precision = flags.fp32_precision, "bf16"
    try:
        yield
    finally:
        flags.fp32_precision = before


def chunk_logits(out, hidden, head, softcap):
    """Logits of one chunk, written into `out`, (T, V), in float32 (float64 from float64); products of bf16 are not rounded."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, head.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, head.T, out_dtype=out.dtype, out=out)
    else:
        with exact_bf16():
            torch.mm(hidden.to(out.dtype), head.T, out=out)
    return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)


class LogProb(torch.autograd.Function):
    """Backward computes each chunk's logits again, so (T, V) never exists unless it is one chunk; that one is kept.

    One buffer serves all chunks: fresh memory costs a CPU as much as the product that fills it.
    """

    @staticmethod
    def buffers(hidden, weight, labels, chunk):
        """The head as chunk_logits wants it, and room for the logits of a chunk."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight if weight.is_cuda else weight.to(wide), hidden.new_empty(min(chunk, len(labels)), len(weight), dtype=wide)

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, softcap, squares):
        head, buffer = LogProb.buffers(hidden, weight, labels, chunk)
        logp, log_squares = buffer.new_empty(len(labels)), buffer.new_zeros(len(labels))
        for a in range(0, len(labels), chunk):
            part = slice(a, a + chunk)
            logits = chunk_logits(buffer[:len(labels[part])], hidden[part], head, softcap)                   # (chunk, V)
            logp[part] = torch.log_softmax(logits, -1, out=logits).gather(-1, labels[part, None])[:, 0]
            if squares:
                log_squares[part] = torch.logsumexp(2 * logits, -1)
        ctx.mark_non_differentiable(log_squares)
        ctx.save_for_backward(hidden, weight, labels, buffer if softcap is None and len(labels) <= chunk else None)
        ctx.chunk, ctx.softcap = chunk, softcap
        return logp, log_squares

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, labels, kept = ctx.saved_tensors                # (T, V) log-probs, or None
        head, buffer = LogProb.buffers(hidden, weight, labels, ctx.chunk) if kept is None else (None, kept)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=buffer.dtype) if ctx.needs_input_grad[1] else None   # float32 across chunks
        for a in range(0, len(labels), ctx.chunk):
            part = slice(a, a + ctx.chunk)
            logits = buffer[:len(labels[part])]                                                              # (chunk, V)
            logits = logits if kept is not None else chunk_logits(logits, hidden[part], head, ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
            d = torch.softmax(logits, -1, out=logits) if kept is None else logits.exp_()
            d.mul_(-grad[part, None])                                                 # grad * (onehot - softmax)
            d.scatter_add_(1, labels[part, None], grad[part, None])
            d = (d if slope is None else d.mul_(slope)).to(hidden.dtype)
            d_hidden[part] = d @ weight
            if d_weight is not None and d_weight.dtype == d.dtype:
                d_weight.addmm_(d.T, hidden[part])
            elif d_weight is not None:
                d_weight += d.T @ hidden[part]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def logprob(hidden, weight, labels, chunk=1024, softcap=None, squares=False):
    """Log-probability of each label, in nats: (T,) float32 (float64 from float64), differentiable in hidden and weight.

    With squares also log(sum of p^2 over the vocabulary), (T,), a constant: how certain the policy is (WPO).

    hidden (T, D) states that predict the labels; weight (V, D) of the output head, whole, not sharded; labels (T,) ids;
    chunk: tokens whose logits exist at once (and until backward, if these are all); softcap: Gemma-2's cap * tanh(logits / cap), whose head is bypassed here.
    """
    both = LogProb.apply(hidden, weight, labels, chunk, softcap, squares)
    return both if squares else both[0]


def segment_sums(logp, lengths, beyond=1.0):
    """Sums (2B,) of token log-probs (N,) over responses of these lengths (2B,), chosen and rejected in turn; int64.

    beyond: weight of the tokens past the length of the pair's shorter response (LD-DPO, 2409.06411).
    """
    if beyond != 1.0:
        starts, shorter = lengths.cumsum(0) - lengths, lengths.view(-1, 2).amin(1).repeat_interleave(2)
        place = torch.arange(len(logp), device=logp.device) - starts.repeat_interleave(lengths)
        logp = logp.where(place < shorter.repeat_interleave(lengths), beyond * logp)
    return torch.segment_reduce(logp, "sum", lengths=lengths, unsafe=True)


def wpo_weights(logp, log_squares, lengths):
    """Weights (B,) in (0, 1]: how likely this policy is to write both responses (WPO, 2406.11827, clamped as in its code)."""
    mean = torch.segment_reduce((logp - log_squares).detach(), "mean", lengths=lengths, unsafe=True)          # (2B,)
    return mean.view(-1, 2).sum(1).exp().clamp(max=1)


def margins(logp_w, logp_l, ref_w, ref_l, len_w, len_l, z=None, **extra):
    """The symbols at the top of this file as a dict of (B,) tensors; extra columns (q_w, q_l, g_w, g_l) pass through."""
    r_w, r_l, avg_w = logp_w - ref_w, logp_l - ref_l, logp_w / len_w
    p = torch.ones_like(logp_w) if z is None else sig(z)
    return dict(logp_w=logp_w, logp_l=logp_l, ref_w=ref_w, ref_l=ref_l, len_w=len_w, len_l=len_l, r_w=r_w, r_l=r_l,
                s_theta=logp_w - logp_l, s_ref=ref_w - ref_l, s=r_w - r_l, avg_w=avg_w, avg_l=logp_l / len_l,
                n=r_w / len_w - r_l / len_l, nll=-avg_w, p=p, **({} if z is None else {"z": z}), **extra)


def bt(x, p):
    """Bradley-Terry loss of the logit x under the label p; p = 1 gives -log sigmoid(x)."""
    return p * sp(-x) + (1 - p) * sp(x)


def logodds(avg):
    """log(P / (1 - P)) of P = e^avg; the clamp keeps P = 1 finite (ORPO, 2403.07691 Eq. 4)."""
    return avg - torch.log(-torch.expm1(avg.clamp(max=-1e-6)))


# ---------------------------------------------------------------------------------------------- objectives


def exo(s, *, beta, eps):
    log_q, log_1q, log_eps = logsigmoid(beta * s), logsigmoid(-beta * s), torch.log(s.new_tensor([eps, 1 - eps]))
    return log_q.exp() * (log_q - log_eps[1]) + log_1q.exp() * (log_1q - log_eps[0])


# These two look at the whole micro-batch, so tokens_per_microbatch and the number of processes enter.
def kto_pair(r_w, r_l, *, beta):
    k_w, k_l = (r.detach().mean().clamp(min=0) for r in (r_w, r_l))
    return (sig(-beta * (r_w - k_l)) + sig(-beta * (k_w - r_l))) / 2


def alpha_dpo_24(avg_w, avg_l, n, p, *, beta, gamma, alpha):
    centred = (n - n.mean()).detach()
    zscore = centred / (centred.square().mean().sqrt() + 1e-8)
    return bt(beta * (avg_w - avg_l) - gamma - beta * alpha * zscore, p)


# Loss per pair, (B,). The symbols come from margins(), what stands behind the star are settings.
OBJECTIVES = dict(
    # logistic, with reference
    dpo=lambda s, p, *, beta: bt(beta * s, p),                                      # 2305.18290 Eq. 7; with label_smoothing it is cDPO
    robust=lambda s, *, beta, eps: ((1 - eps) * sp(-beta * s) - eps * sp(beta * s)) / (1 - 2 * eps),   # 2403.00409 Eq. 9, can be negative
    alpha_dpo=lambda s_theta, s_ref, p, *, beta, alpha: bt(beta * (s_theta - (1 + alpha) * s_ref), p),                # 2409.08845 Eq. 6
    aipo=lambda s_theta, s_ref, p, nll, *, beta, alpha, lambda_: bt(beta * (s_theta - (1 + alpha) * s_ref), p) + lambda_ * nll,   # Eq. 10
    irpo=lambda s, p, nll, *, beta, lambda_: bt(beta * s, p) + lambda_ * nll,       # 2404.19733 Eq. 1, DPO + NLL
    rpo=lambda s, p, logp_w, *, beta, eta: bt(beta * s, p) - eta * beta * logp_w,   # 2405.16436, the summed log-prob, times beta
    rdpo=lambda s, p, len_w, len_l, *, beta, alpha: bt(beta * s + alpha * (len_w - len_l), p),         # 2403.19159 Eq. 9: longer chosen earn less
    dpop=lambda s, p, r_w, *, beta, lambda_: bt(beta * (s - lambda_ * relu(-r_w)), p),                 # 2402.13228 Eq. 3 (Smaug)
    dpo_shift=lambda r_w, r_l, p, *, beta, lambda_: bt(beta * (r_w - lambda_ * r_l), p),               # 2502.07599
    dpo_norm=lambda n, p, *, beta: bt(beta * n, p),                                 # 2411.15124 (Tulu 3), length-normalised
    cal_dpo=lambda s, p, r_w, r_l, *, beta: bt(s, p) + ((r_w - 0.5 / beta) ** 2 + (r_l + 0.5 / beta) ** 2) / 2,       # 2412.14516
    exo=exo,                                                                        # 2402.00856 Eq. 16, reverse KL
    # squared or hinge
    ipo=lambda n, *, tau: (n - 1 / (2 * tau)) ** 2,                                 # 2310.12036 Eq. 17, per token as in TRL
    hinge=lambda s, *, beta: relu(1 - beta * s),                                    # 2309.06657 (RSO)
    slic=lambda s_theta, logp_w, *, delta, lambda_: relu(delta - s_theta) - lambda_ * logp_w,          # 2305.10425 Eq. 1, chosen as regulariser
    sppo=lambda r_w, r_l, q_w, q_l, *, beta: ((r_w - (q_w - 0.5) / beta) ** 2 + (r_l - (q_l - 0.5) / beta) ** 2) / 2,     # 2405.00675 Eq. 4.7
    sppo_hard=lambda r_w, r_l, *, beta: (r_w - 0.5 / beta) ** 2 + (r_l + 0.5 / beta) ** 2,             # twice the official scale, as in TRL
    irepo=lambda s, z, *, beta: (beta * s - z) ** 2,                                # 2405.15230, target of Eq. 16: regress on the log-odds
    rebel=lambda s, g_w, g_l, *, eta: (s - eta * (g_w - g_l)) ** 2,                 # 2404.16767
    inpo=lambda s, *, eta: (s - 1 / (2 * eta)) ** 2,                                # 2407.00617 Eq. 8; its reference columns come mixed
    # absolute: each response on its own
    nca=lambda r_w, r_l, *, beta: sp(-beta * r_w) + (sp(beta * r_w) + sp(beta * r_l)) / 2,             # 2402.05369
    bco=lambda r_w, r_l, *, beta: sp(-beta * r_w) + sp(beta * r_l),                 # 2404.04656 without its running mean, as in TRL 1.x
    apo_zero=lambda r_w, r_l, *, beta: sig(-beta * r_w) + sig(beta * r_l),          # 2408.06266 Eq. 7, chosen better than the policy
    apo_down=lambda r_w, s, *, beta: sig(beta * r_w) + sig(-beta * s),              # Eq. 8, chosen worse than the policy
    kto_pair=kto_pair,                                                              # 2402.01306, pair form
    # without reference
    simpo=lambda avg_w, avg_l, p, *, beta, gamma: bt(beta * (avg_w - avg_l) - gamma, p),               # 2405.14734 Eq. 6; gamma, not gamma / beta
    repo=lambda avg_w, avg_l, *, gamma: relu(gamma - (avg_w - avg_l)),              # 2503.07426 (ReLU-based; not iREPO, not REBEL)
    cpo=lambda s_theta, p, nll, *, beta, lambda_: bt(beta * s_theta, p) + lambda_ * nll,               # 2401.08417
    orpo=lambda avg_w, avg_l, nll, *, lambda_: nll + lambda_ * sp(logodds(avg_l) - logodds(avg_w)),    # 2403.07691 Eq. 6-7
    alpha_dpo_24=alpha_dpo_24,                                                      # 2410.10148, another alpha-DPO; its code keeps running moments
)


def pair_loss(name, margins, *, label_smoothing=0.0, **settings):
    """Loss per pair, (B,), of the objective `name`, given `margins(...)` and at least the settings its signature names.

    label_smoothing turns p into (1 - eps) p + eps (1 - p) for every objective that reads p. Raises ValueError for an
    unknown name, a missing setting, a column that the pairs do not carry (z, q_w, q_l, g_w, g_l), or smoothing without p.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"loss '{name}' is unknown; there are: {', '.join(OBJECTIVES)}")
    values = {**margins, "p": (1 - label_smoothing) * margins["p"] + label_smoothing * (1 - margins["p"])}
    arguments, signature = {}, inspect.signature(OBJECTIVES[name]).parameters
    if label_smoothing and "p" not in signature:
        raise ValueError(f"loss '{name}' does not read p, so label_smoothing would be ignored: set it to 0")
    for key, parameter in signature.items():
        source, kind = (settings, "setting") if parameter.kind is parameter.KEYWORD_ONLY else (values, "column of the pairs")
        if source.get(key) is None:
            raise ValueError(f"loss '{name}' needs the {kind} '{key}'; there are: {', '.join(source)}")
        arguments[key] = source[key]
    return OBJECTIVES[name](**arguments)
