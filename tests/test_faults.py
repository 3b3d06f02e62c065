"""Faults: two runs at once, killed processes, damaged files, full disks, endpoints that are away.

After each of them the same command goes on to the same bytes, or one line names the file and what
to do. tests/test_loop.py kills a run in each stage; bench/chaos.py kills it at random, many times.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import NO_GPU, ROOT, run, warm_python
from test_judge import heed_interrupts
from test_loop import hashes

from nanoaipo import endpoints, stages
from nanoaipo.errors import InputError, disk_fault
from nanoaipo.locks import hold_lock

SMALL = (
    "--n_prompts=16",
    "--n_responses=3",
    "--iterations=2",
    "--n_eval=8",
    "--max_new_tokens=16",
    "--batch_size=8",
)


def environment(python):
    """The environment in which iterate.sh finds this python."""
    path = os.path.dirname(python) + os.pathsep + os.environ["PATH"]
    return os.environ | NO_GPU | {"PATH": path, "VIRTUAL_ENV": sys.prefix}


def start(out, *arguments, python=sys.executable):
    """Start a small run of iterate.sh in this folder, in a process group of its own."""
    return subprocess.Popen(
        ["bash", "iterate.sh", "config/tiny.py", f"--out={out}", *SMALL, *arguments],
        cwd=ROOT,
        env=environment(python),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def iterate(out, *arguments, python=None):
    """Such a run to its end, over a python that has imported everything: (exit code, output)."""
    process = start(out, *arguments, python=python or warm_python())
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout + stderr


def wait_for(condition, seconds=120):
    """Return the condition's first value that is true."""
    end = time.time() + seconds
    while time.time() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise TimeoutError


def holder_of(lock):
    """The number of the process that has written itself into a lock, or None."""
    if not os.path.exists(lock):
        return None
    found = re.match(r"process (\d+) on ", Path(lock).read_text())
    return found and int(found[1])


