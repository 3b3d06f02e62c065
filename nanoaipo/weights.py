"""The policy's weights, between a folder of safetensors and the processes that share them.

load_weights fills a policy built by policy.py; save_policy writes it as a Hugging Face folder.
A file's names for weights are often not the model's: transformers 5 packs the experts of a layer
into one parameter, renames heads, and knows how to do so and to undo it. We call it for that.
"""

import copy
import functools
import os
import re

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from nanoaipo import layouts
from nanoaipo.errors import InputError, reason_of
from nanoaipo.model_folders import (
    CONVERT,
    check_not_quantized,
    quantization_error,
    weight_file_names,
)

# The text model within a multimodal one: language_model.model.layers, model.language_model.layers
TEXT_MODEL = re.compile(r"^(model\.)?(?:language_model|text_model)\.")

# ---- load: each process reads the rows that it holds ----


def load_weights(policy, name, seed=0):
    """Fill the policy from safetensors: every process reads the rows of each weight that it holds.

    Adapters start as in LoRA: A random, from the seed, and B zero, so that the policy is the model
    it starts from. Raises InputError for a weight that is missing, quantized, or of another shape,
    and for a model that is not causal.
    """
    check_not_quantized(name)
    stored = StoredWeights(policy.lm, local_folder(name))
    rng = torch.Generator().manual_seed(seed)

    state = {}
    filled = {}  # by id of the parameter: a head tied to the embedding is one with two names
    for key, parameter in policy.lm.named_parameters(remove_duplicate=False):
        if id(parameter) not in filled:
            # FSDP divides the rows of a weight among the processes
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            mine = slice(offset[0], offset[0] + shape[0])
            if ".lora_A." in key:
                # Every process draws the whole matrix, so all draw the same
                bound = parameter.shape[1] ** -0.5
                local = torch.empty(parameter.shape).uniform_(-bound, bound, generator=rng)[mine]
            elif ".lora_B." in key:
                local = torch.zeros(shape)
            else:
                local = stored.rows(without_adapter(key), parameter.shape, mine)
            filled[id(parameter)] = as_shard(local, parameter)
        state[key] = filled[id(parameter)]
    policy.lm.load_state_dict(state, strict=False, assign=True)

    # Buffers are small, and whole in every process
    for key, buffer in persistent_buffers(policy.lm).items():
        buffer.copy_(stored.rows(without_adapter(key), buffer.shape, ...))

    # save_policy undoes what was done to the names of these files, as transformers does
    policy.lm._weight_conversions = stored.used_conversions()

    layouts.check_causal(policy, name)


def stores_head(name):
    """Whether the files of a folder or hub model hold an output head; else it is the embedding.

    A multimodal model's config.json may say one thing, that of its text model another.
    """
    return any(key.endswith("lm_head.weight") for key in weight_files(local_folder(name)))


def local_folder(name):
    """The folder of this name, or of a hub model's weights and settings, fetched if need be."""
    if os.path.isdir(name):
        return name

    from huggingface_hub import snapshot_download

    return snapshot_download(
        name,
        allow_patterns=["*.safetensors", "*.json"],
        ignore_patterns=["consolidated*", "original/*"],  # the same weights in other layouts
    )


def without_adapter(key):
    """The name of a weight before adapters were added."""
    return key.replace(".base_layer.", ".")


def persistent_buffers(lm):
    """Buffers that files of weights hold, {name: buffer}: a router's bias, a layer's scale."""
    held = lm.state_dict()
    buffers = {}
    for key, buffer in lm.named_buffers():
        if key in held:
            buffers[key] = buffer
    return buffers


