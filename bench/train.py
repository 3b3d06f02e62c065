"""train.py against TRL's DPOTrainer: same model, pairs, batches, schedule, in turn on one machine.

    python bench/train.py                       on the GPU if there is one, else on the CPU
    python bench/train.py --device=cuda --layers=24 --vocab=128256
    python bench/train.py --device=cpu --steps=8 --rounds=2
    python bench/train.py --device=cuda --only="TRL best,ours recomputing,ours in one row"

Speed is tokens of prompt + chosen + rejected, each prompt once, per second of training steps; the
first WARM steps do not count. Seconds of the reference pass stand beside it, with all that starts
up in it. Memory is the peak of the device, or on a CPU of the whole process. Losses of the steps
behind the first update and the norms of all gradients are compared.

Both sides keep float32 master weights and compute in the same dtype. TRL's default is what its
DPOConfig says: 8 pairs a device, gradient checkpointing. TRL's best, as fast as we could make it:
no checkpointing, 4 pairs a device, pairs of about one length together, so that it pads less, and
with Liger's kernels. Its own chunked head and reference log-probs from before are in all of them;
padding_free is off in TRL 1.16. A side whose package is missing is skipped.

Ours keeps all activations, without and with compilation. Two more sides, compiled, compute them
again to need less memory: "recomputing" in micro-batches of train.py's default size, "in one row"
with a step's pairs in one micro-batch, which is faster and needs more.
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
CUDA = dict(  # 1.10B with a vocabulary of 32,000
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
BATCH = {"cpu": 8, "cuda": 32}  # pairs of a step
LR = {"cpu": 1e-4, "cuda": 1e-5}
WARM = 2  # first steps, which do not count: kernels are chosen, memory is found


# ---------------------------------------------------------------------------- model and pairs


def make(folder, device, shape, n_pairs):
    """A random Llama and pairs of words, one token each.

    Their lengths are log-normal, like UltraFeedback's.
    """
    words = SPECIALS + [f"w{n}" for n in range(shape["vocab_size"] - len(SPECIALS))]
    make_tokenizer(f"{folder}/model", words)
    make_model(f"{folder}/model", device, shape)

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


def make_model(folder, device, shape):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        **shape,
    )
    # drawn where it will train, and stored in 16 bits: a billion numbers take a CPU long
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)

    machine = f"{torch.get_num_threads()} threads"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    print(
        f"{device} {machine}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{model.num_parameters() / 1e6:,.0f}M parameters",
        flush=True,
    )


def random_text(rng, words, mean, sigma=0.6):
    """Words, log-normally many, at least 8 and at most three times the mean."""
    n = round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
    n = max(8, min(n, 3 * mean))
    return " ".join(rng.choices(words, k=n))


def read_pairs(folder):
    with open(f"{folder}/pairs.jsonl") as f:
        return [json.loads(line) for line in f]


def data_tokens(pairs):
    """Tokens of prompt, chosen and rejected over these pairs, with the template's."""
    n_tokens = 0
    for pair in pairs:
        p, w, l = (len(pair[key][0]["content"].split()) for key in LENGTHS)
        n_tokens += (p + 3) + (w + 1) + (l + 1)
    return n_tokens


# ---------------------------------------------------------------------------- the two sides


def run(command, device):
    """(output, peak resident bytes) of a Python program; output is None if it failed."""
    env = os.environ | {
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
        # else attention plans anew for each shape that it meets
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    }
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, *command]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        print(f"{' '.join(command)} failed\n{output[-3000:]}", flush=True)
        return None, 0
    return output, usage.ru_maxrss * 1024


def ours(folder, device, batch_size, options):
    """What train.py measured, as a dict, or None if it failed; options: its further settings."""
    out = os.path.join(tempfile.mkdtemp(dir=folder), "policy")
    settings = dict(
        model=f"{folder}/model",
        pairs=f"{folder}/pairs.jsonl",
        out=out,
        loss="dpo",
        lr=LR[device],
        batch_size=batch_size,
        shuffle=False,
        checkpoint_every=0,
        recompute=0,
    )
    script = os.path.join(HERE, "..", "train.py")
    command = [script, *(f"--{key}={value}" for key, value in (settings | options).items())]
    output, memory = run(command, device)
    if output is None:
        return None

    with open(f"{out}/metrics.jsonl") as f:
        steps = [json.loads(line) for line in f]
    if device == "cuda":
        memory = steps[-1]["memory_gib"] * 2**30
    seconds = [r["seconds"] for r in steps]
    counted = steps[WARM:]
    return {
        "reference_seconds": float(re.search(r"reference log-probs in ([\d.]+) s", output)[1]),
        "seconds": seconds,
        "losses": [r["loss"] for r in steps],
        "norms": [r["grad_norm"] for r in steps],
        "memory": memory,
        # of what this device reaches in products of matrices
        "share": sum(r["mfu"] * r["seconds"] for r in counted) / sum(seconds[WARM:]),
    }


