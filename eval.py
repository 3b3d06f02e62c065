"""Evaluate answers: win rate by a judge here, or AlpacaEval 2.0, MT-Bench, Arena-Hard, WildBench.

    python eval.py config/tiny.py --out=eval.json \\
        --answers=out/tiny/iter_3/answers.jsonl --baseline=out/tiny/iter_0/answers.jsonl
    python eval.py --bench=alpaca_eval --out=alpaca.json \\
        --judgments=annotations.json.gz --lc_data=DIR
    python eval.py --bench=mt_bench --out=mt.json --answers=ANSWERS --judgments=judgments.jsonl \\
        --bench_data=FastChat/fastchat/llm_judge/data \\
        --judge_model=gpt-4.1-2025-04-14 --judge_url=https://api.openai.com/v1

win_rate needs no network. It reads candidates files (generate.py --n_responses=1), joins them by id
and takes the first response to each prompt. Where prompts carry `answer`, it also says what the
judge does not see: accuracy, the share of right responses, and followed, the share that do what an
`answer` of instructions lists. These two are the guard (nanoaipo/guard.py); --bench=guard gives
them alone, without a judge. For a benchmark it is answers -> judgments -> scores, with files
between: with a judge_model the judgments are asked for first, a published file is scored as it is.
Rates are in percent, intervals of 95 %.
"""

import collections
import math
import os
import time

import numpy as np

from configurator import configure, run_script
from nanoaipo.chat import template_arguments
from nanoaipo.errors import InputError
from nanoaipo.guard import GUARDS, NO_GUARD, guard_interval, guard_scores, lies_above
from nanoaipo.prompts import read_candidates
from nanoaipo.responses import answer_length
from nanoaipo.served import with_served
from nanoaipo.stages import fingerprint, manifest_path, open_stage, write_json_output
from nanoaipo.stats import LENGTH_ALARM, interval, length_controlled_interval, variety

# What imports torch takes seconds, so functions import it: before they run, a finished stage or bad
# input has ended the program

# fmt: off
# ---- settings ----
bench = "win_rate"                      # or guard, alpaca_eval, mt_bench, arena_hard, wild_bench
answers = ""                            # answers to evaluate: candidates, or a benchmark's answers
baseline = ""                           # answers to compare with; in the loop the first policy's
out = ""                                # scores to write (JSON)
eval_ranker = "pairrm"                  # win_rate: who judges; better not the ranker of the pairs
eval_ranker_model = "llm-blender/PairRM"     # folder or hub name, or a model at judge_url (judge)
rank_batch_tokens = 4096                # tokens computed at once (pairrm, reward); a GPU takes more
judgments = ""                          # in the official format; a judge_model writes them first
judge_model = ""                        # who is asked: model at judge_url, else folder or hub name
judge_url = ""                          # OpenAI-compatible endpoint; its key is OPENAI_API_KEY
judge_concurrency = 16                  # requests under way at once
verdict_tokens = 0                      # longest reply; 0: the benchmark's own (win_rate: 512)
bench_data = ""                         # folder with the benchmark's own prompts and questions
lc_data = ""                            # folder with AlpacaEval's df_gamed.csv; empty: from the hub
answer_name = ""                        # the model to score, where a file holds several
pool = ""                               # arena_hard: folder of other models, for style control
engine = "auto"                         # of a judge here: vllm, transformers, or auto
dtype = "bfloat16"                      # of the computation; take float32 on CPUs
generate_rows = 512                     # replies sampled at once (transformers)
tensor_parallel = 1                     # GPUs per engine (vllm)
gpu_memory = 0.9                        # share of a GPU's memory the engine may take (vllm)
seed = 0                                # of the run
template_kwargs = ""                    # of the chat template, JSON: {"enable_thinking": false}
date = ""                               # day in the chat template, YYYY-MM-DD; empty: today's
config = configure(globals())
# fmt: on


# ---- win rate against other answers to the same prompts ----


