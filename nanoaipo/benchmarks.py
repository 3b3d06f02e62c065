"""AlpacaEval 2.0, MT-Bench and Arena-Hard: scores of judgment files in their official formats, and such files from a judge.

    scores = BENCHMARKS["mt_bench"].score(judgments, name, answers, tables)
    rows = BENCHMARKS["mt_bench"].judge(folder, answers, baseline, judge, asked)

Published judgments and our own go through the same functions. Rates are in percent. What a judge is asked, and about what, stands in
the benchmarks' own files (`folder`: a clone of theirs); nothing of them is kept here.
"""
import collections
import csv
import glob
import json
import os
import random
import re
import sys
import time

import numpy as np

from nanoaipo.data import read

REVISION = "2edc6fad8be6b14ea7230aabfd08188da6b8b814"                   # of tatsu-lab/alpaca_eval on the hub: its tables and baseline
PENALTY_C = 10 ** (4 / 9)                                               # inverse strength of L1, the one the leaderboard mostly ends up with
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")   # MT-Bench: ten questions each, from 81
REFERRED = ("math", "reasoning", "coding")                              # judged beside a reference answer
VERDICTS = {"A>>B": (1, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}               # share that A wins, weight
ALSO = {"B<<A": (1, 3), "B<A": (1, 1), "B=A": (0.5, 1), "A<B": (0, 1), "A<<B": (0, 3)}                   # read by Arena-Hard v2.0 only
FIX = "--baseline=alpaca_eval_gpt4_baseline.json has to say"
Benchmark = collections.namedtuple("Benchmark", "score judge")

# ---------------------------------------------------------------------------------------------- files


def answers_of(path):
    """{key: (texts of all turns, tokens or None)} and the model's name, from an official answers file of any benchmark or one of ours.

    key: the instruction (AlpacaEval), else question_id or uid. tokens: the length as the file has it (Arena-Hard).
    """
    found, names = {}, set()
    for place, row in read(path):
        try:
            key, tokens = row.get("question_id", row.get("uid", row.get("instruction"))), row.get("metadata", {}).get("token_len")
            if "output" in row:
                texts, name = [row["output"]], row.get("generator")
            elif "choices" in row:
                turns, name = row["choices"][0]["turns"], row["model_id"]
                texts = [t["content"] if isinstance(t, dict) else t for t in turns]
                tokens = turns[0].get("token_len") if isinstance(turns[0], dict) else None
            elif "messages" in row:
                said, name = [m["content"] for m in row["messages"] if m["role"] == "assistant"], row["model"]
                texts = [s["answer"] if isinstance(s, dict) else s for s in said]
            else:
                texts, name = [r["text"] for r in row["responses"][:1] + row.get("later_responses", [])], None
            if not isinstance(key, (str, int)) or not texts or not all(isinstance(t, str) for t in texts):
                raise ValueError
        except (LookupError, TypeError, ValueError, AttributeError):
            sys.exit(f"{place}: no answer as AlpacaEval, MT-Bench, Arena-Hard or generate.py --task=answers write it")
        key not in found or sys.exit(f"{place}: answers '{str(key)[:60]}' a second time")
        found[key], names = (texts, tokens), names | {name}
    len(names) == 1 or sys.exit(f"{path}: answers of {len(names)} models; one file each")
    return found, names.pop() or os.path.basename(path)


def one_model(rows, model, path, wanted):
    """The (place, row) of the model that is wanted, or of the only one there; and its name."""
    names = sorted({model(row) for _, row in rows})
    if not wanted and len(names) != 1:
        sys.exit(f"{path}: judgments of {len(names)} models ({', '.join(names[:9])}); --answer_name says which one to score")
    wanted = wanted or names[0]
    wanted in names or sys.exit(f"{path}: no judgments of --answer_name={wanted}, but of {', '.join(names[:9])}")
    return [(place, row) for place, row in rows if model(row) == wanted], wanted


def one_judge(rows, judge, path):
    names = sorted({judge(row) for _, row in rows})
    len(names) == 1 or sys.exit(f"{path}: judged by {' and by '.join(names)}; two judges are never put into one score, split the file")
    return names[0]


def once(rows, key):
    seen = {}
    for place, row in rows:
        key(row) not in seen or sys.exit(f"{place}: judges {str(key(row))[:70]} again, as {seen[key(row)]} did; remove the one that shall not count")
        seen[key(row)] = place


def judged_at(rows):
    """The day of the last judgment, or "unknown" where the file does not say."""
    stamps = [row["tstamp"] for _, row in rows if isinstance(row.get("tstamp"), (int, float))]
    return time.strftime("%Y-%m-%d", time.gmtime(max(stamps))) if stamps else "unknown"


def find(folder, pattern, origin):
    """The file of a benchmark's own that the pattern names, anywhere below the folder; of several the one with the shortest path.

    So of alpaca_eval_clf_gpt4_turbo/ and alpaca_eval_clf_cot_gpt4_turbo/ the first, and mt_bench/ rather than vicuna_bench/.
    """
    folder or sys.exit(f"--bench_data is not set: the benchmark's own files, such as git clone https://github.com/{origin}")
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "**", pattern), recursive=True), key=lambda name: (len(name), name))
    return found[0] if found else sys.exit(f"--bench_data={folder}: holds no {pattern}; it is in https://github.com/{origin}")


