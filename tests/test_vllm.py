"""The real engine: vLLM, on a GPU or its CPU build (`make vllm`), through the whole loop."""

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
import torch
from conftest import ROOT, build_model, run, warm_environment
from safetensors.torch import load_file, save_file
from test_generate import kill_midway, read_counts, read_rows, write_rows
from test_instruct import INSTRUCT, pool, writer  # noqa: F401 (a fixture)
from test_judge import talker  # noqa: F401 (a fixture)
from test_loop import world  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

from nanoaipo import chat
from nanoaipo.prompts import read_prompts

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vllm is not installed: `make vllm` adds its CPU build",
)
SHARED = ROOT.parent / "shared" / "data"
ENGINES = ("vllm", "transformers")


# ----------------------------------------------------------------------- beside the other engine


def test_greedy_output_equals_that_of_transformers_token_by_token(world, tmp_path):
    for engine in ENGINES:
        done = run(
            "generate.py",
            "config/tiny.py",
            f"--out={tmp_path}/{engine}.jsonl",
            "--n_prompts=32",
            "--n_responses=1",
            "--temperature=0",
            f"--engine={engine}",
        )
        assert done.returncode == 0, done.stderr[-2000:]

    vllm_rows = read_rows(tmp_path / "vllm.jsonl")
    transformers_rows = read_rows(tmp_path / "transformers.jsonl")
    for ours, theirs in zip(vllm_rows, transformers_rows):
        (response,) = ours["responses"]
        (expected,) = theirs["responses"]
        assert ours["prompt_ids"] == theirs["prompt_ids"]
        assert response["ids"] == expected["ids"]
        assert response["finished"] == expected["finished"]
        assert abs(response["logp"] - expected["logp"]) < 1e-3


def greedy(model, engine, out, **how):
    """generate.py's one greedy response of eight tokens, by this engine."""
    write_rows(out.with_name("p.jsonl"), [{"prompt": "Two?"}])
    settings = {"model": model, "engine": engine, "dtype": "float32", "max_new_tokens": 8}
    settings |= {"prompts": out.with_name("p.jsonl"), "n_responses": 1, "temperature": 0}
    return run("generate.py", out=out, **settings, **how)


def test_it_samples_from_the_files_that_training_reads(tmp_path):
    heads = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    folder = build_model(tmp_path / "model", "Mistral", **heads)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    lm.save_pretrained(folder, max_shard_size="50KB")

    # Mistral's own layout of other weights, which vLLM would take before the shards
    save_file({"norm.weight": torch.zeros(64)}, folder / "consolidated.safetensors")

    logps = []
    for engine in ENGINES:
        done = greedy(folder, engine, tmp_path / f"{engine}.jsonl")
        assert done.returncode == 0, done.stderr[-2000:]
        (row,) = read_rows(tmp_path / f"{engine}.jsonl")
        logps.append(row["responses"][0]["logp"])
    assert logps[0] == pytest.approx(logps[1], abs=1e-3)


def test_a_pickle_of_a_hub_model_is_not_read(tmp_path):
    cache = tmp_path / "hub" / "models--me--pickled"
    folder = build_model(cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    how = {"python": ["-u"], "env": {"HF_HOME": str(tmp_path)}}  # which is read at the start
    done = greedy("me/pickled", "vllm", tmp_path / "c.jsonl", **how)

    assert done.returncode == 1
    assert "me/pickled: no *.safetensors in it; other formats can run code and are" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_that_vllm_refuses_end_with_one_line(tmp_path):
    folder = build_model(tmp_path / "model")
    write_rows(tmp_path / "p.jsonl", [{"prompt": "Two?"}])
    settings = {"model": folder, "prompts": tmp_path / "p.jsonl", "out": tmp_path / "c.jsonl"}
    settings |= {"engine": "vllm", "dtype": "float32", "max_new_tokens": 8}

    done = run("generate.py", temperature=0, n_responses=2, **settings)

    assert done.returncode == 1
    assert "--engine=vllm: n must be 1 when using greedy sampling, got 2." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "c.jsonl").exists()


