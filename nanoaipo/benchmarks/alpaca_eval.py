"""AlpacaEval 2.0: annotations from a judge, win rate, length-controlled win rate (2404.04475)."""

import csv
import random
import re
import time

import numpy as np

from nanoaipo.benchmarks.answers import (
    check_no_duplicates,
    files_below,
    find_bench_file,
    last_day,
    only_judge,
    read_answers,
    select_model,
)
from nanoaipo.errors import InputError
from nanoaipo.files import read_records
from nanoaipo.logprobs import first_token
from nanoaipo.served import served_fields, served_scores
from nanoaipo.stats import length_controlled, standard_error
from nanoaipo.verdicts import without_thought

REPOSITORY = "tatsu-lab/alpaca_eval"
REVISION = "2edc6fad8be6b14ea7230aabfd08188da6b8b814"  # of the data set on the hub
BASELINE = "alpaca_eval_gpt4_baseline.json"
SUFFIX = ".json"  # of a judgments file: an array of annotations, as the official code writes it
N_INSTRUCTIONS = 805


def download(name):
    """Path of a file of the official data set, from the hub or its cache."""
    from huggingface_hub import hf_hub_download

    return hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=REVISION)


# ---- score ----


def score(judgments, model, *, answers="", lc_data="", baseline=""):
    """Scores of a file of annotations: win rates, the length-controlled one, average characters.

    A preference is weighted, from 1 (baseline) to 2 (model), 0 being a tie too; null is invalid
    and enters neither the win rate nor the fit. model: whose annotations, where the file has
    several. answers: its answers file, for the lengths; else those in the annotations count.
    lc_data, baseline: where length_tables looks. Raises InputError.
    """
    rows, model = read_annotations(judgments, model)
    won = np.array([win(row["preference"]) for _, row in rows], dtype=float)  # (N,), nan: invalid
    valid = won[~np.isnan(won)]
    if len(valid) == 0:
        raise InputError(f"{judgments}: not one preference of {model} that is not null")
    if valid.min() < 0 or valid.max() > 1:
        raise InputError(f"{judgments}: a preference is between 1 and 2, or 0, or null")

    lengths = [len(row["output_2"]) for _, row in rows]
    if answers:
        lengths = [len(answer.texts[0]) for answer in read_answers(answers)[0].values()]

    # standard errors, not intervals: they are what the leaderboard shows
    scores = {
        "model": model,
        "judge": only_judge(rows, lambda r: r.get("annotator", "unknown"), judgments),
        **served_scores([row for _, row in rows], judgments),
        "date": last_day(rows),
        "n": len(valid),
        "invalid": len(won) - len(valid),
        "missing": max(0, N_INSTRUCTIONS - len(rows)),
        "win_rate": 100 * valid.mean(),
        "standard_error": 100 * standard_error(valid),
        "discrete_win_rate": 50 * (1 + np.sign(valid - 0.5).mean()),
        "lc_win_rate": None,
        "lc_standard_error": None,
        "avg_length": int(np.mean(lengths)),
    }
    tables = length_tables(lc_data, baseline)
    if tables is not None:  # else the hub cannot be reached, and the rest still counts
        difficulty, extra = tables
        p = win_at_equal_length(rows, won, difficulty, extra, judgments)  # (N,)
        scores["lc_win_rate"] = 100 * p.mean()
        scores["lc_standard_error"] = 100 * standard_error(p)

    # verdicts by a judge without log-probs are coarser than the published ones: say how many
    from_text = sum(row.get("verdict_from") == "text" for _, row in rows)
    if from_text:
        scores["verdicts_from_text"] = from_text
    return scores


def read_annotations(path, model):
    """The (where, record) pairs about one model, one for each instruction, and its name."""
    fields = ("instruction", "output_1", "output_2", "preference")
    rows = list(read_records(path, *fields))
    rows, model = select_model(rows, lambda r: r.get("generator_2", "unknown"), path, model)
    check_no_duplicates(rows, lambda r: r["instruction"])
    for where, row in rows:
        for field in ("instruction", "output_1", "output_2"):
            if not isinstance(row[field], str):
                raise InputError(f"{where}: '{field}' has to be a text")
    return rows, model


