"""Each family of models as policy.py computes it, against plain transformers.

A model of two layers and random weights stands for each. Where rows have to be padded is part of
the table, so that no family loses its packed rows unnoticed.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from test_packing import prompts_with_responses, random_pairs
from test_policy import logp_alone

from nanoaipo.errors import InputError
from nanoaipo.packing import pack
from nanoaipo.policy import build_policy, flops
from nanoaipo.weights import load_weights

# In float32 both sides round a hundred operations at 6e-8 each, of log-probs of about 10 nats
TOLERANCE = 2e-5  # nats

SMALL = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

# Kinds of layers. The names differ between families, which ignore those of others
WINDOW = {"sliding_window": 16}
WINDOWED_FIRST = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
DELTA = {  # Gated DeltaNet
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
PER_LAYER_INPUT = {"vocab_size_per_layer_input": 262, "hidden_size_per_layer_input": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}
DYNAMIC = {
    "rope_type": "dynamic",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Family: its architecture and settings
PACKED = {
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", WINDOW),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Gemma": ("Gemma", {"head_dim": 8}),
    "Gemma 2": ("Gemma2", WINDOW | {"head_dim": 8, "final_logit_softcapping": 300.0}),
    "Gemma 3": ("Gemma3Text", WINDOWED_FIRST | {"head_dim": 8}),
    "Gemma 3n": (
        "Gemma3nText",
        WINDOWED_FIRST
        | PER_LAYER_INPUT
        | {
            "head_dim": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "intermediate_size": [64, 64],
        },
    ),
    "Gemma 4": (
        "Gemma4Text",
        WINDOWED_FIRST
        | PER_LAYER_INPUT
        | {"head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 0},
    ),
    "Phi-2": ("Phi", {}),
    "Phi-3": ("Phi3", WINDOW),
    "Phi-3.5-MoE": ("Phimoe", EXPERTS),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", WINDOWED_FIRST),
    "OLMoE": ("Olmoe", EXPERTS),
    "SmolLM3": ("SmolLM3", {}),
    "Granite": ("Granite", {}),
    "Granite, scaled": ("Granite", {"logits_scaling": 8.0}),
    "Cohere": ("Cohere", {"logit_scale": 0.0625}),
    "Cohere 2": ("Cohere2", WINDOW | {"logit_scale": 0.25}),
    "GLM": ("Glm", {"head_dim": 8}),
    "GLM 4": ("Glm4", {"head_dim": 8}),
    "EXAONE 4": ("Exaone4", WINDOW),
    "Ministral": ("Ministral", WINDOW | {"head_dim": 8}),
    "Ministral 3": ("Ministral3", {"head_dim": 8}),
    "Helium": ("Helium", {"head_dim": 8}),
    "StarCoder 2": ("Starcoder2", WINDOW),
    "GPT-NeoX": ("GPTNeoX", {}),
    "GPT-2": ("GPT2", {"pad_token_id": None}),
    "OPT": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "Mixtral": ("Mixtral", EXPERTS),
    "Qwen2-MoE": ("Qwen2Moe", EXPERTS),
    "Qwen3-MoE": ("Qwen3Moe", EXPERTS | {"head_dim": 8}),
    "DeepSeek-V3": (
        "DeepseekV3",
        EXPERTS | LATENT | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "Youtu": ("Youtu", LATENT),
    "MiniCPM 3": ("MiniCPM3", LATENT),
    "HunYuan": ("HunYuanDenseV1", {"head_dim": 8}),
    "Arcee": ("Arcee", {}),
    "Seed-OSS": ("SeedOss", {"head_dim": 8}),
    "Apertus": ("Apertus", {}),
    "ERNIE 4.5": ("Ernie4_5", {"head_dim": 8}),
}
PADDED = {
    "StableLM": ("StableLm", {}),
    "Nemotron": ("Nemotron", {}),
    "Falcon": ("Falcon", {}),
    "BLOOM": ("Bloom", {}),
    "Qwen2-MoE, windowed": (
        "Qwen2Moe",
        EXPERTS | WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
    ),
    "gpt-oss": ("GptOss", EXPERTS | WINDOW | {"head_dim": 8}),
    "Phi-3.5": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "Llama, dynamic NTK": ("Llama", {"rope_parameters": DYNAMIC}),
    "Llama 4": ("Llama4Text", EXPERTS | {"head_dim": 8, "attention_chunk_size": 16}),
    "Qwen3-Next": ("Qwen3Next", EXPERTS | DELTA | {"head_dim": 8}),
    "Qwen3.5": ("Qwen3_5Text", DELTA | {"head_dim": 8}),
    "OLMo hybrid": ("OlmoHybrid", DELTA),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Mamba": ("Mamba", {}),
    "Falcon-H1": ("FalconH1", MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.0390625}),
    "Bamba": ("Bamba", MAMBA | {"attn_layer_indices": [1]}),
    "Granite 4": (
        "GraniteMoeHybrid",
        EXPERTS
        | MAMBA
        | {
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 32,
            "logits_scaling": 8.0,
        },
    ),
    "MiniCPM": ("MiniCPM", {}),
}


@pytest.fixture(scope="module")
def mesh():
    """A world of one process, as train.py makes it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def save_family(folder, architecture, config):
    """Save a small random model; all its weights are random, those of norms and biases too."""
    if not hasattr(transformers, architecture + "Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}Config")
    make_config = getattr(transformers, architecture + "Config")
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(
        make_config(**SMALL | config), dtype=torch.float32
    )
    for parameter in lm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    lm.save_pretrained(folder)


