"""The page's tables and figures as plain data, which page.html lays out.

page.html escapes all it prints, so what models, prompts, settings and names say stays text. The
page runs no script and loads nothing.
"""

import collections
import itertools
import os

import jinja2
import numpy as np

from nanoaipo.guard import NO_GUARD
from nanoaipo.report.alarms import (
    guard_alarms,
    guard_falls,
    length_alarm,
    length_alarms,
    without_guard,
)
from nanoaipo.report.figures import (
    MARKS,
    MAX_DOTS,
    budget_panels,
    budgets,
    by_objective,
    hyperparameter_panels,
    panel_svg,
    run_panels,
)
from nanoaipo.report.runs import (
    CONTROL,
    LENGTH,
    STAGES,
    all_iterations,
    columns,
    field_title,
    format_interval,
    format_number,
    judge_lines,
)
from nanoaipo.report.similarity import MAX_PAIRS, similarities

HERE = os.path.dirname(os.path.abspath(__file__))
MAX_PROMPTS = 5  # prompts of which a run's answers are on the page
MAX_CHARACTERS = 4000  # of a prompt and of an answer


def render_page(runs):
    """report.html as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=show_control,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        names=", ".join(runs),
        length_alarms=length_alarms(runs),
        guard_alarms=guard_alarms(runs),
        results=results(runs),
        figures=drawn_figures(runs),
        pairs=pairs_table(runs),
        counts=counts_table(runs),
        answers=answers(runs),
        settings=settings_table(runs),
    )


def show_control(value):
    """What the page prints of a value: control characters of a text as visible pictures."""
    if isinstance(value, str):
        return value.translate(CONTROL)
    return value


# ---- tables: groups of columns, head and rows, for the macro of page.html ----


def table(head, cells, groups=()):
    """A table with the rows {(name, t): cells}; a run's name stands in its first row only."""
    rows = []
    previous = None
    for (name, t), row in cells.items():
        if name == previous:
            rows.append({"name": "", "class": "", "cells": [str(t), *row]})
        else:
            rows.append({"name": name, "class": "first", "cells": [str(t), *row]})
        previous = name
    return {"groups": groups, "head": ["run", "t", *head], "rows": rows}


def group_columns(headings):
    """Groups of neighbouring columns with one heading, (name, small print)."""
    groups = []
    for (name, small), group in itertools.groupby(headings):
        groups.append({"name": name, "small": small, "width": len(list(group))})
    return groups


def score_cell(scores, field):
    """A number with its 95 % interval, and with an alarm where it is an alarming length."""
    cell = {"value": format_number(scores.get(field), field), "alarm": ""}
    cell["interval"] = format_interval(scores, field)
    alarm = length_alarm(scores)
    if alarm and field in LENGTH:
        cell["alarm"] = f"×{alarm['ratio']:.1f}"
    return cell


def results(runs):
    """The printed table with intervals and alarms, who judged, and scores by category."""
    lines = judge_lines(runs)
    categories = {source: categories_table(runs, source) for source in lines}
    return {
        "table": scores_table(runs, lines),
        "judges": list(lines.values()),
        "without_guard": ", ".join(without_guard(runs)),
        "no_guard": NO_GUARD,
        "categories": [(source.bench, found) for source, found in categories.items() if found],
    }


def scores_table(runs, lines):
    shown = columns(runs)
    cells = {}
    for name, t, iteration in all_iterations(runs):
        scores = iteration["scores"]
        if scores:
            cells[name, t] = [score_cell(scores.get(c.source, {}), c.field) for c in shown]

    # where the win rate rose and the guard fell
    for name, run in runs.items():
        for t, guard, _, _ in guard_falls(run):
            cells[name, t][shown.index(guard)]["alarm"] = "falls"

    # above the columns of a judge: benchmark, number of the judge's line, judge
    headings = []
    for source, _ in shown:
        small = ""
        if source in lines:
            number = lines[source].split()[0]
            small = f"{number} {source.judge}"
        headings.append((source.bench, small))
    return table([field_title(field) for _, field in shown], cells, group_columns(headings))


def categories_table(runs, source):
    """Scores by category, None if the benchmark has none."""
    scores = {}
    for name, t, iteration in all_iterations(runs):
        by_category = iteration["scores"].get(source, {}).get("categories")
        if by_category:
            scores[name, t] = by_category
    if not scores:
        return None

    categories = {}  # those of all rows, in their order
    for row in scores.values():
        categories |= row
    cells = {}
    for key, row in scores.items():
        cells[key] = [format_number(row.get(category), "score") for category in categories]
    return table(list(categories), cells)


def pairs_table(runs):
    """Table 2: similarity and log-probs of chosen and rejected, how often the longer one won."""
    method, cosines = similarities(runs)
    cells = {}
    for name, t, iteration in all_iterations(runs):
        texts = iteration["texts"]
        margins = iteration["margins"]
        if not texts:
            continue
        logps = ["-", "-"]
        if len(margins):
            logps = [f"{logp:+.2f}" for logp in margins[:, 2:].mean(0)]  # chosen, rejected
        longer_won = share_longer_won(iteration["summaries"])
        cells[name, t] = [f"{len(texts):,}", f"{cosines[name, t]:.3f}", *logps, longer_won]
    if not cells:
        return None
    head = ["pairs", "similarity", "logp chosen", "logp rejected", "longer won"]
    return {"table": table(head, cells), "method": method, "max_pairs": f"{MAX_PAIRS:,}"}


