"""What a run needs, computed before it starts: parameters, tokens, memory and disk.

    bash iterate.sh config/x.py --preflight [--gpus=8x80] [--response_tokens=300] [--key=value ...]

Runs no stage and writes nothing. Parameters, and what training keeps for its backward pass, come
from the model's own code on the meta device: its config.json is read, no weight. What nobody knows
before a run is assumed, and each assumption is printed. When something cannot fit, the last lines
say what and why, and the exit code is 1. Rankers and judges are not part of the estimate.
"""

import collections
import importlib.util
import json
import math
import os
import random
import resource
import shutil
import statistics
from types import SimpleNamespace

from nanoaipo.chat import load_tokenizer, render, row_arguments, template_arguments
from nanoaipo.errors import InputError, reason_of
from nanoaipo.messages import Dropped, UnusableRow
from nanoaipo.processes import DTYPES, pick_device
from nanoaipo.prompts import read_prompts

# ---- settings, beside those of the stages ----
gpus = ""  # plan for these, not for this machine: NUMBERxGIB, such as 8x80
response_tokens = 0.0  # mean length of a response in tokens; 0: half of max_new_tokens

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GIB = 2**30
BYTES = {"bfloat16": 2, "float32": 4}  # of one number

# Assumed, because no GPU has been measured
CUDA_CONTEXT = 1.5 * GIB  # taken on each GPU by CUDA and NCCL
VLLM_WORKSPACE = 4 * GIB  # taken by vLLM's graphs and activations

# Below, s are the settings of all scripts, and m is what model_sizes says of the policy


# ---- the model, from its config.json ----