def is_alive(pid):
    """Whether a process is there and not a zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder of a whole run, what a second run in it was told while the first was at work)."""
    subprocess.run([sys.executable, "tiny/prepare.py"], cwd=ROOT, check=True)
    out = tmp_path_factory.mktemp("faults") / "run"
    first = start(out, python=warm_python())
    wait_for(lambda: holder_of(out / "lock"))
    second = iterate(out, "--iterations=3", python=sys.executable)
    assert first.poll() is None  # it is still at work

    stdout, stderr = first.communicate(timeout=300)
    assert first.returncode == 0, stdout + stderr
    return out, first.pid, second


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A copy of that folder."""
    out, *_ = undisturbed
    return Path(shutil.copytree(out, tmp_path / "run"))


# ------------------------------------------------------------------------------------ two at once


def test_a_second_run_in_a_folder_ends_at_once_and_names_the_first(undisturbed):
    out, pid, (code, text) = undisturbed

    assert code == 1
    holder = f"{out}/lock: locked by process {pid} on {socket.gethostname()}, since "
    assert text.startswith(holder)
    assert text.endswith(": wait for it or end it, then run the same command again\n")
    assert text.count("\n") == 1
    assert "iterations = 2\n" in (out / "recipe.py").read_text()  # not the second one's 3


HOLD = "import sys, time; from nanoaipo.locks import hold_lock; hold_lock(sys.argv[1])"


def test_a_lock_keeps_others_away_and_dies_with_its_holder(undisturbed, tmp_path):
    whole, *_ = undisturbed
    out = tmp_path / "pairs.jsonl"
    command = [sys.executable, "-c", HOLD + "; time.sleep(300)", f"{out}.lock"]
    holder = subprocess.Popen(command, cwd=ROOT)
    wait_for(lambda: holder_of(f"{out}.lock"))
    rank = ("rank.py", "config/tiny.py", f"--candidates={whole}/iter_1/candidates.jsonl")

    done = run(*rank, out=out)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{out}.lock: locked by process {holder.pid} on ")
    assert not out.exists()

    # the file is still there, the lock is not
    holder.kill()
    holder.wait()
    assert holder_of(f"{out}.lock") == holder.pid
    assert run(*rank, out=out).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["pairs.jsonl", "pairs.manifest.json"]


def test_a_child_that_outlives_the_holder_does_not_hold_its_lock(tmp_path):
    path = str(tmp_path / "x.lock")
    child = subprocess.run(
        [sys.executable, "-c", HOLD + "; import os; os.fork() or time.sleep(30)", path],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )

    assert child.returncode == 0
    hold_lock(path)
    assert holder_of(path) == os.getpid()


# ------------------------------------------------------------------------------- killed processes


def test_a_stage_ends_with_iterate_sh_and_the_same_command_goes_on(undisturbed, copied):
    whole, *_ = undisturbed
    for name in ("iter_1", "iter_2", "report.html"):
        path = copied / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    # the shell alone gets the signal
    process = start(copied)
    stage = wait_for(lambda: holder_of(copied / "iter_1" / "candidates.jsonl.lock"))
    process.send_signal(signal.SIGTERM)
    process.wait()
    wait_for(lambda: not is_alive(stage), seconds=10)
    assert not (copied / "iter_1" / "candidates.jsonl").exists()

    code, text = iterate(copied)
    assert code == 0, text
    assert hashes(copied) == hashes(whole)


def generate(out, iteration=1):
    """Arguments of generate.py for eight prompts, each a block of its own."""
    return (
        "generate.py",
        "config/tiny.py",
        "--n_prompts=8",
        "--n_responses=2",
        "--max_new_tokens=8",
        "--block=1",
        f"--iteration={iteration}",
        f"--out={out}",
    )


@pytest.fixture(scope="module")
def shards(undisturbed, tmp_path_factory):
    """Folder of the two shards that two processes write, here one after the other."""
    folder = tmp_path_factory.mktemp("shards")
    for rank in ("0", "1"):
        done = run(*generate(folder / "c.jsonl"), env={"RANK": rank, "WORLD_SIZE": "2"})
        assert done.returncode == 0, done.stderr
    return folder


def contents(folder):
    """The bytes of the shards in a folder, in their order."""
    return [path.read_bytes() for path in sorted(folder.glob("c-*-of-00002.jsonl"))]


LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def kill_within_torchrun(out, victim):
    """Run generate.py under torchrun; kill a worker or torchrun itself, once both workers work."""
    command = [sys.executable, *LAUNCH, *generate(out)]
    locks = [f"{out.parent}/c-0000{rank}-of-00002.jsonl.lock" for rank in (0, 1)]
    before = [holder_of(lock) for lock in locks]

    def workers():
        now = [holder_of(lock) for lock in locks]
        return all(now) and not set(now) & set(before) and now

    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | NO_GPU, stderr=subprocess.PIPE, text=True
    )
    pids = wait_for(workers)
    os.kill({"worker": pids[1], "torchrun": process.pid}[victim], signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(map(is_alive, pids)), seconds=30)
    return process.returncode


def test_when_a_process_of_torchrun_dies_the_others_end_and_the_same_command_goes_on(
    shards, tmp_path
):
    out = tmp_path / "c.jsonl"
    for victim in ("worker", "torchrun"):
        assert kill_within_torchrun(out, victim) != 0
        assert not contents(tmp_path)

    done = run(*generate(out), python=LAUNCH)

    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(shards)


# --------------------------------------------------------------------------------- damaged outputs


def cut(path):
    """Cut a file in the middle."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, name, reader, what",
    [
        (flip, "candidates.jsonl", "rank.py", "not the bytes that were written"),
        (cut, "pairs.jsonl", "train.py", r"\d+ bytes, \d+ were written"),
        (flip, "model/model.safetensors", "generate.py", "not the bytes that were written"),
        (os.remove, "model/config.json", "generate.py", "missing"),
    ],
)
def test_a_damaged_output_is_named_by_who_reads_it(damage, name, reader, what, copied):
    damage(copied / "iter_1" / name)
    inputs = {
        "rank.py": {"candidates": copied / "iter_1" / "candidates.jsonl"},
        "train.py": {"pairs": copied / "iter_1" / "pairs.jsonl"},
        "generate.py": {"model": copied / "iter_1" / "model"},
    }
    suffix = "" if reader == "train.py" else ".jsonl"

    done = run(reader, "config/tiny.py", out=f"{copied}/new{suffix}", **inputs[reader])

    assert done.returncode == 1
    output = copied / "iter_1" / name.partition("/")[0]
    line = f"{copied}/iter_1/{name}: damaged, {what}: delete {output} and run the command that "
    assert re.search(f"^{line}", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert not (copied / f"new{suffix}").exists()


def test_a_run_names_a_damaged_output_and_makes_it_again_once_it_is_deleted(undisturbed, copied):
    whole, *_ = undisturbed
    weights = copied / "iter_1" / "model" / "model.safetensors"
    flip(weights)

    code, text = iterate(copied)
    assert code == 1
    assert f"{weights}: damaged, not the bytes that were written" in text

    shutil.rmtree(weights.parent)
    code, text = iterate(copied)
    assert code == 0, text
    assert hashes(copied) == hashes(whole)


def test_a_deleted_shard_is_missed_and_made_again(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    out = folder / "c.jsonl"
    (folder / "c-00001-of-00002.jsonl").unlink()

    done = run("rank.py", "config/tiny.py", candidates=out, out=tmp_path / "p.jsonl")
    assert done.returncode == 1
    assert "1 of 2 shards are there; run the stage that writes them again" in done.stderr

    for rank in ("0", "1"):
        done = run(*generate(out), env={"RANK": rank, "WORLD_SIZE": "2"})
        assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(shards)


def test_large_files_are_read_whole_only_by_a_stage_that_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LARGE", 10)
    out = tmp_path / "x.jsonl"
    with stages.open_output(str(out), {"settings": {}, "inputs": {}}) as write:
        write({"text": "more than ten bytes"})
    stages.check_undamaged(str(out), whole=True)

    flip(out)
    stages.check_undamaged(str(out))
    with pytest.raises(InputError, match="not the bytes that were written"):
        stages.check_undamaged(str(out), whole=True)


def test_an_output_without_a_description_and_one_changed_on_purpose_are_taken(tmp_path):
    out = tmp_path / "x.jsonl"
    with stages.open_output(str(out), {"settings": {}, "inputs": {}}) as write:
        write({"a": 1})
    manifest = tmp_path / "x.manifest.json"

    # a manifest of before has no "files"
    out.write_text('{"a": 2}\n')
    stages.write_json(str(manifest), {"settings": {}, "inputs": {}})
    stages.check_undamaged(str(out))

    manifest.write_text('{"settings": ')
    with pytest.raises(InputError, match=f"{manifest}: damaged: .*: delete {out} and run"):
        stages.check_undamaged(str(out))

    manifest.unlink()
    stages.check_undamaged(str(out))


# ------------------------------------------------------------------------ disks that take no more


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts or remounts a disk in memory with options; it returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


def test_a_full_and_a_read_only_disk_are_told_in_a_line_and_the_same_command_goes_on(
    undisturbed, small_disk
):
    whole, *_ = undisturbed
    out = small_disk("size=2m") / "model"
    command = ("train.py", whole / "recipe.py", f"--pairs={whole}/iter_1/pairs.jsonl")
    settings = {"model": "tiny/world/base", "out": out}

    # weights take 3 MB, a checkpoint takes 10
    for checkpoint_every in (1, 0):
        done = run(*command, **settings, checkpoint_every=checkpoint_every)
        assert done.returncode == 1
        line = f"{out}: No space left on device: make room and run the same command again, which "
        assert done.stderr.splitlines()[-1].startswith(line)
        assert "Traceback" not in done.stderr
        assert not out.exists()
        shutil.rmtree(f"{out}.tmp")

    small_disk("remount,size=64m,ro")
    done = run(*command, **settings)
    assert done.returncode == 1
    assert f"{out}.lock: Read-only file system: let it be written, or choose" in done.stderr
    assert "Traceback" not in done.stderr

    small_disk("remount,size=64m,rw")
    done = run(*command, **settings)
    assert done.returncode == 0, done.stderr
    expected = (whole / "iter_1" / "model" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == expected
    assert not list(out.glob(".tmp*"))


def test_a_run_on_a_full_or_a_read_only_disk_ends_with_one_line(small_disk):
    out = small_disk("size=4k,nr_inodes=3") / "run"
    code, text = iterate(out)
    assert code == 1
    assert "No space left on device: make room" in text
    assert "Traceback" not in text

    small_disk("remount,ro")
    code, text = iterate(out.parent / "other")
    assert code == 1
    assert text.startswith(f"{out.parent}/other: Read-only file system")
    assert text.count("\n") == 1


def test_an_error_of_another_kind_is_not_taken_for_one_of_the_disk():
    error = RuntimeError("PytorchStreamReader failed [enforce fail at inline_container.cc:145]")

    assert disk_fault(error, "out") is None
    assert disk_fault(FileNotFoundError(2, "No such file or directory", "x"), "out") is None
    assert disk_fault(KeyboardInterrupt(), "out") is None


# ------------------------------------------------------------------- Ctrl-C, and nobody who reads

STAGE = """
import time
from configurator import run_script

def main():
    print("at work", flush=True)
    time.sleep(60)

run_script(main)
"""


def test_ctrl_c_ends_a_stage_with_one_line():
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 1
    line = "interrupted: run the same command again, which goes on from what is whole\n"
    assert stderr == line


UNFLUSHED = STAGE.replace(", flush=True", "").replace("time.sleep(60)", "")
OTHER_PIPE = STAGE.replace("time.sleep(60)", "raise BrokenPipeError(32, 'Broken pipe')")


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(
    "command",
    [
        ["rank.py", "--help"],
        ["-m", "nanoaipo.run", "--help"],
        ["rank.py"],
        ["-c", STAGE],
        ["-c", UNFLUSHED],
    ],
)
def test_a_script_whose_output_nobody_reads_ends_without_a_word(command, buffered):
    nobody, stdout = os.pipe()
    os.close(nobody)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": buffered},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(stdout)

    assert done.returncode == 1
    assert done.stderr == ""


def test_a_pipe_that_is_not_what_is_printed_keeps_its_traceback():
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PIPE], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 1
    assert done.stderr.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


# ------------------------------------------------------------------------------------ no endpoint


def test_an_endpoint_that_is_not_there_is_told_at_the_first_try(capsys, monkeypatch):
    monkeypatch.setattr(endpoints, "RETRIES", 1)
    with socket.socket() as s:  # a port that nobody listens at
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
        question = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
        answer = endpoints.endpoint(url, 4)
        with pytest.raises(InputError, match=f"{url}: APIConnectionError"):
            answer([question] * 4, None)

    line = f"{url}: [Errno 111] Connection refused: asked again up to 1 times, 8 seconds apart"
    out = capsys.readouterr().out
    assert out.startswith(line)
    assert out.count("\n") == 1
