"""policy.py: log-probs and gradients against plain transformers, refusals, FLOPs, adapters."""

import pytest
import torch
import torch.distributed as dist
from conftest import build_model
from safetensors.torch import load_file, save_file
from test_packing import prompts_with_responses, random_pairs
from transformers import AutoModelForCausalLM

from nanoaipo import chat
from nanoaipo.errors import InputError
from nanoaipo.packing import pack
from nanoaipo.policy import build_policy, flops
from nanoaipo.weights import load_weights, save_policy

ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": 16},
    "Phi3": {"sliding_window": 16},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {  # a window in the second layer only
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "Gemma2": {
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module")
def mesh():
    """A world of one process, as train.py makes it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def build(model, mesh, **settings):
    """The policy as train.py builds it, in float32; without recomputation unless set otherwise."""
    defaults = {
        "chunk": 16,
        "recompute": 0,
        "compile": False,
        "lora_rank": 0,
        "lora_alpha": 16.0,
    }
    policy = build_policy(str(model), mesh, torch.float32, **defaults | settings)
    load_weights(policy, str(model))
    return policy


def plain(folder, **config):
    """The model as transformers computes it, with its own eager attention."""
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, **config
    )


def logp_alone(lm, pairs):
    """Log-probs of all response tokens, in the order of pack; lm sees one sequence at a time."""
    logp = []
    for prompt, response in prompts_with_responses(pairs):
        logits = lm(torch.tensor([prompt + response])).logits[0]  # (T, V)
        predictions = logits[len(prompt) - 1 : -1].log_softmax(-1)  # (R, V)
        labels = torch.tensor(response)
        logp.append(predictions.gather(-1, labels[:, None])[:, 0])
    return torch.cat(logp)  # (N,)


def saved_weights(policy, model, folder):
    """The weights in the folder that the policy is saved as."""
    folder.mkdir()
    policy.reshard()  # as train.py does after a pass without gradient
    tokenizer, eos_ids = chat.load_tokenizer(model)
    save_policy(policy, str(folder), torch.float32, tokenizer, eos_ids, 0)
    return load_file(folder / "model.safetensors")


# ---- against plain transformers ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_log_probs_equal_each_sequence_alone_in_plain_transformers(
    architecture, mesh, tmp_path
):
    config = ARCHITECTURES[architecture]
    model = build_model(tmp_path / "model", architecture, **config)
    pairs = random_pairs(7)
    policy = build(model, mesh)
    row, lengths, _ = pack(pairs, "packed_sdpa")

    with torch.no_grad():
        packed = policy(**row)
        expected = logp_alone(plain(model), pairs)

        assert policy.kernel == "packed_sdpa"
        assert len(packed) == lengths.sum()
        assert (packed - expected).abs().max() < 1e-5

        # Each special setting of the architecture matters to these pairs
        for key in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
            if key in config:
                wrong = logp_alone(plain(model, **{key: config[key] + 1}), pairs)
                assert (packed - wrong).abs().max() > 1e-3, key

    # What was loaded is what is saved
    before = load_file(model / "model.safetensors")
    after = saved_weights(policy, model, tmp_path / "saved")
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key


@pytest.mark.parametrize(
    "architecture, recompute", [("Llama", 0), ("Llama", 1), ("Llama", 2), ("Gemma2", 0)]
)
def test_packed_gradients_equal_those_of_plain_transformers(
    architecture, recompute, mesh, tmp_path
):
    model = build_model(tmp_path / "model", architecture, **ARCHITECTURES[architecture])
    pairs = random_pairs(7)
    policy = build(model, mesh, recompute=recompute)
    lm = plain(model)
    row, lengths, _ = pack(pairs, "packed_sdpa")

    # Each token counts differently
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(int(lengths.sum()), generator=rng)
    (policy(**row) * weights).sum().backward()
    (logp_alone(lm, pairs) * weights).sum().backward()

    ours = dict(policy.lm.named_parameters())
    theirs = dict(lm.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        gradient = ours[name].grad.full_tensor()
        norm = parameter.grad.norm()
        assert norm > 0, name
        assert (gradient - parameter.grad).norm() < 1e-4 * norm, name


@pytest.mark.parametrize("every, passes", [(0, [1, 1, 1]), (1, [2, 2, 2]), (2, [2, 1, 2])])
def test_every_so_many_layers_are_computed_again(every, passes, mesh, tmp_path):
    model = build_model(tmp_path / "model", num_hidden_layers=3)
    policy = build(model, mesh, recompute=every)
    counted = [0, 0, 0]
    for number, layer in enumerate(policy.lm.model.layers):

        def count(*_, number=number):
            counted[number] += 1

        layer.self_attn.register_forward_pre_hook(count)
    row, _, _ = pack(random_pairs(2), "packed_sdpa")

    policy(**row).sum().backward()

    assert counted == passes


# ---- refusals ----


def test_weights_that_are_not_those_of_the_config_are_refused(mesh, tmp_path):
    model = build_model(tmp_path / "model")
    path = model / "model.safetensors"
    whole = load_file(path)
    norm = "model.norm.weight"

    save_file({key: x for key, x in whole.items() if key != norm}, path)
    with pytest.raises(InputError, match=f"weight {norm} is missing in its safetensors"):
        build(model, mesh)

    save_file(whole | {norm: torch.ones(33)}, path)
    with pytest.raises(InputError, match=rf"{norm} has shape \[33\], its config.json says \[32\]"):
        build(model, mesh)

    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="model.safetensors: not a whole safetensors file"):
        build(model, mesh)

    path.unlink()
    with pytest.raises(InputError, match="no .*safetensors in it; other formats can run code"):
        build(model, mesh)


# ---- FLOPs and adapters ----


def test_flops_by_hand(tiny_model, mesh):
    pair = {"prompt_ids": [1] * 3, "chosen_ids": [1] * 2, "rejected_ids": [1]}
    # A layer: q and o, k and v, the three matrices of the MLP, two norms
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    head = 2 * 262 * 32 * 3  # where a response token is predicted
    attention = 2 * 2 * (4 * 8) * (5**2 + 4**2 - 3**2)

    trained = flops(build(tiny_model, mesh), [pair])

    assert trained == 3 * (2 * 2 * layer * 6 + head + attention)
    assert trained == 831360

    adapters = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))

    with_adapters = flops(build(tiny_model, mesh, lora_rank=4), [pair, pair])

    assert with_adapters == 2 * 2 * (2 * 2 * (layer + adapters) * 6 + head + attention)
    assert with_adapters == 2 * 652544


def test_of_experts_only_those_count_that_a_token_goes_through(mesh, tmp_path):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = build_model(tmp_path / "model", "Mixtral", **experts)
    pair = {"prompt_ids": [1] * 3, "chosen_ids": [1] * 2, "rejected_ids": [1]}
    # q and o, k and v, two of four experts of three matrices, the router, two norms
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 2 * 3 * 32 * 64 + 4 * 32 + 2 * 32
    head = 2 * 262 * 32 * 3
    attention = 2 * 2 * (4 * 8) * (5**2 + 4**2 - 3**2)

    policy = build_policy(
        str(model),
        mesh,
        torch.float32,
        chunk=16,
        recompute=0,
        compile=False,
        lora_rank=0,
        lora_alpha=16.0,
    )

    assert flops(policy, [pair]) == 3 * (2 * 2 * layer * 6 + head + attention)


def test_adapters_start_at_the_model_and_are_saved_merged_as_the_policy_computes(
    tiny_model, mesh, tmp_path
):
    pairs = random_pairs(7)
    policy = build(tiny_model, mesh, lora_rank=4, lora_alpha=6.0)
    row, _, _ = pack(pairs, "packed_sdpa")

    # Only adapters train: A and B of each of the 7 linear maps in 2 layers
    trained = {name: p for name, p in policy.lm.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7
    assert all(".lora_" in name for name in trained)

    # B is zero at first
    with torch.no_grad():
        start = policy(**row)
        assert (start - logp_alone(plain(tiny_model), pairs)).abs().max() < 1e-5

        # With another B the policy is another model, and this one is saved
        policy.reshard()
        rng = torch.Generator().manual_seed(0)
        for name, parameter in trained.items():
            if ".lora_B." in name:
                parameter.to_local().normal_(0, 0.05, generator=rng)
        moved = policy(**row)
        after = saved_weights(policy, tiny_model, tmp_path / "saved")
        reloaded = logp_alone(plain(tmp_path / "saved"), pairs)
    assert (moved - start).abs().max() > 0.1
    assert (moved - reloaded).abs().max() < 1e-5

    # The linear maps have changed, and nothing else
    before = load_file(tiny_model / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.endswith("_proj.weight")}
