"""Train a policy on preference pairs, from the policy that wrote them: a hand-written FSDP2 loop.

    python train.py config/tiny.py --model=MODEL --pairs=pairs.jsonl --out=FOLDER             one process, any device
    torchrun --nproc-per-node=8 train.py config/aipo_nemo.py --model=... --pairs=... --out=...      one node of 8 GPUs

Reads pairs (data.py), or any file with prompt, chosen and rejected as TRL reads it. Writes a Hugging Face folder that vLLM
loads, with metrics.jsonl (one record per step) and manifest.json. While it runs it is called FOLDER.tmp.
"""
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
from data import DTYPES, RANK, WORLD_SIZE, begin, load_tokenizer, manifest_of, pack, pick_device, plan, read_pairs, write_json

# ---- settings ----
model = ""                              # policy to start from, also the reference: Hugging Face folder or hub name
pairs = ""                              # preference pairs (JSONL)
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
gather_chunk = 1024                     # tokens whose logits exist at once
config = configure(globals())

SCHEDULES = {"cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)), "linear": lambda done: 1 - done, "constant": lambda done: 1.0}
schedule in SCHEDULES or sys.exit(f"--schedule={schedule}: there are {', '.join(SCHEDULES)}")
dtype in DTYPES or sys.exit(f"--dtype={dtype}: there are {', '.join(DTYPES)}")
for key in ("batch_size", "tokens_per_microbatch", "gather_chunk", "epochs"):
    config[key] > 0 or sys.exit(f"--{key}={config[key]}: has to be above 0")
re.fullmatch(r"0?\.\d+,0?\.\d+", betas) or sys.exit(f"--betas={betas}: has to be two numbers below 1, such as 0.9,0.999")
out = out.rstrip("/")
manifest = begin(out, "", config, "model", "pairs")
if manifest is None:
    sys.exit(0)
tokenizer, ends = load_tokenizer(model)
records, manifest["counts"] = read_pairs(pairs, tokenizer, ends, max_length)

# ---- processes, and the sharded policy (torch is imported only now: a finished stage and bad input end above) ----
import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import losses

device = pick_device()
backend = "nccl" if device.type == "cuda" else "gloo"
if "RANK" in os.environ:
    dist.init_process_group(backend)
else:                                                                   # started by python: a world of one, no ports
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh(device.type, (WORLD_SIZE,))


def say(line):
    if RANK == 0:
        print(line, flush=True)


def peak_memory():
    """GiB: of the device where it counts itself, else of this process."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Policy(torch.nn.Module):
    """From ids to log-probabilities inside one root module, so that FSDP has gathered the head when the gather needs it."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.softcap = lm, getattr(lm.config, "final_logit_softcapping", None)

    def forward(self, input_ids, position_ids, index, labels):
        # use_cache=False is what makes transformers see the sequences packed into a row (restarting positions)
        hidden = self.lm.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state   # (R, L, D)
        return losses.logprob(hidden.flatten(0, 1)[index], self.lm.get_output_embeddings().weight, labels, gather_chunk, self.softcap)


def build_policy(name):
    """The policy on the meta device, each decoder layer sharded, then the root; no weight has memory yet."""
    hf = AutoConfig.from_pretrained(name)
    for key, value in hf.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(hf, key, 0.0)                                       # dropout would make policy and reference differ
    attention = "eager" if getattr(hf, "attn_logit_softcapping", None) else "sdpa"        # sdpa has no soft-capping
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(hf, dtype=torch.float32, attn_implementation=attention)
    head = lm.get_output_embeddings()
    unsupported = [k for k in ("logit_scale", "logits_scaling") if getattr(hf, k, None) not in (None, 1.0)]
    if unsupported or head is None or head.bias is not None or not hasattr(lm.base_model, "layers"):
        sys.exit(f"--model={name}: architecture {lm.__class__.__name__} is not supported ({unsupported or 'its head or its layers'}): "
                 "the log-prob gather reads the head's weight itself")
    for module in lm.modules():                                         # rotary tables and the like are made, not loaded
        for buffer_name, buffer in module.named_buffers(recurse=False):
            module._buffers[buffer_name] = torch.full_like(buffer, float("nan"), device=device)
            lm._init_weights(module)
            if module._buffers[buffer_name].isnan().any():
                sys.exit(f"--model={name}: {lm.__class__.__name__} has a buffer '{buffer_name}' that this loader cannot make")
    lm.train()
    if recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    policy = Policy(lm)
    for layer in lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision)


