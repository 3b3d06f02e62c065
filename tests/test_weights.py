"""weights.py, model_folders.py: weights as transformers reads them, saved as they were stored."""

import json

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import build_model, build_tokenizer, torchrun, write_pairs
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from nanoaipo import chat
from nanoaipo.errors import InputError
from nanoaipo.model_folders import check_has_model, find_file, weight_file_names
from nanoaipo.policy import add_adapters
from nanoaipo.weights import load_weights, save_policy, stores_head

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

# {architecture: its settings}, with buffers that are stored
STORED_AS_IT_IS = {
    "Apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "Gemma4Text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 262},
}
# {architecture: its settings} whose files have other names for weights than the model
STORED_OTHERWISE = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": EXPERTS,
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Phimoe": {"num_local_experts": 4},
    "GraniteMoe": {"num_local_experts": 4},
    "DeepseekV3": DEEPSEEK,
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "GPTNeoX": {},
}


@pytest.fixture(scope="module")
def mesh():
    """A world of one process, as train.py makes it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def randomize(model):
    """Draw all weights anew, and all buffers that are stored: none is as it was initialised."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()


def build_random(folder, architecture, **config):
    """The folder of a small model of which each weight is random, as transformers publishes it."""
    build_model(folder, architecture, **config)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    randomize(lm)
    lm.save_pretrained(folder)
    return folder


