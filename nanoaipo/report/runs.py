"""What the files of runs say, for plot.py and report.py: scores of each iteration, training, pairs, answers, counts.

    runs = {"tiny_aipo": load("out/tiny_aipo", 0), ...}

Besides eval.json every iter_T/*.json with a "bench" is read, and what two judges say never shares a column. A run may be unfinished.
"""
import glob
import json
import math
import os
import sys

import numpy as np

from configurator import SCRIPTS, declared, literals
from nanoaipo.chat import as_messages
from nanoaipo.files import find_files, read_records
from nanoaipo.prompts import read_candidates
from nanoaipo.stages import manifest_path

PERFORMANCE = {"win_rate": ("win rate", ".1f%"), "lc_win_rate": ("LC win rate", ".1f%"), "accuracy": ("accuracy", ".1f%"), "score": ("score", ".2f")}
LENGTH = {"tokens": ("tokens", ".1f"), "characters": ("characters", ",.0f")}
TRAINED = {"s_ref": ("s_ref", "+.2f"), "logp_chosen": ("logp chosen", "+.2f"), "len_chosen": ("len chosen", ".1f"),
           "len_rejected": ("len rejected", ".1f")}
FIELDS = PERFORMANCE | LENGTH | {"finished": ("finished", ".0f%"), "distinct_2": ("distinct-2", ".2f"), "self_similarity": ("self-sim.", ".2f"),
                                 "turn_1": ("turn 1", ".2f"), "turn_2": ("turn 2", ".2f")} | TRAINED
TRAINING = ("training pairs", "")                                       # a column belongs to (bench, judge); here nobody judges
STAGES = {"prompts": "new instructions", "candidates": "candidates", "pairs": "pairs", "model": "training", "answers": "answers"}
COLORS = "#2f7fc1 #d55e00 #009e73 #c2559d #a08200 #8069d6 #7f7f7f".split()     # contrast of 3 and more on white and on the dark page
MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼"}              # colour is never alone: matplotlib's marks and those of the legend
INK = "#010203"                                                         # stands for the reader's text colour until an SVG is done
DRAWN = 2000                                                            # dots of a figure, pairs of a similarity
CONTROL = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xfffd)


def number(row, field):
    """The finite number in a field, else None."""
    value = row.get(field)
    return value if type(value) in (int, float) and math.isfinite(value) else None


def load_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        sys.exit(f"{path}: not JSON: {e}")


def parts(path):
    """The files of a stage, shards included; none while it is still being written."""
    stem, suffix = os.path.splitext(path)
    shards = glob.glob(f"{glob.escape(stem)}-[0-9]*-of-[0-9]*{suffix}")
    return find_files(path) if os.path.isfile(path) or shards and len(shards) >= int(shards[0].rpartition("-of-")[2].removesuffix(suffix)) else []


def scores(path):
    """What a benchmark's file says, win rate with its interval, length under the name of its unit; None if it is no benchmark's."""
    row = load_json(path)
    if not isinstance(row, dict) or "bench" not in row:
        return None
    row = {"judge": "-"} | row
    error, interval = row.get("standard_error"), row.get("ci")
    if interval or error:
        row["win_rate_ci"] = interval or [row["win_rate"] - 1.96 * error, row["win_rate"] + 1.96 * error]
    for field, unit in (("length", row.get("length_unit", "tokens")), ("avg_length", "characters"), ("avg_tokens", "tokens")):
        row |= {unit + end: row[field + end] for end in ("", "_ci") if field + end in row}
    return row


def read_pairs(folder):
    """An iteration's responses (n, 2): length, log-prob; its pairs (m, 4): length difference, s_ref, log-probs; and its pairs' texts.

    Log-probs are the sampling policy's, which is the iteration's reference; pairs are joined to candidates by id and ids.
    """
    responses, margins, texts, logp = [], [], [], {}
    for _, row in read_candidates(f"{folder}/candidates.jsonl") if parts(f"{folder}/candidates.jsonl") else ():
        for r in row["responses"]:
            if r.get("ids") and number(r, "logp") is not None:
                responses.append((len(r["ids"]), r["logp"]))
                logp[row["id"], hash(tuple(r["ids"]))] = r["logp"]      # the ids of 100,000 responses would fill the memory
    for place, row in read_records(f"{folder}/pairs.jsonl", "chosen", "rejected") if parts(f"{folder}/pairs.jsonl") else ():
        both = [as_messages(row[k]) or sys.exit(f"{place}: '{k}' has to be a text or a list of messages") for k in ("chosen", "rejected")]
        texts.append([messages[-1]["content"] for messages in both])
        w, l = row.get("chosen_ids") or (), row.get("rejected_ids") or ()
        logp_w, logp_l = (logp.get((str(row.get("id")), hash(tuple(ids)))) for ids in (w, l))
        if logp_w is not None and logp_l is not None:
            margins.append((len(w) - len(l), logp_w - logp_l, logp_w, logp_l))
    return np.array(responses).reshape(-1, 2), np.array(margins).reshape(-1, 4), texts


