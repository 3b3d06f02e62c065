"""The python that has imported everything (bench/warm.py) is as good as any other."""

import json
import os
import subprocess
import time
from pathlib import Path

from conftest import ROOT, run, warm_environment, warm_python

SHOW = """
import json, os, sys
from nanoaipo import processes
print(json.dumps([sys.argv, sys.path[:2], "torch" in sys.modules, processes.RANK, os.getcwd()]))
"""


def test_a_script_finds_its_own_folder_arguments_and_environment(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (tmp_path / "show.py").write_text(SHOW)
    env = warm_environment() | {"RANK": "3", "PYTHONPATH": f"{own}{os.pathsep}{ROOT}"}

    done = subprocess.run(
        ["python", "show.py", "--a=b"], cwd=tmp_path, env=env, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    expected = [["show.py", "--a=b"], [str(tmp_path), str(own)], True, 3, str(tmp_path)]
    assert json.loads(done.stdout) == expected


def test_it_runs_the_copy_of_the_code_that_it_stands_in(tmp_path):
    (tmp_path / "nanoaipo").mkdir()
    (tmp_path / "nanoaipo" / "seeds.py").write_text("print('another copy')")
    for arguments in (["-m", "nanoaipo.seeds"], ["-c", "import nanoaipo.seeds"]):
        done = subprocess.run(
            [warm_python(), *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout == "another copy\n"


def test_its_exit_status_is_the_scripts():
    assert run("-c", "pass").returncode == 0
    assert run("-c", "raise SystemExit(3)").returncode == 3
    done = run("-c", "raise SystemExit('a reason')")
    assert (done.returncode, done.stderr) == (1, "a reason\n")
    done = run("-c", "1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_what_a_killed_command_runs_ends_with_it(tmp_path):
    writes = (
        f"import time\nwhile True:\n  open({str(tmp_path / 'alive')!r}, 'w')\n  time.sleep(.01)"
    )
    process = subprocess.Popen([warm_python(), "-c", writes])
    alive = tmp_path / "alive"
    while not alive.exists():
        time.sleep(0.01)

    process.kill()
    process.wait()

    time.sleep(0.5)
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


def test_two_commands_run_at_a_time(tmp_path):
    waits = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'x')!r}): time.sleep(.01)"
    first = subprocess.Popen([warm_python(), "-c", waits])

    assert run("-c", f"open({str(tmp_path / 'x')!r}, 'w')").returncode == 0
    assert first.wait(60) == 0


def test_a_command_line_runs_with_it_and_leaves_no_server(tmp_path):
    command = [
        "bash",
        "-c",
        "command -v python; python -c \"import sys; print('torch' in sys.modules)\"; exit 5",
    ]
    done = subprocess.run(
        [warm_python(), "bench/warm.py", *command], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 5
    path, imported = done.stdout.splitlines()
    assert imported == "True"
    assert not Path(path).exists()
