"""Evaluate answers: win rate against another model's by a judge here, or AlpacaEval 2.0, MT-Bench, Arena-Hard from judgment files.

    python eval.py config/tiny.py --answers=out/tiny/iter_3/answers.jsonl --baseline=out/tiny/iter_0/answers.jsonl --out=eval.json
    python eval.py --bench=alpaca_eval --judgments=annotations.json.gz --lc_data=DIR --out=score.json
    python eval.py --bench=mt_bench --answers=ANSWERS --judge_model=gpt-4.1 --judge_url=https://api.openai.com/v1 \\
                   --bench_data=FastChat/fastchat/llm_judge/data --judgments=judgments.jsonl --out=score.json

Answers -> judgments -> scores, with files between: with a judge_model the judgments are asked for first, a published file is scored
as it is. Rates are in percent, intervals of 95 %. win_rate needs no network: candidates files (generate.py --n_responses=1), the first
response of each prompt counts, joined by id. Where prompts carry `answer`, accuracy is the truth that the judge does not see.
"""
import collections
import re
import sys
import time

from configurator import configure, run_script
from nanoaipo.files import write_json
from nanoaipo.grading import is_right
from nanoaipo.prompts import read_candidates
from nanoaipo.stages import open_stage, fingerprint, manifest_path
from nanoaipo.stats import LENGTH_ALARM

# ---- settings ----
bench = "win_rate"                      # win_rate (any prompts), alpaca_eval, mt_bench or arena_hard
answers = ""                            # answers to evaluate: candidates, or a benchmark's answers file
baseline = ""                           # answers to compare with; in the loop those of the first policy
out = ""                                # scores to write (JSON)
eval_ranker = "pairrm"                  # win_rate: who judges (rankers.py); not the ranker that labels, unless the recipe says so
eval_ranker_model = "llm-blender/PairRM"     # folder or hub name, or the name of a model at judge_url (judge)
rank_batch_tokens = 4096                # tokens computed at once (pairrm, reward); a GPU takes more
judgments = ""                          # a benchmark's judgments, official format (also .gz); written first if there is a judge_model
judge_model = ""                        # who is asked: the name of a model at judge_url, else a folder or hub name for an engine here
judge_url = ""                          # OpenAI-compatible endpoint of the judge, key in OPENAI_API_KEY
judge_concurrency = 16                  # requests under way at once
verdict_tokens = 0                      # longest reply; 0: the benchmark's own (AlpacaEval 1, MT-Bench 2048, Arena-Hard 4096; win_rate 512)
bench_data = ""                         # folder with the benchmark's own files: prompts of the judge, questions, reference answers
lc_data = ""                            # folder with AlpacaEval's df_gamed.csv; empty: from the hub
answer_name = ""                        # the model to score, where a file holds several
engine = "auto"                         # of a judge here: vllm, transformers, or auto
dtype = "bfloat16"                      # of the computation; float32 on CPUs
generate_rows = 512                     # replies sampled at once (transformers)
tensor_parallel = 1                     # GPUs per engine (vllm)
gpu_memory = 0.9                        # share of a GPU's memory the engine may take (vllm)
seed = 0                                # of the run
config = configure(globals())


def first_answers(path):
    """The record of every prompt and the first of its responses, by id."""
    found = {}
    for place, row in read_candidates(path):
        row["responses"] or sys.exit(f"{place}: no answer in it")
        row["id"] not in found or sys.exit(f"{place}: id '{row['id']}' is there twice; ids join records and must differ")
        found[row["id"]] = row, row["responses"][0]
    return found


def interval(values):
    """Mean of (N,) values and its 95 % interval [low, high]."""
    import numpy as np
    from nanoaipo.stats import error_of
    values = np.asarray(values, dtype=float)
    mean, half = float(values.mean()), 1.96 * float(error_of(values))
    return mean, [mean - half, mean + half]


