"""Candidates block by block, prompts in the formats people have, engines, and an endpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, build_model, run
from templates import SMOLLM3
from test_instruct import pool, writer  # noqa: F401 (test_recipes takes them from here)
from test_judge import KEY, Judge
from test_loop import world  # noqa: F401 (a fixture)

from nanoaipo import chat, engines, files, prompts
from nanoaipo.errors import InputError

SHARED = ROOT.parent / "shared" / "data"
TINY = (
    "config/tiny.py",
    "--n_prompts=24",
    "--n_responses=2",
    "--max_new_tokens=24",
    "--iteration=1",
)


def write_rows(path, rows):
    """Write a JSONL file of these records."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path):
    """The records of a JSONL file."""
    return [row for _, row in files.read_records(str(path))]


def read_counts(folder, name):
    """The counts in the manifest of folder/name.jsonl."""
    manifest = json.loads((folder / f"{name}.manifest.json").read_text())
    return manifest["counts"]


def kill_midway(arguments, part, n_lines):
    """Start a script of its own and kill it when its unfinished file `part` has n_lines lines."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not part.exists() or part.read_bytes().count(b"\n") < n_lines:
        time.sleep(0.005)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ------------------------------------------------------------------------------------- candidates


def test_a_kill_costs_one_block_and_the_file_is_the_same_as_without(world, tmp_path):
    whole = tmp_path / "whole.jsonl"
    cut = tmp_path / "cut.jsonl"
    part = tmp_path / "cut.jsonl.tmp"
    whole_command = ("generate.py", *TINY, f"--out={whole}", "--block=4")
    cut_command = ("generate.py", *TINY, f"--out={cut}", "--block=4")

    assert run(*whole_command).returncode == 0
    kill_midway(cut_command, part, 8)

    assert 8 <= part.read_bytes().count(b"\n") < 24
    assert not cut.exists()

    # as a pulled plug leaves it
    part.write_bytes(part.read_bytes() + b'{"id": "cut in the mid')

    other = run(*cut_command, "--temperature=0.5")
    assert other.returncode == 1
    message = "cut.jsonl.tmp: was made with another 'temperature' (1.0, now 0.5)"
    assert message in other.stderr

    done = run(*cut_command)
    assert done.returncode == 0
    assert "goes on behind " in done.stdout
    assert cut.read_bytes() == whole.read_bytes()
    assert not part.exists()

    counts = read_counts(tmp_path, "whole")
    assert counts == read_counts(tmp_path, "cut")
    assert counts["responses"] == 48
    assert counts["tokens"] > 48


def test_short_instructions_are_dropped_and_counted(world, tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": "Hi"}, {"prompt": "What color is the sky?"}])

    done = run(
        "generate.py",
        "config/tiny.py",
        f"--prompts={tmp_path}/p.jsonl",
        f"--out={tmp_path}/c.jsonl",
        "--n_prompts=0",
        "--min_prompt_tokens=4",
    )

    assert done.returncode == 0
    assert len(read_rows(tmp_path / "c.jsonl")) == 1
    assert read_counts(tmp_path, "c")["too_short"] == 1
    assert "1 row dropped: 1 too_short (" in done.stdout
    assert "tokens; min_prompt_tokens is 4)" in done.stdout


@pytest.mark.parametrize(
    "task, setting, message",
    [
        (
            "instructions",
            "instruction_unfit=(",
            "--instruction_unfit=(: not a regular expression: missing )",
        ),
        ("instructions", "n_prompts=0", "--n_prompts is not set: how many instructions to write"),
        ("instructions", "instruction_examples=0", "has to be 1 at least"),
        ("instructions", "instruction_similarity=1.5", "has to be between 0 and 1"),
        ("candidates", "block=0", "--block=0: has to be 1 at least"),
        ("answers", "n_prompts=-1", "--n_prompts=-1: at least 0"),
        (
            "candidates",
            "max_new_tokens=4096",
            "tokens; max_prompt_tokens and max_new_tokens leave -",
        ),
    ],
)
def test_settings_that_make_no_sense_are_one_line(world, tmp_path, task, setting, message):
    done = run(
        "generate.py",
        "config/tiny.py",
        f"--out={tmp_path}/x.jsonl",
        f"--task={task}",
        f"--{setting}",
    )

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert not (tmp_path / "x.jsonl").exists()


def test_the_counts_of_shards_add_up(world, tmp_path):
    texts = ("What color is the sky?", "Name a fruit. " * 99, "Name a fruit.", "Is it cold?")
    write_rows(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    command = (
        "generate.py",
        "config/tiny.py",
        f"--prompts={tmp_path}/p.jsonl",
        "--n_prompts=0",
        "--max_prompt_tokens=64",
        "--n_responses=2",
        "--max_new_tokens=8",
    )

    assert run(*command, f"--out={tmp_path}/one.jsonl").returncode == 0
    for rank in "01":
        world_of_two = {"RANK": rank, "WORLD_SIZE": "2"}
        done = run(*command, f"--out={tmp_path}/two.jsonl", env=world_of_two)
        assert done.returncode == 0

    one = read_counts(tmp_path, "one")
    first = read_counts(tmp_path, "two-00000-of-00002")
    second = read_counts(tmp_path, "two-00001-of-00002")
    for key, value in {"prompts": 3, "too_long": 1, "responses": 6}.items():
        assert one[key] == value
        assert first[key] + second[key] == value


def test_rows_without_a_prompt_that_can_be_used_are_dropped_and_counted(tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    build_model(tmp_path / "model", template=refuses + SMOLLM3)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    rows = [
        {"prompt": "hi"},
        {"prompt": system},
        {"prompt": 3},
        {"prompt": "hi", "chat_template_kwargs": {"tokenize": True}},
        {"prompt": "hi", "tools": [{"name": "weather"}]},
    ]
    write_rows(tmp_path / "p.jsonl", rows)
    settings = {
        "model": tmp_path / "model",
        "prompts": tmp_path / "p.jsonl",
        "engine": "transformers",
        "dtype": "float32",
        "max_new_tokens": 2,
    }

    done = run("generate.py", out=tmp_path / "c.jsonl", **settings)

    assert done.returncode == 0, done.stderr
    assert "4 rows dropped" in done.stdout
    counts = read_counts(tmp_path, "c")
    for key in ("prompts", "refused_by_template", "no_messages", "no_json", "no_tools"):
        assert counts[key] == 1

    # where none is left, the reasons are in the error
    write_rows(tmp_path / "p.jsonl", rows[1:])
    done = run("generate.py", out=tmp_path / "none.jsonl", **settings)
    assert done.returncode == 1
    assert "no prompt is left" in done.stderr
    assert "1 refused_by_template" in done.stderr


def test_template_settings_and_a_rows_own_columns_reach_the_prompt(tmp_path):
    names = "{% for tool in tools or () %}{{ tool.name }}{% endfor %}"
    template = names + SMOLLM3
    build_model(tmp_path / "model", template=template)
    rows = [
        {"id": "plain", "prompt": "hi"},
        {"id": "tools", "prompt": "hi", "tools": [{"name": "weather"}]},
        {"id": "thinks", "prompt": "hi", "chat_template_kwargs": {"enable_thinking": True}},
    ]
    write_rows(tmp_path / "prompts.jsonl", rows)
    settings = {
        "model": tmp_path / "model",
        "prompts": tmp_path / "prompts.jsonl",
        "engine": "transformers",
        "dtype": "float32",
        "max_new_tokens": 2,
        "template_kwargs": '{"enable_thinking": false}',
        "date": "2026-02-03",
    }

    for task in ("candidates", "answers"):
        done = run("generate.py", task=task, out=tmp_path / f"{task}.jsonl", **settings)

        assert done.returncode == 0, done.stderr
        tokenizer, _ = chat.load_tokenizer(str(tmp_path / "model"))
        texts = [
            tokenizer.decode(row["prompt_ids"]) for row in read_rows(tmp_path / f"{task}.jsonl")
        ]
        system = "Today is 03 February 2026<|end|>\n<|user|>hi<|end|>\n<|assistant|>"
        assert texts == [
            f"<|system|>{system}<think>\n\n</think>\n",
            f"weather<|system|>{system}<think>\n\n</think>\n",
            f"<|system|>{system}",
        ]
        manifest = json.loads((tmp_path / f"{task}.manifest.json").read_text())
        assert manifest["settings"]["template_kwargs"] == '{"enable_thinking": false}'

    done = run("generate.py", out=tmp_path / "x.jsonl", **settings | {"template_kwargs": "{"})
    assert done.returncode == 1
    assert done.stderr.startswith("--template_kwargs={: not JSON")
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "file, count, text",
    [
        (
            "eval/alpaca_eval/instructions.json",
            805,
            "What are the names of some famous actors that started their careers on Broadway?",
        ),
        (
            "eval/mt_bench/question.jsonl",
            80,
            "Compose an engaging travel blog post about a recent trip to Hawaii",
        ),
        (
            "eval/arena_hard_v0.1/question.jsonl",
            500,
            "Use ABC notation to write a melody",
        ),
        (
            "prompts/seed_tasks.jsonl",
            175,
            "Is there anything I can eat for a breakfast",
        ),
    ],
)
def test_benchmark_files_are_prompts_as_they_are(file, count, text):
    if not (SHARED / file).exists():
        pytest.skip(f"{SHARED / file} is not there")

    rows = prompts.read_prompts(str(SHARED / file))

    assert len(rows) == count
    assert len({row["id"] for row in rows}) == count
    assert rows[0]["prompt"][0]["content"].startswith(text)


def test_an_input_belongs_to_its_instruction_and_the_last_answer_is_no_prompt(tmp_path):
    path = tmp_path / "p.jsonl"
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    rows = [
        {"instruction": "Add.", "input": "1 2"},
        {"instruction": "Add.", "instances": [{"input": "3 4", "output": "7"}]},
        {"instruction": "Add.", "input": ""},
        {"chosen": conversation, "rejected": conversation},
        {"question_id": 7, "turns": [{"content": "first"}, {"content": "second"}]},
    ]
    write_rows(path, rows)

    read = prompts.read_prompts(str(path))

    last_texts = [row["prompt"][-1]["content"] for row in read]
    assert last_texts == ["Add.\n\n1 2", "Add.\n\n3 4", "Add.", "c", "first"]
    assert len(read[3]["prompt"]) == 3
    assert read[4]["id"] == "7"

    path.write_text(json.dumps({"chosen": "Human: a Assistant: b"}))
    with pytest.raises(InputError, match="p.jsonl:1: 'chosen' has to be"):
        prompts.read_prompts(str(path))


# ------------------------------------------------------------------------------------ an endpoint


def completion(text, finish="stop"):
    """The body of an endpoint's reply with one choice."""
    return {"choices": [{"finish_reason": finish, "message": {"content": text}}]}


