"""The paper's figures (AIPO, 2409.08845) of one or more runs, drawn with matplotlib.

    run_panels(runs)                panels of the figures that show each run by itself
    budget_panels(group)            of those that compare runs of one objective
    hyperparameter_panels(group)
    draw_pngs(runs, folder)         iterations.png and length.png

A panel is None where the runs have no data for it.

Besides what load_run reads, a run has a "style": its colour and its mark (run_style).
"""

import collections
import io
import math
import os
import random
import re
from functools import partial

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from nanoaipo.report.runs import (
    FIELDS,
    LENGTH,
    PERFORMANCE,
    TRAINING,
    columns,
    field_title,
    is_number,
    is_percent,
)
from nanoaipo.stages import FREE

# draw(axis) draws a panel, description says in words what it shows
Panel = collections.namedtuple("Panel", "title x_label y_label draw description")
# an iteration in a panel; interval: the ends of a 95 % interval of y, or None
Point = collections.namedtuple("Point", "t x y interval")

RC = {
    "text.parse_math": False,  # a run may be called a$b$
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.6,
    "axes.titlesize": "medium",
}

# contrast of 3 and more on white and on the dark page
COLORS = "#2f7fc1 #d55e00 #009e73 #c2559d #a08200 #8069d6 #7f7f7f".split()
# colour is never alone: matplotlib's marks and those of the legend
MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼"}
# stands for the reader's text colour until an SVG is done
INK = "#010203"
COLORED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
PAGE_RC = dict.fromkeys([*COLORED, "grid.color"], INK)
TRUTHS = ("accuracy", "followed", "followed_share")  # what prompts' answers say, whoever judges
MAX_DOTS = 2000  # of the panels of a figure together


def run_style(k):
    """Colour and mark of the k-th run."""
    return {"color": COLORS[k % len(COLORS)], "marker": list(MARKS)[k % len(MARKS)]}


# ---- one metric, a line per run ----


def iteration_number(t, run, source):
    return t


def prompts_seen(t, run, source):
    return t * prompts_per_iteration(run)


def prompts_per_iteration(run):
    """P, the prompts of an iteration."""
    settings = run["settings"]
    n_prompts = settings["new_instructions"] or settings["n_prompts"]
    if not n_prompts and 1 in run["iterations"]:
        n_prompts = run["iterations"][1]["counts"]["candidates"].get("prompts", 0)
    return n_prompts


def length_of_answers(t, run, source, unit):
    """Length of a benchmark's own answers, else of eval.json's; None if there is none."""
    scores = run["iterations"][t]["scores"]
    row = scores[source]
    if not row.keys() & LENGTH.keys():
        evaluations = [row for source, row in scores.items() if source.bench == "win_rate"]
        row = evaluations[0] if evaluations else {}
    if not is_number(row.get(unit)):
        return None
    return row[unit]


def metric_title(source, field):
    """A metric with its unit, and who says it: "win rate %, pairrm"."""
    name = field_title(field)
    if is_percent(field):
        name += " %"
    if field in LENGTH:
        name += " per answer"

    if source.bench == "guard":
        return f"{name}, the guard"
    if field in TRUTHS:
        return f"{name}, the truth"
    if source.bench != "win_rate":
        return f"{name}, {source.bench} by {source.judge}"
    if field in LENGTH:
        return name
    return f"{name}, {source.judge}"


def metric_panel(runs, metric, x_label, x_of, label_of=None):
    """A panel of one metric, a Column; None if no iteration has it.

    x_of(t, run, source) is the horizontal position of an iteration, or None.
    label_of(name, t), if given, is the text beside a point; else intervals are drawn.
    """
    lines = {}
    for name, run in runs.items():
        points = metric_points(run, metric, x_of)
        if points:
            lines[name] = points
    if not lines:
        return None

    # in words, for who cannot see it
    ranges = []
    for name, points in lines.items():
        ranges.append(f"{name} from {points[0].y:.4g} to {points[-1].y:.4g}")

    draw = partial(draw_lines, runs, lines, x_of is iteration_number, label_of)
    return Panel(metric_title(*metric), x_label, "", draw, "; ".join(ranges))


def metric_points(run, metric, x_of):
    """The Points of a run's iterations, those that have the metric and a horizontal position."""
    source, field = metric
    points = []
    for t, iteration in run["iterations"].items():
        row = iteration["scores"].get(source, {})
        if not is_number(row.get(field)):
            continue
        x = x_of(t, run, source)
        if x is not None:
            points.append(Point(t, x, row[field], row.get(field + "_ci")))
    return points


