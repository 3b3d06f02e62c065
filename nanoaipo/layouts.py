"""Which layout an architecture trains in, and what it does to its logits; found without weights.

Packed rows (packing.pack) are fast, and right only where nothing but attention mixes the tokens of
a row, and where our attention function can do all that it is asked to. A dry run shows that: a
forward pass of the architecture on the meta device, where nothing is computed, in which the
function notes each call. Every other architecture gets padded rows (packing.pad), where its own
attention sees one sequence a row.
"""

import copy
import inspect
from array import array

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from nanoaipo.errors import InputError, reason_of
from nanoaipo.packing import HARMLESS, pack, packed_sdpa

# ---- the parts of a model ----


def text_model(lm):
    """The part of the model that turns ids into hidden states."""
    decoder = lm.get_decoder()
    if decoder is lm:  # Llama 4's, which has it under another name than it says
        decoder = getattr(lm, "model", lm)
    return decoder


def decoder_layers(lm):
    """The list of the model's decoder layers (a ModuleList), wherever it has them, or None."""
    # Other lists, of experts for example, are smaller
    largest = None
    most = 0
    for module in text_model(lm).modules():
        if isinstance(module, torch.nn.ModuleList):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > most:
                largest = module
                most = size
    return largest


def moving_ropes(lm):
    """Rotary tables that depend on the longest position of a row (LongRoPE, dynamic NTK): names."""
    names = []
    for name, module in lm.named_modules():
        rope_type = getattr(module, "rope_type", None)  # a dict where types of layers differ
        if "dynamic" in str(rope_type) or "longrope" in str(rope_type):
            names.append(name)
    return names


class RopeByRow(torch.nn.Module):
    """Rotary tables of each row for itself, so that they do not depend on the rows beside it."""

    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def forward(self, x, position_ids, *args, **settings):
        """Cosines and sines, (n, L, d) each: what `rope` makes of each row of (n, L) alone."""
        cosines = []
        sines = []
        for positions in position_ids:
            # A copy, because a table also remembers the longest row that it has seen
            rope = copy.deepcopy(self.rope)
            cosine, sine = rope(x, positions[None], *args, **settings)  # (1, L, d)
            cosines.append(cosine)
            sines.append(sine)
        return torch.cat(cosines), torch.cat(sines)


def rope_by_row(lm):
    """Let each row have its own rotary tables, where they depend on the longest position."""
    for name in moving_ropes(lm):
        rope = lm.get_submodule(name)
        lm.set_submodule(name, RopeByRow(rope))


def shares_layers(lm):
    """Whether two decoder layers hold the same weight (Zamba), which FSDP would train as two."""
    seen = set()
    for layer in decoder_layers(lm):
        ids = {id(parameter) for parameter in layer.parameters()}
        if ids & seen:
            return True
        seen |= ids
    return False


# ---- the layout: a dry run ----


def noting_sdpa(module, query, key, value, attention_mask, segments=None, **arguments):
    """packed_sdpa, which notes each call in segments["calls"]."""
    if segments is not None:
        call = {
            "module": module,
            "heads": query.shape[1],
            "widths": (query.shape[-1], value.shape[-1]),  # of a head
            "arguments": arguments,
        }
        segments["calls"].append(call)
    return packed_sdpa(module, query, key, value, attention_mask, segments=segments, **arguments)


AttentionInterface.register("noting_sdpa", noting_sdpa)


def dry_run(config):
    """What keeps this architecture from packed rows, "" if nothing does, and its attention calls.

    A call is a dict, see noting_sdpa. Raises InputError for a config that makes no model.
    """
    # In 16 bits, because the grouped product of experts has no other type on the meta device
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager"
            )
    except Exception as e:  # an architecture's own code can fail in any way
        raise InputError(
            f"--model={config.name_or_path}: its config.json makes no model "
            f"({type(e).__name__}: {reason_of(e)}); fetch it again"
        ) from e
    reason = mixes_tokens(lm)
    if reason:
        return reason, []
    lm.config._attn_implementation = "noting_sdpa"

    # One pair of three tokens, as train.py would compute it
    token = array("i", [0])
    pair = {"prompt_ids": token, "chosen_ids": token, "rejected_ids": token}
    row, _, _ = pack([pair], "packed_sdpa")
    segments = row["segments"]
    segments["rows"] = [rows.to("meta") for rows in segments["rows"]]
    segments["back"] = segments["back"].to("meta")
    segments["calls"] = []
    try:
        with torch.no_grad():
            text_model(lm)(
                input_ids=row["input_ids"].to("meta"),
                position_ids=row["position_ids"].to("meta"),
                use_cache=False,
                segments=segments,
            )
    except InputError as e:  # of packed_sdpa
        return str(e), segments["calls"]
    except Exception as e:  # an architecture's own code can fail in any way
        reason = f"its forward pass does not take packed rows ({type(e).__name__})"
        return reason, segments["calls"]
    return missed_calls(lm, segments["calls"]), segments["calls"]


def mixes_tokens(lm):
    """What in this model, besides attention, looks at more than one token of a row; "" if nothing.

    Its config and its modules tell.
    """
    layer_types = set(getattr(lm.config, "layer_types", None) or ())
    others = sorted(layer_types - {"full_attention", "sliding_attention"})
    if others:
        return f"{', '.join(others)} in its layers"
    if getattr(lm, "_is_stateful", False):
        return "a recurrent state in its layers"
    if any(isinstance(module, torch.nn.Conv1d) for module in lm.modules()):
        return "convolutions over a row"
    if moving_ropes(lm):
        return "rotary tables that depend on the longest position of a row"
    if "position_ids" not in inspect.signature(text_model(lm).forward).parameters:
        return "positions that cannot be set"
    return ""


