"""Train a policy on preference pairs, from the policy that wrote them: a hand-written FSDP2 loop.

    python train.py config/tiny.py --model=MODEL --pairs=pairs.jsonl --out=FOLDER             one process, any device
    torchrun --nproc-per-node=8 train.py config/aipo_nemo.py --model=... --pairs=... --out=...      one node of 8 GPUs

Reads pairs (data.py), or any file with prompt, chosen and rejected as TRL reads it. Writes a Hugging Face folder that vLLM
loads, with metrics.jsonl (one record per step) and manifest.json. While it runs it is called FOLDER.tmp and holds checkpoints;
the same command goes on from the last one, on any number of processes.
"""
import contextlib
import ctypes
import datetime
import glob
import importlib
import inspect
import json
import math
import os
import random
import re
import resource
import shutil
import sys
import time

from configurator import configure
from nanoaipo.chat import load_tokenizer
from nanoaipo.files import write_json
from nanoaipo.packing import plan
from nanoaipo.pairs import read_pairs
from nanoaipo.processes import DTYPES, RANK, WORLD_SIZE, pick_device
from nanoaipo.stages import open_stage, manifest_path, version

# ---- settings ----
model = ""                              # policy to start from, also the reference: Hugging Face folder or hub name
pairs = ""                              # preference pairs: ours, or prompt, chosen, rejected as TRL has them; JSONL, JSON, NAME:SPLIT
out = ""                                # folder of the trained model
loss = "aipo"                           # name of an objective in losses.py
beta = 0.1                              # strength of the implicit reward (AIPO: 0.1)
alpha = 0.05                            # share of the reference margin added to the target (AIPO: 0.03, 0.05, 0.07)
lambda_ = 0.2                           # weight of the NLL or other second term (AIPO: 0.2, 0.5)
gamma = 0.5                             # target margin (simpo, repo, alpha_dpo_24)
eta = 0.005                             # rpo, rebel, inpo: see losses.py
tau = 0.1                               # ipo
delta = 1.0                             # slic
eps = 0.1                               # robust, exo
label_smoothing = 0.0                   # share of labels taken to be flipped; dpo with 0.1 is cDPO
soft_labels = False                     # take p = sigmoid(z) as the label; else hard, as AIPO and DPO do
ld_alpha = 1.0                          # weight of tokens past the pair's shorter response (LD-DPO, 2409.06411: 0.5), in nll and averages too
wpo = False                             # weigh each pair by how likely the policy is to write it (WPO, 2406.11827); the logged loss is not weighted
z_clip = 4.0                            # z is cut to +-z_clip (iREPO's target; ours)
lr = 5e-7                               # peak learning rate (AIPO: 5e-7)
schedule = "cosine"                     # cosine, linear or constant, after the warm-up
warmup = 0.1                            # share of the steps with rising rate, from 0 at the first step (as in transformers)
betas = "0.9,0.999"                     # AdamW
weight_decay = 0.0                      # AdamW
clip = 1.0                              # largest gradient norm
epochs = 1                              # passes over the pairs
batch_size = 256                        # pairs per optimizer step, over all processes (AIPO: 256)
max_steps = 0                           # stop after that many steps; 0: all
shuffle = True                          # draw the pairs in random order; False keeps the file's
seed = 0                                # of that order
max_length = 2560                       # tokens of prompt + response; longer pairs are dropped, never cut
tokens_per_microbatch = 8192            # tokens one process computes at once; batch_size does not depend on it
dtype = "bfloat16"                      # of computation and of the saved weights; master weights are float32 always
recompute = True                        # compute activations again in backward: a third more work, far less memory
gather_chunk = 1024                     # tokens whose logits exist at once; as many as in a micro-batch: kept, not computed again
compile = False                         # torch.compile each decoder layer: minutes at the start, faster steps on GPUs
shard_size = 0                          # processes that share one copy of the weights, such as those of a node; 0: all
lora_rank = 0                           # above 0: train LoRA adapters of that rank on all linear layers, saved merged
lora_alpha = 16.0                       # the adapter counts lora_alpha / lora_rank
checkpoint_every = 50                   # steps from checkpoint to checkpoint, each 12 bytes a parameter; 0: none
keep_checkpoints = 2                    # how many; the newest may be broken by what ended the run
reference_cache = ""                    # file of reference log-probs, made or reused; empty: reference.logps in out
wandb = False                           # log to Weights & Biases too, where that package is installed
tensorboard = False                     # the same for TensorBoard, in out/tensorboard
config = configure(globals())