def test_greedy_answers_of_two_turns_equal_those_of_transformers(world, tmp_path):
    questions = []
    for k in range(6):
        turns = [f"What is {k} plus 2?", "And 3 more?"]
        questions.append({"question_id": k, "category": "math", "turns": turns})
    write_rows(tmp_path / "q.jsonl", questions)

    for engine in ENGINES:
        done = run(
            "generate.py",
            "config/tiny.py",
            "--task=answers",
            f"--prompts={tmp_path}/q.jsonl",
            f"--out={tmp_path}/{engine}-a.jsonl",
            "--max_new_tokens=24",
            "--block=4",
            f"--engine={engine}",
            "--answer_name=me",
        )
        assert done.returncode == 0, done.stderr[-2000:]

    vllm_file = tmp_path / "vllm-a.model_answer.jsonl"
    transformers_file = tmp_path / "transformers-a.model_answer.jsonl"
    assert vllm_file.read_bytes() == transformers_file.read_bytes()


def test_the_log_probs_it_samples_with_are_those_of_the_trainer_and_of_no_later_policy(
    world, tmp_path
):
    base = "tiny/world/base"
    sampled = tmp_path / "candidates.jsonl"
    pairs = tmp_path / "pairs.jsonl"
    first = tmp_path / "first"
    recipe = "config/tiny.py"

    # what is compared is the distribution before temperature, top_k and top_p
    sampling = ("--temperature=1.5", "--top_k=50", "--top_p=0.95", "--n_prompts=64")
    done = run("generate.py", recipe, *sampling, f"--out={sampled}", "--engine=vllm")
    assert done.returncode == 0, done.stderr[-2000:]
    assert run("rank.py", recipe, candidates=sampled, out=pairs).returncode == 0
    done = run("train.py", recipe, model=base, pairs=pairs, out=first, batch_size=8, lr=2e-3)
    assert done.returncode == 0, done.stderr[-2000:]
    for record in read_rows(first / "metrics.jsonl"):
        assert record["sampler_max_diff"] < 1e-4

    # the next iteration, were it to train on these pairs again
    done = run("train.py", recipe, model=first, pairs=pairs, out=tmp_path / "second")
    assert done.returncode == 1
    assert f"--model={first}" in done.stderr
    assert "--sampler_tolerance=0.05" in done.stderr


