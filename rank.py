"""Rank candidate responses and make preference pairs of them: candidates -> pairs.

    python rank.py config/aipo_nemo.py --candidates=candidates.jsonl --out=pairs.jsonl
    torchrun --nproc-per-node=8 rank.py ...                8 GPUs, each its share of the prompts, 8 shards

Empty, unfinished and too long responses are left out first, then those a judge gave no readable score. What is left is ranked, equal
texts once, and the pair rule chooses among distinct texts. A prompt gives no pair when fewer than two responses are left, when all
of them are the same text, or when their scores tie; a pair is dropped when its scores are closer than min_gap or its chosen
response holds a URL. The manifest counts each case. Candidates from elsewhere may be bare texts: {"prompt": ..., "responses": [...]}.
"""
import collections
import math
import random
import re
import statistics
import sys

from configurator import configure, run_script
from nanoaipo.files import shard_path
from nanoaipo.processes import RANK, WORLD_SIZE
from nanoaipo.prompts import read_candidates
from nanoaipo.seeds import derive_seed
from nanoaipo.stages import open_stage, open_output

# ---- settings ----
candidates = ""                         # candidates file, folder or glob
out = ""                                # pairs file to write (JSONL)
ranker = "pairrm"                       # pairrm, llm-blender, reward, judge, answer or annotators (rankers.py)
ranker_model = "llm-blender/PairRM"     # folder or hub name; "policy": the policy itself; annotators: "pairrm:MODEL reward:MODEL ..."
model = ""                              # the policy that wrote the candidates, for ranker_model=policy
rank_batch_tokens = 4096                # tokens computed at once (pairrm, reward); a GPU takes more
pair_rule = "best_worst"                # best_worst, best_random, length_aware, short_long or right_wrong (PAIR_RULES)
max_pairs = 10                          # pairs per prompt at most (right_wrong; Iterative RPO: 10)
tier = 0.2                              # share of the range of scores that counts as top, as bottom (short_long)
min_gap = 0.0                           # smallest difference of scores in a pair
max_response_tokens = 2016              # longer responses are left out (AIPO: 2,016, of 2,048 generated)
drop_unfinished = True                  # leave out responses that were cut at the engine's limit
drop_url = True                         # no pair whose chosen response holds a URL (AIPO)
reward_temperature = 1.0                # z = difference of scores / temperature (reward, judge, answer)
judge_url = ""                          # OpenAI-compatible endpoint of the judge, key in OPENAI_API_KEY; empty: an engine here
judge_mode = "score"                    # score: 0 to 5 points each (Self-Rewarding); pairwise: two at a time, in both orders
judge_prompt = ""                       # file with {prompt} and {response}, or {response_a} and {response_b}; empty: ours in prompts/
judge_votes = 3                         # replies to every question (Self-Rewarding: 3)
judge_temperature = 0.7                 # of the judge's replies (ours)
judge_tokens = 512                      # longest reply of the judge
judge_concurrency = 16                  # requests under way at once, of each process
annotator_votes = 9                     # votes of each annotator, split by its probability; 0: one, for what it puts first
pseudo_count = 0.5                      # added to every count of votes before Bradley-Terry strengths are fitted
engine = "auto"                         # vllm, transformers, or auto: vllm where it is installed
dtype = "bfloat16"                      # of the computation; float32 on CPUs
generate_rows = 512                     # responses sampled at once (transformers)
tensor_parallel = 1                     # GPUs per engine (vllm)
gpu_memory = 0.9                        # share of a GPU's memory the engine may take (vllm)
seed = 0                                # of the run
config = configure(globals())


def best_worst(scores, lengths, draw):
    return [(scores.index(max(scores)), scores.index(min(scores)))]


def best_random(scores, lengths, draw):
    """The best against any that is worse (SPPO's and others' ablation)."""
    return [(scores.index(max(scores)), draw.choice([k for k, s in enumerate(scores) if s < max(scores)]))]


def short_long(scores, lengths, draw):
    """The shortest of the top tier against the longest of the bottom tier (Meta-Rewarding, 2407.19594)."""
    reach = tier * (max(scores) - min(scores))
    top = [k for k, s in enumerate(scores) if s >= max(scores) - reach]
    bottom = [k for k, s in enumerate(scores) if s <= min(scores) + reach]
    return [(min(top, key=lambda k: lengths[k]), max(bottom, key=lambda k: lengths[k]))]


