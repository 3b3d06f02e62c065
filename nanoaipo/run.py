"""A run of iterate.sh: its settings, its folder, and what that shell asks about them.

    python -m nanoaipo.run config/x.py --key=value    keep the settings, print the loop's as shell
    python -m nanoaipo.run --lock config/x.py ...     print the file that locks the run's folder
    python -m nanoaipo.run --node config/x.py ...     run iterate.sh here, on one of several nodes
    python -m nanoaipo.run --preflight config/x.py    print what the run needs, and write nothing
    python -m nanoaipo.run --help                     list the settings of the loop

All but the last check the settings first.
"""

import glob
import os
import shlex
import sys
import time

from configurator import (
    HERE,
    changes,
    declared,
    declared_by_all,
    help_text,
    literals,
    run_script,
    show,
    values_of,
)
from nanoaipo.errors import InputError
from nanoaipo.stages import FREE

# ---- settings of iterate.sh, which is shell and cannot declare its own ----
# fmt: off
iterations = 3                          # T, rounds of generate, rank, train, eval
model = ""                              # the policy of iteration 0: Hugging Face folder or hub name
out = ""                                # where a result goes; a run's folder: out/<recipe> if empty
processes = 1                           # processes per stage, one per GPU; above 1: under torchrun
# other stages than train may want fewer processes, each with tensor_parallel GPUs
engines = 0                             # processes of generate; 0: as many as processes
rank_processes = 0                      # processes of rank; 0: as many as processes
new_instructions = 0                    # self-instruct per iteration (AIPO: 20,000); 0: the pool
checkable = 0                           # checkable instructions behind each of these, at most
# a file or NAME:SPLIT each; of several, with spaces between, iterations take theirs in turn
pairs = ""                              # pairs to train on, not the policy's own
candidates = ""                         # responses to rank, not the policy's own
prepare = ""                            # script that makes what the recipe needs, run first
eval_prompts = ""                       # held-out prompts of every evaluation; empty: none is made
eval_prompt_field = ""                  # their column, as prompt_field
n_eval = 0                              # how many of them; 0: all
eval_temperature = 0.7                  # sampling temperature of the evaluated answers
eval_guard = "prompts/guard.jsonl"      # asked besides, graded by their `answer`; empty: nothing
# on several nodes the same command is given to each, with a folder that all of them see
nodes = 1                               # how many; processes, engines, rank_processes are of each
this_node = 0                           # which of them this is, if Slurm or Kubernetes do not tell
rendezvous = ""                         # HOST:PORT of node 0, for torchrun; the next port is ours
# fmt: on

USAGE = "usage: bash iterate.sh config/x.py [--preflight] [--key=value ...]"
SET_FOR_STAGES = ("iteration", "task", "answers", "baseline")  # by iterate.sh, for each of them


# ------------------------------------------------------------------------------- checking settings


def settings_of_run(arguments, every):
    """What recipe and command line set for a run of iterate.sh, checked, and the run's folder.

    Nothing is written. Raises InputError if a setting is wrong or is not what the run was started
    with.
    """
    if not arguments:
        raise InputError(USAGE)
    changed = changes(arguments, every, every)
    for key in SET_FOR_STAGES:
        if key in changed:
            raise InputError(f"--{key}={changed[key]}: leave it out, the loop sets it")

    recipe = next((a for a in arguments if not a.startswith("--")), "run")
    if not changed.get("model"):
        raise InputError(f"{recipe}: 'model' is not set: a Hugging Face folder or hub name")
    sources = [key for key in ("pairs", "candidates", "new_instructions") if changed.get(key)]
    if len(sources) > 1:
        raise InputError(
            f"{recipe}: of pairs, candidates and new_instructions "
            "only one can be what a run is made of"
        )
    if changed.get("checkable") and not changed.get("new_instructions"):
        raise InputError(
            f"--checkable={changed['checkable']}: is for new_instructions; for prompts of a file: "
            "python -m nanoaipo.add_instructions"
        )
    if "loss" in changed:
        check_loss(changed["loss"])

    # the run's folder is called like the recipe, unless --out says otherwise
    run = changed.pop("out", "")
    if not run:
        name, _ = os.path.splitext(os.path.basename(recipe))
        run = os.path.join("out", name)

    # one day for all that a run's templates are told, also when it goes on after midnight
    if not changed.get("date"):
        changed["date"] = date_of_run(run)
    check_started_with(run, changed, every)
    return changed, run


