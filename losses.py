"""Every objective of preference optimisation, and the log-probabilities it is made of.

Mathematics only: no model, no settings file, no collectives. Per pair, float32, shape (B,); w is
chosen, l is rejected. Lengths count response tokens with the end token, log-probs are sums over
those tokens in nats (AIPO 2409.08845, Eq. 5 and 9):

    logp_w, logp_l  under the policy        s_theta = logp_w - logp_l   margin of the policy
    ref_w, ref_l    under the reference     s_ref   = ref_w - ref_l     margin of the reference
    r_w = logp_w - ref_w, r_l likewise      s       = s_theta - s_ref   what DPO looks at
    avg_w = logp_w / len_w, avg_l likewise  n       = r_w / len_w - r_l / len_l
                                            nll     = -avg_w

    z, p = sig(z)   log-odds and probability that chosen beats rejected; without z, p = 1
    q_w, q_l        win rate against all candidates (SPPO)
    g_w, g_l        scalar rewards (REBEL)

beta * r is DPO's implicit reward. p is the label: p = 1 is a hard one.
"""

import contextlib
import inspect
import re

import torch
from torch.nn.functional import logsigmoid, relu, softplus

sig = torch.sigmoid
sp = softplus


# ---------------------------------------------------------------------------- symbols


def symbols_of(logp_w, logp_l, ref_w, ref_l, len_w, len_l, z=None, **extra):
    """The symbols at the top of this file as a dict of (B,) tensors; extra columns pass through."""
    r_w = logp_w - ref_w
    r_l = logp_l - ref_l
    avg_w = logp_w / len_w
    symbols = {
        "logp_w": logp_w,
        "logp_l": logp_l,
        "ref_w": ref_w,
        "ref_l": ref_l,
        "len_w": len_w,
        "len_l": len_l,
        "r_w": r_w,
        "r_l": r_l,
        "s_theta": logp_w - logp_l,
        "s_ref": ref_w - ref_l,
        "s": r_w - r_l,
        "avg_w": avg_w,
        "avg_l": logp_l / len_l,
        "n": r_w / len_w - r_l / len_l,
        "nll": -avg_w,
    }
    if z is None:
        symbols["p"] = torch.ones_like(logp_w)
    else:
        symbols["p"] = sig(z)
        symbols["z"] = z
    return symbols | extra


# ---------------------------------------------------------------------------- objectives
#
# The table OBJECTIVES, below, has all of them, aipo and dpo among its first lines. Before it stand
# what its formulas share, and the objectives that take more than one expression.


def bt(x, p):
    """Bradley-Terry loss of the logit x under the label p; p = 1 gives -log sigmoid(x)."""
    return p * sp(-x) + (1 - p) * sp(x)


def logodds(avg):
    """log(P / (1 - P)) of P = e^avg; the clamp keeps P = 1 finite (ORPO, 2403.07691 Eq. 4)."""
    return avg - torch.log(-torch.expm1(avg.clamp(max=-1e-6)))


def power(x, alpha):
    """(1 - u^-alpha) / alpha of u = e^x, which is x at alpha = 0; the clamp keeps it finite."""
    if alpha == 0:
        return x
    return -torch.expm1((-alpha * x).clamp(max=80)) / alpha


def exo(s, *, beta, eps):
    """Reverse KL from the labels (1 - eps, eps) to sigmoid(beta s) (2402.00856 Eq. 16)."""
    log_q = logsigmoid(beta * s)
    log_1q = logsigmoid(-beta * s)
    log_eps, log_1eps = torch.log(s.new_tensor([eps, 1 - eps]))
    return log_q.exp() * (log_q - log_1eps) + log_1q.exp() * (log_1q - log_eps)


def chi_po(r_w, r_l, p, *, beta):
    """DPO with r + e^r in place of r (2407.13399 Alg. 1, without its clip of the logit)."""
    phi_w = r_w + r_w.clamp(max=20).exp()
    phi_l = r_l + r_l.clamp(max=20).exp()
    return bt(beta * (phi_w - phi_l), p)


def discopop(s, *, beta, tau):
    """Logistic loss for x < 0, exponential for x > 0 (2406.08414 Eq. 5).

    With the paper's tau of 0.05 it rises around x = 0, so a policy leaves its reference backwards.
    """
    x = beta * s
    exponential = (logsigmoid(x / tau) - x).clamp(max=80).exp()  # sig(x / tau) e^-x
    return sig(-x / tau) * sp(-x) + exponential


# The next four look at the whole micro-batch, so tokens_per_microbatch and the number of processes
# enter their results.


