"""The policy that train.py trains: built without memory and sharded, filled and saved weight by weight; LoRA.
"""
import math
import os
import sys
import time

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import losses
from nanoaipo import packing  # noqa: F401 (it registers the attention functions)


class Policy(torch.nn.Module):
    """From ids to log-probabilities inside one root module, so that FSDP has gathered the head when the gather needs it."""

    def __init__(self, lm, chunk, squares):
        super().__init__()
        self.lm, self.chunk, self.squares, self.kernel = lm, chunk, squares, lm.config._attn_implementation
        self.softcap = getattr(lm.config, "final_logit_softcapping", None)

    def forward(self, input_ids, position_ids, index, labels, segments):
        """Log-probs (N,) of the labels (N,), predicted at index (N,) of the row input_ids (1, T); with squares as losses.logprob."""
        hidden = self.lm.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, segments=segments).last_hidden_state
        hidden, head = hidden[0, index], self.lm.get_output_embeddings()
        weight = head.weight
        if head.bias is not None:                                       # Phi-2: one more column of the head, which always meets a 1
            hidden, weight = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1), torch.cat([weight, head.bias[:, None]], 1)
        return losses.logprob(hidden, weight, labels, self.chunk, self.softcap, self.squares)


def build_policy(name, mesh, dtype, *, chunk, recompute, compile, lora_rank, lora_alpha, squares=False):
    """The policy on the meta device, each decoder layer sharded over `mesh`, then the root; no weight has memory yet.

    dtype: of computation; weights that train are float32, frozen ones (LoRA) are kept in dtype. Ends the program, naming the
    reason, for an architecture that it would not compute exactly.
    """
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    hf = AutoConfig.from_pretrained(name)
    for key, value in hf.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(hf, key, 0.0)                                       # dropout would make policy and reference differ
    width = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    fast = (device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0) and dtype != torch.float32 and width % 8 == 0 and width <= 256
            and not getattr(hf, "attn_logit_softcapping", None))        # what the variable-length kernel can
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(hf, dtype=torch.float32, attn_implementation="packed_varlen" if fast else "packed_sdpa")
    head = lm.get_output_embeddings()
    unsupported = [k for k in ("logit_scale", "logits_scaling") if getattr(hf, k, None) not in (None, 1.0)]
    unsupported += sorted(set(getattr(hf, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})    # only attention knows of sequences
    if unsupported or getattr(lm, "_is_stateful", False) or head is None or not hasattr(lm.base_model, "layers"):
        sys.exit(f"--model={name}: architecture {lm.__class__.__name__} is not supported ({unsupported or 'its head or its layers'})")
    for module in lm.modules():                                         # rotary tables and the like are made, not loaded
        for buffer_name, buffer in module.named_buffers(recurse=False):
            module._buffers[buffer_name] = torch.full_like(buffer, float("nan"), device=device)
            lm._init_weights(module)
            if module._buffers[buffer_name].isnan().any() or buffer_name not in module._non_persistent_buffers_set:
                sys.exit(f"--model={name}: {lm.__class__.__name__} has a buffer '{buffer_name}' that this loader cannot make")
    if lora_rank:
        from peft import LoraConfig, inject_adapter_in_model
        lm = inject_adapter_in_model(LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear"), lm, low_cpu_mem_usage=True)
        for parameter in lm.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    lm.train()
    if recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, chunk, squares)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in lm.base_model.layers:
        if compile:
            layer.compile(dynamic=True)
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision)


