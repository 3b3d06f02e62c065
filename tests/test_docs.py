"""Every code block of README.md and docs/ is run as a reader would run it.

What a block prints is compared with what the page shows.

    python tests/test_docs.py        writes what the tour's blocks print now into docs/tour.md
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, warm_environment
from test_eval import ALPACA, ARENA, Grader, mt_bench, published

TOUR = ROOT / "docs" / "tour.md"
README = ROOT / "README.md"

# In the order in which a reader opens them: later commands read what earlier ones wrote.
PAGES = [README]
for name in ("generation", "ranking", "judges", "training", "evaluation"):
    PAGES.append(ROOT / "docs" / f"{name}.md")

# Runs blocks [kind, code] in order, Python in one session; prints what each printed, as JSON.
SESSION = """
import contextlib, io, json, subprocess, sys
sys.path.insert(0, ".")
session = {"__name__": "tour"}
outputs = []
for kind, code in json.load(sys.stdin):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        if kind == "python":
            exec(code, session)
        else:
            command = ["bash", "-euc", code]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            output.write(done.stdout)
    outputs.append(output.getvalue())
print(json.dumps(outputs))
"""


def copy_of_the_repository(folder):
    """A copy to work in, with the embedded world."""
    subprocess.run([sys.executable, "tiny/prepare.py"], cwd=ROOT, check=True)
    ignored = shutil.ignore_patterns(".*", "out", "world", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "tiny" / "world").symlink_to(ROOT / "tiny" / "world")
    return folder


def blocks_of(text):
    """[kind, code] of each block between fences, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [list(block) for block in found]


def run_tour(folder):
    """[(what a block printed, [kind, text] of the block behind it)] of the tour's blocks.

    Behind a block of code stands what it prints: ```text, or ```sample where samples may differ.
    """
    before_the_exercises = TOUR.read_text(encoding="utf-8").partition("## Five exercises")[0]
    blocks = blocks_of(before_the_exercises)
    code = [block for block in blocks if block[0] in ("python", "bash")]
    assert {kind for kind, _ in blocks} == {"python", "bash", "text", "sample"}

    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        input=json.dumps(code),
        cwd=folder,
        env=warm_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = iter(json.loads(done.stdout.splitlines()[-1]))

    followers = [*blocks[1:], [None, None]]
    return [(next(outputs), after) for block, after in zip(blocks, followers) if block in code]


def alike(shown, printed):
    """Equal but for spaces and numbers with a point.

    A quarter may be between such numbers: each processor trains a slightly other world.
    """
    number = r"(-?\d+\.\d+)"
    shown_parts = re.split(number, " ".join(shown.split()))
    printed_parts = re.split(number, " ".join(printed.split()))
    shown_words = [part.strip() for part in shown_parts[::2]]
    printed_words = [part.strip() for part in printed_parts[::2]]
    if shown_words != printed_words:
        return False

    for a, b in zip(shown_parts[1::2], printed_parts[1::2]):
        if abs(float(a) - float(b)) > 0.25 * abs(float(a)) + 0.02:
            return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return copy_of_the_repository(tmp_path_factory.mktemp("docs") / "nanoaipo")


def test_alike_sees_what_differs():
    assert alike("a  1.00 b\n[2, -3.50]\n", "a 1.10 b [2, -3.0]\n")
    assert not alike("a 1.00", "a 1.40")
    assert not alike("ids 1", "ids 2")
    assert not alike("x 1.0", "y 1.0")
    assert not alike("1.0", "1.0 1.0")


def test_the_tour_prints_what_it_shows(folder):
    comparisons = [
        (printed, shown) for printed, (kind, shown) in run_tour(folder) if kind == "text"
    ]
    assert len(comparisons) >= 8
    for printed, shown in comparisons:
        assert alike(shown, printed), f"the page shows\n{shown}\nand the block printed\n{printed}"


# ---- the exercises of the tour ----

EXERCISES = re.split(r"^### Exercise ", TOUR.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
NAMES = [re.sub(r"\W+", "-", text.partition("\n")[0]) for text in EXERCISES]


@pytest.mark.parametrize("text", EXERCISES, ids=NAMES)
def test_an_exercise_is_open_before_its_diff_and_solved_after(text, folder, tmp_path):
    (kind, check), (other_kind, diff) = blocks_of(text)
    assert (kind, other_kind) == ("python", "diff")

    # a repository of its own, with what the tour has written
    repository = tmp_path / "nanoaipo"
    shutil.copytree(folder, repository, symlinks=True, ignore=shutil.ignore_patterns("tour"))
    (repository / "check.py").write_text(check)
    if not (folder / "out" / "tour").exists():  # where this test runs alone
        run_tour(folder)
    shutil.copytree(folder / "out" / "tour", repository / "out" / "tour")

    def run_check():
        return subprocess.run(
            [sys.executable, "check.py"],
            cwd=repository,
            env=warm_environment(),
            capture_output=True,
            text=True,
        )

    assert run_check().returncode == 1
    patch = ["patch", "-p1", "--fuzz=0"]
    subprocess.run(patch, input=diff, cwd=repository, check=True, capture_output=True, text=True)
    done = run_check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout

    added = [line for line in diff.splitlines() if line.startswith("+") and line != "+"]
    assert len(added) < 12  # an exercise is a small one


# ---- the commands of the pages ----


def commands_of(page):
    """The commands of a page's indented blocks, their comments and line breaks taken out."""
    pattern = r"^    ((?:make|pip|bash|python|torchrun) (?:.*\\\n)*.*)"
    found = re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"\\\n +|  +# .*", "", command) for command in found]


