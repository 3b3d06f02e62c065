"""The policy that train.py trains: built without memory and sharded; weights.py fills and saves it.

In the order of a run: build_policy, load_weights, then flops at each step, save_policy at the end.
LoRA adapters are part of the policy while it trains, and are merged into its weights when saved.
"""

import math
import time

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import losses
from nanoaipo import packing  # noqa: F401 (it registers the attention functions)
from nanoaipo.errors import InputError


class Policy(torch.nn.Module):
    """From ids to log-probabilities inside one root module.

    FSDP gathers the head's weight for the root's forward, so it is whole when losses.logprob runs.
    """

    def __init__(self, lm, chunk, squares):
        super().__init__()
        self.lm = lm
        self.chunk = chunk
        self.squares = squares
        self.kernel = lm.config._attn_implementation
        self.softcap = getattr(lm.config, "final_logit_softcapping", None)

    def forward(self, input_ids, position_ids, index, labels, segments):
        """Log-probs (N,) of the labels (N,), predicted at index (N,) of the row input_ids (1, T).

        The arguments are those of packing.pack. With squares there are two results, as of
        losses.logprob.
        """
        output = self.lm.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, segments=segments
        )
        hidden = output.last_hidden_state[0, index]  # (N, D)
        head = self.lm.get_output_embeddings()
        weight = head.weight  # (V, D)

        # Phi-2's head has a bias: one more column of the head, which always meets a 1
        if head.bias is not None:
            ones = hidden.new_ones(len(hidden), 1)
            hidden = torch.cat([hidden, ones], 1)  # (N, D + 1)
            weight = torch.cat([weight, head.bias[:, None]], 1)  # (V, D + 1)
        return losses.logprob(hidden, weight, labels, self.chunk, self.softcap, self.squares)


# ---- build: the model on the meta device, adapted and sharded ----


def build_policy(
    name, mesh, dtype, *, chunk, recompute, compile, lora_rank, lora_alpha, squares=False
):
    """The policy on the meta device, sharded over `mesh`; no weight has memory yet.

    dtype: of the computation. Weights that train are float32, frozen ones (LoRA) are in dtype.
    Raises InputError, naming the reason, for an architecture that it would not compute exactly.
    """
    device = torch.device("cpu")
    if mesh.device_type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())

    # The architecture, from config.json alone
    config = AutoConfig.from_pretrained(name)
    turn_off_dropout(config)
    kernel = choose_kernel(config, device, dtype)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=kernel
        )
    check_supported(lm, name)
    make_buffers(lm, device, name)

    # What trains, and how
    if lora_rank:
        lm = add_adapters(lm, lora_rank, lora_alpha, dtype)
    lm.train()
    if recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return shard(Policy(lm, chunk, squares), mesh, dtype, compile)


