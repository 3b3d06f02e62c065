"""report.html: one page without scripts that loads nothing, with the figures of plot.py and what else the files of runs say.

text(...) is the only way in for what models, prompts, settings and names say.
"""
import html
import importlib.util
import io
import itertools
import random
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from nanoaipo.stats import LENGTH_ALARM
from nanoaipo.report.runs import CONTROL, DRAWN, INK, LENGTH, MARKS, STAGES, columns, everyone, judges, number, show, title

PAGE_RC = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK)
EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
SHOWN, CUT = 5, 4000                                                    # prompts and characters of answers shown


def text(value):
    """A text for HTML: escaped, control characters made visible."""
    return html.escape(str(value).translate(CONTROL))


def svg(panel, salt):
    """A panel as inline SVG: in the reader's text colour, with ids of its own, naming no place on the net."""
    _, label, ylabel, draw, told = panel
    with matplotlib.rc_context(PAGE_RC | {"svg.hashsalt": salt}):
        figure, axis = plt.subplots(figsize=(3.8, 2.7), layout="constrained")
        draw(axis)
        axis.set(xlabel=label, ylabel=ylabel)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
        plt.close(figure)
    start, inner = re.search(r'<svg .*?(viewBox="[^"]*")[^>]*>(.*)', buffer.getvalue(), re.S).groups()
    inner = re.sub(r'(<g) id="[^"]*"|<metadata>.*?</metadata>', r"\1", inner, flags=re.S)
    return f'<svg {start} role="img" aria-label="{text(told)}">' + inner.replace("xlink:href", "href").replace(INK, "currentColor")


def grid(head, rows, groups=""):
    """A table of escaped cells; the first of a row is its heading, empty where it is that of the row above."""
    body, head = "", "".join(f'<th scope="col">{h}</th>' for h in head)
    for name, *cells in rows:
        body += f'<tr{" class=first" * bool(name)}><th scope="row">{name}</th>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>\n"
    return f'<div class="wide" tabindex="0"><table><thead>{groups}<tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def by_run(runs, cells):
    """Rows of run, t and cells(name, t, iteration), where that gives something; the run's name stands once."""
    rows = [(name, t, row) for name, t, now in everyone(runs) if (row := cells(name, t, now))]
    return [[text(name) * (k == 0 or rows[k - 1][0] != name), str(t), *row] for k, (name, t, row) in enumerate(rows)]


def over(names):
    """The row above a table's heads, for groups of equal neighbours: (heading, small print) of each column behind run and t."""
    groups = [(name, len(list(same))) for name, same in itertools.groupby(names)]
    heads = "".join(f'<th scope="colgroup" colspan="{n}">{text(name)} <small>{text(small)}</small></th>' for (name, small), n in groups)
    return f'<tr><td colspan="2"></td>{heads}</tr>'


def too_long(now):
    """{(bench, judge): (ratio, answers' length, baseline's, unit)} where answers are alarmingly longer than the baseline's."""
    found = {}
    for key, row in now["scores"].items():
        unit, base = next((u for u in LENGTH if number(row, u)), ""), number(row, "baseline_length")
        if unit and base and row[unit] > LENGTH_ALARM * base:
            found[key] = row[unit] / base, row[unit], base, unit
    return found


def alarm_section(runs):
    lines = {}
    for name, t, now in everyone(runs):
        for ratio, length, base, unit in list(too_long(now).values())[:1]:     # two judges have read the same answers
            lines.setdefault(name, []).append(f"t = {t}: {ratio:.1f} times the baseline's ({length:.1f} against {base:.1f} {unit})")
    lines = "".join(f"<li><b>{text(name)}</b> {'; '.join(told)}</li>" for name, told in lines.items())
    return lines and '<div class="banner" role="note"><b class="alarm">Length alarm.</b> These answers are far longer than the baseline\'s, ' \
        f"and judges like length: do not read their win rates as quality.<ul>{lines}</ul></div>"


def results_section(runs):
    """The table with 95 % intervals and alarms, who judged, and scores by category."""
    shown, lines = columns(runs), judges(runs)

    def cell(now, key, field):
        row, value = now["scores"].get(key, {}), show(now["scores"].get(key, {}), field)
        ends = [show({field: end}, field) for end in row.get(field + "_ci") or ()]
        longer = f' <b class="alarm">×{too_long(now)[key][0]:.1f}</b>' if field in LENGTH and key in too_long(now) else ""
        return value + longer + (f"<small>{ends[0].rstrip('%')} – {ends[1]}</small>" if set(ends) - {value} else "")
    rows = by_run(runs, lambda name, t, now: now["scores"] and [cell(now, *column) for column in shown])
    groups = over([(key[0], f"{lines[key].split()[0]} {key[1]}" if key in lines else "") for key, _ in shown])
    notes = "".join(f"{text(line)}<br>" for line in lines.values()) + "Small: 95 % intervals. Training pairs: means over the steps of iteration t."
    out = grid(["run", "t", *(text(title(f)) for _, f in shown)], rows, groups) + f'<p class="note">{notes}</p>'
    for key in lines:
        rows = {(name, t): now["scores"][key]["categories"] for name, t, now in everyone(runs) if now["scores"].get(key, {}).get("categories")}
        names = list(dict.fromkeys(c for row in rows.values() for c in row))
        table = by_run(runs, lambda name, t, now: [show({"score": rows[name, t].get(c)}, "score") for c in names if (name, t) in rows])
        out += f"<h3>{text(key[0])} by category</h3>" + grid(["run", "t", *map(text, names)], table) if rows else ""
    return out


