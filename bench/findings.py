"""Run the findings of AIPO (2409.08845) on the embedded world; write docs/findings.md and figures.

Every objective gets three values of one setting, tried for TUNED iterations on a seed of its own.
The value with the best length-controlled win rate, which is what one sees without the truth, runs
for T iterations on three seeds. What is claimed is tested on the numbers, and the page says of each
claim whether it holds here. See findings.sh.
"""

import concurrent.futures
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import time

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from warm import warm

from configurator import run_script
from nanoaipo.errors import InputError
from nanoaipo.report.figures import RC
from nanoaipo.report.runs import load_iterations

OUT = "out/findings"
DOCS = "docs"
T = 6  # iterations
TUNED = 3  # iterations while a setting is tuned
P = 512  # prompts of an iteration
SEEDS = (0, 1, 2)
TUNING_SEED = 100
BUDGETS = [(1, 6 * P), (2, 3 * P), (3, 2 * P), (6, P)]  # T x P, the same number of prompts
FIELDS = ("win_rate", "lc_win_rate", "accuracy", "length")

# the fixed settings of an objective, the one that is tuned, and its values
# fmt: off
OBJECTIVES = {
    "DPO":       ({"loss": "dpo"}, "beta", (0.25, 0.5, 1.0)),
    "DPO+NLL":   ({"loss": "irpo", "beta": 0.5}, "lambda_", (0.2, 0.5, 1.0)),
    "alpha-DPO": ({"loss": "alpha_dpo", "beta": 0.5}, "alpha", (0.1, 0.2, 0.3)),
    "AIPO":      ({"loss": "aipo", "beta": 0.5, "lambda_": 0.2}, "alpha", (0.1, 0.2, 0.3)),
    "SimPO":     ({"loss": "simpo", "gamma": 0.5}, "beta", (2.0, 5.0, 10.0)),
    "SPPO":      ({"loss": "sppo"}, "beta", (0.05, 0.1, 0.2)),
    "iREPO":     ({"loss": "irepo"}, "beta", (0.1, 0.25, 0.5)),
    "R-DPO":     ({"loss": "rdpo", "beta": 0.5}, "alpha", (0.01, 0.03, 0.1)),
}
COLORS = {
    "DPO": "#d55e00", "DPO+NLL": "#e69f00", "alpha-DPO": "#8069d6", "AIPO": "#2f7fc1",
    "SimPO": "#009e73", "SPPO": "#c2559d", "iREPO": "#7f7f7f", "R-DPO": "#a08200",
}
# fmt: on

# ---------------------------------------------------------------------------- the runs


def run_name(objective, *more):
    """The folder of a run, from what tells it from the others."""
    name = objective.lower().replace("+", "_").replace("-", "_")
    return "_".join([name, *map(str, more)])


def tuning_name(objective, value):
    return run_name("tune", run_name(objective), value)


def budget_name(iterations, seed):
    """A run of DPO with one of the BUDGETS; that of T iterations is among the objectives' runs."""
    if iterations == T:
        return run_name("DPO", seed)
    return run_name("dpo_budget", iterations, seed)


def run_all(jobs):
    """Run all jobs, (name, settings), two at a time; those that are complete are left out."""
    os.makedirs(OUT, exist_ok=True)
    waiting = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(run_waiting, waiting) for _ in range(2)]
        for worker in workers:
            worker.result()


def run_waiting(waiting):
    """Take jobs from the queue until it is empty; each has its log beside it."""
    with tempfile.TemporaryDirectory() as folder, warm(folder) as env:
        while True:
            try:
                name, settings = waiting.get_nowait()
            except queue.Empty:
                return
            run_dir = f"{OUT}/{name}"
            if os.path.exists(f"{run_dir}/report.html"):  # what iterate.sh ends with
                continue

            t0 = time.time()
            command = ["bash", "iterate.sh", "config/tiny.py", f"--out={run_dir}"]
            for key, value in settings.items():
                command.append(f"--{key}={value}")
            with open(run_dir + ".log", "w", encoding="utf-8") as log:
                done = subprocess.run(command, stdout=log, stderr=log, env=env)
            if done.returncode != 0:
                raise InputError(f"{run_dir}.log: the run failed")
            seconds = time.time() - t0
            print(f"{name}: {seconds:.0f} s, {waiting.qsize()} runs wait", flush=True)