def evaluate_win_rate():
    """Write the scores of `answers` against `baseline` by the eval_ranker, and print them."""
    inputs = ["answers", "baseline"]
    settings = dict(config)
    judge = f"{eval_ranker} {eval_ranker_model}"
    if eval_ranker == "answer":  # reads no model
        settings["eval_ranker_model"] = ""
        judge = eval_ranker
    elif eval_ranker != "judge":  # a judge may be no more than a name at an endpoint
        inputs.append("eval_ranker_model")
    manifest = open_stage(out, ".json", settings, *inputs)
    if manifest is None:
        return

    prompts, ours, theirs = join_answers(answers, baseline)
    won = judge_answers(prompts, ours, theirs)

    # of a judge behind an endpoint, the model that it says it served
    from nanoaipo.rankers import who_answered

    manifest["served"] = who_answered(eval_ranker, eval_ranker_model, config)
    scores = {
        "bench": bench,
        "judge": judge,
        **manifest["served"].get(eval_ranker_model, {}),
        "date": time.strftime("%Y-%m-%d"),
        **score_answers(prompts, ours, theirs, won),
    }
    write_json_output(out, manifest, scores)
    print_win_rate(scores)
    print_length_alarm(scores)
    print_guard_alarms(scores)


def print_win_rate(scores):
    """Print the scores on one line, and before it one that says where no guard is."""
    text = {key: format_score(value) for key, value in scores.items()}
    who = with_served(scores["judge"], scores.get("served_model"))
    truth = ""
    if scores["accuracy"] is not None:
        truth += f"accuracy {text['accuracy']} %, "
    if scores["followed"] is not None:
        truth += f"followed {text['followed']} % (share {text['followed_share']} %), "
    guard_path = os.path.join(os.path.dirname(out), "guard.json")  # iterate.sh's
    if not truth and not os.path.exists(guard_path):
        print(NO_GUARD)
    print(
        f"win rate {text['win_rate']} % ({text['win_rate_ci']}), "
        f"length-controlled {text['lc_win_rate']} %, {truth}"
        f"{text['length']} {text['length_unit']}, n {text['n']}, by {who} -> {out}"
    )


def print_length_alarm(scores):
    """Say where the answers are far longer than the baseline's."""
    if scores["length"] > LENGTH_ALARM * scores["baseline_length"] > 0:
        ratio = scores["length"] / scores["baseline_length"]
        print(
            f"LENGTH ALARM: answers are {ratio:.1f} times as long as the baseline's; "
            "judges like length, so do not read this win rate as quality"
        )


def print_guard_alarms(scores):
    """Say where the answers beat the baseline's before the judge and fall behind them in truth."""
    if not lies_above(scores["win_rate_ci"], [50, 50]):
        return
    before = scores["guard_of_baseline"]
    for name, words in GUARDS.items():
        if lies_above(guard_interval(before, name), guard_interval(scores, name)):
            print(
                f"GUARD ALARM: win rate rises, guard falls: the judge prefers these answers "
                f"({scores['win_rate']:.1f} % wins), but the {words} is {scores[name]:.1f} %, and "
                f"{before[name]:.1f} % in the baseline's; their intervals do not touch"
            )


def join_answers(answers, baseline):
    """The prompts of `answers` and both first responses to each, as three lists of N records."""
    ours = first_responses(answers)
    if not ours:
        raise InputError(f"{answers}: no answers in it")
    theirs = first_responses(baseline)
    missing = [prompt_id for prompt_id in ours if prompt_id not in theirs]
    if missing:
        raise InputError(
            f"{baseline}: no answer to {len(missing)} of the prompts in {answers}, "
            f"such as '{missing[0]}'"
        )
    prompts = [prompt for prompt, _ in ours.values()]
    our_responses = [response for _, response in ours.values()]
    their_responses = [theirs[prompt_id][1] for prompt_id in ours]
    return prompts, our_responses, their_responses


def first_responses(path):
    """{id: (record, the first of its responses)} of a candidates file."""
    first = {}
    for where, row in read_candidates(path):
        if not row["responses"]:
            raise InputError(f"{where}: no answer in it")
        if row["id"] in first:
            raise InputError(
                f"{where}: id '{row['id']}' is there twice; ids join records and must differ"
            )
        first[row["id"]] = row, row["responses"][0]
    return first