def variety(texts):
    """Distinct-2 (share of distinct pairs of words among all answers') and self-similarity (mean cosine of TF-IDF between two answers).

    Intervals by the jackknife and from each answer's own mean. {} for fewer than two answers with two words.
    """
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    pairs = [collections.Counter(zip(w, w[1:])) for w in words if len(w) > 1]
    total, n = sum(pairs, collections.Counter()), len(pairs)
    if n < 2:
        return {}
    own = np.array([sum(total[g] == k for g, k in p.items()) for p in pairs])            # pairs of words that no other answer has
    size = np.array([p.total() for p in pairs])
    without = (len(total) - own) / (size.sum() - size)
    distinct, half = len(total) / size.sum(), 1.96 * np.sqrt((n - 1) * without.var())
    vectors = TfidfVectorizer(token_pattern=r"(?u)\w+").fit_transform([" ".join(w) for w in words if len(w) > 1])
    to_others = (vectors @ np.asarray(vectors.sum(0)).ravel() - 1) / (n - 1)             # (N,), mean cosine to the others
    same, half_same = to_others.mean(), 2 * 1.96 * to_others.std(ddof=1) / np.sqrt(n)
    return {"distinct_2": float(distinct), "distinct_2_ci": [float(distinct - half), float(distinct + half)],
            "self_similarity": float(same), "self_similarity_ci": [float(same - half_same), float(same + half_same)]}


def win_rate():
    """Scores of `answers` against `baseline` by the eval_ranker."""
    ours, theirs = first_answers(answers) or sys.exit(f"{answers}: no answers in it"), first_answers(baseline)
    missing = [k for k in ours if k not in theirs]
    missing and sys.exit(f"{baseline}: no answer to {len(missing)} of the prompts in {answers}, such as '{missing[0]}'")
    pairs = [(row, ours[name][1], theirs[name][1]) for name, (row, _) in ours.items()]

    # ---- who wins (torch is imported only now: a finished stage ends before)
    import numpy as np
    from nanoaipo.stats import length_controlled
    from nanoaipo.rankers import load_ranker
    differ = [k for k, (_, a, b) in enumerate(pairs) if a["text"] != b["text"]]          # equal answers tie without being judged
    counts, won = collections.Counter(), np.full(len(pairs), 0.5)
    if differ:
        settings = config | {"judge_mode": "pairwise", "judge_votes": 1, "judge_temperature": 0.0, "judge_tokens": verdict_tokens or 512}
        rank = load_ranker(eval_ranker, eval_ranker_model, settings, counts)
        for k, (_, m) in zip(differ, rank([row | {"texts": [a["text"], b["text"]]} for row, a, b in (pairs[k] for k in differ)])):
            won[k] = 0.5 if abs(m[0, 1]) < 1e-6 else float(m[0, 1] > 0) if m[0, 1] == m[0, 1] else np.nan
    judged = won[~np.isnan(won)]
    len(judged) or sys.exit(f"--eval_ranker={eval_ranker}: not one readable verdict")

    # ---- what the table says
    tokens = all("ids" in r for _, a, b in pairs for r in (a, b))
    lengths, others = ([len(pair[k]["ids" if tokens else "text"]) for pair in pairs] for k in (1, 2))
    difference, draw = np.subtract(others, lengths).astype(float), np.random.default_rng(0)

    def controlled(which):
        return length_controlled(difference[which], won[which], np.ones((len(which), 1)))[0]

    resampled = [controlled(draw.integers(len(won), size=len(won))) for _ in range(400)]
    checked = [100 * is_right(a["text"], row["answer"]) for row, a, _ in pairs if row.get("answer") is not None]
    scores = {"n": len(judged), "invalid": len(won) - len(judged)}
    finished = [100 * a.get("finished", True) for _, a, _ in pairs]
    for name, values in (("win_rate", 100 * judged), ("accuracy", checked), ("length", lengths), ("finished", finished)):
        scores[name], scores[name + "_ci"] = interval(values) if len(values) else (None, None)
    return scores | {
        "lc_win_rate": 100 * float(controlled(np.arange(len(won)))), "lc_win_rate_ci": (100 * np.percentile(resampled, [2.5, 97.5])).tolist(),
        "ties": int((judged == 0.5).sum()), "length_unit": "tokens" if tokens else "characters",                # the end token included
        "baseline_length": float(np.mean(others)), **variety([a["text"] for _, a, _ in pairs])}


