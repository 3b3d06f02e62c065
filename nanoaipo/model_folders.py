"""What a model folder says of itself, read before anything is loaded from it."""

import json
import os

from nanoaipo.errors import InputError, reason_of

WEIGHTS = ("pytorch_model", "adapter_model", "model", "consolidated")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    "convert weights that you trust once, by transformers' from_pretrained(OLD) and "
    "save_pretrained(NEW), which writes safetensors"
)


def check_has_model(name, setting="model"):
    """Raise InputError for a folder or hub model that holds an adapter or pickles and no model."""
    check_no_pickle(name, setting)
    has_config = find_config(name, setting) is not None
    if has_config and not holds_only_adapter(name):
        return
    adapter_config = find_file(name, "adapter_config.json")
    if adapter_config is None and not has_config:
        return

    base = "which it does not name"
    if adapter_config is not None:
        base = read_json(adapter_config).get("base_model_name_or_path") or base
    raise InputError(
        f"--{setting}={name}: an adapter and no model; first merge it into its base ({base}), "
        "with peft's merge_and_unload"
    )


def check_no_pickle(name, setting="model"):
    """Raise InputError for a folder whose weights are in pickles, which can run code, and only so.

    Of a hub model no other files than safetensors are fetched.
    """
    if not os.path.isdir(name):
        return
    files = sorted(os.listdir(name))
    pickles = [file for file in files if file.startswith(WEIGHTS) and file.endswith(PICKLES)]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise InputError(
            f"--{setting}={name}: {pickles[0]} is a pickle, which can run code and is not read: "
            f"{CONVERT}"
        )


def holds_only_adapter(name):
    """Whether a folder's safetensors are an adapter's alone; of a hub model it is not asked."""
    if not os.path.exists(os.path.join(name, "adapter_model.safetensors")):
        return False
    return not weight_file_names(name)


def check_not_quantized(name, setting="model"):
    """Raise InputError if config.json says that the weights are codes and not numbers."""
    path = find_config(name, setting)
    if path is None:
        return

    # The text model of a multimodal one has settings of its own
    config = read_json(path)
    for part in (config, *config.values()):
        if isinstance(part, dict) and part.get("quantization_config"):
            method = part["quantization_config"].get("quant_method", "quantization_config")
            raise quantization_error(name, method, setting)


def quantization_error(name, method, setting="model"):
    """The InputError for quantized weights; method: its name, or the type that is stored."""
    return InputError(
        f"--{setting}={name}: its weights are quantized ({method}); "
        "training needs the bfloat16 release"
    )


def find_config(name, setting):
    """Path of a model's config.json, or None if it has none.

    Raises InputError for a hub model that is not cached where there is no network: whoever loads it
    would ask the hub for minutes.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return fetch_file(name, "config.json")
    except LocalEntryNotFoundError as e:
        raise InputError(
            f"--{setting}={name}: no model folder, no config.json of it in the hub's cache, "
            "and the hub cannot be reached: name a folder, or fetch it where there is a network"
        ) from e
    except Exception:  # hub errors come in many classes; whoever loads the model will name them
        return None


def find_file(name, file):
    """Path of a file in a folder or of a hub model, or None if it has no such file."""
    try:
        return fetch_file(name, file)
    except Exception:  # as in find_config
        return None


def fetch_file(name, file):
    """Path of a file in a folder, None if it is not there, or of a hub model; raises its errors."""
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.exists(path) else None

    from huggingface_hub import hf_hub_download

    return hf_hub_download(name, file)


def read_json(path):
    """The object in a JSON file; raises InputError if it holds none."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: no JSON ({reason_of(e)})") from e
    if not isinstance(value, dict):
        raise InputError(f"{path}: no JSON object")
    return value


def weight_file_names(folder):
    """Names of the files that hold a folder's model: what its index names, if it has one.

    Raises InputError for a file that the index names and that is missing, and for a
    model.safetensors that it does not name: transformers would read that one.
    """
    index = os.path.join(folder, "model.safetensors.index.json")
    single = os.path.join(folder, "model.safetensors")
    if os.path.exists(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: no weight_map in it")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if os.path.basename(name) != name:
                raise InputError(f"{index}: it names {name}, which is not a file of its folder")
            if not os.path.exists(os.path.join(folder, name)):
                raise InputError(f"{index}: it names {name}, which is missing; fetch it again")
        if os.path.exists(single) and "model.safetensors" not in names:
            raise InputError(f"{index}: it does not name {single} beside it; remove one of the two")
        return names

    if os.path.exists(single):
        return ["model.safetensors"]

    # Neither an adapter beside the model, nor the same weights in Mistral's own layout
    names = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors") and not name.startswith(("adapter_", "consolidated")):
            names.append(name)
    return names
