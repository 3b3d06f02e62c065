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
from nanoaipo import layouts, weights
from nanoaipo.errors import InputError


class Policy(torch.nn.Module):
    """From ids to log-probabilities inside one root module.

    FSDP gathers the head's weight for the root's forward, so it is whole when losses.logprob runs.
    """

    def __init__(self, lm, kernel, why_padded, attention_width, chunk, squares, factor, softcap):
        super().__init__()
        self.lm = lm
        self.kernel = kernel  # for packing.pack
        self.why_padded = why_padded  # the reason, "" where rows are packed
        self.attention_width = attention_width
        self.chunk = chunk
        self.squares = squares
        self.factor = factor  # on the logits
        self.softcap = softcap
        self.moving_rope = bool(layouts.moving_ropes(lm))

    def forward(self, input_ids, position_ids, index, labels, segments=None):
        """Log-probs (N,) of the labels (N,), predicted at index (N,) of the rows input_ids (n, L).

        The arguments are those of packing.pack, without segments where rows are padded. With
        squares there are two results, as of losses.logprob.
        """
        if segments is not None:
            arguments = {"position_ids": position_ids, "segments": segments}
        elif self.moving_rope:
            arguments = {"position_ids": position_ids}
        else:
            arguments = {}  # one sequence a row, from position 0: what any model computes by itself
        output = layouts.text_model(self.lm)(input_ids=input_ids, use_cache=False, **arguments)
        hidden = output.last_hidden_state.flatten(0, 1)[index]  # (N, D)

        head = self.lm.get_output_embeddings()
        weight = head.weight  # (V, D)
        hidden = hidden.to(weight.dtype)  # Mamba's are float32

        # Scaled before the head, the logits come out scaled; exact where the factor is a power of
        # 2, as published ones mostly are
        if self.factor != 1.0:
            hidden = hidden * self.factor

        # Phi-2's head has a bias: one more column of the head, which always meets a 1
        if getattr(head, "bias", None) is not None:
            ones = hidden.new_full((len(hidden), 1), self.factor)
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

    # The architecture, from config.json alone; of a model that also sees or hears, the text part
    whole = AutoConfig.from_pretrained(name)
    config = whole.get_text_config()
    check_architecture(config, name)
    if config is not whole:  # both say whether the head is the embedding, and only files tell
        config.tie_word_embeddings = not weights.stores_head(name)
    turn_off_dropout(config)

    # Packed rows where they are exact, else one sequence a row and the model's own attention
    why_padded, calls = layouts.dry_run(config)
    kernel = choose_kernel(why_padded, calls, device, dtype)
    attention = kernel
    if kernel == "padded":
        attention = layouts.own_attention(config, calls)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    if lm.get_output_embeddings() is None or layouts.decoder_layers(lm) is None:
        raise InputError(
            f"--model={name}: architecture {lm.__class__.__name__} is not supported "
            "(its head or its layers)"
        )
    if layouts.shares_layers(lm):
        raise InputError(
            f"--model={name}: architecture {lm.__class__.__name__} is not supported "
            "(its layers share weights)"
        )
    factor, softcap = layouts.logit_shape(lm, name)
    make_buffers(lm, device, name)
    layouts.rope_by_row(lm)

    # What trains, and how
    if lora_rank:
        lm = add_adapters(lm, lora_rank, lora_alpha, dtype)
    make_deterministic(lm)
    if recompute:
        recompute_layers(lm, name, recompute)
    width = attention_width(config, calls)
    policy = Policy(lm, kernel, why_padded, width, chunk, squares, factor, softcap)
    return shard(policy, mesh, dtype, compile)


def turn_off_dropout(config):
    """Set every dropout rate to 0: with dropout, policy and reference would differ by chance."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def check_architecture(config, name):
    """Raise InputError for what transformers does not know as a causal language model."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"--model={name}: transformers has no causal language model of type "
            f"'{config.model_type}'"
        )


def head_width(config):
    """Numbers in one attention head."""
    head_dim = getattr(config, "head_dim", None)
    return head_dim or config.hidden_size // config.num_attention_heads


def attention_width(config, calls):
    """Numbers that a token has in all heads of all layers, for `flops`; calls: layouts.dry_run's.

    Where the dry run saw no calls the config has to tell; linear attention does not count.
    """
    if calls:
        return sum(call["heads"] * sum(call["widths"]) for call in calls) // 2
    n_layers = config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        others = ("linear_attention", "conv", "mamba", "moe", "mlp")
        n_layers = sum(layer_type not in others for layer_type in layer_types)
    if n_layers == 0 or not getattr(config, "num_attention_heads", None):
        return 0
    return n_layers * config.num_attention_heads * head_width(config)


