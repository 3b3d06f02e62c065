"""WildBench v2: tasks with a checklist, rated from 1 to 10 or beside a baseline (2406.04770)."""

import random
import re
import time

import numpy as np

from nanoaipo.benchmarks.answers import (
    check_no_duplicates,
    find_bench_file,
    last_day,
    only_judge,
    read_answers,
    select_model,
)
from nanoaipo.errors import InputError
from nanoaipo.files import read_records
from nanoaipo.served import served_fields, served_scores
from nanoaipo.stats import interval
from nanoaipo.verdicts import without_thought

REPOSITORY = "allenai/WildBench"
SUFFIX = ".json"  # of a judgments file: an array, as the official code writes it
N_TASKS = 1024

# what a judge chooses: the better response, and by how much
CHOICES = {"A++": ("A", 2), "A+": ("A", 1), "A=B": (None, 0), "B+": ("B", 1), "B++": ("B", 2)}
CHOICE = re.compile(r'"choice"\s*:\s*"\s*\[?\s*(A\+\+|A\+|A=B|B\+\+|B\+)\s*\]?\s*"')
POINTS = re.compile(r'"score"\s*:\s*"?\s*\[?\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*\]?\s*["},\n]')
NAMES = {1: "much_better", 0.5: "better", 0: "tie", -0.5: "worse", -1: "much_worse"}

# a slight win is a tie if the winner is so many characters longer: K of the official tables
MARGINS = (500, 1000, 1500)

# beside a baseline a text is cut behind these words, and such a pair counts as a tie
MAX_WORDS = 1000
CUT = "... (truncated)"
EMPTY = "[This model response is empty.]"

# five categories of tasks, and what each weighs in the leaderboard's mean
# fmt: off
CATEGORIES = {
    "Coding & Debugging": 1.25, "Planning & Reasoning": 1.25, "Math & Data Analysis": 1,
    "Information/Advice seeking": 0.75, "Creative Tasks": 0.5,
}
TAGS = {
    "Coding & Debugging": "Coding & Debugging",
    "Math": "Math & Data Analysis", "Data Analysis": "Math & Data Analysis",
    "Planning": "Planning & Reasoning", "Reasoning": "Planning & Reasoning",
    "Information seeking": "Information/Advice seeking",
    "Advice seeking": "Information/Advice seeking",
}  # the others are Creative Tasks
# fmt: on


# ---- score ----


def score(judgments, model, **_):
    """Mean points and WB-Score, or the reward against a baseline, with 95 % intervals.

    A file has points (1 to 10) or pairs. WB-Score is 20 (points - 5). A reward is the mean of 100
    and 50 for a much and a slightly better response, 0 for a tie, and as much below; reward_500 is
    the same where a slight win is a tie if the winner is more than 500 characters longer. model:
    whose judgments; of a published pair the one that is not `ref=` in the path. Raises InputError.
    """
    # whose, and by whom
    rows = list(read_records(judgments, "session_id"))
    rows, name = select_model(rows, lambda r: model_of(r, judgments, model), judgments, model)
    check_no_duplicates(rows, lambda r: r["session_id"])
    unknown = name_in_path(judgments, "eval") or "unknown"
    scores = {
        "model": name,
        "judge": only_judge(rows, lambda r: r.get("judge", unknown), judgments),
        **served_scores([row for _, row in rows], judgments),
        "date": last_day(rows),
    }

    # of one kind or the other
    rows = [row for _, row in rows]
    if "winner" in rows[0]:
        return scores | score_pairs(rows, name, judgments)
    return scores | score_points(rows, judgments)


def name_in_path(path, key):
    """The model in a folder's name, as in eval=gpt-4o-2024-05-13/; empty where there is none."""
    found = re.search(rf"(?:^|/){key}=([^/]+)/", path)
    if found is None:
        return ""
    return found[1]


def model_of(row, path, wanted):
    """Whom a judgment is about."""
    if "model_test" in row:
        return row["model_test"]
    pair = [row["model_A"], row["model_B"]]
    if wanted in pair:
        return wanted
    reference = name_in_path(path, "ref")
    if reference and reference in pair[0]:
        return pair[1]
    return pair[0]


