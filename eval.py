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
from data import begin, is_right, manifest_of, read_candidates, write_json

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
def first_answers(path):
    """The record of every prompt and the first of its responses, by id."""
    found = {}
    for place, row in read_candidates(path):
        row["responses"] or sys.exit(f"{place}: no answer in it")
        row["id"] not in found or sys.exit(f"{place}: id '{row['id']}' is there twice; ids join records and must differ")
        found[row["id"]] = row, row["responses"][0]
    return found


ours, theirs = first_answers(answers) or sys.exit(f"{answers}: no answers in it"), first_answers(baseline)
missing = [k for k in ours if k not in theirs]
if missing:
    sys.exit(f"{baseline}: no answer to {len(missing)} of the prompts in {answers}, such as '{missing[0]}'")

# ---- who wins (torch is imported only now: a finished stage ends above) ----
from rankers import load_ranker

pairs = [(row, ours[name][1], theirs[name][1]) for name, (row, _) in ours.items()]
differ = [k for k, (_, a, b) in enumerate(pairs) if a["text"] != b["text"]]     # equal answers tie without being judged
judged = []
if differ:
    settings = {"rank_batch_tokens": rank_batch_tokens, "reward_temperature": 1.0}
    rank = load_ranker(eval_ranker, eval_ranker_model, settings, collections.Counter())
    judged = [odds for _, odds in rank([row | {"texts": [a["text"], b["text"]]} for row, a, b in (pairs[k] for k in differ)])]
won = [0.5] * len(pairs)
for k, m in zip(differ, judged):
    won[k] = 0.5 if abs(m[0, 1]) < 1e-6 else float(m[0, 1] > 0)

checked = [is_right(a["text"], row["answer"]) for row, a, _ in pairs if row.get("answer") is not None]
win_rate = mean(won)
scores = {
    "judge": f"{eval_ranker} {eval_ranker_model}",
    "n": len(ours),
    "win_rate": win_rate,
    "win_rate_se": math.sqrt(sum((w - win_rate) ** 2 for w in won) / max(1, len(won) - 1) / len(won)),
    "ties": won.count(0.5),
    "accuracy": mean(checked) if checked else None,
    "length": mean([len(a.get("ids", a["text"])) for _, a, _ in pairs]),        # tokens, end token included; characters of bare texts
    "baseline_length": mean([len(b.get("ids", b["text"])) for *_, b in pairs]),
    "finished": mean([a.get("finished", True) for _, a, _ in pairs]),
}
write_json(manifest_of(out), manifest)
write_json(out, scores)
print(f"win rate {win_rate:.3f} +- {scores['win_rate_se']:.3f} by {scores['judge']}, n {len(ours)}, "
      + (f"accuracy {scores['accuracy']:.3f}, " if checked else "") + f"{scores['length']:.1f} tokens, {scores['finished']:.0%} finished -> {out}")
if scores["length"] > 1.5 * scores["baseline_length"]:
    print(f"LENGTH ALARM: answers are {scores['length'] / scores['baseline_length']:.1f} times as long as the baseline's; judges like length, "
          "so do not read this win rate as quality")
