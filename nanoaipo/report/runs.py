"""What the files of runs say: scores of each iteration, training, pairs, answers, counts.

runs = {"tiny_aipo": load_run("out/tiny_aipo", recipe, settings), ...}

A run has "recipe", "settings" and "iterations", {t: iteration}; load_iteration lists the fields of
an iteration. A run may be unfinished. Besides eval.json every iter_T/*.json with a "bench" is read,
and what lm-evaluation-harness has written below iter_T. What two judges say never shares a column:
scores belong to a Source, a benchmark and a judge, and two models that answer to one name are two
judges. Two categories share none either.
"""

import collections
import glob
import json
import os

import numpy as np

from nanoaipo.errors import InputError
from nanoaipo.files import find_files, read_records
from nanoaipo.messages import as_messages
from nanoaipo.prompts import read_candidates
from nanoaipo.report.lm_eval import is_number, is_results, is_share, read_results
from nanoaipo.served import with_served
from nanoaipo.stages import manifest_path
from nanoaipo.stats import Z_95

Source = collections.namedtuple("Source", "bench judge")
Column = collections.namedtuple("Column", "source field")
TRAINING = Source("training pairs", "")  # nobody judges them

# fields of scores: (title, format)
PERFORMANCE = {
    "win_rate": ("win rate", ".1f%"),
    "lc_win_rate": ("LC win rate", ".1f%"),
    "sc_win_rate": ("SC win rate", ".1f%"),
    "accuracy": ("accuracy", ".1f%"),
    "followed": ("followed", ".1f%"),
    "followed_share": ("share followed", ".1f%"),
    "score": ("score", ".2f"),
    "wb_score": ("WB-Score", ".1f"),
    "reward": ("WB-Reward", "+.1f"),
}
LENGTH = {
    "tokens": ("tokens", ".1f"),
    "characters": ("characters", ",.0f"),
}
TEXT = {
    "finished": ("finished", ".0f%"),
    "distinct_2": ("distinct-2", ".2f"),
    "self_similarity": ("self-sim.", ".2f"),
    "turn_1": ("turn 1", ".2f"),
    "turn_2": ("turn 2", ".2f"),
}
TRAINED = {
    "s_ref": ("s_ref", "+.2f"),
    "logp_chosen": ("logp chosen", "+.2f"),
    "len_chosen": ("len chosen", ".1f"),
    "len_rejected": ("len rejected", ".1f"),
}
# a run's constant, where its pairs know what they were sampled with
SAMPLER = {"sampler_abs_diff": ("off sampler", ".4f")}
FIELDS = PERFORMANCE | LENGTH | TEXT | TRAINED | SAMPLER

# stages that count, and their names on the page
STAGES = {
    "prompts": "new instructions",
    "candidates": "candidates",
    "pairs": "pairs",
    "model": "training",
    "answers": "answers",
}

# control characters become visible pictures of themselves; those of C1 have none
CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROL |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


# ---- fields and numbers ----


def described(field):
    """(title, format) of a field, such as "acc,none" of lm-evaluation-harness."""
    if field in FIELDS:
        return FIELDS[field]
    metric, comma, name = field.partition(",")
    if not comma:
        return field, ".2f"
    heading = metric
    if name != "none":
        heading = f"{metric} {name}"
    if is_share(metric):
        return heading, ".1f%"
    return heading, ".4g"


def field_title(field):
    return described(field)[0]


def is_percent(field):
    return described(field)[1].endswith("%")


def format_interval(scores, field):
    """The 95 % interval of a number as text, "" where it has none or one of no width."""
    if not scores.get(field + "_ci"):
        return ""
    low, high = [format_number(end, field) for end in scores[field + "_ci"]]
    if low == high == format_number(scores.get(field), field):
        return ""
    return f"{low.rstrip('%')} – {high}"


def format_number(value, field):
    """A number as the table prints it, "-" where there is none."""
    if not is_number(value):
        return "-"
    spec = described(field)[1]
    if is_percent(field):
        return format(value, spec.removesuffix("%")) + "%"
    return format(value, spec)


# ---- files ----