# ---------------------------------------------------------------------------------------------- AlpacaEval 2.0


def length_controlled(difference, won, others, extra=None):
    """Win probabilities (N,) were both answers of one length: the logistic model of length-controlled AlpacaEval (2404.04475).

    p = sigmoid(a tanh(difference / sd) + others b), fitted by Newton's method with the leaderboard's L1 penalty, then a = 0.
    difference (N,): characters or tokens, baseline minus model; won (N,): in [0, 1], nan is left out of the fit; others (N, K):
    further columns, of which one is 1. extra: features (R, 1 + K), targets (R,) and weights (R,) of rows that regularise.
    """
    spread = difference.std(ddof=1) if len(difference) > 1 else 0
    valid = ~np.isnan(won)
    features, target = np.column_stack([np.tanh(difference / (spread or 1)), others])[valid], won[valid]
    weight = np.ones(len(target))
    if extra:
        features, target, weight = np.vstack([features, extra[0]]), np.append(target, extra[1]), np.append(weight, extra[2])
    beta = np.zeros(features.shape[1])
    for _ in range(200):
        p, size = 1 / (1 + np.exp(-features @ beta)), np.sqrt(beta ** 2 + 1e-4)          # |beta|, smooth at 0
        gradient = features.T @ (weight * (target - p)) - beta / size / PENALTY_C
        step = np.linalg.solve((features.T * (weight * p * (1 - p))) @ features + np.diag(1e-4 / size ** 3 / PENALTY_C), gradient)
        beta += step / max(1, abs(step).max())
        if abs(step).max() < 1e-9:
            break
    return 1 / (1 + np.exp(-others @ beta[1:]))


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
    keys = [row["instruction"] for _, row in read(order, "instruction")] if order else sorted(difficulty)
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
    rows = list(read(judgments, "instruction", "output_1", "output_2", "preference"))
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


def error_of(values):
    """Standard error of the mean of (N,) values."""
    return values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0


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


# ---------------------------------------------------------------------------------------------- MT-Bench


