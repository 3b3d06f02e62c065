"""Train a policy on preference pairs, from the policy that wrote them: a hand-written FSDP2 loop.

One process, any device:

    python train.py config/tiny.py --model=MODEL --pairs=pairs.jsonl --out=FOLDER

One node of 8 GPUs:

    torchrun --nproc-per-node=8 train.py config/aipo_nemo.py --model=... --pairs=... --out=...

Reads pairs as rank.py writes them, or any file with prompt, chosen and rejected as TRL reads it.
Writes a Hugging Face folder that vLLM loads, with metrics.jsonl (one record per step) and
manifest.json. While it runs it is called FOLDER.tmp and holds checkpoints; the same command goes
on from the last one, on any number of processes.
"""

import glob
import importlib
import json
import math
import os
import random
import re
import shutil
import time

from configurator import configure, run_script
from nanoaipo.chat import load_tokenizer, template_arguments, vocabulary_size
from nanoaipo.clock import lap
from nanoaipo.engines import context_length
from nanoaipo.errors import InputError
from nanoaipo.files import write_json
from nanoaipo.pairs import read_pairs
from nanoaipo.processes import (
    DTYPES,
    RANK,
    WORLD_SIZE,
    peak_memory,
    pick_device,
    print0,
    start_processes,
    stop_processes,
)
from nanoaipo.seeds import derive_seed
from nanoaipo.stages import finish_folder, manifest_path, open_stage, version

# What imports torch takes seconds, so functions import it: before they run, a finished stage or bad
# input has ended the program

# ---------------------------------------------------------------------------- settings

# fmt: off
model = ""                      # policy to start from, also the reference: folder or hub name
pairs = ""                      # preference pairs: ours or as TRL has them; JSONL, JSON, NAME:SPLIT
out = ""                        # folder of the trained model
loss = "aipo"                   # an objective in losses.py, or a mix: 0.8*dpo+0.2*bco+nll
beta = 0.1                      # strength of the implicit reward (AIPO: 0.1)
alpha = 0.05                    # share of the reference margin added to the target (AIPO: .03-.07)
lambda_ = 0.2                   # weight of the NLL or other second term (AIPO: 0.2, 0.5)
gamma = 0.5                     # target margin (simpo, alphapo, repo, alpha_dpo_24)
eta = 0.005                     # rpo, rebel, inpo: see losses.py
tau = 0.1                       # ipo, discopop (its paper: 0.05)
delta = 1.0                     # slic
eps = 0.1                       # robust, exo
label_smoothing = 0.0           # share of labels taken to be flipped; dpo with 0.1 is cDPO
soft_labels = False             # take p = sigmoid(z) as the label; else hard, as AIPO and DPO do
ld_alpha = 1.0                  # weight of tokens past the pair's shorter response (LD-DPO: 0.5)
sampo = False                   # sum equally many random tokens of both responses (2406.10957)
wpo = False                     # weigh pairs by how likely the policy is to write them (2406.11827)
z_clip = 4.0                    # z is cut to +-z_clip (iREPO's target; ours)
lr = 5e-7                       # peak learning rate (AIPO: 5e-7)
schedule = "cosine"             # cosine, linear or constant, after the warm-up
warmup = 0.1                    # share of the steps with rising rate, from 0 at the first step
betas = "0.9,0.999"             # AdamW
weight_decay = 0.0              # AdamW
clip = 1.0                      # largest gradient norm
epochs = 1                      # passes over the pairs
batch_size = 256                # pairs per optimizer step, over all processes (AIPO: 256)
max_steps = 0                   # stop after that many steps; 0: all
shuffle = True                  # draw the pairs in random order; False keeps the file's
seed = 0                        # of that order, and of LoRA's first weights
template_kwargs = ""            # of the chat template, JSON: {"enable_thinking": false}
date = ""                       # day in the chat template, YYYY-MM-DD; empty: today's
max_length = 2560               # tokens of prompt + response; longer pairs are dropped, never cut
tokens_per_microbatch = 8192    # tokens one process computes at once; does not change batch_size
dtype = "bfloat16"              # of computation and saved weights; master weights are float32
recompute = 1                   # layers that recompute activations: 1 all, 2 every other, 0 none
gather_chunk = 1024             # response tokens whose logits exist at once; kept if these are all
compile = False                 # torch.compile each layer: 40 s (H100), then faster
shard_size = 0                  # processes that share one copy of the weights; 0: all
lora_rank = 0                   # above 0: train LoRA adapters on all linear layers, saved merged
lora_alpha = 16.0               # the adapter counts lora_alpha / lora_rank
checkpoint_every = 50           # steps between checkpoints, each 12 bytes a parameter; 0: none
keep_checkpoints = 2            # how many stay; what ended the run may have broken the newest
sampler_tolerance = 0.05        # nats per token between policy and sampler that end the run; 0: off
reference_cache = ""            # file of reference log-probs, made or reused; empty: in out
wandb = False                   # log to Weights & Biases too, where that package is installed
# fmt: on
config = configure(globals())