# --------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    "prompts, without",
    [
        ("eval/alpaca_eval/instructions.json", ()),
        ("prompts/seed_tasks.jsonl", ("--eval_prompts=",)),
    ],
)
def test_one_iteration_on_human_prompts_ends_with_a_model_that_vllm_loads(
    world, tmp_path, prompts, without
):
    if not os.path.exists(SHARED / prompts):
        pytest.skip(f"{SHARED / prompts} is not there")

    done = subprocess.run(
        [
            "bash",
            "iterate.sh",
            "config/tiny.py",
            f"--prompts={SHARED / prompts}",
            "--n_prompts=16",
            "--iterations=1",
            "--n_eval=16",
            "--engine=vllm",
            f"--out={tmp_path}/run",
            *without,
        ],
        cwd=ROOT,
        env=warm_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    iteration_dir = tmp_path / "run" / "iter_1"
    candidates = {row["id"]: row for row in read_rows(iteration_dir / "candidates.jsonl")}
    responses = []
    for row in candidates.values():
        responses += row["responses"]
    assert len(candidates) == 16
    assert len(responses) == 80
    assert len({tuple(response["ids"]) for response in responses}) > 40

    # an end token if and only if the response is finished
    tokenizer, eos_ids = chat.load_tokenizer(str(ROOT / "tiny/world/base"))
    for response in responses:
        n_eos = sum(token in eos_ids for token in response["ids"])
        assert n_eos == response["finished"]
    for row in candidates.values():
        assert row["prompt_ids"] == chat.render(tokenizer, row["prompt"], "here")

    # answers of the trained policy, by vLLM
    if not without:
        scores = json.loads((iteration_dir / "eval.json").read_text())
        assert scores["n"] == 16
        assert scores["length"] > 1


# --------------------------------------------------------------------------------- vLLM as a server


def serve(model, port, log):
    """A vLLM server on loopback, ready to answer."""
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={model}",
        "--served-model-name=talker",
        f"--port={port}",
        "--host=127.0.0.1",
        "--dtype=float32",
        "--enforce-eager",
        "--max-model-len=4096",
    ]
    server = subprocess.Popen(
        command,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    for _ in range(240):
        time.sleep(0.5)
        if server.poll() is not None:
            with open(log.name) as f:
                raise AssertionError(f.read()[-2000:])
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return server
        except OSError:
            pass
    raise AssertionError("the server did not start")


def free_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_vllm_server_killed_midway_and_started_again_judges_all_and_is_asked_nothing_twice(
    talker, tmp_path
):
    rows = []
    for k in range(60):
        responses = ["a" * n for n in range(1, 5)]
        rows.append({"id": f"p{k}", "prompt": f"prompt {k}", "responses": responses})
    write_rows(tmp_path / "c.jsonl", rows)
    port = free_port()
    command = [
        "rank.py",
        "--ranker=judge",
        "--ranker_model=talker",
        f"--judge_url=http://127.0.0.1:{port}/v1",
        f"--candidates={tmp_path}/c.jsonl",
        f"--out={tmp_path}/p.jsonl",
    ]
    replies = tmp_path / "p.replies"

    with open(tmp_path / "server.log", "w") as log:
        server = serve(talker, port, log)
        try:
            ranking = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            while not replies.exists() or replies.read_bytes().count(b"\n") < 100:
                time.sleep(0.02)
                assert ranking.poll() is None, ranking.communicate()[0][-2000:]
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            before = replies.read_bytes()
            server = serve(talker, port, log)
            output, _ = ranking.communicate(timeout=200)
        finally:
            os.killpg(server.pid, signal.SIGKILL)

    # killed midway, and what had come stayed
    assert ranking.returncode == 0, output[-2000:]
    assert before.count(b"\n") < 720
    assert replies.read_bytes().startswith(before)

    # four responses and three votes for each prompt, each asked for once
    rows = read_rows(replies)
    assert len(rows) == 60 * 4 * 3
    assert len({row["key"] for row in rows}) == 60 * 4 * 3
    assert sum(row["reply"].startswith("Score: ") for row in rows) > 650
    assert len(read_rows(tmp_path / "p.jsonl")) > 50

    done = run(*command)
    assert done.returncode == 0
    assert "nothing to do" in done.stdout


# ------------------------------------------------------------------------- instructions, and kills


def test_vllm_writes_new_instructions(writer, tmp_path):
    pool_texts = pool(tmp_path / "pool.jsonl")
    settings = [argument for argument in INSTRUCT if "engine" not in argument]

    done = run(
        "generate.py",
        *settings,
        "--engine=vllm",
        f"--model={writer}",
        f"--prompts={tmp_path}/pool.jsonl",
        "--n_prompts=30",
        f"--out={tmp_path}/new.jsonl",
    )

    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_prompts(f"{tmp_path}/new.jsonl")
    texts = {row["prompt"][0]["content"] for row in rows}
    assert len(texts) == 30
    assert not texts & set(pool_texts)
    counts = read_counts(tmp_path, "new")
    assert counts["calls"] < 512
    assert counts["unfinished"] < counts["calls"] / 4


def test_vllm_goes_on_after_a_kill_to_the_same_bytes(world, tmp_path):
    command = (
        "generate.py",
        "config/tiny.py",
        "--engine=vllm",
        "--n_prompts=64",
        "--n_responses=2",
        "--block=8",
        "--iteration=1",
    )
    whole = tmp_path / "whole.jsonl"
    cut = tmp_path / "cut.jsonl"
    part = tmp_path / "cut.jsonl.tmp"

    assert run(*command, f"--out={whole}").returncode == 0
    kill_midway((*command, f"--out={cut}"), part, 16)
    assert part.exists()

    done = run(*command, f"--out={cut}")
    assert done.returncode == 0
    assert "goes on behind" in done.stdout
    assert cut.read_bytes() == whole.read_bytes()