def kto_pair(r_w, r_l, *, beta):
    """Each response against the mean log-ratio of the other kind (2402.01306, pair form)."""
    k_w = r_w.detach().mean().clamp(min=0)
    k_l = r_l.detach().mean().clamp(min=0)
    return (sig(-beta * (r_w - k_l)) + sig(-beta * (k_w - r_l))) / 2


def alpha_dpo_24(avg_w, avg_l, n, p, *, beta, gamma, alpha):
    """Another alpha-DPO: SimPO, a margin per pair (2410.10148; its code has running moments)."""
    centred = (n - n.mean()).detach()
    zscore = centred / (centred.square().mean().sqrt() + 1e-8)
    return bt(beta * (avg_w - avg_l) - gamma - beta * alpha * zscore, p)


def amapo(avg_w, avg_l, p, *, beta):
    """SimPO, a margin for the pairs below the mean of the batch (2511.09385, as in its code)."""
    gap = avg_w - avg_l
    mean = gap.mean()
    below = (mean - gap).detach()
    std = (below.square().sum() / max(len(gap) - 1, 1)).sqrt() + 1e-8
    margin = (below / std * mean).detach().clamp(max=80).exp()
    return bt(beta * (gap - margin.where(below > 0, 0)), p)


def aot(s_theta, s_ref, p, *, beta):
    """DPO of sorted margins: the policy's k-th smallest against the reference's (2406.05882)."""
    rank = s_theta.argsort().argsort()
    return bt(beta * (s_theta - s_ref.sort().values[rank]), p)


