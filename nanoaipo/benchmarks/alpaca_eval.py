"""AlpacaEval 2.0: annotations from a judge, win rate, length-controlled win rate.
"""
import csv
import glob
import os
import random
import re
import sys
import time

import numpy as np

from nanoaipo.benchmarks.answers import answers_of, find, judged_at, once, one_judge, one_model
from nanoaipo.files import read_records
from nanoaipo.stats import error_of, length_controlled

REVISION = "2edc6fad8be6b14ea7230aabfd08188da6b8b814"                   # of tatsu-lab/alpaca_eval on the hub: its tables and baseline
FIX = "--baseline=alpaca_eval_gpt4_baseline.json has to say"


def length_tables(folder, baseline):
    """({instruction: difficulty}, the rows that regularise, as length_controlled takes them), of a folder or the hub; None: not to be had.

    df_gamed.csv holds both by the index of the instruction, and the baseline's answers are in that order; without them the keys are
    the indices themselves.
    """
    if folder:
        gamed, names = find(folder, "df_gamed*.csv", "tatsu-lab/alpaca_eval"), ("*baseline*.json*", "instructions.json*")
        below = [f for name in names for f in sorted(glob.glob(os.path.join(glob.escape(folder), "**", name), recursive=True))]
        order = below[0] if below else baseline                         # the official one first: another baseline's order may differ
    else:
        try:
            gamed, order = from_hub("df_gamed.csv"), from_hub("alpaca_eval_gpt4_baseline.json")
        except Exception as e:                                          # network, hub and cache have a class each
            print(f"no length-controlled win rate: {type(e).__name__} for df_gamed.csv of tatsu-lab/alpaca_eval; --lc_data names a folder with it")
            return None
    try:
        with open(gamed, encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
        difficulty = {int(row["index"]): float(row["instruction_difficulty"]) for row in rows}
        table = np.array([[np.tanh(float(row["std_delta_len"])), float(row["instruction_difficulty"]), row["not_gamed_baseline"] == "True",
                           float(row["preference"] or "nan")] for row in rows])
    except (LookupError, TypeError, ValueError) as e:
        sys.exit(f"{gamed}: not AlpacaEval's table of index, preference, std_delta_len, instruction_difficulty, not_gamed_baseline ({e})")
    keys = [row["instruction"] for _, row in read_records(order, "instruction")] if order else sorted(difficulty)
    len(keys) == len(difficulty) or sys.exit(f"{order}: {len(keys)} instructions, {gamed} has {len(difficulty)}; all of them are needed, in order")
    table = table[~np.isnan(table[:, 3])]
    return dict(zip(keys, map(difficulty.get, sorted(difficulty)))), (table[:, :3], table[:, 3], np.full(len(table), 0.2 / 2))


def from_hub(name):
    from huggingface_hub import hf_hub_download
    return hf_hub_download("tatsu-lab/alpaca_eval", name, repo_type="dataset", revision=REVISION)


def score_alpaca_eval(judgments, name, answers, tables):
    """Win rate from weighted preferences (1: baseline, 2: model; 0: a tie), average characters, length-controlled win rate.

    tables: (folder, baseline) for length_tables. A preference that is null is invalid: out of the win rate and of the fit.
    """
    rows = list(read_records(judgments, "instruction", "output_1", "output_2", "preference"))
    rows, name = one_model(rows, lambda r: r.get("generator_2", "unknown"), judgments, name)
    once(rows, lambda r: r["instruction"])
    for place, row in rows:
        for key in ("instruction", "output_1", "output_2"):
            isinstance(row[key], str) or sys.exit(f"{place}: '{key}' has to be a text")
    won = np.array([np.nan if r["preference"] is None else (r["preference"] or 1.5) - 1 for _, r in rows], dtype=float)
    valid = won[~np.isnan(won)]
    len(valid) or sys.exit(f"{judgments}: not one preference of {name} that is not null")
    0 <= valid.min() and valid.max() <= 1 or sys.exit(f"{judgments}: a preference is between 1 and 2, or 0, or null")
    lengths = [len(texts[0]) for texts, _ in answers_of(answers)[0].values()] if answers else [len(r["output_2"]) for _, r in rows]
    scores = {"model": name, "judge": one_judge(rows, lambda r: r.get("annotator", "unknown"), judgments), "date": judged_at(rows),
              "n": len(valid), "invalid": len(won) - len(valid), "missing": max(0, 805 - len(rows)),
              "win_rate": 100 * valid.mean(), "standard_error": 100 * error_of(valid), "discrete_win_rate": 50 * (1 + np.sign(valid - 0.5).mean()),
              "lc_win_rate": None, "lc_standard_error": None, "avg_length": int(np.mean(lengths))}
    told = length_tables(*tables)
    if told:
        difficulty, extra = told
        keys = [r["instruction"] for _, r in rows]
        if 0 in difficulty:                                             # nothing says the order of the instructions
            known = all("index" in r for _, r in rows)
            known or len(rows) == len(difficulty) or sys.exit(f"{judgments}: which {len(rows)} of the instructions these are, {FIX}")
            known or print(f"{judgments}: taken to be in the benchmark's own order; if it is not, {FIX}")
            keys = [r.get("index", k) for k, (_, r) in enumerate(rows)]
        for key, (place, _) in zip(keys, rows):
            key in difficulty or sys.exit(f"{place}: its instruction is not one of AlpacaEval's {len(difficulty)}")
        longer = np.array([len(r["output_1"]) - len(r["output_2"]) for _, r in rows], dtype=float)
        p = length_controlled(longer, won, np.column_stack([[difficulty[key] for key in keys], np.ones(len(rows))]), extra)
        scores |= {"lc_win_rate": 100 * p.mean(), "lc_standard_error": 100 * error_of(p)}
    from_text = sum(r.get("verdict_from") == "text" for _, r in rows)
    return scores | ({"verdicts_from_text": from_text} if from_text else {})


def judge_alpaca_eval(folder, answers, baseline, judge, asked):
    """Annotations of the model's answers against the baseline's: one call each, which stands first is a coin flip by the instruction.

    The preference is 2 - P(m) / (P(m) + P(M)) of the first token, or the last m or M of the text where a judge gives no log-probs.
    """
    with open(find(folder, "*alpaca_eval_clf*.txt", "tatsu-lab/alpaca_eval"), encoding="utf-8") as f:
        turns = [t.partition("\n") for t in re.findall(r"<\|im_start\|>(.*?)<\|im_end\|>", f.read(), re.DOTALL)]
    try:
        baseline = baseline or from_hub("alpaca_eval_gpt4_baseline.json")
    except Exception as e:                                              # network, hub and cache have a class each
        sys.exit(f"--baseline is not set, and alpaca_eval_gpt4_baseline.json cannot be had from the hub ({type(e).__name__})")
    (ours, name), (theirs, other) = answers_of(answers), answers_of(baseline)
    rows, questions = [], []
    for instruction in filter(ours.__contains__, theirs):
        a, b = theirs[instruction][0][0], ours[instruction][0][0]
        swapped = random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]
        shown = {"{instruction}": instruction, "{output_1}": b if swapped else a, "{output_2}": a if swapped else b}
        row = {"instruction": instruction, "output_1": a, "generator_1": other, "output_2": b, "generator_2": name, "annotator": judge}
        rows.append((row, swapped, a == b))
        texts = [re.sub(r"\{(instruction|output_[12])\}", lambda m: shown[m[0]], text.strip()) for *_, text in turns]        # in one go
        question = {"messages": [{"role": role, "content": text} for (role, *_), text in zip(turns, texts)], "temperature": 1.0, "max_tokens": 1}
        questions += [question | {"logprobs": True, "top_logprobs": 5, "about": instruction[:80]}] * (a != b)
    rows or sys.exit(f"{answers}: answers none of the instructions of {baseline}")
    replies, judged = iter(asked(questions)), []
    for row, swapped, equal in rows:
        reply = {} if equal else next(replies)
        preference = 1.5 if equal else preference_of(reply)
        row |= {"preference": 3 - preference if swapped and preference is not None else preference, "raw_completion": reply, "tstamp": time.time()}
        judged.append(row | ({} if equal or (reply.get("logprobs") or {}).get("content") else {"verdict_from": "text"}))
    return judged


def preference_of(reply):
    """1 (what was shown as m) to 2 (M) from a reply's log-probs, else from its text; None if neither says."""
    tokens = (reply.get("logprobs") or {}).get("content")
    if tokens:
        top = {t["token"]: np.exp(t["logprob"]) for t in tokens[0]["top_logprobs"]}
        both = top.get("m", 0) + top.get("M", 0)
        return 2 - float(top.get("m", 0) / both) if both else None
    found = re.findall(r"(?<![\w'])[mM](?![\w'])", reply["reply"])
    return {"m": 1.0, "M": 2.0}[found[-1]] if found else None