def share_longer_won(summaries):
    """How often the longer of two responses was chosen, over all shards, as text."""
    summaries = [summary for summary in summaries if summary.get("longer_won_n")]
    if not summaries:
        return "-"
    shares = [summary["longer_won"] for summary in summaries]
    weights = [summary["longer_won_n"] for summary in summaries]
    return f"{100 * np.average(shares, weights=weights):.0f}%"


def counts_table(runs):
    """What each stage counted, and the names of what was 0 everywhere."""
    total = collections.Counter()
    for stage in STAGES:
        for _, _, iteration in all_iterations(runs):
            for key, n in iteration["counts"][stage].items():
                total[stage, key] += n
    nonzero = [column for column in total if total[column]]
    zero = [f"{STAGES[stage]}: {key}" for stage, key in total if not total[stage, key]]

    cells = {}
    for name, t, iteration in all_iterations(runs):
        counts = iteration["counts"]
        if any(counts.values()):
            cells[name, t] = [format_count(counts[stage].get(key)) for stage, key in nonzero]
    if not cells:
        return None

    # keys become words
    head = [key.replace("_", " ") for _, key in nonzero]
    groups = group_columns((STAGES[stage], "") for stage, _ in nonzero)
    zero = ", ".join(zero).replace("_", " ") or "-"
    return {"table": table(head, cells, groups), "zero": zero}


def format_count(n):
    return "-" if n is None else f"{n:,}"


# ---- figures, answers, settings ----


def drawn_figures(runs):
    """Figures as lists of SVG panels, None without any; "comparisons" for each objective."""
    numbers = itertools.count()  # no two panels of the page may share ids

    def svgs(panels):
        return [panel_svg(panel, f"panel {next(numbers)}") for panel in panels if panel]

    figures = {name: svgs(panels) for name, panels in run_panels(runs).items()}
    comparisons = []
    for loss, group in by_objective(runs).items():
        budget_texts = [f"{name}: {budget}" for name, budget in budgets(group).items()]
        comparisons.append(
            {
                "loss": loss,
                "legend": legend(group),
                "budgets": "; ".join(budget_texts),
                "budget_panels": svgs(budget_panels(group)),
                "hyperparameter_panels": svgs(hyperparameter_panels(group)),
            }
        )
    if not any(figures.values()):
        return None
    return figures | {
        "legend": legend(runs),
        "max_dots": f"{MAX_DOTS // len(runs):,}",
        "comparisons": comparisons,
    }


def legend(runs):
    entries = []
    for name, run in runs.items():
        mark = MARKS[run["style"]["marker"]]
        entries.append({"name": name, "color": run["style"]["color"], "mark": mark})
    return entries


def answers(runs):
    """Answers to the same few prompts, t = 0, 1, ... side by side: {name: [prompt, ...]}."""
    prompts = {name: answered_prompts(run) for name, run in runs.items()}
    return {name: found for name, found in prompts.items() if found}


def answered_prompts(run):
    """The first few prompts that every iteration with answers has answered, and the answers."""
    answered = {t: it["answers"] for t, it in run["iterations"].items() if it["answers"]}
    if not answered:
        return []
    first = next(iter(answered.values()))
    same = list(first)
    for records in answered.values():
        same = [key for key in same if key in records]

    prompts = []
    for key in same[:MAX_PROMPTS]:
        text = conversation(first[key]["prompt"])[:MAX_CHARACTERS]
        shown = []
        for t, records in answered.items():
            shown.append(shown_answer(t, records[key]["responses"][0]))
        prompts.append({"text": text, "answers": shown})
    return prompts


def conversation(messages):
    """A prompt as text, with roles where it has several messages."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def shown_answer(t, response):
    """The answer of iteration t; more: how many characters are left out."""
    text = response["text"]
    size = f"{len(text):,} characters"
    if "ids" in response:
        size = f"{len(response['ids']):,} tokens"
    if not response.get("finished", True):
        size += ", cut off"
    more = ""
    if len(text) > MAX_CHARACTERS:
        more = f"{len(text) - MAX_CHARACTERS:,}"
    return {"t": t, "size": size, "text": text[:MAX_CHARACTERS], "more": more}


def settings_table(runs):
    """The settings that recipes set; None without any."""
    keys = {}  # those of all recipes, in their order
    for run in runs.values():
        keys |= run["recipe"]

    rows = []
    for key in keys:
        cells = [str(run["recipe"].get(key, "-")) for run in runs.values()]
        differ = "differ" if len(set(cells)) > 1 else ""
        rows.append({"name": key, "class": differ, "cells": cells})
    if not rows:
        return None
    return {"groups": [], "head": ["setting", *runs], "rows": rows}