def check_loss(loss):
    """Raise InputError for no objective and no mix; train.py would, behind candidates and pairs."""
    import losses  # it imports torch

    try:
        losses.arguments_of(loss)
    except ValueError as e:
        raise InputError(f"--loss={loss}: {e}") from None


def date_of_run(run):
    """The day that a run was started with, as its recipe has it; today's for a new run."""
    path = os.path.join(run, "recipe.py")
    if not os.path.exists(path):
        return time.strftime("%Y-%m-%d")
    date, _, _ = literals(path).get("date", ("", 0, ""))  # an older run has none
    return date


def check_started_with(run, changed, every):
    """Raise InputError if a run that has written something was started with other settings.

    Those in FREE may change, so that it can go on for more iterations or fit into less memory.
    """
    path = os.path.join(run, "recipe.py")
    if not os.path.exists(path) or not glob.glob(os.path.join(glob.escape(run), "iter_*", "*")):
        return
    before = values_of(literals(path))
    for key in sorted(before.keys() | changed.keys()):
        default = None
        if key in every:
            default = every[key][0]
        old = before.get(key, default)
        new = changed.get(key, default)
        if old != new and key not in FREE:
            raise InputError(
                f"{path}: this run was started with {key}={old!r}, not {new!r}: "
                f"choose another --out, or remove {run}"
            )


# ------------------------------------------------------------------------------- what it is asked


def print_help():
    """Print the settings of the loop, and which scripts have the others."""
    head = (
        f"{USAGE}\n\n"
        "Any setting of generate.py, rank.py, train.py and eval.py is one of the run too: the\n"
        "--help of each script lists them."
    )
    show(help_text(head, declared("nanoaipo/run.py") | declared("nanoaipo/estimate.py")))


def run_node(arguments, every):
    """Run iterate.sh on this node while the others run it on theirs, and end with its exit code."""
    from nanoaipo.nodes import run_with_others

    changed, _ = settings_of_run(arguments, every)
    command = ["bash", os.path.join(HERE, "iterate.sh"), *arguments]
    rank = changed.get("this_node")
    endpoint = changed.get("rendezvous", "")
    sys.exit(run_with_others(command, changed["nodes"], rank, endpoint))


def print_preflight(arguments, every):
    """Print what a run needs, and do nothing else."""
    from nanoaipo.estimate import preflight

    every = every | declared("nanoaipo/estimate.py")  # two settings of its own
    changed, run = settings_of_run(arguments, every)
    preflight(values_of(every) | changed | {"out": run})


def open_run(arguments, every):
    """(What is set, the run's folder, whether this node writes to it); the folder is made."""
    changed, run = settings_of_run(arguments, every)
    several = changed.get("nodes", 1) > 1 or changed.get("this_node", 0) > 0
    if several and "ITERATE_NODES" not in os.environ:
        raise InputError("nodes, this_node: several nodes want --nodes=N on the command line")
    leads = changed.get("this_node", 0) == 0
    if leads:
        os.makedirs(run, exist_ok=True)
    return changed, run, leads


def print_lock(arguments, every):
    """Print the file that locks a run's folder; of several nodes only node 0 has one."""
    _, run, leads = open_run(arguments, every)
    if leads:
        lock = os.path.join(run, "lock")
        open(lock, "a").close()  # a folder that takes no file is told here
        print(lock)


def print_settings(arguments, every):
    """Keep a run's settings as out/RUN/recipe.py, and print those of the loop as shell."""
    changed, run, leads = open_run(arguments, every)

    # every stage of the run reads its settings from here
    if leads:
        path = os.path.join(run, "recipe.py")
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            for key, value in changed.items():
                f.write(f"{key} = {value!r}\n")
        os.replace(path + ".tmp", path)

    # and the loop has its own as variables
    for key, default in values_of(declared("nanoaipo/run.py")).items():
        value = changed.get(key, default)
        if key == "out":
            value = run
        print(f"{key}={shlex.quote(str(value))}")


def main():
    if "--help" in sys.argv:
        print_help()
        return
    every = declared_by_all()
    asked = {"--node": run_node, "--preflight": print_preflight, "--lock": print_lock}
    option = next((option for option in asked if option in sys.argv), None)
    answer = asked.get(option, print_settings)
    answer([argument for argument in sys.argv[1:] if argument != option], every)


if __name__ == "__main__":
    run_script(main)
