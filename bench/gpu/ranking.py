"""PairRM and reward models on this device, in 16 bits, against float32."""

import collections
import functools
import os
import random
import tempfile

import torch
from safetensors.torch import load_file

from bench.gpu.device import DEVICE, ON_GPU, apart
from bench.gpu.models import random_model, random_pairs
from bench.rank import build_ranker, word_list
from nanoaipo.pairrm import compare, load_pairrm
from nanoaipo.rankers import load_reward_model, rewards_of

CPU = torch.device("cpu")
SHAPE = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048)
N_PROMPTS = 12
if not ON_GPU:
    SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    N_PROMPTS = 3


@functools.cache
def pairrm_folder(**shape):
    """Folder of a random PairRM of this shape, as bench/rank.py makes it."""
    folder = tempfile.mkdtemp()
    with DEVICE:  # a CPU would draw 400M numbers for seconds
        build_ranker(folder, shape)
    return folder


def random_texts(n_prompts, n_words, n_candidates=5):
    """(prompts, candidates) of random words, log-normally many, at most 400: none will be cut.

    n_words: of a prompt and of a candidate, on average.
    """
    rng = random.Random(0)
    words = word_list()

    def text(mean):
        length = round(mean * rng.lognormvariate(-0.18, 0.6))  # of mean 1
        return " ".join(rng.choices(words, k=max(3, min(400, length))))

    prompts = []
    candidates = []
    for _ in range(n_prompts):
        prompts.append(text(n_words[0]))
        candidates.append([text(n_words[1]) for _ in range(n_candidates)])
    return prompts, candidates


def log_odds(model, tokenizer, prompts, candidates):
    """Log-odds (M,) of all comparisons of two different candidates."""
    matrices = compare(model, tokenizer, prompts, candidates, 8192, collections.Counter())
    odds = []
    for matrix in matrices:
        different = ~torch.eye(len(matrix), dtype=torch.bool)
        odds.append(matrix[different])
    return torch.cat(odds)


def pairrm(report):
    """In float32 the CPU's scores; as load_pairrm has it here (float16 on a GPU), the winners."""
    folder = pairrm_folder(**SHAPE)
    prompts, candidates = random_texts(N_PROMPTS, n_words=(40, 80))
    model, tokenizer = load_pairrm(folder, DEVICE)
    here = log_odds(model, tokenizer, prompts, candidates)

    # in float32, from weights that were never rounded
    if ON_GPU:
        model.float()
        model.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
    exact = log_odds(model, tokenizer, prompts, candidates)
    model, tokenizer = load_pairrm(folder, CPU)
    on_cpu = log_odds(model, tokenizer, prompts[:3], candidates[:3])
    report.below("float32 from the CPU", (exact[: len(on_cpu)] - on_cpu).abs().max(), 1e-4)

    # against the log-odds' spread, because random weights decide little
    spread = exact.std()
    report.below("16 bits, in spreads", (here - exact).abs().mean() / spread, 6e-2)
    clear = exact.abs() > 0.2 * spread
    report.holds("clear winners stay", torch.equal((here > 0)[clear], (exact > 0)[clear]))


def reward_model(report):
    """Padded to one length in bfloat16, against each sequence alone in float32 on the CPU."""
    folder = random_model(kind="ForSequenceClassification", num_labels=1)
    sequences = []
    for pair in random_pairs(12, longest=150):
        ids = list(pair["prompt_ids"]) + list(pair["chosen_ids"])
        sequences.append({"input_ids": ids, "attention_mask": [1] * len(ids)})

    here = rewards_of(load_reward_model(folder, DEVICE), sequences)
    exact_model = load_reward_model(folder, CPU)
    exact = []
    for sequence in sequences:
        exact += rewards_of(exact_model, [sequence])
    report.below("rewards", apart(torch.tensor(here), torch.tensor(exact)), 5e-2)
