"""How the processes of a run start: torchrun's variables, others' variables, none at all."""

import resource
import sys

import pytest
import torch
from conftest import run

from nanoaipo import processes

START = """
import torch
from nanoaipo.errors import InputError
from nanoaipo.processes import start_processes

try:
    mesh = start_processes(torch.device("cpu"))
    print(mesh.size(), torch.distributed.get_rank())
except InputError as e:
    print(e)
"""


def start(**env):
    """What a process prints that starts with these variables and none of torchrun's."""
    done = run("-c", START, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_rank_and_world_size_of_one_process_need_no_address():
    assert start() == "1 0"
    assert start(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0") == "1 0"
    assert start(RANK="0") == "1 0"


def test_several_processes_without_an_address_are_told_what_is_missing():
    message = start(RANK="0", WORLD_SIZE="2")
    assert message == (
        "WORLD_SIZE=2, and MASTER_ADDR is not set: start with torchrun, "
        "or unset RANK and WORLD_SIZE for one process"
    )
    message = start(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost")
    assert "MASTER_PORT is not set" in message
    assert start(RANK="3").startswith("RANK=3, WORLD_SIZE=1: unset both")


@pytest.mark.parametrize(
    "env, message",
    [
        ({"RANK": ""}, "RANK='': no whole number; unset it, or start with torchrun"),
        ({"RANK": "x"}, "RANK='x': no whole number; unset it, or start with torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': no whole number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK='': no whole number"),
        ({"WORLD_SIZE": "0"}, "RANK=0, WORLD_SIZE=0: unset both, or start with torchrun"),
        ({"RANK": "-1"}, "RANK=-1, WORLD_SIZE=1: unset both"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3, WORLD_SIZE=2: unset both"),
    ],
)
def test_a_rank_that_cannot_be_ends_every_script_with_one_line(env, message):
    assert start(**env).startswith(message)
    for script in ("generate.py", "rank.py", "eval.py", "train.py"):
        done = run(script, env=env)
        assert done.returncode == 1
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1


def test_the_peak_of_a_process_is_in_gib_on_linux_and_on_macos(monkeypatch):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu = torch.device("cpu")

    monkeypatch.setattr(sys, "platform", "linux")
    assert processes.peak_memory(cpu) >= used / 2**20
    assert processes.peak_memory(cpu) < 2 * used / 2**20

    # there the same number would be bytes
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes.peak_memory(cpu) < 2 * used / 2**30


def test_scripts_that_tests_start_see_no_gpu_but_the_tests_do():
    printed = "import torch; print(torch.cuda.is_available())"
    assert run("-c", printed).stdout == "False\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_attention_on_a_gpu_is_not_cudnns():
    processes.pick_device()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
