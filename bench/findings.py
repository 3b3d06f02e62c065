"""Run the findings of AIPO (2409.08845) on the embedded world and write docs/findings.md with its figures. See findings.sh.

Every objective gets three values of one setting, tried for TUNED iterations on a seed of its own; the value with the best
length-controlled win rate, which is what one sees without the truth, runs for T iterations on three seeds. What is claimed is
tested on the numbers, and the page says of each claim whether it holds here.
"""
import concurrent.futures
import json
import os
import queue
import subprocess
import sys
import tempfile
import time

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from plot import RC
from nanoaipo.report.runs import load
from warm import warm

OUT, DOCS, T, TUNED, P, SEEDS, TUNING_SEED = "out/findings", "docs", 6, 3, 512, (0, 1, 2), 100
OBJECTIVES = {                                                          # settings, the one that is tuned, and its values
    "DPO": ({"loss": "dpo"}, "beta", (0.25, 0.5, 1.0)),
    "DPO+NLL": ({"loss": "irpo", "beta": 0.5}, "lambda_", (0.2, 0.5, 1.0)),
    "alpha-DPO": ({"loss": "alpha_dpo", "beta": 0.5}, "alpha", (0.1, 0.2, 0.3)),
    "AIPO": ({"loss": "aipo", "beta": 0.5, "lambda_": 0.2}, "alpha", (0.1, 0.2, 0.3)),
    "SimPO": ({"loss": "simpo", "gamma": 0.5}, "beta", (2.0, 5.0, 10.0)),
    "SPPO": ({"loss": "sppo"}, "beta", (0.05, 0.1, 0.2)),
    "iREPO": ({"loss": "irepo"}, "beta", (0.1, 0.25, 0.5)),
    "R-DPO": ({"loss": "rdpo", "beta": 0.5}, "alpha", (0.01, 0.03, 0.1)),
}
COLORS = dict(zip(OBJECTIVES, ("#d55e00", "#e69f00", "#8069d6", "#2f7fc1", "#009e73", "#c2559d", "#7f7f7f", "#a08200")))
BUDGETS = [(1, 6 * P), (2, 3 * P), (3, 2 * P), (6, P)]                  # T x P, the same number of prompts


def work(jobs):
    """Take runs, (name, settings), from the queue until it is empty; each has its log beside it."""
    with tempfile.TemporaryDirectory() as folder, warm(folder) as env:
        while True:
            try:
                name, settings = jobs.get_nowait()
            except queue.Empty:
                return
            out, began = f"{OUT}/{name}", time.time()
            if os.path.exists(f"{out}/report.html"):                    # what iterate.sh ends with
                continue
            with open(out + ".log", "w", encoding="utf-8") as log:
                code = subprocess.run(["bash", "iterate.sh", "config/tiny.py", f"--out={out}", *(f"--{k}={v}" for k, v in settings.items())],
                                      stdout=log, stderr=log, env=env).returncode
            code == 0 or sys.exit(f"{out}.log: the run failed")
            print(f"{name}: {time.time() - began:.0f} s, {jobs.qsize()} runs wait", flush=True)


def run_all(jobs):
    os.makedirs(OUT, exist_ok=True)
    waiting = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for worker in [pool.submit(work, waiting) for _ in range(2)]:
            worker.result()


def scores(name, t):
    with open(f"{OUT}/{name}/iter_{t}/eval.json", encoding="utf-8") as f:
        return json.load(f)


def steps(name):
    """The records of all training steps of a run, iteration after iteration."""
    found = []
    for t in range(1, T + 1):
        with open(f"{OUT}/{name}/iter_{t}/model/metrics.jsonl", encoding="utf-8") as f:
            found.append([json.loads(line) for line in f])
    return found


def slug(objective, *more):
    return "_".join([objective.lower().replace("+", "_").replace("-", "_"), *map(str, more)])


def over_seeds(objective, field, t):
    """(mean, standard deviation over seeds) of a score of the answers after t iterations."""
    values = [scores(slug(objective, s), t)[field] for s in SEEDS]
    return np.mean(values), np.std(values, ddof=1)


def at_length(objective, field, length):
    """A score where the mean over seeds first reaches this length, between iterations in a straight line; None beyond the last."""
    points = [(over_seeds(objective, "length", t)[0], over_seeds(objective, field, t)[0]) for t in range(T + 1)]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= length <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (length - x0) / (x1 - x0)


def save(figure, name):
    figure.savefig(f"{DOCS}/{name}.png", dpi=130)
    plt.close(figure)
    return f"![{name.replace('_', ' ')}]({name}.png)"