def similarities(runs):
    """How alike chosen and rejected are: (what measures it, {(name, t): mean cosine}), over at most DRAWN pairs of an iteration."""
    texts = {(name, t): random.Random(0).sample(now["texts"], min(DRAWN, len(now["texts"]))) for name, t, now in everyone(runs) if now["texts"]}
    flat, method = [side for pairs in texts.values() for pair in pairs for side in pair], ""
    if flat and importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer
        try:
            vectors, method = SentenceTransformer(EMBEDDER, local_files_only=True).encode(flat, normalize_embeddings=True), EMBEDDER
        except OSError as e:                                            # nothing is fetched
            print(f"{EMBEDDER} is not on this machine: similarity by TF-IDF ({str(e).splitlines()[0]})")
    if flat and not method:
        from sklearn.feature_extraction.text import TfidfVectorizer
        vectors, method = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]").fit_transform([*flat, "."]), "TF-IDF of words"
    ends = list(itertools.accumulate((2 * len(pairs) for pairs in texts.values()), initial=0))
    dot = lambda w, l: (w.multiply(l) if hasattr(w, "multiply") else w * l).sum()
    return method, {at: dot(vectors[a:b:2], vectors[a + 1:b:2]) / ((b - a) / 2) for at, a, b in zip(texts, ends, ends[1:])}


def pairs_section(runs):
    """Table 2: similarity and log-probs of chosen and rejected, and how often the longer one was chosen."""
    method, alike = similarities(runs)

    def cells(name, t, now):
        logp = [f"{x:+.2f}" for x in now["margins"][:, 2:].mean(0)] if len(now["margins"]) else ["-", "-"]
        won = [(s["longer_won"], s["longer_won_n"]) for s in now["summary"] if s.get("longer_won_n")]     # of each shard
        won = f"{100 * np.average([w for w, _ in won], weights=[n for _, n in won]):.0f}%" if won else "-"
        return now["texts"] and [f"{len(now['texts']):,}", f"{alike[name, t]:.3f}", *logp, won]
    rows = by_run(runs, cells)
    return rows and grid(["run", "t", "pairs", "similarity", "logp chosen", "logp rejected", "longer won"], rows) + \
        f'<p class="note">After Table 2 of the paper. Similarity: mean cosine of chosen and rejected by {method}, of at most {DRAWN:,} pairs. ' \
        "Log-probs: under the policy that sampled them, before training. Longer won: how often the ranker chose the longer of two lengths.</p>"


def counts_section(runs):
    """What each stage counted; what was 0 everywhere is named below."""
    every = dict.fromkeys((stage, key) for stage in STAGES for *_, now in everyone(runs) for key in now["counts"][stage])
    some = [(s, k) for s, k in every if any(now["counts"][s].get(k) for *_, now in everyone(runs))]
    never = text(", ".join(f"{STAGES[s]}: {k}" for s, k in every if (s, k) not in some).replace("_", " ") or "-")
    count = lambda now, s, k: f"{now['counts'][s][k]:,}" if k in now["counts"][s] else "-"
    rows = by_run(runs, lambda name, t, now: any(now["counts"].values()) and [count(now, s, k) for s, k in some])
    head = ["run", "t", *(text(k.replace("_", " ")) for _, k in some)]
    return rows and grid(head, rows, over([(STAGES[s], "") for s, _ in some])) + f'<p class="note">0 everywhere: {never}</p>'


def answers_section(runs):
    """The answers to the same few prompts, t = 0, 1, ... from left to right, a block per run."""
    out = ""
    for name, run in runs.items():
        there = {t: now["answers"] for t, now in run["iterations"].items() if now["answers"]}
        same = [i for i in next(iter(there.values()), ()) if all(i in answers for answers in there.values())][:SHOWN]
        out += f"<h3>{text(name)}</h3>" if same else ""
        for i in same:
            messages = next(iter(there.values()))[i]["prompt"]
            asked = "\n\n".join(f"{m['role']}: " * (len(messages) > 1) + m["content"] for m in messages)
            out += f'<h4 dir="auto" tabindex="0">{text(asked[:CUT])}</h4><div class="answers" tabindex="0">'
            for t, r in ((t, answers[i]["responses"][0]) for t, answers in there.items()):
                size = (f"{len(r['ids']):,} tokens" if "ids" in r else f"{len(r['text']):,} characters") + ", cut off" * (not r.get("finished", True))
                rest = f"<small> … {len(r['text']) - CUT:,} more characters</small>" if len(r["text"]) > CUT else ""
                out += f'<div><small>t = {t}, {size}</small><p dir="auto" tabindex="0">{text(r["text"][:CUT])}{rest}</p></div>\n'
            out += "</div>"
    return out


