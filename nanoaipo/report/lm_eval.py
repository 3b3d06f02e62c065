"""What lm-evaluation-harness writes, results_*.json, as scores of the report.

results has the numbers of each task and group: "metric,filter", and "metric_stderr,filter" beside
it, which is a text where it was not computed; further n-samples, n-shot and versions, by task. So
it is in 0.4 (checked with 0.4.13).
"""

import math
import time

from nanoaipo.errors import InputError
from nanoaipo.stats import Z_95

BENCH = "lm_eval"


def is_results(record):
    """Whether a JSON object is lm-evaluation-harness's, of any version."""
    return isinstance(record, dict) and "results" in record and "versions" in record


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def is_share(metric):
    """Whether a metric is a share of questions, which the report has in percent."""
    return metric in ("acc", "acc_norm", "exact_match") or metric.endswith("_acc")


def read_results(record, path):
    """{"bench", "date", "categories": {task: scores}}: each task is a benchmark of its own.

    A task's scores have n and its metrics with 95 % intervals; `guard` names the first that is a
    share of questions. `judge` is what else the numbers depend on: the version of the task, its
    examples, whether the chat template was applied. The tasks of a group that has numbers of its
    own are left out. Raises InputError where there is not one number.
    """
    try:
        tasks = {task: task_scores(record, task) for task in record["results"]}
        in_groups = set()
        for group, names in (record.get("group_subtasks") or {}).items():
            if has_metrics(tasks.get(group, {})):
                in_groups |= set(names)
        date = time.strftime("%Y-%m-%d", time.gmtime(record["date"]))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise InputError(f"{path}: not results of lm-evaluation-harness 0.4 ({reason})") from e

    # a group's numbers are those of its tasks, which would be told twice
    kept = {}
    for task, scores in tasks.items():
        if has_metrics(scores) and task not in in_groups:
            kept[task] = scores
    if not kept:
        raise InputError(
            f"{path}: no 'metric,filter' with a number in it, as lm-evaluation-harness 0.4 and "
            "later write them"
        )
    return {"bench": BENCH, "date": date, "categories": kept}


def task_scores(record, task):
    """The scores of one task or group; its metrics are those with a comma in their name."""
    row = record["results"][task]
    n_samples = record.get("n-samples", {}).get(task, {})
    scores = {"judge": conditions(record, task)}
    n = row.get("sample_len", n_samples.get("effective"))
    if n is not None:
        scores["n"] = n

    for key, value in row.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not is_number(value):
            continue

        # a share of questions is told in percent, and the first of them is the guard
        scale = 1
        if is_share(metric):
            scale = 100
            scores.setdefault("guard", key)
        scores[key] = scale * value
        error = row.get(f"{metric}_stderr,{name}")
        if is_number(error):
            margin = Z_95 * error
            scores[key + "_ci"] = [scale * (value - margin), scale * (value + margin)]
    return scores


def conditions(record, task):
    """What a task's numbers depend on besides the model, as text: "version 3.0, 5-shot"."""
    parts = [f"version {record['versions'].get(task, '-')}"]
    if task in record.get("n-shot", {}):
        parts.append(f"{record['n-shot'][task]}-shot")
    if record.get("chat_template"):
        parts.append("chat template")
    return ", ".join(parts)


def has_metrics(scores):
    return any("," in key for key in scores)
