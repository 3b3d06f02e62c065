"""Table, figures and report of one or more runs, from their files alone.

    python plot.py out/tiny_aipo out/tiny_dpo              prints the table; writes iterations.png, length.png and report.html to out/
    python plot.py out/tiny_aipo                           the same of one run; its report.html lies in out/tiny_aipo/

Win rate is the judge's word, against the first policy; accuracy the truth where prompts carry answers. The figures are AIPO's
(2409.08845). Benchmarks' scores (eval.py --bench=...) show up too if they lie in iter_T/.
"""
import math
import os
import random
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from configurator import run_script
from nanoaipo.stages import FREE
from nanoaipo.report.page import report
from nanoaipo.report.runs import CONTROL, DRAWN, FIELDS, INK, LENGTH, PERFORMANCE, TRAINING, columns, everyone, judges, load, number, show, title

RC = {"text.parse_math": False, "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
      "grid.alpha": 0.15, "lines.markersize": 4.5, "lines.linewidth": 1.6, "axes.titlesize": "medium"}     # parse_math: a run may be called a$b$


def print_table(runs):
    shown, lines, width = columns(runs), judges(runs), max(map(len, runs))
    heads = [f"{title(f) + lines[k][:3] * (len(lines) > 1) if k in lines else title(f):>8}" for k, f in shown]
    print(f"{'run':{width}}   t  " + "  ".join(heads))
    for name, t, now in everyone(runs):
        if now["scores"]:
            print(f"{name:{width}}  {t:2d}  " + "  ".join(f"{show(now['scores'].get(k, {}), f):>{len(head)}}" for (k, f), head in zip(shown, heads)))
    print("\n".join(lines.values()))


# ---- figures: a panel is (title, x label, y label, function that draws on an axis, what it shows in words), or None without data ----


