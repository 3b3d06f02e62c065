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
sys.path.insert(0, str(ROOT))                                           # tests import losses, data, configurator
sys.path.append(str(ROOT / "bench"))                                    # behind the scripts: bench/ has a rank.py too
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(ENV)
from warm import warm

SPECIALS = ["<s>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
PLAIN = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
CHATML = PLAIN.replace("'<|end|>'", "'<|end|>\\n'")                     # ends a turn and then a line, as ChatML does


@functools.cache
def warm_python():
    """A python that has imported everything (bench/warm.py), from the first test that runs a script to the end of this worker."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return shutil.which("python", path=stack.enter_context(warm(stack.enter_context(tempfile.TemporaryDirectory())))["PATH"])


def run(script, *args, python=(), env=None, **settings):
    """Run a script of the repository with --key=value for each setting; a CompletedProcess with text.

    In a fork of a process that has imported everything; in one of its own where options for python or an environment are given.
    """
    own = python or env or not script.endswith(".py")
    command = [sys.executable if own else warm_python(), *python, script, *args, *(f"--{k}={v}" for k, v in settings.items())]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True, timeout=300)


def torchrun(n, script, *args, **settings):
    """The same under torchrun with n processes."""
    return run(script, *args, python=("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"), **settings)


def build_model(folder, architecture="Llama", template=PLAIN, pad="<|pad|>", seed=0, **config):
    """Save a small random chat model and its tokenizer (one token per byte); weights so large that context matters."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    vocabulary = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", pad_token=pad)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    small = dict(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False,
                 bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(seed)
    config = getattr(transformers, architecture + "Config")(**small | config)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a Llama of 2 layers and 35k parameters."""
    return build_model(tmp_path_factory.mktemp("tiny") / "model")


def write_pairs(path, n, seed=0, **extra):
    """Write n pairs of random text with log-normal lengths, as TRL reads them, plus the fields in `extra`; return them."""
    draw = random.Random(seed)

    def message(role, median):
        length = min(120, max(1, round(draw.lognormvariate(0, 0.7) * median)))
        return [{"role": role, "content": "".join(draw.choices("etaoin shrdlu\n", k=length))}]

    pairs = [{"prompt": message("user", 15), "chosen": message("assistant", 25), "rejected": message("assistant", 20), **extra} for _ in range(n)]
    Path(path).write_text("".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8")
    return pairs