def load_weights(policy, name):
    """Fill the policy from safetensors: every process reads the rows of each weight that it will hold, in float32."""
    folder = name if os.path.isdir(name) else snapshot_download(name, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["consolidated*", "original/*"])
    found = {}
    for file in sorted(f for f in os.listdir(folder) if f.endswith(".safetensors")):
        try:
            weights = safe_open(os.path.join(folder, file), "pt")
        except (SafetensorError, OSError) as e:
            sys.exit(f"{os.path.join(folder, file)}: not a whole safetensors file ({e})")
        found |= {key: weights for key in weights.keys()}
    found or sys.exit(f"--model={name}: no *.safetensors in it; other formats can run code and are not read")
    state, tied = {}, {}
    for key, parameter in policy.lm.named_parameters(remove_duplicate=False):
        if id(parameter) not in tied:                                   # an output head tied to the embedding is one weight
            key in found or sys.exit(f"--model={name}: weight {key} is missing in its safetensors")
            shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
            rows = found[key].get_slice(key)
            if rows.get_shape() != list(parameter.shape):
                sys.exit(f"--model={name}: weight {key} has shape {rows.get_shape()}, its config.json says {list(parameter.shape)}")
            local = rows[offset[0]:offset[0] + shape[0]].to(device, torch.float32)
            tied[id(parameter)] = torch.nn.Parameter(DTensor.from_local(
                local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()))
        state[key] = tied[id(parameter)]
    policy.lm.load_state_dict(state, strict=False, assign=True)


def save(policy, folder):
    """Gather the weights one after another on rank 0 and write them as a Hugging Face folder in `dtype`."""
    state = {}
    for key, parameter in policy.lm.named_parameters():
        whole = parameter.full_tensor()
        if RANK == 0:
            state[key] = whole.detach().to("cpu", getattr(torch, dtype))
    if RANK == 0:
        save_torch_state_dict(state, folder, metadata={"format": "pt"})
        policy.lm.config.dtype = getattr(torch, dtype)
        policy.lm.config.save_pretrained(folder)
        GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


policy = build_policy(model)
load_weights(policy, model)
# before any forward pass: after one without gradient the root's weights stay gathered, and those are not ours to update
optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=tuple(map(float, betas.split(","))), weight_decay=weight_decay, fused=True)

# ---- the plan: which process computes which pairs when, fixed before the first step ----
lengths = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in records]
steps, draw = [], random.Random(seed)
for _ in range(epochs):
    order = list(range(len(records)))
    if shuffle:
        draw.shuffle(order)
    steps += plan(lengths, order, batch_size, WORLD_SIZE, tokens_per_microbatch)
steps = steps[:max_steps] if max_steps else steps
loss in losses.OBJECTIVES or sys.exit(f"--loss={loss}: there are {', '.join(losses.OBJECTIVES)}")
signature = inspect.signature(losses.OBJECTIVES[loss]).parameters
carried = [c for c in ("z", "q_w", "q_l", "g_w", "g_l") if all(isinstance(r.get(c), (int, float)) for r in records)]
if "z" in carried and not soft_labels and "z" not in signature:
    carried.remove("z")                                                 # hard labels
soft_labels and "z" not in carried and sys.exit(f"--soft_labels=True: not every pair of {pairs} carries z, the label")


def forward(group):
    """Summed log-probs of chosen and rejected of the pairs with these indices, (B,) each, and the slots computed for them."""
    batch = pack([records[i] for i in group])
    logp = policy(*(batch[k].to(device) for k in ("input_ids", "position_ids", "index", "labels")))          # (T,)
    sums = torch.stack([part.sum() for part in logp.split(batch["lengths"])]) if group else logp             # (2B,)
    return *sums.chunk(2), batch["input_ids"].numel()


def margins(group, logp_w, logp_l):
    """The symbols of losses.py for these pairs."""
    columns = {c: torch.tensor([float(records[i][c]) for i in group], device=device) for c in carried}
    if "z" in columns:
        columns["z"] = columns["z"].clamp(-z_clip, z_clip)
    len_w, len_l = (torch.tensor([float(len(records[i][k])) for i in group], device=device) for k in ("chosen_ids", "rejected_ids"))
    return losses.margins(logp_w, logp_l, *reference[group].unbind(1), len_w, len_l, **columns)