def model_sizes(name, dtype, lora_rank=0):
    """What a policy consists of: numbers of parameters, widths, and bytes in dtype.

    A head tied to the embedding counts once. Raises InputError if there is no such model.
    """
    import torch
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    from nanoaipo import layouts
    from nanoaipo.policy import head_width

    AttentionInterface.register("saves_nothing", attention_that_saves_nothing)
    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation="saves_nothing"
            )
    except (OSError, ValueError) as e:
        raise InputError(
            f"--model={name}: no config.json of a folder or hub model "
            f"that transformers can build ({reason_of(e)})"
        ) from e
    padded, _ = layouts.dry_run(config)
    lm.train()
    layers = layouts.decoder_layers(lm)
    head = lm.get_output_embeddings()
    linear = [m for m in lm.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    parameters = sum(p.numel() for p in lm.parameters())
    body = sum(p.numel() for p in layers.parameters())

    # Numbers that a token has in all layers' queries; keys and values may have fewer heads
    queries = len(layers) * config.num_attention_heads * head_width(config)
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    keys = queries * key_heads // config.num_attention_heads

    # An adapter has A, (rank, in), and B, (out, rank), for each linear layer
    trained = parameters
    if lora_rank:
        trained = lora_rank * sum(m.in_features + m.out_features for m in linear)

    b = BYTES[dtype]
    return SimpleNamespace(
        parameters=parameters,
        trained=trained,
        body=body,  # the decoder layers
        root=parameters - body,  # embedding, last norm and head
        head=head.weight.numel(),
        weight_bytes=b * parameters,
        vocabulary=head.weight.shape[0],
        layers=len(layers),
        hidden=config.hidden_size,
        widest=max(m.out_features for m in linear),
        cache_bytes=2 * b * keys,  # of a token: its keys and values
        # Of a token: attention saves queries, keys and values (repeated to as many), and outputs
        activation_bytes=saved_bytes(lm) + 4 * b * queries,
        softcap=bool(getattr(config, "final_logit_softcapping", None)),
        padded=padded,  # why training pads rows, one sequence each; "" where it packs them
    )


def attention_that_saves_nothing(module, query, key, value, attention_mask, **_):
    """Of the shape of attention, (1, H, T, d) -> (1, T, H, d), and nothing kept for backward."""
    return query.transpose(1, 2) * 1, None


def saved_bytes(lm):
    """Bytes of activations that autograd saves for each token of a row, attention's left out.

    The model runs on the meta device, where tensors have sizes and no memory.
    """
    import torch

    weights = {p.untyped_storage()._cdata for p in lm.parameters()}
    saved = {}  # by storage, because several operations may save one

    def save(x):
        saved[x.untyped_storage()._cdata] = x
        return x

    ids = torch.zeros(1, 128, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        lm.base_model(input_ids=ids, position_ids=ids, use_cache=False, attention_mask=None)
    activations = [x for key, x in saved.items() if key not in weights]
    return sum(x.untyped_storage().nbytes() for x in activations) / ids.numel()


# ---- memory of a process, in bytes ----


def train_memory(m, s, tokens, responses, on_cpu):
    """Bytes at the peak of train.py in one process, which is where a backward pass starts.

    tokens: of the row of a micro-batch; `responses` of them meet the head.
    """
    b = BYTES[s.dtype]
    shards = s.shard_size or s.processes
    both = 4 if b == 4 else 4 + b  # of a number that has to be there in float32 and in dtype

    # Held always, divided among the processes: what trains, with its two moments, in float32; and
    # what LoRA freezes, in dtype
    held = 12 * m.trained / shards
    if s.lora_rank:
        held += m.weight_bytes / shards

    # Gradients of earlier micro-batches, in float32, and of the head in this one, not divided yet
    gradients = 4 * m.trained / shards
    if not s.lora_rank:
        gradients += both * m.head

    # Gathered in dtype: embedding, head and one layer; with several processes also the next layer
    # and the buffer that the last one came in
    gathered_layers = 3 if shards > 1 else 1
    gathered = b * m.root + gathered_layers * b * m.body / m.layers
    if on_cpu and b < 4:
        gathered += 4 * m.head  # a CPU multiplies in float32

    # Activations of all layers, or of those that keep them, the input of each other one and that
    # layer computed again; and gradients on their way through one layer
    per_token = m.activation_bytes
    if s.recompute:
        again = m.layers / s.recompute  # layers
        per_token = (m.layers - again + 1) * m.activation_bytes / m.layers + b * m.hidden * again
    activations = tokens * (per_token + 3 * b * m.widest)

    # Logits of a chunk (two more in float32 for a soft-cap), hidden states and their gradients
    per_logit = both
    if m.softcap:
        per_logit += 8
    logits = min(s.gather_chunk, responses) * m.vocabulary * per_logit
    logits += 2 * b * responses * m.hidden

    # A CPU's allocator keeps what is freed, and the holes in it take as much again (measured)
    temporary = gradients + gathered + activations + logits
    if on_cpu:
        temporary = 2 * temporary
    return held + temporary


def sampling_memory(m, s, machine, responses, prompt_tokens):
    """Bytes of the engine in one process (on each of its GPUs), for that many responses."""
    if s.engine == "vllm" and machine.on_cpu:
        return m.weight_bytes + 2 * GIB  # engines.py gives so much to keys and values
    if s.engine == "vllm":
        # Its share of the GPU, the CUDA context included; what weights leave of it is cache
        return s.gpu_memory * machine.memory - CUDA_CONTEXT

    # transformers: a batch with its keys and values. Besides, for each sequence, activations of the
    # prompt in one layer, or its logits, some four times in float32 while they are sorted
    batch = min(responses, max(s.n_responses, s.generate_rows))
    cache = m.cache_bytes * (prompt_tokens + s.response_tokens)
    layer = BYTES[s.dtype] * prompt_tokens * (3 * m.widest + 4 * m.hidden)
    return m.weight_bytes + batch * (cache + max(layer, 16 * m.vocabulary))


# ---- what a run computes and writes ----


def prompt_sizes(path, field, at_most, s, assumed):
    """Number of prompts, at most so many (0: all), mean tokens of one, mean bytes of its record.

    256 prompts are read closely. A data set of the hub is not fetched, and its sizes are assumed.
    Rows that hold no prompt and prompts that the template refuses are left out, and said so.
    """
    if ":" in path and not os.path.exists(path):
        number = 20_000
        tokens = s.max_prompt_tokens / 3
        record_bytes = 5_000
        assumed.append(
            f"{path} is not fetched: 20,000 prompts of {tokens:.0f} tokens and 5,000 bytes"
        )
    else:
        dropped = Dropped()
        rows = read_prompts(path, field, dropped)
        sample = random.Random(0).sample(rows, min(256, len(rows)))
        fitting = fitting_lengths(path, sample, s, dropped)
        if dropped.counts:
            assumed.append(f"{path}: {dropped}")
        if not fitting:
            unusable = ""
            if dropped.counts:
                unusable = f" ({dropped.reasons()})"
            raise InputError(
                f"{path}: of {len(sample)} prompts none is within "
                f"--max_prompt_tokens={s.max_prompt_tokens}{unusable}"
            )
        number = len(rows)
        tokens = statistics.fmean(fitting)
        record_bytes = statistics.fmean(len(json.dumps(row)) for row in sample)
    number = min(number, at_most or number)
    return SimpleNamespace(number=number, tokens=tokens, record_bytes=record_bytes)


def fitting_lengths(path, sample, s, dropped):
    """Tokens of those of these prompts that generate.py takes; `dropped` gets the unusable ones."""
    tokenizer, _ = load_tokenizer(s.model)
    arguments = template_arguments(s.template_kwargs, s.date)
    fitting = []
    for row in sample:
        where = f"{path}: prompt '{row['id']}'"
        try:
            own = row_arguments(tokenizer, where, row, arguments)
            length = len(render(tokenizer, row["prompt"], where, arguments=own))
        except UnusableRow as e:
            dropped.add(e.reason, e)
            continue
        if length <= s.max_prompt_tokens:
            fitting.append(length)
    return fitting


def training_sizes(m, s, prompts):
    """Of train.py in one iteration: its steps and tokens, and a micro-batch's tokens."""
    steps = s.epochs * math.ceil(prompts.number / s.batch_size)
    if s.max_steps:
        steps = min(s.max_steps, steps)
    pairs = min(s.epochs * prompts.number, steps * s.batch_size)
    pair_tokens = prompts.tokens + 2 * s.response_tokens
    if m.padded:  # each response has a prompt of its own
        pair_tokens += prompts.tokens

    # A process divides its tokens of a step into as few micro-batches as hold them
    step_tokens = min(s.batch_size, prompts.number) / s.processes * pair_tokens
    row_tokens = step_tokens / math.ceil(step_tokens / s.tokens_per_microbatch)
    return SimpleNamespace(
        steps=steps,
        tokens=pairs * pair_tokens,
        row_tokens=row_tokens,
        row_responses=row_tokens * 2 * s.response_tokens / pair_tokens,
    )


def disk_bytes(m, s, prompts, evaluations, training):
    """Bytes that a run writes: records, models, and checkpoints while a model trains."""
    token = 4 + len(f"{m.vocabulary}, ")  # of a token in a record: its text, about four, and its id
    response = s.response_tokens * token
    record = prompts.record_bytes + prompts.tokens * token

    # An iteration's model, a line of metrics for each step, its pairs and its candidates
    iteration = m.weight_bytes + 700 * training.steps
    if not s.pairs:
        iteration += prompts.number * (record + 2 * response + 300)
    if not s.pairs and not s.candidates:
        iteration += prompts.number * (record + s.n_responses * (response + 70))
    total = s.iterations * iteration

    # Answers of every policy, the first one too
    for asked in evaluations.values():
        answers = asked.number * (asked.record_bytes + response + 150)
        total += (s.iterations + 1) * answers

    # A checkpoint has weights and two moments in float32; a new one is whole before an old one goes
    if s.checkpoint_every:
        written = (training.steps - 1) // s.checkpoint_every
        total += 12 * m.trained * min(s.keep_checkpoints + 1, written)
    return total


# ---- the report ----


def find_machine(s):
    """What there is: on_cpu, gpus, memory (bytes, of each GPU or all)."""
    if s.gpus:
        try:
            number, gib = map(float, s.gpus.split("x"))
        except ValueError as e:
            raise InputError(f"--gpus={s.gpus}: write NUMBERxGIB, such as 8x80") from e
        return SimpleNamespace(on_cpu=False, gpus=int(number), memory=gib * GIB)

    import torch

    device = pick_device()
    on_cpu = device.type == "cpu"
    if on_cpu:
        memory = s.nodes * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = torch.cuda.get_device_properties(device).total_memory
    gpus = s.nodes * torch.cuda.device_count()
    return SimpleNamespace(on_cpu=on_cpu, gpus=gpus, memory=memory)


def resolve(s):
    """A copy of the settings in which 0 and "auto" have become what they stand for."""
    s = SimpleNamespace(**vars(s))
    s.engines = s.nodes * (s.engines or s.processes)
    s.processes = s.nodes * s.processes
    s.response_tokens = s.response_tokens or s.max_new_tokens / 2
    if s.engine == "auto":
        has_vllm = s.gpus or importlib.util.find_spec("vllm")
        s.engine = "vllm" if has_vllm else "transformers"
    return s


# tokens of a run, memory of a process in bytes, and what helps where that is too much
Stage = collections.namedtuple("Stage", "name runs processes tokens memory fix")


def estimate_stages(m, s, machine, prompts, evaluations, training):
    """The stages of a run that need a model, in order."""
    given = s.pairs or s.candidates
    fix = "raise --tensor_parallel" if s.engine == "vllm" else "lower --generate_rows"
    stages = []

    def add_sampling(name, runs, asked, n):
        tokens = asked.number * (asked.tokens + n * s.response_tokens)
        responses = n * math.ceil(asked.number / s.engines)
        memory = sampling_memory(m, s, machine, responses, asked.tokens)
        stages.append(Stage(name, runs, s.engines, tokens, memory, fix))

    # Candidates in each iteration; answers of every policy, the first one too
    if not given and s.engine != "openai":
        add_sampling("generate", s.iterations, prompts, s.n_responses)
    for name, asked in evaluations.items():
        add_sampling(name, s.iterations + 1, asked, 1)

    # What more processes divide, as in train_memory: weights, two moments and gradients in float32,
    # and frozen weights
    divided = 16 * m.trained
    if s.lora_rank:
        divided += m.weight_bytes
    alone = divided / (s.shard_size or s.processes) / GIB
    fix = (
        f"weights, gradients and moments alone are {alone:.1f}: more --processes, or --lora_rank=16"
    )
    memory = train_memory(m, s, training.row_tokens, training.row_responses, machine.on_cpu)
    stages.append(Stage("train", s.iterations, s.processes, training.tokens, memory, fix))
    return stages


def gpu_refusals(m, s, machine):
    """Why the GPUs do not suffice: a list of reasons."""
    refusals = []
    if s.processes > machine.gpus:
        refusals.append(f"--processes: {s.processes} GPUs are wanted, there are {machine.gpus}")
    if s.pairs or s.candidates or s.engine != "vllm":
        return refusals
    wanted = s.engines * s.tensor_parallel
    if wanted > machine.gpus:
        refusals.append(f"--engines: {wanted} GPUs are wanted, there are {machine.gpus}")

    # An engine needs room for the cache of one long sequence, beside weights and workspace
    weights = m.weight_bytes / s.tensor_parallel
    cache = m.cache_bytes * (s.max_prompt_tokens + s.max_new_tokens) / s.tensor_parallel
    if weights + VLLM_WORKSPACE + cache > s.gpu_memory * machine.memory:
        refusals.append(
            f"generate: beside weights of {weights / GIB:.1f} GiB --gpu_memory={s.gpu_memory} of "
            f"{machine.memory / GIB:.0f} GiB has no room for one sequence of full length; "
            "raise --tensor_parallel"
        )
    return refusals


def read_sizes(s, assumed):
    """(Sizes of an iteration's prompts, {stage: sizes of the prompts that evaluate a policy})."""
    given = s.pairs or s.candidates
    if given:
        prompts = prompt_sizes(given.split()[0], "prompt", 0, s, assumed)
    elif s.prompts:
        prompts = prompt_sizes(s.prompts, s.prompt_field, s.n_prompts, s, assumed)
    else:
        raise InputError("--prompts is not set: a file, or NAME:SPLIT of a data set")
    if s.new_instructions:
        prompts.number = s.new_instructions

    evaluations = {}
    if s.eval_prompts:
        heldout = prompt_sizes(s.eval_prompts, s.eval_prompt_field, s.n_eval, s, assumed)
        evaluations["answers"] = heldout
    if s.eval_prompts and s.eval_guard:
        path = s.eval_guard
        if not os.path.isfile(path):
            path = os.path.join(REPOSITORY, path)  # as iterate.sh does
        evaluations["guard"] = prompt_sizes(path, "", 0, s, assumed)
    return prompts, evaluations


def stage_line(stage, machine, baseline):
    """(A Stage's line of the table, why it cannot run there or None)."""
    # Processes share the memory of a computer, and have a GPU each
    if machine.on_cpu:
        need = stage.memory + baseline
        room = machine.memory / stage.processes
    else:
        need = stage.memory + CUDA_CONTEXT
        room = machine.memory
    line = f"{stage.name:<13}{stage.runs:>5}{round(stage.tokens):>16,}"
    line += f"{need / GIB:>15.2f}{room / GIB:>9.1f}"
    if need <= room:
        return line, None
    refusal = (
        f"{stage.name}: needs {need / GIB:.1f} GiB in each of {stage.processes} processes, "
        f"there are {room / GIB:.1f}; {stage.fix}"
    )
    return line, refusal


def report(s, machine, baseline):
    """(Lines to print, reasons why the run cannot go) for these settings on this machine.

    baseline: bytes that a process takes on a CPU once it has imported everything.
    """
    assumed = ["every prompt gives a pair, with two responses of mean length"]
    if not s.response_tokens:
        assumed.append(
            f"a response has {s.max_new_tokens / 2:g} tokens "
            "(half of max_new_tokens; --response_tokens says better)"
        )
    s = resolve(s)
    m = model_sizes(s.model, s.dtype, s.lora_rank)
    prompts, evaluations = read_sizes(s, assumed)
    training = training_sizes(m, s, prompts)
    if m.padded:
        assumed.append(
            f"training pads rows, one sequence each ({m.padded}): all of them of mean length, "
            "and what the model's own attention keeps is as packed attention's"
        )
    devices = "CPU," if machine.on_cpu else f"{machine.gpus} GPUs of"
    lines = [
        f"{s.model}: {m.parameters / 1e6:,.2f}M parameters, {m.trained / 1e6:,.2f}M to train",
        f"{devices} {machine.memory / GIB:.0f} GiB",
        "",
        f"{'stage':<13}{'runs':>5}{'tokens a run':>16}{'GiB a process':>15}{'there':>9}",
    ]
    refusals = []

    for stage in estimate_stages(m, s, machine, prompts, evaluations, training):
        line, refusal = stage_line(stage, machine, baseline)
        lines.append(line)
        if refusal:
            refusals.append(refusal)
    if not machine.on_cpu:
        refusals += gpu_refusals(m, s, machine)

    # Disk, where the run's folder is or will be
    folder = os.path.abspath(s.out)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    disk = disk_bytes(m, s, prompts, evaluations, training)
    lines += ["", f"disk: {disk / GIB:.3f} GiB, {free / GIB:.1f} are free"]
    if disk > free:
        refusals.append(
            f"{s.out}: needs {disk / GIB:.1f} GiB of disk, {free / GIB:.1f} are free; "
            "fewer --iterations, or another --out"
        )

    lines += ["", "assumed:"]
    lines += [f"  {assumption}" for assumption in assumed]
    return lines, refusals


def preflight(settings):
    """Print what a run with these settings, {name: value} of all scripts, needs.

    Raises InputError for settings that cannot be, and, after the lines, for what does not fit.
    """
    s = SimpleNamespace(**settings)
    if s.dtype not in DTYPES:
        raise InputError(f"--dtype={s.dtype}: there are {', '.join(DTYPES)}")
    if s.prepare and not os.path.exists(s.model):
        raise InputError(f"--model={s.model}: not there yet; python {s.prepare} makes it")

    # What a process of any stage takes for its imports alone
    from nanoaipo import policy  # noqa: F401

    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines, refusals = report(s, find_machine(s), baseline)
    if refusals:
        lines += ["", "does not fit:"]
        lines += [f"  {refusal}" for refusal in refusals]
    print("\n".join(lines), flush=True)
    if refusals:
        raise InputError("this run does not fit into this machine, as said above")
