"""bench/gpu.sh without a GPU: its checks at tiny sizes, and what becomes of one that goes wrong."""

import importlib.util
import json
import math
import subprocess

import pytest
from conftest import ROOT

from bench.gpu.__main__ import CHECKS, run_checks
from bench.gpu.report import Report, markdown

# they start scripts, one after another; speed.train starts one, which shows how that is done
LEFT_OUT = {"training.steps", "training.resume", "sampling.generate", "speed.train_kept"}
VLLM = {"sampling.vllm", "speed.vllm"}

BROKEN = """
import os, time

def is_right(report):
    report.below("a difference", 0.5, 1.0)

def is_wrong(report):
    report.below("a difference", 2.0, 1.0)

def raises(report):
    raise ValueError("in two\\nlines")

def dies(report):
    os.kill(os.getpid(), 9)

def hangs(report):
    time.sleep(600)
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """The checks above as a module that workers find."""
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def run_dry(checks, out):
    """{check: its status} of bench/gpu.sh --dry."""
    command = ["bash", "bench/gpu.sh", "--dry", f"--only={','.join(checks)}", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()[-3000:]
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {r["name"].removeprefix("bench.gpu."): r["status"] for r in records}


def test_every_check_that_can_run_on_a_cpu_passes_there(tmp_path):
    checks = [name for name in CHECKS if name not in LEFT_OUT | VLLM]

    status = run_dry(checks, tmp_path)

    cuda_only = {"attention.without_cudnn", "attention.varlen", "speed.train_compiled"}
    assert {name for name in status if status[name] == "SKIP"} == cuda_only
    assert list(status) == checks

    # the table names them all, and holds what was measured
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {name} | {status[name]} |" in table for name in checks)
    assert "| PairRM |" in table
    assert "| train.py |" in table


def test_vllm_passes_its_checks_and_is_skipped_aloud_where_it_is_not_installed(tmp_path):
    status = run_dry(VLLM, tmp_path)

    expected = "PASS" if importlib.util.find_spec("vllm") else "SKIP"
    assert status == dict.fromkeys(VLLM, expected)
    table = (tmp_path / "results.md").read_text()
    assert ("vllm is not installed" in table) == (expected == "SKIP")
    assert ("same seeds again" in table) == (expected == "PASS")


def test_a_check_that_goes_wrong_costs_itself_alone(broken, tmp_path):
    names = ["is_wrong", "raises", "dies", "hangs", "is_right"]
    checks = {f"broken.{name}": 0 for name in names}
    checks["broken.takes_long"] = 10_000  # seconds, of which there are fewer

    records = run_checks(checks, tmp_path, budget=1000, dry=True)

    assert [r["name"] for r in records] == list(checks)
    assert [r["status"] for r in records] == ["FAIL", "FAIL", "FAIL", "FAIL", "PASS", "SKIP"]
    reasons = [r.get("reason", "") for r in records]
    assert reasons[0] == "a difference 2.0e+00, not below 1.0e+00"
    assert reasons[1] == "ValueError: in two"
    assert "status -9" in reasons[2]
    assert "status 1" in reasons[3]
    assert "in hangs" in (tmp_path / "log.txt").read_text()  # where it hung


def test_of_several_differences_the_largest_counts_and_nan_is_wrong():
    report = Report()
    for value in (0.5, 0.9, 0.1):
        report.below("small", value, 1.0)
    for value in (0.5, math.nan, 0.1):
        report.below("with nan", value, 1.0)
    report.holds("a statement", True)
    report.holds("a statement", False)

    assert report.figures() == ["small 9.0e-01", "with nan inf"]
    assert report.wrong() == ["with nan inf, not below 1.0e+00", "not true: a statement"]


def test_the_table_has_the_card_the_versions_and_the_commit():
    described = {"commit": "abc123", "card": "H100", "torch": "2.11", "vllm": "none"}
    record = {"name": "bench.gpu.speed.card", "status": "PASS", "seconds": 1.0}
    record["measured"] = [("a copy", "2.70 TB/s")]

    table = markdown(described, [record], dry=False)

    assert "commit abc123, card H100, torch 2.11." in table
    assert "| speed.card | PASS | 1 |  |" in table
    assert "| a copy | 2.70 TB/s |" in table