# Loss per pair, (B,): name, formula, source. The arguments before the star are symbols, those
# behind it are settings.
# fmt: off
OBJECTIVES = dict(
    # ---- logistic, with reference; dpo with label_smoothing is cDPO, robust can be negative
    dpo=lambda s, p, *, beta: bt(beta * s, p),                              # 2305.18290 Eq. 7
    robust=lambda s, *, beta, eps:
        ((1 - eps) * sp(-beta * s) - eps * sp(beta * s)) / (1 - 2 * eps),   # 2403.00409 Eq. 9
    alpha_dpo=lambda s_theta, s_ref, p, *, beta, alpha:
        bt(beta * (s_theta - (1 + alpha) * s_ref), p),                      # 2409.08845 Eq. 6
    aipo=lambda s_theta, s_ref, p, nll, *, beta, alpha, lambda_:
        bt(beta * (s_theta - (1 + alpha) * s_ref), p) + lambda_ * nll,      # 2409.08845 Eq. 10
    irpo=lambda s, p, nll, *, beta, lambda_:
        bt(beta * s, p) + lambda_ * nll,                                    # 2404.19733 Eq. 1
    # the summed log-prob, times beta
    rpo=lambda s, p, logp_w, *, beta, eta:
        bt(beta * s, p) - eta * beta * logp_w,                              # 2405.16436
    # a longer chosen response earns less
    rdpo=lambda s, p, len_w, len_l, *, beta, alpha:
        bt(beta * s + alpha * (len_w - len_l), p),                          # 2403.19159 Eq. 9
    dpop=lambda s, p, r_w, *, beta, lambda_:
        bt(beta * (s - lambda_ * relu(-r_w)), p),                           # 2402.13228 Eq. 3
    dpo_shift=lambda r_w, r_l, p, *, beta, lambda_:
        bt(beta * (r_w - lambda_ * r_l), p),                                # 2502.07599
    dpo_norm=lambda n, p, *, beta: bt(beta * n, p),                         # 2411.15124, Tulu 3
    cal_dpo=lambda s, p, r_w, r_l, *, beta:
        bt(s, p) + ((r_w - 0.5 / beta) ** 2 + (r_l + 0.5 / beta) ** 2) / 2, # 2412.14516
    exo=exo,                                                                # 2402.00856 Eq. 16
    # f-DPO, under other divergences: alpha = 0 is dpo, 1 forward KL, and TRL's alpha is 1 - alpha
    f_dpo_alpha=lambda r_w, r_l, p, *, beta, alpha:
        bt(beta * (power(r_w, alpha) - power(r_l, alpha)), p),              # 2309.16240
    f_dpo_js=lambda r_w, r_l, p, *, beta:
        bt(beta * (logsigmoid(r_w) - logsigmoid(r_l)), p),                  # 2309.16240
    chi_po=chi_po,                                                          # 2407.13399 Alg. 1
    discopop=discopop,                                                      # 2406.08414 Eq. 5
    aot=aot,                                                                # 2406.05882

    # ---- squared or hinge; ipo is per token, and sppo_hard twice the official scale, as in TRL
    ipo=lambda n, *, tau: (n - 1 / (2 * tau)) ** 2,                         # 2310.12036 Eq. 17
    hinge=lambda s, *, beta: relu(1 - beta * s),                            # 2309.06657, RSO
    slic=lambda s_theta, logp_w, *, delta, lambda_:
        relu(delta - s_theta) - lambda_ * logp_w,                           # 2305.10425 Eq. 1
    sppo=lambda r_w, r_l, q_w, q_l, *, beta:
        ((r_w - (q_w - 0.5) / beta) ** 2
         + (r_l - (q_l - 0.5) / beta) ** 2) / 2,                            # 2405.00675 Eq. 4.7
    sppo_hard=lambda r_w, r_l, *, beta:
        (r_w - 0.5 / beta) ** 2 + (r_l + 0.5 / beta) ** 2,                  # 2405.00675
    # regress on the log-odds
    irepo=lambda s, z, *, beta: (beta * s - z) ** 2,                        # 2405.15230 Eq. 16
    rebel=lambda s, g_w, g_l, *, eta: (s - eta * (g_w - g_l)) ** 2,         # 2404.16767
    # the paper's reference mixes in the first policy; train.py's is one policy
    inpo=lambda s, *, eta: (s - 1 / (2 * eta)) ** 2,                        # 2407.00617 Eq. 8

    # ---- absolute: each response on its own; bco without its running mean, as in TRL 1.x
    nca=lambda r_w, r_l, *, beta:
        sp(-beta * r_w) + (sp(beta * r_w) + sp(beta * r_l)) / 2,            # 2402.05369
    bco=lambda r_w, r_l, *, beta: sp(-beta * r_w) + sp(beta * r_l),         # 2404.04656
    # the chosen response is better than the policy (zero), or worse (down)
    apo_zero=lambda r_w, r_l, *, beta: sig(-beta * r_w) + sig(beta * r_l),  # 2408.06266 Eq. 7
    apo_down=lambda r_w, s, *, beta: sig(beta * r_w) + sig(-beta * s),      # 2408.06266 Eq. 8
    kto_pair=kto_pair,                                                      # 2402.01306

    # ---- without reference; gamma of simpo is the paper's gamma, not gamma / beta
    simpo=lambda avg_w, avg_l, p, *, beta, gamma:
        bt(beta * (avg_w - avg_l) - gamma, p),                              # 2405.14734 Eq. 6
    # alpha bends the reward: 0 is simpo
    alphapo=lambda avg_w, avg_l, p, *, beta, gamma, alpha:
        bt(beta * (power(avg_w, alpha) - power(avg_l, alpha)) - gamma, p),  # 2501.03884
    amapo=amapo,                                                            # 2511.09385
    # no setting at all
    simper=lambda avg_w, avg_l: avg_l.exp() - avg_w.exp(),                  # 2502.00883
    # ReLU-based; neither iREPO nor REBEL
    repo=lambda avg_w, avg_l, *, gamma: relu(gamma - (avg_w - avg_l)),      # 2503.07426
    cpo=lambda s_theta, p, nll, *, beta, lambda_:
        bt(beta * s_theta, p) + lambda_ * nll,                              # 2401.08417
    orpo=lambda avg_w, avg_l, nll, *, lambda_:
        nll + lambda_ * sp(logodds(avg_l) - logodds(avg_w)),                # 2403.07691 Eq. 6-7
    alpha_dpo_24=alpha_dpo_24,                                              # 2410.10148

    # ---- no preference: SFT on the chosen response, for a mix
    nll=lambda nll: nll,
)
# fmt: on


def parse_mix(mix):
    """{objective: weight} of a mix: one objective, or several: 0.8*dpo+0.2*bco+nll (2411.10442).

    Raises ValueError for a term that is neither an objective nor weight*objective, a weight of 0,
    and an objective that comes twice.
    """
    weights = {}
    for term in mix.split("+"):
        match = re.fullmatch(r" *(?:(\d*\.?\d+(?:e-?\d+)?) *\* *)?([a-z]\w*) *", term)
        if match is None or match[2] not in OBJECTIVES:
            raise ValueError(
                f"loss '{term}' is unknown; a mix is written 0.8*dpo+0.2*bco+nll, "
                f"and there are: {', '.join(OBJECTIVES)}"
            )
        weight, name = match.groups()
        if name in weights:
            raise ValueError(f"'{name}' comes twice: write one term with the sum of the weights")
        weights[name] = float(weight or 1)
        if weights[name] == 0:
            raise ValueError(f"'{term}' counts nothing: leave it out")
    return weights