def right_wrong(scores, lengths, draw):
    """Those of the highest score against those of the lowest, both in turn, no pair twice (Iterative RPO, 2404.19733)."""
    right, wrong = ([k for k, s in enumerate(scores) if s == edge] for edge in (max(scores), min(scores)))
    again = math.lcm(len(right), len(wrong))                            # after so many both begin anew: shift one
    return [(right[k % len(right)], wrong[(k + k // again) % len(wrong)]) for k in range(min(max_pairs, len(right) * len(wrong)))]


PAIR_RULES = {"best_worst": best_worst, "best_random": best_random, "length_aware": best_worst, "short_long": short_long,
              "right_wrong": right_wrong}


def per_token(values, lengths):
    """What one more token adds to a value among the responses of one prompt: least squares; 0 when all are equally long."""
    spread = [n - statistics.fmean(lengths) for n in lengths]
    return sum(s * v for s, v in zip(spread, values)) / sum(s * s for s in spread) if any(spread) else 0.0


def main():
    pair_rule in PAIR_RULES or sys.exit(f"--pair_rule={pair_rule}: there are {', '.join(PAIR_RULES)}")
    0 <= tier < 0.5 or sys.exit(f"--tier={tier}: from 0 to below 0.5, or top and bottom overlap")
    for key, least in {"max_pairs": 1, "judge_votes": 1, "judge_concurrency": 1, "annotator_votes": 0, "pseudo_count": 0.01, "reward_temperature": 1e-6}.items():
        config[key] >= least or sys.exit(f"--{key}={config[key]}: at least {least}")
    "@" in judge_url and sys.exit("--judge_url: holds a user or a key; the key belongs in OPENAI_API_KEY")
    policy = config.pop("model")
    if ranker_model == "policy":
        config["ranker_model"] = policy or sys.exit("--ranker_model=policy: --model is not set")
    named = config["ranker_model"]
    models = {f"annotator_model_{k}": path for k, spec in enumerate(named.split()) if (path := spec.partition(":")[2]) and ranker == "annotators"}
    manifest = open_stage(out, ".jsonl", config | models, "candidates", "ranker_model", *models)
    if manifest is None:
        return

    # ---- what competes
    reasons = ("prompts", "pairs", "unfinished", "too_long", "empty", "fewer_than_two", "identical", "tied", "unjudged", "gap", "url")
    counts, competing, n = collections.Counter(dict.fromkeys(reasons, 0)), [], -1
    for n, (_, row) in enumerate(read_candidates(candidates)):
        if n % WORLD_SIZE == RANK:
            kept = []
            for response in row.pop("responses"):
                reason = ("empty" if not response["text"].strip() else
                          "unfinished" if drop_unfinished and not response.get("finished", True) else
                          "too_long" if len(response.get("ids", ())) > max_response_tokens else "kept")
                kept.append(response) if reason == "kept" else counts.update([reason])
            competing.append((row, kept, list(dict.fromkeys(r["text"] for r in kept))))                      # distinct texts, in order
    n >= 0 or sys.exit(f"{candidates}: no candidates in it")
    counts["prompts"] = len(competing)

    # ---- scores and log-odds (torch is imported only now: a finished stage ends above)
    from nanoaipo.rankers import load_ranker
    labels = load_ranker(ranker, named, config, counts)([row | {"texts": texts} for row, _, texts in competing])

    # ---- pairs
    pairs = [pair for candidate, label in zip(competing, labels) for pair in pairs_of(*candidate, *label, counts)]
    counts["pairs"] = len(pairs)
    manifest["counts"], manifest["summary"] = dict(counts), summary(pairs)
    told = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
    pairs or WORLD_SIZE > 1 or sys.exit(f"{candidates}: not one pair; {told}")
    with open_output(out, manifest) as write:
        for pair in pairs:
            write(pair)
    print(told, "->", shard_path(out))
    if pairs:
        print("gap {gap:.3f}, z {z:.3f}; chosen {chosen:.1f} and rejected {rejected:.1f} {unit}; the longer one won in {longer_won:.1%} of {longer_won_n} prompts "
              "(95 %: {longer_won_95[0]:.1%} to {longer_won_95[1]:.1%})".format(**manifest["summary"]))


def pairs_of(row, kept, texts, rewards, odds, counts):
    """The pairs of one prompt, by the rule; counts why there are none. kept: its responses; rewards, odds: of its distinct texts."""
    place = [texts.index(r["text"]) for r in kept]                      # equal texts count as often as they were sampled
    odds = odds.double()[place][:, place]                                                                    # (N, N)
    scores = 2 * odds.mean(1) if rewards is None else rewards.double()[place]           # llm-blender's: mean of logit_ij - logit_ji
    if scores.isnan().any():
        judged = (~scores.isnan()).nonzero()[:, 0]
        counts["unjudged"] += len(kept) - len(judged)
        kept, scores, odds = [kept[k] for k in judged], scores[judged], odds[judged][:, judged]
    distinct = sorted({r["text"]: k for k, r in reversed(list(enumerate(kept)))}.values())                    # the first response of each text
    if len(distinct) < 2:
        counts["fewer_than_two" if len(kept) < 2 else "identical"] += 1
        return
    known = "prompt_ids" in row and all("ids" in r for r in kept)
    lengths = [len(r["ids"] if known else r["text"]) for r in kept]     # in tokens, or characters where only texts are known
    if pair_rule == "length_aware":                                     # what length explains within the prompt is taken out
        longer = scores.new_tensor(lengths) - statistics.fmean(lengths)
        scores = scores - per_token(scores.tolist(), lengths) * longer
        odds = odds - per_token(odds.mean(1).tolist(), lengths) * (longer[:, None] - longer)
    told = [scores[k].item() for k in distinct]
    if max(told) - min(told) < 1e-6:
        counts["tied"] += 1
        return
    q = odds.sigmoid().mean(1)                                          # SPPO's win rate, the comparison with itself is 1/2
    if not known:
        row = {k: v for k, v in row.items() if k != "prompt_ids"}       # a pair has all ids or none
    for a, b in PAIR_RULES[pair_rule](told, [lengths[k] for k in distinct], random.Random(derive_seed(seed, row["id"]))):
        w, l = distinct[a], distinct[b]
        if scores[w] - scores[l] < min_gap:
            counts["gap"] += 1
        elif drop_url and re.search(r"https?://|www\.", kept[w]["text"]):
            counts["url"] += 1
        else:
            yield row | ({"chosen_ids": kept[w]["ids"], "rejected_ids": kept[l]["ids"]} if known else {}) | {
                "chosen": [{"role": "assistant", "content": kept[w]["text"]}], "rejected": [{"role": "assistant", "content": kept[l]["text"]}],
                "z": float(odds[w, l]), "scores": scores.tolist(), "q_w": float(q[w]), "q_l": float(q[l]), "g_w": float(scores[w]), "g_l": float(scores[l])}


def summary(pairs):
    """Mean difference of scores and of log-odds, lengths, and how often the longer response won: this ranker's length bias on these data."""
    if not pairs:
        return {}
    size = lambda pair, key: len(pair[key + "_ids"]) if key + "_ids" in pair else len(pair[key][0]["content"])
    won = collections.defaultdict(list)                                 # pairs of one prompt are no independent votes
    for pair in pairs:
        if size(pair, "chosen") != size(pair, "rejected"):
            won[pair["id"]].append(size(pair, "chosen") > size(pair, "rejected"))
    n, share, z = len(won), statistics.fmean(statistics.fmean(w) for w in won.values()) if won else 0.5, 1.96
    middle, reach = share + z * z / 2 / max(n, 1), z * math.sqrt((share * (1 - share) + z * z / 4 / max(n, 1)) / max(n, 1))       # Wilson's interval
    return {"gap": statistics.fmean(p["g_w"] - p["g_l"] for p in pairs), "z": statistics.fmean(p["z"] for p in pairs),
            "longer_won": share, "longer_won_n": n, "longer_won_95": [(middle + sign * reach) / (1 + z * z / max(n, 1)) for sign in (-1, 1)],
            "chosen": statistics.fmean(size(p, "chosen") for p in pairs), "rejected": statistics.fmean(size(p, "rejected") for p in pairs),
            "unit": "tokens" if "chosen_ids" in pairs[0] else "characters"}


if __name__ == "__main__":
    run_script(main)