def load_weights(policy, name, seed=0):
    """Fill the policy from safetensors: every process reads the rows of each weight that it will hold.

    Adapters start as LoRA does (2106.09685): A drawn from the seed, B zero, so that the policy is the model it starts from.
    """
    if not os.path.isdir(name):
        from huggingface_hub import snapshot_download
        name = snapshot_download(name, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["consolidated*", "original/*"])
    found = {}
    for file in sorted(f for f in os.listdir(name) if f.endswith(".safetensors")):
        path = os.path.join(name, file)
        try:
            with safe_open(path, "pt") as f:
                found |= dict.fromkeys(f.keys(), path)
        except (SafetensorError, OSError) as e:
            sys.exit(f"{path}: not a whole safetensors file ({e})")
    found or sys.exit(f"--model={name}: no *.safetensors in it; other formats can run code and are not read")
    state, done, draw = {}, {}, torch.Generator().manual_seed(seed)
    for key, parameter in policy.lm.named_parameters(remove_duplicate=False):
        if id(parameter) not in done:                                   # an output head tied to the embedding is one weight
            stored = key.replace(".base_layer.", ".")
            shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
            mine = slice(offset[0], offset[0] + shape[0])
            if ".lora_A." in key:
                local = torch.empty(parameter.shape).uniform_(-(parameter.shape[1] ** -0.5), parameter.shape[1] ** -0.5, generator=draw)[mine]
            elif ".lora_B." in key:
                local = torch.zeros(shape)
            else:
                stored in found or sys.exit(f"--model={name}: weight {stored} is missing in its safetensors")
                with safe_open(found[stored], "pt") as f:               # opened anew, so that the mapped file does not add up
                    rows = f.get_slice(stored)
                    if rows.get_shape() != list(parameter.shape):
                        sys.exit(f"--model={name}: weight {stored} has shape {rows.get_shape()}, its config.json says {list(parameter.shape)}")
                    local = rows[mine]
            local = local.to(parameter.device_mesh.device_type, parameter.dtype, copy=True)
            whole = DTensor.from_local(local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride())
            done[id(parameter)] = torch.nn.Parameter(whole, requires_grad=parameter.requires_grad)
        state[key] = done[id(parameter)]
    policy.lm.load_state_dict(state, strict=False, assign=True)


def flops(policy, pairs):
    """Model FLOPs of one training step on these pairs, their prompts computed once: forward, and twice that backward (once
    where weights are frozen). What is computed a second time, by recomputation or by the gather, is not counted."""
    hf, layers = policy.lm.config, policy.lm.base_model.layers
    body, head = (sum(p.numel() for p in m.parameters()) for m in (layers, policy.lm.get_output_embeddings()))
    width = len(layers) * hf.num_attention_heads * (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    forward = 0
    for pair in pairs:
        p, w, l = (len(pair[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
        forward += 2 * body * (p + w + l) + 2 * head * (w + l) + 2 * width * ((p + w) ** 2 + (p + l) ** 2 - p**2)    # causal: half a square
    return forward * (3 if all(p.requires_grad for p in policy.parameters()) else 2)


def matmul_rate(n, device, dtype):
    """FLOP/s of the product of two n x n matrices, best of five: what this device can do, which model FLOPs are compared with."""
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(6):
        began = time.perf_counter()
        (a @ a)[0, 0].item()                                            # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def save_policy(policy, folder, dtype, tokenizer, ends, rank):
    """Gather the weights one after another on rank 0, adapters merged, and write them as a Hugging Face folder."""
    weights, state = dict(policy.lm.named_parameters()), {}
    for key, parameter in weights.items():
        if ".lora_" in key:
            continue
        whole = parameter.full_tensor().detach()
        adapted, _, kind = key.rpartition(".base_layer.")
        if adapted and kind == "weight":
            b, a = (weights[f"{adapted}.lora_{x}.default.weight"].full_tensor().detach() for x in "BA")
            whole = whole.float() + policy.lm.get_submodule(adapted).scaling["default"] * (b @ a)
        if rank == 0:
            state[key.replace(".base_layer.", ".")] = whole.to("cpu", dtype, copy=True)    # gathered rows may lie in a longer buffer
    if rank == 0:
        from huggingface_hub import save_torch_state_dict
        save_torch_state_dict(state, folder, metadata={"format": "pt"})
        policy.lm.config.dtype = dtype
        policy.lm.config.save_pretrained(folder)
        GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