def tuning_jobs():
    """Every objective with each value of its setting, on the seed for tuning."""
    jobs = []
    for objective, (fixed, key, values) in OBJECTIVES.items():
        for value in values:
            settings = {
                **fixed,
                key: value,
                "seed": TUNING_SEED,
                "iterations": TUNED,
                "n_prompts": P,
            }
            jobs.append((tuning_name(objective, value), settings))
    return jobs


def final_jobs(chosen):
    """Every objective with its chosen value on each seed, then DPO with the other budgets."""
    jobs = []
    for seed in SEEDS:
        for objective, (fixed, key, _) in OBJECTIVES.items():
            settings = {
                **fixed,
                key: chosen[objective],
                "n_prompts": P,
                "seed": seed,
                "iterations": T,
            }
            jobs.append((run_name(objective, seed), settings))

    fixed, key, _ = OBJECTIVES["DPO"]
    for seed in SEEDS:
        for iterations, n_prompts in BUDGETS:
            if iterations == T:
                continue
            settings = {
                **fixed,
                key: chosen["DPO"],
                "n_prompts": n_prompts,
                "seed": seed,
                "iterations": iterations,
            }
            jobs.append((budget_name(iterations, seed), settings))
    return jobs


# ---------------------------------------------------------------------------- what they say


def read_scores(name, t):
    """The evaluation of a run after t iterations."""
    with open(f"{OUT}/{name}/iter_{t}/eval.json", encoding="utf-8") as f:
        return json.load(f)


def read_steps(name):
    """The records of the training steps of a run, a list per iteration."""
    iterations = []
    for t in range(1, T + 1):
        with open(f"{OUT}/{name}/iter_{t}/model/metrics.jsonl", encoding="utf-8") as f:
            iterations.append([json.loads(line) for line in f])
    return iterations


def over_seeds(names, t):
    """{field: (mean, standard deviation)} of the scores of these runs after t iterations."""
    scores = [read_scores(name, t) for name in names]
    result = {}
    for field in FIELDS:
        values = [row[field] for row in scores]
        result[field] = (np.mean(values), np.std(values, ddof=1))
    return result


def read_curves():
    """{objective: [{field: (mean, standard deviation)} for t = 0..T]}."""
    curves = {}
    for objective in OBJECTIVES:
        names = [run_name(objective, seed) for seed in SEEDS]
        curves[objective] = [over_seeds(names, t) for t in range(T + 1)]
    return curves


def read_budgets():
    """[(T, P, {field: (mean, standard deviation)})] of DPO with the same number of prompts."""
    rows = []
    for iterations, n_prompts in BUDGETS:
        names = [budget_name(iterations, seed) for seed in SEEDS]
        rows.append((iterations, n_prompts, over_seeds(names, iterations)))
    return rows


def means(curve, field):
    """The means over seeds of a field, (T + 1,)."""
    return [scores[field][0] for scores in curve]


def at_length(curve, field, length):
    """A mean score where the mean length first reaches this one; None where it never does.

    Between iterations it is read off a straight line.
    """
    points = list(zip(means(curve, "length"), means(curve, field)))
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= length <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (length - x0) / (x1 - x0)
    return None


def last_rewards(objective):
    """The mean reward of chosen responses at the last step of an iteration."""
    rewards = []
    for seed in SEEDS:
        for steps in read_steps(run_name(objective, seed)):
            rewards.append(steps[-1]["reward_chosen"])
    return np.mean(rewards)


# ---------------------------------------------------------------------------- figures


def save(figure, name):
    """Save a figure beside the page; the page's line that shows it."""
    figure.savefig(f"{DOCS}/{name}.png", dpi=130)
    plt.close(figure)
    return f"![{name.replace('_', ' ')}]({name}.png)"


