"""losses.py: the gather against log_softmax and torch; every objective by hand, and against TRL."""

import inspect
import itertools
import math
import statistics

import pytest
import torch

from losses import (
    OBJECTIVES,
    LogProb,
    arguments_of,
    drawn_tokens,
    logprob,
    pair_loss,
    parse_mix,
    segment_sums,
    symbols_of,
    term_losses,
    wpo_weights,
)

# ---------------------------------------------------------------------------- log-prob gather


def tokens(dtype, T=37, D=16, V=101):
    """(hidden, weight, labels, incoming gradient); logits of size 4, so a soft-cap of 3 bites."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=rng).to(dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=rng)
    grad = torch.randn(T, generator=rng)
    return hidden, weight, labels, grad


def plain_logits(hidden, weight, softcap):
    """The logits as a model would make them, (T, V)."""
    logits = hidden @ weight.T
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def assert_same_gradients(ours, our_inputs, theirs, their_inputs, grad, tolerance):
    """Both outputs, given the same incoming gradient, have the same gradients at their inputs."""
    our_gradients = torch.autograd.grad(ours, our_inputs, grad)
    their_gradients = torch.autograd.grad(theirs, their_inputs, grad)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients):
        difference = (our_gradient - their_gradient).norm()
        assert difference <= tolerance * their_gradient.norm()


@pytest.mark.parametrize("softcap", [None, 3.0])
# of 37 tokens: one by one, with a rest, all, more than all
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
# plain bfloat16 autograd is 5e-3 off
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_the_gather_equals_log_softmax_in_value_and_both_gradients(
    dtype, tolerance, chunk, softcap
):
    hidden, weight, labels, grad = tokens(dtype)
    plain_hidden = hidden.detach().float().requires_grad_()
    plain_weight = weight.detach().float().requires_grad_()
    logits = plain_logits(plain_hidden, plain_weight, softcap)
    plain = logits.log_softmax(-1)[torch.arange(37), labels]

    ours = logprob(hidden, weight, labels, chunk, softcap)

    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)  # float32 from bfloat16 too
    assert_same_gradients(
        ours, (hidden, weight), plain, (plain_hidden, plain_weight), grad, tolerance
    )


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"),
    reason="linear_cross_entropy came with torch 2.13",
)
def test_the_gather_equals_the_fused_function_of_torch():
    hidden, weight, labels, grad = tokens(torch.float32)

    ours = logprob(hidden, weight, labels, 8)
    nll = torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="none")

    torch.testing.assert_close(ours, -nll, rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, (hidden, weight), -nll, (hidden, weight), grad, 1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gather_passes_gradcheck_in_float64(softcap):
    hidden, weight, labels, _ = tokens(torch.float64, T=5, D=4, V=7)

    def gather(hidden, weight):
        return logprob(hidden, weight, labels, 2, softcap)

    assert torch.autograd.gradcheck(gather, (hidden, weight))


def test_zero_tokens_have_no_log_probability_and_gradients_of_zero():
    hidden, weight, labels, _ = tokens(torch.bfloat16, T=0)

    logp = logprob(hidden, weight, labels)
    logp.sum().backward()

    assert logp.shape == (0,)
    assert hidden.grad.shape == (0, 16)
    assert (weight.grad == 0).all()


def test_a_frozen_head_costs_no_gradient_and_the_states_get_the_same_one():
    hidden, weight, labels, grad = tokens(torch.float32)
    ctx = logprob(hidden, weight.detach(), labels).grad_fn

    with torch.no_grad():
        d_hidden, d_weight, *_ = LogProb.backward(ctx, grad, None)

    assert d_weight is None
    (expected,) = torch.autograd.grad(logprob(hidden, weight, labels), hidden, grad)
    assert torch.equal(d_hidden, expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_the_gather_also_gives_the_log_of_the_summed_squares_and_the_same_gradients(chunk, softcap):
    hidden, weight, labels, grad = tokens(torch.float32)
    p = plain_logits(hidden, weight, softcap).softmax(-1)

    logp, squares = logprob(hidden, weight, labels, chunk, softcap, squares=True)

    expected = p.square().sum(-1).log().detach()
    torch.testing.assert_close(squares, expected, rtol=1e-5, atol=1e-5)
    assert not squares.requires_grad
    alone = logprob(hidden, weight, labels, chunk, softcap)
    assert_same_gradients(logp, (hidden, weight), alone, (hidden, weight), grad, 1e-7)


def test_tokens_past_the_shorter_response_weigh_less_and_wpo_weighs_pairs_as_their_papers_have_it():
    lengths = [3, 5, 4, 4, 1, 2]  # three pairs, chosen and rejected in turn
    shorter = [3, 3, 4, 4, 1, 1]
    length_tensor = torch.tensor(lengths)
    rng = torch.Generator().manual_seed(1)
    logp = -3 * torch.rand(19, generator=rng).requires_grad_()
    squares = -torch.rand(19, generator=rng)
    responses = logp.split(lengths)
    squares_of_responses = squares.split(lengths)

    sums = [response.sum().item() for response in responses]
    assert segment_sums(logp, length_tensor).tolist() == pytest.approx(sums)

    # LD-DPO
    discounted = []
    for response, k in zip(responses, shorter):
        discounted.append(response[:k].sum() + 0.3 * response[k:].sum())
    discounted = torch.stack(discounted)
    ours = segment_sums(logp, length_tensor, 0.3)
    torch.testing.assert_close(ours, discounted)
    assert_same_gradients(ours, logp, discounted, logp, torch.arange(6.0), 1e-7)

    # WPO
    expected = []
    for k in (0, 2, 4):
        chosen = (responses[k] - squares_of_responses[k]).mean().item()
        rejected = (responses[k + 1] - squares_of_responses[k + 1]).mean().item()
        expected.append(min(1.0, math.exp(chosen + rejected)))
    weights = wpo_weights(logp, squares, length_tensor)
    assert weights.tolist() == pytest.approx(expected)
    assert not weights.requires_grad
    assert min(expected) < 1
    assert wpo_weights(logp, squares - 9, length_tensor).tolist() == [1, 1, 1]  # clamped


def test_sampo_draws_as_many_tokens_of_both_responses_and_each_token_as_often():
    lengths = torch.tensor([3, 8, 4, 4, 5, 1])
    draws = [drawn_tokens(lengths, [seed, seed + 1, seed + 2]) for seed in range(2000)]

    for drawn in draws:
        counts = [part.sum().item() for part in drawn.split(lengths.tolist())]
        assert counts == [3, 3, 4, 4, 1, 1]

    # the shorter response whole, of the longer each token with the same probability
    shares = torch.stack(draws).double().mean(0)
    expected = [1] * 3 + [3 / 8] * 8 + [1] * 8 + [1 / 5] * 5 + [1]
    assert shares.tolist() == pytest.approx(expected, abs=0.04)  # three deviations are 0.033

    # a pair's draw is its seed's, in whatever micro-batch
    alone = drawn_tokens(torch.tensor([3, 8]), [7])
    assert torch.equal(drawn_tokens(torch.tensor([4, 4, 3, 8]), [1, 7])[8:], alone)
    assert not torch.equal(drawn_tokens(torch.tensor([3, 8]), [8]), alone)


# ---------------------------------------------------------------------------- values and gradients

# fmt: off
SETTINGS = dict(  # no two alike
    beta=0.3, alpha=0.07, lambda_=0.4, gamma=0.6, eta=0.7, tau=0.2, delta=1.3, eps=0.15,
)
COLUMNS = (
    "logp_w", "logp_l", "ref_w", "ref_l", "len_w", "len_l", "z", "q_w", "q_l", "g_w", "g_l",
)
ROWS = (  # between them they visit both sides of every relu
    # the policy went the wrong way
    (-14.2, -11.7, -13.1, -12.9, 9.0, 7.0, 1.1, 0.7, 0.2, 0.9, -0.3),
    # the label doubts the order
    (-6.5, -15.3, -8.4, -12.1, 5.0, 12.0, -0.4, 0.6, 0.3, 0.1, 0.4),
    # far apart
    (-2.4, -20.8, -5.0, -19.9, 8.0, 13.0, 2.5, 0.9, 0.4, 2.0, -1.5),
    # further apart than the second one, but not under the reference
    (-7.0, -17.0, -9.5, -12.5, 6.0, 10.0, 0.8, 0.8, 0.1, 1.2, -0.6),
)
# fmt: on
PAIRS = [dict(zip(COLUMNS, row)) for row in ROWS]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(logp_w, logp_l, ref_w, ref_l, len_w, len_l, z, q_w, q_l, g_w, g_l, *, batch):
    """Every objective for one pair, from the papers, in plain floats.

    batch: what batch_statistics() says of this pair, all constant.
    """
    beta, alpha, lambda_, gamma, eta, tau, delta, eps = SETTINGS.values()
    log = math.log
    r_w = logp_w - ref_w
    r_l = logp_l - ref_l
    avg_w = logp_w / len_w
    avg_l = logp_l / len_l

    def ce(x):
        """Cross-entropy between the label and sigmoid(x)."""
        return -sigmoid(z) * log(sigmoid(x)) - sigmoid(-z) * log(sigmoid(-x))

    reward = beta * (r_w - r_l)  # of chosen over rejected, as DPO sees it
    aipo_reward = reward - alpha * beta * (ref_w - ref_l)
    q = sigmoid(reward)
    odds_w = math.exp(avg_w) / (1 - math.exp(avg_w))
    odds_l = math.exp(avg_l) / (1 - math.exp(avg_l))
    n = r_w / len_w - r_l / len_l
    half = 1 / (2 * beta)
    k_w = batch["k_w"]
    k_l = batch["k_l"]

    # f' of the divergence, or the bent reward, at a ratio or probability u
    u_w = math.exp(r_w)
    u_l = math.exp(r_l)
    bent_w = (1 - math.exp(avg_w) ** -alpha) / alpha
    bent_l = (1 - math.exp(avg_l) ** -alpha) / alpha
    blend = sigmoid(reward / tau)

    # fmt: off
    return dict(
        dpo=ce(reward),
        robust=(-(1 - eps) * log(q) + eps * log(1 - q)) / (1 - 2 * eps),
        alpha_dpo=ce(aipo_reward),
        aipo=ce(aipo_reward) - lambda_ * avg_w,
        irpo=ce(reward) - lambda_ * avg_w,
        rpo=ce(reward) - eta * beta * logp_w,
        rdpo=ce(reward + alpha * len_w - alpha * len_l),
        dpop=ce(reward - beta * lambda_ * max(0, ref_w - logp_w)),
        dpo_shift=ce(beta * r_w - beta * lambda_ * r_l),
        dpo_norm=ce(beta * n),
        cal_dpo=ce(r_w - r_l) + ((r_w - half) ** 2 + (r_l + half) ** 2) / 2,
        exo=q * log(q / (1 - eps)) + (1 - q) * log((1 - q) / eps),
        f_dpo_alpha=ce(beta * ((1 - u_w ** -alpha) / alpha - (1 - u_l ** -alpha) / alpha)),
        f_dpo_js=ce(beta * (log(2 * u_w / (1 + u_w)) - log(2 * u_l / (1 + u_l)))),
        chi_po=ce(beta * (u_w + log(u_w)) - beta * (u_l + log(u_l))),
        discopop=(1 - blend) * -log(q) + blend * math.exp(-reward),
        aot=ce(beta * (logp_w - logp_l - batch["ref_of_this_rank"])),
        ipo=(n - 1 / (2 * tau)) ** 2,
        hinge=max(0, 1 - reward),
        slic=max(0, delta - logp_w + logp_l) - lambda_ * logp_w,
        sppo=((r_w - (q_w - 1 / 2) / beta) ** 2 + (r_l - (q_l - 1 / 2) / beta) ** 2) / 2,
        sppo_hard=(r_w - half) ** 2 + (r_l + half) ** 2,
        irepo=(reward - z) ** 2,
        rebel=(r_w - r_l - eta * g_w + eta * g_l) ** 2,
        inpo=(r_w - r_l - 1 / (2 * eta)) ** 2,
        nca=(-log(sigmoid(beta * r_w))
             - log(sigmoid(-beta * r_w)) / 2 - log(sigmoid(-beta * r_l)) / 2),
        bco=-log(sigmoid(beta * r_w)) - log(1 - sigmoid(beta * r_l)),
        apo_zero=1 - sigmoid(beta * r_w) + sigmoid(beta * r_l),
        apo_down=1 + sigmoid(beta * r_w) - q,
        kto_pair=1 - (sigmoid(beta * (r_w - k_l)) + sigmoid(beta * (k_w - r_l))) / 2,
        simpo=ce(beta / len_w * logp_w - beta / len_l * logp_l - gamma),
        alphapo=ce(beta * bent_w - beta * bent_l - gamma),
        amapo=ce(beta * (avg_w - avg_l) - beta * batch["amapo_margin"]),
        simper=math.exp(avg_l) - math.exp(avg_w),
        repo=max(0, gamma - avg_w + avg_l),
        cpo=ce(beta * (logp_w - logp_l)) - lambda_ * avg_w,
        orpo=-avg_w - lambda_ * log(sigmoid(log(odds_w / odds_l))),
        alpha_dpo_24=ce(beta * (avg_w - avg_l) - (gamma + beta * alpha * batch["zscore"])),
        nll=-avg_w)
    # fmt: on


def batch_statistics():
    """What the objectives that look at the batch see of all PAIRS: one dict per pair."""
    r_w = [p["logp_w"] - p["ref_w"] for p in PAIRS]
    r_l = [p["logp_l"] - p["ref_l"] for p in PAIRS]
    k_w = max(0, statistics.mean(r_w))
    k_l = max(0, statistics.mean(r_l))

    n = [w / p["len_w"] - l / p["len_l"] for p, w, l in zip(PAIRS, r_w, r_l)]
    zscores = [(x - statistics.mean(n)) / statistics.pstdev(n) for x in n]

    s_theta = [p["logp_w"] - p["logp_l"] for p in PAIRS]
    s_ref = [p["ref_w"] - p["ref_l"] for p in PAIRS]
    refs_of_this_rank = [sorted(s_ref)[sorted(s_theta).index(x)] for x in s_theta]
    assert refs_of_this_rank != s_ref  # else aot would be dpo here

    gaps = [p["logp_w"] / p["len_w"] - p["logp_l"] / p["len_l"] for p in PAIRS]
    mean = statistics.mean(gaps)
    margins_of_amapo = []
    for gap in gaps:
        margin = math.exp((mean - gap) / statistics.stdev(gaps) * mean)
        margins_of_amapo.append(margin if gap < mean else 0)

    keys = ("zscore", "ref_of_this_rank", "amapo_margin")
    rows = zip(zscores, refs_of_this_rank, margins_of_amapo)
    return [dict(zip(keys, row), k_w=k_w, k_l=k_l) for row in rows]


def columns_of(pairs, dtype=torch.float64):
    """Pairs (dicts of floats) as a dict of (B,) columns; logp_w and logp_l want their gradient."""
    columns = {}
    for key in pairs[0]:
        columns[key] = torch.tensor([p[key] for p in pairs], dtype=dtype)
    columns["logp_w"].requires_grad_()
    columns["logp_l"].requires_grad_()
    return columns


def loss_and_gradients(name, columns, **settings):
    """Loss per pair and its derivatives by logp_w and logp_l, (B,) each; SETTINGS unless given."""
    loss = pair_loss(name, symbols_of(**columns), **{**SETTINGS, **settings})
    d_w, d_l = torch.autograd.grad(
        loss.sum(), (columns["logp_w"], columns["logp_l"]), materialize_grads=True
    )
    return loss.detach(), d_w, d_l


def test_every_objective_has_its_formula_on_this_page():
    assert list(by_hand(**PAIRS[0], batch=batch_statistics()[0])) == list(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_equal_the_formula_in_plain_floats(name):
    losses, d_w, d_l = loss_and_gradients(name, columns_of(PAIRS))

    for k, (pair, batch) in enumerate(zip(PAIRS, batch_statistics())):
        value = by_hand(**pair, batch=batch)[name]
        assert losses[k].item() == pytest.approx(value, rel=1e-9, abs=1e-9)

        for key, grad in (("logp_w", d_w[k]), ("logp_l", d_l[k])):
            up = by_hand(**pair | {key: pair[key] + 1e-4}, batch=batch)[name]
            down = by_hand(**pair | {key: pair[key] - 1e-4}, batch=batch)[name]
            slope = (up - down) / 2e-4
            assert grad.item() == pytest.approx(slope, rel=1e-6, abs=1e-6), key


EQUAL = dict(  # policy = reference
    logp_w=-10.0, logp_l=-10.0, ref_w=-10.0, ref_l=-10.0, len_w=10.0, len_l=10.0
)
HARD = dict(z=math.inf)
NO_REFERENCE = dict(ref_w=0.0, ref_l=0.0)
ONE_TOKEN = dict(len_w=1.0, len_l=1.0)

# fmt: off
ENVELOPE = [
    # ln 2
    ("dpo", {}, dict(beta=0.1), 0.6931471806),
    # ln(1 + 1/e)
    ("dpo", dict(logp_w=-5.0, logp_l=-15.0), dict(beta=0.1), 0.3132616875),
    # the same + 1/2
    ("dpo", dict(z=0.0, logp_l=-20.0), dict(beta=0.1), 0.8132616875),
    # the same - 0.1 / 0.8
    ("robust", dict(logp_l=-20.0), dict(beta=0.1, eps=0.1), 0.1882616875),
    # ln(1 + e^0.1) + 0.2
    ("aipo", dict(logp_l=-30.0, ref_l=-30.0), dict(beta=0.1, alpha=0.05, lambda_=0.2),
     0.9443966601),
    # ln(1 + e^-0.1)
    ("rdpo", dict(len_w=12.0), dict(beta=0.1, alpha=0.05), 0.6443966601),
    # ln(1 + e^15)
    ("dpop", dict(logp_w=-11.0, logp_l=-11.0), dict(beta=0.3, lambda_=50), 15.0000003059),
    # ln 2 + (25 + 25) / 2
    ("cal_dpo", {}, dict(beta=0.1), 25.6931471806),
    ("ipo", {}, dict(tau=0.1), 25.0),
    # 1 - 0.4 + 0.1 * 10
    ("slic", dict(logp_l=-10.4), dict(delta=1, lambda_=0.1), 1.6),
    # (2.5^2 + 5^2) / 2
    ("sppo", dict(q_w=0.75, q_l=0.0), dict(beta=0.1), 15.625),
    # (0.5 - 2)^2
    ("irepo", dict(z=2.0, logp_w=-5.0), dict(beta=0.1), 2.25),
    # u = 2: ln(1 + e^-(1 - 1/2))
    ("f_dpo_alpha", dict(logp_w=-10 + math.log(2)), dict(beta=1, alpha=1), 0.4740769842),
    # u = 3: log(2 * 3/4), so ln(1 + 2/3)
    ("f_dpo_js", dict(logp_w=-10 + math.log(3)), dict(beta=1), 0.5108256238),
    # (2 + ln 2) - (1 + 0) = 1 + ln 2: ln(1 + 1/(2e))
    ("chi_po", dict(logp_w=-10 + math.log(2)), dict(beta=1), 0.1688476235),
    # half of ln 2, half of e^0
    ("discopop", {}, dict(beta=0.1, tau=0.05), 0.8465735903),
    # one pair: as dpo
    ("aot", dict(logp_w=-5.0, logp_l=-15.0), dict(beta=0.1), 0.3132616875),
    # rewards (1 - 1/P) of P = 1/2 and 1/5: -1 + 4 - 1 = 2, ln(1 + e^-2)
    ("alphapo", dict(logp_w=math.log(1 / 2), logp_l=math.log(1 / 5)) | ONE_TOKEN,
     dict(beta=1, gamma=1, alpha=1), 0.1269280110),
    # one pair is not below its mean: ln(1 + 1/e)
    ("amapo", dict(logp_w=-5.0, logp_l=-15.0), dict(beta=1), 0.3132616875),
    # 1/5 - 1/2
    ("simper", dict(logp_w=math.log(1 / 2), logp_l=math.log(1 / 5)) | ONE_TOKEN, {}, -0.3),
    # ln 2 + ln 5/4
    ("orpo", dict(logp_w=math.log(1 / 2), logp_l=math.log(1 / 5)) | ONE_TOKEN, dict(lambda_=1),
     0.9162907319),
]
# fmt: on


@pytest.mark.parametrize("name, pair, settings, value", ENVELOPE)
def test_values_that_fit_on_the_back_of_an_envelope(name, pair, settings, value):
    loss = pair_loss(name, symbols_of(**columns_of([EQUAL | pair])), **settings)

    assert loss.item() == pytest.approx(value, abs=1e-9)


# ---------------------------------------------------------------------------- limits and symmetry

READ_P = [name for name, f in OBJECTIVES.items() if "p" in inspect.signature(f).parameters]

# objective, its settings, the objective it becomes, that one's settings, what the pairs have
LIMITS = [
    ("aipo", dict(alpha=0, lambda_=0), "dpo", {}, {}),
    ("aipo", dict(lambda_=0), "alpha_dpo", {}, {}),
    ("aipo", dict(alpha=0), "irpo", {}, {}),
    ("alpha_dpo", dict(alpha=0), "dpo", {}, {}),
    ("irpo", dict(lambda_=0), "dpo", {}, {}),
    ("rdpo", {}, "dpo", {}, dict(len_w=6.0, len_l=6.0)),
    ("dpop", dict(lambda_=0), "dpo", {}, {}),
    ("dpo_shift", dict(lambda_=1), "dpo", {}, {}),
    ("dpo_norm", {}, "dpo", {}, ONE_TOKEN),
    ("robust", dict(eps=0), "dpo", {}, HARD),
    ("cpo", dict(lambda_=0), "dpo", {}, NO_REFERENCE),
    ("f_dpo_alpha", dict(alpha=0), "dpo", {}, {}),
    ("f_dpo_alpha", dict(alpha=1e-9), "dpo", {}, {}),
    ("alphapo", dict(alpha=0), "simpo", {}, {}),
    ("alphapo", dict(alpha=1, gamma=0), "f_dpo_alpha", dict(alpha=1), NO_REFERENCE | ONE_TOKEN),
    ("aot", {}, "dpo", {}, dict(ref_w=-9.0, ref_l=-11.0)),
    ("amapo", {}, "simpo", dict(gamma=0), dict(logp_w=-12.0, logp_l=-15.0, len_w=6.0, len_l=6.0)),
    ("alpha_dpo_24", dict(alpha=0), "simpo", {}, {}),
    ("ipo", dict(tau=0.4), "inpo", dict(eta=0.4), ONE_TOKEN),
    ("irepo", dict(beta=1), "inpo", dict(eta=0.25), dict(z=2.0)),
    ("rebel", dict(eta=0.5), "irepo", dict(beta=1), dict(g_w=3.0, g_l=1.0, z=1.0)),
]


def pairs_with(**columns):
    """PAIRS as columns, some of them replaced."""
    return columns_of([pair | columns for pair in PAIRS])


@pytest.mark.parametrize("name, settings, other, other_settings, pair", LIMITS)
def test_limits_lead_from_one_objective_to_another(name, settings, other, other_settings, pair):
    columns = pairs_with(**pair)

    torch.testing.assert_close(
        loss_and_gradients(name, columns, **settings),
        loss_and_gradients(other, columns, **other_settings),
    )


def test_irepo_is_zero_where_the_reward_equals_the_evidence():
    columns = columns_of(PAIRS)
    columns["z"] = (0.3 * symbols_of(**columns)["s"]).detach()

    for values in loss_and_gradients("irepo", columns, beta=0.3):
        assert (values == 0).all()


def test_dpo_with_label_smoothing_is_the_two_terms_of_cdpo():
    losses, *_ = loss_and_gradients("dpo", pairs_with(**HARD), label_smoothing=0.1)

    for pair, loss in zip(PAIRS, losses):
        x = 0.3 * ((pair["logp_w"] - pair["logp_l"]) - (pair["ref_w"] - pair["ref_l"]))
        cdpo = 0.9 * math.log(1 + math.exp(-x)) + 0.1 * math.log(1 + math.exp(x))
        assert loss.item() == pytest.approx(cdpo, abs=1e-12)


@pytest.mark.parametrize("name", READ_P)
@pytest.mark.parametrize("z", [math.inf, 1.5])
def test_label_smoothing_mixes_the_label_with_its_opposite(name, z):
    smooth = loss_and_gradients(name, pairs_with(z=z), label_smoothing=0.1)
    right = loss_and_gradients(name, pairs_with(z=z), label_smoothing=0)
    flipped = loss_and_gradients(name, pairs_with(z=-z), label_smoothing=0)

    mixed = tuple(0.9 * a + 0.1 * b for a, b in zip(right, flipped))
    torch.testing.assert_close(smooth, mixed)


@pytest.mark.parametrize("name", ["dpo", "rdpo", "dpop", "dpo_shift", "dpo_norm"])
def test_an_undecided_label_leaves_the_policy_at_the_reference(name):
    _, d_w, d_l = loss_and_gradients(name, columns_of([EQUAL | dict(z=0.0)]))

    assert d_w.item() == d_l.item() == 0


def swapped(pair):
    """The same comparison told from the other side."""
    other_side = {"z": -pair["z"]}
    for symbol in ("logp", "ref", "len", "q", "g"):
        other_side[f"{symbol}_w"] = pair[f"{symbol}_l"]
        other_side[f"{symbol}_l"] = pair[f"{symbol}_w"]
    return other_side


SYMMETRIC = [
    "dpo",
    "alpha_dpo",
    "rdpo",
    "dpo_norm",
    "f_dpo_alpha",
    "f_dpo_js",
    "chi_po",
    "irepo",
    "sppo",
    "rebel",
]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_swapping_chosen_with_rejected_and_the_sign_of_z_changes_nothing(name):
    loss, d_w, d_l = loss_and_gradients(name, columns_of([swapped(p) for p in PAIRS]))

    torch.testing.assert_close((loss, d_l, d_w), loss_and_gradients(name, columns_of(PAIRS)))


def test_robust_under_flipped_labels_is_dpo_on_average():
    right, *_ = loss_and_gradients("robust", columns_of(PAIRS))
    flipped, *_ = loss_and_gradients("robust", columns_of([swapped(p) for p in PAIRS]))
    dpo, *_ = loss_and_gradients("dpo", pairs_with(**HARD))

    torch.testing.assert_close(0.85 * right + 0.15 * flipped, dpo)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_from_the_reference_hard_labels_raise_chosen_and_lower_rejected(name):
    certain = dict(z=math.inf, q_w=1.0, q_l=0.0, g_w=1.0, g_l=0.0)
    if name == "irepo":
        certain["z"] = 4.0
    pairs = []
    for logp_w, logp_l, len_w, len_l in ((-10.0, -10.0, 9.0, 9.0), (-30.0, -20.0, 15.0, 12.0)):
        row = (logp_w, logp_l, logp_w, logp_l, len_w, len_l)
        pairs.append(dict(zip(COLUMNS, row)) | certain)

    _, d_w, d_l = loss_and_gradients(name, columns_of(pairs))

    if name == "nll":  # SFT knows no rejected response
        assert (d_l == 0).all()
    else:
        assert (d_l > 0).all()
    if name == "apo_down":
        assert (d_w == 0).all()
    else:
        assert (d_w < 0).all()


def test_apo_down_lowers_the_chosen_response_too_once_it_has_left_the_reference():
    _, d_w, d_l = loss_and_gradients("apo_down", columns_of([EQUAL | dict(logp_l=-15.0)]))

    assert d_l.item() > d_w.item() > 0


@pytest.mark.parametrize("tau, rises", [(0.05, True), (0.2, False)])
def test_discopop_lowers_the_chosen_response_at_first_with_the_tau_of_its_paper(tau, rises):
    _, d_w, d_l = loss_and_gradients("discopop", columns_of([EQUAL]), tau=tau)

    # (1 - ln 2) / (4 tau) - 3/4, times beta
    slope = 0.3 * ((1 - math.log(2)) / (4 * tau) - 3 / 4)
    assert d_w.item() == pytest.approx(slope)
    assert d_l.item() == pytest.approx(-slope)
    assert (slope > 0) == rises


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_log_probabilities_give_finite_losses_and_gradients(name):
    pairs = []
    for sums in itertools.product((-1e4, -1e-6, 0.0), repeat=4):  # an average of 0 has p = 1
        for length in (1.0, 2000.0):
            for z in (-4.0, 4.0):
                row = (*sums, length, length, z, 1.0, 0.0, 1.0, 0.0)
                pairs.append(dict(zip(COLUMNS, row)))

    for values in loss_and_gradients(name, columns_of(pairs, torch.float32)):
        assert values.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_process_without_pairs_has_a_loss_of_zero(name):
    columns = {}
    for key, column in columns_of(PAIRS).items():
        columns[key] = column.detach()[:0].requires_grad_(column.requires_grad)

    for values in loss_and_gradients(name, columns):
        assert values.shape == (0,)
        assert values.sum().item() == 0


# ---------------------------------------------------------------------------- mixes

MPO = "0.8*dpo+0.2*bco+nll"
# between them they read every symbol that an objective can want beside the sums
MIXES = [MPO, "2*simpo+.5*irepo+1e-2*rebel", "dpo + 0.3*amapo + 0.1*sppo + 0.05*kto_pair"]


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_and_its_gradients_are_the_weighted_sums_of_its_terms_alone(mix):
    columns = columns_of(PAIRS)

    expected = [0, 0, 0]
    for name, weight in parse_mix(mix).items():
        alone = loss_and_gradients(name, columns)
        expected = [total + weight * value for total, value in zip(expected, alone)]

    torch.testing.assert_close(loss_and_gradients(mix, columns), tuple(expected))


def test_a_mix_is_read_as_it_is_written():
    assert parse_mix("dpo") == {"dpo": 1}
    assert list(parse_mix(MPO).items()) == [("dpo", 0.8), ("bco", 0.2), ("nll", 1)]
    assert parse_mix(" .5 * alpha_dpo_24 + 2e-3*rpo ") == {"alpha_dpo_24": 0.5, "rpo": 0.002}


def test_a_mix_reads_what_its_terms_read_each_once():
    symbols, settings = arguments_of("0.5*aipo+0.5*irpo+simpo")

    assert symbols == ["s_theta", "s_ref", "p", "nll", "s", "avg_w", "avg_l"]
    assert settings == ["beta", "alpha", "lambda_", "gamma"]


def test_the_terms_of_a_mix_are_what_each_would_be_alone():
    symbols = symbols_of(**columns_of(PAIRS))

    terms = term_losses(MPO, symbols, **SETTINGS)

    assert list(terms) == ["dpo", "bco", "nll"]
    for name, term in terms.items():
        assert torch.equal(term, pair_loss(name, symbols, **SETTINGS))


def test_label_smoothing_of_a_mix_reaches_the_terms_that_read_the_label():
    columns = columns_of(PAIRS)
    symbols = symbols_of(**columns)

    smooth = pair_loss("dpo+nll", symbols, label_smoothing=0.1, **SETTINGS)

    dpo = pair_loss("dpo", symbols, label_smoothing=0.1, **SETTINGS)
    torch.testing.assert_close(smooth, dpo + symbols["nll"])


@pytest.mark.parametrize(
    "mix, word",
    [
        ("0.8dpo+0.2*bco", "loss '0.8dpo' is unknown"),
        ("0.8 dpo", "loss '0.8 dpo' is unknown"),
        ("dpo*0.8", "loss 'dpo*0.8' is unknown"),
        ("0.8*dpo+0.2*bcoo", "loss '0.2*bcoo' is unknown"),
        ("0.8*dpo,0.2*bco", "loss '0.8*dpo,0.2*bco' is unknown"),
        ("dpo-0.2*bco", "loss 'dpo-0.2*bco' is unknown"),
        ("dpo+-1*bco", "loss '-1*bco' is unknown"),
        ("dpo++bco", "loss '' is unknown"),
        ("dpo+", "loss '' is unknown"),
        ("", "loss '' is unknown"),
        ("nan*dpo", "loss 'nan*dpo' is unknown"),
        ("2*2*dpo", "loss '2*2*dpo' is unknown"),
        ("dpo+0.5*dpo", "'dpo' comes twice"),
        ("dpo+0*bco", "'0*bco' counts nothing"),
    ],
)
def test_what_is_no_mix_is_refused_in_one_line_that_says_what_can_be_written(mix, word):
    with pytest.raises(ValueError) as error:
        parse_mix(mix)

    assert word in str(error.value)
    assert "\n" not in str(error.value)
    if "unknown" in word:
        assert "0.8*dpo+0.2*bco+nll" in str(error.value)
        assert "simpo" in str(error.value)


# ---------------------------------------------------------------------------- errors

MISTAKES = [
    ("dpo+sppo", "q_w", SETTINGS, ["sppo", "column", "'q_w'"]),
    ("bco+nll", "", dict(SETTINGS, label_smoothing=0.1), ["bco+nll", "label_smoothing"]),
    ("dpoo", "", SETTINGS, ["dpoo", *OBJECTIVES]),
    ("aipo", "", dict(beta=0.1, lambda_=0.2), ["aipo", "setting", "'alpha'"]),
    ("irepo", "z", SETTINGS, ["irepo", "column", "'z'"]),
    ("sppo", "q_l", SETTINGS, ["sppo", "column", "'q_l'"]),
    ("rebel", "g_w", SETTINGS, ["rebel", "column", "'g_w'"]),
]
for objective in OBJECTIVES:
    if objective not in READ_P:
        smoothed = dict(SETTINGS, label_smoothing=0.1)
        MISTAKES.append((objective, "", smoothed, [objective, "label_smoothing"]))


@pytest.mark.parametrize("name, missing, settings, words", MISTAKES)
def test_a_mistake_is_refused_with_a_message_that_names_it(name, missing, settings, words):
    columns = columns_of(PAIRS)
    columns.pop(missing, None)

    with pytest.raises(ValueError) as error:
        pair_loss(name, symbols_of(**columns), **settings)

    for word in words:
        assert word in str(error.value)


# ---------------------------------------------------------------------------- TRL

# our name: TRL's loss_type, a list in its DPO trainer
TRL = dict(
    dpo=["sigmoid"],
    irpo=["sigmoid", "sft"],
    robust=["robust"],
    dpo_norm=["sigmoid_norm"],
    exo=["exo_pair"],
    ipo=["ipo"],
    hinge=["hinge"],
    sppo_hard=["sppo_hard"],
    nca=["nca_pair"],
    bco=["bco_pair"],
    apo_zero=["apo_zero"],
    apo_down=["apo_down"],
    f_dpo_alpha=["sigmoid"],
    f_dpo_js=["sigmoid"],
    discopop=["discopop"],
    simpo="simpo",
    cpo="sigmoid",
    alphapo="alphapo",
)
TRL[MPO] = ["sigmoid", "bco_pair", "sft"]
TRL_WEIGHTS = {"irpo": [1.0, 0.7], MPO: [0.8, 0.2, 1.0]}  # of sft in irpo: our lambda_
TRL_SETTINGS = dict(
    f_dpo_alpha=dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - 0.3),
    f_dpo_js=dict(f_divergence_type="js_divergence"),
    discopop=dict(discopop_tau=0.2),
    alphapo=dict(alpha=0.3),
)
TEXTS = [  # prompt, chosen, rejected
    ("a b c", "d e f", "g"),
    ("b a", "c", "d g f e a"),
    ("e e g a", "b c d", "d c"),
]


def random_llama(seed):
    """Nine words, float64, and weights large enough that two seeds disagree."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).double()