def endpoint_command(tmp_path, url, name="c", n_in_block=4):
    """The arguments that sample two responses to each prompt of p.jsonl into NAME.jsonl."""
    return (
        "generate.py",
        "--engine=openai",
        "--model=gpt",
        f"--engine_url={url}",
        f"--prompts={tmp_path}/p.jsonl",
        "--n_responses=2",
        f"--block={n_in_block}",
        f"--out={tmp_path}/{name}.jsonl",
    )


def number_replies(server, handler, text):
    """Answer with the number of the question; prompt 3 is never answered to the end."""
    finish = "length" if "3" in text else "stop"
    handler.reply(completion(f"reply {sum(server.asked.values())}", finish))
    return True


def refuse_all(server, handler, text):
    """Refuse every question."""
    handler.reply({"error": {"message": "no such parameter"}}, 400)
    return True


def refuse_at_first(server, handler, text):
    """Refuse each question twice, and prompt 5 for good."""
    if server.asked[text] <= 2 or "5" in text:
        handler.reply({"error": {"message": "filtered"}}, 400)
    else:
        handler.reply(completion("yes"))
    return True


def test_an_endpoint_writes_candidates_that_a_kill_does_not_ask_twice(tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": f"prompt {k}"} for k in range(6)])
    server = Judge(misbehave=number_replies)
    command = endpoint_command(tmp_path, server.url)

    done = run(*command, env={"OPENAI_API_KEY": KEY})

    assert done.returncode == 0
    assert KEY not in done.stdout + done.stderr
    rows = read_rows(tmp_path / "c.jsonl")
    assert [len(row["responses"]) for row in rows] == [2] * 6
    texts = [response["text"] for row in rows for response in row["responses"]]
    assert len(set(texts)) == 12
    assert "prompt_ids" not in rows[0]
    finished = [row["responses"][0]["finished"] for row in rows]
    assert finished == [True, True, True, False, True, True]

    # without its file the stage is done again, with the replies that are there
    os.remove(tmp_path / "c.jsonl")
    assert run(*command).returncode == 0
    assert sum(server.asked.values()) == 12


def test_an_endpoint_that_answers_nothing_ends_the_stage_and_is_asked_again(tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": f"prompt {k}"} for k in range(6)])
    broken = Judge(misbehave=refuse_all)
    server = Judge(misbehave=number_replies)

    done = run(*endpoint_command(tmp_path, broken.url, "d"))
    assert done.returncode == 1
    assert "not one answer to 8 questions" in done.stderr
    assert "no such parameter" in done.stderr
    assert not os.path.exists(tmp_path / "d.jsonl")

    # refused is not answered
    assert run(*endpoint_command(tmp_path, server.url, "d")).returncode == 0
    rows = read_rows(tmp_path / "d.jsonl")
    assert [len(row["responses"]) for row in rows] == [2] * 6


def test_what_an_endpoint_refuses_is_asked_once_more_and_then_missing(tmp_path):
    rows = [{"prompt": f"prompt {k}", "prompt_ids": [1]} for k in range(6)]
    write_rows(tmp_path / "p.jsonl", rows)
    flaky = Judge(misbehave=refuse_at_first)

    # the last block is prompt 5 alone
    done = run(*endpoint_command(tmp_path, flaky.url, "e", n_in_block=5))

    assert done.returncode == 0
    rows = read_rows(tmp_path / "e.jsonl")
    assert [len(row["responses"]) for row in rows] == [2] * 5 + [0]
    assert "prompt_ids" not in rows[0]


def think_and_count_in_text(server, handler, text):
    """Answer with the thought in a field of its own and a usage that is no number."""
    message = {"content": "yes", "reasoning_content": "hm"}
    choices = [{"finish_reason": "stop", "message": message}]
    handler.reply({"choices": choices, "usage": {"prompt_tokens": "7"}})
    return True


def test_an_endpoints_thoughts_are_kept_and_rows_it_cannot_be_asked_are_dropped(tmp_path):
    rows = [
        {"prompt": "prompt 0"},
        {"text": "no prompt"},
        {"prompt": "prompt 1", "tools": [{"name": "weather"}]},
    ]
    write_rows(tmp_path / "p.jsonl", rows)
    server = Judge(misbehave=think_and_count_in_text)

    done = run(*endpoint_command(tmp_path, server.url))

    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path / "c.jsonl")
    assert row["responses"] == [{"text": "yes", "finished": True, "thought": "hm"}] * 2
    counts = read_counts(tmp_path, "c")
    assert [counts[key] for key in ("prompts", "no_prompt", "for_template")] == [1, 1, 1]


def test_an_endpoint_without_its_url_is_refused(tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": "prompt 0", "prompt_ids": [1]}])
    command = endpoint_command(tmp_path, "")

    refused = run(*(a for a in command if "engine_url" not in a), "--iteration=1")

    assert refused.returncode == 1
    assert "--engine=openai: writes candidates, wants --engine_url" in refused.stderr


# ---------------------------------------------------------------------------------------- engines

# GPU 3 is held by process 4242 until it has been asked about twice
NVIDIA_SMI = """#!{python}
import os, sys
calls = os.path.join({folder!r}, "calls")
n = os.path.getsize(calls) if os.path.exists(calls) else 0
if "gpu=" in sys.argv[3]:
    open(calls, "a").write("x")
    print("3, GPU-a, " + ("80000" if n >= 2 else "1000") + ", 81000")
else:
    print("GPU-b, 1, 5, other")
    print("GPU-a, 4242, 79000, python train.py")
"""


def test_a_gpu_that_is_held_is_waited_for_and_its_holder_named(tmp_path, monkeypatch, capsys):
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    engines.wait_for_gpus("3", 0.9, patience=3, pause=1)

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        "GPU 3: 1000 MiB are free, --gpu_memory=0.9 wants 72900; "
        "it is held by process 4242 (79000 MiB, python train.py); waiting, 3 s at most"
    )

    (tmp_path / "calls").unlink()
    message = "held by process 4242 .*; end that, or lower --gpu_memory"
    with pytest.raises(InputError, match=message):
        engines.wait_for_gpus("3", 0.9, patience=1, pause=1)


def test_a_stop_text_ends_a_response_without_an_end_token_and_its_log_prob_is_that_of_its_ids(
    world,
):
    from transformers import AutoModelForCausalLM

    model = str(ROOT / "tiny/world/base")
    tokenizer, eos_ids = chat.load_tokenizer(model)
    policy = AutoModelForCausalLM.from_pretrained(model)
    rows = prompts.read_prompts(str(ROOT / "tiny/world/prompts.jsonl"))[:12]
    prompt_ids = [chat.render(tokenizer, row["prompt"], "here") for row in rows]
    sample = engines.load_engine(
        "transformers",
        model,
        eos_ids,
        600,
        dtype="float32",
        generate_rows=64,
        seed=0,
        tensor_parallel=1,
        gpu_memory=0.9,
    )

    sampled = sample(
        [(ids, k) for k, ids in enumerate(prompt_ids)],
        n_responses=2,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=24,
        stop=("e", "a"),
    )

    n_stopped = 0
    for prompt, responses in zip(prompt_ids, sampled):
        for response, finished, logp in responses:
            text = tokenizer.decode(response, skip_special_tokens=True)
            has_eos = bool(set(response) & eos_ids)
            assert finished
            if has_eos:
                assert response[-1] in eos_ids
            else:
                assert set(text) & {"e", "a"}
                n_stopped += 1

            logits = policy(torch.tensor([prompt + response])).logits
            logps = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]  # (T, V)
            expected = logps.gather(1, torch.tensor(response)[:, None]).sum().item()
            assert abs(expected - logp) < 1e-3
    assert n_stopped > 12