def arguments_of(mix):
    """(symbols, settings) that a mix reads: the names before and behind the star of each term."""
    parameters = []
    for name in parse_mix(mix):
        parameters += inspect.signature(OBJECTIVES[name]).parameters.values()
    symbols = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    settings = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return list(dict.fromkeys(symbols)), list(dict.fromkeys(settings))  # each once


def term_losses(mix, symbols, *, label_smoothing=0.0, **settings):
    """{objective: loss per pair, (B,)} of each term of a mix, before its weight.

    symbols: as of `symbols_of`. Settings that no term reads are ignored. label_smoothing mixes that
    share of 1 - p into p, for every objective that reads p. Raises ValueError for an unknown
    objective, a missing setting, a column that the pairs do not carry (z, q_w, q_l, g_w, g_l), or
    smoothing where no term reads p.
    """
    symbol_names, _ = arguments_of(mix)
    if label_smoothing and "p" not in symbol_names:
        raise ValueError(
            f"loss '{mix}' does not read p, so label_smoothing would be ignored: set it to 0"
        )
    p = symbols["p"]
    symbols = symbols | {"p": (1 - label_smoothing) * p + label_smoothing * (1 - p)}

    terms = {}
    for name in parse_mix(mix):
        symbol_names, setting_names = arguments_of(name)
        arguments = select(symbols, symbol_names, f"loss '{name}' needs the column of the pairs")
        arguments |= select(settings, setting_names, f"loss '{name}' needs the setting")
        terms[name] = OBJECTIVES[name](**arguments)
    return terms


def select(values, names, needs):
    """{name: value} of these names; raises ValueError, which begins with `needs`, without one."""
    for name in names:
        if values.get(name) is None:
            raise ValueError(f"{needs} '{name}'; there are: {', '.join(values)}")
    return {name: values[name] for name in names}


def weighted_sum(mix, terms):
    """Loss per pair, (B,), of a mix: its `term_losses`, each times its weight."""
    return sum(weight * terms[name] for name, weight in parse_mix(mix).items())


def pair_loss(mix, symbols, **settings):
    """Loss per pair, (B,), of a mix; the arguments are those of `term_losses`."""
    return weighted_sum(mix, term_losses(mix, symbols, **settings))


# ---------------------------------------------------------------------------- from tokens to pairs


def segment_sums(logp, lengths, beyond=1.0):
    """Sums (2B,) of token log-probs (N,) over responses of these lengths, chosen, rejected in turn.

    lengths: (2B,) int64. beyond: weight of the tokens past the length of the pair's shorter
    response (LD-DPO, 2409.06411).
    """
    if beyond != 1.0:
        starts = lengths.cumsum(0) - lengths  # (2B,)
        shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2)  # (2B,)
        row_index = torch.arange(len(logp), device=logp.device)  # (N,)
        position = row_index - starts.repeat_interleave(lengths)  # (N,) within the response
        logp = logp.where(position < shorter.repeat_interleave(lengths), beyond * logp)
    return torch.segment_reduce(logp, "sum", lengths=lengths, unsafe=True)


def drawn_tokens(lengths, seeds):
    """(N,) bool: of each response as many tokens, at random, as its pair's shorter one has.

    lengths: (2B,) int64. seeds: B ints; a seed's draw is always the same, so policy and reference
    sum the same tokens (SamPO, 2406.10957; its code draws anew for each of the two).
    """
    drawn = []
    for pair, seed in zip(lengths.view(-1, 2).tolist(), seeds):
        rng = torch.Generator().manual_seed(seed)
        for length in pair:
            order = torch.randperm(length, generator=rng)  # (length,)
            drawn.append(order < min(pair))
    return torch.cat(drawn).to(lengths.device)


def wpo_weights(logp, log_squares, lengths):
    """Weights (B,) in (0, 1]: how likely this policy is to write both responses of a pair.

    logp, log_squares: (N,) as logprob gives them; lengths: (2B,) int64. WPO, 2406.11827, clamped
    as in its code.
    """
    adjusted = (logp - log_squares).detach()  # (N,)
    means = torch.segment_reduce(adjusted, "mean", lengths=lengths, unsafe=True)  # (2B,)
    return means.view(-1, 2).sum(1).exp().clamp(max=1)


# ---------------------------------------------------------------------------- log-prob gather


@contextlib.contextmanager
def exact_bf16():
    """Let a CPU multiply float32 values as bfloat16, up to three times as fast.

    The values were bfloat16 before, so nothing is rounded, and sums are in float32 as always.
    """
    flags = torch.backends.mkldnn.matmul
    before = flags.fp32_precision
    flags.fp32_precision = "bf16"
    try:
        yield
    finally:
        flags.fp32_precision = before


