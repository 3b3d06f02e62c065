"""rank.py's PairRM against llm-blender's: the same weights, prompts and candidates, alternating in one run, scores compared.

    python bench/rank.py                        on this machine's CPU, then on its GPU where it has one
    python bench/rank.py --prompts=100 --rounds=3

Each side runs in a process of its own; counted are tokenizing and comparing, not loading. Lengths are log-normal, 5 candidates a
prompt, and no text is long enough to be cut. The share of the matrix rate counts the products of unpadded sequences, each once.
"""
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SHAPES = {"cpu": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536),          # 13.4M with the vocabulary
          "cuda": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)}       # DeBERTa-v3-large's body
VOCABULARY, SPECIALS = 6000, ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]


def make(folder, shape, n_prompts):
    """A random PairRM in the published layout, one token per word, and texts of words."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DebertaV2Config, PreTrainedTokenizerFast
    sys.path.insert(0, os.path.dirname(HERE))
    from nanoaipo.pairrm import PREFIXES, PairRM
    words = SPECIALS + [f"w{n}" for n in range(VOCABULARY - len(SPECIALS) - len(PREFIXES))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    special = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"), SPECIALS))
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(f"{folder}/backbone")
    torch.manual_seed(0)
    model = PairRM(DebertaV2Config(
        vocab_size=VOCABULARY, max_position_embeddings=512, type_vocab_size=0, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=256, max_relative_positions=-1, norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
        pad_token_id=0, initializer_range=0.08, **shape))
    torch.nn.init.normal_(model.head_layer[4].weight, std=0.3)
    model.pretrained_model.save_pretrained(f"{folder}/backbone")
    save_file(model.state_dict(), f"{folder}/model.safetensors", metadata={"format": "pt"})
    json.dump({"ranker_type": "pairranker", "model_type": "deberta", "model_name": f"{folder}/backbone", "source_maxlength": 1224,
               "candidate_maxlength": 412, "n_tasks": 1, "drop_out": 0.05, "fp16": False}, open(f"{folder}/config.json", "w"))
    draw = random.Random(0)

    def text(median):
        return " ".join(draw.choices(words[len(SPECIALS):], k=max(3, min(400, round(draw.lognormvariate(math.log(median), 0.7))))))

    json.dump([[text(40) for _ in range(n_prompts)], [[text(80) for _ in range(5)] for _ in range(n_prompts)]], open(f"{folder}/texts.json", "w"))


def side(name, folder, device):
    """Run in a process of its own: print {seconds, scores, share of the matrix rate}."""
    import torch
    sys.path.insert(0, os.path.dirname(HERE))
    import collections
    from nanoaipo import pairrm
    from nanoaipo import rankers
    prompts, candidates = json.load(open(f"{folder}/texts.json"))
    share = None
    if name == "ours":
        model, tokenizer = pairrm.load_pairrm(folder, torch.device(device))
        run = lambda p, c: [(2 * m.mean(1)).tolist() for m in pairrm.compare(model, tokenizer, p, c, 16384 if device == "cuda" else 4096, collections.Counter())]
    else:
        blender = rankers.import_llm_blender().Blender()
        blender.loadranker(folder, device=device)
        run = lambda p, c: blender.rank(p, c, return_scores=True, disable_tqdm=True).tolist()
    run(prompts[:8], candidates[:8])                                    # warms up
    began = time.perf_counter()
    scores = run(prompts, candidates)
    seconds = time.perf_counter() - began
    if name == "ours":
        from nanoaipo.policy import matmul_rate
        count = lambda t: len(t.split()) + 3
        lengths = [count(p) + count(a) + count(b) for p, texts in zip(prompts, candidates) for k, a in enumerate(texts) for n, b in enumerate(texts) if k != n]
        s = SHAPES[device]
        dense = s["num_hidden_layers"] * s["hidden_size"] * (8 * s["hidden_size"] + 4 * s["intermediate_size"])
        flops = sum(n * dense + s["num_hidden_layers"] * 8 * s["hidden_size"] * n * n for n in lengths)                # content twice, position twice
        share = flops / seconds / matmul_rate(4096 if device == "cuda" else 1024, torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32)
    print(json.dumps({"seconds": seconds, "scores": scores, "share": share}))


def bench(device, n_prompts, rounds):
    with tempfile.TemporaryDirectory() as folder:
        make(folder, SHAPES[device], n_prompts)
        best = {}
        for n in range(rounds):
            for name in ("ours", "llm-blender"):
                text = subprocess.run([sys.executable, __file__, "--side", name, folder, device], check=True, stdout=subprocess.PIPE, text=True).stdout
                result = json.loads(text.splitlines()[-1])
                print(f"{device} round {n + 1} {name}: {20 * n_prompts / result['seconds']:.1f} comparisons/s", flush=True)
                best[name] = min(result, best.get(name, result), key=lambda r: r["seconds"])
    ours, theirs = best["ours"], best["llm-blender"]
    apart = max(abs(a - b) for x, y in zip(ours["scores"], theirs["scores"]) for a, b in zip(x, y))
    widest = max(map(abs, sum(theirs["scores"], [])))
    print(f"{device}: {20 * n_prompts / ours['seconds']:.1f} against {20 * n_prompts / theirs['seconds']:.1f} comparisons/s, {theirs['seconds'] / ours['seconds']:.2f} x; "
          f"{ours['share']:.0%} of the matrix rate; scores {apart:.1e} apart, the largest {widest:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(*sys.argv[2:])
        sys.exit(0)
    asked = dict(a.lstrip("-").split("=") for a in sys.argv[1:])
    bench("cpu", int(asked.get("prompts", 60)), int(asked.get("rounds", 3)))
    import torch
    if torch.cuda.is_available():
        bench("cuda", 500, 2)
    else:
        print("no CUDA device: the GPU half was not run")