def settings_section(runs):
    keys = dict.fromkeys(k for run in runs.values() for k in run["recipe"])
    rows = [[text(k), *(text(run["recipe"].get(k, "-")) for run in runs.values())] for k in keys]
    rows = [[key, *(f"<b>{c}</b>" if len(set(cells)) > 1 else c for c in cells)] for key, *cells in rows]
    note = '<p class="note">From recipe.py; what is not in it has its default. Bold: the runs differ.</p>'
    return rows and f'<div class="settings">{grid(["setting", *map(text, runs)], rows)}</div>{note}'


STYLE = """
:root { color-scheme: light dark; --ink: #1d2024; --page: #fff; --soft: #646a72; --rule: #d9dce0; --alarm: #b03a00; --tint: #fdf1e8 }
@media (prefers-color-scheme: dark) { :root { --ink: #d9dce0; --page: #15171a; --soft: #979ea7; --rule: #363a40; --alarm: #ff9a57; --tint: #2b1d13 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem 1.25rem 4rem; font: 15px/1.5 system-ui, sans-serif }
body { color: var(--ink); background: var(--page) }
h1, h3, p, li, figcaption, th[colspan], .legend span { overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem } h3, h4 { font-size: 1rem; margin: 1.4rem 0 .1rem }
p, ul { margin: .3rem 0 } ul { padding-left: 1.1rem } i { font-style: normal } a { color: inherit; margin-right: .9rem }
small, nav, .note, .legend { font-size: .82rem; font-weight: 400; color: var(--soft) } .note, li, figcaption { max-width: 60rem }
.banner { margin: 1.2rem 0; padding: .7rem 1rem; border-left: 5px solid var(--alarm); background: var(--tint) } .alarm { color: var(--alarm) }
.wide, .answers { overflow-x: auto } table { border-collapse: collapse; font-size: .87rem; line-height: 1.35; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; vertical-align: top; white-space: nowrap; font-weight: 400; unicode-bidi: isolate }
td small { display: block; font-size: .75rem } thead th { color: var(--soft); vertical-align: bottom }
.first > * { border-top: 1px solid var(--rule) } th[colspan] { text-align: left; white-space: normal; color: var(--ink); font-weight: 600 }
th:first-child { text-align: left; padding-left: 0; color: var(--ink) } .settings th:first-child { color: var(--soft) }
.settings tr > * { border: 0; text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6rem; padding-block: .05rem }
figure { margin: 0 0 1.8rem } figcaption { color: var(--soft) }
figcaption, .panels p, .answers p { font-size: .87rem } .legend span { margin-right: 1rem }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17.5rem, 100%), 1fr)); gap: .8rem 1.4rem; margin-top: .4rem }
.panels div { display: flex; flex-direction: column; justify-content: space-between; min-width: 0 }
svg { width: 100%; height: auto } svg text { font-family: system-ui, sans-serif !important }
h4 { font-weight: 500; max-height: 9rem; overflow: auto } h4, .answers p { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.answers { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(10rem, 1fr); gap: 1rem }
.answers > div { border-top: 1px solid var(--rule); min-width: 0 } .answers p { max-height: 12rem; overflow: auto; line-height: 1.4; margin: 0 }
"""


def report(runs, figures):
    """The page, as text; figures: (heading, caption, panels, runs of the legend) each, as plot.py yields them."""
    drawn, salt = "", itertools.count()
    for heading, caption, panels, named in figures:
        panels = "".join(f"<div><p>{text(p[0])}</p>{svg(p, f'panel {next(salt)}')}</div>\n" for p in panels if p)
        marks = [(run["look"]["color"], MARKS[run["look"]["marker"]], text(name)) for name, run in named.items()]
        marks = '<p class="legend">' + "".join(f'<span><i style="color:{color}">{mark}</i> {name}</span>' for color, mark, name in marks) + "</p>"
        if panels:
            drawn += f'<figure><h3>{text(heading)}</h3><figcaption>{text(caption)}</figcaption>{marks}<div class="panels">{panels}</div></figure>'
    sections = {"Results": results_section(runs), "Figures": drawn, "Pairs": pairs_section(runs), "Counts": counts_section(runs),
                "Answers": answers_section(runs), "Settings": settings_section(runs)}
    sections, names = {heading: inner for heading, inner in sections.items() if inner}, text(", ".join(runs))
    body = "".join(f'<section id="{h.lower()}"><h2>{h}</h2>{inner}</section>' for h, inner in sections.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{names} - nanoAIPO</title><style>{STYLE}</style></head>
<body><header><h1>{names}</h1><nav>{"".join(f'<a href="#{h.lower()}">{h}</a>' for h in sections)}</nav></header>
<main>{alarm_section(runs)}{body}</main></body></html>
"""