def curves():
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    for axis, (field, title) in zip(axes, (("win_rate", "win rate %, by the judge"), ("lc_win_rate", "length-controlled win rate %"),
                                           ("accuracy", "right answers %, the truth"), ("length", "tokens per answer"))):
        for name, color in COLORS.items():
            mean, spread = np.array([over_seeds(name, field, t) for t in range(T + 1)]).T
            axis.plot(range(T + 1), mean, "o-", color=color, label=name)
            axis.fill_between(range(T + 1), mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0)
        axis.set(title=title, xlabel="iteration")
    axes[0].legend(frameon=False, fontsize=8)
    return save(figure, "findings_iterations")


def batches_by_length():
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    titles = {"win_rate": "win rate %", "lc_win_rate": "length-controlled win rate %", "accuracy": "right answers %"}
    for axis, (field, title) in zip(axes, titles.items()):
        for name, color in COLORS.items():
            x, y = ([over_seeds(name, f, t)[0] for t in range(T + 1)] for f in ("length", field))
            axis.plot(x, y, "o-", color=color, label=name)
        axis.set(title=title, xlabel="tokens per answer")
    axes[0].legend(frameon=False, fontsize=8)
    return save(figure, "findings_length")


def rewards():
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained", sharey=True)
    for axis, name in zip(axes, ("DPO", "DPO+NLL", "AIPO")):
        at = 0
        for iteration in steps(slug(name, SEEDS[0])):
            x = range(at, at + len(iteration))
            axis.plot(x, [r["reward_chosen"] for r in iteration], color=COLORS[name])
            axis.plot(x, [r["reward_rejected"] for r in iteration], "--", color=COLORS[name])
            axis.axvline(at, color="0.7", linewidth=0.8)
            at += len(iteration)
        axis.set(title=f"{name}: rewards, chosen solid, rejected dashed", xlabel="step")
    return save(figure, "findings_rewards")