def empty_policy(config, mesh, lora_rank=0):
    """A policy of this architecture, sharded, without weights; its buffers are NaN."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in lm.modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = torch.full_like(buffer, float("nan"), device="cpu")
    if lora_rank:
        lm = add_adapters(lm, lora_rank, 16.0, torch.float32)
    policy = torch.nn.Module()
    policy.lm = lm
    policy.kernel = "packed_sdpa"  # as most are; of a padded one load_weights computes a row
    return fully_shard(policy, mesh=mesh)


def load(folder, mesh, **settings):
    """The policy of a folder."""
    config = AutoConfig.from_pretrained(folder)
    text_config = config.get_text_config()
    if text_config is not config:
        text_config.tie_word_embeddings = not stores_head(str(folder))
    policy = empty_policy(text_config, mesh, **settings)
    load_weights(policy, str(folder))
    return policy


def weights_of(policy):
    """Its weights and stored buffers, whole, by name."""
    weights = {}
    for key, value in policy.lm.state_dict().items():
        weights[key] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return weights


def save(policy, folder, tokenizer_folder):
    """Save the policy; return its folder."""
    folder.mkdir()
    tokenizer, eos_ids = chat.load_tokenizer(tokenizer_folder)
    save_policy(policy, str(folder), torch.float32, tokenizer, eos_ids, 0)
    return folder


def assert_same(weights, expected):
    """All weights are there, and equal."""
    assert weights.keys() == expected.keys()
    for key in expected:
        assert torch.equal(weights[key], expected[key]), key


# ---- names ----


@pytest.mark.parametrize("architecture", STORED_AS_IT_IS | STORED_OTHERWISE)
def test_weights_are_those_that_transformers_reads_and_are_saved_as_they_were_stored(
    architecture, mesh, tmp_path
):
    config = (STORED_AS_IT_IS | STORED_OTHERWISE)[architecture]
    model = build_random(tmp_path / "model", architecture, **config)
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    stored = load_file(model / "model.safetensors")
    renamed = expected.keys() - stored.keys() - {"lm_head.weight"}
    if architecture == "GPTNeoX":
        renamed = {"lm_head.weight"}

    policy = load(model, mesh)
    saved = save(policy, tmp_path / "saved", model)

    assert bool(renamed) == (architecture in STORED_OTHERWISE)
    assert_same(weights_of(policy), expected)
    assert_same(load_file(saved / "model.safetensors"), stored)


def test_experts_that_are_stored_packed_are_loaded_and_saved_packed(mesh, tmp_path):
    model = build_random(tmp_path / "model", "Qwen3Moe", **EXPERTS)
    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.save_pretrained(model, save_original_format=False)

    policy = load(model, mesh)
    saved = save(policy, tmp_path / "saved", model)

    assert_same(weights_of(policy), lm.state_dict())
    assert_same(load_file(saved / "model.safetensors"), lm.state_dict())


def test_adapters_of_a_mixture_of_experts_are_merged_into_the_layout_of_its_files(mesh, tmp_path):
    model = build_random(tmp_path / "model", "Mixtral", num_local_experts=4)
    stored = load_file(model / "model.safetensors")
    policy = load(model, mesh, lora_rank=2)

    # B is zero at first; with another B the adapted maps change
    unchanged = save(policy, tmp_path / "unchanged", model)
    for key, parameter in policy.lm.named_parameters():
        if ".lora_B." in key:
            parameter.detach().to_local().fill_(1)
    changed = save(policy, tmp_path / "changed", model)

    assert_same(load_file(unchanged / "model.safetensors"), stored)
    weights = load_file(changed / "model.safetensors")
    assert weights.keys() == stored.keys()
    adapted = {key for key in stored if not torch.equal(weights[key], stored[key])}
    assert adapted == {key for key in stored if key.endswith("_proj.weight")}
    assert len(adapted) == 2 * 4


def test_two_processes_train_a_mixture_of_experts_and_save_the_layout_of_its_files(tmp_path):
    model = build_random(tmp_path / "model", "Qwen3Moe", **EXPERTS | {"num_experts": 3})
    write_pairs(tmp_path / "pairs.jsonl", 4)

    result = torchrun(
        2,
        "train.py",
        model=model,
        pairs=tmp_path / "pairs.jsonl",
        out=tmp_path / "out",
        dtype="float32",
        batch_size=2,
        lr=0,
    )

    assert result.returncode == 0, result.stderr
    stored = load_file(model / "model.safetensors")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), stored)


# ---- the text model of a multimodal one ----

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 2,
}


def build_wrapper(folder, architecture, **config):
    """(folder, model): a small random multimodal model, with its text model inside."""
    tokenizer = build_tokenizer("{{ messages }}", "<|pad|>")
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, architecture + "Config")(**config)
    model = getattr(transformers, architecture + "ForConditionalGeneration")(config)
    randomize(model)
    model.save_pretrained(folder)
    return folder, model


WRAPPERS = {
    "Gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "Mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
    },
    "Qwen3_5": {
        "text_config": TEXT | {"layer_types": ["full_attention", "linear_attention"]},
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
    },
}


@pytest.mark.parametrize("layout", ["as saved", "language_model.model", "model.language_model"])
@pytest.mark.parametrize("architecture", WRAPPERS)
def test_the_text_model_of_a_multimodal_one_is_loaded_and_saved_as_a_model_of_its_own(
    architecture, layout, mesh, tmp_path
):
    model, wrapper = build_wrapper(tmp_path / "model", architecture, **WRAPPERS[architecture])
    if layout != "as saved":
        state = {}
        for key, value in wrapper.state_dict().items():
            key = key.replace("model.language_model", layout)
            if layout == "language_model.model":
                key = key.replace("lm_head", "language_model.lm_head")
            state[key] = value.clone()
        save_file(state, model / "model.safetensors", {"format": "pt"})

    policy = load(model, mesh)
    saved = save(policy, tmp_path / "saved", model)

    # Each weight of the text model, under its own name
    weights = weights_of(policy)
    for key, value in wrapper.model.language_model.state_dict().items():
        assert torch.equal(weights.pop("model." + key), value), key
    assert torch.equal(weights.pop("lm_head.weight"), wrapper.lm_head.weight)
    assert not weights

    # A model for text only, as transformers and vLLM know it
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == [policy.lm.__class__.__name__]
    assert config["architectures"][0].endswith("ForCausalLM")
    assert "vision_config" not in config
    for key in load_file(saved / "model.safetensors"):
        assert key.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."))
    reloaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert_same(reloaded.state_dict(), weights_of(policy))


# ---- what is missing, or does not fit ----


def test_an_expert_or_a_stored_buffer_that_is_missing_is_named(mesh, tmp_path):
    model = build_random(tmp_path / "model", "DeepseekV3", **DEEPSEEK)
    path = model / "model.safetensors"
    whole = load_file(path)

    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({key: x for key, x in whole.items() if key != expert}, path)
    with pytest.raises(InputError, match="experts.gate_up_proj cannot be made of its parts"):
        load(model, mesh)

    others = {key: x for key, x in whole.items() if ".experts.3." not in key}
    save_file(others, path)
    with pytest.raises(InputError, match=r"gate_up_proj has shape \[3, 32, 32\], its config.json"):
        load(model, mesh)

    others = {key: x for key, x in whole.items() if ".experts." not in key}
    save_file(others, path)
    with pytest.raises(InputError, match="experts.gate_up_proj is missing in its safetensors"):
        load(model, mesh)

    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file({key: x for key, x in whole.items() if key != bias}, path)
    with pytest.raises(InputError, match=f"weight {bias} is missing in its safetensors"):
        load(model, mesh)


def test_quantized_weights_are_refused_by_name(tiny_model, mesh, tmp_path):
    model = build_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())

    # By what config.json says
    quantized = config | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(InputError, match=r"quantized \(fp8\); training needs the bfloat16 release"):
        load(model, mesh)
    wrapped = {"text_config": quantized}
    (model / "config.json").write_text(json.dumps(wrapped))
    with pytest.raises(InputError, match=r"quantized \(fp8\)"):
        load_weights(empty_policy(AutoConfig.from_pretrained(tiny_model), mesh), str(model))

    # By the type of one weight
    (model / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    for dtype, name in (torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"):
        save_file(weights | {key: weights[key].to(dtype)}, model / "model.safetensors")
        with pytest.raises(InputError, match=rf"quantized \({name}\)"):
            load(model, mesh)

    # numbers of 64 bits are no codes
    save_file(weights | {key: weights[key].double()}, model / "model.safetensors")
    state = load(model, mesh).lm.state_dict()
    assert torch.equal(state[key].full_tensor(), weights[key])


def test_a_weight_that_is_not_finite_is_not_saved(mesh, tmp_path):
    model = build_model(tmp_path / "model")
    policy = load(model, mesh)
    weight = dict(policy.lm.named_parameters())["model.norm.weight"]
    weight.detach().to_local()[3] = float("inf")

    with pytest.raises(InputError, match="weight model.norm.weight is not finite, and nothing is"):
        save(policy, tmp_path / "saved", model)
    assert not list((tmp_path / "saved").iterdir())


# ---- which files ----


def test_an_index_names_the_files_that_are_read(mesh, tmp_path):
    model = build_random(tmp_path / "model", "Llama")
    lm = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    lm.save_pretrained(model, max_shard_size="20KB")
    shards = sorted(path.name for path in model.glob("model-*.safetensors"))
    assert len(shards) > 1

    # Files that the index does not name hold other weights under the same names
    zeros = {key: torch.zeros_like(value) for key, value in lm.state_dict().items()}
    save_file(zeros, model / "zeros.safetensors")

    assert_same(weights_of(load(model, mesh)), lm.state_dict())

    (model / shards[1]).unlink()
    with pytest.raises(InputError, match=rf"index.json: it names {shards[1]}, which is missing"):
        load(model, mesh)

    index = model / "model.safetensors.index.json"
    for text, reason in ("{", "no JSON"), ("[]", "no JSON object"), ("{}", "no weight_map"):
        index.write_text(text)
        with pytest.raises(InputError, match=f"index.json: {reason}"):
            load(model, mesh)


def test_a_single_file_beside_an_index_that_does_not_name_it_is_refused(tmp_path):
    single = tmp_path / "model.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    for path in single, tmp_path / "a.safetensors":
        path.touch()

    # transformers reads the one, and we would read the other
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    with pytest.raises(InputError, match=f"^{index}: it does not name {single} beside it; remove"):
        weight_file_names(tmp_path)

    index.write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    assert weight_file_names(tmp_path) == ["model.safetensors"]


def test_without_an_index_the_model_is_read_and_what_lies_beside_it_is_not(tmp_path):
    for name in "b.safetensors", "a.safetensors", "adapter_model.safetensors", "a.bin":
        (tmp_path / name).touch()
    (tmp_path / "consolidated.safetensors").touch()

    assert weight_file_names(tmp_path) == ["a.safetensors", "b.safetensors"]

    (tmp_path / "model.safetensors").touch()

    assert weight_file_names(tmp_path) == ["model.safetensors"]


def test_a_folder_that_holds_an_adapter_and_no_model_names_its_base(tiny_model, tmp_path):
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": "org/base"}))

    with pytest.raises(InputError, match=r"--judge=.*: an adapter .* its base \(org/base\)"):
        check_has_model(tmp_path, "judge")

    # An adapter beside a model does not matter, nor does a folder that holds neither
    (tmp_path / "config.json").write_text("{}")
    check_has_model(tmp_path)
    check_has_model(tmp_path / "nowhere")

    # Nor does config.json make a model of an adapter's weights; with a model beside them it is one
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(InputError, match=r"an adapter and no model; .* its base \(org/base\)"):
        check_has_model(tmp_path)
    adapter.unlink()
    with pytest.raises(InputError, match="which it does not name"):
        check_has_model(tmp_path)
    (tmp_path / "model-1.safetensors").touch()
    check_has_model(tmp_path)
    check_has_model(tiny_model)


def test_a_hub_model_that_is_not_cached_is_refused_at_the_first_file_without_a_network():
    with pytest.raises(InputError, match="^--model=org/none: no model .* hub cannot be reached:"):
        check_has_model("org/none")

    # another file may be one that the model has not
    assert find_file("org/none", "tokenizer_config.json") is None
