"""train.py against TRL's DPOTrainer: same model, pairs, batches, schedule, alternating in one run.

    python bench/train.py                       on this machine's CPU, then on its GPU if it has one
    python bench/train.py --pairs=64 --rounds=2

Counted are the reference pass and all steps, in tokens of the data (prompt + chosen, prompt +
rejected), and the peak memory of the whole process (of the device on a GPU). TRL runs as fast as we
could make it: reference log-probs computed before, and on a GPU bfloat16 with gradient
checkpointing, as ours, and Liger's fused loss where that is installed. Losses are compared too.
"""

import importlib.util
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
CPU = dict(  # 20.2M parameters
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
GPU = dict(  # 1.1B
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
)
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "[user]", "[assistant]"]
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
LENGTHS = {"prompt": 150, "chosen": 350, "rejected": 350}  # words, on average
BATCH = 8


# ---------------------------------------------------------------------------- model and pairs


def make(folder, shape, n_pairs):
    """A random Llama of vocabulary 32,000, and pairs of words, one token each.

    Their lengths are log-normal, like UltraFeedback's.
    """
    words = SPECIALS + [f"w{n}" for n in range(32_000 - len(SPECIALS))]
    make_tokenizer(f"{folder}/model", words)
    make_model(f"{folder}/model", shape)

    rng = random.Random(0)
    with open(f"{folder}/pairs.jsonl", "w") as f:
        for _ in range(n_pairs):
            pair = {}
            for key, mean in LENGTHS.items():
                role = "user" if key == "prompt" else "assistant"
                content = random_text(rng, words[len(SPECIALS) :], mean)
                pair[key] = [{"role": role, "content": content}]
            f.write(json.dumps(pair) + "\n")


def make_tokenizer(folder, words):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(SPECIALS)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_model(folder, shape):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        **shape,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def random_text(rng, words, mean, sigma=0.6):
    """Words, log-normally many, at least 8 and at most three times the mean."""
    n = round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
    n = max(8, min(n, 3 * mean))
    return " ".join(rng.choices(words, k=n))


def read_pairs(folder):
    with open(f"{folder}/pairs.jsonl") as f:
        return [json.loads(line) for line in f]


def data_tokens(pairs):
    """Tokens of prompt + chosen and of prompt + rejected, over all pairs, with the template's."""
    n_tokens = 0
    for pair in pairs:
        p, w, l = (len(pair[key][0]["content"].split()) for key in LENGTHS)
        n_tokens += 2 * (p + 3) + w + l + 2
    return n_tokens


# ---------------------------------------------------------------------------- the two sides


def run(command, device):
    """(output, peak resident bytes) of a Python program that has to succeed."""
    env = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed\n{output}")
    return output, usage.ru_maxrss * 1024


def ours(folder, device, dtype):
    """Seconds, losses, memory and share of the matrix rate of train.py."""
    gpu = device == "cuda"
    out = os.path.join(tempfile.mkdtemp(dir=folder), "policy")
    settings = dict(
        model=f"{folder}/model",
        pairs=f"{folder}/pairs.jsonl",
        out=out,
        loss="dpo",
        lr=1e-4,
        batch_size=BATCH,
        shuffle=False,
        dtype=dtype,
        checkpoint_every=0,
        recompute=gpu,
        tokens_per_microbatch=16384 if gpu else 2048,
        gather_chunk=1024 if gpu else 2048,
    )
    script = os.path.join(HERE, "..", "train.py")
    command = [script, *(f"--{key}={value}" for key, value in settings.items())]
    output, memory = run(command, device)
    with open(f"{out}/metrics.jsonl") as f:
        steps = [json.loads(line) for line in f]
    if gpu:
        memory = steps[-1]["memory_gib"] * 2**30

    peak_rate = 1e12 * float(re.search(r"products ([\d.]+) TFLOP/s", output)[1])
    seconds = float(re.search(r"reference log-probs in ([\d.]+) s", output)[1])
    seconds += sum(r["seconds"] for r in steps)
    # three passes a step, and one for the reference
    flops = sum(r["mfu"] * r["seconds"] for r in steps) * peak_rate * 4 / 3
    return {
        "seconds": seconds,
        "losses": [r["loss"] for r in steps],
        "share": flops / seconds / peak_rate,
        "memory": memory,
    }


