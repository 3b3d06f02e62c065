"""The scripts one after another, as iterate.sh runs them, on the embedded world.

The world is built here if it is not there yet.
"""

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
from conftest import ROOT, run, torchrun, warm_environment

from nanoaipo import chat, files
from nanoaipo.pairs import read_pairs

SMALL = (
    "--n_prompts=32",
    "--n_responses=3",
    "--iterations=2",
    "--n_eval=16",
    "--max_new_tokens=24",
    "--batch_size=8",
)
ENV = os.environ | {
    "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
    "VIRTUAL_ENV": sys.prefix,
}


@pytest.fixture(scope="session")
def world():
    """Folder of the embedded world: a base model, a judge, prompts."""
    subprocess.run([sys.executable, "tiny/prepare.py"], cwd=ROOT, check=True)
    return ROOT / "tiny" / "world"


def command(out, *arguments):
    """The command of a small run."""
    return ["bash", "iterate.sh", "config/tiny.py", f"--out={out}", *SMALL, *arguments]


def iterate(out, *arguments, **kwargs):
    """Run iterate.sh, small; a CompletedProcess with text."""
    return subprocess.run(
        command(out, *arguments),
        cwd=ROOT,
        env=warm_environment(),
        capture_output=True,
        text=True,
        **kwargs,
    )


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """Folder of a run of two iterations."""
    out = tmp_path_factory.mktemp("loop") / "run"
    done = iterate(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def everything(out):
    """Paths of all that the iterations of a run have written."""
    return glob.glob(f"{out}/iter_*/**", recursive=True)


def hashes(out):
    """Hash of every artefact of a run, but of logs of speed.

    Manifests carry the same things, metrics carry times.
    """
    found = {}
    for path in sorted(everything(out)):
        if not path.endswith((".jsonl", ".safetensors", "eval.json")) or "metrics" in path:
            continue
        with open(path, "rb") as f:
            found[os.path.relpath(path, out)] = hashlib.sha256(f.read()).hexdigest()
    return found


def read_json(*path):
    """The value in a JSON file."""
    with open(os.path.join(*path), encoding="utf-8") as f:
        return json.load(f)


def records(path):
    """The records of a file."""
    return [record for _, record in files.read_records(str(path))]


# -------------------------------------------------------------------------------------- whole runs


def test_two_iterations_leave_the_documented_files(finished):
    always = {"answers.jsonl", "eval.json"}
    trained = {"candidates.jsonl", "pairs.jsonl", "model"}

    assert always <= set(os.listdir(finished / "iter_0"))
    assert always | trained <= set(os.listdir(finished / "iter_1"))
    assert always | trained <= set(os.listdir(finished / "iter_2"))
    assert len(hashes(finished)) == 2 * 5 + 2
    assert not glob.glob(f"{finished}/**/*.tmp", recursive=True)

    # iteration 0 is compared with itself
    scores = read_json(finished, "iter_0", "eval.json")
    assert scores["win_rate"] == 50
    assert scores["ties"] == scores["n"] == 16
    assert 0 <= scores["accuracy"] <= 100

    # every iteration asks prompts of its own
    first = {row["id"] for row in records(finished / "iter_1" / "candidates.jsonl")}
    second = {row["id"] for row in records(finished / "iter_2" / "candidates.jsonl")}
    assert len(first) == len(second) == 32
    assert not first & second


def test_a_column_of_the_prompts_is_not_asked_of_the_held_out_ones(world, tmp_path):
    lines = [json.dumps({"question": f"What is {k} plus 2?"}) + "\n" for k in range(8)]
    (tmp_path / "mine.jsonl").write_text("".join(lines))

    done = iterate(
        tmp_path / "run",
        f"--prompts={tmp_path}/mine.jsonl",
        "--prompt_field=question",
        "--n_prompts=8",
        "--iterations=1",
        "--n_responses=4",
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(tmp_path, "run", "iter_1", "eval.json")["n"] == 16


def test_a_preflight_told_the_length_of_responses_foretells_the_run(finished):
    """Tokens and disk to a quarter, memory of training about; hours hang on who else computes."""
    tokens = 0
    responses = 0
    steps = []
    for t in (1, 2):
        counts = read_json(finished, f"iter_{t}", "candidates.manifest.json")["counts"]
        tokens += counts["tokens"]
        responses += counts["responses"]
        steps += records(finished / f"iter_{t}" / "model" / "metrics.jsonl")
    size = sum(os.path.getsize(path) for path in everything(finished))

    done = iterate(finished, "--preflight", f"--response_tokens={tokens / responses}")

    assert done.returncode == 0, done.stdout + done.stderr
    rows = {}
    for line in done.stdout.splitlines():
        if line:
            words = line.split()
            rows[words[0]] = words

    tokens_per_iteration = int(rows["train"][2].replace(",", ""))
    assert 2 * tokens_per_iteration == pytest.approx(sum(s["tokens"] for s in steps), rel=0.25)

    # a system may take back the libraries' pages, which are files
    memory_gib = float(rows["train"][3])
    assert 0.6 < steps[-1]["memory_gib"] / memory_gib < 1.25

    disk_gib = float(rows["disk:"][1])
    assert disk_gib * 2**30 == pytest.approx(size, rel=0.25)


def test_running_again_does_nothing_and_says_so(finished):
    def times():
        return {path: os.stat(path).st_mtime_ns for path in everything(finished)}

    before = times()
    done = iterate(finished)

    assert done.returncode == 0
    n_stages = 3 * 2 + 2 * 3  # generate, rank, train twice; generate and eval three times
    assert done.stdout.count("complete, nothing to do") == n_stages
    assert "is complete: 2 iterations" in done.stdout
    assert before == times()


def test_a_run_refuses_other_settings(finished):
    done = iterate(finished, "--beta=0.1")

    assert done.returncode == 1
    assert "was started with beta=0.5, not 0.1" in done.stderr


def kill_within(out, marker):
    """Start a run and kill it well inside the stage that this line of its output announces."""
    process = subprocess.Popen(
        command(out),
        cwd=ROOT,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for line in process.stdout:
        if marker in line:
            time.sleep(2.5)
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_in_every_stage_and_run_again_the_artefacts_are_the_same(finished, tmp_path):
    out = tmp_path / "run"
    n_artefacts = []
    for marker in (
        "iteration 1: generate",
        "iteration 1: rank",
        "iteration 1: train",
        "iteration 2: train",
    ):
        kill_within(out, marker)
        n_artefacts.append(len(hashes(out)))

    # it did get killed, later each time
    assert n_artefacts[0] < n_artefacts[-1] < len(hashes(finished))
    done = iterate(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hashes(out) == hashes(finished)


def test_every_stage_says_where_its_time_went_and_one_command_adds_it_up(finished):
    parts = {"starting", "loading", "computing", "writing"}
    trained = 0  # seconds of CPUs
    for t in (1, 2):
        for name in ("candidates", "pairs", "answers", "eval"):
            manifest = read_json(finished, f"iter_{t}", f"{name}.manifest.json")
            assert set(manifest["seconds"]) == set(manifest["cpu_seconds"]) == parts
        manifest = read_json(finished, f"iter_{t}", "model", "manifest.json")
        assert set(manifest["seconds"]) == set(manifest["cpu_seconds"]) == parts
        trained += sum(manifest["cpu_seconds"].values())

    done = run("bench/seconds.py", finished)

    rows = {}
    for line in done.stdout.splitlines()[2:]:
        _, name, *cells, _ = line.split("|")
        rows[name.strip()] = [float(cell.split()[0]) for cell in cells]
    assert set(rows) == {"candidates", "pairs", "model", "answers", "eval", "all"}
    assert rows["model"][-1] == pytest.approx(trained, abs=0.06)
    assert rows["model"][2] > 0.2  # computing
    for column, total in enumerate(rows.pop("all")):
        assert total == pytest.approx(sum(row[column] for row in rows.values()), abs=0.3)


def test_the_plot_shows_what_the_files_say(finished):
    done = run("-m", "nanoaipo.report", finished)

    assert done.returncode == 0, done.stderr
    scores = read_json(finished, "iter_2", "eval.json")
    assert f"{scores['win_rate']:.1f}%" in done.stdout
    assert f"{scores['length']:.1f}" in done.stdout
    assert "pairrm tiny/world/judge" in done.stdout
    for figure in ("iterations.png", "length.png"):
        assert (finished / figure).read_bytes()[:4] == b"\x89PNG"


def test_a_report_of_nothing_ends_with_a_hint():
    done = run("-m", "nanoaipo.report", "/nowhere")

    assert done.stderr.strip().endswith("has iterate.sh evaluated an iteration?")


# ----------------------------------------------------------------------------- sample to training


@pytest.fixture(scope="session")
def base(world):
    """(tokenizer, ids that end a turn) of the embedded world's base model."""
    return chat.load_tokenizer(str(world / "base"))


def test_what_is_sampled_is_what_is_trained(finished, base):
    """Prompt ids and response ids, from candidates to pairs."""
    tokenizer, eos_ids = base
    candidates = {row["id"]: row for row in records(finished / "iter_1" / "candidates.jsonl")}

    pairs, counts = read_pairs(f"{finished}/iter_1/pairs.jsonl", tokenizer, eos_ids, 4096)

    assert counts["pairs"] == len(pairs) > 20
    for pair in pairs:
        row = candidates[pair["id"]]
        prompt_ids = chat.render(tokenizer, row["prompt"], "here")
        assert pair["prompt_ids"].tolist() == row["prompt_ids"] == prompt_ids

        sampled = [response["ids"] for response in row["responses"]]
        assert pair["chosen_ids"].tolist() in sampled
        assert pair["rejected_ids"].tolist() in sampled


def test_a_finished_response_ends_with_the_end_token_and_no_other_has_one(finished, base):
    tokenizer, eos_ids = base
    responses = []
    for row in records(finished / "iter_1" / "candidates.jsonl"):
        responses += row["responses"]

    assert {r["finished"] for r in responses} == {True, False}  # 24 tokens cut some
    for r in responses:
        assert sum(i in eos_ids for i in r["ids"]) == r["finished"]
        assert (r["ids"][-1] in eos_ids) == r["finished"]
        assert r["finished"] or len(r["ids"]) == 24
        assert r["text"] == tokenizer.decode(r["ids"], skip_special_tokens=True)


def test_the_log_prob_of_a_response_is_the_policys(finished, world):
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(world / "base")
    for row in records(finished / "iter_1" / "candidates.jsonl")[:8]:
        n_prompt = len(row["prompt_ids"])
        for r in row["responses"]:
            ids = torch.tensor([row["prompt_ids"] + r["ids"]])  # (1, T)
            response_ids = torch.tensor(r["ids"])

            logps = policy(ids).logits.log_softmax(-1)[0]  # (T, V)
            logps = logps[n_prompt - 1 : -1]  # at t the token t + 1 is predicted
            logp = logps.gather(1, response_ids[:, None]).sum()

            assert abs(logp.item() - r["logp"]) < 1e-3


def test_two_processes_write_two_shards_with_every_prompt_once(world, finished, tmp_path):
    out = tmp_path / "candidates.jsonl"

    done = torchrun(
        2,
        "generate.py",
        "config/tiny.py",
        out=out,
        n_prompts=15,
        n_responses=2,
        iteration=1,
        max_new_tokens=24,
    )

    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == [
        "candidates-00000-of-00002.jsonl",
        "candidates-00000-of-00002.manifest.json",
        "candidates-00001-of-00002.jsonl",
        "candidates-00001-of-00002.manifest.json",
    ]
    ids = [row["id"] for row in records(out)]
    assert len(set(ids)) == len(ids) == 15

    # two processes rank them, one trains on what these wrote
    pairs = tmp_path / "pairs.jsonl"
    done = torchrun(2, "rank.py", "config/tiny.py", candidates=out, out=pairs)
    assert done.returncode == 0
    done = run("train.py", "config/tiny.py", pairs=pairs, out=tmp_path / "model")
    assert done.returncode == 0
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_process_without_a_prompt_writes_an_empty_shard(world, tmp_path):
    out = tmp_path / "candidates.jsonl"

    done = torchrun(
        2, "generate.py", "config/tiny.py", out=out, n_prompts=1, n_responses=2, max_new_tokens=8
    )

    assert done.returncode == 0, done.stderr
    assert len(records(out)) == 1
    assert (tmp_path / "candidates-00001-of-00002.jsonl").read_text() == ""


def test_greedy_answers_do_not_depend_on_the_batch(world, tmp_path):
    ids = []
    for rows in (3, 64):
        out = tmp_path / f"{rows}.jsonl"
        done = run(
            "generate.py",
            "config/tiny.py",
            out=out,
            n_prompts=24,
            n_responses=1,
            temperature=0,
            generate_rows=rows,
        )
        assert done.returncode == 0
        ids.append([row["responses"][0]["ids"] for row in records(out)])

    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        ("", (), "p.jsonl: no prompt is left (no rows)"),
        ('{"prompt": "a"}\n{"prompt": \n', (), "p.jsonl:2: not JSON"),
        ('{"text": "a"}', (), "p.jsonl:1: 'prompt' has to be"),
        ('{"prompt": "a <|end|>"}', (), "1 control_text ("),
        (
            '{"prompt": "a b c d e f g h"}',
            ("--max_prompt_tokens=5",),
            "max_prompt_tokens and max_new_tokens leave 5",
        ),
        ('{"prompt": "a"}', ("--model=nowhere",), "--model=nowhere: no model folder"),
        ('{"prompt": "a"}', ("--engine=vlm",), "--engine=vlm: there are vllm"),
        ('{"prompt": "a"}', ("--tempreature=1",), "did you mean 'temperature'"),
    ],
)
def test_what_a_user_can_get_wrong_ends_with_one_line_and_no_file(
    world, tmp_path, content, arguments, message
):
    (tmp_path / "p.jsonl").write_text(content)

    done = run(
        "generate.py",
        "config/tiny.py",
        f"--prompts={tmp_path}/p.jsonl",
        f"--out={tmp_path}/c.jsonl",
        "--n_prompts=0",
        *arguments,
    )

    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["p.jsonl"]


# -------------------------------------------------------------------------------------- evaluation

QUESTION = "What is the opposite of hot?"
RULE = {"accept": ["cold"], "among": r"\b(?:cold|wet)\b"}


def write_answers(path, *rows):
    """Write answers to QUESTION, from (id, text, finished); the path."""
    lines = []
    for name, text, finished in rows:
        ids = [5] * len(text.split())
        record = {
            "id": name,
            "prompt": [{"role": "user", "content": QUESTION}],
            "answer": RULE,
            "responses": [{"text": text, "ids": ids, "finished": finished, "logp": 0}],
        }
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def baseline(tmp_path):
    """Path of four answers to compare with, in another order than ours."""
    return write_answers(
        tmp_path / "baseline.jsonl",
        ("w", "cold.", True),
        ("z", "cold.", True),
        ("y", "cold.", True),
        ("x", "The opposite of hot is wet.", True),
    )


@pytest.fixture
def ours(tmp_path):
    """Path of four answers: a win, a loss, a tie that is unfinished, a loss."""
    return write_answers(
        tmp_path / "ours.jsonl",
        ("x", "The opposite of hot is cold.", True),
        ("y", "wet.", True),
        ("z", "cold.", False),
        ("w", "wet.", True),
    )


def test_evaluation_joins_by_id_and_counts_what_it_says(world, ours, baseline, tmp_path):
    out = tmp_path / "e.json"

    done = run("eval.py", "config/tiny.py", answers=ours, baseline=baseline, out=out)

    assert done.returncode == 0, done.stderr
    scores = read_json(out)
    assert scores["win_rate"] == 37.5
    assert scores["ties"] == 1
    assert scores["accuracy"] == 50
    assert scores["finished"] == 75
    assert scores["n"] == 4
    assert "LENGTH ALARM" not in done.stdout


def test_answers_much_longer_than_the_baselines_raise_an_alarm(world, baseline, tmp_path):
    text = "The opposite of hot is cold. Thank you for your question."
    longer = write_answers(tmp_path / "longer.jsonl", ("x", text, True))
    out = tmp_path / "e.json"

    done = run("eval.py", "config/tiny.py", answers=longer, baseline=baseline, out=out)

    assert "LENGTH ALARM: answers are 1.8 times as long" in done.stdout


def test_a_baseline_that_lacks_answers_is_refused(world, ours, tmp_path):
    short = write_answers(tmp_path / "short.jsonl", ("x", "cold.", True))
    out = tmp_path / "e.json"

    done = run("eval.py", "config/tiny.py", answers=ours, baseline=short, out=out)

    assert done.returncode == 1
    assert "no answer to 3 of the prompts" in done.stderr
    assert not out.exists()
