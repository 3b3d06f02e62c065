"""The guard of runs whose held-out prompts carry no `answer`, in iterate.sh."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT, warm_environment
from test_files import write_lines
from test_loop import ENV, hashes, read_json, records, world  # noqa: F401

GUARD = "prompts/guard.jsonl"
PAIR = {"prompt": "What is 1 plus 2?", "chosen": "It is 3.", "rejected": "I do not know."}


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):  # noqa: F811
    """A folder with held-out prompts that carry no answer, and with pairs to train on."""
    folder = tmp_path_factory.mktemp("guard")
    heldout = records(world / "heldout.jsonl")[:8]
    write_lines(folder / "heldout.jsonl", *[{"prompt": row["prompt"]} for row in heldout])
    write_lines(folder / "pairs.jsonl", *[PAIR] * 8)
    return folder


def command(folder, out, *arguments):
    """One iteration on the embedded world, which trains on the pairs of the folder."""
    return [
        "bash",
        "iterate.sh",
        "config/tiny.py",
        f"--out={out}",
        f"--pairs={folder}/pairs.jsonl",
        f"--eval_prompts={folder}/heldout.jsonl",
        "--iterations=1",
        "--max_new_tokens=16",
        "--batch_size=8",
        "--block=64",
        *arguments,
    ]


def iterate(folder, out, *arguments):
    """Run that to its end; what it printed."""
    done = subprocess.run(
        command(folder, out, *arguments),
        cwd=ROOT,
        env=warm_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def blind(folder):
    """A run without a guard, and what it printed."""
    out = folder / "blind"
    return out, iterate(folder, out, "--eval_guard=")


@pytest.fixture(scope="module")
def guarded(folder, blind):
    """The same run with a guard, which came later, and what that printed."""
    out = folder / "guarded"
    shutil.copytree(blind[0], out)
    return out, iterate(folder, out, f"--eval_guard={GUARD}")


def test_a_guard_adds_its_own_files_to_a_run_and_changes_no_other(blind, guarded):
    before = hashes(blind[0])
    after = hashes(guarded[0])

    added = {f"iter_{t}/guard_answers.jsonl" for t in (0, 1)}
    assert after.keys() - before.keys() == added
    for name in before:
        assert after[name] == before[name], name
    assert read_json(guarded[0], "iter_1", "eval.json")["n"] == 8


def test_each_iteration_says_how_many_answers_are_right_and_follow(blind, guarded):
    out, printed = guarded
    asked = records(ROOT / GUARD)
    for t in (0, 1):
        scores = read_json(out, f"iter_{t}", "guard.json")
        assert scores["n"] == len(asked) == 200
        assert scores["n_accuracy"] == scores["n_followed"] == 100
        low, high = scores["accuracy_ci"]
        assert low <= scores["accuracy"] <= high
        answered = records(out / f"iter_{t}" / "guard_answers.jsonl")
        assert [row["id"] for row in answered] == [row["id"] for row in asked]

    # every evaluation prints it, and the report has columns for it
    assert printed.count("guard: accuracy ") == printed.count("guard: followed ") == 2
    assert "accuracy[2]" in printed
    assert "[2] guard, judge: answer;" in printed
    assert "n 200; invalid replies: -" in printed
    assert "no guard" not in printed
    assert blind[1].count("no guard: no prompt carries an 'answer'") == 3  # two stages, the report


def test_the_guard_is_found_from_another_folder(folder, guarded, tmp_path):
    script, *arguments = command(folder, guarded[0], f"--eval_guard={GUARD}", "--iterations=0")[1:]
    arguments[0] = str(ROOT / arguments[0])
    os.symlink(ROOT / "tiny", tmp_path / "tiny")  # what the recipe names

    done = subprocess.run(
        ["bash", str(ROOT / script), *arguments],
        cwd=tmp_path,
        env=warm_environment(),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("complete, nothing to do") == 4  # two of the guard, two of the answers


def test_killed_while_the_guard_answers_and_run_again_it_gives_the_same_answers(
    folder, blind, guarded, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(blind[0], out)
    part = out / "iter_1" / "guard_answers.jsonl.tmp"
    process = subprocess.Popen(
        command(folder, out, f"--eval_guard={GUARD}"),
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None:
        if part.exists() and part.stat().st_size:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    n_done = len(part.read_text().splitlines())
    printed = iterate(folder, out, f"--eval_guard={GUARD}")

    assert 0 < n_done < 200
    assert f"goes on behind {n_done} of 200 prompts" in printed
    assert hashes(out) == hashes(guarded[0])
    for t in (0, 1):
        scores = read_json(out, f"iter_{t}", "guard.json")
        assert scores == read_json(guarded[0], f"iter_{t}", "guard.json")
