"""train.py against TRL's DPOTrainer: the same model, pairs, batches and schedule, alternating in one run.

    python bench/train.py                       on this machine's CPU, then on its GPU where it has one
    python bench/train.py --pairs=64 --rounds=2

Counted are the reference pass and all steps, in tokens of the data (prompt + chosen, prompt + rejected), and the peak memory of
the whole process (of the device on a GPU). TRL runs as fast as we could make it: reference log-probs computed before, and on a
GPU bfloat16 with gradient checkpointing, as ours, and Liger's fused loss where that is installed. Losses are compared too.
"""
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CPU = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True)   # 20.2M
GPU = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8)                         # 1.1B
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "[user]", "[assistant]"]
BATCH = 8


def make(folder, shape, n_pairs):
    """A random Llama of vocabulary 32,000 and pairs of words, one token each, with log-normal lengths like UltraFeedback's."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = SPECIALS + [f"w{n}" for n in range(32_000 - len(SPECIALS))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(SPECIALS)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = ("{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '</s>' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}")
    tokenizer.save_pretrained(f"{folder}/model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32_000, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=3, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(f"{folder}/model")
    draw = random.Random(0)

    def text(mean, sigma=0.6):
        n = round(draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
        return " ".join(draw.choices(words[len(SPECIALS):], k=max(8, min(n, 3 * mean))))

    with open(f"{folder}/pairs.jsonl", "w") as f:
        for _ in range(n_pairs):
            message = {"prompt": ("user", 150), "chosen": ("assistant", 350), "rejected": ("assistant", 350)}
            f.write(json.dumps({k: [{"role": role, "content": text(mean)}] for k, (role, mean) in message.items()}) + "\n")


def ours(folder, device, dtype):
    """What train.py prints and logs: seconds, data tokens a second, losses, memory, share of the matrix rate."""
    out = tempfile.mkdtemp(dir=folder)
    settings = dict(model=f"{folder}/model", pairs=f"{folder}/pairs.jsonl", out=f"{out}/policy", loss="dpo", lr=1e-4, batch_size=BATCH, shuffle=False,
                    dtype=dtype, checkpoint_every=0, recompute=device == "cuda", tokens_per_microbatch=16384 if device == "cuda" else 2048,
                    gather_chunk=1024 if device == "cuda" else 2048)
    text, memory = run([os.path.join(HERE, "..", "train.py"), *(f"--{k}={v}" for k, v in settings.items())], device)
    steps = [json.loads(line) for line in open(f"{out}/policy/metrics.jsonl")]
    peak = 1e12 * float(re.search(r"products ([\d.]+) TFLOP/s", text)[1])
    seconds = float(re.search(r"reference log-probs in ([\d.]+) s", text)[1]) + sum(r["seconds"] for r in steps)
    flops = sum(r["mfu"] * r["seconds"] for r in steps) * peak * 4 / 3                # three passes a step, one for the reference
    return {"seconds": seconds, "losses": [r["loss"] for r in steps], "share": flops / seconds / peak,
            "memory": steps[-1]["memory_gib"] * 2**30 if device == "cuda" else memory}


def theirs(folder, device, dtype):
    text, memory = run([__file__, "--trl", folder, device, dtype], device)
    result = json.loads(text.splitlines()[-1])
    return result | ({} if device == "cuda" else {"memory": memory})


def run(command, device):
    """(output, peak resident bytes) of a Python program that has to succeed."""
    hide = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=os.environ | hide | {"TRL_EXPERIMENTAL_SILENCE": "1"})
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    status == 0 or sys.exit(f"{' '.join(command)} failed\n{text}")
    return text, usage.ru_maxrss * 1024


def trl(folder, device, dtype):
    """The other side, in a process of its own: DPOTrainer on the same pairs in the same order."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    seconds = 0.0

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _precompute_ref_logps(self, *arguments):
            nonlocal seconds
            began = time.perf_counter()
            done = super()._precompute_ref_logps(*arguments)
            seconds += time.perf_counter() - began
            return done

    gpu = device == "cuda"
    liger = gpu and __import__("importlib.util").util.find_spec("liger_kernel") is not None
    arguments = DPOConfig(
        output_dir=f"{folder}/trl", beta=0.1, learning_rate=1e-4, lr_scheduler_type="cosine", warmup_steps=0.1, max_grad_norm=1.0, weight_decay=0.0,
        per_device_train_batch_size=BATCH, num_train_epochs=1, max_length=None, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        precompute_ref_log_probs=True, bf16=dtype == "bfloat16", use_cpu=not gpu, gradient_checkpointing=gpu, use_liger_kernel=liger)
    with open(f"{folder}/pairs.jsonl") as f:
        data = datasets.Dataset.from_list([json.loads(line) for line in f])
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)                       # master weights, as ours
    trainer = InOrder(model=model, args=arguments, processing_class=AutoTokenizer.from_pretrained(f"{folder}/model"), train_dataset=data)
    began = time.perf_counter()
    trainer.train()
    seconds += time.perf_counter() - began
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    print("\n" + json.dumps({"seconds": seconds, "losses": losses, "memory": torch.cuda.max_memory_allocated() if gpu else 0}))


