"""Host memory while two processes load a model of 1 GB (500M weights in bfloat16): how much above the float32 shards they keep.

    python bench/load.py

Linux only. Peak resident memory of each process, its read-ahead of the file included (those pages the system can take back).
"""
import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def status(field):
    """Bytes of a field of Linux's account of this process."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def make(folder):
    import torch
    import transformers
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.LlamaConfig(vocab_size=32_000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=4)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def load(folder):
    import torch
    import torch.distributed as dist

    from nanoaipo.policy import build_policy, load_weights
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    imported = status("VmHWM")
    policy = build_policy(folder, mesh, torch.bfloat16, chunk=1024, recompute=True, compile=False, lora_rank=0, lora_alpha=1.0)
    load_weights(policy, folder)
    shards = sum(p.to_local().numel() * 4 for p in policy.parameters())
    figures = torch.tensor([imported, shards, status("VmHWM"), status("RssFile")], dtype=torch.float64)
    dist.all_reduce(figures)
    if dist.get_rank() == 0:
        imported, shards, peak, mapped = (figures / 2**20).tolist()
        size = os.path.getsize(os.path.join(folder, "model.safetensors")) / 2**20
        print(f"model {size:,.0f} MiB, {dist.get_world_size()} processes: peak {peak:,.0f} MiB in all = shards {shards:,.0f} + {peak - shards:,.0f}; "
              f"of these {imported:,.0f} were there before loading, {mapped:,.0f} are files mapped at the end")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        {"make": make, "load": load}[sys.argv[1]](sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "make", folder], check=True)
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "load", folder], check=True)
