"""The policy's weights, between a folder of safetensors and the processes that share them.

load_weights fills a policy built by policy.py; save_policy writes it as a Hugging Face folder.
"""

import os

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import GenerationConfig

from nanoaipo.errors import InputError

# ---- load: each process reads the rows that it holds ----


def load_weights(policy, name, seed=0):
    """Fill the policy from safetensors: every process reads the rows of each weight that it holds.

    Adapters start as in LoRA: A random, from the seed, and B zero, so that the policy is the model
    it starts from. Raises InputError for a weight that is missing or has another shape.
    """
    folder = name
    if not os.path.isdir(name):
        folder = download(name)
    path_of = weight_files(folder)
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
                stored_key = key.replace(".base_layer.", ".")
                local = read_rows(path_of, stored_key, parameter.shape, mine, folder)
            filled[id(parameter)] = as_shard(local, parameter)
        state[key] = filled[id(parameter)]
    policy.lm.load_state_dict(state, strict=False, assign=True)


def download(name):
    """Folder of a hub model's weights and settings, fetched unless it is there."""
    from huggingface_hub import snapshot_download

    return snapshot_download(
        name,
        allow_patterns=["*.safetensors", "*.json"],
        ignore_patterns=["consolidated*", "original/*"],  # the same weights in other layouts
    )


def weight_files(folder):
    """The file of each weight, {name: path}; raises InputError for a broken file, or none."""
    path_of = {}
    for file in sorted(os.listdir(folder)):
        if not file.endswith(".safetensors"):
            continue
        path = os.path.join(folder, file)
        try:
            with safe_open(path, "pt") as f:
                for key in f.keys():
                    path_of[key] = path
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path}: not a whole safetensors file ({e})") from e
    if not path_of:
        raise InputError(
            f"--model={folder}: no *.safetensors in it; other formats can run code and are not read"
        )
    return path_of


def read_rows(path_of, key, shape, rows, folder):
    """These rows, a slice, of the weight of this name and (whole) shape, from its file."""
    if key not in path_of:
        raise InputError(f"--model={folder}: weight {key} is missing in its safetensors")

    # The file is opened anew for each weight, so that its mapped pages do not add up in memory
    with safe_open(path_of[key], "pt") as f:
        stored = f.get_slice(key)
        if stored.get_shape() != list(shape):
            raise InputError(
                f"--model={folder}: weight {key} has shape {stored.get_shape()}, "
                f"its config.json says {list(shape)}"
            )
        return stored[rows]


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

    All processes have to call it: weights are gathered one after another.
    """
    parameters = dict(policy.lm.named_parameters())
    state = {}
    for key, parameter in parameters.items():
        if ".lora_" in key:
            continue  # it is merged into the weight that it adapts
        weight = parameter.full_tensor().detach()
        if key.endswith(".base_layer.weight"):
            weight = weight.float() + adapter_product(policy.lm, parameters, key)
        if rank == 0:
            # A copy, because gathered rows may lie in a longer buffer
            stored_key = key.replace(".base_layer.", ".")
            state[stored_key] = weight.to("cpu", dtype, copy=True)
    if rank != 0:
        return

    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    policy.lm.config.dtype = dtype
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