def turn_off_dropout(config):
    """Set every dropout rate to 0: with dropout, policy and reference would differ by chance."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def head_width(config):
    """Numbers in one attention head."""
    head_dim = getattr(config, "head_dim", None)
    return head_dim or config.hidden_size // config.num_attention_heads


def choose_kernel(config, device, dtype):
    """Name of the attention function: packed_varlen if it can compute this model here."""
    width = head_width(config)
    if device.type != "cuda" or dtype == torch.float32:
        return "packed_sdpa"
    if torch.cuda.get_device_capability() < (8, 0):  # before Ampere
        return "packed_sdpa"
    if width % 8 != 0 or width > 256:
        return "packed_sdpa"
    if getattr(config, "attn_logit_softcapping", None):  # Gemma-2
        return "packed_sdpa"
    return "packed_varlen"


def check_supported(lm, name):
    """Raise InputError for a model that Policy.forward would compute wrongly, or not at all."""
    # Factors on the logits, which losses.logprob does not apply
    unsupported = []
    for key in ("logit_scale", "logits_scaling"):
        if getattr(lm.config, key, None) not in (None, 1.0):
            unsupported.append(key)

    # Layers that mix tokens by other means than attention, which alone knows of the row's sequences
    layer_types = set(getattr(lm.config, "layer_types", None) or ())
    unsupported += sorted(layer_types - {"full_attention", "sliding_attention"})
    is_stateful = getattr(lm, "_is_stateful", False)

    has_head = lm.get_output_embeddings() is not None
    has_layers = hasattr(lm.base_model, "layers")
    if unsupported or is_stateful or not has_head or not has_layers:
        reason = unsupported or "its head or its layers"
        raise InputError(
            f"--model={name}: architecture {lm.__class__.__name__} is not supported ({reason})"
        )


def make_buffers(lm, device, name):
    """Compute rotary tables and the like on the device: files of weights do not hold them.

    Raises InputError for a buffer that the model's own initialisation leaves as it is, or that
    would have to be loaded.
    """
    for module in lm.modules():
        for key, buffer in module.named_buffers(recurse=False):
            # NaN shows afterwards what the initialisation did not fill
            module._buffers[key] = torch.full_like(buffer, float("nan"), device=device)
            lm._init_weights(module)
            is_made = not module._buffers[key].isnan().any()
            if not is_made or key not in module._non_persistent_buffers_set:
                raise InputError(
                    f"--model={name}: {lm.__class__.__name__} has a buffer '{key}' "
                    "that this loader cannot make"
                )


def add_adapters(lm, rank, alpha, dtype):
    """The model with LoRA adapters (2106.09685) on all linear layers, which alone will train.

    The head, routers, and experts that are packed into one parameter stay as they are. Raises
    InputError for a model without linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = []
    for name, module in lm.named_modules():
        is_linear = type(module) is torch.nn.Linear  # routers are of derived classes
        if is_linear and module is not lm.get_output_embeddings():
            targets.append(name)
    if not targets:
        raise InputError(f"--lora_rank={rank}: {lm.__class__.__name__} has no linear layers")

    # peft adapts the experts of architectures that it knows; in a shell it knows none
    shell = torch.nn.ModuleDict({"lm": lm})
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    inject_adapter_in_model(settings, shell, low_cpu_mem_usage=True)
    for parameter in lm.parameters():
        if parameter.requires_grad:  # the adapters
            parameter.data = parameter.data.to(torch.float32)
        else:
            parameter.data = parameter.data.to(dtype)
    return lm


def shard(policy, mesh, dtype, compile):
    """Shard each decoder layer over `mesh`, then the root with what is left: embedding, norm, head.

    Layers and root are gathered in dtype when they compute; gradients are summed in float32.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in policy.lm.base_model.layers:
        if compile:
            layer.compile(dynamic=True)
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision)


# ---- how fast it could train ----


def flops(policy, pairs):
    """Model FLOPs of one training step on these pairs, each prompt computed once.

    Forward, and backward at twice that, or once where weights are frozen (LoRA). What is computed
    a second time, by recomputation or in the log-prob gather, does not count.
    """
    config = policy.lm.config
    layers = policy.lm.base_model.layers
    head = policy.lm.get_output_embeddings()
    body_size = sum(p.numel() for p in layers.parameters())
    head_size = sum(p.numel() for p in head.parameters())
    width = len(layers) * config.num_attention_heads * head_width(config)

    forward = 0
    for pair in pairs:
        p = len(pair["prompt_ids"])
        w = len(pair["chosen_ids"])
        l = len(pair["rejected_ids"])
        # Each weight is multiplied and added once per token, the head's per response token
        forward += 2 * body_size * (p + w + l)
        forward += 2 * head_size * (w + l)
        # Scores and values: two products of width * length^2, of which causal attention takes half
        forward += 2 * width * ((p + w) ** 2 + (p + l) ** 2 - p**2)

    # Backward: gradients of activations, and of weights where these train
    if all(parameter.requires_grad for parameter in policy.parameters()):
        return 3 * forward
    return 2 * forward


def matmul_rate(n, device, dtype):
    """FLOP/s of the product of two n x n matrices, the best of six.

    That is what this device can do; model FLOPs are compared with it (MFU).
    """
    x = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(6):
        t0 = time.perf_counter()
        product = x @ x
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - t0)
    return 2 * n**3 / best