def choose_kernel(why_padded, calls, device, dtype):
    """The kernel for packing.pack: padded if there is a reason, packed_varlen if it can compute.

    why_padded, calls: of layouts.dry_run.
    """
    if why_padded:
        return "padded"
    if device.type != "cuda" or dtype == torch.float32:
        return "packed_sdpa"
    if torch.cuda.get_device_capability() < (8, 0):  # before Ampere
        return "packed_sdpa"
    for call in calls:
        query_width, value_width = call["widths"]
        if query_width % 8 != 0 or query_width > 256 or value_width != query_width:
            return "packed_sdpa"
        if call["arguments"].get("softcap") is not None:  # Gemma-2
            return "packed_sdpa"
    return "packed_varlen"


def make_buffers(lm, device, name):
    """Compute rotary tables and the like on the device: files of weights do not hold them.

    Buffers that files do hold are left without values (NaN), for load_weights. Raises InputError
    for one that files do not hold, and that the model's own initialisation does not make.
    """
    # What the initialisation makes is the same, whatever was there before
    zeros_before = initialized_buffers(lm, device, 0)
    ones_before = initialized_buffers(lm, device, 1)

    for path, module in lm.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                if buffer.is_floating_point():
                    buffer.fill_(float("nan"))
            elif not torch.equal(zeros_before[path, key], ones_before[path, key]):
                raise InputError(
                    f"--model={name}: {lm.__class__.__name__} has a buffer '{key}' "
                    "that this loader cannot make"
                )


def initialized_buffers(lm, device, before):
    """The model's buffers, {(module's path, name): tensor}, as it initialises them on the device.

    before: the number that they hold until then.
    """
    for module in lm.modules():
        module._is_hf_initialized = False  # transformers initialises once
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = torch.full_like(buffer, before, device=device)
    lm.initialize_weights()

    buffers = {}
    for path, module in lm.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            buffers[path, key] = buffer
    return buffers


def make_deterministic(lm):
    """Switch off what is random in training: dropout, noise in the choice of experts (Phi-MoE)."""
    lm.eval()

    # These two kinds of modules are asked whether to recompute; only what trains is
    layouts.text_model(lm).training = True
    for layer in layouts.decoder_layers(lm):
        layer.training = True


def recompute_layers(lm, name, every):
    """Let one of so many layers compute its activations again in backward (every=1: all layers).

    Raises InputError for a model that cannot.
    """
    if not lm.supports_gradient_checkpointing:
        raise InputError(
            f"--model={name}: {lm.__class__.__name__} cannot compute its activations again: "
            "add --recompute=0"
        )
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    for number, layer in enumerate(layouts.decoder_layers(lm)):
        layer.gradient_checkpointing = number % every == 0


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
    if compile:
        # packed_sdpa has a graph for each number of blocks of rows; beyond 8 torch gives up
        torch._dynamo.config.recompile_limit = 64
    for layer in layouts.decoder_layers(policy.lm):
        if compile:
            layer.compile(dynamic=True)
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision)


# ---- how fast it could train ----


def flops(policy, pairs):
    """Model FLOPs of one training step on these pairs, each prompt computed once.

    Forward, and backward at twice that, or once where weights are frozen (LoRA). What is computed
    a second time, by padded rows, recomputation or in the log-prob gather, does not count. Of
    experts only those count that a token goes through.
    """
    config = policy.lm.config
    head = policy.lm.get_output_embeddings()
    head_size = sum(p.numel() for p in head.parameters())
    width = policy.attention_width

    body_size = 0
    for key, parameter in layouts.decoder_layers(policy.lm).named_parameters():
        size = parameter.numel()
        if ".experts." in key and parameter.dim() > 1:
            size = size * experts_per_token(config) // parameter.shape[0]  # one row an expert
        body_size += size

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


def experts_per_token(config):
    """How many experts a token goes through."""
    for key in ("num_experts_per_tok", "top_k_experts", "moe_topk"):
        if getattr(config, key, None):
            return getattr(config, key)
    return 1


def matmul_rate(device, dtype, n=0):
    """FLOP/s of the product of two n x n matrices, the best of six; n = 0: large for this device.

    That is what this device can do; model FLOPs are compared with it (MFU).
    """
    if n == 0:
        n = 8192 if device.type == "cuda" else 1536
    x = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(6):
        t0 = time.perf_counter()
        product = x @ x
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - t0)
    return 2 * n**3 / best