def judge_answers(prompts, ours, theirs):
    """Wins (N,) of our answers: 1, 0, or 0.5 for a tie; nan where no verdict could be read."""
    won = np.full(len(prompts), 0.5)  # equal answers tie without being judged
    differ = [k for k in range(len(prompts)) if ours[k]["text"] != theirs[k]["text"]]
    if not differ:
        return won

    from nanoaipo.rankers import load_ranker

    settings = config | {
        "judge_mode": "pairwise",
        "judge_votes": 1,
        "judge_temperature": 0.0,
        "judge_tokens": verdict_tokens or 512,
    }
    rank = load_ranker(eval_ranker, eval_ranker_model, settings, collections.Counter())
    rows = [prompts[k] | {"texts": [ours[k]["text"], theirs[k]["text"]]} for k in differ]
    for k, (_, log_odds) in zip(differ, rank(rows)):
        won[k] = win_of(float(log_odds[0, 1]))
    return won


def win_of(log_odds):
    """1 for a win, 0 for a loss, 0.5 for a tie, nan for nan."""
    if math.isnan(log_odds):
        return math.nan
    if abs(log_odds) < 1e-6:
        return 0.5
    return float(log_odds > 0)


def n_characters(response):
    return len(response["text"])


def score_answers(prompts, ours, theirs, won):
    """All scores of our answers, with intervals; won (N,) as judge_answers gives it."""
    judged = won[~np.isnan(won)]
    if len(judged) == 0:
        raise InputError(f"--eval_ranker={eval_ranker}: not one readable verdict")

    # lengths in tokens, the end token included, where every answer has its ids; thoughts aside
    unit = "characters"
    length_of = n_characters
    if all("ids" in response for response in ours + theirs):
        unit = "tokens"
        length_of = answer_length
    lengths = np.array([length_of(response) for response in ours])  # (N,)
    baseline_lengths = np.array([length_of(response) for response in theirs])  # (N,)

    scores = {"n": len(judged), "invalid": len(won) - len(judged)}
    scores |= guard_scores(prompts, ours)
    scores["guard_of_baseline"] = guard_scores(prompts, theirs)
    measured = {
        "win_rate": 100 * judged,
        "length": lengths,
        "finished": [100 * response.get("finished", True) for response in ours],
    }
    for name, values in measured.items():
        scores[name], scores[name + "_ci"] = interval(values)
    difference = (baseline_lengths - lengths).astype(float)
    scores["lc_win_rate"], scores["lc_win_rate_ci"] = length_controlled_interval(difference, won)
    scores["ties"] = int((judged == 0.5).sum())
    scores["length_unit"] = unit
    scores["baseline_length"] = float(baseline_lengths.mean())
    return scores | variety([response["text"] for response in ours])


# ---- the guard alone ----


def evaluate_guard():
    """Write what the prompts' `answer` says of `answers`, and print it; nobody judges."""
    settings = {"bench": bench, "answers": answers}
    manifest = open_stage(out, ".json", settings, "answers")
    if manifest is None:
        return

    first = first_responses(answers).values()
    prompts = [prompt for prompt, _ in first]
    responses = [response for _, response in first]
    measured = guard_scores(prompts, responses)
    graded = [name for name in GUARDS if measured["n_" + name]]
    if not graded:
        raise InputError(f"{answers}: no prompt in it carries an 'answer'")

    scores = {
        "bench": bench,
        "judge": "answer",
        "date": time.strftime("%Y-%m-%d"),
        "n": measured["n_accuracy"] + measured["n_followed"],
        **measured,
    }
    write_json_output(out, manifest, scores)
    for name in graded:
        ends = format_score(guard_interval(scores, name))
        print(f"guard: {name} {scores[name]:.2f} % ({ends}), n {scores['n_' + name]} -> {out}")


# ---- benchmarks ----