class StoredWeights:
    """The weights in a folder of safetensors, by the model's own names for them."""

    def __init__(self, lm, folder):
        """Find what each weight of lm is made of, by the conversions that transformers has."""
        self.lm = lm
        self.folder = folder
        self.path_of = weight_files(folder)
        self.stored_key = {}  # by name: of a weight that is stored as it is
        self.converter = {}  # by name: of a weight that is made of others
        self.made = {}  # by name: whole weights that a converter has made, until they are asked for

        # What transformers would do to names and weights of this architecture
        self.conversions = get_model_conversion_mapping(lm)
        renamings = [x for x in self.conversions if isinstance(x, WeightRenaming)]
        converters = [x for x in self.conversions if isinstance(x, WeightConverter)]
        converter_of = {}
        for converter in converters:
            for pattern in converter.source_patterns:
                converter_of[pattern] = converter

        names = {without_adapter(key): value for key, value in lm.state_dict().items()}
        for stored_key in sorted(self.path_of, key=dot_natural_key):  # experts by their numbers
            key = stored_key
            if key not in names:
                key = TEXT_MODEL.sub(r"\1", key)
            name, pattern = rename_source_key(
                key, renamings, converters, lm.base_model_prefix, names
            )

            # A name that only looks as if it had to be changed
            if name not in names and key in names:
                name, pattern = key, None

            # Weights that the text model has no use for: an image encoder, a second head
            if name not in names:
                continue

            if pattern is None:
                self.stored_key[name] = stored_key
                continue
            converter = self.converter.get(name)
            if converter is None:
                converter = copy.deepcopy(converter_of[pattern])
                for target in converter.target_patterns:
                    made = name.replace(converter.target_patterns[0], target)
                    self.converter[made] = converter
            read = functools.partial(self.read, stored_key)
            converter.add_tensor(name, stored_key, pattern, read)

    def rows(self, name, shape, rows):
        """These rows, a slice, of the weight of this name and (whole) shape.

        Raises InputError for a weight that is missing, quantized, or of another shape.
        """
        if name in self.stored_key:
            return self.read(self.stored_key[name], rows, shape)
        if name in self.converter and name not in self.made:
            self.make(name)
        if name not in self.made:
            raise InputError(f"--model={self.folder}: weight {name} is missing in its safetensors")
        whole = self.made.pop(name)
        self.check_shape(name, list(whole.shape), shape)
        return whole[rows]

    def read(self, key, rows=..., shape=None):
        """Rows of the weight of this name in the files; its shape is checked if it is given."""
        # The file is opened anew for each weight, so that its mapped pages do not add up in memory
        with safe_open(self.path_of[key], "pt") as f:
            stored = f.get_slice(key)
            if stored.get_dtype().startswith(("F8", "F6_", "F4", "I8", "U8")):
                raise quantization_error(self.folder, stored.get_dtype())
            if shape is not None:
                self.check_shape(key, stored.get_shape(), shape)
            return stored[rows]

    def make(self, name):
        """Make this weight, and what is made with it, of the weights that it is stored as."""
        converter = self.converter[name]
        try:
            self.made |= converter.convert(name, model=self.lm, config=self.lm.config)
        except (RuntimeError, IndexError) as e:  # parts whose shapes do not fit, or too few of them
            raise InputError(
                f"--model={self.folder}: weight {name} cannot be made of its parts in the "
                f"safetensors ({reason_of(e)})"
            ) from e

    def check_shape(self, name, stored, configured):
        """Raise InputError unless a weight has the shape that the model gives it."""
        if stored != list(configured):
            raise InputError(
                f"--model={self.folder}: weight {name} has shape {stored}, "
                f"its config.json says {list(configured)}"
            )

    def used_conversions(self):
        """The conversions that these files needed."""
        return [conversion for conversion in self.conversions if conversion.was_used()]


def weight_files(folder):
    """The file of each weight, {name: path}; raises InputError for a broken file, or none."""
    path_of = {}
    for file in weight_file_names(folder):
        path = os.path.join(folder, file)
        try:
            with safe_open(path, "pt") as f:
                for key in f.keys():
                    path_of[key] = path
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path}: not a whole safetensors file ({e})") from e
    if not path_of:
        raise InputError(
            f"--model={folder}: no *.safetensors in it; other formats can run code and are not "
            f"read: {CONVERT}"
        )
    return path_of


def as_shard(local, parameter):
    """A parameter like this one, with memory: `local` holds the rows of this process."""
    local = local.to(parameter.device_mesh.device_type, parameter.dtype, copy=True)
    whole = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return torch.nn.Parameter(whole, requires_grad=parameter.requires_grad)


# ---- save ----


def save_policy(policy, folder, dtype, tokenizer, eos_ids, rank):
    """Write the policy as a Hugging Face folder in dtype, adapters merged, on rank 0.

    All processes have to call it: weights are gathered one after another. Raises InputError for a
    weight that is not finite.
    """
    parameters = dict(policy.lm.named_parameters())
    state = {}
    for key, parameter in parameters.items():
        if ".lora_" in key:
            continue  # it is merged into the weight that it adapts
        weight = parameter.full_tensor().detach()
        if key.endswith(".base_layer.weight"):
            weight = weight.float() + adapter_product(policy.lm, parameters, key)
        if not weight.isfinite().all():  # the last step's: no loss is computed behind it
            raise InputError(
                f"{folder}: weight {key} is not finite, and nothing is saved: lower --lr"
            )
        if rank == 0:
            # A copy, because gathered rows may lie in a longer buffer
            state[without_adapter(key)] = weight.to("cpu", dtype, copy=True)
    for key, buffer in persistent_buffers(policy.lm).items():
        state[without_adapter(key)] = buffer.to("cpu", copy=True)
    if rank != 0:
        return

    # The layout of the files that were loaded; parts of one weight get memory of their own
    state = revert_weight_conversion(policy.lm, state)
    for key in state:
        state[key] = state[key].clone(memory_format=torch.contiguous_format)

    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    policy.lm.config.dtype = dtype
    policy.lm.config.architectures = [policy.lm.__class__.__name__]  # not that of a wrapper
    policy.lm.config.save_pretrained(folder)
    generation = GenerationConfig(
        eos_token_id=sorted(eos_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def adapter_product(lm, parameters, key):
    """What the adapter adds to the weight of this name: scaling * B A, in float32."""
    layer = key.removesuffix(".base_layer.weight")
    a = parameters[f"{layer}.lora_A.default.weight"].full_tensor().detach()  # (rank, in)
    b = parameters[f"{layer}.lora_B.default.weight"].full_tensor().detach()  # (out, rank)
    return lm.get_submodule(layer).scaling["default"] * (b @ a)  # (out, in)