def draw_iterations(curves):
    """Scores and length over iterations, with the spread over seeds."""
    titles = {
        "win_rate": "win rate %, by the judge",
        "lc_win_rate": "length-controlled win rate %",
        "accuracy": "right answers %, the truth",
        "length": "tokens per answer",
    }
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    for axis, (field, title) in zip(axes, titles.items()):
        for objective, color in COLORS.items():
            mean, spread = np.array([scores[field] for scores in curves[objective]]).T  # (T + 1,)
            t = range(T + 1)
            axis.plot(t, mean, "o-", color=color, label=objective)
            low = mean - spread
            high = mean + spread
            axis.fill_between(t, low, high, color=color, alpha=0.12, linewidth=0)
        axis.set(title=title, xlabel="iteration")
    axes[0].legend(frameon=False, fontsize=8)
    return save(figure, "findings_iterations")


def draw_lengths(curves):
    """Scores over the length of the answers (Fig. 3)."""
    titles = {
        "win_rate": "win rate %",
        "lc_win_rate": "length-controlled win rate %",
        "accuracy": "right answers %",
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, (field, title) in zip(axes, titles.items()):
        for objective, color in COLORS.items():
            lengths = means(curves[objective], "length")
            values = means(curves[objective], field)
            axis.plot(lengths, values, "o-", color=color, label=objective)
        axis.set(title=title, xlabel="tokens per answer")
    axes[0].legend(frameon=False, fontsize=8)
    return save(figure, "findings_length")


def draw_rewards():
    """Rewards in training (Fig. 4), a grey line where an iteration begins."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained", sharey=True)
    for axis, objective in zip(axes, ("DPO", "DPO+NLL", "AIPO")):
        color = COLORS[objective]
        start = 0
        for steps in read_steps(run_name(objective, SEEDS[0])):
            x = range(start, start + len(steps))
            axis.plot(x, [step["reward_chosen"] for step in steps], color=color)
            axis.plot(x, [step["reward_rejected"] for step in steps], "--", color=color)
            axis.axvline(start, color="0.7", linewidth=0.8)
            start += len(steps)
        axis.set(title=f"{objective}: rewards, chosen solid, rejected dashed", xlabel="step")
    return save(figure, "findings_rewards")


def draw_margins():
    """Fig. 5 and 6 from a run of DPO: the figure's line and both correlations."""
    iterations = load_iterations(f"{OUT}/{run_name('DPO', SEEDS[0])}").values()
    responses = np.concatenate([iteration["responses"] for iteration in iterations])  # (n, 2)
    pairs = np.concatenate([iteration["margins"] for iteration in iterations])[:, :2]  # (m, 2)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    r_length = scatter(axes[0], responses, "tokens", "log-prob, nats")
    r_margin = scatter(axes[1], pairs, "tokens, chosen minus rejected", "s_ref, nats")
    return save(figure, "findings_margins"), r_length, r_margin


def scatter(axis, points, xlabel, ylabel):
    """Draw some 2,000 of the points (n, 2); the correlation of all."""
    r = np.corrcoef(points.T)[0, 1]
    x, y = points[:: max(1, len(points) // 2000)].T
    axis.plot(x, y, "o", color=COLORS["DPO"], alpha=0.4, markersize=3, markeredgewidth=0)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=f"r = {r:.2f}, n = {len(points):,}")
    return r


# ---------------------------------------------------------------------------- the page

PAGE = """\
# The paper's findings on the embedded world

Written by `bash bench/findings.sh` ({date}, commit {commit}); no line of it by hand. {T} \
iterations of {P} prompts, {n_seeds} seeds,
mean ± standard deviation over the seeds; the world, its judge and its truth are those of the \
demo: 0.8M parameters and sentences of a few
words. What holds here is that the mechanism exists, not how large it is elsewhere. Why two do \
not: [what was tried](findings_why.md).

| claim | here | measured |
|---|---|---|
{claims}

## The objectives

Each got the same budget: three values of one setting, {TUNED} iterations on a seed not used \
again, the best length-controlled win rate wins.

| objective | setting | win rate % | LC win rate % | right answers % | tokens \
| best right answers % |
|---|---|---|---|---|---|---|
{objectives}

{iterations_figure}

The same over the length of the answers (Fig. 3 of the paper). Where answers of one length are \
compared, those of an objective that grows
faster have seen fewer iterations:

{length_figure}

What was tried, as LC win rate and tokens after {TUNED} iterations:

| objective | first | second | third |
|---|---|---|---|
{tried}

## Iterations against prompts

DPO, {n_prompts:,} prompts in all, spent in T iterations of P (Finding 2 and Fig. 1):

| T | P | win rate % | LC win rate % | right answers % | tokens |
|---|---|---|---|---|---|
{budgets}

## The NLL term

{rewards_figure}

## Reference margin and length

Responses and pairs of a run of DPO, log-probs under the policy that sampled them:

{margins_figure}
"""


def plus_minus(value):
    """A mean with its standard deviation, as text."""
    mean, spread = value
    return f"{mean:.1f} ± {spread:.1f}"


def table_row(*cells):
    return "| " + " | ".join(cells) + " |"


def objective_rows(curves, chosen):
    """The scores after the last iteration, and the best share of right answers on the way."""
    rows = []
    for objective, (_, key, values) in OBJECTIVES.items():
        curve = curves[objective]
        accuracies = means(curve, "accuracy")
        best = accuracies.index(max(accuracies))
        rows.append(
            table_row(
                objective,
                f"{key} {chosen[objective]} of {', '.join(map(str, values))}",
                *(plus_minus(curve[T][field]) for field in FIELDS),
                f"{plus_minus(curve[best]['accuracy'])} (t = {best})",
            )
        )
    return rows


def tried_rows(tuning):
    """LC win rate and length of every value that was tried."""
    rows = []
    for objective, (_, _, values) in OBJECTIVES.items():
        cells = []
        for value in values:
            scores = tuning[objective][value]
            cells.append(f"{value}: {scores['lc_win_rate']:.1f}, {scores['length']:.1f}")
        rows.append(table_row(objective, *cells))
    return rows


def budget_rows(budgets):
    rows = []
    for iterations, n_prompts, scores in budgets:
        cells = [plus_minus(scores[field]) for field in FIELDS]
        rows.append(table_row(str(iterations), f"{n_prompts:,}", *cells))
    return rows


def claim_row(claim, holds, measured):
    """A row of the table; holds: whether the claim does, or None where the seeds cannot tell."""
    verdict = "**not resolved**"
    if holds is not None:
        verdict = "**holds**" if holds else "**does not hold**"
    return table_row(claim, verdict, measured)


def difference(one, other):
    """The first mean less the other, and half its 95 % interval (Welch); each (mean, deviation)."""
    n = len(SEEDS)
    squares = [one[1] ** 2 / n, other[1] ** 2 / n]  # of the means' standard errors
    freedom = sum(squares) ** 2 / sum(square**2 / (n - 1) for square in squares)
    return one[0] - other[0], stats.t.ppf(0.975, freedom) * math.sqrt(sum(squares))


def claim_rows(curves, budgets, r_length, r_margin):
    """Each claim of the paper, whether it holds on these numbers, and the numbers."""
    rows = []

    # Finding 2: longer with more iterations of the same number of prompts
    lengths = [scores["length"][0] for _, _, scores in budgets]
    rows.append(
        claim_row(
            "Iterating amplifies length: with the same number of prompts, more iterations of DPO "
            "give longer answers (Finding 2)",
            all(fewer < more for fewer, more in zip(lengths, lengths[1:])),
            ", ".join(f"{length:.1f}" for length in lengths) + " tokens at T = 1, 2, 3, 6",
        )
    )

    # growth of the answers from the base model to the last iteration
    growth = {}
    for objective in ("DPO", "DPO+NLL", "alpha-DPO", "AIPO"):
        lengths = means(curves[objective], "length")
        growth[objective] = lengths[T] / lengths[0]
    rows.append(
        claim_row(
            "The agreement-aware objective grows less than DPO",
            growth["AIPO"] < growth["DPO"] and growth["alpha-DPO"] < growth["DPO"],
            ", ".join(f"{objective} x{factor:.1f}" for objective, factor in growth.items()),
        )
    )

    # right answers in the end, where the spread over the seeds is as large as what they differ by
    aipo = curves["AIPO"][T]["accuracy"]
    dpo = curves["DPO"][T]["accuracy"]
    gain, half = difference(aipo, dpo)
    holds = None
    if abs(gain) > half:
        holds = gain > 0
    rows.append(
        claim_row(
            "AIPO's answers are right more often than DPO's after the last iteration",
            holds,
            f"{plus_minus(aipo)} against {plus_minus(dpo)} %: {gain:+.1f} ± {half:.1f} (95 %)",
        )
    )

    # Fig. 3: at a length that every objective reaches
    common = min(means(curve, "length")[T] for curve in curves.values())
    titles = {"lc_win_rate": "length-controlled win rate", "accuracy": "share of right answers"}
    for field, title in titles.items():
        values = {o: at_length(curve, field, common) for o, curve in curves.items()}
        ranked = sorted(values, key=values.get, reverse=True)
        rows.append(
            claim_row(
                f"At equal length ({common:.1f} tokens, the shortest of the last iterations) AIPO "
                f"has the best {title} (Fig. 3)",
                ranked[0] == "AIPO",
                ", ".join(f"{objective} {values[objective]:.1f}" for objective in ranked),
            )
        )

    rewards = {objective: last_rewards(objective) for objective in ("DPO", "DPO+NLL", "AIPO")}
    rows.append(
        claim_row(
            "The NLL term keeps the reward of chosen responses from falling (Fig. 4)",
            rewards["DPO+NLL"] > rewards["DPO"],
            ", ".join(f"{objective} {reward:+.2f}" for objective, reward in rewards.items())
            + " at the last step of an iteration, mean",
        )
    )
    rows.append(
        claim_row(
            "Longer responses have lower log-prob (Fig. 5), and s_ref falls with the difference "
            "of length (Fig. 6: -0.47 in the paper)",
            r_length < 0 and r_margin < 0,
            f"r = {r_length:.2f} and {r_margin:.2f}",
        )
    )
    return rows


def page(chosen, tuning, date):
    """The text of docs/findings.md; its figures are saved on the way.

    chosen: {objective: value}. tuning: {objective: {value: scores}}.
    """
    curves = read_curves()
    budgets = read_budgets()
    margins_figure, r_length, r_margin = draw_margins()
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return PAGE.format(
        date=date,
        commit=commit,
        T=T,
        P=P,
        TUNED=TUNED,
        n_seeds=len(SEEDS),
        n_prompts=T * P,
        claims="\n".join(claim_rows(curves, budgets, r_length, r_margin)),
        objectives="\n".join(objective_rows(curves, chosen)),
        tried="\n".join(tried_rows(tuning)),
        budgets="\n".join(budget_rows(budgets)),
        iterations_figure=draw_iterations(curves),
        length_figure=draw_lengths(curves),
        rewards_figure=draw_rewards(),
        margins_figure=margins_figure,
    )


def main():
    matplotlib.use("Agg")
    plt.rcParams.update(RC)
    date = time.strftime("%Y-%m-%d")

    # the value of each objective with the best length-controlled win rate
    run_all(tuning_jobs())
    tuning = {}
    chosen = {}
    for objective, (_, _, values) in OBJECTIVES.items():
        scores = {value: read_scores(tuning_name(objective, value), TUNED) for value in values}
        tuning[objective] = scores
        chosen[objective] = max(values, key=lambda value: scores[value]["lc_win_rate"])

    run_all(final_jobs(chosen))
    with open(f"{DOCS}/findings.md", "w", encoding="utf-8") as f:
        f.write(page(chosen, tuning, date))
    print(f"{DOCS}/findings.md")


if __name__ == "__main__":
    run_script(main)