def missed_calls(lm, calls):
    """What of this model's attention our function would not do; "" if it would do all."""
    # Ours looks back only, whatever the model wants; check_causal will see what that is
    wants_causal = getattr(lm.config, "is_causal", True) is not False
    for call in calls:
        if not wants_causal or getattr(call["module"], "is_causal", True) is False:
            return "attention that looks ahead"

    called = {call["module"] for call in calls}
    windowed = set()
    for call in calls:
        if call["arguments"].get("sliding_window") is not None:
            windowed.add(call["module"])
    layers = decoder_layers(lm) or []
    layer_types = getattr(lm.config, "layer_types", None)
    has_window = hasattr(type(lm.config), "sliding_window") and lm.config.sliding_window
    if getattr(lm.config, "use_sliding_window", True) is False:
        has_window = False

    for i, layer in enumerate(layers):
        modules = set(layer.modules())
        if not modules & called:
            return "layers whose attention is not a function that can be replaced"

        # A window that only the mask knows would be lost
        wants_window = bool(has_window)
        if layer_types:
            wants_window = layer_types[i] == "sliding_attention"
        if wants_window and not modules & windowed:
            return "a sliding window that attention is not told of"
    return ""


def own_attention(config, calls):
    """Name of the model's own attention for padded rows, None for transformers' choice.

    transformers' sdpa drops in silence what it does not know, such as soft-caps; eager does not.
    """
    known = HARMLESS | {"scaling", "sliding_window"}
    for call in calls:
        for key, value in call["arguments"].items():
            if key not in known and value is not None:
                return "eager"
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"
    return None


# ---- is it causal? ----

# Longer than the chunks that published models cut a row into, and no multiple of any
PROBE_LENGTH = 67


def check_causal(policy, name):
    """Raise InputError if a token changes what the loaded policy predicts before it.

    Packed rows are causal by our attention functions; in padded ones the model's own attention may
    look ahead (XLM, XLNet, CpmAnt). All processes have to call this: their weights are gathered.
    """
    if policy.kernel != "padded":
        return
    config = policy.lm.config
    length = PROBE_LENGTH
    n_positions = getattr(config, "max_position_embeddings", None) or 0
    if 0 < n_positions <= length:
        length = n_positions - 1  # behind the prompt's one token

    # Two responses that differ in one token, in the middle
    ids = [i % config.vocab_size for i in range(length)]
    changed = length // 2
    others = list(ids)
    others[changed] = 0
    pair = {
        "prompt_ids": array("i", [0]),
        "chosen_ids": array("i", ids),
        "rejected_ids": array("i", others),
    }
    row, _, _ = pack([pair], policy.kernel)
    row = {key: value.to(next(policy.parameters()).device) for key, value in row.items()}
    architecture = policy.lm.__class__.__name__
    try:
        with torch.no_grad():
            logp = policy(**row)
    except Exception as e:  # an architecture's own code can fail in any way
        raise InputError(
            f"--model={name}: architecture {architecture} is not supported "
            f"(its forward pass fails on padded rows: {reason_of(e)})"
        ) from e
    policy.reshard()  # without backward the root stays gathered

    # Rounding is far below what a change does; what looks ahead, it moves about as much as the rest
    difference = (logp[:length] - logp[length:]).abs()  # (length,)
    before = difference[:changed].max()
    after = difference[changed + 1 :].max()
    if before > 0.1 * after:
        raise InputError(
            f"--model={name}: architecture {architecture} is not causal: "
            "what it predicts depends on later tokens"
        )


# ---- the logits ----


class Output:
    """What the text model returns, with every field besides the hidden states empty."""

    def __init__(self, hidden):
        self.last_hidden_state = hidden

    def __getitem__(self, _):
        return self.last_hidden_state

    def __getattr__(self, _):
        return None


def logit_shape(lm, name):
    """(factor, softcap) between the hidden states and the logits: the model's, besides its head.

    Logits are softcap * tanh(factor * head(hidden) / softcap), or factor * head(hidden) where
    softcap is None. The model's own forward pass tells: it gets hidden states and products with
    the head of our choice. Raises InputError where it makes something else of them.
    """
    head = lm.get_output_embeddings()
    hidden = torch.linspace(1, -1, head.weight.shape[1]).view(1, 1, -1)  # (1, 1, D)
    product = torch.linspace(-50, 50, len(head.weight)).view(1, 1, -1)  # (1, 1, V)
    product[0, 0, :2] = torch.tensor([2.0**-10, 2.0**100])
    seen = []

    def text_model_forward(*args, **settings):
        return Output(hidden)

    def head_forward(x):
        seen.append(x)
        return product.clone()

    text_model(lm).forward = text_model_forward
    head.forward = head_forward
    try:
        logits = lm(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits
        before = seen[0][0, 0, 0].item()  # MiniCPM scales the hidden states
        expected, after, softcap = expected_logits(product, logits)
        is_known = torch.allclose(seen[0], hidden * before) and torch.allclose(logits, expected)
    except Exception:  # an architecture's own code can fail in any way
        is_known = False
    del text_model(lm).forward
    del head.forward
    if not is_known:
        raise InputError(
            f"--model={name}: architecture {lm.__class__.__name__} is not supported "
            "(it makes its logits in a way of its own)"
        )
    return before * after, softcap


def expected_logits(product, logits):
    """(logits, factor, softcap): what `product` (1, 1, V) would become, and by what.

    Factor and soft-cap are read off the first two of `logits`: of a small and of a huge product.
    """
    small, huge = logits[0, 0, :2].tolist()
    factor = small / product[0, 0, 0].item()
    if abs(factor - 1) < 1e-6:
        factor = 1.0
    if huge > 1e20:
        return product * factor, factor, None
    return huge * torch.tanh(product * factor / huge), factor, huge
