"""What a run needs, said before it starts: parameters, then memory, tokens and hours of each stage, disk, the loss of the first step.

    bash iterate.sh config/x.py --preflight [--gpus=8x80x400] [--response_tokens=300] [--key=value ...]

Runs no stage and writes nothing. Parameters, and what training keeps for its backward pass, come from the model's own code on the meta
device: its config.json is read, no weight. What nobody knows before a run is assumed, and each assumption is printed. When something
cannot fit, the last lines say what and why, and the exit code is 1.
"""
import importlib.util
import json
import math
import os
import random
import resource
import shutil
import statistics
import sys
import time
from types import SimpleNamespace

from nanoaipo.chat import load_tokenizer, render
from nanoaipo.processes import DTYPES, pick_device
from nanoaipo.prompts import read_prompts

# ---- settings, beside those of the stages ----
gpus = ""                               # plan for these, not for this machine: NUMBERxGIBxTFLOPS (of matrix products in dtype), such as 8x80x400
response_tokens = 0.0                   # mean length of a response in tokens; 0: half of max_new_tokens

GIB, WIDTH = 2**30, {"bfloat16": 2, "float32": 4}                       # bytes a number takes
SHARE = {"cpu float32": 0.5, "cpu bfloat16": 0.3}                       # of the rate of matrix products, reached (bench/RESULTS.md); elsewhere
GPU_SHARE, GPU_BANDWIDTH = 0.4, 2e12                                    # nothing has been measured yet: assumed, as are bytes/s of --gpus
GPU_CONTEXT, VLLM = 1.5 * GIB, 4 * GIB                                  # taken by CUDA and NCCL; by vLLM's graphs and activations (assumed)
LAYER_STEP = 4e-4                                                       # seconds of Python that transformers spends on a layer for each token
LONGEST = 4                                                             # longest response of a batch over the mean (the demo: 4 to 7)