def ask_judge():
    """Write `judgments` by asking judge_model; replies are kept as they came, beside it, and none is asked for twice."""
    own = {k: config[k] for k in ("bench", "judge_model", "verdict_tokens", "bench_data", "answers", "baseline")}
    suffix = ".json" if bench == "alpaca_eval" else ".jsonl"
    judgments.endswith(suffix) or sys.exit(f"--judgments={judgments}: the judge_model's go to a {suffix} file")
    who = {"model": judge_model} if judge_url else {"model": judge_model, "weights": fingerprint(judge_model), "seed": seed}
    manifest = open_stage(judgments, suffix, own | {"judge": who}, *(k for k in ("answers", "baseline") if config[k]))
    if manifest is None:
        return
    from nanoaipo.benchmarks import BENCHMARKS
    from nanoaipo.stages import open_output
    from nanoaipo.questions import ask, endpoint, local_model
    longest = {"max_tokens": verdict_tokens} if verdict_tokens else {}
    answer = endpoint(judge_url, judge_concurrency) if judge_url else local_model(judge_model, **{k: config[k] for k in ("engine", "dtype", "seed", "tensor_parallel", "gpu_memory", "generate_rows")})
    replies = []

    def asked(questions):
        came = ask([who | question | longest for question in questions], judgments, answer)
        replies.extend(came)
        if replies and all("error" in reply for reply in replies):
            sys.exit(f"--judge_model={judge_model}: not one reply to {len(came)} questions; the first: {came[0]['error']}")
        return came

    rows = BENCHMARKS[bench].judge(bench_data, answers, baseline, judge_model, asked)
    usage = [reply.get("usage") or {} for reply in replies]
    manifest["counts"] = {"replies": len(replies), "refused": sum("error" in reply for reply in replies),
                          **{kind: sum(u.get(kind) or 0 for u in usage) for kind in ("prompt_tokens", "completion_tokens")}}
    if judgments.endswith(".json"):
        write_json(manifest_path(judgments), manifest)
        write_json(judgments, rows)
    else:
        with open_output(judgments, manifest) as write:
            for row in rows:
                write(row)
    print(f"{len(rows)} judgments, {manifest['counts']} -> {judgments}")


def shown(value):
    """A score as text: two decimals, lists and dicts likewise."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " to ".join(map(shown, value))
    return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)


def main():
    if bench == "win_rate":
        needed = ["answers", "baseline"] + ["eval_ranker_model"] * (eval_ranker != "judge")
        manifest = open_stage(out, ".json", config, *needed)
    else:
        from nanoaipo.benchmarks import BENCHMARKS
        bench in BENCHMARKS or sys.exit(f"--bench={bench}: there are win_rate, {', '.join(BENCHMARKS)}")
        manifest_path(out) != manifest_path(judgments) or sys.exit(f"--out={out}: has to differ from --judgments in more than the ending")
        judge_model and (answers or sys.exit("--answers is not set: what the judge_model shall judge")) and ask_judge()
        own = {k: config[k] for k in ("bench", "answer_name", "judgments", "answers", "baseline", "lc_data")}
        manifest = open_stage(out, ".json", own, "judgments", *(k for k in ("answers", "baseline", "lc_data") if config[k]))
    if manifest is None:
        sys.exit(0)
    if bench == "win_rate":
        scores = {"bench": bench, "judge": f"{eval_ranker} {eval_ranker_model}", "date": time.strftime("%Y-%m-%d")} | win_rate()
    else:
        try:
            scores = {"bench": bench} | BENCHMARKS[bench].score(judgments, answer_name, answers, (lc_data, baseline))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
            sys.exit(f"{judgments}: not judgments as {bench} has them ({type(e).__name__}: {e})")
    write_json(manifest_path(out), manifest)
    write_json(out, scores)
    if bench == "win_rate":
        print("win rate {} % ({}), length-controlled {} %, accuracy {} %, {} {length_unit}, n {n}, by {judge} -> {out}".format(
            *(shown(scores[k]) for k in ("win_rate", "win_rate_ci", "lc_win_rate", "accuracy", "length")), **scores, out=out))
    else:
        print("\n".join(f"{key:>18}  {shown(value)}" for key, value in scores.items()), f"\n{'':>18}  -> {out}")
    if scores.get("baseline_length") and scores["length"] > LENGTH_ALARM * scores["baseline_length"]:
        print(f"LENGTH ALARM: answers are {scores['length'] / scores['baseline_length']:.1f} times as long as the baseline's; judges like length, "
              "so do not read this win rate as quality")


if __name__ == "__main__":
    run_script(main)