COMMANDS = [(page.stem, command) for page in PAGES for command in commands_of(page)]
NOT_RUN = {"pip install -r requirements-gpu.txt": "gigabytes, for CUDA"}

# Settings that let a recipe of a node run on the embedded world.
SMALL = (
    "--model=tiny/world/base --prompts=tiny/world/prompts.jsonl "
    "--eval_prompts=tiny/world/heldout.jsonl --n_eval=8 --n_prompts=12 --new_instructions=0 "
    "--iterations=1 --processes=1 --engine=transformers --dtype=float32 --max_new_tokens=24 "
    "--compile=False "
    "--ranker_model=tiny/world/judge --eval_ranker=pairrm --eval_ranker_model=tiny/world/judge"
)

# What a command names -> what stands in for it here.
STAND_INS = {
    "make ": "make -n ",
    "iterate.sh config/aipo_nemo.py": f"iterate.sh config/aipo_nemo.py {SMALL}",
    "iterate.sh config/tiny.py": "iterate.sh config/tiny.py --n_eval=8",
    "--nproc-per-node=8 train.py config/aipo_nemo.py": (
        "--nproc-per-node=2 train.py config/aipo_nemo.py --dtype=float32 --compile=False"
    ),
    "--prompts=prompts.jsonl": "--prompts=prompts.jsonl --max_new_tokens=24",
    "--max_new_tokens=1024": "--max_new_tokens=24",
    "llm-blender/PairRM": "tiny/world/judge",
    "allenai/reward-bench-2:test": "pairs.jsonl",
    "Qwen/Qwen2.5-7B-Instruct": "tiny/world/base",
    "MODEL": "tiny/world/base",
    "out/tiny_aipo out/tiny_dpo": "out/aipo_nemo out/dpo_nemo",
    "FastChat/fastchat/llm_judge/data": "bench",
    "annotations.json.gz --lc_data=DIR": (
        f"{ALPACA}/gpt-3.5-turbo-1106/annotations.json.gz --lc_data={ALPACA}"
    ),
    "arena_hard_battles.jsonl": f"{ARENA}/battles/gpt-3.5-turbo-0125.jsonl.gz",
}


def parameters():
    """A parameter for each command; those that read published files are marked so."""
    params = []
    for k, (page, command) in enumerate(COMMANDS):
        marks = ()
        if "bench=a" in command:
            marks = published
        params.append(pytest.param(command, id=f"{k}-{page}-{command[:40]}", marks=marks))
    return params


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def reply(messages):
    """A judge's reply that MT-Bench and the rubric of points can both read."""
    points = len(messages[-1]["content"]) % 6
    return f"Rating: [[7]]\nScore: {points}"


@pytest.fixture(scope="module")
def run_command(folder):
    """A function that runs a command where the files it names exist: (exit code, output)."""
    questions = [{"question": f"What is {k} plus 2?"} for k in range(64)]
    write_lines(folder / "my_prompts.jsonl", questions)
    write_lines(folder / "prompts.jsonl", [{"prompt": f"What is {k} plus 3?"} for k in range(8)])
    for name, ending in ("A", " Thank you."), ("B", ""):
        answers = []
        for k in range(8):
            response = f"The sum is {k + 3}.{ending}"
            record = {"id": str(k), "prompt": f"What is {k} plus 3?", "responses": [response]}
            answers.append(record)
        write_lines(folder / f"{name}.jsonl", answers)

    mt_bench(folder)
    shutil.copy(folder / "bench" / "mt_bench" / "question.jsonl", folder)
    judge = Grader(reply)
    stand_ins = STAND_INS | {"https://api.openai.com/v1": judge.url}
    env = warm_environment() | {"OPENAI_API_KEY": "sk-none"}

    def run(command):
        for name, stand_in in stand_ins.items():
            command = command.replace(name, stand_in)
        done = subprocess.run(
            command, shell=True, cwd=folder, env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("command", parameters())
def test_a_command_of_the_pages_runs(command, run_command):
    """In the pages' order: some read what those before wrote."""
    if command in NOT_RUN:
        pytest.skip(NOT_RUN[command])
    code, output = run_command(command)
    assert code == 0, output


def test_the_pages_name_every_objective():
    import losses

    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name in losses.OBJECTIVES:
        assert f"`{name}`" in page


def test_the_objective_of_the_readme_is_one(folder):
    (line,) = re.findall(r"^    (my_dpo=.*),$", README.read_text(encoding="utf-8"), re.MULTILINE)
    code = (folder / "losses.py").read_text()
    start = "OBJECTIVES = dict(\n"
    assert start in code
    names = {}
    exec(code.replace(start, f"{start}    {line},\n", 1), names)

    tensor = names["torch"].tensor
    m = names["symbols_of"](*(tensor([x]) for x in (-10.0, -30.0, -12.0, -20.0, 5.0, 5.0)))
    loss = names["pair_loss"]("my_dpo", m, beta=0.3).item()
    assert loss == pytest.approx(0.5544, abs=1e-4)  # log(1 + e^-.3)


def main():
    """Write what the tour's blocks print now into the page."""
    with tempfile.TemporaryDirectory() as parent:
        results = run_tour(copy_of_the_repository(Path(parent) / "nanoaipo"))
    outputs = iter([printed for printed, (kind, _) in results if kind in ("text", "sample")])

    def with_output(match):
        return f"```{match[1]}\n{next(outputs).rstrip()}\n```"

    text = TOUR.read_text(encoding="utf-8")
    pattern = r"^```(text|sample)\n.*?^```$"
    text = re.sub(pattern, with_output, text, flags=re.DOTALL | re.MULTILINE)
    TOUR.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