def margins():
    """Fig. 5 and 6 from a run of DPO; returns the figure's line and both correlations."""
    iterations = load(f"{OUT}/{slug('DPO', SEEDS[0])}", 0)["iterations"].values()
    responses, pairs = (np.concatenate([now[k] for now in iterations]) for k in ("responses", "margins"))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, points, labels in ((axes[0], responses, ("tokens", "log-prob, nats")),
                                 (axes[1], pairs[:, :2], ("tokens, chosen minus rejected", "s_ref, nats"))):
        axis.plot(*points[:: max(1, len(points) // 2000)].T, "o", color=COLORS["DPO"], alpha=0.4, markersize=3, markeredgewidth=0)
        axis.set(xlabel=labels[0], ylabel=labels[1], title=f"r = {np.corrcoef(points.T)[0, 1]:.2f}, n = {len(points):,}")
    return save(figure, "findings_margins"), np.corrcoef(responses.T)[0, 1], np.corrcoef(pairs[:, :2].T)[0, 1]


def budgets():
    """Rows (T, P, {field: (mean, spread)}) of DPO with the same number of prompts in all."""
    rows = []
    for turns, prompts in BUDGETS:
        names = [slug("DPO", s) if turns == T else slug("dpo_budget", turns, s) for s in SEEDS]
        rows.append((turns, prompts, {f: (np.mean(v), np.std(v, ddof=1)) for f in ("win_rate", "lc_win_rate", "accuracy", "length")
                                      for v in [[scores(n, turns)[f] for n in names]]}))
    return rows


def page(chosen, tuning, began):
    cell = lambda pair, digits=1: f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"
    fields = ("win_rate", "lc_win_rate", "accuracy", "length")
    last = {o: {f: over_seeds(o, f, T) for f in fields} for o in OBJECTIVES}
    best = {o: max(range(T + 1), key=lambda t: over_seeds(o, "accuracy", t)[0]) for o in OBJECTIVES}
    rows = [f"| {o} | {OBJECTIVES[o][1]} {chosen[o]} of {', '.join(map(str, OBJECTIVES[o][2]))} | " + " | ".join(cell(last[o][f]) for f in fields)
            + f" | {cell(over_seeds(o, 'accuracy', best[o]))} (t = {best[o]}) |" for o in OBJECTIVES]
    figure, r_length, r_margin = margins()
    spent = budgets()
    common = min(last[o]["length"][0] for o in OBJECTIVES)
    equal = {o: {f: at_length(o, f, common) for f in ("lc_win_rate", "accuracy")} for o in OBJECTIVES}
    ranked = {f: sorted(OBJECTIVES, key=lambda o: -equal[o][f]) for f in ("lc_win_rate", "accuracy")}
    falls = {o: np.mean([iteration[-1]["reward_chosen"] for s in SEEDS for iteration in steps(slug(o, s))]) for o in ("DPO", "DPO+NLL", "AIPO")}
    grew = {o: last[o]["length"][0] / over_seeds(o, "length", 0)[0] for o in OBJECTIVES}
    claims = [
        ("Iterating amplifies length: with the same number of prompts, more iterations of DPO give longer answers (Finding 2)",
         all(a[2]["length"][0] < b[2]["length"][0] for a, b in zip(spent, spent[1:])),
         ", ".join(f"{r[2]['length'][0]:.1f}" for r in spent) + " tokens at T = 1, 2, 3, 6"),
        ("The agreement-aware objective grows less than DPO", grew["AIPO"] < grew["DPO"] and grew["alpha-DPO"] < grew["DPO"],
         ", ".join(f"{o} x{grew[o]:.1f}" for o in ("DPO", "DPO+NLL", "alpha-DPO", "AIPO"))),
        ("AIPO's answers are right more often than DPO's after the last iteration", last["AIPO"]["accuracy"][0] > last["DPO"]["accuracy"][0],
         f"{cell(last['AIPO']['accuracy'])} against {cell(last['DPO']['accuracy'])} %"),
        *((f"At equal length ({common:.1f} tokens, the shortest of the last iterations) AIPO has the best {what} (Fig. 3)", ranked[f][0] == "AIPO",
           ", ".join(f"{o} {equal[o][f]:.1f}" for o in ranked[f]))
          for f, what in (("lc_win_rate", "length-controlled win rate"), ("accuracy", "share of right answers"))),
        ("The NLL term keeps the reward of chosen responses from falling (Fig. 4)", falls["DPO+NLL"] > falls["DPO"],
         ", ".join(f"{o} {v:+.2f}" for o, v in falls.items()) + " at the last step of an iteration, mean"),
        ("Longer responses have lower log-prob (Fig. 5), and s_ref falls with the difference of length (Fig. 6: -0.47 in the paper)",
         r_length < 0 and r_margin < 0, f"r = {r_length:.2f} and {r_margin:.2f}"),
    ]
    verdicts = [f"| {claim} | {'**holds**' if holds else '**does not hold**'} | {told} |" for claim, holds, told in claims]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    told = lambda o, v: f"{v}: {tuning[o][v]['lc_win_rate']:.1f}, {tuning[o][v]['length']:.1f}"
    tried = [f"| {o} | " + " | ".join(told(o, v) for v in OBJECTIVES[o][2]) + " |" for o in OBJECTIVES]
    return f"""# The paper's findings on the embedded world

Written by `bash bench/findings.sh` ({began}, commit {commit}); no line of it by hand. {T} iterations of {P} prompts, {len(SEEDS)} seeds,
mean ± standard deviation over the seeds; the world, its judge and its truth are those of the demo: 0.8M parameters and sentences of a few
words. What holds here is that the mechanism exists, not how large it is elsewhere.

| claim | here | measured |
|---|---|---|
{chr(10).join(verdicts)}

## The objectives

Each got the same budget: three values of one setting, {TUNED} iterations on a seed not used again, the best length-controlled win rate wins.

| objective | setting | win rate % | LC win rate % | right answers % | tokens | best right answers % |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{curves()}

The same over the length of the answers (Fig. 3 of the paper). Where answers of one length are compared, those of an objective that grows
faster have seen fewer iterations:

{batches_by_length()}

What was tried, as LC win rate and tokens after {TUNED} iterations:

| objective | first | second | third |
|---|---|---|---|
{chr(10).join(tried)}

## Iterations against prompts

DPO, {T * P:,} prompts in all, spent in T iterations of P (Finding 2 and Fig. 1):

| T | P | win rate % | LC win rate % | right answers % | tokens |
|---|---|---|---|---|---|
{chr(10).join(f"| {t} | {p:,} | " + " | ".join(cell(r[f]) for f in fields) + " |" for t, p, r in spent)}

## The NLL term

{rewards()}

## Reference margin and length

Responses and pairs of a run of DPO, log-probs under the policy that sampled them:

{figure}
"""


def main():
    matplotlib.use("Agg")
    plt.rcParams.update(RC)
    began = time.strftime("%Y-%m-%d")
    run_all([(slug("tune", slug(o), v), {**fixed, key: v, "seed": TUNING_SEED, "iterations": TUNED, "n_prompts": P})
             for o, (fixed, key, values) in OBJECTIVES.items() for v in values])
    tuning = {o: {v: scores(slug("tune", slug(o), v), TUNED) for v in values} for o, (_, _, values) in OBJECTIVES.items()}
    chosen = {o: max(found, key=lambda v: found[v]["lc_win_rate"]) for o, found in tuning.items()}
    settings = {o: {**fixed, key: chosen[o], "n_prompts": P} for o, (fixed, key, _) in OBJECTIVES.items()}
    run_all([(slug(o, s), {**settings[o], "seed": s, "iterations": T}) for s in SEEDS for o in OBJECTIVES]
            + [(slug("dpo_budget", t, s), {**settings["DPO"], "n_prompts": p, "seed": s, "iterations": t})
               for s in SEEDS for t, p in BUDGETS if t != T])
    with open(f"{DOCS}/findings.md", "w", encoding="utf-8") as f:
        f.write(page(chosen, tuning, began))
    print(f"{DOCS}/findings.md")


if __name__ == "__main__":
    main()
