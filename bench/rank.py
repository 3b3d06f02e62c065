"""rank.py's PairRM against llm-blender's: same weights, prompts and candidates, scores compared.

    python bench/rank.py --prompts=60 --rounds=3
    python bench/rank.py --prompts=32 --rounds=1 --device=cuda

They alternate in one run, each in a process of its own; tokenizing and comparing count, loading
does not. Each ranks everything twice, of which the second time counts: then its kernels are
compiled. Lengths are log-normal, 5 candidates a prompt, and no text is long enough to be cut. The
share of the matrix rate counts the products of unpadded sequences, each once.

Both compute in float32 on a CPU and in float16 on a GPU, llm-blender's default there. It takes 8
prompts at once, its default; on a GPU 16 too, and the faster of the two is compared.
"""

import argparse
import collections
import functools
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
N_CANDIDATES = 5
COMPARISONS = N_CANDIDATES * (N_CANDIDATES - 1)  # of a prompt, in both orders
VOCABULARY = 6000
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
SHAPES = {
    # 13.4M parameters with the vocabulary
    "cpu": dict(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
    ),
    # the body of DeBERTa-v3-large
    "cuda": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}


# -------------------------------------------------------------------------------- what is ranked


def word_list():
    from nanoaipo.pairrm import PREFIXES

    return [f"w{n}" for n in range(VOCABULARY - len(SPECIALS) - len(PREFIXES))]


def build_tokenizer(folder):
    """Save a tokenizer of one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: n for n, token in enumerate(SPECIALS + word_list())}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )
    tokenizer.save_pretrained(folder)


def build_ranker(folder, shape):
    """Save a random PairRM in the published layout."""
    import torch
    from safetensors.torch import save_file
    from transformers import DebertaV2Config

    from nanoaipo.pairrm import PairRM

    backbone = os.path.join(folder, "backbone")
    build_tokenizer(backbone)
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        type_vocab_size=0,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        pad_token_id=0,
        initializer_range=0.08,
        **shape,
    )
    model = PairRM(config)
    torch.nn.init.normal_(model.head_layer[4].weight, std=0.3)
    model.pretrained_model.save_pretrained(backbone)
    weights = os.path.join(folder, "model.safetensors")
    save_file(model.state_dict(), weights, metadata={"format": "pt"})
    settings = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": backbone,
        "source_maxlength": 1224,
        "candidate_maxlength": 412,
        "n_tasks": 1,
        "drop_out": 0.05,
        "fp16": True,  # llm-blender's default, which it follows on a GPU alone
    }
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(settings, f)


def write_texts(folder, n_prompts):
    """Prompts and candidates of random words, as [prompts, candidates] in texts.json."""
    rng = random.Random(0)
    words = word_list()

    def text(median):
        length = round(rng.lognormvariate(math.log(median), 0.7))
        return " ".join(rng.choices(words, k=max(3, min(400, length))))

    prompts = [text(40) for _ in range(n_prompts)]
    candidates = [[text(80) for _ in range(N_CANDIDATES)] for _ in range(n_prompts)]
    with open(os.path.join(folder, "texts.json"), "w") as f:
        json.dump([prompts, candidates], f)


# -------------------------------------------------------------------------------- the two sides


def load_ours(folder, device):
    """A function from prompts and candidates to scores, a list of N for each prompt."""
    import torch

    from nanoaipo import pairrm

    model, tokenizer = pairrm.load_pairrm(folder, torch.device(device))
    batch_tokens = 16384 if device == "cuda" else 4096

    def rank(prompts, candidates):
        counts = collections.Counter()
        matrices = pairrm.compare(model, tokenizer, prompts, candidates, batch_tokens, counts)
        return [(2 * log_odds.mean(1)).tolist() for log_odds in matrices]

    return rank


def load_llm_blender(folder, device, batch_size):
    """The same by llm-blender, so many prompts at once."""
    from nanoaipo import rankers

    blender = rankers.import_llm_blender().Blender()
    blender.loadranker(folder, device=device)

    def rank(prompts, candidates):
        scores = blender.rank(
            prompts, candidates, return_scores=True, batch_size=batch_size, disable_tqdm=True
        )
        return scores.tolist()

    return rank


SIDES = {
    "ours": load_ours,
    "llm-blender": functools.partial(load_llm_blender, batch_size=8),
    "llm-blender, 16 at once": functools.partial(load_llm_blender, batch_size=16),
}


def matmul_share(prompts, candidates, seconds, device):
    """Share of the device's matrix rate that the products of unpadded sequences make up."""
    import torch

    from nanoaipo.policy import matmul_rate

    # a text has three ids around it, a sequence is a prompt and two candidates
    lengths = []
    for prompt, texts in zip(prompts, candidates):
        n_prompt = len(prompt.split()) + 3
        n_texts = [len(text.split()) + 3 for text in texts]
        for k, first in enumerate(n_texts):
            for n, second in enumerate(n_texts):
                if k != n:
                    lengths.append(n_prompt + first + second)

    # two operations a product; content is multiplied twice, position twice
    width = SHAPES[device]["hidden_size"]
    layers = SHAPES[device]["num_hidden_layers"]
    dense = layers * width * (8 * width + 4 * SHAPES[device]["intermediate_size"])
    attention = layers * 8 * width
    flops = sum(n * dense + n * n * attention for n in lengths)

    if device == "cuda":
        rate = matmul_rate(torch.device(device), torch.bfloat16, 4096)
    else:
        rate = matmul_rate(torch.device(device), torch.float32, 1024)
    return flops / seconds / rate


