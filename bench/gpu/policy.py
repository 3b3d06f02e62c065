"""nanoaipo/policy.py, weights.py and checkpoints.py on this device, against plain transformers."""

import os
import tempfile

import torch
from safetensors.torch import load_file

from bench.gpu.device import DEVICE, ON_GPU, apart
from bench.gpu.models import build, plain, plain_log_probs, random_model, random_pairs, worded
from nanoaipo.chat import load_tokenizer
from nanoaipo.checkpoints import load_newest_checkpoint, save_checkpoint, training_state
from nanoaipo.packing import pack
from nanoaipo.weights import save_policy

GEMMA_2 = dict(
    final_logit_softcapping=5.0,
    attn_logit_softcapping=5.0,
    query_pre_attn_scalar=64,
    sliding_window=16,
    tie_word_embeddings=True,
)
PACKED = {
    "Llama": {},
    "Mistral": {"sliding_window": 16},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma2": GEMMA_2,  # the variable-length kernel has no soft-cap
}


# ---------------------------------------------------------------------------- log-probs, gradients


def float32(report):
    """Tight, so that a wrong index cannot hide in rounding: packed_sdpa, soft-caps, padded rows."""
    architectures = {
        "Llama": ("Llama", {}),
        "Gemma 2": ("Gemma2", GEMMA_2),
        # its alibi depends on a row's padding, so it is computed in padded rows
        "BLOOM": ("Bloom", {"n_layer": 2, "n_head": 4}),
    }
    pairs = random_pairs(6)
    for name, (architecture, config) in architectures.items():
        folder = random_model(architecture, **config)
        logp, gradients, kernel = of_policy(folder, pairs, torch.float32, recompute=1)
        exact_logp, exact_gradients = of_transformers(folder, pairs, torch.float32)
        report.below(f"{name} ({kernel}) log-probs", apart(logp, exact_logp), 1e-5)
        report.below(f"{name} gradients", apart(gradients, exact_gradients), 1e-4)


def bfloat16(report):
    """As far from float32 as plain transformers is in bfloat16, and not farther."""
    pairs = random_pairs(6)
    for number, (architecture, config) in enumerate(PACKED.items()):
        folder = random_model(architecture, **config)
        settings = {"recompute": 0, "chunk": 64}
        if number % 2 == 0:
            settings = {"recompute": 1, "chunk": 4096}  # above all tokens: logits are kept
        logp, gradients, kernel = of_policy(folder, pairs, torch.bfloat16, **settings)
        exact_logp, exact_gradients = of_transformers(folder, pairs, torch.float32)
        plain_logp, plain_gradients = of_transformers(folder, pairs, torch.bfloat16)

        # mean in nats, and relative
        distance = (logp - exact_logp).abs().mean().item()
        allowed = 1.5 * (plain_logp - exact_logp).abs().mean().item() + 1e-3
        report.below(f"{architecture} ({kernel}) log-probs", distance, allowed)
        allowed = 1.5 * apart(plain_gradients, exact_gradients) + 1e-2
        report.below(f"{architecture} gradients", apart(gradients, exact_gradients), allowed)
        if ON_GPU and architecture != "Gemma2":
            report.holds("all but Gemma 2 take packed_varlen", kernel == "packed_varlen")


def of_policy(folder, pairs, dtype, **settings):
    """(log-probs (N,), all gradients as one vector, the kernel) of the policy on these pairs."""
    policy = build(folder, dtype, **settings)
    row, _, _ = pack(pairs, policy.kernel)
    logp = policy(**row)
    (logp * token_weights(logp)).sum().backward()
    gradients = {name: p.grad.full_tensor() for name, p in policy.lm.named_parameters()}
    return logp.detach(), in_one_vector(gradients), policy.kernel


def of_transformers(folder, pairs, dtype):
    """(log-probs (N,), all gradients as one vector) of plain transformers, likewise."""
    lm = plain(folder, dtype)
    logp = plain_log_probs(lm, pairs)
    (logp * token_weights(logp)).sum().backward()
    gradients = {name: p.grad for name, p in lm.named_parameters()}
    return logp.detach(), in_one_vector(gradients)


def token_weights(logp):
    """A weight (N,) for each log-prob, so that each counts differently in the gradients."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(len(logp), generator=rng).to(DEVICE)


def in_one_vector(gradients):
    """Gradients {name: tensor} one behind the other, by name."""
    return torch.cat([gradients[name].detach().flatten().cpu() for name in sorted(gradients)])


def without_pairs(report):
    """A process without pairs still computes one token, for the sake of the collectives."""
    policy = build(random_model(), torch.bfloat16, recompute=1)
    row, _, _ = pack([], policy.kernel)
    logp = policy(**row)
    logp.sum().backward()

    gradients = [p.grad.full_tensor() for p in policy.lm.parameters() if p.grad is not None]
    report.holds("there are no log-probs", logp.shape == (0,))
    report.holds("there are gradients", len(gradients) > 0)
    report.holds("all gradients are zero", all(g.abs().max() == 0 for g in gradients))


# ---------------------------------------------------------------------------- files


def checkpoint(report):
    """A checkpoint brings weights and moments back to the bit."""
    policy = build(random_model(), torch.bfloat16)
    trained = dict(policy.lm.named_parameters())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, fused=True)
    row, _, _ = pack(random_pairs(6), policy.kernel)
    policy(**row).sum().backward()
    optimizer.step()
    before = copied(training_state(trained, optimizer))

    output_dir = tempfile.mkdtemp()
    save_checkpoint(output_dir, 1, trained, optimizer, keep=1)
    for tensor in training_state(trained, optimizer).values():
        tensor.zero_()
    steps_done = load_newest_checkpoint(output_dir, trained, optimizer)

    after = copied(training_state(trained, optimizer))
    same = [torch.equal(before[key], after[key]) for key in before]
    report.holds("it is found", steps_done == 1)
    report.holds("all tensors come back", before.keys() == after.keys() and all(same))


def copied(state):
    """A copy of all tensors on the CPU, whole."""
    copies = {}
    for key, tensor in state.items():
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        copies[key] = tensor.detach().cpu().clone()
    return copies


def saved(report):
    """What is saved is the policy, rounded; with adapters, merged."""
    folder = os.path.join(worded(), "model")
    stored = load_file(os.path.join(folder, "model.safetensors"))
    written = load_file(os.path.join(save(build(folder, torch.bfloat16)), "model.safetensors"))
    same = [torch.equal(stored[key].bfloat16(), written[key]) for key in stored]
    report.holds("the weights are the rounded ones", all(same) and len(stored) == len(written))

    # adapters that change the policy
    policy = build(folder, torch.bfloat16, lora_rank=4)
    torch.manual_seed(0)
    for name, parameter in policy.lm.named_parameters():
        if ".lora_B." in name:
            parameter.data.to_local().normal_(0, 0.02)
    pairs = random_pairs(5, longest=40)
    row, _, _ = pack(pairs, policy.kernel)
    with torch.no_grad():
        logp = policy(**row)
        policy.reshard()
        merged = plain_log_probs(plain(save(policy)), pairs)
        start = plain_log_probs(plain(folder), pairs)
    moved = (merged - start).abs().mean()
    report.below("merged, of what adapters change", (merged - logp).abs().mean() / moved, 0.3)


def save(policy):
    """Folder that save_policy writes in bfloat16."""
    folder = tempfile.mkdtemp()
    tokenizer, eos_ids = load_tokenizer(os.path.join(worded(), "model"))
    save_policy(policy, folder, torch.bfloat16, tokenizer, eos_ids, 0)
    return folder