def score_points(rows, judgments):
    """What the table says of judgments with points."""
    rated = [row for row in rows if row["score"] is not None]
    if not rated:
        raise InputError(f"{judgments}: not one score that is not null")
    points = np.array([float(row["score"]) for row in rated])  # (N,), published ones are texts
    if points.min() < 1 or points.max() > 10:
        raise InputError(f"{judgments}: a score is between 1 and 10, or null")
    has_text = [is_whole(row["model_output"]) for row in rated]  # the others enter no category

    mean, ci = interval(points)
    return {
        **judgment_counts(rows, len(rated)),
        "score": mean,
        "score_ci": ci,
        "wb_score": 20 * (mean - 5),
        **by_category(rated, 20 * (points - 5), has_text),
        "avg_length": mean_length([row["model_output"] for row in rated]),
    }


def score_pairs(rows, name, judgments):
    """What the table says of pairs of a model and a baseline."""
    judged = [row for row in rows if row["winner"] is not None]
    if not judged:
        raise InputError(f"{judgments}: not one verdict that is not null")
    baselines = {other_than(name, row["model_outputs"]) for row in judged}
    if len(baselines) > 1:
        raise InputError(
            f"{judgments}: {name} against {' and '.join(sorted(baselines))}; one file each"
        )
    whole = [is_whole_pair(row) for row in judged]

    # rewards with and without a margin
    scores = {**judgment_counts(rows, len(judged)), "baseline": baselines.pop()}
    rewards = [reward_of(row, name) for row in judged]
    scores["reward"], scores["reward_ci"] = interval(100 * np.array(rewards))
    for margin in MARGINS:
        at_margin = 100 * np.array([reward_of(row, name, margin) for row in judged])
        scores[f"reward_{margin}"] = float(at_margin.mean())

    # what they are made of
    scores["verdicts"] = {word: rewards.count(reward) for reward, word in NAMES.items()}
    scores["cut_or_empty"] = whole.count(False)  # among the ties
    scores |= by_category(judged, 100 * np.array(rewards), whole)
    scores["avg_length"] = mean_length([row["model_outputs"][name] for row in judged])
    return scores


def judgment_counts(rows, n):
    """How many judgments count, how many have no verdict, and how many tasks have none."""
    return {"n": n, "invalid": len(rows) - n, "missing": max(0, N_TASKS - len(rows))}


def reward_of(row, name, margin=None):
    """What a model wins in a pair, from -1 to 1 in steps of a half.

    margin: characters from which on a longer response cannot win by a little; None: no margin.
    """
    outputs = row["model_outputs"]
    winner = row["winner"]
    if winner == "tie" or not is_whole_pair(row):
        return 0
    longer = len(outputs[winner]) - len(outputs[other_than(winner, outputs)])
    if row["extent"] == 1 and margin is not None and longer > margin:
        return 0
    reward = row["extent"] / 2
    if winner != name:
        reward = -reward
    return reward


def other_than(name, outputs):
    """The other of the two models whose outputs these are."""
    (other,) = set(outputs) - {name}
    return other


def is_whole(text):
    """Whether a response was shown to the judge as it is: not empty, not cut."""
    return text not in ("", EMPTY) and not text.endswith(CUT)


def is_whole_pair(row):
    """Whether both responses of a pair are whole; one that is not makes a tie."""
    return all(is_whole(text) for text in row["model_outputs"].values())


def mean_length(texts):
    """Mean characters of the responses that are whole, None without one."""
    lengths = [len(text) for text in texts if is_whole(text)]
    if not lengths:
        return None
    return float(np.mean(lengths))


def by_category(rows, values, counted):
    """{"categories": means of values (N,), "macro": their weighted mean}; published rows have none.

    counted: whether a row enters its categories. A task has one or several.
    """
    in_category = {}
    for row, value, is_counted in zip(rows, values, counted):
        if not is_counted:
            continue
        categories = {TAGS.get(tag, "Creative Tasks") for tag in row.get("tags", ())}
        for category in categories:
            in_category.setdefault(category, []).append(value)
    if not in_category:
        return {}

    means = {name: float(np.mean(some)) for name, some in sorted(in_category.items())}
    weights = [CATEGORIES[name] for name in means]
    macro = float(np.average(list(means.values()), weights=weights))
    return {"macro": macro, "categories": means}


# ---- judge ----