def theirs(folder, device, batch_size, options):
    """What TRL measured, as a dict, or None if it failed."""
    command = [__file__, "--trl", folder, device, str(batch_size), json.dumps(options)]
    output, memory = run(command, device)
    if output is None:
        return None

    with open(f"{folder}/trl.json") as f:
        result = json.load(f)
    if device == "cpu":
        result["memory"] = memory
    return result


def trl(folder, device, batch_size, options):
    """The other side, in a process of its own: DPOTrainer on the same pairs, step by step."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    reference_seconds = 0.0
    times = []  # when each step was done; a step's loss is read then, so the device is done too

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _precompute_ref_logps(self, *arguments):
            nonlocal reference_seconds
            t0 = time.perf_counter()
            result = super()._precompute_ref_logps(*arguments)
            reference_seconds += time.perf_counter() - t0
            return result

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_log(self, arguments, state, control, logs, **_):
            if "loss" in logs:
                times.append(time.perf_counter())

    # The mean over a step does not depend on the order within it
    pairs = read_pairs(folder)
    if options["by_length"]:
        ordered = []
        for start in range(0, len(pairs), batch_size):
            ordered += sorted(pairs[start : start + batch_size], key=longer_tokens, reverse=True)
        pairs = ordered

    arguments = DPOConfig(
        output_dir=f"{folder}/trl",
        beta=0.1,
        learning_rate=LR[device],
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=1.0,
        weight_decay=0.0,
        per_device_train_batch_size=options["per_device"],
        gradient_accumulation_steps=batch_size // options["per_device"],
        num_train_epochs=1,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        precompute_ref_log_probs=True,
        bf16=options["dtype"] == "bfloat16",
        use_cpu=device == "cpu",
        gradient_checkpointing=options["checkpointing"],
        use_liger_kernel=options["liger"],
    )
    model_folder = f"{folder}/model"
    trainer = InOrder(
        # float32 master weights, as ours
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        train_dataset=datasets.Dataset.from_list(pairs),
        callbacks=[Clock()],
    )
    trainer.train()

    steps = [r for r in trainer.state.log_history if "loss" in r]
    result = {
        "reference_seconds": reference_seconds,
        "seconds": [after - before for before, after in zip(times, times[1:])],
        "losses": [r["loss"] for r in steps],
        "norms": [r["grad_norm"] for r in steps],
        "memory": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
    }
    with open(f"{folder}/trl.json", "w") as f:
        json.dump(result, f)


def longer_tokens(pair):
    """Tokens of the longer of a pair's two sequences, but for the template's."""
    p, w, l = (len(pair[key][0]["content"].split()) for key in LENGTHS)
    return p + max(w, l)


# ---------------------------------------------------------------------------- the comparison


def cpu_rows():
    """(name, side, its options) of each row, on a CPU: both in both dtypes."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        settings = dict(dtype=dtype, tokens_per_microbatch=2048, gather_chunk=2048)
        options = dict(dtype=dtype, per_device=8, checkpointing=False, liger=False, by_length=False)
        rows += [(f"ours {dtype}", ours, settings), (f"TRL {dtype}", theirs, options)]
    return rows


def cuda_rows():
    """(name, side, its options) of each row, on a GPU in bfloat16; what takes longest is last."""
    settings = dict(dtype="bfloat16", tokens_per_microbatch=16384, gather_chunk=16384)
    default = dict(dtype="bfloat16", per_device=8, checkpointing=True, liger=False, by_length=False)
    best = default | dict(per_device=4, checkpointing=False, by_length=True)
    # A chunk of 4,096 logits takes less than a layer's activations, so it does not raise the peak
    again = settings | dict(compile=True, recompute=1, gather_chunk=4096)
    return [
        ("ours", ours, settings),
        ("TRL best", theirs, best),
        ("TRL best + Liger", theirs, best | dict(liger=True)),
        ("TRL default", theirs, default),
        ("ours compiled", ours, settings | dict(compile=True)),
        ("ours recomputing", ours, again | dict(tokens_per_microbatch=8192)),
        # with one micro-batch a step, activations go as gradients come
        ("ours in one row", ours, again | dict(tokens_per_microbatch=32768)),
    ]


