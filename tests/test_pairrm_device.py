"""PairRM as a GPU computes it: its kernel, and 16 bits, both on a CPU."""

import collections
import json
import os
import subprocess
import sys

import pytest
import torch
from test_rank import build_judge, random_prompts

from nanoaipo import pairrm

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return build_judge(tmp_path_factory.mktemp("judge"))


def test_the_kernel_gives_the_scores_of_the_cpu_and_a_wrong_bucket_would_be_noticed(judge):
    pytest.importorskip("triton", reason="needs triton: torch for CUDA and `make vllm` bring it")
    environment = os.environ | {"PYTHONPATH": os.path.dirname(HERE)}
    command = [sys.executable, os.path.join(HERE, "pairrm_on_kernel.py"), judge]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    differences = json.loads(done.stdout)
    assert differences.pop("as it is") < 1e-5
    assert len(differences) == 3
    assert all(difference > 1e-3 for difference in differences.values())


def test_float16_gives_the_same_winners_and_bfloat16_is_farther_away(judge, monkeypatch):
    # oneDNN's layers cannot change their type
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)

    def compare(dtype):
        model, tokenizer = pairrm.load_pairrm(judge, torch.device("cpu"))
        model.pretrained_model.to(dtype)
        prompts, candidates = random_prompts(3, 6, 4, 40)
        counts = collections.Counter()
        return torch.stack(pairrm.compare(model, tokenizer, prompts, candidates, 4000, counts))

    exact = compare(torch.float32)
    half = compare(torch.float16)
    coarse = compare(torch.bfloat16)

    assert torch.isfinite(half).all()
    clear = exact.abs() > 0.02 * exact.std()
    assert torch.equal((half > 0)[clear], (exact > 0)[clear])
    assert 3 * (half - exact).abs().mean() < (coarse - exact).abs().mean()
