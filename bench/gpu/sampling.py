"""The transformers engine on this device, and generate.py with vLLM where that is installed."""

import json
import os
import random

import torch

from bench.gpu.device import ON_GPU, empty_cache
from bench.gpu.models import plain, response_log_probs, worded
from bench.gpu.scripts import Run
from nanoaipo.chat import load_tokenizer
from nanoaipo.transformers_engine import TransformersEngine


def transformers_engine(report):
    """Greedy tokens are the best under float32, log-probs those of the text as a whole.

    In bfloat16 both are nearly so.
    """
    folder = os.path.join(worded(), "model")
    _, eos_ids = load_tokenizer(folder)
    rng = random.Random(0)
    requests = []
    for seed in range(8):
        prompt = [rng.randrange(6, 500) for _ in range(rng.randint(2, 40))]
        requests.append((prompt, seed))
    lm = plain(folder)

    # in nats: below the best token, and between two log-probs of a token
    for dtype, gap_limit, limit in (("float32", 1e-3, 2e-4), ("bfloat16", 0.2, 5e-2)):
        sample = TransformersEngine(folder, eos_ids, dtype=dtype, generate_rows=12).sample
        settings = dict(top_p=1.0, max_new_tokens=24)
        greedy = sample(requests, n_responses=1, temperature=0.0, top_k=0, **settings)
        drawn = sample(requests, n_responses=3, temperature=1.0, top_k=50, **settings)
        again = sample(requests, n_responses=3, temperature=1.0, top_k=50, **settings)
        if dtype == "float32":
            report.holds("seeds repeat", drawn == again)

        for (prompt, _), responses in zip(requests, greedy):
            ids, _, logp = responses[0]
            report.below(f"{dtype} below the best", greedy_gap(lm, prompt, ids), gap_limit)
            report.below(f"{dtype} log-probs", logp_difference(lm, prompt, ids, logp), limit)
        for (prompt, _), responses in zip(requests, drawn):
            for ids, _, logp in responses:
                report.below(f"{dtype} log-probs", logp_difference(lm, prompt, ids, logp), limit)


@torch.no_grad()
def greedy_gap(lm, prompt, ids):
    """The most by which a token of a response is less likely than the best one, in nats."""
    every, own = response_log_probs(lm, prompt, ids)
    return (every.amax(-1) - own).max()


@torch.no_grad()
def logp_difference(lm, prompt, ids, logp):
    """How far the log-prob of a response is from lm's, in nats a token."""
    _, own = response_log_probs(lm, prompt, ids)
    return abs(own.sum().item() - logp) / len(ids)


def generate(report):
    """generate.py in bfloat16: its log-probs are those of plain transformers in float32.

    Its engine is vLLM where that is installed.
    """
    folder = worded()
    empty_cache()
    run = Run(
        "generate.py",
        "candidates.jsonl",
        model=f"{folder}/model",
        prompts=f"{folder}/pairs.jsonl",
        engine="auto" if ON_GPU else "transformers",  # vLLM's CPU build starts slowly
        n_prompts=8,
        n_responses=2,
        temperature=1.0,
        max_new_tokens=24,
        gpu_memory=0.3,  # this process holds some of it
    )
    run.wait()

    lm = plain(f"{folder}/model")
    with open(run.out, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    report.holds("there are candidates", len(rows) > 0)
    for row in rows:
        for response in row["responses"]:
            difference = logp_difference(lm, row["prompt_ids"], response["ids"], response["logp"])
            report.below("log-probs", difference, 5e-2)