def theirs(folder, device, dtype):
    """Seconds, losses and memory of TRL."""
    output, memory = run([__file__, "--trl", folder, device, dtype], device)
    result = json.loads(output.splitlines()[-1])
    if device == "cpu":
        result["memory"] = memory
    return result


def trl(folder, device, dtype):
    """The other side, in a process of its own: DPOTrainer on the same pairs in the same order."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    reference_seconds = 0.0

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _precompute_ref_logps(self, *arguments):
            nonlocal reference_seconds
            t0 = time.perf_counter()
            result = super()._precompute_ref_logps(*arguments)
            reference_seconds += time.perf_counter() - t0
            return result

    gpu = device == "cuda"
    arguments = DPOConfig(
        output_dir=f"{folder}/trl",
        beta=0.1,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=1.0,
        weight_decay=0.0,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        precompute_ref_log_probs=True,
        bf16=dtype == "bfloat16",
        use_cpu=not gpu,
        gradient_checkpointing=gpu,
        use_liger_kernel=gpu and importlib.util.find_spec("liger_kernel") is not None,
    )
    model_folder = f"{folder}/model"
    trainer = InOrder(
        # float32 master weights, as ours
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        train_dataset=datasets.Dataset.from_list(read_pairs(folder)),
    )
    t0 = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - t0

    result = {
        "seconds": reference_seconds + seconds,
        "losses": [r["loss"] for r in trainer.state.log_history if "loss" in r],
        "memory": torch.cuda.max_memory_allocated() if gpu else 0,
    }
    print("\n" + json.dumps(result))


# ---------------------------------------------------------------------------- the comparison


def compare(device, shape, n_pairs, rounds, sides):
    """Run the sides, (name, function, dtype), in turn and print each run and the best of each."""
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own, so that torch stays out of this one
        command = [sys.executable, __file__, "--make", folder, json.dumps(shape), str(n_pairs)]
        if subprocess.run(command).returncode != 0:
            sys.exit("the model could not be made")
        n_tokens = data_tokens(read_pairs(folder))
        print(
            f"{device}: {n_pairs} pairs, {n_tokens:,} tokens, {rounds} rounds, shape {shape}",
            flush=True,
        )

        runs = {name: [] for name, *_ in sides}
        for _ in range(rounds):
            for name, side, dtype in sides:
                result = side(folder, device, dtype)
                runs[name].append(result)
                line = f"  {name:16} {n_tokens / result['seconds']:9,.0f} tok/s"
                line += f"  {result['memory'] / 2**30:6.2f} GiB"
                if "share" in result:
                    line += f"  {result['share']:.0%} of the matrix rate"
                print(line, flush=True)

    best = {name: min(results, key=lambda r: r["seconds"]) for name, results in runs.items()}
    our_names = [name for name in best if name.startswith("ours")]
    their_names = [name for name in best if name.startswith("TRL")]
    for our_name in our_names:
        for their_name in their_names:
            a = best[our_name]
            b = best[their_name]
            apart = max(abs(x - y) for x, y in zip(a["losses"], b["losses"]))
            print(
                f"{our_name} : {their_name}  {b['seconds'] / a['seconds']:.2f} x the tokens/s, "
                f"{a['memory'] / b['memory']:.2f} x the memory, losses {apart:.1e} apart; "
                f"{a['share']:.0%} of the measured matrix rate",
                flush=True,
            )


def main():
    arguments = dict(a.lstrip("-").split("=") for a in sys.argv[1:])
    n_pairs = int(arguments.get("pairs", 24))
    rounds = int(arguments.get("rounds", 2))
    sides = []
    for dtype in ("float32", "bfloat16"):
        sides += [(f"ours {dtype}", ours, dtype), (f"TRL {dtype}", theirs, dtype)]
    compare("cpu", CPU, n_pairs, rounds, sides)

    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: the GPU half was not run")
        return
    compare("cuda", GPU, 8 * n_pairs, rounds, sides[2:])


if __name__ == "__main__":
    if "--trl" in sys.argv:
        trl(*sys.argv[2:])
    elif "--make" in sys.argv:
        make(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
