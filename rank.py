"""Rank candidate responses and keep one preference pair per prompt: candidates -> pairs.

    python rank.py config/aipo_nemo.py --candidates=candidates.jsonl --out=pairs.jsonl
    torchrun --nproc-per-node=8 rank.py ...                8 GPUs, each its share of the prompts, 8 shards

Every distinct response of a prompt meets every other, in both orders. Best against worst by mean log-odds; a prompt
gives no pair when all its scores tie, when fewer than two responses are left, or when a filter says so. The manifest
counts each case.
"""
import sys

from configurator import configure
from data import RANK, WORLD_SIZE, begin, read, writing

# ---- settings ----
candidates = ""                         # candidates file, folder or glob
out = ""                                # pairs file to write (JSONL)
ranker = "pairrm"                       # pairrm or llm-blender
ranker_model = "llm-blender/PairRM"     # folder or hub name
rank_batch_tokens = 8192                # tokens of comparisons computed at once
max_response_tokens = 2016              # longer responses are left out (AIPO: 2,016, of 2,048 generated)
drop_unfinished = True                  # leave out responses that were cut at the engine's limit
drop_url = True                         # no pair whose chosen response holds a URL (AIPO)
config = configure(globals())

manifest = begin(out, ".jsonl", config, "candidates", "ranker_model")
if manifest is None:
    sys.exit(0)
rows = [row for _, row in read(candidates, "id", "prompt", "responses")]
rows or sys.exit(f"{candidates}: no candidates in it")
rows = rows[RANK::WORLD_SIZE]

# ---- what competes ----
counts = dict.fromkeys(("prompts", "pairs", "unfinished", "too_long", "empty", "fewer_than_two", "identical", "tied", "url"), 0)
counts["prompts"] = len(rows)
for row in rows:
    kept = []
    for response in row["responses"]:
        reason = ("empty" if not response["text"].strip() else
                  "unfinished" if drop_unfinished and not response["finished"] else
                  "too_long" if len(response["ids"]) > max_response_tokens else None)
        if reason:
            counts[reason] += 1
        else:
            kept.append(response)
    row["responses"] = kept
    row["texts"] = list(dict.fromkeys(r["text"] for r in kept))         # distinct, in order

# ---- log-odds, then one pair per prompt (torch is imported only now: a finished stage ends above) ----
import torch

from rankers import load_ranker, prompt_text

odds = load_ranker(ranker, ranker_model, rank_batch_tokens)
matrices = odds([prompt_text(row["prompt"]) for row in rows], [row["texts"] for row in rows])
with writing(out, manifest) as write:
    for row, distinct in zip(rows, matrices):
        responses, texts = row.pop("responses"), row.pop("texts")
        if len(texts) < 2:
            counts["fewer_than_two" if len(responses) < 2 else "identical"] += 1
            continue
        place = [texts.index(r["text"]) for r in responses]
        m = distinct[place][:, place]                                                                        # (N, N)
        scores = 2 * m.mean(1)                                          # llm-blender's: mean of logit_ij - logit_ji
        w, l = int(scores.argmax()), int(scores.argmin())
        if scores[w] - scores[l] < 1e-6:
            counts["tied"] += 1
            continue
        if drop_url and any(mark in responses[w]["text"] for mark in ("http://", "https://", "www.")):
            counts["url"] += 1
            continue
        q = torch.sigmoid(m).mean(1)                                    # SPPO's win rate, the comparison with itself is 1/2
        row |= {"chosen": [{"role": "assistant", "content": responses[w]["text"]}],
                "rejected": [{"role": "assistant", "content": responses[l]["text"]}],
                "chosen_ids": responses[w]["ids"], "rejected_ids": responses[l]["ids"], "z": float(m[w, l]),
                "scores": scores.tolist(), "q_w": float(q[w]), "q_l": float(q[l]), "g_w": float(scores[w]), "g_l": float(scores[l])}
        write(row)
        counts["pairs"] += 1
    manifest["counts"] = counts
    counts["pairs"] or WORLD_SIZE > 1 or sys.exit(f"{candidates}: not one pair; {', '.join(f'{v} {k}' for k, v in counts.items() if v)}")
print(", ".join(f"{v} {k}" for k, v in counts.items() if v), "->", out)
