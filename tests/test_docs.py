"""Every code block of README.md and docs/ is run as a reader would, and what it prints is compared with what the page shows.

    python tests/test_docs.py               writes what the tour's blocks print now into docs/tour.md
"""
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from conftest import ROOT
from test_eval import ALPACA, ARENA, Grader, mt_bench, published
from warm import warm

TOUR = ROOT / "docs" / "tour.md"
ENV = os.environ | {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"], "VIRTUAL_ENV": sys.prefix}       # as activated
# Runs blocks [kind, code] in order, Python in one session; prints what each printed, as JSON.
SESSION = """
import contextlib, io, json, subprocess, sys
sys.path.insert(0, ".")
session, told = {"__name__": "tour"}, []
for kind, code in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if kind == "python":
            exec(code, session)
        else:
            out.write(subprocess.run(["bash", "-euc", code], check=True, stdout=subprocess.PIPE, text=True).stdout)
    told.append(out.getvalue())
print(json.dumps(told))
"""


def copy_of_the_repository(folder):
    """A copy to work in, with the embedded world."""
    subprocess.run([sys.executable, "tiny/prepare.py"], cwd=ROOT, check=True)
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "out", "world", "__pycache__"))
    (folder / "tiny" / "world").symlink_to(ROOT / "tiny" / "world")
    return folder