def draw_lines(runs, lines, integer_ticks, label_of, axis):
    """What metric_panel draws."""
    for name, points in lines.items():
        style = runs[name]["style"]
        x = [p.x for p in points]
        y = [p.y for p in points]
        # a legend leaves out what begins with an underscore, so a space goes before it
        axis.plot(x, y, **style, label=" " + name)
        if label_of:
            for p in points:
                text = label_of(name, p.t)
                axis.annotate(text, (p.x, p.y), (4, 3), textcoords="offset points", fontsize=8)
        else:
            draw_intervals(axis, points, style["color"])
    axis.xaxis.get_major_locator().set_params(integer=integer_ticks)


def draw_intervals(axis, points, color):
    """A band, or a bar where it would be the band of a single point."""
    intervals = [(p.x, *p.interval) for p in points if p.interval and None not in p.interval]
    if not intervals:
        return
    x, low, high = zip(*intervals)
    if len(intervals) > 1:
        axis.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    else:
        axis.vlines(x, low, high, color=color, alpha=0.18, linewidth=4)


def iteration_label(name, t):
    """The text beside a point where iterations are numbered."""
    return str(t)


def iteration_panels(runs, metrics):
    """Panels of metrics over t."""
    return [metric_panel(runs, metric, "iteration", iteration_number) for metric in metrics]


def length_panels(runs, metrics, label_of=iteration_label):
    """Panels of metrics over the length of the answers, in each unit there is."""
    panels = []
    for metric in metrics:
        for unit in LENGTH:
            x_of = partial(length_of_answers, unit=unit)
            panels.append(metric_panel(runs, metric, f"{unit} per answer", x_of, label_of))
    return panels


# ---- dots and rewards, a panel per run ----


