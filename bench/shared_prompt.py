"""What computing each prompt once is worth: forward and backward of one micro-batch, laid out as policy.py does and with the prompt twice.

    python bench/shared_prompt.py

Lengths are fixed to those of UltraFeedback, about 150 tokens of prompt and 350 of each response. The log-probs of both are compared.
"""
import array
import os
import random
import sys
import tempfile
import time

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from transformers import AutoModelForCausalLM, LlamaConfig

from nanoaipo.packing import layout, pack
from nanoaipo.policy import build_policy, load_weights

SHAPES = {                                                              # small head, as in models of billions; large head, as in small models
    "8M body, 1M head": dict(vocab_size=4_000, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2),
    "8M body, 12M head": dict(vocab_size=32_000, hidden_size=384, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2)}


def twice(pairs, kernel):
    """pack, but every sequence has a prompt of its own."""
    ids, positions, sequences, index, labels, at = [], [], [], [], [], 0
    for pair in pairs:
        for key in ("chosen_ids", "rejected_ids"):
            prompt, response = (torch.tensor(pair[k]) for k in ("prompt_ids", key))
            sequences.append(torch.arange(at, at := at + len(prompt) + len(response)))
            ids += [prompt, response]
            positions.append(torch.arange(len(sequences[-1])))
            index.append(sequences[-1][len(prompt) - 1:-1])
            labels.append(response)
    return {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions)[None], "index": torch.cat(index), "labels": torch.cat(labels),
            "segments": layout(sequences, kernel)[0]}


def main(device, dtype, n_pairs, rounds=4):
    for name, shape in SHAPES.items():
        draw = random.Random(0)
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(folder)
            policy = build_policy(folder, dist.init_device_mesh(device, (1,)), dtype, chunk=256, recompute=False, compile=False, lora_rank=0, lora_alpha=1.0)
            load_weights(policy, folder)
        pairs = [{k: array.array("i", draw.choices(range(shape["vocab_size"]), k=n)) for k, n in (("prompt_ids", 150), ("chosen_ids", 350), ("rejected_ids", 350))}
                 for _ in range(n_pairs)]
        rows, seconds, logp = {"once": pack(pairs, policy.kernel)[0], "twice": twice(pairs, policy.kernel)}, {"once": [], "twice": []}, {}
        for _ in range(rounds + 1):                                     # the first warms up
            for way, row in rows.items():
                began = time.perf_counter()
                logp[way] = policy(**row)
                logp[way].sum().backward()
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds[way].append(time.perf_counter() - began)
        once, again = (min(seconds[way][1:]) for way in rows)
        print(f"{device} {dtype} {name}: prompt once {once:.3f} s, twice {again:.3f} s, {again / once:.2f} x faster, "
              f"log-probs {(logp['once'] - logp['twice']).abs().max():.1e} apart", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main("cpu", torch.float32, 4)
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU half was not run")
        sys.exit(0)
    dist.destroy_process_group()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    main("cuda", torch.bfloat16, 16)
