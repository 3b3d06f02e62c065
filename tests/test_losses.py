"""losses.py: the gather against log_softmax and torch, every objective against its formula in plain floats, and against TRL."""
import inspect
import itertools
import math
import statistics

import pytest
import torch

from losses import OBJECTIVES, LogProb, logprob, margins, pair_loss, segment_sums, wpo_weights

# ---------------------------------------------------------------------------------------------- log-prob gather


def tokens(dtype, T=37, D=16, V=101):
    """Hidden states, head, labels and an incoming gradient; logits of size 4, so that a soft-cap of 3 bites."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=draw).to(dtype).requires_grad_() for n in (T, V))
    return hidden, weight, torch.randint(V, (T,), generator=draw), torch.randn(T, generator=draw)


def assert_same_gradients(ours, our_inputs, theirs, their_inputs, grad, tolerance):
    for a, b in zip(torch.autograd.grad(ours, our_inputs, grad), torch.autograd.grad(theirs, their_inputs, grad)):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])                     # of 37 tokens: one by one, with a rest, all, more than all
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])     # plain bfloat16 autograd: 5e-3
def test_the_gather_equals_log_softmax_in_value_and_both_gradients(dtype, tolerance, chunk, softcap):
    hidden, weight, labels, grad = tokens(dtype)
    plain_hidden, plain_weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    logits = plain_hidden @ plain_weight.T
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    plain, ours = logits.log_softmax(-1)[torch.arange(37), labels], logprob(hidden, weight, labels, chunk, softcap)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)       # float32 from bfloat16 too
    assert_same_gradients(ours, (hidden, weight), plain, (plain_hidden, plain_weight), grad, tolerance)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="linear_cross_entropy came with torch 2.13")
def test_the_gather_equals_the_fused_function_of_torch():
    hidden, weight, labels, grad = tokens(torch.float32)
    ours, theirs = logprob(hidden, weight, labels, 8), -torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, (hidden, weight), theirs, (hidden, weight), grad, 1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gather_passes_gradcheck_in_float64(softcap):
    hidden, weight, labels, _ = tokens(torch.float64, T=5, D=4, V=7)
    assert torch.autograd.gradcheck(lambda h, w: logprob(h, w, labels, 2, softcap), (hidden, weight))


def test_zero_tokens_have_no_log_probability_and_gradients_of_zero():
    hidden, weight, labels, _ = tokens(torch.bfloat16, T=0)
    logp = logprob(hidden, weight, labels)
    logp.sum().backward()
    assert logp.shape == (0,) and hidden.grad.shape == (0, 16) and (weight.grad == 0).all()


def test_a_frozen_head_costs_no_gradient_and_the_states_get_the_same_one():
    hidden, weight, labels, grad = tokens(torch.float32)
    ctx = logprob(hidden, weight.detach(), labels).grad_fn
    with torch.no_grad():
        d_hidden, d_weight, *_ = LogProb.backward(ctx, grad, None)
    assert d_weight is None and torch.equal(d_hidden, *torch.autograd.grad(logprob(hidden, weight, labels), hidden, grad))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_the_gather_also_gives_the_log_of_the_summed_squares_and_the_same_gradients(chunk, softcap):
    hidden, weight, labels, grad = tokens(torch.float32)
    logits = hidden @ weight.T
    p = (torch.tanh(logits / softcap) * softcap if softcap else logits).softmax(-1)
    logp, squares = logprob(hidden, weight, labels, chunk, softcap, squares=True)
    torch.testing.assert_close(squares, p.square().sum(-1).log().detach(), rtol=1e-5, atol=1e-5)
    assert not squares.requires_grad
    assert_same_gradients(logp, (hidden, weight), logprob(hidden, weight, labels, chunk, softcap), (hidden, weight), grad, 1e-7)


def test_tokens_past_the_shorter_response_weigh_less_and_wpo_weighs_pairs_as_their_papers_have_it():
    lengths, draw = [3, 5, 4, 4, 1, 2], torch.Generator().manual_seed(1)                                    # three pairs, chosen and rejected in turn
    logp, squares = -3 * torch.rand(19, generator=draw).requires_grad_(), -torch.rand(19, generator=draw)
    parts, certain = logp.split(lengths), squares.split(lengths)
    assert segment_sums(logp, torch.tensor(lengths)).tolist() == pytest.approx([x.sum().item() for x in parts])
    discounted = [x[:k].sum() + 0.3 * x[k:].sum() for x, k in zip(parts, (3, 3, 4, 4, 1, 1))]
    ours = segment_sums(logp, torch.tensor(lengths), 0.3)
    torch.testing.assert_close(ours, torch.stack(discounted))
    assert_same_gradients(ours, logp, torch.stack(discounted), logp, torch.arange(6.0), 1e-7)
    expected = [min(1.0, math.exp(sum((x - c).mean().item() for x, c in zip(parts[k:k + 2], certain[k:k + 2])))) for k in (0, 2, 4)]
    weights = wpo_weights(logp, squares, torch.tensor(lengths))
    assert weights.tolist() == pytest.approx(expected) and not weights.requires_grad and min(expected) < 1
    assert wpo_weights(logp, squares - 9, torch.tensor(lengths)).tolist() == [1, 1, 1]                      # clamped


# ---------------------------------------------------------------------------------------------- values and gradients

SETTINGS = dict(beta=0.3, alpha=0.07, lambda_=0.4, gamma=0.6, eta=0.7, tau=0.2, delta=1.3, eps=0.15)      # no two alike
COLUMNS = ("logp_w", "logp_l", "ref_w", "ref_l", "len_w", "len_l", "z", "q_w", "q_l", "g_w", "g_l")
PAIRS = [dict(zip(COLUMNS, row)) for row in (                           # between them they visit both sides of every relu
    (-14.2, -11.7, -13.1, -12.9, 9.0, 7.0, 1.1, 0.7, 0.2, 0.9, -0.3),   # the policy went the wrong way
    (-6.5, -15.3, -8.4, -12.1, 5.0, 12.0, -0.4, 0.6, 0.3, 0.1, 0.4),    # the label doubts the order
    (-2.4, -20.8, -5.0, -19.9, 8.0, 13.0, 2.5, 0.9, 0.4, 2.0, -1.5))]   # far apart


def by_hand(logp_w, logp_l, ref_w, ref_l, len_w, len_l, z, q_w, q_l, g_w, g_l, *, k_w, k_l, zscore):
    """Every objective for one pair, from the papers, in plain floats; k_w, k_l, zscore are the batch's and constant."""
    beta, alpha, lambda_, gamma, eta, tau, delta, eps = SETTINGS.values()
    log, exp, r_w, r_l, avg_w, avg_l = math.log, math.exp, logp_w - ref_w, logp_l - ref_l, logp_w / len_w, logp_l / len_l

    def sigmoid(x):
        return 1 / (1 + exp(-x))

    def ce(x):                                                          # cross-entropy between the label and sigmoid(x)
        return -sigmoid(z) * log(sigmoid(x)) - sigmoid(-z) * log(sigmoid(-x))

    reward = beta * (r_w - r_l)                                         # of chosen over rejected, as DPO sees it
    aipo_reward, q = reward - alpha * beta * (ref_w - ref_l), sigmoid(reward)
    odds_w, odds_l = exp(avg_w) / (1 - exp(avg_w)), exp(avg_l) / (1 - exp(avg_l))
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
        dpo_norm=ce(beta * (r_w / len_w - r_l / len_l)),
        cal_dpo=ce(r_w - r_l) + ((r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2) / 2,
        exo=q * log(q / (1 - eps)) + (1 - q) * log((1 - q) / eps),
        ipo=(r_w / len_w - r_l / len_l - 1 / (2 * tau)) ** 2,
        hinge=max(0, 1 - reward),
        slic=max(0, delta - logp_w + logp_l) - lambda_ * logp_w,
        sppo=((r_w - (q_w - 1 / 2) / beta) ** 2 + (r_l - (q_l - 1 / 2) / beta) ** 2) / 2,
        sppo_hard=(r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2,
        irepo=(reward - z) ** 2,
        rebel=(r_w - r_l - eta * g_w + eta * g_l) ** 2,
        inpo=(r_w - r_l - 1 / (2 * eta)) ** 2,
        nca=-log(sigmoid(beta * r_w)) - log(sigmoid(-beta * r_w)) / 2 - log(sigmoid(-beta * r_l)) / 2,
        bco=-log(sigmoid(beta * r_w)) - log(1 - sigmoid(beta * r_l)),
        apo_zero=1 - sigmoid(beta * r_w) + sigmoid(beta * r_l),
        apo_down=1 + sigmoid(beta * r_w) - q,
        kto_pair=1 - (sigmoid(beta * (r_w - k_l)) + sigmoid(beta * (k_w - r_l))) / 2,
        simpo=ce(beta / len_w * logp_w - beta / len_l * logp_l - gamma),
        repo=max(0, gamma - avg_w + avg_l),
        cpo=ce(beta * (logp_w - logp_l)) - lambda_ * avg_w,
        orpo=-avg_w - lambda_ * log(sigmoid(log(odds_w / odds_l))),
        alpha_dpo_24=ce(beta * (avg_w - avg_l) - (gamma + beta * alpha * zscore)))


def batch_statistics():
    """What kto_pair and alpha_dpo_24 see of all PAIRS: one dict per pair."""
    r_w, r_l = ([p["logp_" + x] - p["ref_" + x] for p in PAIRS] for x in "wl")
    n = [w / p["len_w"] - l / p["len_l"] for p, w, l in zip(PAIRS, r_w, r_l)]
    k = dict(k_w=max(0, statistics.mean(r_w)), k_l=max(0, statistics.mean(r_l)))
    return [dict(**k, zscore=(x - statistics.mean(n)) / statistics.pstdev(n)) for x in n]


def columns_of(pairs, dtype=torch.float64):
    """Pairs (dicts of floats) as a dict of (B,) columns; logp_w and logp_l ask for their gradient."""
    return {k: torch.tensor([p[k] for p in pairs], dtype=dtype).requires_grad_(k in ("logp_w", "logp_l")) for k in pairs[0]}


def loss_and_gradients(name, columns, **settings):
    """Loss per pair and its derivatives by logp_w and logp_l, (B,) each; SETTINGS, except what is given."""
    loss = pair_loss(name, margins(**columns), **{**SETTINGS, **settings})
    return loss.detach(), *torch.autograd.grad(loss.sum(), (columns["logp_w"], columns["logp_l"]), materialize_grads=True)


def test_every_objective_has_its_formula_on_this_page():
    assert list(by_hand(**PAIRS[0], **batch_statistics()[0])) == list(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_equal_the_formula_in_plain_floats(name):
    for pair, batch, loss, *grads in zip(PAIRS, batch_statistics(), *loss_and_gradients(name, columns_of(PAIRS))):
        assert loss.item() == pytest.approx(by_hand(**pair, **batch)[name], rel=1e-9, abs=1e-9)
        for key, grad in zip(("logp_w", "logp_l"), grads):
            up, down = (by_hand(**pair | {key: pair[key] + h}, **batch)[name] for h in (1e-4, -1e-4))
            assert grad.item() == pytest.approx((up - down) / 2e-4, rel=1e-6, abs=1e-6), key


EQUAL = dict(logp_w=-10.0, logp_l=-10.0, ref_w=-10.0, ref_l=-10.0, len_w=10.0, len_l=10.0)                # policy = reference
HARD, NO_REFERENCE, ONE_TOKEN = dict(z=math.inf), dict(ref_w=0.0, ref_l=0.0), dict(len_w=1.0, len_l=1.0)


@pytest.mark.parametrize("name, pair, settings, value", [
    ("dpo", {}, dict(beta=0.1), 0.6931471806),                                                            # ln 2
    ("dpo", dict(logp_w=-5.0, logp_l=-15.0), dict(beta=0.1), 0.3132616875),                               # ln(1 + 1/e)
    ("dpo", dict(z=0.0, logp_l=-20.0), dict(beta=0.1), 0.8132616875),                                     # the same + 1/2
    ("robust", dict(logp_l=-20.0), dict(beta=0.1, eps=0.1), 0.1882616875),                                # the same - 0.1 / 0.8
    ("aipo", dict(logp_l=-30.0, ref_l=-30.0), dict(beta=0.1, alpha=0.05, lambda_=0.2), 0.9443966601),     # ln(1 + e^0.1) + 0.2
    ("rdpo", dict(len_w=12.0), dict(beta=0.1, alpha=0.05), 0.6443966601),                                 # ln(1 + e^-0.1)
    ("dpop", dict(logp_w=-11.0, logp_l=-11.0), dict(beta=0.3, lambda_=50), 15.0000003059),                # ln(1 + e^15)
    ("cal_dpo", {}, dict(beta=0.1), 25.6931471806),                                                       # ln 2 + (25 + 25) / 2
    ("ipo", {}, dict(tau=0.1), 25.0),
    ("slic", dict(logp_l=-10.4), dict(delta=1, lambda_=0.1), 1.6),                                        # 1 - 0.4 + 0.1 * 10
    ("sppo", dict(q_w=0.75, q_l=0.0), dict(beta=0.1), 15.625),                                            # (2.5^2 + 5^2) / 2
    ("irepo", dict(z=2.0, logp_w=-5.0), dict(beta=0.1), 2.25),                                            # (0.5 - 2)^2
    ("orpo", dict(logp_w=math.log(1 / 2), logp_l=math.log(1 / 5)) | ONE_TOKEN, dict(lambda_=1), 0.9162907319),   # ln 2 + ln 5/4
])
def test_values_that_fit_on_the_back_of_an_envelope(name, pair, settings, value):
    loss = pair_loss(name, margins(**columns_of([EQUAL | pair])), **settings)
    assert loss.item() == pytest.approx(value, abs=1e-9)


# ---------------------------------------------------------------------------------------------- limits, symmetry, signs

READ_P = [name for name, f in OBJECTIVES.items() if "p" in inspect.signature(f).parameters]


@pytest.mark.parametrize("name, settings, other, other_settings, pair", [
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
    ("alpha_dpo_24", dict(alpha=0), "simpo", {}, {}),
    ("ipo", dict(tau=0.4), "inpo", dict(eta=0.4), ONE_TOKEN),
    ("irepo", dict(beta=1), "inpo", dict(eta=0.25), dict(z=2.0)),
    ("rebel", dict(eta=0.5), "irepo", dict(beta=1), dict(g_w=3.0, g_l=1.0, z=1.0)),
])
def test_limits_lead_from_one_objective_to_another(name, settings, other, other_settings, pair):
    columns = columns_of([p | pair for p in PAIRS])
    torch.testing.assert_close(loss_and_gradients(name, columns, **settings), loss_and_gradients(other, columns, **other_settings))


def test_irepo_is_zero_where_the_reward_equals_the_evidence():
    columns = columns_of(PAIRS)
    columns["z"] = (0.3 * margins(**columns)["s"]).detach()
    assert all((x == 0).all() for x in loss_and_gradients("irepo", columns, beta=0.3))


def test_dpo_with_label_smoothing_is_the_two_terms_of_cdpo():
    for p, loss in zip(PAIRS, loss_and_gradients("dpo", columns_of([p | HARD for p in PAIRS]), label_smoothing=0.1)[0]):
        x = 0.3 * ((p["logp_w"] - p["logp_l"]) - (p["ref_w"] - p["ref_l"]))
        assert loss.item() == pytest.approx(0.9 * math.log(1 + math.exp(-x)) + 0.1 * math.log(1 + math.exp(x)), abs=1e-12)


@pytest.mark.parametrize("name", READ_P)
@pytest.mark.parametrize("z", [math.inf, 1.5])
def test_label_smoothing_mixes_the_label_with_its_opposite(name, z):
    smooth, kept, flipped = (loss_and_gradients(name, columns_of([p | dict(z=y) for p in PAIRS]), label_smoothing=e)
                             for y, e in ((z, 0.1), (z, 0), (-z, 0)))
    torch.testing.assert_close(smooth, tuple(0.9 * a + 0.1 * b for a, b in zip(kept, flipped)))


@pytest.mark.parametrize("name", ["dpo", "rdpo", "dpop", "dpo_shift", "dpo_norm"])
def test_an_undecided_label_leaves_the_policy_at_the_reference(name):
    _, d_w, d_l = loss_and_gradients(name, columns_of([EQUAL | dict(z=0.0)]))
    assert d_w.item() == d_l.item() == 0


def swapped(pair):
    """The same comparison told from the other side."""
    return {k: -v if k == "z" else pair[k[:-1] + "wl"[k[-1] == "w"]] for k, v in pair.items()}


@pytest.mark.parametrize("name", ["dpo", "alpha_dpo", "rdpo", "dpo_norm", "irepo", "sppo", "rebel"])
def test_swapping_chosen_with_rejected_and_the_sign_of_z_changes_nothing(name):
    loss, d_w, d_l = loss_and_gradients(name, columns_of([swapped(p) for p in PAIRS]))
    torch.testing.assert_close((loss, d_l, d_w), loss_and_gradients(name, columns_of(PAIRS)))


def test_robust_under_flipped_labels_is_dpo_on_average():
    kept, flipped = (loss_and_gradients("robust", columns_of(pairs))[0] for pairs in (PAIRS, [swapped(p) for p in PAIRS]))
    torch.testing.assert_close(0.85 * kept + 0.15 * flipped, loss_and_gradients("dpo", columns_of([p | HARD for p in PAIRS]))[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_from_the_reference_hard_labels_raise_chosen_and_lower_rejected(name):
    certain = dict(z=4.0 if name == "irepo" else math.inf, q_w=1.0, q_l=0.0, g_w=1.0, g_l=0.0)
    pairs = [dict(zip(COLUMNS, (w, l, w, l, m, n))) | certain for w, l, m, n in ((-10.0, -10.0, 9.0, 9.0), (-30.0, -20.0, 15.0, 12.0))]
    _, d_w, d_l = loss_and_gradients(name, columns_of(pairs))
    assert (d_l > 0).all() and ((d_w == 0) if name == "apo_down" else (d_w < 0)).all()


def test_apo_down_lowers_the_chosen_response_too_once_it_has_left_the_reference():
    _, d_w, d_l = loss_and_gradients("apo_down", columns_of([EQUAL | dict(logp_l=-15.0)]))
    assert d_l.item() > d_w.item() > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_log_probabilities_give_finite_losses_and_gradients(name):
    sums = itertools.product((-1e4, -1e-6, 0.0), repeat=4)              # an average of 0 is a probability of 1
    pairs = [dict(zip(COLUMNS, (*s, n, n, z, 1.0, 0.0, 1.0, 0.0))) for s in sums for n in (1.0, 2000.0) for z in (-4.0, 4.0)]
    assert all(x.isfinite().all() for x in loss_and_gradients(name, columns_of(pairs, torch.float32)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_process_without_pairs_has_a_loss_of_zero(name):
    columns = {k: v.detach()[:0].requires_grad_(v.requires_grad) for k, v in columns_of(PAIRS).items()}
    assert [(x.shape, x.sum().item()) for x in loss_and_gradients(name, columns)] == [((0,), 0)] * 3


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name, missing, settings, words", [
    ("dpoo", "", SETTINGS, ["dpoo", *OBJECTIVES]),
    ("aipo", "", dict(beta=0.1, lambda_=0.2), ["aipo", "setting", "'alpha'"]),
    ("irepo", "z", SETTINGS, ["irepo", "column", "'z'"]),
    ("sppo", "q_l", SETTINGS, ["sppo", "column", "'q_l'"]),
    ("rebel", "g_w", SETTINGS, ["rebel", "column", "'g_w'"]),
    *((name, "", dict(SETTINGS, label_smoothing=0.1), [name, "label_smoothing"]) for name in OBJECTIVES if name not in READ_P),
])
def test_a_mistake_is_refused_with_a_message_that_names_it(name, missing, settings, words):
    columns = {k: v for k, v in columns_of(PAIRS).items() if k != missing}
    with pytest.raises(ValueError) as error:
        pair_loss(name, margins(**columns), **settings)
    assert all(word in str(error.value) for word in words)


# ---------------------------------------------------------------------------------------------- TRL

TRL = dict(                                                             # our name: TRL's loss_type, a list in its DPO trainer
    dpo=["sigmoid"], irpo=["sigmoid", "sft"], robust=["robust"], dpo_norm=["sigmoid_norm"], exo=["exo_pair"], ipo=["ipo"],
    hinge=["hinge"], sppo_hard=["sppo_hard"], nca=["nca_pair"], bco=["bco_pair"], apo_zero=["apo_zero"], apo_down=["apo_down"],
    simpo="simpo", cpo="sigmoid")
TEXTS = [("a b c", "d e f", "g"), ("b a", "c", "d g f e a"), ("e e g a", "b c d", "d c")]                 # prompt, chosen, rejected


def random_llama(seed):
    """Nine words, float64, and weights large enough that two seeds disagree."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                        initializer_range=0.5, eos_token_id=0, pad_token_id=1, bos_token_id=None)).double()


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("</s> <pad> a b c d e f g".split())}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("name", TRL)
def test_loss_and_gradients_equal_those_of_a_trl_trainer(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl", reason="TRL is the oracle here: pip install -r requirements-test.txt")
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    policy, reference, tokenizer = random_llama(1), random_llama(2), word_tokenizer()
    rows = Dataset.from_list([dict(prompt=prompt, chosen=" " + chosen, rejected=" " + rejected) for prompt, chosen, rejected in TEXTS])
    common = dict(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
                  beta=0.2, loss_type=TRL[name])
    if isinstance(TRL[name], list):                                     # TRL's weight of sft is our lambda_
        args = trl.DPOConfig(**common, label_smoothing=0.1, loss_weights=[1.0, 0.7][:len(TRL[name])])
        trainer = trl.DPOTrainer(policy, reference, args, train_dataset=rows, processing_class=tokenizer)
    else:
        args = CPOConfig(**common, max_length=32, simpo_gamma=0.6, cpo_alpha=0.7 if name == "cpo" else 0.0)
        trainer = CPOTrainer(policy, args, train_dataset=rows, processing_class=tokenizer)

    def summed(model, prompt, response):
        """Summed log-prob of the response and its end token, from the ids alone: no padding and no mask to get wrong."""
        prompt, response = (torch.tensor(tokenizer(x)["input_ids"]) for x in (prompt, response + " </s>"))
        hidden = model.model(torch.cat([prompt, response])[None]).last_hidden_state[0]                    # (T, D)
        return logprob(hidden[len(prompt) - 1:-1], model.lm_head.weight, response, chunk=2).sum()[None]

    for i, (prompt, *responses) in enumerate(TEXTS):                    # pair by pair, because TRL's NLL is a token mean over the batch
        logp, ref = ([summed(model, prompt, r) for r in responses] for model in (policy, reference))
        columns = margins(*logp, *(r.detach() for r in ref), *(torch.tensor([len(r.split()) + 1.0]) for r in responses))
        assert columns["s"].abs().item() > 0.1
        ours = pair_loss(name, columns, beta=0.2, tau=0.2, eps=0.1, lambda_=0.7, gamma=0.6).sum()
        theirs = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i]]))
        torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-6, atol=1e-6)
        assert_same_gradients(ours, list(policy.parameters()), theirs, list(policy.parameters()), None, 1e-5)       # its head: float32