def evaluate_benchmark():
    """Write the scores of a file of judgments, asking a judge for them first if there is one."""
    from nanoaipo.benchmarks import BENCHMARKS
    from nanoaipo.benchmarks.answers import check_benchmark
    from nanoaipo.benchmarks.style_control import pool_hash

    if bench not in BENCHMARKS:
        raise InputError(f"--bench={bench}: there are win_rate, guard, {', '.join(BENCHMARKS)}")
    if manifest_path(out) == manifest_path(judgments):
        raise InputError(f"--out={out}: has to differ from --judgments in more than the ending")
    if judge_model:
        if not answers:
            raise InputError("--answers is not set: what the judge_model shall judge")
        ask_for_judgments(BENCHMARKS[bench])

    # the scores depend on these settings alone
    files = {"answers": answers, "baseline": baseline, "lc_data": lc_data}
    inputs = [key for key, path in files.items() if path]
    settings = {"bench": bench, "answer_name": answer_name, "judgments": judgments, **files}
    if pool:
        if bench != "arena_hard":
            raise InputError(f"--pool={pool}: only arena_hard has style control")
        settings["pool"] = pool_hash(pool)
        files["pool"] = pool
    manifest = open_stage(out, ".json", settings, "judgments", *inputs)
    if manifest is None:
        return

    check_benchmark(judgments, bench)
    try:
        scores = BENCHMARKS[bench].score(judgments, answer_name, **files)
    except InputError:  # a ValueError that has its message
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise InputError(f"{judgments}: not judgments as {bench} has them ({reason})") from e
    scores = {"bench": bench, **scores}
    write_json_output(out, manifest, scores)

    for key, value in scores.items():
        print_score(key, value)
    print(f"{'':>18}  -> {out}")


def print_score(key, value):
    """A line of the table; categories with several scores each have a line of their own."""
    if key == "categories" and isinstance(next(iter(value.values()), None), dict):
        for name, part in value.items():
            print(f"{name:>18}  {format_score(part)}")
    else:
        print(f"{key:>18}  {format_score(value)}")


def ask_for_judgments(benchmark):
    """Write `judgments` by asking the judge_model, unless they are there and complete."""
    suffix = benchmark.SUFFIX
    if not judgments.endswith(suffix):
        raise InputError(f"--judgments={judgments}: the judge_model's go to a {suffix} file")

    # who is asked enters each question: what another judge has replied is no reply to it
    who = {"model": judge_model}
    if not judge_url:
        who |= {"weights": fingerprint(judge_model), "seed": seed}
        if template_kwargs:  # not the date: replies would depend on the day of the run
            who["template_kwargs"] = template_kwargs
    used = ("bench", "judge_model", "verdict_tokens", "bench_data", "answers", "baseline")
    settings = {key: config[key] for key in used} | {"judge": who}
    inputs = [key for key in ("answers", "baseline") if config[key]]
    manifest = open_stage(judgments, suffix, settings, *inputs)
    if manifest is None:
        return

    from nanoaipo.benchmarks.judging import write_judgments
    from nanoaipo.endpoints import endpoint
    from nanoaipo.questions import local_model

    if judge_url:
        answer = endpoint(judge_url, judge_concurrency)
    else:
        answer = local_model(
            judge_model,
            engine=engine,
            dtype=dtype,
            seed=seed,
            tensor_parallel=tensor_parallel,
            gpu_memory=gpu_memory,
            generate_rows=generate_rows,
            arguments=template_arguments(template_kwargs, date),
        )
    parameters = dict(who)
    if verdict_tokens:
        parameters["max_tokens"] = verdict_tokens
    n = write_judgments(
        benchmark, judgments, manifest, answer, parameters, bench_data, answers, baseline
    )
    print(f"{n} judgments, {manifest['counts']} -> {judgments}")


def format_score(value):
    """A score as text: numbers with two decimals, intervals and categories likewise."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_score(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " to ".join(format_score(bound) for bound in value)
    if isinstance(value, float):
        return f"{value:.2f}"
    return str(value)


def main():
    if bench == "win_rate":
        evaluate_win_rate()
    elif bench == "guard":
        evaluate_guard()
    else:
        evaluate_benchmark()


if __name__ == "__main__":
    run_script(main)
