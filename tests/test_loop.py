"""The scripts one after another, as iterate.sh runs them, on the embedded world (built here if it is not there yet)."""
import glob
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanoaipo import chat
from nanoaipo import files
from nanoaipo.pairs import read_pairs
from conftest import ROOT, run, torchrun

SMALL = ("--n_prompts=32", "--n_responses=3", "--iterations=2", "--n_eval=16", "--max_new_tokens=24", "--batch_size=8")
ENV = os.environ | {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"], "VIRTUAL_ENV": sys.prefix}


@pytest.fixture(scope="session")
def world():
    subprocess.run([sys.executable, "tiny/prepare.py"], cwd=ROOT, check=True)
    return ROOT / "tiny" / "world"


def iterate(out, *arguments, **kwargs):
    return subprocess.run(["bash", "iterate.sh", "config/tiny.py", f"--out={out}", *SMALL, *arguments], cwd=ROOT, env=ENV,
                          capture_output=True, text=True, **kwargs)


def hashes(out):
    """Every artefact of a run but logs of speed: manifests carry the same things, metrics carry times."""
    files = [f for f in glob.glob(f"{out}/iter_*/**", recursive=True) if f.endswith((".jsonl", ".safetensors", "eval.json")) and "metrics" not in f]
    return {os.path.relpath(f, out): hashlib.sha256(open(f, "rb").read()).hexdigest() for f in sorted(files)}


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """A run of two iterations."""
    out = tmp_path_factory.mktemp("loop") / "run"
    done = iterate(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_two_iterations_leave_the_documented_files(finished):
    for t in (0, 1, 2):
        names = {"answers.jsonl", "eval.json"} | ({"candidates.jsonl", "pairs.jsonl", "model"} if t else set())
        assert names <= set(os.listdir(finished / f"iter_{t}"))
    assert len(hashes(finished)) == 2 * 5 + 2 and not glob.glob(f"{finished}/**/*.tmp", recursive=True)
    scores = json.load(open(finished / "iter_0" / "eval.json"))
    assert scores["win_rate"] == 50 and scores["ties"] == scores["n"] == 16 and 0 <= scores["accuracy"] <= 100
    first, second = ({r["id"] for _, r in files.read_records(f"{finished}/iter_{t}/candidates.jsonl")} for t in (1, 2))
    assert len(first) == len(second) == 32 and not first & second


def test_a_column_of_the_prompts_is_not_asked_of_the_held_out_ones(world, tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"question": f"What is {k} plus 2?"}) + "\n" for k in range(8)))
    done = iterate(tmp_path / "run", f"--prompts={tmp_path}/mine.jsonl", "--prompt_field=question", "--n_prompts=8", "--iterations=1", "--n_responses=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.load(open(tmp_path / "run" / "iter_1" / "eval.json"))["n"] == 16


def test_a_preflight_told_the_length_of_responses_foretells_the_run(finished):
    """Tokens, disk and memory of training to a quarter; how long stages take hangs on who else uses these cores."""
    counts = [json.load(open(f"{finished}/iter_{t}/candidates.manifest.json"))["counts"] for t in (1, 2)]
    steps = [json.loads(line) for t in (1, 2) for line in open(f"{finished}/iter_{t}/model/metrics.jsonl")]
    length = sum(c["tokens"] for c in counts) / sum(c["responses"] for c in counts)
    done = iterate(finished, "--preflight", f"--response_tokens={length}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert 2 * int(rows["train"][2].replace(",", "")) == pytest.approx(sum(s["tokens"] for s in steps), rel=0.25)
    assert 0.6 < steps[-1]["memory_gib"] / float(rows["train"][3]) < 1.25         # a system may take back the libraries' pages, which are files
    assert float(rows["disk:"][1]) * 2**30 == pytest.approx(sum(os.path.getsize(f) for f in glob.glob(f"{finished}/iter_*/**", recursive=True)), rel=0.25)


def test_running_again_does_nothing_and_says_so(finished):
    before = {f: os.stat(f).st_mtime_ns for f in glob.glob(f"{finished}/iter_*/**", recursive=True)}
    done = iterate(finished)
    assert done.returncode == 0 and done.stdout.count("complete, nothing to do") == 3 * 2 + 2 * 3 and "is complete: 2 iterations" in done.stdout
    assert before == {f: os.stat(f).st_mtime_ns for f in glob.glob(f"{finished}/iter_*/**", recursive=True)}


def test_a_run_refuses_other_settings(finished):
    done = iterate(finished, "--beta=0.1")
    assert done.returncode == 1 and "was started with beta=0.5, not 0.1" in done.stderr


def test_killed_in_every_stage_and_run_again_the_artefacts_are_the_same(finished, tmp_path):
    out, seen = tmp_path / "run", []
    for marker in ("iteration 1: generate", "iteration 1: rank", "iteration 1: train", "iteration 2: train"):
        process = subprocess.Popen(["bash", "iterate.sh", "config/tiny.py", f"--out={out}", *SMALL], cwd=ROOT, env=ENV, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        for line in process.stdout:
            if marker in line:
                time.sleep(2.5)                                         # well inside the stage
                break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seen.append(sorted(hashes(out)))
    assert len(seen[0]) < len(seen[-1]) < len(hashes(finished))         # it did get killed, later each time
    done = iterate(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hashes(out) == hashes(finished)


def test_what_is_sampled_is_what_is_trained(finished):
    """Prompt ids, response ids and end tokens from candidates to pairs; the logged log-prob is the policy's."""
    from transformers import AutoModelForCausalLM
    tokenizer, ends = chat.load_tokenizer(str(ROOT / "tiny/world/base"))
    candidates = {r["id"]: r for _, r in files.read_records(f"{finished}/iter_1/candidates.jsonl")}
    pairs, counts = read_pairs(f"{finished}/iter_1/pairs.jsonl", tokenizer, ends, 4096)
    assert counts["pairs"] == len(pairs) > 20
    for pair in pairs:
        source = candidates[pair["id"]]
        assert pair["prompt_ids"].tolist() == source["prompt_ids"] == chat.render(tokenizer, source["prompt"], "here")
        sampled = [r["ids"] for r in source["responses"]]
        assert pair["chosen_ids"].tolist() in sampled and pair["rejected_ids"].tolist() in sampled
    responses = [r for row in candidates.values() for r in row["responses"]]
    assert {r["finished"] for r in responses} == {True, False}          # 24 tokens cut some
    for r in responses:
        assert sum(i in ends for i in r["ids"]) == r["finished"] and (r["ids"][-1] in ends) == r["finished"]
        assert r["finished"] or len(r["ids"]) == 24
        assert r["text"] == tokenizer.decode(r["ids"], skip_special_tokens=True)
    policy = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/world/base")
    for row in list(candidates.values())[:8]:
        for r in row["responses"]:
            ids = torch.tensor([row["prompt_ids"] + r["ids"]])
            logp = policy(ids).logits.log_softmax(-1)[0, len(row["prompt_ids"]) - 1:-1].gather(1, torch.tensor(r["ids"])[:, None]).sum()
            assert abs(logp.item() - r["logp"]) < 1e-3


def test_two_processes_write_two_shards_with_every_prompt_once(world, finished, tmp_path):
    out = tmp_path / "candidates.jsonl"
    done = torchrun(2, "generate.py", "config/tiny.py", f"--out={out}", "--n_prompts=15", "--n_responses=2", "--iteration=1", "--max_new_tokens=24")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == [f"candidates-0000{k}-of-00002{suffix}" for k in (0, 1) for suffix in (".jsonl", ".manifest.json")]
    rows = [r for _, r in files.read_records(str(out))]
    assert len({r["id"] for r in rows}) == len(rows) == 15
    assert torchrun(2, "rank.py", "config/tiny.py", f"--candidates={out}", f"--out={tmp_path}/pairs.jsonl").returncode == 0
    done = run("train.py", "config/tiny.py", f"--pairs={tmp_path}/pairs.jsonl", f"--out={tmp_path}/model")
    assert done.returncode == 0 and os.path.exists(tmp_path / "model" / "model.safetensors")


def test_a_process_without_a_prompt_writes_an_empty_shard(world, tmp_path):
    out = tmp_path / "candidates.jsonl"
    done = torchrun(2, "generate.py", "config/tiny.py", f"--out={out}", "--n_prompts=1", "--n_responses=2", "--max_new_tokens=8")
    assert done.returncode == 0, done.stderr
    assert len(list(files.read_records(str(out)))) == 1 and (tmp_path / "candidates-00001-of-00002.jsonl").read_text() == ""


def test_greedy_answers_do_not_depend_on_the_batch(world, tmp_path):
    texts = []
    for rows in (3, 64):
        out = tmp_path / f"{rows}.jsonl"
        assert run("generate.py", "config/tiny.py", f"--out={out}", "--n_prompts=24", "--n_responses=1", "--temperature=0", f"--generate_rows={rows}").returncode == 0
        texts.append([r["responses"][0]["ids"] for _, r in files.read_records(str(out))])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("content, arguments, message", [
    ("", (), "no prompts in it"), ('{"prompt": "a"}\n{"prompt": \n', (), "p.jsonl:2: not JSON"), ('{"text": "a"}', (), "p.jsonl:1: 'prompt' has to be"),
    ('{"prompt": "a <|end|>"}', (), "1 with control text"), ('{"prompt": "a b c d e f g h"}', ("--max_prompt_tokens=5",), "1 above max_prompt_tokens"),
    ('{"prompt": "a"}', ("--model=nowhere",), "--model=nowhere: no model folder"), ('{"prompt": "a"}', ("--engine=vlm",), "--engine=vlm: there are vllm"),
    ('{"prompt": "a"}', ("--tempreature=1",), "did you mean 'temperature'")])
def test_what_a_user_can_get_wrong_ends_with_one_line_and_no_file(world, tmp_path, content, arguments, message):
    (tmp_path / "p.jsonl").write_text(content)
    done = run("generate.py", "config/tiny.py", f"--prompts={tmp_path}/p.jsonl", f"--out={tmp_path}/c.jsonl", "--n_prompts=0", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_evaluation_joins_by_id_and_counts_what_it_says(world, tmp_path):
    def answers(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps({"id": k, "prompt": [{"role": "user", "content": q}], "answer": a, "responses": [
            {"text": text, "ids": [5] * len(text.split()), "finished": done, "logp": 0}]}) + "\n" for k, q, a, text, done in rows))
        return f"{tmp_path}/{name}"

    rule = {"accept": ["cold"], "among": r"\b(?:cold|wet)\b"}
    q = "What is the opposite of hot?"
    ours = answers("a.jsonl", ("x", q, rule, "The opposite of hot is cold.", True), ("y", q, rule, "wet.", True), ("z", q, rule, "cold.", False), ("w", q, rule, "wet.", True))
    theirs = answers("b.jsonl", ("w", q, rule, "cold.", True), ("z", q, rule, "cold.", True), ("y", q, rule, "cold.", True), ("x", q, rule, "The opposite of hot is wet.", True))
    done = run("eval.py", "config/tiny.py", f"--answers={ours}", f"--baseline={theirs}", f"--out={tmp_path}/e.json")
    assert done.returncode == 0, done.stderr
    scores = json.load(open(tmp_path / "e.json"))
    assert scores["win_rate"] == 37.5 and scores["ties"] == 1 and scores["accuracy"] == 50 and scores["finished"] == 75 and scores["n"] == 4
    assert "LENGTH ALARM" not in done.stdout
    longer = answers("d.jsonl", ("x", q, rule, "The opposite of hot is cold. Thank you for your question.", True))
    assert "LENGTH ALARM: answers are 1.8 times as long" in run("eval.py", "config/tiny.py", f"--answers={longer}", f"--baseline={theirs}", f"--out={tmp_path}/g.json").stdout
    short = answers("c.jsonl", ("x", q, rule, "cold.", True))
    done = run("eval.py", "config/tiny.py", f"--answers={ours}", f"--baseline={short}", f"--out={tmp_path}/f.json")
    assert done.returncode == 1 and "no answer to 3 of the prompts" in done.stderr and not os.path.exists(tmp_path / "f.json")


def test_the_plot_shows_what_the_files_say(finished):
    done = run("-m", "nanoaipo.report", finished)
    assert done.returncode == 0, done.stderr
    scores = json.load(open(finished / "iter_2" / "eval.json"))
    assert f"{scores['win_rate']:.1f}%" in done.stdout and f"{scores['length']:.1f}" in done.stdout and "pairrm tiny/world/judge" in done.stdout
    for figure in ("iterations.png", "length.png"):
        assert open(finished.parent / figure, "rb").read(4) == b"\x89PNG"
    assert run("-m", "nanoaipo.report", "/nowhere").stderr.strip().endswith("has iterate.sh evaluated an iteration?")