SCHEDULES = ("cosine", "linear", "constant")


# The run is told by `train`, the last function: read it first. All that stands before it are its
# checks and helpers.

# ---------------------------------------------------------------------------- checks and the plan


def check_settings():
    """Raise InputError for a setting that makes no sense, before anything slow begins."""
    if schedule not in SCHEDULES:
        raise InputError(f"--schedule={schedule}: there are {', '.join(SCHEDULES)}")
    if dtype not in DTYPES:
        raise InputError(f"--dtype={dtype}: there are {', '.join(DTYPES)}")
    for key in (
        "batch_size",
        "tokens_per_microbatch",
        "gather_chunk",
        "epochs",
        "keep_checkpoints",
    ):
        if config[key] <= 0:
            raise InputError(f"--{key}={config[key]}: has to be above 0")
    if not re.fullmatch(r"0?\.\d{1,9},0?\.\d{1,9}", betas):
        raise InputError(f"--betas={betas}: has to be two numbers below 1, such as 0.9,0.999")
    if os.path.isdir(reference_cache):
        raise InputError(f"--reference_cache={reference_cache}: is a folder; name a file in it")
    if shard_size and WORLD_SIZE % shard_size:
        raise InputError(f"--shard_size={shard_size}: has to divide the {WORLD_SIZE} processes")
    for key, package in (("lora_rank", "peft"), ("wandb", "wandb")):
        if config[key] and not version(package):
            raise InputError(f"--{key}: pip install {package} first")


def settings_of_loss():
    """Names of the settings that the loss reads; raises InputError for a loss that cannot be."""
    import losses

    try:
        symbol_names, setting_names = losses.arguments_of(loss)
    except ValueError as e:  # no objective and no mix of them
        raise InputError(f"--loss={loss}: {e}") from None
    for name in ("nll", "n", "avg_w", "avg_l"):
        if sampo and name in symbol_names:
            raise InputError(
                f"--sampo=True: --loss={loss} reads {name}, an average over all tokens; "
                "take one that reads sums alone, such as dpo"
            )
    return setting_names


def columns_of(records):
    """{name: a number per pair} that objectives may read: lengths, and labels that all carry."""
    columns = {
        "len_w": [float(len(record["chosen_ids"])) for record in records],
        "len_l": [float(len(record["rejected_ids"])) for record in records],
    }
    for name in ("z", "q_w", "q_l", "g_w", "g_l"):
        values = [record.get(name) for record in records]
        if all(isinstance(value, (int, float)) for value in values):
            columns[name] = [float(value) for value in values]
    if soft_labels and "z" not in columns:
        raise InputError(f"--soft_labels=True: not every pair of {pairs} carries z, the label")
    return columns


def plan_epochs(n_tokens, padded):
    """Which process computes which pairs when, fixed before the first step: a list of steps.

    A step is a list of micro-batches, a micro-batch a list of indices of pairs for each process.
    n_tokens: to compute for each pair. padded: whether rows are, to the longest of them.
    """
    from nanoaipo.packing import plan

    steps = []
    rng = random.Random(seed)
    for _ in range(epochs):
        if max_steps and len(steps) >= max_steps:
            break
        order = list(range(len(n_tokens)))
        if shuffle:
            rng.shuffle(order)
        steps += plan(n_tokens, order, batch_size, WORLD_SIZE, tokens_per_microbatch, padded)
    if max_steps:
        steps = steps[:max_steps]
    return steps


def indices_in(micro_batches):
    """Indices of all pairs in these micro-batches."""
    found = []
    for micro_batch in micro_batches:
        for indices in micro_batch:
            found += indices
    return found