def judge(ask, bench_data, answers, baseline, judge_model):
    """Points for each of the model's answers, or with a baseline a verdict on each pair.

    Which of a pair stands first is a coin flip seeded by the task. Empty answers are not judged:
    they have the lowest score, and lose to any other.
    """
    ours, model = read_answers(answers)
    mode = "score"
    if baseline:
        mode = "pairwise"
        theirs, other = read_answers(baseline)
        if other == model:
            raise InputError(f"{baseline}: is of {other}, as {answers} is; a pair is of two models")
    template = read_template(bench_data, mode)

    rows = []
    questions = []
    for where, task in read_tasks(bench_data):
        key = task["session_id"]
        if key not in ours:
            continue
        if baseline and key not in theirs:
            raise InputError(f"{baseline}: no answer to '{key}' ({where})")
        row = {
            "session_id": key,
            "judge": judge_model,
            "model_test": model,
            "tags": [task["primary_tag"], *task["secondary_tags"]],
        }
        if baseline:
            row |= pair_record(key, {model: ours[key].texts[0], other: theirs[key].texts[0]})
        else:
            row |= {"score": None, "model_output": ours[key].texts[0].strip()}
        rows.append(row)
        if not decide_empty(row):
            questions.append(question_about(row, task, template))
    if not rows:
        raise InputError(f"{answers}: answers none of WildBench's tasks")

    # the replies come in the order of the questions
    replies = iter(ask(questions))
    for row in rows:
        row["tstamp"] = time.time()
        if "result" not in row:
            reply = next(replies)
            row["result"] = reply["reply"]
            read_result(row)
            row |= served_fields(reply)
    return rows


def read_tasks(bench_data):
    """The (where, record) pairs of the benchmark's tasks, from the data set's own file."""
    origin = f"{REPOSITORY}, or in its data set on the hub"
    path = find_bench_file(bench_data, "v2/test*", origin)
    fields = ("session_id", "conversation_input", "checklist", "primary_tag", "secondary_tags")
    return read_records(path, *fields)


def read_template(bench_data, mode):
    """What the judge is asked, with places such as {$checklist}."""
    path = find_bench_file(bench_data, f"eval_template.{mode}.v2.md", REPOSITORY)
    with open(path, encoding="utf-8") as f:
        return f.read()


def pair_record(key, outputs):
    """The fields of a pair before its verdict, with the texts as the judge reads them."""
    order = list(outputs)
    if random.Random(f"wild_bench {key}").random() < 0.5:
        order.reverse()
    shown = {name: shorten(text.strip()) or EMPTY for name, text in outputs.items()}
    return {
        "model_A": order[0],
        "model_B": order[1],
        "winner": None,
        "extent": None,
        "model_outputs": shown,
    }


def shorten(text):
    """A text cut behind its 1,000th word, as the official code has it: words end at spaces."""
    words = text.split(" ")
    if len(words) <= MAX_WORDS:
        return text
    return " ".join(words[:MAX_WORDS]) + CUT


def decide_empty(row):
    """Whether a record needs no judge, an answer being empty; it then gets its verdict."""
    if "score" in row:
        if row["model_output"]:
            return False
        row |= {"score": 1, "result": "empty"}
        return True

    full = [name for name, text in row["model_outputs"].items() if text != EMPTY]
    if len(full) == 2:
        return False
    row |= {"winner": "tie", "extent": 0, "result": "empty"}
    if full:
        row |= {"winner": full[0], "extent": 2}
    return True


def question_about(row, task, template):
    """The question to the judge about a record to be."""
    turns = task["conversation_input"]
    history = ""
    for turn in turns[:-1]:
        history += f"{turn['role'].upper()}: {turn['content']}\n\n"
    query = turns[-1]["content"]
    values = {"checklist": "".join(f"- {item}\n" for item in task["checklist"])}
    if "score" in row:
        values |= {"history": history, "user_query": query, "model_output": row["model_output"]}
    else:
        values |= {"history": shorten(history), "user_query": shorten(query)}
        values["candidate_A"] = row["model_outputs"][row["model_A"]]
        values["candidate_B"] = row["model_outputs"][row["model_B"]]

    # filled in one go, so that a placeholder inside an answer stays text
    content = re.sub(r"\{\$(\w+)\}", lambda place: values[place[1]], template)
    return {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0.0,
        "max_tokens": 1024,
        "about": row["session_id"],
    }


def read_result(row):
    """Put the verdict of the judge's reply into its record: the last one behind its thought."""
    answer = without_thought(row["result"])
    if "score" in row:
        found = POINTS.findall(answer + "\n")
        if found and 1 <= float(found[-1]) <= 10:
            row["score"] = float(found[-1])
        return

    found = CHOICE.findall(answer)
    if found:
        letter, row["extent"] = CHOICES[found[-1]]
        row["winner"] = "tie" if letter is None else row[f"model_{letter}"]