def category_of(question):
    return CATEGORIES[(question - 81) // 10] if isinstance(question, int) and 81 <= question <= 160 else "other"


def score_mt_bench(judgments, name, answers, tables):
    """Mean of all ratings (1 to 10) of single-answer grading, by turn and by category; -1, a reply without a rating, is invalid."""
    rows = list(read(judgments, "question_id", "model", "judge", "score", "turn"))
    rows, name = one_model(rows, lambda r: r["model"], judgments, name)
    once(rows, lambda r: f"question {r['question_id']}, turn {r['turn']}")
    rated = [r for _, r in rows if r["score"] is not None and r["score"] >= 0] or sys.exit(f"{judgments}: not one rating of {name}")
    judge = one_judge(rows, lambda r: r["judge"] if isinstance(r["judge"], str) else r["judge"][0], judgments)
    categories = sorted({category_of(r["question_id"]) for r in rated}, key=[*CATEGORIES, "other"].index)

    def mean(which):
        kept = [r["score"] for r in rated if which(r)]
        return sum(kept) / len(kept) if kept else None

    return {"model": name, "judge": judge, "date": judged_at(rows),
            "n": len(rated), "invalid": len(rows) - len(rated), "missing": max(0, 160 - len(rows)),
            "score": mean(lambda r: True), "turn_1": mean(lambda r: r["turn"] == 1), "turn_2": mean(lambda r: r["turn"] == 2),
            "categories": {c: mean(lambda r: category_of(r["question_id"]) == c) for c in categories}}


def judge_mt_bench(folder, answers, baseline, judge, asked):
    """Single-answer grading of both turns; math, reasoning and coding beside a reference answer (the judge's own where there is one)."""
    prompts = find(folder, "judge_prompts.jsonl", "lm-sys/FastChat")
    templates = {row["name"]: row for _, row in read(prompts, "name", "prompt_template", "system_prompt")}
    own = os.path.join("reference_answer", glob.escape(judge) + ".jsonl")
    there = glob.glob(os.path.join(glob.escape(folder), "**", own), recursive=True)
    references, _ = answers_of(find(folder, own if there else "reference_answer/gpt-4.jsonl", "lm-sys/FastChat"))
    ours, name = answers_of(answers)
    rows, questions = [], []
    for place, question in read(find(folder, "question.jsonl", "lm-sys/FastChat"), "question_id", "category", "turns"):
        key, asks = question["question_id"], question["turns"]
        if key not in ours:
            continue
        given, referred = ours[key][0], question["category"] in REFERRED
        len(given) == len(asks) or sys.exit(f"{answers}: {len(given)} answers to the {len(asks)} turns of question {key}")
        not referred or key in references or sys.exit(f"{place}: its reference answer is missing in reference_answer/")
        fields = {"question": asks[0], "answer": given[0]}
        for kind, texts_of in (("question", asks), ("answer", given), ("ref_answer", references[key][0] if referred else ())):
            fields |= {f"{kind}_{n}": text for n, text in enumerate(texts_of, 1)}
        for turn in range(1, len(asks) + 1):
            template = templates["single" + "-math" * referred + "-v1" + "-multi-turn" * (turn > 1)]
            text = template["prompt_template"].format(**fields)
            rows.append({"question_id": key, "model": name, "judge": [judge, template["name"]], "user_prompt": text, "turn": turn})
            questions.append({"messages": [{"role": "system", "content": template["system_prompt"]}, {"role": "user", "content": text}],
                              "temperature": 0.0, "max_tokens": 2048, "about": [key, turn]})
    rows or sys.exit(f"{answers}: answers none of MT-Bench's questions")
    replies = [reply["reply"] for reply in asked(questions)]
    return [row | {"judgment": reply, "score": rating_of(reply), "tstamp": time.time()} for row, reply in zip(rows, replies)]


def rating_of(reply):
    """The first [[rating]], else the first [rating]; -1 without one."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply) or re.search(r"\[(\d+\.?\d*)\]", reply)
    return float(found[1]) if found else -1


# ---------------------------------------------------------------------------------------------- Arena-Hard


def score_arena_hard(judgments, name, answers, tables, resamples=1000):
    """Win rate against the baseline over two games a question; its 95 % interval by bootstrap over questions; average tokens.

    A strong verdict weighs 3. As every battle is against the baseline, the Bradley-Terry win probability is the weighted share won.
    v0.1 leaves out a game without a verdict, v2.0 (records with uid) the question. Battles files have the games one by one.
    """
    rows = list(read(judgments))
    battles = bool(rows) and "winner" in rows[0][1]
    rows, name = one_model(rows, lambda r: r["model_b"] if battles else r["model"], judgments, name)
    judge = "unknown (a battles file does not say)" if battles else one_judge(rows, lambda r: r["judge"], judgments)
    battles or once(rows, lambda r: r.get("question_id", r.get("uid")))
    won, invalid, groups = collections.defaultdict(lambda: np.zeros(2)), 0, {}
    for place, row in rows:
        key = row.get("question_id", row.get("uid"))
        if battles:
            games = [{"model_a": (0, 1), "model_b": (1, 1), "tie": (0.5, 1)}.get(row["winner"].partition(" ")[0])]
        else:
            known = VERDICTS | ALSO if "uid" in row else VERDICTS
            first, second = (known.get((game or {}).get("score")) for game in row["games"])
            games = [first and (1 - first[0], first[1]), second]        # game 1 shows the baseline as A
        invalid += games.count(None)
        for share, weight in () if "uid" in row and None in games else filter(None, games):
            won[key] += share * weight, weight
            groups[key] = row.get("category", "all")
    won or sys.exit(f"{judgments}: not one verdict on {name}")

    def table(keys):
        counts, draw = np.array([won[k] for k in keys]), np.random.default_rng(0)                            # (Q, [won, weight])
        drawn = counts[draw.integers(len(keys), size=(resamples, len(keys)))].sum(1)                         # (resamples, 2)
        interval = 100 * np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
        return {"n": len(keys), "win_rate": 100 * counts[:, 0].sum() / counts[:, 1].sum(), "ci": interval.tolist()}

    lengths = [tokens for _, tokens in answers_of(answers)[0].values()] if answers else [None]
    parts = {c: table([k for k in won if groups[k] == c]) for c in sorted(set(groups.values()))}
    return {"model": name, "judge": judge, "date": judged_at(rows), "invalid": invalid, **table(list(won)),
            "avg_tokens": None if None in lengths else int(np.mean(lengths)), **({"categories": parts} if len(parts) > 1 else {})}


def judge_arena_hard(folder, answers, baseline, judge, asked):
    """Two games a question; a judge that gives no verdict is asked once to go on and finish with one.

    The judge's prompt is read from judge_config.yaml, which the repository had until v2.0 put it into code.
    """
    import yaml
    with open(find(folder, "*judge_config*.y*ml", "lm-sys/arena-hard-auto (its tree of September 2024)"), encoding="utf-8") as f:
        settings = yaml.safe_load(f)
    for field in ("system_prompt", "prompt_template", "temperature", "max_tokens"):
        field in settings or sys.exit(f"{f.name}: '{field}' is missing")
    template = settings["prompt_template"] if isinstance(settings["prompt_template"], str) else settings["prompt_template"][0]
    baseline or sys.exit("--baseline is not set: the answers file of the model to compare with (v0.1: model_answer/gpt-4-0314.jsonl)")
    (ours, name), (theirs, other) = answers_of(answers), answers_of(baseline)
    asks = {row.get("question_id", row.get("uid")): row for _, row in read(find(folder, "question.jsonl", "lm-sys/arena-hard-auto"))}
    keys = [key for key in asks if key in ours] or sys.exit(f"{answers}: answers none of Arena-Hard's questions")
    lacking = [key for key in keys if key not in theirs]
    lacking and sys.exit(f"{baseline}: no answer to {len(lacking)} of the questions, such as '{lacking[0]}'")
    new, talks = "uid" in asks[keys[0]], []
    for key in keys:
        turn = asks[key].get("prompt") or asks[key]["turns"][0]
        question = turn if isinstance(turn, str) else turn["content"]
        for a, b in ((theirs[key][0][0], ours[key][0][0]), (ours[key][0][0], theirs[key][0][0])):
            text = template.format(question_1=question, answer_1=a, answer_2=b, QUESTION=question, ANSWER_A=a, ANSWER_B=b)
            talks.append([{"role": "system", "content": settings["system_prompt"]}, {"role": "user", "content": text}])

    def said(which):
        replies = asked([{"messages": talks[k], "temperature": float(settings["temperature"]), "max_tokens": settings["max_tokens"],
                          "about": [keys[k // 2], k % 2 + 1]} for k in which])
        return [reply["reply"] for reply in replies]

    judged = said(range(len(talks)))
    silent = [k for k, reply in enumerate(judged) if reply and not re.search(r"\[\[[AB<>=]+\]\]", reply)]
    for k in silent:
        talks[k] += [{"role": "assistant", "content": judged[k]},
                     {"role": "user", "content": "continue your judgment and finish by outputting a final verdict label"}]
    for k, reply in zip(silent, said(silent) if silent else ()):
        judged[k] += "\n" + reply
    games = [{"user_prompt": talk[1]["content"], "judgment": reply, "score": verdict_of(reply, new)} for talk, reply in zip(talks, judged)]
    who = {"model": name, "judge": judge, "baseline": other, "tstamp": time.time()}
    return [({"uid": key, "category": asks[key]["category"]} if new else {"question_id": key}) | who | {"games": games[2 * k:2 * k + 2]}
            for k, key in enumerate(keys)]


def verdict_of(reply, new):
    """The [[verdict]] of a reply, or None: v0.1 wants one distinct verdict, v2.0 takes the last, in single brackets if need be."""
    text = reply.upper() if new else reply
    found = re.findall(r"\[\[([AB<>=]+)\]\]", text) or (re.findall(r"\[([AB<>=]+)\]", text) if new else [])
    return found[-1] if found and (new or len(set(found)) == 1) else None


BENCHMARKS = {"alpaca_eval": Benchmark(score_alpaca_eval, judge_alpaca_eval), "mt_bench": Benchmark(score_mt_bench, judge_mt_bench),
              "arena_hard": Benchmark(score_arena_hard, judge_arena_hard)}
