"""Table and figures of one or more runs, from their files alone.

    python plot.py out/tiny out/tiny_dpo                   prints the table; writes iterations.png and length.png to out/

Win rate against the first policy is the judge's word, accuracy the truth where prompts carry answers; length is tokens per
answer (2409.08845: Fig. 2 is metric and length per iteration, Fig. 3 length against performance). A run may be unfinished.
"""
import glob
import json
import os
import sys


def load(run):
    """One row per finished iteration: its evaluation, and means over its pairs from the training log."""
    rows = []
    for path in sorted(glob.glob(os.path.join(run, "iter_*", "eval.json")), key=lambda p: int(p.split("iter_")[-1].split("/")[0])):
        with open(path, encoding="utf-8") as f:
            row = {"t": int(path.split("iter_")[-1].split("/")[0]), **json.load(f)}
        log = os.path.join(os.path.dirname(path), "model", "metrics.jsonl")
        if os.path.exists(log):
            with open(log, encoding="utf-8") as f:
                steps = [json.loads(line) for line in f]
            pairs = sum(s["pairs"] for s in steps)
            row |= {k: sum(s[k] * s["pairs"] for s in steps) / pairs for k in ("s_ref", "logp_chosen", "len_chosen", "len_rejected")}
        rows.append(row)
    return rows or sys.exit(f"{run}: no iter_*/eval.json in it; has iterate.sh evaluated an iteration?")


def table(runs):
    columns = [("win_rate", "win rate", ".3f"), ("accuracy", "accuracy", ".3f"), ("length", "tokens", ".1f"), ("finished", "finished", ".0%"),
               ("s_ref", "s_ref", "+.2f"), ("logp_chosen", "logp chosen", "+.2f"), ("len_chosen", "len chosen", ".1f"), ("len_rejected", "len rejected", ".1f")]
    width = max(map(len, runs))
    print(f"{'run':{width}}   t  " + "  ".join(f"{title:>{max(8, len(title))}}" for _, title, _ in columns))
    for name, rows in runs.items():
        for row in rows:
            cells = (format(row[key], spec) if row.get(key) is not None else "-" for key, _, spec in columns)
            print(f"{name:{width}}  {row['t']:2d}  " + "  ".join(f"{c:>{max(8, len(title))}}" for c, (_, title, _) in zip(cells, columns)))
    print("judge: " + ", ".join(sorted({row["judge"] for rows in runs.values() for row in rows})) + "; win rates against each run's own first policy")


def draw(runs, folder):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    color = dict(zip(runs, plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9))
    truth = all(row["accuracy"] is not None for rows in runs.values() for row in rows)
    panels = [("win_rate", "win rate by the judge")] + [("accuracy", "accuracy, the truth")] * truth + [("length", "tokens per answer")]
    for file, horizontal, label, shown in (("iterations.png", "t", "iteration", panels), ("length.png", "length", "tokens per answer", panels[:-1])):
        figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 3.8), layout="constrained", squeeze=False)
        for axis, (key, title) in zip(axes[0], shown):
            for name, rows in runs.items():
                x, y = [r[horizontal] for r in rows], [r[key] for r in rows]
                axis.plot(x, y, "o-", color=color[name], label=name, markersize=4)
                if key == "win_rate":
                    error = [1.96 * r["win_rate_se"] for r in rows]
                    axis.fill_between(x, [a - e for a, e in zip(y, error)], [a + e for a, e in zip(y, error)], color=color[name], alpha=0.15, linewidth=0)
            axis.set(xlabel=label, ylabel=title)
            axis.grid(alpha=0.3)
        axes[0][0].legend(frameon=False)
        figure.savefig(os.path.join(folder, file), dpi=150)
        print(os.path.join(folder, file))


if __name__ == "__main__":
    paths = [a.rstrip("/") for a in sys.argv[1:]]
    if not paths or any(p.startswith("-") for p in paths):
        sys.exit(__doc__)
    names = {p: os.path.basename(p) if len({os.path.basename(q) for q in paths}) == len(paths) else p for p in paths}
    runs = {names[p]: load(p) for p in paths}
    table(runs)
    draw(runs, os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths]))
