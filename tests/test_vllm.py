"""The real engine: vLLM, on a GPU or its CPU build (`make vllm`), through the whole loop on prompts people wrote."""
import importlib.util
import json
import os
import subprocess

import pytest

import data
from conftest import ROOT, run
from test_loop import ENV, world  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: `make vllm` adds its CPU build")
SHARED = ROOT.parent / "shared" / "data"


def test_greedy_output_equals_that_of_transformers_token_by_token(world, tmp_path):  # noqa: F811
    rows = {}
    for engine in ("vllm", "transformers"):
        done = run("generate.py", "config/tiny.py", f"--out={tmp_path}/{engine}.jsonl", "--n_prompts=32", "--n_responses=1", "--temperature=0", f"--engine={engine}")
        assert done.returncode == 0, done.stderr[-2000:]
        rows[engine] = [r for _, r in data.read(f"{tmp_path}/{engine}.jsonl")]
    for a, b in zip(rows["vllm"], rows["transformers"]):
        (x,), (y,) = a["responses"], b["responses"]
        assert a["prompt_ids"] == b["prompt_ids"] and x["ids"] == y["ids"] and x["finished"] == y["finished"] and abs(x["logp"] - y["logp"]) < 1e-3


@pytest.mark.parametrize("prompts", ["eval/alpaca_eval/instructions.json", "prompts/seed_tasks.jsonl"])
def test_one_iteration_on_human_prompts_ends_with_a_model_that_vllm_loads(world, tmp_path, prompts):  # noqa: F811
    if not os.path.exists(SHARED / prompts):
        pytest.skip(f"{SHARED / prompts} is not there")
    done = subprocess.run(["bash", "iterate.sh", "config/tiny.py", f"--prompts={SHARED / prompts}", "--n_prompts=16", "--iterations=1", "--n_eval=16",
                           "--engine=vllm", f"--out={tmp_path}/run"], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    candidates = {r["id"]: r for _, r in data.read(f"{tmp_path}/run/iter_1/candidates.jsonl")}
    _, ends = data.load_tokenizer(str(ROOT / "tiny/world/base"))
    responses = [r for row in candidates.values() for r in row["responses"]]
    assert len(candidates) == 16 and len(responses) == 80 and len({tuple(r["ids"]) for r in responses}) > 40
    assert all(sum(i in ends for i in r["ids"]) == r["finished"] for r in responses)
    tokenizer, ends = data.load_tokenizer(str(ROOT / "tiny/world/base"))
    assert all(row["prompt_ids"] == data.render(tokenizer, row["prompt"], "here") for row in candidates.values())
    scores = json.load(open(f"{tmp_path}/run/iter_1/eval.json"))         # answers of the trained policy, by vLLM
    assert scores["n"] == 16 and scores["length"] > 1