def word_tokenizer():
    """A token per word of "a b c d e f g"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate("</s> <pad> a b c d e f g".split())}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")


def trl_trainer(name, policy, reference, tokenizer, output_dir):
    """TRL's trainer with its own form of this objective, beta 0.2 and the like."""
    import trl
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    rows = []
    for prompt, chosen, rejected in TEXTS:
        rows.append(dict(prompt=prompt, chosen=" " + chosen, rejected=" " + rejected))
    rows = Dataset.from_list(rows)
    common = dict(
        output_dir=str(output_dir),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        beta=0.2,
        loss_type=TRL[name],
        **TRL_SETTINGS.get(name, {}),
    )
    if isinstance(TRL[name], list):
        weights = TRL_WEIGHTS.get(name, [1.0])
        args = trl.DPOConfig(**common, label_smoothing=0.1, loss_weights=weights)
        return trl.DPOTrainer(
            policy, reference, args, train_dataset=rows, processing_class=tokenizer
        )
    cpo_alpha = 0.7 if name == "cpo" else 0.0
    args = CPOConfig(**common, max_length=32, simpo_gamma=0.6, cpo_alpha=cpo_alpha)
    return CPOTrainer(policy, args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("name", TRL)
def test_loss_and_gradients_equal_those_of_a_trl_trainer(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip(
        "trl", reason="TRL is the oracle here: pip install -r requirements-test.txt"
    )
    policy = random_llama(1)
    reference = random_llama(2)
    tokenizer = word_tokenizer()
    trainer = trl_trainer(name, policy, reference, tokenizer, tmp_path)
    parameters = list(policy.parameters())

    def summed(model, prompt, response):
        """Summed log-prob, (1,), of the response and its end token: ids alone, and no mask."""
        prompt_ids = torch.tensor(tokenizer(prompt)["input_ids"])
        response_ids = torch.tensor(tokenizer(response + " </s>")["input_ids"])
        ids = torch.cat([prompt_ids, response_ids])
        hidden = model.model(ids[None]).last_hidden_state[0]  # (T, D)
        predicting = hidden[len(prompt_ids) - 1 : -1]
        return logprob(predicting, model.lm_head.weight, response_ids, chunk=2).sum()[None]

    # pair by pair, because TRL's NLL is a token mean over the batch
    for i, (prompt, chosen, rejected) in enumerate(TEXTS):
        symbols = symbols_of(
            summed(policy, prompt, chosen),
            summed(policy, prompt, rejected),
            summed(reference, prompt, chosen).detach(),
            summed(reference, prompt, rejected).detach(),
            torch.tensor([len(chosen.split()) + 1.0]),
            torch.tensor([len(rejected.split()) + 1.0]),
        )
        assert symbols["s"].abs().item() > 0.1

        settings = dict(beta=0.2, alpha=0.3, tau=0.2, eps=0.1, lambda_=0.7, gamma=0.6)
        ours = pair_loss(name, symbols, **settings).sum()
        batch = trainer.data_collator([trainer.train_dataset[i]])
        theirs = trainer.compute_loss(trainer.model, batch)

        torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-6, atol=1e-6)
        # its head computes in float32
        assert_same_gradients(ours, parameters, theirs, parameters, None, 1e-5)
