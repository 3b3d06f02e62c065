"""The engines on this device, vLLM where that is installed, and generate.py with one of them."""

import json
import os
import random

import torch

from bench.gpu.device import ON_GPU, empty_cache
from bench.gpu.engine import sample_by_vllm
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
            report.below(f"{dtype} below the best", kth_gap(lm, prompt, ids, 1), gap_limit)
            report.below(f"{dtype} log-probs", logp_difference(lm, prompt, ids, logp), limit)
        for (prompt, _), responses in zip(requests, drawn):
            for ids, _, logp in responses:
                report.below(f"{dtype} log-probs", logp_difference(lm, prompt, ids, logp), limit)


@torch.no_grad()
def kth_gap(lm, prompt, ids, k):
    """The most by which a token of a response is less likely than the k-th best, in nats."""
    every, own = response_log_probs(lm, prompt, ids)
    return (every.topk(k).values[:, -1] - own).max()


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


# ---------------------------------------------------------------------------- vLLM


def vllm(report):
    """vLLM's log-probs, seeds, greedy tokens, top_k and stop texts, in bfloat16 on a GPU."""
    folder = os.path.join(worded(initializer_range=0.06), "model")  # so large that context matters
    rng = random.Random(0)
    requests = []
    reseeded = []
    for _ in range(16):
        prompt = [rng.randrange(6, 500) for _ in range(rng.randint(2, 120))]
        requests.append((prompt, rng.randrange(2**31)))
        reseeded.append((prompt, rng.randrange(2**31)))

    stop = "w12"  # as many words begin
    settings = dict(top_p=1.0, max_new_tokens=48)
    greedily = settings | dict(n_responses=1, temperature=0.0, top_k=0)
    randomly = settings | dict(n_responses=4, temperature=1.0, top_k=50)
    calls = [(requests, greedily), (requests, randomly), (requests, randomly), (reseeded, randomly)]
    calls.append((requests, randomly | dict(stop=[stop])))

    # in nats: below the best token or the 50th, and between two log-probs of a token
    dtype, gap_limit, limit = "float32", 1e-3, 2e-4
    if ON_GPU:
        dtype, gap_limit, limit = "bfloat16", 0.2, 5e-2
    empty_cache()
    _, answers = sample_by_vllm(folder, calls, dtype)
    greedy, drawn, again, drawn_by_others, stopped = [results for results, _ in answers]

    lm = plain(folder)
    differences_elsewhere = []
    for k, (prompt, _) in enumerate(requests):
        ids, _, logp = greedy[k][0]
        report.below("below the best", kth_gap(lm, prompt, ids, 1), gap_limit)
        report.below("log-probs", logp_difference(lm, prompt, ids, logp), limit)
        for ids, _, logp in drawn[k]:
            report.below("below the 50th", kth_gap(lm, prompt, ids, 50), gap_limit)
            report.below("log-probs", logp_difference(lm, prompt, ids, logp), limit)

        # the log-probs behind another prompt, so that it shows that the limit can be missed
        ids, _, logp = drawn[k][0]
        other_prompt, _ = requests[k - 1]
        differences_elsewhere.append(logp_difference(lm, other_prompt, ids, logp))
    report.holds("other prompts give others", min(differences_elsewhere) > 10 * limit)

    # The noise of a token depends on its seed and place alone. Its logits are rounded otherwise in
    # another batch, or behind a cached prefix, so that a response may go on differently.
    n_all = len(requests) * 4
    n_first, n_whole = count_equal(drawn, again)
    n_first_reseeded, _ = count_equal(drawn, drawn_by_others)
    report.holds("seeds repeat first tokens", n_first > 0.9 * n_all)
    report.holds("other seeds do not", n_first_reseeded < 0.5 * n_all)
    report.measure("vLLM, same seeds again", f"{n_whole} of {n_all} responses are the same")
    for responses in drawn:
        report.holds("responses differ", len({tuple(ids) for ids, _, _ in responses}) == 4)

    # it ends with the token that completes the text, or with the end token
    tokenizer, eos_ids = load_tokenizer(folder)
    n_stopped = 0
    for responses in stopped:
        for ids, finished, _ in responses:
            has_stop = stop in tokenizer.decode(ids)
            report.holds("it stops at once", stop not in tokenizer.decode(ids[:-1]))
            report.holds("then it is finished", finished == (has_stop or ids[-1] in eos_ids))
            n_stopped += has_stop
    report.holds("stop texts come", n_stopped > 0)


def count_equal(results, others):
    """Of how many responses the first token is the same, and of how many all tokens."""
    n_first = 0
    n_whole = 0
    for responses, other_responses in zip(results, others):
        for (ids, _, _), (other_ids, _, _) in zip(responses, other_responses):
            n_first += ids[0] == other_ids[0]
            n_whole += ids == other_ids
    return n_first, n_whole