def win(preference):
    """How much the model wins, from 0 to 1; nan without a preference."""
    if preference is None:
        return np.nan
    if preference == 0:  # how AlpacaEval writes a tie
        return 0.5
    return preference - 1


def win_at_equal_length(rows, won, difficulty, extra, judgments):
    """Probability (N,) that the model wins were both answers of one length.

    won (N,); difficulty and extra: as length_tables returns them; judgments: for messages.
    """
    # the key of each row in `difficulty`
    keys = [row["instruction"] for _, row in rows]
    if 0 in difficulty:  # its keys are indices: nothing says which instruction has which
        if not all("index" in row for _, row in rows):
            if len(rows) != len(difficulty):
                raise InputError(
                    f"{judgments}: which {len(rows)} of the instructions these are, "
                    f"--baseline={BASELINE} has to say"
                )
            print(
                f"{judgments}: taken to be in the benchmark's own order; if it is not, "
                f"--baseline={BASELINE} has to say"
            )
        keys = [row.get("index", k) for k, (_, row) in enumerate(rows)]
    for key, (where, _) in zip(keys, rows):
        if key not in difficulty:
            raise InputError(
                f"{where}: its instruction is not one of AlpacaEval's {len(difficulty)}"
            )

    # characters, as the leaderboard counts
    difference = [len(row["output_1"]) - len(row["output_2"]) for _, row in rows]
    difference = np.array(difference, dtype=float)  # (N,)
    others = np.column_stack([[difficulty[key] for key in keys], np.ones(len(rows))])  # (N, 2)
    return length_controlled(difference, won, others, extra)


def length_tables(lc_data, baseline):
    """What the length-controlled fit takes from elsewhere, or None where it cannot be had.

    Returns {instruction: difficulty} and the rows that regularise the fit, as length_controlled
    takes them. df_gamed.csv holds both by the index of the instruction, and the baseline's answers
    are in that order; where there are no such answers, the keys are the indices. Both files are
    looked for in the folder lc_data, or on the hub when it is empty. Raises InputError for a table
    of another kind.
    """
    if lc_data:
        gamed = find_bench_file(lc_data, "df_gamed*.csv", REPOSITORY)
        # the folder's own before `baseline`, whose order may differ
        ordered = sorted(files_below(lc_data, "*baseline*.json*"))
        ordered += sorted(files_below(lc_data, "instructions.json*"))
        order = ordered[0] if ordered else baseline
    else:
        try:
            gamed = download("df_gamed.csv")
            order = download(BASELINE)
        except Exception as e:  # network, hub and cache have a class each
            print(
                f"no length-controlled win rate: {type(e).__name__} for df_gamed.csv of "
                f"{REPOSITORY}; --lc_data names a folder with it"
            )
            return None

    difficulty, extra = read_gamed(gamed)
    if not order:
        return difficulty, extra

    # from the index of an instruction to the instruction itself
    instructions = [row["instruction"] for _, row in read_records(order, "instruction")]
    if len(instructions) != len(difficulty):
        raise InputError(
            f"{order}: {len(instructions)} instructions, {gamed} has {len(difficulty)}; "
            "all of them are needed, in order"
        )
    return dict(zip(instructions, difficulty.values())), extra


def read_gamed(path):
    """{index: difficulty} in order of the index, and the rows that regularise, of df_gamed.csv."""
    difficulty = {}
    features = []
    targets = []
    try:
        with open(path, encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f):
                difficulty[int(row["index"])] = float(row["instruction_difficulty"])
                longer = np.tanh(float(row["std_delta_len"]))
                not_gamed = row["not_gamed_baseline"] == "True"
                features.append([longer, float(row["instruction_difficulty"]), not_gamed])
                targets.append(float(row["preference"] or "nan"))
    except (LookupError, TypeError, ValueError) as e:
        raise InputError(
            f"{path}: not AlpacaEval's table of index, preference, std_delta_len, "
            f"instruction_difficulty, not_gamed_baseline ({e})"
        ) from e

    # a row without a preference says nothing; the others weigh as the official code weighs them
    targets = np.array(targets)
    judged = ~np.isnan(targets)
    features = np.array(features)[judged]  # (R, 3)
    targets = targets[judged]  # (R,)
    weights = np.full(len(targets), 0.2 / 2)  # (R,)
    return dict(sorted(difficulty.items())), (features, targets, weights)