def chunk_logits(out, hidden, head, softcap):
    """Logits of one chunk, written into `out` (T, V), float32 (float64 from float64).

    From bfloat16 too they are float32, not rounded to bfloat16 first.
    """
    if hidden.dtype == out.dtype:
        torch.mm(hidden, head.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, head.T, out_dtype=out.dtype, out=out)
    else:
        with exact_bf16():
            torch.mm(hidden.to(out.dtype), head.T, out=out)
    if softcap is not None:
        out.div_(softcap).tanh_().mul_(softcap)
    return out


class LogProb(torch.autograd.Function):
    """Log-probs of labels in chunks, so that (T, V) never exists unless it is one chunk.

    Backward computes each chunk's logits again; where there is only one chunk, it is kept instead.
    One buffer serves all chunks: fresh memory costs a CPU as much as the product that fills it.
    """

    @staticmethod
    def buffers(hidden, weight, labels, chunk):
        """The head as chunk_logits wants it (wide on a CPU), and room for the logits of a chunk."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        head = weight
        if not weight.is_cuda:
            head = weight.to(wide)
        buffer = hidden.new_empty(min(chunk, len(labels)), len(weight), dtype=wide)  # (chunk, V)
        return head, buffer

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, softcap, squares):
        head, buffer = LogProb.buffers(hidden, weight, labels, chunk)
        logp = buffer.new_empty(len(labels))
        log_squares = buffer.new_zeros(len(labels))
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            out = buffer[: len(labels[part])]
            logits = chunk_logits(out, hidden[part], head, softcap)  # (chunk, V)
            log_softmax = torch.log_softmax(logits, -1, out=logits)  # in place
            logp[part] = log_softmax.gather(-1, labels[part, None])[:, 0]
            if squares:
                log_squares[part] = torch.logsumexp(2 * log_softmax, -1)

        # a single chunk is still in the buffer; behind a soft-cap backward needs the logits too
        all_logp = None
        if softcap is None and len(labels) <= chunk:
            all_logp = buffer
        ctx.mark_non_differentiable(log_squares)
        ctx.save_for_backward(hidden, weight, labels, all_logp)
        ctx.chunk = chunk
        ctx.softcap = softcap
        return logp, log_squares

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, labels, all_logp = ctx.saved_tensors
        if all_logp is None:
            head, buffer = LogProb.buffers(hidden, weight, labels, ctx.chunk)
        else:
            buffer = all_logp  # (T, V)
        d_hidden = torch.empty_like(hidden)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=buffer.dtype)  # float32 across chunks

        for start in range(0, len(labels), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            out = buffer[: len(labels[part])]
            slope = None  # of the soft-cap
            if all_logp is not None:
                p = out.exp_()  # (chunk, V)
            else:
                logits = chunk_logits(out, hidden[part], head, ctx.softcap)
                if ctx.softcap is not None:
                    slope = 1 - (logits / ctx.softcap) ** 2
                p = torch.softmax(logits, -1, out=logits)  # (chunk, V)

            # d loss / d logits = grad * (onehot - p), in the same memory
            d = p.mul_(-grad[part, None])
            d.scatter_add_(1, labels[part, None], grad[part, None])
            if slope is not None:
                d.mul_(slope)
            d = d.to(hidden.dtype)

            d_hidden[part] = d @ weight
            if d_weight is not None and d_weight.dtype == d.dtype:
                d_weight.addmm_(d.T, hidden[part])
            elif d_weight is not None and d.is_cuda:
                # added up in float32, where the line below rounds each chunk's product
                torch.addmm(d_weight, d.T, hidden[part], out_dtype=d_weight.dtype, out=d_weight)
            elif d_weight is not None:
                d_weight += d.T @ hidden[part]

        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None


def logprob(hidden, weight, labels, chunk=1024, softcap=None, squares=False):
    """Log-probability of each label in nats, (T,) float32, differentiable in hidden and weight.

    hidden: (T, D) states that predict the labels. weight: (V, D) of the output head, whole, not
    sharded. labels: (T,) ids. chunk: tokens whose logits exist at once (and until backward, if
    these are all). softcap: Gemma-2's cap * tanh(logits / cap), whose head is bypassed here.
    squares: return log(sum of p^2 over the vocabulary), (T,), too, a constant: how certain the
    policy is (WPO). From float64 the result is float64.
    """
    logp, log_squares = LogProb.apply(hidden, weight, labels, chunk, softcap, squares)
    if squares:
        return logp, log_squares
    return logp
