"""The transformers engine on models whose attention, cache or layers are not Llama's."""

import random

import pytest
import torch
from conftest import build_model

from nanoaipo.engines import exact_attention
from nanoaipo.transformers_engine import TransformersEngine, bytes_per_token, rows_that_fit

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    # soft-caps and attention sinks, which sdpa would leave out
    "Gemma2": {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "GptOss": EXPERTS | {"sliding_window": 16},
    # a cache of other things than keys and values, or none that generate returns
    "Qwen3_5Text": LINEAR,
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "FalconH1": MAMBA | {"mamba_d_ssm": 64},
    "Bamba": MAMBA | {"attn_layer_indices": [1]},
    "Mamba": {},
}


def random_requests(n, rng):
    """n requests (prompt ids, seed) of unlike lengths."""
    requests = []
    for seed in range(n):
        length = rng.choice((3, 9, 17, 30))
        requests.append(([rng.randrange(6, 250) for _ in range(length)], seed))
    return requests


@torch.no_grad()
def logps_alone(model, prompt, response):
    """Log-probs (new, V) of a response's positions, by the eager model on this row alone."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    logits = network.eval()(torch.tensor([prompt + response]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_sample_what_the_eager_model_gives_each_alone(family, tmp_path):
    model = build_model(tmp_path, family, **FAMILIES[family])
    requests = random_requests(8, random.Random(0))
    engine = TransformersEngine(model, set(range(6, 60)), dtype="float32", generate_rows=8)

    # so many end tokens that rows leave the batch one after the other
    greedy = {"temperature": 0, "top_k": None, "top_p": 1.0, "max_new_tokens": 24}
    results = engine.sample(requests, n_responses=1, **greedy)

    assert len({len(ids) for ((ids, _, _),) in results}) > 2
    for (prompt, _), ((ids, _, logp),) in zip(requests, results):
        steps = logps_alone(model, prompt, ids)
        taken = steps.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (steps.max(1).values - taken).max() < 1e-4
        assert taken.sum().item() == pytest.approx(logp, abs=1e-4)


def test_a_soft_cap_is_seen_in_the_text_part_of_a_config():
    import transformers

    text = transformers.Gemma3TextConfig(attn_logit_softcapping=50.0)
    assert exact_attention(transformers.Gemma2Config()) == "eager"
    assert exact_attention(transformers.Gemma2Config(attn_logit_softcapping=None)) is None
    assert exact_attention(transformers.Gemma3Config(text_config=text)) == "eager"
    assert exact_attention(transformers.Gemma3Config()) is None
    assert exact_attention(transformers.LlamaConfig()) is None


def test_rows_are_bounded_by_the_bytes_of_their_keys_and_values(tmp_path):
    import transformers

    # 8B: 2 x 32 layers x 8 heads x 128 numbers x 2 bytes; 512 rows of 1,000 tokens are 67 GB
    token_bytes = 2 * 32 * 8 * 128 * 2
    assert rows_that_fit(512, 1000, token_bytes, 32 * 10**9) == 244
    assert rows_that_fit(512, 1000, token_bytes, 68 * 10**9) == 512
    assert rows_that_fit(512, 10**7, token_bytes, 10**9) == 1
    assert rows_that_fit(512, 1000, 0, 10**9) == 512  # Mamba: nothing grows

    model = build_model(tmp_path / "llama")
    policy = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert bytes_per_token(policy) == 2 * 2 * 2 * 8 * 4
    model = build_model(tmp_path / "qwen", "Qwen3_5Text", **LINEAR)
    policy = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert bytes_per_token(policy) == 2 * 1 * 2 * 8 * 4
