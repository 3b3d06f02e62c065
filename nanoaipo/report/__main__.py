"""Table, figures and report of one or more runs, from their files alone.

    python -m nanoaipo.report out/tiny_aipo out/tiny_dpo
        prints the table; writes iterations.png, length.png and report.html to out/
    python -m nanoaipo.report out/tiny_aipo
        the same of one run; its files lie in out/tiny_aipo/

Win rate is the judge's word, against the first policy; accuracy the truth where prompts carry
answers, "followed" and "share followed" where they carry instructions: all of a prompt's, and their
share. An alarm says where the first rises while the truth falls. The figures are AIPO's
(2409.08845). Benchmarks' scores (eval.py --bench=...) show up too if they lie in iter_T/.
"""

import os
import sys

import matplotlib
import matplotlib.pyplot as plt

from configurator import declared_by_all, literals, run_script, values_of
from nanoaipo.guard import NO_GUARD
from nanoaipo.report.alarms import guard_alarms, without_guard
from nanoaipo.report.figures import RC, draw_pngs, run_style
from nanoaipo.report.page import render_page
from nanoaipo.report.runs import (
    CONTROL,
    all_iterations,
    columns,
    field_title,
    format_interval,
    format_number,
    judge_lines,
    load_run,
)


def main():
    folders = list(dict.fromkeys(os.path.normpath(argument) for argument in sys.argv[1:]))
    if not folders or any(folder.startswith("-") for folder in folders):
        sys.exit(__doc__.strip())  # no InputError, which would be one line
    runs = load_runs(folders)
    print_table(runs)

    # what is drawn of a single run lies in it, of several beside them
    place = folders[0]
    if len(folders) > 1:
        parents = [os.path.dirname(os.path.abspath(folder)) for folder in folders]
        place = os.path.commonpath(parents)
    matplotlib.use("Agg")
    plt.rcParams.update(RC)
    for path in draw_pngs(runs, place):
        print(path)

    page = os.path.join(place, "report.html")
    with open(page + ".tmp", "w", encoding="utf-8", errors="replace") as f:
        f.write(render_page(runs))
    os.replace(page + ".tmp", page)
    print(f"report: {page}")


def load_runs(folders):
    """{name: run}; named by their folders, or by the whole paths where two folders share a name."""
    defaults = values_of(declared_by_all())
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = folders

    runs = {}
    for k, (name, folder) in enumerate(zip(names, folders)):
        recipe = {}
        path = os.path.join(folder, "recipe.py")
        if os.path.exists(path):
            recipe = values_of(literals(path))
        run = load_run(folder, recipe, defaults)
        runs[name.translate(CONTROL)] = run | {"style": run_style(k)}
    return runs


def print_table(runs):
    """Print the numbers of all iterations, who judged, and what the win rates do not say."""
    lines = judge_lines(runs)
    shown = columns(runs)

    # where several judge, a column says by its number whose it is
    heads = []
    for column in shown:
        head = field_title(column.field)
        if len(lines) > 1 and column.source in lines:
            head += lines[column.source].split()[0]
        heads.append(head)

    width = max(len(name) for name in runs)
    for name, t, cells in [("run", "t", heads), *table_rows(runs, shown)]:
        cells = [f"{cell:>{max(8, len(head))}}" for cell, head in zip(cells, heads)]
        print(f"{name:{width}}  {t:>2}  {'  '.join(cells)}".rstrip())
    print("±: half the width of a 95 % interval")
    print("\n".join(lines.values()))

    for name, sentences in guard_alarms(runs).items():
        for sentence in sentences:
            print(f"GUARD ALARM: {name}: win rate rises, guard falls: {sentence}")
    for name in without_guard(runs):
        print(f"{name}: {NO_GUARD}")


def table_rows(runs, shown):
    """(name, t, cells) of two lines per iteration: its numbers, and half their 95 % intervals."""
    rows = []
    for name, t, iteration in all_iterations(runs):
        if not iteration["scores"]:
            continue
        numbers = []
        margins = []
        for column in shown:
            scores = iteration["scores"].get(column.source, {})
            numbers.append(format_number(scores.get(column.field), column.field))
            margins.append(format_margin(scores, column.field))
        rows.append((name, t, numbers))
        if any(margins):
            rows.append(("", "", margins))
    return rows


def format_margin(scores, field):
    """Half the width of a number's 95 % interval as text, "" where it has none."""
    if not format_interval(scores, field):
        return ""
    low, high = scores[field + "_ci"]
    return "±" + format_number((high - low) / 2, field).strip("+%")


if __name__ == "__main__":
    run_script(main)