def read_any_json(path):
    """What a JSON file holds; raises InputError where it is none."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise InputError(f"{path}: not JSON: {e}") from e


def finished_files(path):
    """The files of a stage, shards included; none while one of them is still being written."""
    if os.path.isfile(path):
        return [path]
    stem, suffix = os.path.splitext(path)
    shards = glob.glob(f"{glob.escape(stem)}-[0-9]*-of-[0-9]*{suffix}")
    if not shards:
        return []
    n_shards = int(shards[0].removesuffix(suffix).rpartition("-of-")[2])
    if len(shards) < n_shards:
        return []
    return find_files(path)


def read_scores(path):
    """What a benchmark's file says, a list of {field: value}; [] if the file is no benchmark's.

    Categories that have scores of their own, such as those of Arena-Hard v2.0, are items of the
    list, and the number of all of them together is none.
    """
    scores = read_any_json(path)
    if is_results(scores):
        scores = read_results(scores, path)
    if not isinstance(scores, dict) or "bench" not in scores:
        return []
    parts = scores.get("categories") or {}
    if not any(isinstance(part, dict) for part in parts.values()):
        return [with_our_names(scores)]

    shared = {
        key: scores[key] for key in ("bench", "judge", "served_model", "date") if key in scores
    }
    return [with_our_names(shared | {"category": name} | part) for name, part in parts.items()]


def with_our_names(scores):
    """Scores in which a win rate has its 95 % interval, a length the name of its unit."""
    scores = {"judge": "-"} | scores

    # Arena-Hard says an interval, AlpacaEval a standard error
    if scores.get("ci"):
        scores["win_rate_ci"] = scores["ci"]
    elif scores.get("standard_error"):
        margin = Z_95 * scores["standard_error"]
        scores["win_rate_ci"] = [scores["win_rate"] - margin, scores["win_rate"] + margin]

    # each benchmark has its own name for the length of answers
    units = {
        "length": scores.get("length_unit", "tokens"),
        "avg_length": "characters",
        "avg_tokens": "tokens",
    }
    for field, unit in units.items():
        for end in ("", "_ci"):
            if field + end in scores:
                scores[unit + end] = scores[field + end]
    return scores


def source_of(scores):
    """The benchmark, with its category where it has one, and who judged, by the served name."""
    bench = str(scores["bench"])
    if "category" in scores:
        bench += f" {scores['category']}"
    judge = with_served(str(scores["judge"]), scores.get("served_model"))
    return Source(bench.translate(CONTROL), judge.translate(CONTROL))


def read_all_scores(folder):
    """{Source: scores} of all benchmarks of an iteration."""
    paths = glob.glob(f"{glob.escape(folder)}/*.json")
    paths += glob.glob(f"{glob.escape(folder)}/**/results_*.json", recursive=True)  # lm_eval's
    all_scores = {}
    for path in sorted(set(paths)):
        for scores in read_scores(path):
            source = source_of(scores)
            if source in all_scores:  # two files of one judge would overwrite each other
                raise InputError(
                    f"{path}: {source.bench} by {source.judge} is in another file of this "
                    "iteration too; keep one"
                )
            all_scores[source] = scores
    return all_scores


def mean_over_pairs(steps, field):
    """Mean of a field of training steps, each a mean over its own number of pairs."""
    return sum(step[field] * step["pairs"] for step in steps) / sum(step["pairs"] for step in steps)


def read_responses(folder):
    """Length in tokens and log-prob of an iteration's responses (n, 2), and {key: log-prob}.

    Log-probs are the sampling policy's, which is the iteration's reference. The key is
    response_key's, by which pairs find them.
    """
    path = f"{folder}/candidates.jsonl"
    responses = []
    logps = {}
    if finished_files(path):
        for _, row in read_candidates(path):
            for response in row["responses"]:
                if response.get("ids") and is_number(response.get("logp")):
                    responses.append((len(response["ids"]), response["logp"]))
                    logps[response_key(row["id"], response["ids"])] = response["logp"]
    return np.array(responses).reshape(-1, 2), logps


def response_key(prompt_id, ids):
    # a hash, because the ids of 100,000 responses would fill the memory
    return str(prompt_id), hash(tuple(ids))


def read_margins_and_texts(folder, logps):
    """An iteration's pairs as numbers and as texts.

    margins (m, 4): tokens chosen minus rejected, s_ref, log-probs of chosen and of rejected, of
    the pairs whose responses have a log-prob. texts: [chosen, rejected] of every pair.
    """
    path = f"{folder}/pairs.jsonl"
    margins = []
    texts = []
    if finished_files(path):
        for where, row in read_records(path, "chosen", "rejected"):
            texts.append([last_message(where, row, "chosen"), last_message(where, row, "rejected")])
            chosen_ids = row.get("chosen_ids") or ()
            rejected_ids = row.get("rejected_ids") or ()
            logp_w = logps.get(response_key(row.get("id"), chosen_ids))
            logp_l = logps.get(response_key(row.get("id"), rejected_ids))
            if logp_w is not None and logp_l is not None:
                longer = len(chosen_ids) - len(rejected_ids)
                margins.append((longer, logp_w - logp_l, logp_w, logp_l))
    return np.array(margins).reshape(-1, 4), texts


def last_message(where, row, field):
    """The text of a response, which is a text or a list of messages; where: its file and line."""
    return as_messages(row[field], f"{where}: '{field}'")[-1]["content"]


def read_manifests(folder, stage):
    """The manifests of a stage of an iteration, one per shard."""
    if stage == "model":
        outputs = [f"{folder}/model"]
    else:
        outputs = finished_files(f"{folder}/{stage}.jsonl")
    paths = [manifest_path(output) for output in outputs]
    return [read_any_json(path) for path in paths if os.path.exists(path)]


def add_counts(manifests):
    """{reason: number}, added up over the shards of a stage."""
    total = collections.Counter()
    for manifest in manifests:
        total.update(manifest.get("counts", {}))
    return total


def load_iteration(folder):
    """What the files of an iteration's folder say:

    scores     {Source: {field: value}} of benchmarks, and means over the training pairs
    steps      records of training, one per step
    answers    {id: record} of the evaluated answers
    responses  (n, 2), see read_responses
    margins    (m, 4), see read_margins_and_texts; texts: [chosen, rejected] of all pairs
    counts     {stage: {reason: number}}, added up over shards
    summaries  what rank.py says of the pairs, one per shard
    """
    # training: means over its pairs stand beside the scores of benchmarks
    scores = read_all_scores(folder)
    steps = []
    metrics = f"{folder}/model/metrics.jsonl"
    if os.path.exists(metrics):
        steps = [step for _, step in read_records(metrics, "pairs", *TRAINED)]
        scores[TRAINING] = {field: mean_over_pairs(steps, field) for field in TRAINED if steps}
        if steps and "sampler_abs_diff" in steps[0]:
            scores[TRAINING]["sampler_abs_diff"] = steps[0]["sampler_abs_diff"]  # the run's

    # texts and log-probs
    answers = {}
    if finished_files(f"{folder}/answers.jsonl"):
        for _, row in read_candidates(f"{folder}/answers.jsonl"):
            if row["responses"]:
                answers[row["id"]] = row

    responses, logps = read_responses(folder)
    margins, texts = read_margins_and_texts(folder, logps)

    # what the stages counted
    manifests = {stage: read_manifests(folder, stage) for stage in STAGES}

    return {
        "scores": scores,
        "steps": steps,
        "answers": answers,
        "responses": responses,
        "margins": margins,
        "texts": texts,
        "counts": {stage: add_counts(manifests[stage]) for stage in STAGES},
        "summaries": [m["summary"] for m in manifests["pairs"] if m.get("summary")],
    }


# ---- runs ----


def load_iterations(run_dir):
    """{t: iteration} of a run, in order; raises InputError if none has scores."""
    iterations = {}
    for folder in glob.glob(os.path.join(glob.escape(run_dir), "iter_*[0-9]")):
        t = int(folder.rpartition("iter_")[2])
        iterations[t] = load_iteration(folder)
    if not any(iteration["scores"] for iteration in iterations.values()):
        raise InputError(
            f"{run_dir}: no iter_*/eval.json in it; has iterate.sh evaluated an iteration?"
        )
    return dict(sorted(iterations.items()))


def load_run(run_dir, recipe, defaults):
    """A run; recipe: the settings that it set, defaults: those of all scripts."""
    return {
        "recipe": recipe,
        "settings": defaults | recipe,
        "iterations": load_iterations(run_dir),
    }


def all_iterations(runs):
    """(name, t, iteration) of all iterations of all runs."""
    rows = []
    for name, run in runs.items():
        for t, iteration in run["iterations"].items():
            rows.append((name, t, iteration))
    return rows


def columns(runs):
    """The table's columns, those in which some iteration has a number."""
    fields = {}
    for _, _, iteration in all_iterations(runs):
        for source, row in iteration["scores"].items():
            numeric = {field for field, value in row.items() if is_number(value)}
            numeric -= {"n", "invalid"}
            # a benchmark with names of its own shows all of them
            fields.setdefault(source, set()).update(numeric & FIELDS.keys() or numeric)

    # our own evaluation stands first, training last
    def position(source):
        return source == TRAINING, source.bench != "win_rate", source

    found = []
    for source in sorted(fields, key=position):
        order = [*FIELDS, *sorted(fields[source] - FIELDS.keys())]
        found += [Column(source, field) for field in order if field in fields[source]]
    return found