def shapes(name, dtype, lora_rank=0):
    """What the model's config.json says: numbers of parameters (a tied head once), widths, and bytes a token keeps for backward."""
    import torch
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    AttentionInterface.register("shapes", lambda module, q, k, v, mask, **_: (q.transpose(1, 2) * 1, None))    # keeps nothing, see `kept`
    try:
        hf = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(hf, dtype=getattr(torch, dtype), attn_implementation="shapes").train()
    except (OSError, ValueError) as e:
        sys.exit(f"--model={name}: no config.json of a folder or hub model that transformers can build ({str(e).strip().splitlines()[0]})")
    hf, head, layers, b, saved = hf.get_text_config(), lm.get_output_embeddings(), lm.base_model.layers, WIDTH[dtype], {}
    own, ids = {p.untyped_storage()._cdata for p in lm.parameters()}, torch.zeros(1, 128, dtype=torch.long, device="meta")

    def keep(x):
        saved[x.untyped_storage()._cdata] = x                           # several operations may save one storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = lm.base_model(input_ids=ids, position_ids=ids, use_cache=False, attention_mask=None)
    kept = sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in own) / ids.numel()
    del output
    size, body = sum(p.numel() for p in lm.parameters()), sum(p.numel() for p in layers.parameters())
    linear = [m for m in lm.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    heads, width = hf.num_attention_heads, getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return SimpleNamespace(
        size=size, body=body, root=size - body, head=head.weight.numel(), vocabulary=head.weight.shape[0], layers=len(layers),
        hidden=hf.hidden_size, wide=max(m.out_features for m in linear), attention=len(layers) * heads * width,
        cache=2 * b * len(layers) * (getattr(hf, "num_key_value_heads", None) or heads) * width,                     # bytes a token, keys and values
        trained=lora_rank * sum(m.in_features + m.out_features for m in linear) or size, softcap=bool(getattr(hf, "final_logit_softcapping", None)),
        kept=kept + 4 * b * len(layers) * heads * width)                # and of attention: queries, keys, values, outputs


def train_memory(m, s, tokens, responses, accumulates, on_cpu):
    """Bytes at the peak of train.py in one process, for rows of `tokens` of which `responses` meet the head: policy.py, losses.py, FSDP2.

    The peak is where backward starts (activations, a chunk of logits, the head's gradient) or where it ends (all gradients).
    """
    b, shards = WIDTH[s.dtype], s.shard_size or s.processes
    twice = 4 if b == 4 else 4 + b                                      # of what exists in float32 and in dtype, where these are two
    held = (12 * m.trained + (b * m.size if s.lora_rank else 0)) / shards                     # float32 weights and moments; what LoRA freezes
    layer, gathered = b * m.body / m.layers, 3 if shards > 1 else 1     # a layer, the next one, and the buffer the last one came in
    kept = tokens * (m.kept / m.layers + b * m.hidden * m.layers if s.recompute else m.kept)
    kept += tokens * 3 * b * m.wide                                     # gradients on their way through one layer
    logits = min(s.gather_chunk, responses) * m.vocabulary * (twice + 8 * m.softcap) + responses * m.hidden * 2 * b
    head = (4 * m.head if on_cpu and b < 4 else 0) + (0 if s.lora_rank else twice * m.head)   # a CPU's float32 copy; its gradient
    start = held + b * m.root + gathered * layer + (4 * m.trained / shards if accumulates else 0) + kept + logits + head
    end = held + 4 * m.trained / shards + b * m.root + layer + (0 if s.lora_rank else m.root * (b + 4))        # the root's gradients, reduced
    return held + (2 if on_cpu else 1) * (max(start, end) - held)       # on a CPU freed memory is kept, and its holes take as much again (measured)


def sampling(m, s, there, engine, processes, requests, n, prompt, response):
    """(Bytes per GPU, tokens of all processes, seconds, sequences at once) of an engine; n responses of mean length to each request."""
    b, rows = WIDTH[s.dtype], -(-requests // processes) * n
    weights, tp, longest = b * m.size, s.tensor_parallel, s.max_prompt_tokens + s.max_new_tokens
    if engine == "vllm":                                                # a step of all running sequences reads weights and cache once
        room = 2 * GIB if there.kind == "cpu" else (s.gpu_memory * there.memory - VLLM) * tp - weights
        need = weights + room if there.kind == "cpu" else s.gpu_memory * there.memory - GPU_CONTEXT           # its share holds the context too
        fit, read, delay = room / (m.cache * longest), rows / n, 0
        steps = response * max(1, rows / max(1, min(256, room / (m.cache * (prompt + response)))))
    else:                                                               # a batch ends with its longest response, every row reads its prompt
        fit, read, delay = min(rows, max(1, s.generate_rows // n) * n), rows, m.layers * LAYER_STEP
        need = weights + fit * (m.cache * (prompt + response) + max(prompt * b * (3 * m.wide + 4 * m.hidden), 16 * m.vocabulary))
        steps = math.ceil(rows / fit) * min(s.max_new_tokens, LONGEST * response)
    work = 2 * m.body * (read * prompt + rows * response) + 2 * m.head * rows * response
    traffic = steps * weights + rows * response * m.cache * (prompt + response / 2)
    return need, requests * (prompt + n * response), work / (there.rate * tp) + traffic / (there.bandwidth * tp) + steps * delay, fit


def ranking(name, model, s, there, m, engine, processes, rows, n, prompt, response, assumed):
    """(Bytes per GPU, tokens of all processes, seconds) of a ranker over `rows` prompts with n responses each."""
    if name == "answer" or name == "judge" and s.judge_url:
        return 0, 0, 0
    if name == "judge":
        texts, questions = (1, n) if s.judge_mode == "score" else (2, n * (n - 1))
        judge, size = m if model == "policy" else shapes(model, s.dtype), prompt + texts * response + 300                      # and the rubric
        return sampling(judge, s, there, engine, processes, rows * questions * s.judge_votes, 1, size, s.judge_tokens / 2)[:3]
    need, tokens, seconds, on_cpu = 0, 0, 0, there.kind == "cpu"
    for spec in model.split() if name == "annotators" else [f"{name}:{model}"]:
        kind, _, path = spec.partition(":")
        e = encoder(path)
        if e is None:
            assumed.append(f"{path}: no config.json at hand, so what it takes is not counted")
            continue
        texts, comparisons = (1, n) if kind == "reward" else (2, n * (n - 1))
        one, longest = prompt + texts * response, min(2048, s.max_prompt_tokens + texts * s.max_new_tokens)
        numbers = e.size + s.rank_batch_tokens * (2 * e.heads * longest + e.wide + 8 * e.hidden)
        need = max(need, (8 if on_cpu else 4) * e.size, (4 if on_cpu else 2) * numbers)       # loaded in float32; a CPU keeps it repacked too
        tokens += rows * comparisons * one
        seconds += rows * comparisons * one * (2 * e.body + 12 * e.layers * e.hidden * one) / (there.rate * processes)
    return need, tokens, seconds


def encoder(name):
    """Parameters and widths of a reward model or of PairRM's backbone, None if no config can be had."""
    import torch
    from transformers import AutoConfig, AutoModel
    try:
        path = os.path.join(name, "config.json")
        if not os.path.isdir(name):
            from huggingface_hub import hf_hub_download
            path = hf_hub_download(name, "config.json")
        with open(path, encoding="utf-8") as f:
            backbone = json.load(f).get("model_name") or name           # PairRM's config names it
        beside = os.path.join(name, os.path.basename(backbone))
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(beside if os.path.isdir(beside) else backbone))
    except Exception:                                                   # of hub, file and config, in many classes
        return None
    c, size = model.config, sum(p.numel() for p in model.parameters())
    return SimpleNamespace(size=size, body=size - model.get_input_embeddings().weight.numel(), hidden=c.hidden_size, layers=c.num_hidden_layers,
                           heads=c.num_attention_heads, wide=c.intermediate_size)


def pool(path, field, s, assumed):
    """(Prompts, mean tokens of a prompt, mean bytes of its record) of a file, of which 256 are read closely; nothing is fetched."""
    if ":" in path and not os.path.exists(path):
        assumed.append(f"{path} is not fetched: 20,000 prompts of {s.max_prompt_tokens / 3:.0f} tokens and 5,000 bytes")
        return 20_000, s.max_prompt_tokens / 3, 5_000
    (tokenizer, _), rows = load_tokenizer(s.model), read_prompts(path, field)
    shown = random.Random(0).sample(rows, min(256, len(rows)))
    sizes = [n for row in shown if (n := len(render(tokenizer, row["prompt"], f"{path}: prompt '{row['id']}'"))) <= s.max_prompt_tokens]
    sizes or sys.exit(f"{path}: of {len(shown)} prompts none is within --max_prompt_tokens={s.max_prompt_tokens}")
    return len(rows), statistics.fmean(sizes), statistics.fmean(len(json.dumps(row)) for row in shown)


def first_loss(s):
    """The loss of step 1, where the policy is the reference, for pairs with s_ref = 0 and equal lengths; train.py compares the real one."""
    import torch

    import losses

    def at(nll, length):
        logp, length = torch.tensor([-nll * length], dtype=torch.float64), torch.tensor([length])
        return losses.pair_loss(s.loss, losses.margins(logp, logp, logp, logp, length, length), **vars(s)).item()

    try:
        zero, one, two, longer = at(0, 10.0), at(1, 10.0), at(2, 10.0), at(1, 20.0)
    except ValueError as e:
        return f"depends on the labels of the pairs ({s.loss})" if "column" in str(e) else sys.exit(f"--loss={s.loss}: {e}")
    if not math.isclose(two - one, one - zero, abs_tol=1e-6) or longer != one:
        return "depends on the pairs"
    return f"{zero:.4f}" + (f" + {one - zero:g} x nll" if one != zero else "") + ", for pairs with s_ref = 0 and equal lengths"


def machine(s):
    """What is there: kind, number of GPUs, bytes of memory of each (or of the computer), FLOP/s that stages reach, bytes/s."""
    import torch

    from nanoaipo.policy import matmul_rate
    if s.gpus:
        try:
            number, gib, tera = map(float, s.gpus.split("x"))
        except ValueError:
            sys.exit(f"--gpus={s.gpus}: write NUMBERxGIBxTFLOPS, such as 8x80x400")
        peak = tera * 1e12
        return SimpleNamespace(kind="cuda", gpus=int(number), memory=gib * GIB, peak=peak, rate=GPU_SHARE * peak, bandwidth=GPU_BANDWIDTH)
    device = pick_device()
    gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    a, took = torch.ones(2**(30 if gpu else 26), dtype=torch.uint8, device=device), []
    for _ in range(5):
        began = time.perf_counter()
        a.clone()[0].item()                                             # waits for the device
        took.append(time.perf_counter() - began)
    peak = matmul_rate(8192 if gpu else 1536, device, getattr(torch, s.dtype))
    return SimpleNamespace(kind=device.type, gpus=torch.cuda.device_count() if gpu else 0, memory=memory, peak=peak,
                           rate=peak * SHARE.get(f"{device.type} {s.dtype}", GPU_SHARE), bandwidth=2 * len(a) / min(took))


def span(seconds):
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def report(s, there, start_up, baseline):
    """(Lines to print, reasons why the run cannot go). A process with its imports takes start_up seconds and baseline bytes of memory."""
    m, on_cpu, b, n = shapes(s.model, s.dtype, s.lora_rank), there.kind == "cpu", WIDTH[s.dtype], s.n_responses
    refusals, stages = [], []
    engine = s.engine if s.engine != "auto" else "vllm" if s.gpus or importlib.util.find_spec("vllm") else "transformers"
    engines, rankers, base = s.engines or s.processes, s.rank_processes or s.processes, baseline if on_cpu else GPU_CONTEXT
    response, given = s.response_tokens or s.max_new_tokens / 2, s.pairs or s.candidates
    token = 4 + len(f"{m.vocabulary}, ")                                # bytes in a record: its text, about four, and its id
    assumed = [f"a response has {response:g} tokens" + ("" if s.response_tokens else " (half of max_new_tokens; --response_tokens says better)"),
               f"stages reach {there.rate / there.peak:.0%} of the rate of matrix products; memory moves {there.bandwidth / 1e9:,.0f} GB/s",
               f"a process starts in {start_up:.0f} s; vLLM takes a minute or two more"]

    def stage(name, times, processes, need, tokens, seconds, fix):
        need, room = need + base, there.memory / (processes if on_cpu else 1)
        stages.append((name, times, tokens, need, room, seconds + start_up))
        if need > room:
            refusals.append(f"{name}: needs {need / GIB:.1f} GiB in each of {processes} processes, there are {room / GIB:.1f}; {fix}")

    # ---- generate and rank
    given or s.prompts or sys.exit("--prompts is not set: a file, or NAME:SPLIT of a data set")
    number, prompt, record = pool(given.split()[0] if given else s.prompts, "prompt" if given else s.prompt_field, s, assumed)
    number = number if given else s.new_instructions or min(s.n_prompts or number, number)
    fix = "raise --tensor_parallel" if engine == "vllm" else "lower --generate_rows"
    if s.new_instructions:
        stage("instructions", s.iterations, engines, *sampling(m, s, there, engine, engines, 3 * number // 2, 1, 8 * prompt, prompt)[:3], fix)
        assumed.append("two of three self-instruct calls give an instruction that is kept")
    if not given and engine != "openai":
        *sampled, fit = sampling(m, s, there, engine, engines, number, n, prompt, response)
        stage("generate", s.iterations, engines, *sampled, fix)
        if fit < 1:
            refusals.append(f"generate: beside weights of {b * m.size / s.tensor_parallel / GIB:.1f} GiB --gpu_memory={s.gpu_memory} of "
                            f"{there.memory / GIB:.0f} GiB has no room for one sequence of full length; {fix}")
    if not s.pairs:
        ranked = ranking(s.ranker, s.ranker_model, s, there, m, engine, rankers, number, n, prompt, response, assumed)
        stage("rank", s.iterations, rankers, *ranked, "lower --rank_batch_tokens")

    # ---- train: micro-batches as data.plan makes them, of pairs of mean length
    assumed.append("every prompt gives a pair, with two responses of mean length")
    pairs, pair = number * s.epochs, prompt + 2 * response
    steps = min(s.max_steps or math.inf, math.ceil(number / s.batch_size) * s.epochs)
    seen, batch = min(pairs, steps * s.batch_size), min(s.batch_size, number) / s.processes
    row = batch * pair / math.ceil(batch * pair / s.tokens_per_microbatch)
    forward = 2 * m.body * pair + 4 * m.head * response + 2 * m.attention * (2 * (prompt + response) ** 2 - prompt**2)        # as policy.flops
    passes = seen * ((2 if s.lora_rank else 3) + s.recompute) + min(seen, number)             # and the reference's
    alone = (16 * m.trained + (b * m.size if s.lora_rank else 0)) / (s.shard_size or s.processes) / GIB
    stage("train", s.iterations, s.processes, train_memory(m, s, row, row * 2 * response / pair, batch * pair > row, on_cpu), seen * pair,
          forward * passes / (there.rate * s.processes), f"weights, gradients and moments alone are {alone:.1f}: more --processes, or --lora_rank=16")

    # ---- evaluation, of the first policy too
    answers = 0
    if s.eval_prompts:
        asked, ask, shown = pool(s.eval_prompts, s.eval_prompt_field, s, assumed)
        asked = min(s.n_eval or asked, asked)
        stage("answers", s.iterations + 1, engines, *sampling(m, s, there, engine, engines, asked, 1, ask, response)[:3], fix)
        ranked = ranking(s.eval_ranker, s.eval_ranker_model, s, there, m, engine, 1, asked, 2, ask, response, assumed)
        stage("eval", s.iterations + 1, 1, *ranked, "lower --rank_batch_tokens")
        answers = asked * (shown + response * token + 150)

    # ---- disk: records, models, and checkpoints while a model trains
    files = 0 if given else number * (record + prompt * token + n * (response * token + 70))
    files += 0 if s.pairs else number * (record + prompt * token + 2 * response * token + 300)
    checkpoints = 12 * m.trained * min(s.keep_checkpoints + 1, (steps - 1) // s.checkpoint_every if s.checkpoint_every else 0)
    disk, place = s.iterations * (files + b * m.size + 700 * steps) + (s.iterations + 1) * answers + checkpoints, os.path.abspath(s.out)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if disk > free:
        refusals.append(f"{s.out}: needs {disk / GIB:.1f} GiB of disk, {free / GIB:.1f} are free; fewer --iterations, or another --out")
    for key, count in (("processes", s.processes), ("engines", engines * s.tensor_parallel if engine == "vllm" and not given else 0)):
        if there.gpus and count > there.gpus:
            refusals.append(f"--{key}: {count} GPUs are wanted, there are {there.gpus}")

    lines = [f"{s.model}: {m.size / 1e6:,.2f}M parameters, {m.trained / 1e6:,.2f}M to train",
             (f"{there.gpus} GPUs of {there.memory / GIB:.0f} GiB" if there.gpus else f"{there.kind.upper()}, {there.memory / GIB:.0f} GiB") +
             f", matrix products {there.peak / 1e12:.2f} TFLOP/s in {s.dtype}", "",
             f"{'stage':<13}{'runs':>5}{'tokens a run':>16}{'GiB a process':>15}{'there':>9}{'time a run':>13}{'in all':>10}"]
    lines += [f"{name:<13}{times:>5}{round(tokens):>16,}{need / GIB:>15.2f}{room / GIB:>9.1f}{span(seconds):>13}{span(times * seconds):>10}"
              for name, times, tokens, need, room, seconds in stages]
    lines += [f"{'together':<13}{span(sum(times * seconds for _, times, *_, seconds in stages)):>68}", "",
              f"disk: {disk / GIB:.3f} GiB, {free / GIB:.1f} are free", f"first loss: {first_loss(s)}", "", "assumed:", *("  " + a for a in dict.fromkeys(assumed))]
    return lines, refusals


def preflight(settings):
    """Print what a run with these settings needs; settings: all of them, by name."""
    s = SimpleNamespace(**settings)
    s.dtype in DTYPES or sys.exit(f"--dtype={s.dtype}: there are {', '.join(DTYPES)}")
    s.prepare and not os.path.exists(s.model) and sys.exit(f"--model={s.model}: not there yet; python {s.prepare} makes it")
    began = time.perf_counter()
    from nanoaipo import policy                                         # noqa: F401, what every stage imports
    start_up, baseline = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines, refusals = report(s, machine(s), start_up, baseline)
    print("\n".join(lines), flush=True)
    refusals and sys.exit("\ndoes not fit:\n  " + "\n  ".join(refusals))