def run_side(name, folder, device):
    """Run in a process of its own: print {seconds, scores, share of the matrix rate}."""
    with open(os.path.join(folder, "texts.json")) as f:
        prompts, candidates = json.load(f)
    rank = SIDES[name](folder, device)

    # the first time compiles what these lengths need
    rank(prompts, candidates)
    t0 = time.perf_counter()
    scores = rank(prompts, candidates)
    seconds = time.perf_counter() - t0

    share = None
    if name == "ours":
        share = matmul_share(prompts, candidates, seconds, device)
    print(json.dumps({"seconds": seconds, "scores": scores, "share": share}))


def start_side(name, folder, device):
    """What run_side prints, from a new process."""
    command = [sys.executable, __file__, "--side", name, folder, device]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# -------------------------------------------------------------------------------- the comparison


def bench(device, n_prompts, rounds):
    """Print the speed of each, the best of `rounds`, and how far the scores are apart."""
    n_comparisons = COMPARISONS * n_prompts
    names = ["ours", "llm-blender"]
    if device == "cuda":
        names.append("llm-blender, 16 at once")
    if not importlib.util.find_spec("llm_blender"):
        print("llm-blender is left out: it is not installed")
        names = ["ours"]
    best = {}
    with tempfile.TemporaryDirectory() as folder:
        build_ranker(folder, SHAPES[device])
        write_texts(folder, n_prompts)
        for n in range(rounds):
            for name in names:
                result = start_side(name, folder, device)
                speed = n_comparisons / result["seconds"]
                print(f"{device} round {n + 1} {name}: {speed:.1f} comparisons/s", flush=True)
                if name not in best or result["seconds"] < best[name]["seconds"]:
                    best[name] = result

    ours = best["ours"]
    print(
        f"{device}: {n_comparisons / ours['seconds']:.1f} comparisons/s, "
        f"{ours['share']:.0%} of the matrix rate"
    )
    theirs = [best[name] for name in names if name != "ours"]
    if theirs:
        fastest = min(theirs, key=lambda result: result["seconds"])
        print_apart(ours, fastest, n_comparisons)


def print_apart(ours, theirs, n_comparisons):
    """Print how much faster ours is, and how far the scores are apart."""
    differences = []
    for our_scores, their_scores in zip(ours["scores"], theirs["scores"]):
        differences += [abs(a - b) for a, b in zip(our_scores, their_scores)]
    largest = max(abs(score) for scores in theirs["scores"] for score in scores)
    print(
        f"llm-blender {n_comparisons / theirs['seconds']:.1f}, "
        f"{theirs['seconds'] / ours['seconds']:.2f} x; "
        f"scores {max(differences):.1e} apart, the largest {largest:.2f}"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    bench(arguments.device, arguments.prompts, arguments.rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        run_side(*sys.argv[2:])
    else:
        main()