# ---------------------------------------------------------------------------- schedule and log


def lr_at(step, n_steps):
    """Linear warm-up from 0, then the schedule: the values of transformers' schedulers."""
    n_warmup = math.ceil(warmup * n_steps)
    if n_steps == 1:  # a single step at rate 0 would train nothing
        n_warmup = 0
    if step < n_warmup:
        return lr * step / n_warmup

    progress = (step - n_warmup) / max(1, n_steps - n_warmup)  # 0 to 1
    if schedule == "cosine":
        return lr * (0.5 * (1 + math.cos(math.pi * progress)))
    if schedule == "linear":
        return lr * (1 - progress)
    return lr


def open_metrics(path, start):
    """Open metrics.jsonl for the records from step `start` on; those before stay."""
    earlier = []
    if start:
        with open(path, encoding="utf-8") as f:
            earlier = f.readlines()[:start]
    metrics = open(path, "w", encoding="utf-8", buffering=1)  # a line is written at once
    metrics.writelines(earlier)
    return metrics


def check_step(record, expected, batch):
    """Raise InputError if the first loss is not the expected one, or a step's is not finite.

    Then the step's pairs, batch, are written into a file beside `out`, to be looked at.
    """
    step = record["step"]
    tolerance = 1e-3 if dtype == "float32" else 2e-2
    difference = abs(record["loss"] - expected)
    if step == 0 and not difference <= tolerance * max(1, abs(expected)):  # nan differs, too
        raise InputError(
            f"--loss={loss}: the first loss is {record['loss']:.6f}, but with policy = reference "
            f"it has to be {expected:.6f}: the policy does not compute the same twice (dropout? "
            "a kernel that is not deterministic? a wrong --reference_cache?)"
        )
    if not math.isfinite(record["loss"] + record["grad_norm"]):
        path = out.rstrip("/") + ".not_finite.jsonl"
        if RANK == 0:
            with open(path, "w", encoding="utf-8") as f:
                for pair in batch:
                    f.write(json.dumps(pair, default=list) + "\n")  # ids are arrays
        raise InputError(
            f"step {step + 1}: the loss is {record['loss']}, the gradient's norm "
            f"{record['grad_norm']}: lower --lr, or look at its pairs in {path}"
        )


def step_line(r, n_steps):
    """The line that a step prints, from its record."""
    return (
        f"step {r['step'] + 1:4d}/{n_steps}  loss {r['loss']:.4f}  nll {r['nll']:.3f}  "
        f"acc {r['accuracy']:.2f}  "
        f"rewards {r['reward_chosen']:+.3f} {r['reward_rejected']:+.3f}  "
        f"margins {r['s_theta']:+.2f} {r['s_ref']:+.2f}  "
        f"len {r['len_chosen']:.0f} {r['len_rejected']:.0f}  grad {r['grad_norm']:.2f}  "
        f"lr {r['lr']:.1e}  {r['tokens_per_s']:,.0f} tok/s  {r['mfu']:.0%} MFU"
    )


# ---------------------------------------------------------------------------- the reference


def reference_pass(forward, policy, micro_batches, manifest, output_dir, device):
    """Log-probs of chosen and rejected under the reference, (pairs, 2), and a text: their source.

    The reference is the policy itself before its first step: same code, same layout, no second
    model. Its log-probs are computed once and kept in a file.
    """
    import torch
    import torch.distributed as dist

    from nanoaipo.reference import load_reference, save_reference

    t0 = time.monotonic()
    cache = reference_cache or os.path.join(output_dir, "reference.logps")
    os.makedirs(os.path.dirname(cache) or ".", exist_ok=True)
    draw = seed if sampo else None  # of the tokens that count
    made_from = json.dumps(  # what the numbers and the order of their rows depend on
        [manifest["inputs"], dtype, max_length, ld_alpha, draw, manifest["versions"]],
        sort_keys=True,
    )
    reference = load_reference(cache, made_from, indices_in(micro_batches), device)
    if reference is not None:
        return reference, f"from {cache}"

    reference = torch.zeros(manifest["counts"]["pairs"], 2, device=device)
    with torch.no_grad():
        for micro_batch in micro_batches:
            indices = micro_batch[RANK]
            logp_w, logp_l, *_ = forward(indices)
            reference[indices] = torch.stack([logp_w, logp_l], 1)  # (B, 2)
    policy.reshard()  # without backward the root stays gathered: steps would not reach it
    dist.all_reduce(reference)  # each process filled the rows of its own pairs
    save_reference(cache, made_from, reference)
    return reference, f"in {time.monotonic() - t0:.1f} s"


