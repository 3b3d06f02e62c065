"""Small random models, pairs to train on, and what plain transformers computes on them.

Folders lie in the temporary folder that the driver removes at the end.
"""

import array
import contextlib
import functools
import random
import sys
import tempfile

import torch
import transformers

from bench import train as bench_train
from bench.gpu.device import DEVICE, ON_GPU
from nanoaipo.policy import build_policy
from nanoaipo.processes import start_processes
from nanoaipo.weights import load_weights

VOCABULARY = 512
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    initializer_range=0.05,  # so large that context matters
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
if not ON_GPU:
    SMALL |= dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16)


# ---------------------------------------------------------------------------- models of ids


def random_model(architecture="Llama", kind="ForCausalLM", **config):
    """Folder of a small random model without a tokenizer, in float32."""
    make_config = getattr(transformers, f"{architecture}Config")
    make_model = getattr(transformers, f"{architecture}{kind}")
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    make_model(make_config(**SMALL | config)).save_pretrained(folder)
    return folder


def random_pairs(n, longest=60, seed=0):
    """n pairs of random ids; prompt and responses have 1 to `longest` tokens."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        pair = {}
        for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
            ids = rng.choices(range(6, VOCABULARY), k=rng.randint(1, longest))
            pair[key] = array.array("i", ids)
        pairs.append(pair)
    return pairs


@functools.cache
def mesh():
    """This process alone, connected as train.py does it."""
    return start_processes(DEVICE)


def build(folder, dtype, chunk=256, recompute=0, compile=False, lora_rank=0):
    """The policy as train.py builds it."""
    policy = build_policy(
        folder,
        mesh(),
        dtype,
        chunk=chunk,
        recompute=recompute,
        compile=compile,
        lora_rank=lora_rank,
        lora_alpha=16.0,
    )
    load_weights(policy, folder)
    return policy


def plain(folder, dtype=torch.float32):
    """The model as transformers computes it, with its eager attention."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype
    )
    return lm.to(DEVICE)


def plain_log_probs(lm, pairs):
    """Log-probs (N,) of all response tokens in the order of packing.pack, one sequence at a time.

    The softmax is in float32.
    """
    logp = []
    for pair in pairs:
        prompt = list(pair["prompt_ids"])
        for key in ("chosen_ids", "rejected_ids"):
            response = list(pair[key])
            logp.append(response_log_probs(lm, prompt, response)[1])
    return torch.cat(logp)


def response_log_probs(lm, prompt, response):
    """(Log-probs (R, V) of all tokens at each place of the response, those of its own (R,))."""
    ids = torch.tensor([prompt + response], device=DEVICE)
    logits = lm(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]  # (R, V)
    every = logits.float().log_softmax(-1)
    labels = torch.tensor(response, device=DEVICE)
    return every, every.gather(-1, labels[:, None])[:, 0]


# ---------------------------------------------------------------------------- models of words


@functools.cache
def worded(**config):
    """Folder with a small random Llama with tokenizer (model) and pairs like UltraFeedback's.

    config: of the model, beside its shape.
    """
    shape = dict(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    n_pairs = 40
    if not ON_GPU:
        shape |= dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
        n_pairs = 8
    return make("cpu", shape | config, n_pairs)  # a CPU's are stored in float32


@functools.cache
def large():
    """The same with a Llama of 1.59B weights and 192 pairs; on a CPU it is the small one."""
    if not ON_GPU:
        return worded()
    shape = dict(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    return make("cuda", shape, 192)


@functools.cache
def wide():
    """The same with layers as wide as in models of 7B weights, but seven of them: 1.79B weights."""
    if not ON_GPU:
        return worded()
    shape = dict(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=7,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    return make("cuda", shape, 64)


def make(device, shape, n_pairs):
    """Folder of a model and pairs as bench/train.py makes them."""
    folder = tempfile.mkdtemp()
    with contextlib.redirect_stdout(sys.stderr):
        bench_train.make(folder, device, shape, n_pairs)
    return folder
