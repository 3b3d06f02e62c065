"""The transformers engine on models whose attention, cache or layers are not Llama's."""

import json
import math
import random
import shutil

import pytest
import torch
from conftest import build_model
from safetensors.torch import load_file, save_file

from nanoaipo.engines import exact_attention, load_engine
from nanoaipo.errors import InputError
from nanoaipo.transformers_engine import (
    TransformersEngine,
    bytes_per_token,
    load_model,
    rows_that_fit,
)

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


# ---- what a model folder says, and lacks ----

GREEDY = {"temperature": 0, "top_k": None, "top_p": 1.0, "max_new_tokens": 24}


def set_json(path, **values):
    """Set values of a JSON file, which may not be there."""
    record = {}
    if path.exists():
        record = json.loads(path.read_text())
    path.write_text(json.dumps(record | values))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_how_a_model_folder_would_sample_does_not_count(tiny_model, file, tmp_path):
    model = build_model(tmp_path / "model")
    wishes = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "temperature": 0.01, "top_k": 1}
    wishes |= {"suppress_tokens": list(range(6, 100)), "min_new_tokens": 24, "num_beams": 2}
    set_json(model / file, **wishes)
    requests = random_requests(4, random.Random(0))
    sampled = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 24}

    for settings in (GREEDY, sampled):
        results = []
        for folder in (tiny_model, model):
            engine = TransformersEngine(folder, {1, 7}, dtype="float32", generate_rows=8)
            results.append(engine.sample(requests, n_responses=2, **settings))
        assert results[0] == results[1]


def without_weight(model):
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def half_written(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])


def only_pickled(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def of_another_width(model):
    set_json(model / "config.json", intermediate_size=48)


def with_half_its_shards(model):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    set_json(model / "model.safetensors.index.json", **index)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without_weight, "weight model.layers.1.mlp.up_proj.weight is missing in its safetensors"),
        (half_written, "its weights cannot be loaded .*not fully covered"),
        (only_pickled, "its weights cannot be loaded .*no file named model.safetensors"),
        (
            of_another_width,
            r"down_proj.weight has shape \[32, 64\], its config.json says \[32, 48\]",
        ),
        (with_half_its_shards, "index.json: it names model-00002-of-00002.safetensors, which is"),
    ],
)
def test_weights_that_are_not_whole_are_refused_and_not_drawn_at_random(spoil, message, tmp_path):
    model = build_model(tmp_path / "model")
    spoil(model)

    with pytest.raises(InputError, match=message) as error:
        load_model(str(model), "float32")
    assert "\n" not in str(error.value)


def test_a_prompt_of_tokens_that_the_model_does_not_have_is_refused(tmp_path):
    model = build_model(tmp_path / "model", vocab_size=200)
    engine = TransformersEngine(model, {1}, dtype="float32", generate_rows=8)

    engine.sample([([5, 199], 0)], n_responses=1, **GREEDY)
    with pytest.raises(InputError, match="model: its tokenizer gives .* id 200, .* has 200 tokens"):
        engine.sample([([5, 199], 0), ([200, 5], 0)], n_responses=1, **GREEDY)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-60])
def test_a_model_that_gives_no_numbers_is_refused(temperature, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    if temperature != 1e-60:
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] = math.nan
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = {"seed": 0, "tensor_parallel": 1, "gpu_memory": 0.9, "generate_rows": 8}
    sample = load_engine("transformers", str(folder), {1}, 40, dtype="float32", **settings)

    how = {"n_responses": 2, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4}
    with pytest.raises(InputError, match="model: its log-probs are not finite: its weights are"):
        sample([([0, 3, 40, 4], 0)], temperature=temperature, **how)