# ---- reference log-probabilities: the policy itself, same code and batches, before its first step ----
started = time.time()
reference = torch.zeros(len(records), 2, device=device)                                                      # (pairs, [w, l])
with torch.no_grad():
    for rounds in steps[:-(-len(records) // batch_size)]:               # of the first epoch
        for groups in rounds:
            logp_w, logp_l, _ = forward(groups[RANK])
            reference[groups[RANK]] = torch.stack([logp_w, logp_l], 1)
dist.all_reduce(reference)                                              # each process filled the rows of its own pairs
terms = ", ".join(f"{k}={config[k]}" for k, p in signature.items() if p.kind is p.KEYWORD_ONLY)
say(f"loss {loss}({terms}), {len(records)} pairs, {len(steps)} steps, {sum(p.numel() for p in policy.parameters()) / 1e6:.2f}M parameters "
    f"on {WORLD_SIZE} x {device.type}, reference log-probs in {time.time() - started:.1f} s")

try:                                                                    # what the first loss has to be: policy = reference
    expected = sum(losses.pair_loss(loss, margins(g, *reference[g].unbind(1)), **config).sum().item() for groups in steps[0] for g in groups if g)
except ValueError as e:
    sys.exit(f"--loss={loss}: {e}")
expected /= sum(len(g) for groups in steps[0] for g in groups)
math.isfinite(expected) or sys.exit(f"--loss={loss}: with these settings and pairs the loss is {expected} before the first step")

# ---- schedule ----
rising = math.ceil(warmup * len(steps))


def lr_at(step):
    """Linear warm-up from 0, then the schedule down to 0: the values of transformers' schedulers."""
    if step < rising:
        return lr * step / rising
    done = (step - rising) / max(1, len(steps) - rising)
    return lr * SCHEDULES[schedule](done)


# ---- the loop ----
NAMES = ("loss", "nll", "reward_chosen", "reward_rejected", "accuracy", "s_theta", "s_ref", "logp_chosen", "logp_rejected", "len_chosen", "len_rejected")
work = out + ".tmp"
if RANK == 0:
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    log = open(os.path.join(work, "metrics.jsonl"), "w", encoding="utf-8")
for step, rounds in enumerate(steps):
    began, batch = time.time(), [i for groups in rounds for g in groups for i in g]
    sums = torch.zeros(len(NAMES) + 1, device=device)
    for groups in rounds:
        logp_w, logp_l, slots = forward(groups[RANK])
        m = margins(groups[RANK], logp_w, logp_l)
        per_pair = losses.pair_loss(loss, m, **config)                                                       # (B,)
        (per_pair.sum() * WORLD_SIZE / len(batch)).backward()           # FSDP divides by the processes: the step's mean over pairs
        with torch.no_grad():
            sums[:-1] += torch.stack([per_pair, m["nll"], beta * m["r_w"], beta * m["r_l"], (m["s"] > 0).float(), m["s_theta"],
                                      m["s_ref"], logp_w, logp_l, m["len_w"], m["len_l"]]).sum(1)
            sums[-1] += slots
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip).full_tensor().item()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(sums)
    r = {"step": step, "lr": lr_at(step), **dict(zip(NAMES, (sums[:-1] / len(batch)).tolist())), "grad_norm": norm}
    seconds, tokens = time.time() - began, sum(lengths[i] for i in batch)
    r |= {"pairs": len(batch), "tokens": tokens, "tokens_per_s": tokens / seconds, "padding": 1 - tokens / sums[-1].item(), "memory_gib": peak_memory()}
    if step == 0 and not abs(r["loss"] - expected) <= (1e-3 if dtype == "float32" else 2e-2) * max(1, abs(expected)):
        sys.exit(f"--loss={loss}: the first loss is {r['loss']:.6f}, but with policy = reference it has to be {expected:.6f}: "
                 "the policy does not compute the same twice (dropout? a kernel that is not deterministic?)")
    math.isfinite(r["loss"] + norm) or sys.exit(f"step {step + 1}: the loss is {r['loss']}, the gradient's norm {norm}: lower --lr, or look at its pairs")
    if RANK == 0:
        log.write(json.dumps(r) + "\n")
        log.flush()
    say(f"step {step + 1:4d}/{len(steps)}  loss {r['loss']:.4f}  nll {r['nll']:.3f}  acc {r['accuracy']:.2f}  rewards {r['reward_chosen']:+.3f} "
        f"{r['reward_rejected']:+.3f}  margins {r['s_theta']:+.2f} {r['s_ref']:+.2f}  len {r['len_chosen']:.0f} {r['len_rejected']:.0f}  "
        f"grad {norm:.2f}  lr {r['lr']:.1e}  {r['tokens_per_s']:,.0f} tok/s")

# ---- the result appears under its name when whole ----
save(policy, work)
if RANK == 0:
    log.close()
    write_json(manifest_of(work), manifest)
    os.replace(work, out)
say(f"{len(steps)} steps -> {out}")
dist.barrier()                                                          # gloo aborts a process whose peer has left
dist.destroy_process_group()