def first_loss(symbols, reference, micro_batches):
    """The mean loss of the first step, where policy = reference: what the loop has to find."""
    import losses

    total = 0
    try:
        for micro_batch in micro_batches:
            for indices in micro_batch:
                m = symbols(indices, *reference[indices].unbind(1))
                total += losses.pair_loss(loss, m, **config).sum().item()
    except ValueError as e:  # a column that the pairs lack, or smoothing without p
        raise InputError(f"--loss={loss}: {e}") from None
    expected = total / len(indices_in(micro_batches))
    if not math.isfinite(expected):
        raise InputError(
            f"--loss={loss}: with these settings and pairs the loss is {expected} "
            "before the first step"
        )
    return expected


def compare_with_sampler(records, reference, micro_batches):
    """{name: nats per token}: how the policy's log-probs differ from those of the sampler.

    reference: (pairs, 2) log-probs under the policy as it starts, of the pairs in micro_batches.
    The pairs' chosen_logp and rejected_logp are what the engine sampled the responses with; {} if
    there are none. Raises InputError if the mean absolute difference is above sampler_tolerance.
    """
    logps = reference.tolist()
    differences = []
    for i in indices_in(micro_batches):
        differences += differences_of_pair(records[i], *logps[i])
    if not differences:
        return {}

    sizes = [abs(difference) for difference in differences]
    compared = {
        "sampler_diff": sum(differences) / len(sizes),
        "sampler_abs_diff": sum(sizes) / len(sizes),
        "sampler_max_diff": max(sizes),
    }
    print0(
        f"policy against sampler: mean {compared['sampler_diff']:+.4f}, "
        f"mean absolute {compared['sampler_abs_diff']:.4f}, "
        f"largest {compared['sampler_max_diff']:.4f} nats per token, of {len(sizes)} responses"
    )
    if sampler_tolerance and not compared["sampler_abs_diff"] <= sampler_tolerance:  # nan, too
        raise InputError(
            f"--pairs={pairs}: --model={model} gives their responses log-probs that differ from "
            f"those they were sampled with by {compared['sampler_abs_diff']:.3f} nats per token, "
            f"above --sampler_tolerance={sampler_tolerance}: they are another model's, or engine "
            "and train.py compute differently (template, mask, window, soft-cap, scale, rope, "
            "adapter, weights); 0 trains on them all the same"
        )
    return compared


def differences_of_pair(record, logp_w, logp_l):
    """For each response that came with a log-prob, policy's minus sampler's, per token in nats."""
    len_w = len(record["chosen_ids"])
    len_l = len(record["rejected_ids"])
    sides = (
        (logp_w, record.get("chosen_logp"), len_w),
        (logp_l, record.get("rejected_logp"), len_l),
    )
    differences = []
    for logp, sampler_logp, n_tokens in sides:
        # where the longer response does not count whole, only the shorter one's sum is plain
        counts_whole = ld_alpha == 1 and not sampo
        is_plain = counts_whole or n_tokens <= min(len_w, len_l)
        if sampler_logp is not None and is_plain:
            differences.append((logp - sampler_logp) / n_tokens)
    return differences


# ---------------------------------------------------------------------------- the run


def main():
    check_settings()
    final_dir = out.rstrip("/")
    manifest = open_stage(final_dir, "", config, "model", "pairs")  # "": a folder has no suffix
    if manifest is None:  # complete
        return
    tokenizer, eos_ids = load_tokenizer(model)
    arguments = template_arguments(template_kwargs, date)  # for pairs that come as text
    records, manifest["counts"] = read_pairs(
        pairs,
        tokenizer,
        eos_ids,
        min(max_length, context_length(model)),
        arguments=arguments,
        n_tokens=vocabulary_size(model, tokenizer),
    )
    train(final_dir, manifest, tokenizer, eos_ids, records)