def judge_lines(runs):
    """{Source: line}: who judged, when, how many prompts, how many replies could not be read."""
    sources = dict.fromkeys(c.source for c in columns(runs) if c.source != TRAINING)
    lines = {}
    for number, source in enumerate(sources, 1):
        scores = {}
        for name, t, iteration in all_iterations(runs):
            if source in iteration["scores"]:
                scores[f"{name} t = {t}"] = iteration["scores"][source]
        lines[source] = f"[{number}] " + judge_line(source, scores)
    return lines


def judge_line(source, scores):
    """The line of one judge; scores: {"run t = 1": what it says of an iteration}."""
    dates = sorted({str(row.get("date", "-")) for row in scores.values()})
    date = dates[0]
    if dates[-1] != dates[0]:
        date = f"{dates[0]} to {dates[-1]}"

    # one number of prompts, or each iteration's
    n = list(dict.fromkeys(str(row.get("n", "-")) for row in scores.values()))
    if len(n) > 1:
        n = [f"{row.get('n', '-')} ({at})" for at, row in scores.items()]

    # replies that could not be read, where somebody counted them
    invalid = [f"{row['invalid']} ({at})" for at, row in scores.items() if row.get("invalid")]
    if not invalid:
        is_counted = any("invalid" in row for row in scores.values())
        invalid = ["0" if is_counted else "-"]

    return (
        f"{source.bench}, judge: {source.judge}; date {date}; n {', '.join(n)}; "
        f"invalid replies: {', '.join(invalid)}"
    )
