"""Where the time of a run went, from the manifests of its stages (nanoaipo/clock.py).

    python bench/seconds.py out/tiny_aipo

Seconds of CPUs, and in brackets by the clock, over all iterations and processes.
"""

import collections
import glob
import json
import os
import re
import sys

PARTS = ("starting", "loading", "computing", "writing")


def name_of(path):
    """What a manifest in iter_T/ is of: candidates, pairs, model, answers, eval."""
    folder, name = os.path.split(path)
    if name == "manifest.json":
        return os.path.basename(folder)
    return re.sub(r"(-\d+-of-\d+)?\.manifest\.json$", "", name)


def read_times(run):
    """{name: ({part: seconds of CPUs}, {part: seconds})} of a run, over its iterations."""
    found = {}
    paths = glob.glob(f"{glob.escape(run)}/iter_*/**/*manifest.json", recursive=True)
    for path in sorted(paths):
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
        sums = found.setdefault(name_of(path), (collections.Counter(), collections.Counter()))
        for total, key in zip(sums, ("cpu_seconds", "seconds")):
            total.update(manifest.get(key, {}))  # older ones have none
    return found


def line(name, cpu_seconds, seconds):
    """A row of the table, with the sum over the parts at its end."""
    cells = []
    for parts in (*([part] for part in PARTS), PARTS):
        cpu = sum(cpu_seconds[part] for part in parts)
        wall = sum(seconds[part] for part in parts)
        cells.append(f"{cpu:.1f} ({wall:.1f})")
    return f"| {name} | " + " | ".join(cells) + " |"


def main():
    print("| | " + " | ".join(PARTS) + " | all |")
    print("|---|---|---|---|---|---|")
    every = (collections.Counter(), collections.Counter())
    for name, sums in read_times(sys.argv[1]).items():
        print(line(name, *sums))
        for total, part in zip(every, sums):
            total.update(part)
    print(line("all", *every))


if __name__ == "__main__":
    main()
