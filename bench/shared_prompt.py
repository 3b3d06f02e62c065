"""What computing each prompt once is worth: forward and backward of one micro-batch.

    python bench/shared_prompt.py                   on a CPU in float32
    python bench/shared_prompt.py --device=cuda     on a GPU in bfloat16

Laid out as packing.py does, and with the prompt twice. Lengths are fixed to those of UltraFeedback,
about 150 tokens of prompt and 350 of each response. The log-probs of both are compared.
"""

import argparse
import array
import os
import random
import sys
import tempfile
import time

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from nanoaipo.packing import pack, segments_of  # noqa: E402
from nanoaipo.policy import build_policy  # noqa: E402
from nanoaipo.weights import load_weights  # noqa: E402

SHAPES = {  # a small head, as in models of billions, and a large one, as in small models
    "8M body, 1M head": dict(
        vocab_size=4_000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "8M body, 12M head": dict(
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
    ),
}
LENGTHS = {"prompt_ids": 150, "chosen_ids": 350, "rejected_ids": 350}


def twice(pairs, kernel):
    """pack, but every sequence has a prompt of its own."""
    ids = []
    positions = []
    sequences = []
    index = []
    labels = []
    start = 0
    for pair in pairs:
        prompt = torch.tensor(pair["prompt_ids"])
        for key in ("chosen_ids", "rejected_ids"):
            response = torch.tensor(pair[key])
            length = len(prompt) + len(response)
            sequence = torch.arange(start, start + length)  # its place in the row
            start += length
            ids += [prompt, response]
            positions.append(torch.arange(length))
            sequences.append(sequence)
            index.append(sequence[len(prompt) - 1 : -1])
            labels.append(response)
    segments, _ = segments_of(sequences, kernel)
    return {
        "input_ids": torch.cat(ids)[None],  # (1, T)
        "position_ids": torch.cat(positions)[None],  # (1, T)
        "index": torch.cat(index),  # (N,)
        "labels": torch.cat(labels),  # (N,)
        "segments": segments,
    }


def random_policy(shape, device, dtype):
    """A random Llama of this shape, as train.py builds it."""
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(folder)
        policy = build_policy(
            folder,
            dist.init_device_mesh(device, (1,)),
            dtype,
            chunk=256,
            recompute=0,
            compile=False,
            lora_rank=0,
            lora_alpha=1.0,
        )
        load_weights(policy, folder)
    return policy


def random_pairs(n_pairs, vocab_size):
    rng = random.Random(0)
    pairs = []
    for _ in range(n_pairs):
        pair = {}
        for key, length in LENGTHS.items():
            pair[key] = array.array("i", rng.choices(range(vocab_size), k=length))
        pairs.append(pair)
    return pairs


def compare(device, dtype, n_pairs, rounds=4):
    for name, shape in SHAPES.items():
        policy = random_policy(shape, device, dtype)
        pairs = random_pairs(n_pairs, shape["vocab_size"])
        rows = {"once": pack(pairs, policy.kernel)[0], "twice": twice(pairs, policy.kernel)}

        seconds = {"once": [], "twice": []}
        logp = {}
        for _ in range(rounds + 1):  # the first warms up
            for way, row in rows.items():
                t0 = time.perf_counter()
                logp[way] = policy(**row)  # (N,)
                logp[way].sum().backward()
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds[way].append(time.perf_counter() - t0)

        once = min(seconds["once"][1:])
        again = min(seconds["twice"][1:])
        difference = (logp["once"] - logp["twice"]).abs().max()
        print(
            f"{device} {dtype} {name}: prompt once {once:.3f} s, twice {again:.3f} s, "
            f"{again / once:.2f} x faster, log-probs {difference:.1e} apart",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device

    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device == "cuda":
        compare("cuda", torch.bfloat16, 16)
    else:
        compare("cpu", torch.float32, 4)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
