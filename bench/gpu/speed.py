"""Measurements: of the card, of training, ranking and sampling. On a CPU they only have to run."""

import collections
import functools
import os
import random
import re
import sys
import time

import torch

from bench.gpu.device import (
    DEVICE,
    ON_GPU,
    best_seconds,
    empty_cache,
    matrix_rate,
    peak_gib,
    seconds_of,
    wait,
)
from bench.gpu.engine import sample_by_vllm
from bench.gpu.models import build, large, wide
from bench.gpu.ranking import pairrm_folder, random_texts
from bench.gpu.report import Skip
from bench.gpu.training import compare_steps, start_training, steps_of
from bench.rank import SHAPES, matmul_share
from losses import logprob
from nanoaipo.chat import load_tokenizer
from nanoaipo.packing import pack
from nanoaipo.pairrm import compare, load_pairrm
from nanoaipo.pairs import read_pairs
from nanoaipo.policy import flops
from nanoaipo.transformers_engine import TransformersEngine

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOKENS = 8192 if ON_GPU else 2048  # of a micro-batch


def card(report):
    """What everything else is compared with: products of matrices, and a copy."""
    n_bytes = 2**31 if ON_GPU else 2**20
    block = torch.zeros(n_bytes, dtype=torch.uint8, device=DEVICE)
    rate = 2 * n_bytes / best_seconds(block.clone, 5)  # read and written
    report.measure("products of matrices", f"{matrix_rate(DTYPE) / 1e12:.3g} TFLOP/s")
    report.measure("a copy, read and written", f"{rate / 1e12:.3g} TB/s")


def profile(f):
    """(kernels that a call runs on the GPU, seconds that they take); their table goes to stderr."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    if ON_GPU:
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        f()
        wait()

    # kernels alone, not the ranges around them
    n_kernels = 0
    microseconds = 0
    for event in recorded.events():
        is_range = event.name.startswith(("ProfilerStep", "FSDP::", "aten::"))
        is_range = is_range or getattr(event, "is_user_annotation", False)
        if event.device_type == DeviceType.CUDA and not is_range:
            n_kernels += 1
            microseconds += event.time_range.elapsed_us()

    key = "self_cuda_time_total" if ON_GPU else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80)
    print(table, file=sys.stderr)
    return n_kernels, microseconds / 1e6


# ---------------------------------------------------------------------------- training


def train(report):
    """train.py on 1.59B weights, lengths like UltraFeedback's, with its own defaults."""
    measure_run(report, "train.py", four_steps())


def train_compiled(report):
    """As the recipes set it; a layer that is compiled again and again would fall back to eager."""
    if not ON_GPU:
        raise Skip("compiling for a CPU takes minutes")
    run = four_steps(compile=True)
    measure_run(report, "train.py --compile=True", run)
    compare_steps(report, "compiled", run, four_steps(), limit=2e-2, norm_limit=5e-2)
    report.holds("no recompile limit is hit", "recompile_limit" not in run.log())


def train_kept(report):
    """As fast as one GPU goes: nothing computed twice, twice the tokens at once."""
    settings = dict(recompute=0, gather_chunk=2 * TOKENS, tokens_per_microbatch=2 * TOKENS)
    run = four_steps(compile=ON_GPU, **settings)
    text = " ".join(f"--{key}={value}" for key, value in settings.items())
    measure_run(report, f"train.py --compile={ON_GPU} {text}", run)


@functools.cache
def four_steps(**settings):
    """A run of train.py on the large model, ended behind its fourth step: it saves nothing."""
    empty_cache()
    settings = {"tokens_per_microbatch": TOKENS} | settings
    run = start_training(
        large(),
        loss="dpo",
        lr=1e-6,
        dtype=str(DTYPE).removeprefix("torch."),
        batch_size=48 if ON_GPU else 2,
        checkpoint_every=0,
        **settings,
    )
    run.wait_for(lambda: len(steps_of(run)) >= 4)
    run.kill()
    return run


def measure_run(report, name, run):
    """Note the mean of the last two of a run's four steps, and what comes before."""
    steps = steps_of(run)[:4]
    last = steps[2:]
    seconds = sum(step["seconds"] for step in last)
    rate = sum(step["tokens"] for step in last) / seconds
    share = sum(step["mfu"] * step["seconds"] for step in last) / seconds
    reference = re.search(r"reference log-probs in ([\d.]+) s", run.log())[1]
    report.measure(
        name,
        f"{rate:,.0f} tokens/s, {share:.1%} of the matrix rate, {last[-1]['memory_gib']:.1f} GiB; "
        f"reference pass {reference} s, first step {steps[0]['seconds']:.1f} s",
    )