def compare(device, shape, n_pairs, rounds, sides):
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, __file__, "--make", folder, json.dumps(shape), str(n_pairs)])  # torch stays out of this process
        done.returncode == 0 or sys.exit("the model could not be made")
        pairs = [json.loads(line) for line in open(f"{folder}/pairs.jsonl")]
        words = {k: [len(p[k][0]["content"].split()) for p in pairs] for k in ("prompt", "chosen", "rejected")}
        tokens = sum(2 * (p + 3) + w + l + 2 for p, w, l in zip(*words.values()))
        print(f"{device}: {n_pairs} pairs, {tokens:,} tokens, {rounds} rounds, shape {shape}", flush=True)
        results = {name: [] for name, *_ in sides}
        for _ in range(rounds):
            for name, side, dtype in sides:
                results[name].append(side(folder, device, dtype))
                last = results[name][-1]
                print(f"  {name:16} {tokens / last['seconds']:9,.0f} tok/s  {last['memory'] / 2**30:6.2f} GiB" +
                      (f"  {last['share']:.0%} of the matrix rate" if "share" in last else ""), flush=True)
        best = {name: min(runs, key=lambda r: r["seconds"]) for name, runs in results.items()}
        for name, other in itertools.product(*([n for n in best if n.startswith(who)] for who in ("ours", "TRL"))):
            a, b = best[name], best[other]
            apart = max(abs(x - y) for x, y in zip(a["losses"], b["losses"]))
            print(f"{name} : {other}  {b['seconds'] / a['seconds']:.2f} x the tokens/s, {a['memory'] / b['memory']:.2f} x the memory, losses {apart:.1e} apart; "
                  f"{a['share']:.0%} of the measured matrix rate", flush=True)


if __name__ == "__main__":
    if "--trl" in sys.argv:
        trl(*sys.argv[2:])
    elif "--make" in sys.argv:
        make(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))
    else:
        given = dict(a.lstrip("-").split("=") for a in sys.argv[1:])
        rounds = int(given.get("rounds", 2))
        compare("cpu", CPU, int(given.get("pairs", 24)), rounds, [(f"{who} {dtype}", side, dtype) for dtype in ("float32", "bfloat16") for who, side in (("ours", ours), ("TRL", theirs))])
        import torch
        if not torch.cuda.is_available():
            print("no CUDA device: the GPU half was not run")
            sys.exit(0)
        compare("cuda", GPU, 8 * int(given.get("pairs", 24)), rounds, [("ours bfloat16", ours, "bfloat16"), ("TRL bfloat16", theirs, "bfloat16")])