def missing_package(side, options):
    """Name of a package that this row needs and that is not installed, or None."""
    needed = []
    if side is theirs:
        needed = ["trl", "datasets"]
        if options["liger"]:
            needed.append("liger_kernel")
    for package in needed:
        if importlib.util.find_spec(package) is None:
            return package
    return None


def compare(device, shape, n_steps, rounds, rows):
    """Run the rows in turn, print each run, then a table of the best of each."""
    batch_size = BATCH[device]
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own, so that torch stays out of this one
        arguments = [folder, device, json.dumps(shape), str(n_steps * batch_size)]
        if subprocess.run([sys.executable, __file__, "--make", *arguments]).returncode != 0:
            sys.exit("the model could not be made")
        pairs = read_pairs(folder)
        n_tokens = data_tokens(pairs[WARM * batch_size :])
        print(
            f"{n_steps} steps of {batch_size} pairs, of which the last {n_steps - WARM} count, "
            f"{n_tokens:,} tokens (each prompt once), {rounds} rounds, shape {shape}",
            flush=True,
        )

        runs = {}
        for _ in range(rounds):
            for name, side, options in rows:
                package = missing_package(side, options)
                if package:
                    print(f"  {name:16} skipped: {package} is not installed", flush=True)
                    continue
                t0 = time.time()
                result = side(folder, device, batch_size, options)
                if result is None:
                    continue
                runs.setdefault(name, []).append(result)
                line = row_line(name, result, n_tokens)
                print(f"{line}  ({time.time() - t0:.0f} s in all)", flush=True)

    # the best of each row
    best = {}
    for name, results in runs.items():
        best[name] = min(results, key=counted_seconds)
    print("best of each:", flush=True)
    for name, result in best.items():
        print(row_line(name, result, n_tokens), flush=True)
    for our_name in best:
        for their_name in best:
            if our_name.startswith("ours") and their_name.startswith("TRL"):
                print_pair(our_name, best[our_name], their_name, best[their_name])


def counted_seconds(result):
    return sum(result["seconds"][WARM:])


def row_line(name, result, n_tokens):
    line = f"  {name:16} {n_tokens / counted_seconds(result):9,.0f} tok/s"
    line += f"  {result['memory'] / 2**30:6.2f} GiB"
    line += f"  reference pass {result['reference_seconds']:5.1f} s"
    line += "  steps " + " ".join(f"{seconds:.2f}" for seconds in result["seconds"]) + " s"
    if "share" in result:
        line += f"  {result['share']:.0%} of the matrix rate"
    return line


def print_pair(our_name, a, their_name, b):
    """How one of our rows, a, compares with one of theirs, b."""
    # The first rate is 0, so the first two losses are log(2) whatever the gradients are
    losses = list(zip(a["losses"], b["losses"]))[2:]
    apart = max(abs(x - y) for x, y in losses)
    moved = max(abs(x - math.log(2)) for x, _ in losses)
    norms = max(abs(x - y) / y for x, y in zip(a["norms"], b["norms"]))
    print(
        f"{our_name} : {their_name}  "
        f"{counted_seconds(b) / counted_seconds(a):.2f} x the tokens/s, "
        f"{a['memory'] / b['memory']:.2f} x the memory; "
        f"losses at most {apart:.1e} apart, {moved:.1e} from log(2); "
        f"norms of gradients {norms:.1e} of themselves apart",
        flush=True,
    )


def main():
    arguments = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
    device = arguments.get("device")
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"

    shape = CUDA if device == "cuda" else CPU
    shape = shape | {"vocab_size": int(arguments.get("vocab", 32_000))}
    if "layers" in arguments:
        shape["num_hidden_layers"] = int(arguments["layers"])
    n_steps = int(arguments.get("steps", 6))
    if n_steps <= WARM:
        sys.exit(f"--steps={n_steps}: the first {WARM} do not count")

    rows = cuda_rows() if device == "cuda" else cpu_rows()
    if "only" in arguments:
        names = arguments["only"].split(",")
        known = [row[0] for row in rows]
        for name in names:
            if name not in known:
                sys.exit(f"--only={name}: there are {', '.join(known)}")
        rows = [row for row in rows if row[0] in names]
    rounds = int(arguments.get("rounds", 1 if device == "cuda" else 2))
    compare(device, shape, n_steps, rounds, rows)


if __name__ == "__main__":
    if "--trl" in sys.argv:
        folder, device, batch_size, options = sys.argv[2:]
        trl(folder, device, int(batch_size), json.loads(options))
    elif "--make" in sys.argv:
        folder, device, shape, n_pairs = sys.argv[2:]
        make(folder, device, json.loads(shape), int(n_pairs))
    else:
        main()