def build(folder, mesh, recompute=0):
    """The policy as train.py builds it, in float32."""
    policy = build_policy(
        str(folder),
        mesh,
        torch.float32,
        chunk=16,
        recompute=recompute,
        compile=False,
        lora_rank=0,
        lora_alpha=16.0,
    )
    load_weights(policy, str(folder))
    return policy


def plain_log_probs(lm, pairs):
    """Log-probs of all response tokens, in the order of pack; lm sees one sequence at a time."""
    logp = []
    for prompt, response in prompts_with_responses(pairs):
        # A fresh copy, because dynamic rotary tables remember the longest sequence
        logits = copy.deepcopy(lm)(torch.tensor([prompt + response])).logits[0]  # (T, V)
        predictions = logits[len(prompt) - 1 : -1].log_softmax(-1)  # (R, V)
        labels = torch.tensor(response)
        logp.append(predictions.gather(-1, labels[:, None])[:, 0])
    return torch.cat(logp)  # (N,)


def plain(folder):
    """The model as transformers computes it, with its own eager attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )


# ---- log-probs ----


@pytest.mark.parametrize("family", PACKED | PADDED)
def test_log_probs_equal_each_sequence_alone_in_plain_transformers(family, mesh, tmp_path):
    architecture, config = (PACKED | PADDED)[family]
    save_family(tmp_path / "model", architecture, config)
    pairs = random_pairs(3)
    policy = build(tmp_path / "model", mesh)
    row, lengths, _ = pack(pairs, policy.kernel)

    with torch.no_grad():
        ours = policy(**row)
        lm = plain(tmp_path / "model")
        expected = plain_log_probs(lm, pairs)

        # The prompts matter to these models
        others = [pair | {"prompt_ids": pair["prompt_ids"][::-1]} for pair in pairs]
        assert (plain_log_probs(lm, others) - expected).abs().max() > 1e-3

    assert len(ours) == lengths.sum()
    assert (ours - expected).abs().max() < TOLERANCE
    assert flops(policy, pairs) > 0

    if family in PACKED:
        assert policy.kernel == "packed_sdpa"
        assert policy.why_padded == ""
    else:
        assert policy.kernel == "padded"
        assert policy.why_padded


@pytest.mark.parametrize("family", ["Falcon", "LFM2", "Phi-3.5"])
def test_gradients_of_padded_rows_equal_those_of_plain_transformers(family, mesh, tmp_path):
    architecture, config = PADDED[family]
    save_family(tmp_path / "model", architecture, config)
    pairs = random_pairs(3)
    policy = build(tmp_path / "model", mesh, recompute=1)
    lm = plain(tmp_path / "model")
    row, lengths, _ = pack(pairs, policy.kernel)

    # Each token counts differently
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(int(lengths.sum()), generator=rng)
    (policy(**row) * weights).sum().backward()
    (logp_alone(lm, pairs) * weights).sum().backward()

    ours = dict(policy.lm.named_parameters())
    for name, parameter in lm.named_parameters():
        gradient = ours[name].grad.full_tensor()
        norm = parameter.grad.norm()
        assert norm > 0, name
        assert (gradient - parameter.grad).norm() < 1e-4 * norm, name


# ---- what is random, and what is refused ----


def test_the_choice_of_experts_is_the_same_twice(mesh, tmp_path):
    architecture, config = PACKED["Phi-3.5-MoE"]
    noise = {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3, "attention_dropout": 0.3}
    save_family(tmp_path / "model", architecture, config | noise)
    row, _, _ = pack(random_pairs(3), "packed_sdpa")
    policy = build(tmp_path / "model", mesh)

    assert torch.equal(policy(**row), policy(**row))


def test_logits_that_are_made_in_an_unknown_way_are_refused(mesh, tmp_path):
    save_family(tmp_path / "model", "Bert", {"is_decoder": True})

    with pytest.raises(InputError, match="BertLMHeadModel is not supported .*logits"):
        build(tmp_path / "model", mesh)


def test_what_is_no_language_model_is_refused(mesh, tmp_path):
    transformers.CLIPConfig().save_pretrained(tmp_path / "model")

    with pytest.raises(InputError, match="no causal language model of type 'clip"):
        build(tmp_path / "model", mesh)


def test_a_config_that_makes_no_model_is_refused(mesh, tmp_path):
    transformers.LlamaConfig(**SMALL, hidden_act="zap").save_pretrained(tmp_path / "model")

    with pytest.raises(InputError, match="model: its config.json makes no model .KeyError: 'zap'"):
        build(tmp_path / "model", mesh)


LOOKING_AHEAD = {
    "XLM": ("XLM", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}),
    "CpmAnt": ("CpmAnt", {"dim_head": 8, "dim_ff": 64}),
    "Llama as an encoder": ("Llama", {"is_causal": False}),
    "Gemma 3 as an encoder": ("Gemma3Text", {"head_dim": 8, "use_bidirectional_attention": True}),
    "BertGeneration as an encoder": ("BertGeneration", {"is_decoder": False}),
}


@pytest.mark.parametrize("family", LOOKING_AHEAD)
def test_a_model_that_looks_ahead_is_refused(family, mesh, tmp_path):
    architecture, config = LOOKING_AHEAD[family]
    save_family(tmp_path / "model", architecture, config)

    with pytest.raises(InputError, match=r"architecture \w+ is not causal: what it predicts"):
        build(tmp_path / "model", mesh)


def test_layers_that_share_weights_are_refused(mesh, tmp_path):
    layers = ["mamba", "hybrid", "mamba", "hybrid"]
    shared = {"layers_block_type": layers, "num_hidden_layers": 4, "tie_word_embeddings": True}
    save_family(tmp_path / "model", "Zamba2", MAMBA | {"n_mamba_heads": 8} | shared)

    with pytest.raises(InputError, match="Zamba2ForCausalLM is not supported .*share weights"):
        build(tmp_path / "model", mesh)


def test_a_model_that_does_not_take_any_length_is_refused(mesh, tmp_path):
    chunked = {"attn_layers": ["local"], "axial_pos_embds": False, "attention_head_size": 8}
    save_family(tmp_path / "model", "Reformer", chunked | {"is_decoder": True})

    with pytest.raises(InputError, match="ReformerModelWithLMHead is not supported .*length 68"):
        build(tmp_path / "model", mesh)


def test_of_a_model_that_also_sees_the_text_part_is_built(mesh, tmp_path):
    text = SMALL | WINDOWED_FIRST | {"head_dim": 8, "attention_dropout": 0.5}
    transformers.Gemma3Config(text_config=text).save_pretrained(tmp_path / "model")
    # names of weights tell that the head is the embedding
    names = {"model.language_model.embed_tokens.weight": torch.zeros(1)}
    save_file(names, tmp_path / "model" / "model.safetensors")

    policy = build_policy(
        str(tmp_path / "model"),
        mesh,
        torch.float32,
        chunk=16,
        recompute=0,
        compile=False,
        lora_rank=0,
        lora_alpha=16.0,
    )

    assert policy.lm.__class__.__name__ == "Gemma3ForCausalLM"
    assert policy.lm.config.tie_word_embeddings
    assert policy.lm.config.attention_dropout == 0
    assert policy.kernel == "packed_sdpa"
