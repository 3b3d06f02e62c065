"""Judging the judge: how often a ranker is right where it is known which response is.

    rows = read_preferences("rewardbench2.jsonl")
    measured = agreement(rows, scores)          scores: the ranker's, one list for each row
    print_agreement(measured)

A row is a prompt with right and wrong responses: a pair in any layout of nanoaipo/rows.py;
RewardBench 2's (2506.01937), where `chosen` and `rejected` are lists of texts, most often one and
three; or AlpacaEval's annotations, where all annotators of a pair have a vote. It is won where
every right response is above every wrong one. With `subset` in the rows each subset has its own
accuracy. Length has two: where the longest response is a right one, and where it is a wrong one,
which is what a policy would exploit.
"""

import math
import statistics

import numpy as np

from nanoaipo.benchmarks.alpaca_eval import win
from nanoaipo.files import read_records
from nanoaipo.messages import Dropped, UnusableRow
from nanoaipo.prompts import own_id, responses_of_pair, with_thought_apart
from nanoaipo.rows import prompt_messages, with_system
from nanoaipo.stats import wilson_interval

TIED = 1e-6  # scores that are closer than this are equal


# ---- preferences ----


def read_preferences(path):
    """Rows with `id`, `prompt` (messages), `responses` and `n_right`: the first n_right are right.

    Responses are objects with a text, their thoughts kept apart. A row that is no preference, or
    has the same text on both sides, is left out, and a line says so. Raises InputError if no row is
    left.
    """
    rows = []
    dropped = Dropped()
    for n, (where, row) in enumerate(merge_annotations(read_records(path))):
        try:
            prompt, right, wrong = right_and_wrong(where, row)
            check_differ(where, right, wrong)
        except UnusableRow as e:
            dropped.add(e.reason, e)
            continue

        # the right ones first, which tells no ranker: it reads one response, or two in both orders
        row["id"] = own_id(row, ("id",)) or str(n)
        row["prompt"] = prompt
        row["responses"] = right + wrong
        row["n_right"] = len(right)
        rows.append(row)

    dropped.check_left(path, rows, "preference")
    dropped.print(path)
    return rows


def merge_annotations(records):
    """The (where, row) pairs, in which AlpacaEval's annotations of one pair of outputs are one row.

    Its `preferences` are those of all annotators. Other rows are as they were.
    """
    merged = []
    first = {}  # (instruction, input, both outputs): the row of its first annotation
    for where, row in records:
        if "preference" in row and "output_1" in row:
            fields = ("instruction", "input", "output_1", "output_2")
            key = tuple(str(row.get(field)) for field in fields)
            preference = row.pop("preference")
            if key in first:
                first[key]["preferences"].append(preference)
                continue
            row["preferences"] = [preference]
            first[key] = row
        merged.append((where, row))
    return merged


def annotated(where, row):
    """(Preferred output, other output) of merged annotations, in lists; raises UnusableRow."""
    outputs = []
    for field in ("output_1", "output_2"):
        outputs += listed_responses(where, row, field)
    try:
        wins = [win(preference) for preference in row["preferences"]]
        wins = [value for value in wins if not math.isnan(value)]
    except TypeError as e:
        raise UnusableRow("preference", f"{where}: 'preference' has to be a number") from e

    # the annotators' votes for output_2, which may be fractions
    share = statistics.fmean(wins) if wins else 0.5
    if share == 0.5:
        raise UnusableRow("undecided", f"{where}: its annotators prefer neither output")
    if share < 0.5:
        return outputs[:1], outputs[1:]
    return outputs[1:], outputs[:1]