def micro_batch(report):
    """Forward and backward of micro-batches through layers as wide as in models of 7B weights."""
    ways = {
        "train.py's defaults": dict(recompute=1, chunk=1024, compile=False),
        "compiled": dict(recompute=1, chunk=1024, compile=ON_GPU),
        "compiled, nothing twice": dict(recompute=0, chunk=4 * TOKENS, compile=ON_GPU),
    }
    measure_micro_batches(report, ways, (TOKENS, 2 * TOKENS))


def recompute(report):
    """The same, not compiled, by how many layers compute their activations again."""
    ways = {f"--recompute={every}": dict(recompute=every, chunk=1024) for every in (1, 2, 0)}
    measure_micro_batches(report, ways, (TOKENS,))


def measure_micro_batches(report, ways, limits):
    """Note time and memory of a micro-batch for ways to build the policy and numbers of tokens."""
    folder = wide()
    tokenizer, eos_ids = load_tokenizer(f"{folder}/model")
    records, _ = read_pairs(f"{folder}/pairs.jsonl", tokenizer, eos_ids, max_length=4096)
    for name, settings in ways.items():
        policy = build(f"{folder}/model", DTYPE, **settings)
        for limit in limits:
            pairs, n_tokens = pairs_that_fit(records, limit)
            row, _, _ = pack(pairs, policy.kernel)
            step = functools.partial(forward_and_backward, policy, row)
            gib = peak_gib(step)
            seconds = best_seconds(step)
            share = flops(policy, pairs) / seconds / matrix_rate(DTYPE)
            report.measure(
                f"micro-batch of {n_tokens} tokens, {name}",
                f"{1e3 * seconds:.0f} ms, {n_tokens / seconds:,.0f} tokens/s, {share:.1%} of the "
                f"matrix rate, {gib:.1f} GiB above the weights",
            )
        n_kernels, busy = profile(step)
        report.measure(
            f"work for the GPU, {name}", f"{n_kernels} kernels, {1e3 * busy:.0f} ms in all"
        )
        del policy, step
        empty_cache()


