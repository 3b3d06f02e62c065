"""Evaluate answers against those of another model: win rate by the ranker as judge, accuracy, lengths.

    python eval.py config/tiny.py --answers=out/tiny/iter_3/answers.jsonl --baseline=out/tiny/iter_0/answers.jsonl --out=eval.json

Answers are candidates files (generate.py --n_responses=1); the first response of each prompt counts. Prompts are joined by id.
Where prompts carry `answer`, the share of right answers is the truth that the judge does not see.
"""
import collections
import math
import sys
from statistics import fmean as mean

from configurator import configure
from data import begin, is_right, manifest_of, read, write_json

# ---- settings ----
answers = ""                            # answers to evaluate (candidates file)
baseline = ""                           # answers to compare with; in the loop those of the first policy
out = ""                                # scores to write (JSON)
eval_ranker = "pairrm"                  # who judges: pairrm, llm-blender or reward; not the ranker that labels, unless the recipe says so
eval_ranker_model = "llm-blender/PairRM"     # folder or hub name
rank_batch_tokens = 4096                # tokens computed at once (pairrm, reward); a GPU takes more
config = configure(globals())

eval_ranker in ("pairrm", "llm-blender", "reward") or sys.exit(f"--eval_ranker={eval_ranker}: there are pairrm, llm-blender and reward")

manifest = begin(out, ".json", config, "answers", "baseline", "eval_ranker_model")
if manifest is None:
    sys.exit(0)
ours = [row for _, row in read(answers, "id", "prompt", "responses")] or sys.exit(f"{answers}: no answers in it")
theirs = {row["id"]: row["responses"][0] for _, row in read(baseline, "id", "responses")}
missing = [row["id"] for row in ours if row["id"] not in theirs]
if missing:
    sys.exit(f"{baseline}: no answer to {len(missing)} of the prompts in {answers}, such as '{missing[0]}'")

# ---- who wins (torch is imported only now: a finished stage ends above) ----
from rankers import load_ranker

first = [row["responses"][0] for row in ours]
pairs = [(r["text"], theirs[row["id"]]["text"]) for r, row in zip(first, ours)]
differ = [k for k, (a, b) in enumerate(pairs) if a != b]                # equal answers tie without being judged
judged = []
if differ:
    settings = {"rank_batch_tokens": rank_batch_tokens, "reward_temperature": 1.0}
    rank = load_ranker(eval_ranker, eval_ranker_model, settings, collections.Counter())
    judged = [odds for _, odds in rank([{**ours[k], "texts": list(pairs[k])} for k in differ])]
won = [0.5] * len(pairs)
for k, m in zip(differ, judged):
    won[k] = 0.5 if abs(m[0, 1]) < 1e-6 else float(m[0, 1] > 0)

checked = [is_right(r["text"], row["answer"]) for r, row in zip(first, ours) if "answer" in row]
win_rate = mean(won)
scores = {
    "judge": f"{eval_ranker} {eval_ranker_model}",
    "n": len(ours),
    "win_rate": win_rate,
    "win_rate_se": math.sqrt(sum((w - win_rate) ** 2 for w in won) / max(1, len(won) - 1) / len(won)),
    "ties": won.count(0.5),
    "accuracy": mean(checked) if checked else None,
    "length": mean([len(r["ids"]) for r in first]),                     # tokens, end token included
    "baseline_length": mean([len(theirs[row["id"]]["ids"]) for row in ours]),
    "finished": mean([r["finished"] for r in first]),
}
write_json(manifest_of(out), manifest)
write_json(out, scores)
print(f"win rate {win_rate:.3f} +- {scores['win_rate_se']:.3f} by {scores['judge']}, n {len(ours)}, "
      + (f"accuracy {scores['accuracy']:.3f}, " if checked else "") + f"{scores['length']:.1f} tokens, {scores['finished']:.0%} finished -> {out}")
if scores["length"] > 1.5 * scores["baseline_length"]:
    print(f"LENGTH ALARM: answers are {scores['length'] / scores['baseline_length']:.1f} times as long as the baseline's; judges like length, "
          "so do not read this win rate as quality")