def blocks(text):
    """[kind, code] of each block between fences, in order."""
    return [list(found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def run_tour(folder):
    """[(what a block printed, what follows it on the page)] of all blocks before the exercises; a ```sample is not the same everywhere."""
    told = blocks(TOUR.read_text(encoding="utf-8").partition("# Five exercises")[0])
    code = [block for block in told if block[0] not in ("text", "sample")]
    assert {kind for kind, _ in code} == {"python", "bash"}
    done = subprocess.run([sys.executable, "-c", SESSION], input=json.dumps(code), cwd=folder, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = iter(json.loads(done.stdout.splitlines()[-1]))
    return [(next(printed), after or [None, None]) for block, after in itertools.zip_longest(told, told[1:]) if block in code]


def alike(shown, printed):
    """Equal but for spaces and for numbers with a point, of which a quarter may differ: each processor trains a slightly other world."""
    number = r"(-?\d+\.\d+)"
    a, b = (re.split(number, " ".join(text.split())) for text in (shown, printed))
    spaces = lambda parts: [p.strip() for p in parts[::2]]
    return spaces(a) == spaces(b) and all(abs(float(x) - float(y)) <= 0.25 * abs(float(x)) + 0.02 for x, y in zip(a[1::2], b[1::2]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return copy_of_the_repository(tmp_path_factory.mktemp("docs") / "nanoaipo")


def test_alike_sees_what_differs():
    assert alike("a  1.00 b\n[2, -3.50]\n", "a 1.10 b [2, -3.0]\n")
    assert not alike("a 1.00", "a 1.40") and not alike("ids 1", "ids 2") and not alike("x 1.0", "y 1.0") and not alike("1.0", "1.0 1.0")


def test_the_tour_prints_what_it_shows(folder):
    told = run_tour(folder)
    shows = [(printed, shown) for printed, (kind, shown) in told if kind == "text"]
    assert len(shows) >= 8
    for printed, shown in shows:
        assert alike(shown, printed), f"the page shows\n{shown}\nand the block printed\n{printed}"


EXERCISES = re.split(r"^## Exercise ", TOUR.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("text", EXERCISES, ids=[re.sub(r"\W+", "-", text.partition("\n")[0]) for text in EXERCISES])
def test_an_exercise_is_open_before_its_diff_and_solved_after(text, folder, tmp_path):
    (kind, check), (other, diff) = blocks(text)
    assert (kind, other) == ("python", "diff")
    work = tmp_path / "nanoaipo"
    shutil.copytree(folder, work, symlinks=True, ignore=shutil.ignore_patterns("tour"))
    (work / "check.py").write_text(check)
    if not (folder / "out" / "tour").exists():                          # this test alone
        run_tour(folder)
    shutil.copytree(folder / "out" / "tour", work / "out" / "tour")
    attempt = lambda: subprocess.run([sys.executable, "check.py"], cwd=work, env=ENV, capture_output=True, text=True)
    assert attempt().returncode == 1
    subprocess.run(["patch", "-p1", "--fuzz=0"], input=diff, cwd=work, check=True, capture_output=True, text=True)
    done = attempt()
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
    assert sum(line[0] == "+" for line in diff.splitlines()) < 12       # a small one


# ---------------------------------------------------------------------------------------------- the commands of the README

COMMANDS = [re.sub(r"\\\n +|  +# .*", "", command) for command in re.findall(
    r"^    ((?:make|pip|bash|python|torchrun) (?:.*\\\n)*.*)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)]
NOT_RUN = {"pip install -r requirements-gpu.txt": "gigabytes, for CUDA"}
SMALL = ("--model=tiny/world/base --prompts=tiny/world/prompts.jsonl --eval_prompts=tiny/world/heldout.jsonl --n_eval=8 --n_prompts=12 "
         "--new_instructions=0 --iterations=1 --processes=1 --engine=transformers --dtype=float32 --max_new_tokens=24 "
         "--ranker_model=tiny/world/judge --eval_ranker=pairrm --eval_ranker_model=tiny/world/judge")
SMALLER = {                                                             # what a command names -> what stands in for it here
    "make ": "make -n ",
    "iterate.sh config/aipo_nemo.py": f"iterate.sh config/aipo_nemo.py {SMALL}",
    "iterate.sh config/tiny.py": "iterate.sh config/tiny.py --n_eval=8",
    "--nproc-per-node=8 train.py config/aipo_nemo.py": "--nproc-per-node=2 train.py config/aipo_nemo.py --dtype=float32",
    "--prompts=prompts.jsonl": "--prompts=prompts.jsonl --max_new_tokens=24",
    "--max_new_tokens=1024": "--max_new_tokens=24",
    "llm-blender/PairRM": "tiny/world/judge",
    "Qwen/Qwen2.5-7B-Instruct": "tiny/world/base",
    "MODEL": "tiny/world/base",
    "out/tiny_aipo out/tiny_dpo": "out/aipo_nemo out/dpo_nemo",
    "FastChat/fastchat/llm_judge/data": "bench",
    "annotations.json.gz --lc_data=DIR": f"{ALPACA}/gpt-3.5-turbo-1106/annotations.json.gz --lc_data={ALPACA}",
    "arena_hard_battles.jsonl": f"{ARENA}/battles/gpt-3.5-turbo-0125.jsonl.gz"}


@pytest.fixture(scope="module")
def at_home(folder, tmp_path_factory):
    """A function that runs a command of the README in a folder where the files it names exist; (exit code, output)."""
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("my_prompts.jsonl", [{"question": f"What is {k} plus 2?"} for k in range(64)])
    write("prompts.jsonl", [{"prompt": f"What is {k} plus 3?"} for k in range(8)])
    for name, more in ("A", " Thank you."), ("B", ""):
        write(f"{name}.jsonl", [{"id": str(k), "prompt": f"What is {k} plus 3?", "responses": [f"The sum is {k + 3}.{more}"]} for k in range(8)])
    mt_bench(folder)
    shutil.copy(folder / "bench" / "mt_bench" / "question.jsonl", folder)
    judge = Grader(lambda messages: "Rating: [[7]]")
    with warm(tmp_path_factory.mktemp("warm"), OPENAI_API_KEY="sk-none") as env:
        env["PATH"] = env["PATH"].replace(os.pathsep, os.pathsep + os.path.dirname(sys.executable) + os.pathsep, 1)          # and torchrun

        def run(command):
            for name, here in {**SMALLER, "https://api.openai.com/v1": judge.url}.items():
                command = command.replace(name, here)
            done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
            return done.returncode, done.stdout + done.stderr

        yield run


@pytest.mark.parametrize("command", [pytest.param(c, id=f"{k}-{c[:40]}", marks=published if "bench=a" in c else ()) for k, c in enumerate(COMMANDS)])
def test_a_command_of_the_readme_runs(command, at_home):
    """In the README's order: some read what those before wrote."""
    if command in NOT_RUN:
        pytest.skip(NOT_RUN[command])
    code, output = at_home(command)
    assert code == 0, output


def test_the_objective_of_the_readme_is_one(folder):
    line, = re.findall(r"^    (my_dpo=.*),$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    code = (folder / "losses.py").read_text().replace("OBJECTIVES = dict(\n", f"OBJECTIVES = dict(\n    {line},\n", 1)
    names = {}
    exec(code, names)
    m = names["margins"](*(names["torch"].tensor([x]) for x in (-10.0, -30.0, -12.0, -20.0, 5.0, 5.0)))
    assert names["pair_loss"]("my_dpo", m, beta=0.3).item() == pytest.approx(0.5544, abs=1e-4)               # log(1 + e^-.3)


def main():
    text = TOUR.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as parent:
        told = run_tour(copy_of_the_repository(Path(parent) / "nanoaipo"))
    printed = iter([p for p, (kind, _) in told if kind in ("text", "sample")])
    text = re.sub(r"^```(text|sample)\n.*?^```$", lambda m: f"```{m[1]}\n{next(printed).rstrip()}\n```", text, flags=re.DOTALL | re.MULTILINE)
    TOUR.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