def curves(runs, key, field, x, label, mark=None):
    """A panel of one metric, a line per run; x(run, t, iteration, key) is the horizontal place, mark(name, t) the text at a point."""
    lines = {}
    for name, run in runs.items():
        scored = [(t, now, now["scores"][key]) for t, now in run["iterations"].items() if number(now["scores"].get(key, {}), field) is not None]
        points = [(x(run, t, now, key), row[field], row.get(field + "_ci"), t) for t, now, row in scored]
        points = [p for p in points if p[0] is not None]
        lines |= {name: points} if points else {}

    def draw(axis):
        for name, points in lines.items():
            axis.plot([p[0] for p in points], [p[1] for p in points], **runs[name]["look"], label=" " + name)     # a legend leaves "_x" out
            banded = [(at, *ci) for at, _, ci, _ in points if ci and None not in ci and not mark]
            if banded:
                band = axis.fill_between if len(banded) > 1 else axis.vlines
                band(*zip(*banded), color=runs[name]["look"]["color"], alpha=0.18, linewidth=0 if len(banded) > 1 else 4)
            for at, y, _, t in points if mark else ():
                axis.annotate(mark(name, t), (at, y), (4, 3), textcoords="offset points", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=label == "iteration")
    judge = "the truth" if field == "accuracy" else key[1] if key[0] == "win_rate" else f"{key[0]} by {key[1]}"
    name = title(field) + " %" * show({field: 0}, field).endswith("%") + (" per answer" if field in LENGTH else "")
    told = "; ".join(f"{run} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for run, points in lines.items())
    return (name if field in LENGTH and key[0] == "win_rate" else f"{name}, {judge}", label, "", draw, told) if lines else None


def cloud(runs, name, points, label, ylabel):
    """A panel of dots (n, 2) with Pearson's correlation of all of them; a fixed draw of them is drawn."""
    varied = len(points) > 2 and (points.std(0) > 0).all()
    told = f"{name}: r = " + (f"{np.corrcoef(points.T)[0, 1]:.2f}" if varied else "-") + f", n = {len(points):,}"
    some = points[random.Random(0).sample(range(len(points)), min(len(points), DRAWN // len(runs)))]
    look = {"color": runs[name]["look"]["color"], "markersize": 3, "alpha": 0.4, "markeredgewidth": 0}
    return (told, label, ylabel, lambda axis: axis.plot(*some.T, "o", **look), told) if len(points) else None


def rewards(runs, name):
    """A panel of rewards over all steps of a run, a border where an iteration begins."""
    steps = [(t, s) for t, now in runs[name]["iterations"].items() for s in now["steps"]]

    def draw(axis):
        borders = [k for k, (t, _) in enumerate(steps) if k == 0 or steps[k - 1][0] != t]
        for start, end in zip(borders, [*borders[1:], len(steps)]):
            axis.axvline(start, color=INK, alpha=0.3, linewidth=0.8)
            axis.text(start, 1, " t = " * (start == 0) + f" {steps[start][0]}", transform=axis.get_xaxis_transform(), va="top", fontsize=8)
            for field, line in (("reward_chosen", "-"), ("reward_rejected", "--")):
                axis.plot(range(start, end), [s.get(field, math.nan) for _, s in steps[start:end]], line, color=runs[name]["look"]["color"])
    told = f"{name}: rewards of chosen and rejected, {len(steps)} steps"
    return (name, "step, iterations one after another", "reward", draw, told) if steps else None


def iteration(run, t, now, key):
    return t


def length_in(unit):
    """x of curves: the length of a benchmark's own answers, else of eval.json's."""
    def x(run, t, now, key):
        own = now["scores"][key]
        return number(own if LENGTH.keys() & own else next((r for k, r in now["scores"].items() if k[0] == "win_rate"), {}), unit)
    return x


def per_iteration(run):
    """P, the prompts of an iteration."""
    counted = run["iterations"].get(1, {"counts": {"candidates": {}}})["counts"]["candidates"]
    return run["settings"]["new_instructions"] or run["settings"]["n_prompts"] or counted.get("prompts", 0)


def differing(runs):
    """{run: the settings in which the runs differ, as text}."""
    keys = [k for k in dict.fromkeys(k for run in runs.values() for k in run["settings"]) if k not in FREE | {"out"}]
    keys = [k for k in keys if len({repr(run["settings"].get(k)) for run in runs.values()}) > 1]
    return {name: "\n".join(f"{k} {run['settings'].get(k)}" for k in keys) or name for name, run in runs.items()}


def figures(runs):
    """Yield (heading, caption, panels, runs of the legend) of the paper's figures."""
    shown = [(k, f) for k, f in columns(runs) if k != TRAINING]
    metrics, lengths = [(k, f) for k, f in shown if f in PERFORMANCE or f not in FIELDS], [(k, f) for k, f in shown if f in LENGTH]
    pool = {k: {name: np.concatenate([now[k] for now in run["iterations"].values()]) for name, run in runs.items()} for k in ("responses", "margins")}
    some = f"r is Pearson's over all n of all iterations, of which at most {DRAWN // len(runs):,} are drawn."
    yield ("Metrics and length per iteration",
           "After Fig. 2 of the paper: every metric and the length of answers after t iterations; bands are 95 % intervals.",
           [curves(runs, k, f, iteration, "iteration") for k, f in metrics + lengths], runs)
    yield ("Length against performance", "After Fig. 3: each metric over the length of the same answers, iterations joined and numbered.",
           [curves(runs, k, f, length_in(u), f"{u} per answer", lambda name, t: f"{t}") for k, f in metrics for u in LENGTH], runs)
    yield ("Rewards in training", "After Fig. 4: rewards, beta times the log-ratio of policy to reference, of chosen (solid) and rejected (dashed) "
           "responses; at each border an iteration begins, with a new reference.", [rewards(runs, name) for name in runs], {})
    yield ("Length and log-probability", f"After Fig. 5: log-prob of responses under the policy that sampled them, over their length; {some}",
           [cloud(runs, name, pool["responses"][name], "tokens", "log-prob, nats") for name in runs], {})
    yield ("Reference margin and length",
           f"After Fig. 6: s_ref = log-prob of chosen minus rejected under the reference, over their difference of length; {some}",
           [cloud(runs, name, pool["margins"][name][:, :2], "tokens chosen minus tokens rejected", "s_ref, nats") for name in runs], {})
    for loss in dict.fromkeys(run["settings"]["loss"] for run in runs.values()):
        group = {name: run for name, run in runs.items() if run["settings"]["loss"] == loss}
        plans = {name: f"T = {run['settings']['iterations']}, P = {per_iteration(run):,}" for name, run in group.items()}
        if len(set(plans.values())) > 1:
            told = "; ".join(f"{name}: {plan}" for name, plan in plans.items())
            yield (f"Iterations against prompts, {loss}", f"After Fig. 1: T iterations of P prompts each, over all prompts seen ({told}).",
                   [curves(group, k, f, lambda run, t, now, key: t * per_iteration(run), "prompts seen so far") for k, f in metrics], group)
        if len(group) > 2:
            last, labels = {name: run | {"iterations": dict(list(run["iterations"].items())[-1:])} for name, run in group.items()}, differing(group)
            yield (f"Hyper-parameters, {loss}",
                   "After Fig. 7: win rate over length at the last iteration of each run, labelled by the settings in which the runs differ.",
                   [curves(last, k, f, length_in(u), f"{u} per answer", lambda name, t, labels=labels: labels[name])
                    for k, f in metrics if f == "win_rate" for u in LENGTH], group)


def draw_files(runs, folder):
    """iterations.png and length.png: win rate, accuracy and length of eval.json, or all metrics where there is none."""
    shown = [(k, f) for k, f in columns(runs) if k != TRAINING and (f in PERFORMANCE or f in LENGTH)]
    shown = [(k, f) for k, f in shown if k[0] == "win_rate" and f != "lc_win_rate"] or shown
    by_length = [curves(runs, k, f, length_in(u), f"{u} per answer", lambda name, t: f"{t}") for k, f in shown if f in PERFORMANCE for u in LENGTH]
    for file, panels in (("iterations.png", [curves(runs, k, f, iteration, "iteration") for k, f in shown]), ("length.png", by_length)):
        panels = [p for p in panels if p]
        if panels:
            figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), layout="constrained", squeeze=False)
            for axis, (name, label, _, draw, _) in zip(axes[0], panels):
                draw(axis)
                axis.set(xlabel=label, title=name)
            axes[0][0].legend(frameon=False)
            figure.savefig(os.path.join(folder, file), dpi=150)
            plt.close(figure)
            print(os.path.join(folder, file))


def main():
    paths = list(dict.fromkeys(os.path.normpath(a) for a in sys.argv[1:]))
    if not paths or any(p.startswith("-") for p in paths):
        sys.exit(__doc__)
    matplotlib.use("Agg")
    plt.rcParams.update(RC)
    names = [os.path.basename(os.path.abspath(p)) for p in paths]
    runs = {(name if len(set(names)) == len(names) else path).translate(CONTROL): load(path, k) for k, (name, path) in enumerate(zip(names, paths))}
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths])
    print_table(runs)
    draw_files(runs, folder)
    page = os.path.join(paths[0] if len(paths) == 1 else folder, "report.html")
    with open(page + ".tmp", "w", encoding="utf-8", errors="replace") as f:
        f.write(report(runs, figures(runs)))
    os.replace(page + ".tmp", page)
    print(f"report: {page}")


if __name__ == "__main__":
    run_script(main)