def dots_panel(runs, name, points, x_label, y_label):
    """A panel of points (n, 2) with Pearson's r of all of them; None without points.

    A fixed sample of them is drawn.
    """
    # r over all points
    n = len(points)
    if n == 0:
        return None
    r = "-"
    if n > 2 and (points.std(0) > 0).all():
        r = f"{np.corrcoef(points.T)[0, 1]:.2f}"
    panel_title = f"{name}: r = {r}, n = {n:,}"

    # dots: a run gets its share of what a page can hold
    sample = random.Random(0).sample(range(n), min(n, MAX_DOTS // len(runs)))
    draw = partial(draw_dots, points[sample], runs[name]["style"]["color"])
    return Panel(panel_title, x_label, y_label, draw, panel_title)


def draw_dots(points, color, axis):
    x, y = points.T
    axis.plot(x, y, "o", color=color, markersize=3, alpha=0.4, markeredgewidth=0)


def rewards_panel(runs, name):
    """A panel of the rewards of chosen and rejected over all steps of a run; None without steps."""
    run = runs[name]
    iterations = {t: iteration["steps"] for t, iteration in run["iterations"].items()}
    n_steps = sum(len(steps) for steps in iterations.values())
    if not n_steps:
        return None
    draw = partial(draw_rewards, iterations, run["style"]["color"])
    description = f"{name}: rewards of chosen and rejected, {n_steps} steps"
    return Panel(name, "step, iterations one after another", "reward", draw, description)


def draw_rewards(iterations, color, axis):
    """What rewards_panel draws: iterations one after another, each with its steps."""
    start = 0
    for t, steps in iterations.items():
        if not steps:
            continue

        # a border where an iteration begins
        axis.axvline(start, color=INK, alpha=0.3, linewidth=0.8)
        text = f" t =  {t}" if start == 0 else f" {t}"
        top = axis.get_xaxis_transform()  # x in steps, y from 0 to 1
        axis.text(start, 1, text, transform=top, va="top", fontsize=8)

        # rewards, where the log has them; a single step would be a line without length
        mark = "o" if len(steps) == 1 else ""
        x = range(start, start + len(steps))
        chosen = [step.get("reward_chosen", math.nan) for step in steps]
        rejected = [step.get("reward_rejected", math.nan) for step in steps]
        axis.plot(x, chosen, "-", marker=mark, color=color)
        axis.plot(x, rejected, "--", marker=mark, markerfacecolor="none", color=color)
        start += len(steps)


# ---- the figures ----


def run_panels(runs):
    """Panels of the paper's figures 2 to 6, under the names that page.html gives the figures."""
    metrics, lengths = metrics_and_lengths(runs)
    difference = "tokens chosen minus tokens rejected"

    panels = {
        "iterations": iteration_panels(runs, metrics + lengths),
        "lengths": length_panels(runs, metrics),
        "rewards": [],
        "responses": [],
        "margins": [],
    }
    for name, run in runs.items():
        responses = np.concatenate([it["responses"] for it in run["iterations"].values()])  # (n, 2)
        margins = np.concatenate([it["margins"] for it in run["iterations"].values()])  # (m, 4)
        panels["rewards"].append(rewards_panel(runs, name))
        panels["responses"].append(dots_panel(runs, name, responses, "tokens", "log-prob, nats"))
        panels["margins"].append(dots_panel(runs, name, margins[:, :2], difference, "s_ref, nats"))
    return panels


def budget_panels(group):
    """Figure 1, metrics over all prompts seen, if the runs differ in T or P."""
    if len(set(budgets(group).values())) == 1:
        return []
    metrics, _ = metrics_and_lengths(group)
    return [metric_panel(group, metric, "prompts seen so far", prompts_seen) for metric in metrics]


def budgets(group):
    """{name: "T = iterations, P = prompts of an iteration"}."""
    texts = {}
    for name, run in group.items():
        T = run["settings"]["iterations"]
        texts[name] = f"T = {T}, P = {prompts_per_iteration(run):,}"
    return texts


def hyperparameter_panels(group):
    """Figure 7, win rate over length at the last iteration, of three and more runs."""
    if len(group) < 3:
        return []
    metrics, _ = metrics_and_lengths(group)
    win_rates = [metric for metric in metrics if metric.field == "win_rate"]
    labels = differing_settings(group)
    last = {name: last_iteration(run) for name, run in group.items()}
    return length_panels(last, win_rates, lambda name, t: labels[name])


def metrics_and_lengths(runs):
    """The columns that are drawn: metrics, of whatever judge, and lengths."""
    judged = [column for column in columns(runs) if column.source != TRAINING]
    metrics = [c for c in judged if c.field in PERFORMANCE or c.field not in FIELDS]
    lengths = [c for c in judged if c.field in LENGTH]
    return metrics, lengths


def by_objective(runs):
    """{loss: runs}: the runs that can be compared with each other."""
    groups = {}
    for name, run in runs.items():
        groups.setdefault(run["settings"]["loss"], {})[name] = run
    return groups


def last_iteration(run):
    """The same run with no iteration but its last."""
    t = max(run["iterations"])
    return run | {"iterations": {t: run["iterations"][t]}}


def differing_settings(runs):
    """{name: the settings in which the runs differ, one a line}; the name where none differs."""
    keys = {}  # those of all runs, in their order
    for run in runs.values():
        keys |= run["settings"]

    differing = []
    for key in keys:
        values = {repr(run["settings"].get(key)) for run in runs.values()}
        if len(values) > 1 and key not in FREE | {"out"}:
            differing.append(key)

    labels = {}
    for name, run in runs.items():
        lines = [f"{key} {run['settings'].get(key)}" for key in differing]
        labels[name] = "\n".join(lines) or name
    return labels


# ---- files and inline SVG ----


def draw_pngs(runs, folder):
    """Draw iterations.png and length.png, those for which there is data; return their paths.

    They show win rate, right answers, instructions followed and length of eval.json, and what the
    guard's own file says; where there is no eval.json, all metrics.
    """
    drawn = [c for c in columns(runs) if c.field in PERFORMANCE or c.field in LENGTH]
    if any(c.source.bench == "win_rate" for c in drawn):
        drawn = [c for c in drawn if c.source.bench in ("win_rate", "guard")]
        drawn = [c for c in drawn if c.field not in ("lc_win_rate", "followed_share")]
    performance = [c for c in drawn if c.field in PERFORMANCE]
    lengths = [c for c in drawn if c.field in LENGTH]

    files = {
        "iterations.png": iteration_panels(runs, performance + lengths),
        "length.png": length_panels(runs, performance),
    }
    paths = []
    for file, panels in files.items():
        panels = [panel for panel in panels if panel]
        if panels:
            paths.append(os.path.join(folder, file))
            draw_png(panels, paths[-1])
    return paths


def draw_png(panels, path):
    """Panels side by side, with a legend in the first."""
    size = (4.6 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels):
        panel.draw(axis)
        axis.set(xlabel=panel.x_label, title=panel.title)
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panel_svg(panel, salt):
    """A panel as SVG: {"title", "description", "view_box", "elements"}.

    Elements are in the reader's text colour and name no place on the net. The salt makes their ids
    their own, so that many panels can stand in one page.
    """
    with matplotlib.rc_context(PAGE_RC | {"svg.hashsalt": salt}):
        figure, axis = plt.subplots(figsize=(3.8, 2.7), layout="constrained")
        panel.draw(axis)
        axis.set(xlabel=panel.x_label, ylabel=panel.y_label)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
        plt.close(figure)

    svg = re.search(r'<svg .*?viewBox="([^"]*)"[^>]*>(.*)</svg>', buffer.getvalue(), re.DOTALL)
    view_box, elements = svg.groups()

    # the page has its own namespace; metadata and the ids of groups say nothing
    elements = re.sub(r"<metadata>.*?</metadata>", "", elements, flags=re.DOTALL)
    elements = re.sub(r'<g id="[^"]*"', "<g", elements)
    elements = elements.replace("xlink:href", "href")
    return {
        "title": panel.title,
        "description": panel.description,
        "view_box": view_box,
        "elements": elements.replace(INK, "currentColor"),
    }