def right_and_wrong(where, row):
    """(prompt, right responses, wrong responses) of a row; raises UnusableRow."""
    # AlpacaEval's annotations, RewardBench 2's lists, or a pair of whatever layout
    sides = [row.get("chosen"), row.get("rejected")]
    if "preferences" in row and "output_1" in row:
        prompt = with_system(row, prompt_messages(where, row))
        right, wrong = annotated(where, row)
    elif any(is_texts(side) for side in sides):
        prompt = with_system(row, prompt_messages(where, row))
        right = listed_responses(where, row, "chosen")
        wrong = listed_responses(where, row, "rejected")
        n_right = row.get("num_correct")
        if n_right is not None and n_right != len(right):
            raise UnusableRow(
                "num_correct",
                f"{where}: 'num_correct' is {n_right}, and 'chosen' holds {len(right)}",
            )
    else:
        prompt, (chosen, rejected) = responses_of_pair(where, row)
        right = [chosen]
        wrong = [rejected]

    # what is judged is the answer, as in rank.py
    right = [with_thought_apart(response) for response in right]
    wrong = [with_thought_apart(response) for response in wrong]
    return prompt, right, wrong


def is_texts(value):
    """Whether a value is a list of texts, not of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def listed_responses(where, row, field):
    """The responses in a column that holds a list of texts, or one; raises UnusableRow."""
    value = row.get(field)
    if isinstance(value, str):
        value = [value]
    if not is_texts(value):
        raise UnusableRow("no_responses", f"{where}: '{field}' has to be a text or a list of texts")
    return [{"text": text} for text in value]


def check_differ(where, right, wrong):
    """Raise UnusableRow where a right response is a wrong one too."""
    right_texts = {response["text"] for response in right}
    wrong_texts = {response["text"] for response in wrong}
    if right_texts & wrong_texts:
        raise UnusableRow("identical", f"{where}: a response is both chosen and rejected")


# ---- accuracy ----


def outcome(scores, n_right):
    """1 where every right response is above every wrong one, else 0; nan where a score is nan.

    scores (N,): those of the right responses come first. Where the lowest right one is level with
    the k highest wrong ones it is 1 / (1 + k): a half in a pair, and a quarter of four equal
    scores, which is what chance gets too.
    """
    if any(math.isnan(score) for score in scores):
        return math.nan
    lowest_right = min(scores[:n_right])
    wrong = scores[n_right:]
    gap = lowest_right - max(wrong)
    if gap >= TIED:
        return 1.0
    if gap <= -TIED:
        return 0.0
    level = [score for score in wrong if lowest_right - score < TIED]
    return 1 / (1 + len(level))


def longest_is_right(row):
    """Whether the longest response, in characters, is a right one; None where two are as long."""
    lengths = [len(response["text"]) for response in row["responses"]]
    longest_right = max(lengths[: row["n_right"]])
    longest_wrong = max(lengths[row["n_right"] :])
    if longest_right == longest_wrong:
        return None
    return longest_right > longest_wrong


def accuracy(outcomes):
    """Accuracy in percent with its 95 % interval, and how many rows are readable, not, and tied."""
    readable = [value for value in outcomes if not math.isnan(value)]
    numbers = {"accuracy": None, "accuracy_ci": None}
    if readable:
        share = statistics.fmean(readable)
        numbers["accuracy"] = 100 * share
        numbers["accuracy_ci"] = [100 * bound for bound in wilson_interval(share, len(readable))]
    numbers["n"] = len(readable)
    numbers["unreadable"] = len(outcomes) - len(readable)
    numbers["tied"] = sum(0 < value < 1 for value in readable)
    return numbers


def accuracy_by_length(rows, outcomes):
    """Accuracy over rows, and over those whose longest response is right or wrong."""
    by_length = {True: [], False: [], None: []}
    for row, value in zip(rows, outcomes):
        by_length[longest_is_right(row)].append(value)
    return accuracy(outcomes) | {
        "longer_is_right": accuracy(by_length[True]),
        "longer_is_wrong": accuracy(by_length[False]),
    }


def agreement(rows, scores):
    """Accuracy of a ranker over all rows, by length, and the same of each subset.

    scores: for each row a list (N,). RewardBench 2's leaderboard shows `subset_mean`, the mean over
    the subsets, in which Ties has a score of its own.
    """
    # all rows together
    outcomes = [outcome(values, row["n_right"]) for row, values in zip(rows, scores)]
    measured = accuracy_by_length(rows, outcomes)

    # and each subset, where there are some
    indices = {}  # subset -> its rows
    for k, row in enumerate(rows):
        if row.get("subset") is not None:
            indices.setdefault(str(row["subset"]), []).append(k)
    if not indices:
        return measured

    means = []
    measured["subsets"] = {}
    for name, own in sorted(indices.items()):
        own_rows = [rows[k] for k in own]
        subset = accuracy_by_length(own_rows, [outcomes[k] for k in own])
        mean = subset["accuracy"]
        if name.lower() == "ties":
            mean = ties_score(own_rows, [scores[k] for k in own])
            subset["ties_score"] = mean
        measured["subsets"][name] = subset
        means.append(mean)
    if None not in means:
        measured["subset_mean"] = statistics.fmean(means)
    return measured


def ties_score(rows, scores):
    """RewardBench 2's score of its subset Ties in percent, or None where it has no whole question.

    A question is there twice: "ref:7" with one right response, "tied:7" with several that are as
    good. It counts whether the right ones win in each, and whether they lie closer to each other
    than to the wrong ones.
    """
    spreads = {}  # id -> between the right responses
    gaps = {}  # id -> from the lowest right one to the highest wrong one
    for row, values in zip(rows, scores):
        if not any(math.isnan(value) for value in values):
            right = values[: row["n_right"]]
            spreads[row["id"]] = max(right) - min(right)
            gaps[row["id"]] = min(right) - max(values[row["n_right"] :])

    numbers = [row_id.removeprefix("tied:") for row_id in gaps if row_id.startswith("tied:")]
    numbers = [number for number in numbers if f"ref:{number}" in gaps]
    if not numbers:
        return None
    ref = np.array([gaps[f"ref:{number}"] for number in numbers])  # (Q,)
    tied = np.array([gaps[f"tied:{number}"] for number in numbers])  # (Q,)
    spread = np.array([spreads[f"tied:{number}"] for number in numbers])  # (Q,)

    # a right one has to win in both, and by more than the right ones lie apart
    least = np.minimum(ref, tied)
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(least / spread - 1))  # 0 / 0 counts as 0
    score = 0.3 * np.mean(tied > 0) + 0.3 * np.mean(ref > 0)
    score += 0.2 * np.mean(tied > spread) + 0.2 * np.mean(least > spread)
    return float(100 * (score + 0.01 * np.mean(margin)))


# ---- the table ----


def print_agreement(measured):
    """A line for all rows and one for each subset, in percent."""
    lines = {"all": measured} | measured.get("subsets", {})
    width = max(len(name) for name in lines)
    head = f"{'accuracy % (95 %), n':>28}  {'longer is right':>28}  {'longer is wrong':>28}"
    print(f"{'':{width}}  {head}  unreadable  tied")
    for name, numbers in lines.items():
        parts = [numbers, numbers["longer_is_right"], numbers["longer_is_wrong"]]
        cells = "  ".join(f"{accuracy_text(part):>28}" for part in parts)
        print(f"{name:{width}}  {cells}  {numbers['unreadable']:>10}  {numbers['tied']:>4}")
    if measured.get("subset_mean") is not None:
        print(f"mean of the subsets: {measured['subset_mean']:.1f} %")


def accuracy_text(numbers):
    """What `accuracy` gives as "71.4 (65.1 to 77.0), 220"."""
    if numbers["accuracy"] is None:
        return "-"
    low, high = numbers["accuracy_ci"]
    return f"{numbers['accuracy']:.1f} ({low:.1f} to {high:.1f}), {numbers['n']}"