SCHEDULES = {"cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)), "linear": lambda done: 1 - done, "constant": lambda done: 1.0}
schedule in SCHEDULES or sys.exit(f"--schedule={schedule}: there are {', '.join(SCHEDULES)}")
dtype in DTYPES or sys.exit(f"--dtype={dtype}: there are {', '.join(DTYPES)}")
for key in ("batch_size", "tokens_per_microbatch", "gather_chunk", "epochs", "keep_checkpoints"):
    config[key] > 0 or sys.exit(f"--{key}={config[key]}: has to be above 0")
re.fullmatch(r"0?\.\d+,0?\.\d+", betas) or sys.exit(f"--betas={betas}: has to be two numbers below 1, such as 0.9,0.999")
WORLD_SIZE % (shard_size or 1) == 0 or sys.exit(f"--shard_size={shard_size}: has to divide the {WORLD_SIZE} processes")
for package, wanted in {"peft": lora_rank, "wandb": wandb, "tensorboard": tensorboard}.items():
    wanted and not version(package) and sys.exit(f"--{'lora_rank' if package == 'peft' else package}: pip install {package} first")
out = out.rstrip("/")
manifest = open_stage(out, "", config, "model", "pairs")
if manifest is None:
    sys.exit(0)
tokenizer, ends = load_tokenizer(model)
records, manifest["counts"] = read_pairs(pairs, tokenizer, ends, max_length)

# ---- processes, and the sharded policy (torch is imported only now: a finished stage and bad input end above) ----
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import losses
from nanoaipo.packing import pack
from nanoaipo.policy import build_policy, flops, load_weights, matmul_rate, save_policy

loss in losses.OBJECTIVES or sys.exit(f"--loss={loss}: there are {', '.join(losses.OBJECTIVES)}")
signature = inspect.signature(losses.OBJECTIVES[loss]).parameters
carried = [c for c in ("z", "q_w", "q_l", "g_w", "g_l") if all(isinstance(r.get(c), (int, float)) for r in records)]
if "z" in carried and not soft_labels and "z" not in signature:
    carried.remove("z")                                                 # hard labels
soft_labels and "z" not in carried and sys.exit(f"--soft_labels=True: not every pair of {pairs} carries z, the label")

device = pick_device()
if device.type == "cpu":
    with contextlib.suppress(AttributeError, OSError):                  # glibc gives large tensors back to the system, and fresh pages are slow
        for option in (-1, -3):                                         # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: a fifth of the time
            ctypes.CDLL(None).mallopt(option, 2**30)
alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}              # started by python: no ports
patience = datetime.timedelta(hours=2)                                  # while rank 0 writes a large model
dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience, **alone)
shape, names = ((WORLD_SIZE // shard_size, shard_size), ("replicate", "shard")) if shard_size else ((WORLD_SIZE,), ("shard",))
mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)


def say(line):
    if RANK == 0:
        print(line, flush=True)


def peak_memory():
    """GiB: of the device where it counts itself, else of this process."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


precision = getattr(torch, dtype)
policy = build_policy(model, mesh, precision, chunk=gather_chunk, recompute=recompute, compile=compile, lora_rank=lora_rank, lora_alpha=lora_alpha,
                      squares=wpo)
load_weights(policy, model, seed)
trained = {name: p for name, p in policy.lm.named_parameters() if p.requires_grad}
optimizer = torch.optim.AdamW(trained.values(), lr=lr, betas=tuple(map(float, betas.split(","))), weight_decay=weight_decay, fused=True)
for p in trained.values():                                              # made now, so that a checkpoint finds where to go
    optimizer.state[p] = {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

# ---- the plan: which process computes which pairs when, fixed before the first step ----
lengths = [len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in records]
steps, draw = [], random.Random(seed)
for _ in range(epochs):
    order = list(range(len(records)))
    if shuffle:
        draw.shuffle(order)
    steps += plan(lengths, order, batch_size, WORLD_SIZE, tokens_per_microbatch)
steps = steps[:max_steps] if max_steps else steps
first_epoch = [groups for rounds in steps[:-(-len(records) // batch_size)] for groups in rounds]


def forward(group):
    """Summed log-probs of chosen and rejected of the pairs with these indices, their weights, (B,) each, and the share of padding."""
    row, responses, padding = pack([records[i] for i in group], policy.kernel)
    logp, responses = policy(**row), responses.to(device)                                                    # (N,), (2B,)
    logp, log_squares = logp if wpo else (logp, None)
    sums = losses.segment_sums(logp, responses, ld_alpha) if group else logp                                 # (2B,)
    weights = losses.wpo_weights(logp, log_squares, responses) if wpo and group else torch.ones_like(sums[::2])
    return *sums.view(-1, 2).unbind(1), weights, padding


def margins(group, logp_w, logp_l):
    """The symbols of losses.py for these pairs."""
    columns = {c: torch.tensor([float(records[i][c]) for i in group], device=device) for c in carried}
    if "z" in columns:
        columns["z"] = columns["z"].clamp(-z_clip, z_clip)
    len_w, len_l = (torch.tensor([float(len(records[i][k])) for i in group], device=device) for k in ("chosen_ids", "rejected_ids"))
    return losses.margins(logp_w, logp_l, *reference[group].unbind(1), len_w, len_l, **columns)


# ---- reference log-probabilities: the policy itself, same code and layout, before its first step; kept in a file ----
work = out + ".tmp"
cache, began = reference_cache or os.path.join(work, "reference.logps"), time.time()
for folder in (work, os.path.dirname(cache) or "."):
    os.makedirs(folder, exist_ok=True)
made_from = json.dumps([manifest["inputs"], dtype, max_length, ld_alpha, manifest["versions"]], sort_keys=True)
reference, cached = torch.zeros(len(records), 2, device=device), False                                       # (pairs, [w, l])
needed = [i for groups in first_epoch for g in groups for i in g]
if os.path.exists(cache):
    with contextlib.suppress(SafetensorError), safe_open(cache, "pt") as f:
        if (f.metadata() or {}).get("made_from") == made_from:
            kept = f.get_tensor("reference").to(device)
            cached = bool(kept[needed].all())                           # 0 stands for what has not been computed
    cached or say(f"{cache}: not whole, or made by another model, dtype or version, or for other pairs; computed again")
verdict = torch.tensor(int(cached), device=device)
dist.all_reduce(verdict, dist.ReduceOp.MIN)                             # all or none: another run may be writing the file
if verdict:
    reference, source = kept, f"from {cache}"
else:
    with torch.no_grad():
        for groups in first_epoch:
            logp_w, logp_l, *_ = forward(groups[RANK])
            reference[groups[RANK]] = torch.stack([logp_w, logp_l], 1)
    policy.reshard()                                                    # without gradient the root stays gathered, and would not move
    dist.all_reduce(reference)                                          # each process filled the rows of its own pairs
    if RANK == 0:
        save_file({"reference": reference.cpu()}, f"{cache}.{os.getpid()}", {"made_from": made_from})
        os.replace(f"{cache}.{os.getpid()}", cache)
    source = f"in {time.time() - began:.1f} s"
peak = matmul_rate(8192 if device.type == "cuda" else 1536, device, precision)
terms = ", ".join(f"{k}={config[k]}" for k, p in signature.items() if p.kind is p.KEYWORD_ONLY)
say(f"loss {loss}({terms}), {len(records)} pairs, {len(steps)} steps, {sum(p.numel() for p in trained.values()) / 1e6:.2f}M parameters to train\n"
    f"{WORLD_SIZE} x {device.type}, attention {policy.kernel}, matrix products {peak / 1e12:.2f} TFLOP/s in {dtype} (measured; what MFU refers to)\n"
    f"reference log-probs {source}")

try:                                                                    # what the first loss has to be: policy = reference
    expected = sum(losses.pair_loss(loss, margins(g, *reference[g].unbind(1)), **config).sum().item() for groups in steps[0] for g in groups if g)
except ValueError as e:
    sys.exit(f"--loss={loss}: {e}")
expected /= sum(len(g) for groups in steps[0] for g in groups)
math.isfinite(expected) or sys.exit(f"--loss={loss}: with these settings and pairs the loss is {expected} before the first step")

# ---- checkpoints: what a step changes, everything else follows from settings and pairs (nothing in training is random) ----


def moving():
    """Weights that train and their moments, as tensors that torch.distributed.checkpoint saves, and fills in place."""
    return {f"{name}.{kind}": t for name, p in trained.items() for kind, t in [("weight", p.detach()), *optimizer.state[p].items()]}


def checkpoint(done):
    """Write WORK/step_DONE: beside, then renamed, with the size of each file; older ones beyond keep_checkpoints go."""
    import torch.distributed.checkpoint as dcp                          # half a second, so not before it is needed
    folder = os.path.join(work, f"step_{done:06d}")
    dcp.save(moving(), checkpoint_id=folder + ".tmp")
    if RANK == 0:
        write_json(os.path.join(folder + ".tmp", "sizes.json"), {e.name: e.stat().st_size for e in os.scandir(folder + ".tmp")})
        os.replace(folder + ".tmp", folder)
        for old in sorted(glob.glob(os.path.join(work, "step_*[0-9]")))[:-keep_checkpoints]:
            shutil.rmtree(old)


def resume():
    """Fill the policy and the optimizer from the newest whole checkpoint; the steps it has done, 0 without one."""
    for folder in sorted(glob.glob(os.path.join(work, "step_*[0-9]")), reverse=True):
        sizes, there = {"sizes.json": -1}, {e.name: e.stat().st_size for e in os.scandir(folder)}
        if "sizes.json" in there:
            with open(os.path.join(folder, "sizes.json"), encoding="utf-8") as f:
                sizes = json.load(f)
        broken = [name for name, size in sizes.items() if there.get(name) != size]
        if not broken:
            import torch.distributed.checkpoint as dcp
            dcp.load(moving(), checkpoint_id=folder)
            say(f"going on from {folder}")
            return int(folder[-6:])
        say(f"{folder}: passed over, {broken[0]} is not whole")
        dist.barrier()                                                  # until all have looked
        if RANK == 0:
            shutil.rmtree(folder)
    return 0


# ---- schedule and logs ----
rising = math.ceil(warmup * len(steps)) if len(steps) > 1 else 0        # a single step at rate 0 would train nothing


def lr_at(step):
    """Linear warm-up from 0, then the schedule down to 0: the values of transformers' schedulers."""
    if step < rising:
        return lr * step / rising
    done = (step - rising) / max(1, len(steps) - rising)
    return lr * SCHEDULES[schedule](done)


def open_logs(start):
    """Functions that take the record of a step: metrics.jsonl, of which the records before `start` stay, and what else is on."""
    path, writers = os.path.join(work, "metrics.jsonl"), []
    kept = open(path, encoding="utf-8").readlines()[:start] if start else []
    log = open(path, "w", encoding="utf-8", buffering=1)
    log.writelines(kept)
    writers.append(lambda r: log.write(json.dumps(r) + "\n"))
    if wandb:
        writers.append(importlib.import_module("wandb").init(project="nanoaipo", name=out, config=config).log)
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(os.path.join(work, "tensorboard"))
        writers.append(lambda r: [board.add_scalar(k, v, r["step"]) for k, v in r.items()])
    return writers


# ---- the loop ----
NAMES = ("loss", "nll", "reward_chosen", "reward_rejected", "accuracy", "s_theta", "s_ref", "logp_chosen", "logp_rejected", "len_chosen",
         "len_rejected", "weight")
start = resume()
logs = []
if RANK == 0:
    write_json(manifest_path(work), manifest)
    logs = open_logs(start)
for step, rounds in enumerate(steps[start:], start):
    began, batch = time.time(), [i for groups in rounds for g in groups for i in g]
    sums = torch.zeros(len(NAMES) + 1, device=device)
    for groups in rounds:
        logp_w, logp_l, weights, padding = forward(groups[RANK])
        m = margins(groups[RANK], logp_w, logp_l)
        per_pair = losses.pair_loss(loss, m, **config)                                                       # (B,)
        ((weights * per_pair).sum() * WORLD_SIZE / len(batch)).backward()           # FSDP divides by the processes: the step's mean over pairs
        with torch.no_grad():
            sums[:-1] += torch.stack([per_pair, m["nll"], beta * m["r_w"], beta * m["r_l"], (m["s"] > 0).float(), m["s_theta"],
                                      m["s_ref"], logp_w, logp_l, m["len_w"], m["len_l"], weights]).sum(1)
            sums[-1] += padding * len(batch) / (WORLD_SIZE * len(rounds))
    dist.all_reduce(sums)
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step)
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip).full_tensor().item()
    r = {"step": step, "lr": lr_at(step), **dict(zip((*NAMES, "padding"), (sums / len(batch)).tolist())), "grad_norm": norm}
    if step == 0 and not abs(r["loss"] - expected) <= (1e-3 if dtype == "float32" else 2e-2) * max(1, abs(expected)):
        sys.exit(f"--loss={loss}: the first loss is {r['loss']:.6f}, but with policy = reference it has to be {expected:.6f}: "
                 "the policy does not compute the same twice (dropout? a kernel that is not deterministic? a wrong --reference_cache?)")
    math.isfinite(r["loss"] + norm) or sys.exit(f"step {step + 1}: the loss is {r['loss']}, the gradient's norm {norm}: lower --lr, or look at its pairs")
    optimizer.step()
    optimizer.zero_grad()
    seconds, tokens = time.time() - began, sum(lengths[i] for i in batch)
    r |= {"pairs": len(batch), "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "memory_gib": peak_memory(),
          "mfu": flops(policy, [records[i] for i in batch]) / seconds / (peak * WORLD_SIZE)}
    for log in logs:
        log(r)
    say(f"step {step + 1:4d}/{len(steps)}  loss {r['loss']:.4f}  nll {r['nll']:.3f}  acc {r['accuracy']:.2f}  rewards {r['reward_chosen']:+.3f} "
        f"{r['reward_rejected']:+.3f}  margins {r['s_theta']:+.2f} {r['s_ref']:+.2f}  len {r['len_chosen']:.0f} {r['len_rejected']:.0f}  "
        f"grad {norm:.2f}  lr {r['lr']:.1e}  {r['tokens_per_s']:,.0f} tok/s  {r['mfu']:.0%} MFU")
    if checkpoint_every and (step + 1) % checkpoint_every == 0 and step + 1 < len(steps):
        checkpoint(step + 1)

# ---- the result appears under its name when whole ----
save_policy(policy, work, precision, tokenizer, ends, RANK)
if RANK == 0:
    os.replace(work, out)
    for folder in glob.glob(os.path.join(out, "step_*")):
        shutil.rmtree(folder)
say(f"{len(steps)} steps -> {out}")
dist.barrier()                                                          # gloo aborts a process whose peer has left
dist.destroy_process_group()