def pairs_that_fit(records, limit):
    """(The first pairs that have at most `limit` tokens together, how many tokens they have)."""
    pairs = []
    n_tokens = 0
    for record in records:
        size = sum(len(record[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
        if n_tokens + size <= limit:
            pairs.append(record)
            n_tokens += size
    return pairs, n_tokens


def forward_and_backward(policy, row):
    """What a training step computes on a micro-batch, without the update."""
    policy(**row).sum().backward()
    for parameter in policy.parameters():
        parameter.grad = None


def gather(report):
    """losses.logprob forward and backward; the share counts its three products, each once."""
    shapes = [(256, 32, 500)]  # tokens, width, vocabulary
    if ON_GPU:
        shapes = [(8192, 2048, 32_000), (8192, 4096, 128_256)]
    for T, D, V in shapes:
        torch.manual_seed(0)
        hidden = torch.randn(T, D, device=DEVICE, dtype=DTYPE).mul_(0.2).requires_grad_()
        weight = torch.randn(V, D, device=DEVICE, dtype=DTYPE).mul_(0.2).requires_grad_()
        labels = torch.randint(V, (T,), device=DEVICE)
        ways = {
            "chunks of 1,024": functools.partial(logprob, chunk=1024),
            "kept": functools.partial(logprob, chunk=T),
            "log_softmax": log_softmax_and_gather,
        }
        for name, function in ways.items():
            call = functools.partial(gather_and_backward, function, hidden, weight, labels)
            gib = peak_gib(call)
            seconds = best_seconds(call)
            share = 6 * T * D * V / seconds / matrix_rate(DTYPE)
            report.measure(
                f"gather, T = {T:,}, D = {D:,}, V = {V:,}, {name}",
                f"{1e3 * seconds:.1f} ms, {share:.0%} of the matrix rate, {gib:.1f} GiB",
            )


def gather_and_backward(function, hidden, weight, labels):
    hidden.grad = None
    weight.grad = None
    function(hidden, weight, labels).sum().backward()


def log_softmax_and_gather(hidden, weight, labels):
    logits = (hidden @ weight.T).float()  # (T, V)
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


# ---------------------------------------------------------------------------- ranking, sampling


def pairrm(report):
    """PairRM at DeBERTa-v3-large's size, texts like UltraFeedback's, 16,384 tokens at once."""
    device = "cuda" if ON_GPU else "cpu"
    model, tokenizer = load_pairrm(pairrm_folder(**SHAPES[device]), DEVICE)
    if ON_GPU:
        prompts, candidates = random_texts(40, n_words=(150, 350))
    else:
        prompts, candidates = random_texts(1, n_words=(8, 12))
    rank = functools.partial(rank_all, model, tokenizer, prompts, candidates)
    rank_few = functools.partial(rank_all, model, tokenizer, prompts[:4], candidates[:4])

    rank_few()  # warms up
    gib = peak_gib(rank_few)
    seconds = seconds_of(rank)
    n_kernels, busy = profile(rank_few)
    share = matmul_share(prompts, candidates, seconds, device)
    report.measure(
        "PairRM",
        f"{n_comparisons(candidates) / seconds:.0f} comparisons/s, {share:.1%} of the matrix rate, "
        f"{gib:.1f} GiB above the weights; for {n_comparisons(candidates[:4])} of them "
        f"{n_kernels} kernels, {1e3 * busy:.0f} ms of work for the GPU",
    )


def rank_all(model, tokenizer, prompts, candidates):
    compare(model, tokenizer, prompts, candidates, 16_384, collections.Counter())


def n_comparisons(candidates):
    """How many comparisons there are, both orders counted."""
    return sum(len(texts) * (len(texts) - 1) for texts in candidates)


def generate(report):
    """The transformers engine: 64 rows on the large model, prompts of 100 to 150 tokens."""
    folder = os.path.join(large(), "model")
    _, eos_ids = load_tokenizer(folder)
    n_rows, n_steps = (64, 64) if ON_GPU else (4, 4)
    rng = random.Random(0)
    requests = []
    for seed in range(n_rows):
        prompt = [rng.randrange(6, 500) for _ in range(rng.randint(100, 150))]
        requests.append((prompt, seed))

    dtype = str(DTYPE).removeprefix("torch.")
    engine = TransformersEngine(folder, eos_ids, dtype=dtype, generate_rows=64)
    settings = dict(n_responses=1, temperature=1.0, top_k=50, top_p=1.0)
    engine.sample(requests[:2], max_new_tokens=2, **settings)  # warms up

    responses = []

    def sample():
        responses.extend(engine.sample(requests, max_new_tokens=n_steps, **settings))

    seconds = seconds_of(sample)
    n_sampled = sum(len(ids) for ((ids, _, _),) in responses)
    report.measure(
        f"transformers engine, {n_rows} rows",
        f"{1e3 * seconds / n_steps:.0f} ms a step, {n_sampled / seconds:,.0f} tokens/s",
    )


def vllm(report):
    """vLLM and the transformers engine: 8 responses to each of 64 prompts on the large model."""
    folder = os.path.join(large(), "model")
    _, eos_ids = load_tokenizer(folder)
    n_prompts, n_responses, n_steps = (64, 8, 256) if ON_GPU else (4, 2, 4)
    rng = random.Random(0)
    warm_up = []
    requests = []
    for seed in range(n_prompts):
        for chosen in (warm_up, requests):
            prompt = [rng.randrange(6, 500) for _ in range(rng.randint(100, 150))]
            chosen.append((prompt, 1000 * seed))

    dtype = str(DTYPE).removeprefix("torch.")
    settings = dict(n_responses=n_responses, temperature=1.0, top_k=50, top_p=1.0)
    calls = [
        (warm_up, settings | dict(max_new_tokens=4)),
        (requests, settings | dict(max_new_tokens=n_steps)),
    ]
    empty_cache()
    loading, answers = sample_by_vllm(folder, calls, dtype)
    results, seconds = answers[-1]
    what = f"{n_prompts} x {n_responses} responses"
    measure_sampling(report, f"vLLM, {what}", results, seconds, f"; loaded in {loading:.0f} s")

    engine = TransformersEngine(folder, eos_ids, dtype=dtype, generate_rows=512)
    for asked, settings in calls:
        t0 = time.time()
        results = engine.sample(asked, **settings)
        seconds = time.time() - t0
    measure_sampling(report, f"transformers engine, {what}", results, seconds)


def measure_sampling(report, what, results, seconds, more=""):
    n_tokens = sum(len(ids) for responses in results for ids, _, _ in responses)
    text = f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} tokens/s"
    report.measure(what, text + more)
