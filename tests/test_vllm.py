"""The real engine: vLLM, on a GPU or its CPU build (`make vllm`), through the whole loop on prompts people wrote."""
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from nanoaipo import chat
from nanoaipo import files
from nanoaipo import prompts
from conftest import ROOT, run
from test_generate import INSTRUCT, pool, writer  # noqa: F401  (a fixture)
from test_judge import talker  # noqa: F401  (a fixture)
from test_loop import ENV, world  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: `make vllm` adds its CPU build")
SHARED = ROOT.parent / "shared" / "data"


def test_greedy_output_equals_that_of_transformers_token_by_token(world, tmp_path):  # noqa: F811
    rows = {}
    for engine in ("vllm", "transformers"):
        done = run("generate.py", "config/tiny.py", f"--out={tmp_path}/{engine}.jsonl", "--n_prompts=32", "--n_responses=1", "--temperature=0", f"--engine={engine}")
        assert done.returncode == 0, done.stderr[-2000:]
        rows[engine] = [r for _, r in files.read_records(f"{tmp_path}/{engine}.jsonl")]
    for a, b in zip(rows["vllm"], rows["transformers"]):
        (x,), (y,) = a["responses"], b["responses"]
        assert a["prompt_ids"] == b["prompt_ids"] and x["ids"] == y["ids"] and x["finished"] == y["finished"] and abs(x["logp"] - y["logp"]) < 1e-3
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question_id": k, "category": "math", "turns": [f"What is {k} plus 2?", "And 3 more?"]}) + "\n" for k in range(6)))
    for engine in rows:
        done = run("generate.py", "config/tiny.py", "--task=answers", f"--prompts={tmp_path}/q.jsonl", f"--out={tmp_path}/{engine}-a.jsonl", "--max_new_tokens=24", "--block=4",
                   f"--engine={engine}", "--answer_name=me")
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "vllm-a.model_answer.jsonl").read_bytes() == (tmp_path / "transformers-a.model_answer.jsonl").read_bytes()


@pytest.mark.parametrize("prompts, without", [("eval/alpaca_eval/instructions.json", ()), ("prompts/seed_tasks.jsonl", ("--eval_prompts=",))])
def test_one_iteration_on_human_prompts_ends_with_a_model_that_vllm_loads(world, tmp_path, prompts, without):  # noqa: F811
    if not os.path.exists(SHARED / prompts):
        pytest.skip(f"{SHARED / prompts} is not there")
    done = subprocess.run(["bash", "iterate.sh", "config/tiny.py", f"--prompts={SHARED / prompts}", "--n_prompts=16", "--iterations=1", "--n_eval=16",
                           "--engine=vllm", f"--out={tmp_path}/run", *without], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    candidates = {r["id"]: r for _, r in files.read_records(f"{tmp_path}/run/iter_1/candidates.jsonl")}
    _, ends = chat.load_tokenizer(str(ROOT / "tiny/world/base"))
    responses = [r for row in candidates.values() for r in row["responses"]]
    assert len(candidates) == 16 and len(responses) == 80 and len({tuple(r["ids"]) for r in responses}) > 40
    assert all(sum(i in ends for i in r["ids"]) == r["finished"] for r in responses)
    tokenizer, ends = chat.load_tokenizer(str(ROOT / "tiny/world/base"))
    assert all(row["prompt_ids"] == chat.render(tokenizer, row["prompt"], "here") for row in candidates.values())
    if not without:
        scores = json.load(open(f"{tmp_path}/run/iter_1/eval.json"))     # answers of the trained policy, by vLLM
        assert scores["n"] == 16 and scores["length"] > 1


def serve(model, port, log):
    """A vLLM server on loopback, ready to answer."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "talker", "--port", str(port), "--host", "127.0.0.1",
               "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"]
    server = subprocess.Popen(command, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}, stdout=log, stderr=log, start_new_session=True)
    for _ in range(240):
        time.sleep(0.5)
        assert server.poll() is None, open(log.name).read()[-2000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return server
        except OSError:
            pass
    raise AssertionError("the server did not start")


def test_a_vllm_server_killed_midway_and_started_again_judges_all_and_is_asked_nothing_twice(talker, tmp_path):  # noqa: F811
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"id": f"p{k}", "prompt": f"prompt {k}", "responses": ["a" * n for n in range(1, 5)]}) + "\n" for k in range(60)))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    asked = ["rank.py", "--ranker=judge", "--ranker_model=talker", f"--judge_url=http://127.0.0.1:{port}/v1", f"--candidates={tmp_path}/c.jsonl", f"--out={tmp_path}/p.jsonl"]
    replies = tmp_path / "p.replies"
    with open(tmp_path / "server.log", "w") as log:
        server = serve(talker, port, log)
        try:
            process = subprocess.Popen([sys.executable, *asked], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            while not replies.exists() or replies.read_bytes().count(b"\n") < 100:
                time.sleep(0.02)
                assert process.poll() is None, process.communicate()[0][-2000:]
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            before = replies.read_bytes()
            server = serve(talker, port, log)
            text, _ = process.communicate(timeout=200)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    assert process.returncode == 0, text[-2000:]
    rows = [r for _, r in files.read_records(str(replies))]
    assert before.count(b"\n") < 720 and replies.read_bytes().startswith(before)      # killed midway, and what had come stayed
    assert len(rows) == len({r["key"] for r in rows}) == 60 * 4 * 3
    assert sum(r["reply"].startswith("Score: ") for r in rows) > 650 and len(list(files.read_records(f"{tmp_path}/p.jsonl"))) > 50
    done = run(*asked)
    assert done.returncode == 0 and "nothing to do" in done.stdout


def test_vllm_writes_new_instructions_and_goes_on_after_a_kill(writer, world, tmp_path):  # noqa: F811
    texts = pool(tmp_path / "pool.jsonl")
    done = run("generate.py", *(a for a in INSTRUCT if "engine" not in a), "--engine=vllm", f"--model={writer}", f"--prompts={tmp_path}/pool.jsonl", "--n_prompts=30",
               f"--out={tmp_path}/new.jsonl")
    assert done.returncode == 0, done.stderr[-2000:]
    made = [r["prompt"][0]["content"] for r in prompts.read_prompts(f"{tmp_path}/new.jsonl")]
    counts = json.load(open(tmp_path / "new.manifest.json"))["counts"]
    assert len(set(made)) == 30 and not set(made) & set(texts) and counts["calls"] < 512 and counts["unfinished"] < counts["calls"] / 4
    asked = ("generate.py", "config/tiny.py", "--engine=vllm", "--n_prompts=64", "--n_responses=2", "--block=8", "--iteration=1")
    assert run(*asked, f"--out={tmp_path}/whole.jsonl").returncode == 0
    process = subprocess.Popen([sys.executable, *asked, f"--out={tmp_path}/cut.jsonl"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    part = tmp_path / "cut.jsonl.tmp"
    while not part.exists() or part.read_bytes().count(b"\n") < 16:
        time.sleep(0.005)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert part.exists()
    done = run(*asked, f"--out={tmp_path}/cut.jsonl")
    assert done.returncode == 0 and "goes on behind" in done.stdout and (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
