"""Host memory while two processes load a model of 1 GB (500M weights in bfloat16).

    python bench/load.py

How much is it above the float32 shards that they keep? Linux only. Peak resident memory of each
process, its read-ahead of the file included (those pages the system can take back).
"""

import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def status(field):
    """Bytes of a field of Linux's account of this process."""
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(field):
                return int(line.split()[1]) * 1024


def make(folder):
    """Save a random Llama of 500M weights."""
    import torch
    import transformers

    torch.set_default_dtype(torch.bfloat16)
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm.save_pretrained(folder)


def load(folder):
    """Load it as train.py does, in each process; the first prints the sums over all."""
    import torch
    import torch.distributed as dist

    from nanoaipo.policy import build_policy
    from nanoaipo.processes import print0, stop_processes
    from nanoaipo.weights import load_weights

    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    imported = status("VmHWM")
    policy = build_policy(
        folder,
        mesh,
        torch.bfloat16,
        chunk=1024,
        recompute=1,
        compile=False,
        lora_rank=0,
        lora_alpha=1.0,
    )
    load_weights(policy, folder)
    shards = sum(p.to_local().numel() * 4 for p in policy.parameters())

    figures = [imported, shards, status("VmHWM"), status("RssFile")]
    figures = torch.tensor(figures, dtype=torch.float64)
    dist.all_reduce(figures)
    imported, shards, peak, mapped = (figures / 2**20).tolist()
    size = os.path.getsize(os.path.join(folder, "model.safetensors")) / 2**20
    print0(
        f"model {size:,.0f} MiB, {dist.get_world_size()} processes: peak {peak:,.0f} MiB in all = "
        f"shards {shards:,.0f} + {peak - shards:,.0f}; of these {imported:,.0f} were there before "
        f"loading, {mapped:,.0f} are files mapped at the end"
    )
    stop_processes()


def main():
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2])
    elif sys.argv[1:2] == ["load"]:
        load(sys.argv[2])
    else:
        two_processes = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "make", folder], check=True)
            subprocess.run([sys.executable, *two_processes, __file__, "load", folder], check=True)


if __name__ == "__main__":
    main()
