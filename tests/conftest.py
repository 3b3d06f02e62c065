"""What the test files share: running the scripts, small random chat models, pairs of random text.

from conftest import ROOT, build_model, run, torchrun, write_pairs
"""

import atexit
import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tests import the scripts and the package
sys.path.append(str(ROOT / "bench"))  # behind the scripts, because bench/ has a rank.py too
from warm import warm  # noqa: E402

ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(ENV)

# scripts run on the CPU, whose bytes repeat and which takes any number of processes
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}

# ----------------------------------------------------------------------------- running the scripts


@functools.cache
def warm_python():
    """Path of a python that has imported everything (bench/warm.py).

    It lives from the first test that runs a script to the end of this worker.
    """
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    env = stack.enter_context(warm(folder, **NO_GPU))
    return shutil.which("python", path=env["PATH"])


def warm_environment():
    """The environment in which `python` is that one, and torchrun that of this environment."""
    folders = [os.path.dirname(warm_python()), os.path.dirname(sys.executable), os.environ["PATH"]]
    return os.environ | NO_GPU | {"PATH": os.pathsep.join(folders), "VIRTUAL_ENV": sys.prefix}


def run(script, *args, python=(), env=None, **settings):
    """Run a script of the repository with --key=value for each setting; a CompletedProcess.

    It runs in a fork of a process that has imported everything, but in one of its own where
    options for python or a PYTHONPATH are given.
    """
    env = env or {}
    executable = warm_python()
    if python or "PYTHONPATH" in env:
        executable = sys.executable
    options = [f"--{key}={value}" for key, value in settings.items()]
    command = [executable, *python, script, *args, *options]
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | NO_GPU | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def torchrun(n, script, *args, **settings):
    """Run a script likewise under torchrun, with n processes, which are such forks too."""
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "--no-python")
    return run("-m", *launcher, warm_python(), script, *args, **settings)


# ------------------------------------------------------------------------------------ small models

SPECIALS = ["<s>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
PLAIN = (
    "{{ bos_token }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML = PLAIN.replace("'<|end|>'", "'<|end|>\\n'")  # ends a turn and then a line, as ChatML does


def build_tokenizer(template, pad):
    """A chat tokenizer with one token per byte, behind the special tokens."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


def build_model(folder, architecture="Llama", template=PLAIN, pad="<|pad|>", seed=0, **config):
    """Save a small random chat model and its tokenizer; weights so large that context matters."""
    import torch
    import transformers

    tokenizer = build_tokenizer(template, pad)
    tokenizer.save_pretrained(folder)

    small = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    make_config = getattr(transformers, architecture + "Config")
    model = transformers.AutoModelForCausalLM.from_config(make_config(**small | config))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a Llama of 2 layers and 35k parameters."""
    return build_model(tmp_path_factory.mktemp("tiny") / "model")


# ------------------------------------------------------------------------------------ random pairs


def write_pairs(path, n, seed=0, **extra):
    """Write n pairs of random text as TRL reads them, with the fields in `extra`; return them.

    Lengths are log-normal, with medians of 15 characters (prompt), 25 (chosen) and 20 (rejected).
    """
    rng = random.Random(seed)

    def message(role, median):
        length = round(rng.lognormvariate(0, 0.7) * median)
        length = min(120, max(1, length))
        content = "".join(rng.choices("etaoin shrdlu\n", k=length))
        return [{"role": role, "content": content}]

    pairs = []
    for _ in range(n):
        pair = {
            "prompt": message("user", 15),
            "chosen": message("assistant", 25),
            "rejected": message("assistant", 20),
        }
        pairs.append(pair | extra)
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    Path(path).write_text("".join(lines), encoding="utf-8")
    return pairs