def counts_of(folder, stage):
    """The counts in a stage's manifests, {reason: number}, added up over shards, and their summaries."""
    manifests = [manifest_path(f) for f in ([f"{folder}/model"] if stage == "model" else parts(f"{folder}/{stage}.jsonl"))]
    manifests, total = [load_json(m) for m in manifests if os.path.exists(m)], {}
    for key, n in ((key, n) for m in manifests for key, n in m.get("counts", {}).items()):
        total[key] = total.get(key, 0) + n
    return total, [m["summary"] for m in manifests if m.get("summary")]


def load(run, k):
    """A run's recipe, all its settings, its iterations, and its colour and mark as the k-th one."""
    iterations, path = {}, os.path.join(run, "recipe.py")
    for folder in glob.glob(os.path.join(glob.escape(run), "iter_*[0-9]")):
        now = iterations[int(folder.rpartition("iter_")[2])] = {"scores": {}, "steps": [], "answers": {}}
        for file in sorted(glob.glob(f"{glob.escape(folder)}/*.json")):
            row = scores(file)
            if row:
                key = tuple(str(row[k]).translate(CONTROL) for k in ("bench", "judge"))
                key not in now["scores"] or sys.exit(f"{file}: {key[0]} by {key[1]} is in another file of this iteration too; keep one")
                now["scores"][key] = row
        if os.path.exists(f"{folder}/model/metrics.jsonl"):
            now["steps"] = steps = [s for _, s in read_records(f"{folder}/model/metrics.jsonl", "pairs", *TRAINED)]
            now["scores"][TRAINING] = {k: sum(s[k] * s["pairs"] for s in steps) / sum(s["pairs"] for s in steps) for k in TRAINED if steps}
        if parts(f"{folder}/answers.jsonl"):
            now["answers"] = {r["id"]: r for _, r in read_candidates(f"{folder}/answers.jsonl") if r["responses"]}
        now["responses"], now["margins"], now["texts"] = read_pairs(folder)
        now["counts"], now["summary"] = {s: counts_of(folder, s)[0] for s in STAGES}, counts_of(folder, "pairs")[1]
    any(now["scores"] for now in iterations.values()) or sys.exit(f"{run}: no iter_*/eval.json in it; has iterate.sh evaluated an iteration?")
    recipe = {k: v for k, (v, *_) in literals(path).items()} if os.path.exists(path) else {}
    return {"recipe": recipe, "settings": {k: v for script in SCRIPTS for k, (v, *_) in declared(script).items()} | recipe,
            "iterations": dict(sorted(iterations.items())), "look": {"color": COLORS[k % len(COLORS)], "marker": list(MARKS)[k % len(MARKS)]}}


def everyone(runs):
    """(name, t, iteration) of all iterations of all runs."""
    return [(name, t, now) for name, run in runs.items() for t, now in run["iterations"].items()]


def columns(runs):
    """The table's columns as ((bench, judge), field), those in which some iteration has a number."""
    found = {}
    for key, row in ((key, row) for *_, now in everyone(runs) for key, row in now["scores"].items()):
        fields = [f for f in row if number(row, f) is not None and f not in ("n", "invalid")]
        found.setdefault(key, set()).update([f for f in FIELDS if f in fields] or fields)     # a bench with names of its own shows all of them
    order = sorted(found, key=lambda key: (key == TRAINING, key[0] != "win_rate", key))
    return [(key, f) for key in order for f in [*FIELDS, *sorted(found[key] - FIELDS.keys())] if f in found[key]]


def title(field):
    return FIELDS.get(field, (field,))[0]


def show(row, field):
    """A number as the table prints it, "-" where there is none."""
    spec = FIELDS.get(field, (field, ".2f"))[1]
    return "-" if number(row, field) is None else format(row[field], spec.rstrip("%")) + "%" * spec.endswith("%")


def judges(runs):
    """{(bench, judge): a line that says who, when, on how many prompts, and how many replies could not be read}."""
    lines = {}
    for n, key in enumerate(dict.fromkeys(k for k, _ in columns(runs) if k != TRAINING), 1):
        rows = {f"{name} t = {t}": now["scores"][key] for name, t, now in everyone(runs) if key in now["scores"]}
        dates, ns = (sorted({str(r.get(k, "-")) for r in rows.values()}) for k in ("date", "n"))
        dates, none = " to ".join(dict.fromkeys([dates[0], dates[-1]])), "0" if any("invalid" in r for r in rows.values()) else "-"
        lost = ", ".join(f"{r['invalid']} ({at})" for at, r in rows.items() if r.get("invalid")) or none
        lines[key] = f"[{n}] {key[0]}, judge: {key[1]}; date {dates}; n {', '.join(ns)}; invalid replies: {lost}"
    return lines