def train(final_dir, manifest, tokenizer, eos_ids, records):
    """Train on these records (pairs as ids) and write the folder final_dir."""
    import torch
    import torch.distributed as dist

    import losses
    from nanoaipo.checkpoints import load_newest_checkpoint, save_checkpoint
    from nanoaipo.packing import pack, tokens_of_pairs
    from nanoaipo.policy import build_policy, flops, matmul_rate
    from nanoaipo.weights import load_weights, save_policy

    lap("starting")  # the time so far; the manifest says how long each part took

    # ---- what the objective reads
    setting_names = settings_of_loss()
    columns = columns_of(records)

    # ---- processes
    device = pick_device()
    mesh = start_processes(device, shard_size)
    columns = {name: torch.tensor(values, device=device) for name, values in columns.items()}
    if "z" in columns:
        columns["z"].clamp_(-z_clip, z_clip)

    # ---- the sharded policy and its optimizer
    precision = getattr(torch, dtype)
    policy = build_policy(
        model,
        mesh,
        precision,
        chunk=gather_chunk,
        recompute=recompute,
        compile=compile,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        squares=wpo,
    )
    if policy.why_padded:
        print0(f"padded rows, one sequence each: {policy.why_padded}")
    load_weights(policy, model, seed)
    lap("loading")
    trained = {name: p for name, p in policy.lm.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=lr,
        betas=tuple(float(b) for b in betas.split(",")),
        weight_decay=weight_decay,
        fused=True,
    )

    def forward(indices):
        """(logp_w, logp_l, pair_weights, padding) of these pairs: (B,) each, and a share."""
        row, lengths, padding = pack([records[i] for i in indices], policy.kernel)
        lengths = lengths.to(device)  # (2B,); the row's tensors FSDP moves there
        if wpo:
            logp, log_squares = policy(**row)  # (N,) each, N response tokens
        else:
            logp = policy(**row)  # (N,)
        if not indices:  # this process takes part only because the others need its collectives
            return logp, logp, logp.detach(), padding

        summed = logp
        if sampo:
            seeds = [derive_seed(seed, i) for i in indices]  # whatever the step and micro-batch
            summed = logp.where(losses.drawn_tokens(lengths, seeds), 0)
        sums = losses.segment_sums(summed, lengths, ld_alpha)  # (2B,)
        logp_w, logp_l = sums.view(-1, 2).T.contiguous()  # (2, B)
        pair_weights = torch.ones_like(logp_w)  # (B,), all alike but with WPO
        if wpo:
            pair_weights = losses.wpo_weights(logp, log_squares, lengths)
        return logp_w, logp_l, pair_weights, padding

    # ---- the plan
    is_padded = policy.kernel == "padded"
    steps = plan_epochs(tokens_of_pairs(records, is_padded), is_padded)

    # ---- reference log-probs, (pairs, 2): one epoch has every pair that will be trained on
    output_dir = final_dir + ".tmp"
    os.makedirs(output_dir, exist_ok=True)
    n_steps_per_epoch = math.ceil(len(records) / batch_size)
    first_epoch = [micro_batch for step in steps[:n_steps_per_epoch] for micro_batch in step]
    reference, source = reference_pass(forward, policy, first_epoch, manifest, output_dir, device)
    columns["ref_w"], columns["ref_l"] = reference.unbind(1)

    def symbols(indices, logp_w, logp_l):
        """The symbols of losses.py for these pairs."""
        of_pairs = {name: column[indices] for name, column in columns.items()}
        m = losses.symbols_of(logp_w, logp_l, **of_pairs)  # p = sig(z) where the pairs carry z
        if not soft_labels:  # as AIPO and DPO have it, also beside a term of a mix that reads z
            m["p"] = torch.ones_like(logp_w)
        return m

    # ---- what is about to run
    peak_rate = matmul_rate(device, precision)  # FLOP/s, what MFU refers to
    n_trained = sum(p.numel() for p in trained.values())
    loss_settings = ", ".join(f"{key}={config[key]}" for key in setting_names)
    print0(
        f"loss {loss}({loss_settings}), {len(records)} pairs, {len(steps)} steps, "
        f"{n_trained / 1e6:.2f}M parameters to train\n"
        f"{WORLD_SIZE} x {device.type}, attention {policy.kernel}, matrix products "
        f"{peak_rate / 1e12:.2f} TFLOP/s in {dtype} (measured; what MFU refers to)\n"
        f"reference log-probs {source}"
    )

    # ---- checks before the first step, where policy = reference
    expected = first_loss(symbols, reference, steps[0])
    compared = compare_with_sampler(records, reference, first_epoch)

    # ---- checkpoints and logs (nothing in training is random, so there is no other state)
    start = load_newest_checkpoint(output_dir, trained, optimizer)
    wandb_run = None
    if RANK == 0:
        write_json(manifest_path(output_dir), manifest)
        metrics = open_metrics(os.path.join(output_dir, "metrics.jsonl"), start)
        if wandb:  # the setting has the package's name
            wandb_package = importlib.import_module("wandb")
            wandb_run = wandb_package.init(project="nanoaipo", name=final_dir, config=config)

    # ---- the loop
    for step, micro_batches in enumerate(steps[start:], start):
        t0 = time.monotonic()
        batch = [records[i] for i in indices_in(micro_batches)]  # of all processes
        n_pairs = len(batch)
        totals = 0
        for micro_batch in micro_batches:
            indices = micro_batch[RANK]  # of this process's pairs
            logp_w, logp_l, pair_weights, padding = forward(indices)
            m = symbols(indices, logp_w, logp_l)
            terms = losses.term_losses(loss, m, **config)  # {objective: (B,)}
            per_pair = losses.weighted_sum(loss, terms)  # (B,)

            # FSDP averages over the processes; WORLD_SIZE makes it the mean over the step's pairs
            mean_loss = (pair_weights * per_pair).sum() * WORLD_SIZE / n_pairs
            mean_loss.backward()

            # one value per pair; the log has their means. A new number in it is one line here
            logged = {
                "loss": per_pair,
                "nll": m["nll"],
                "reward_chosen": beta * m["r_w"],
                "reward_rejected": beta * m["r_l"],
                "accuracy": (m["s"] > 0).float(),
                "s_theta": m["s_theta"],
                "s_ref": m["s_ref"],
                "logp_chosen": logp_w,
                "logp_rejected": logp_l,
                "len_chosen": m["len_w"],
                "len_rejected": m["len_l"],
                "weight": pair_weights,
                # a share of each micro-batch, so scaled that its sum over n_pairs is their mean
                "padding": pair_weights.new_tensor(
                    padding * n_pairs / (WORLD_SIZE * len(micro_batches))
                ),
            }
            if loss not in losses.OBJECTIVES:  # a mix: its terms, before their weights
                for name, term in terms.items():
                    logged["loss_" + name] = term
            totals = totals + torch.stack([x.detach().sum() for x in logged.values()])

        dist.all_reduce(totals)
        means = dict(zip(logged, (totals / n_pairs).tolist()))

        # clip, and check before the weights move
        step_lr = lr_at(step, len(steps))
        for group in optimizer.param_groups:
            group["lr"] = step_lr
        grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip).full_tensor().item()
        record = {"step": step, "lr": step_lr, **means, "grad_norm": grad_norm, **compared}
        check_step(record, expected, batch)
        optimizer.step()
        optimizer.zero_grad()

        seconds = time.monotonic() - t0
        record["pairs"] = n_pairs
        record["tokens"] = sum(tokens_of_pairs(batch))  # without padding
        record["seconds"] = seconds
        record["tokens_per_s"] = record["tokens"] / seconds
        record["memory_gib"] = peak_memory(device)
        model_flops = flops(policy, batch)
        record["mfu"] = model_flops / seconds / (peak_rate * WORLD_SIZE)
        if RANK == 0:
            metrics.write(json.dumps(record) + "\n")
        if wandb_run:
            wandb_run.log(record)
        print0(step_line(record, len(steps)))

        done = step + 1
        if checkpoint_every and done % checkpoint_every == 0 and done < len(steps):
            save_checkpoint(output_dir, done, trained, optimizer, keep_checkpoints)

    # ---- the result appears under its name when whole
    lap("computing")
    save_policy(policy, output_dir, precision, tokenizer, eos_ids, RANK)
    if RANK == 0:
        metrics.close()
        finish_folder(output_dir, manifest)
        os.replace(output_dir, final_dir)
        for folder in glob.glob(os.path.join(glob.escape(final_dir), "step_*")):  # checkpoints
            shutil.rmtree(folder)
    if wandb_run:
        wandb_run.finish()
    print0(f"{len(steps)} steps -> {final_dir}")
    stop_processes()


if __name__ == "__main__":
    run_script(main)