# ---- judge ----


def judge(ask, bench_data, answers, baseline, judge_model):
    """Annotations of the model's answers against the baseline's, one question to the judge each.

    Which answer stands first is a coin flip seeded by the instruction. Equal answers tie without
    being judged.
    """
    template = read_template(bench_data)
    if not baseline:
        try:
            baseline = download(BASELINE)
        except Exception as e:  # network, hub and cache have a class each
            raise InputError(
                f"--baseline is not set, and {BASELINE} cannot be had from the hub "
                f"({type(e).__name__})"
            ) from e
    ours, name = read_answers(answers)
    theirs, baseline_name = read_answers(baseline)

    # all annotations in the baseline's order, and a question about each that is not a tie
    rows = []
    questions = []
    for instruction in theirs:
        if instruction not in ours:
            continue
        row = {
            "instruction": instruction,
            "output_1": theirs[instruction].texts[0],
            "generator_1": baseline_name,
            "output_2": ours[instruction].texts[0],
            "generator_2": name,
            "annotator": judge_model,
        }
        rows.append(row)
        if row["output_1"] != row["output_2"]:
            questions.append(question_about(row, template))
    if not rows:
        raise InputError(f"{answers}: answers none of the instructions of {baseline}")

    # the replies come in the order of the questions
    replies = iter(ask(questions))
    for row in rows:
        if row["output_1"] == row["output_2"]:
            row |= {"preference": 1.5, "raw_completion": {}, "tstamp": time.time()}
            continue
        reply = next(replies)
        preference = preference_of(reply)
        if preference is not None and is_switched(row["instruction"]):
            preference = 3 - preference  # back from "for M" to "for the model"
        row |= {"preference": preference, "raw_completion": reply, "tstamp": time.time()}
        row |= served_fields(reply)
        if first_token(reply) is None:
            row["verdict_from"] = "text"
    return rows


def read_template(bench_data):
    """[(role, text with {instruction}, {output_1}, {output_2})] of what the judge is asked."""
    path = find_bench_file(bench_data, "*alpaca_eval_clf*.txt", REPOSITORY)
    with open(path, encoding="utf-8") as f:
        turns = re.findall(r"<\|im_start\|>(.*?)<\|im_end\|>", f.read(), re.DOTALL)
    template = []
    for turn in turns:
        role, _, text = turn.partition("\n")
        template.append((role, text.strip()))
    return template


def is_switched(instruction):
    """Whether the model's answer is shown first, as the official code flips its coin."""
    rng = random.Random(f"is_switched_outputs{instruction}0")
    return rng.choices([False, True])[0]


def question_about(row, template):
    """The question to the judge about an annotation to be."""
    first, second = row["output_1"], row["output_2"]
    if is_switched(row["instruction"]):
        first, second = second, first

    # filled in one go, so that a placeholder inside an answer stays text
    values = {"{instruction}": row["instruction"], "{output_1}": first, "{output_2}": second}
    messages = []
    for role, text in template:
        filled = re.sub(r"\{(instruction|output_[12])\}", lambda m: values[m[0]], text)
        messages.append({"role": role, "content": filled})

    # one token decides: its log-probs are the judge's confidence
    return {
        "messages": messages,
        "temperature": 1.0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 5,
        "about": row["instruction"][:80],
    }


def preference_of(reply):
    """From 1 (for what was shown as m) to 2 (for M), or None if the reply does not say.

    2 - P(m) / (P(m) + P(M)) of the first token, or the last m or M of the text where a judge
    gives no log-probs.
    """
    top = first_token(reply)
    if top is not None:
        both = top.get("m", 0) + top.get("M", 0)
        if not both:
            return None
        return 2 - top.get("m", 0) / both

    answer = without_thought(reply["reply"])
    letters = re.findall(r"(?<![\w'’])[mM](?![\w'’])", answer)  # not that of "I’m sorry"
    if not letters:
        return None
    return {"m": 1.0, "M": 2.0}[letters[-1]]
