"""Candidates block by block, prompts in the formats people have, new instructions, and an endpoint that answers."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanoaipo import chat
from nanoaipo import files
from nanoaipo import prompts
from nanoaipo import engines
from conftest import ROOT, build_model, run, torchrun
from test_judge import KEY, Judge
from test_loop import ENV, world  # noqa: F401  (a fixture)

SHARED = ROOT.parent / "shared" / "data"
TINY = ("config/tiny.py", "--n_prompts=24", "--n_responses=2", "--max_new_tokens=24", "--iteration=1")


@pytest.fixture
def generate(monkeypatch):
    """generate.py as a module: its work is in functions, its settings are its globals."""
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    sys.modules.pop("generate", None)
    import generate
    return generate


def test_a_kill_costs_one_block_and_the_file_is_the_same_as_without(world, tmp_path):  # noqa: F811
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run("generate.py", *TINY, f"--out={whole}", "--block=4").returncode == 0
    process = subprocess.Popen([sys.executable, "generate.py", *TINY, f"--out={cut}", "--block=4"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "cut.jsonl.tmp"
    while not part.exists() or part.read_bytes().count(b"\n") < 8:
        time.sleep(0.01)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 8 <= part.read_bytes().count(b"\n") < 24 and not cut.exists()
    part.write_bytes(part.read_bytes() + b'{"id": "cut in the mid')      # as a pulled plug leaves it
    other = run("generate.py", *TINY, f"--out={cut}", "--block=4", "--temperature=0.5")
    assert other.returncode == 1 and "cut.jsonl.tmp: was made with another 'temperature' (1.0, now 0.5)" in other.stderr
    done = run("generate.py", *TINY, f"--out={cut}", "--block=4")
    assert done.returncode == 0 and "goes on behind " in done.stdout and cut.read_bytes() == whole.read_bytes() and not part.exists()
    counts = [json.load(open(tmp_path / f"{name}.manifest.json"))["counts"] for name in ("whole", "cut")]
    assert counts[0] == counts[1] and counts[0]["responses"] == 48 and counts[0]["tokens"] > 48


@pytest.mark.parametrize("file, count, text", [
    ("eval/alpaca_eval/instructions.json", 805, "What are the names of some famous actors that started their careers on Broadway?"),
    ("eval/mt_bench/question.jsonl", 80, "Compose an engaging travel blog post about a recent trip to Hawaii"),
    ("eval/arena_hard_v0.1/question.jsonl", 500, "Use ABC notation to write a melody"), ("prompts/seed_tasks.jsonl", 175, "Is there anything I can eat for a breakfast")])
def test_benchmark_files_are_prompts_as_they_are(file, count, text):
    if not (SHARED / file).exists():
        pytest.skip(f"{SHARED / file} is not there")
    rows = prompts.read_prompts(str(SHARED / file))
    assert len(rows) == len({r["id"] for r in rows}) == count and rows[0]["prompt"][0]["content"].startswith(text)


def test_an_input_belongs_to_its_instruction_and_the_last_answer_is_no_prompt(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    rows = [{"instruction": "Add.", "input": "1 2"}, {"instruction": "Add.", "instances": [{"input": "3 4", "output": "7"}]}, {"instruction": "Add.", "input": ""},
            {"chosen": talk, "rejected": talk}, {"question_id": 7, "turns": [{"content": "first"}, {"content": "second"}]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    read = prompts.read_prompts(str(tmp_path / "p.jsonl"))
    assert [r["prompt"][-1]["content"] for r in read] == ["Add.\n\n1 2", "Add.\n\n3 4", "Add.", "c", "first"] and len(read[3]["prompt"]) == 3 and read[4]["id"] == "7"
    (tmp_path / "p.jsonl").write_text(json.dumps({"chosen": "Human: a Assistant: b"}))
    with pytest.raises(SystemExit, match="p.jsonl:1: 'chosen' has to be"):
        prompts.read_prompts(str(tmp_path / "p.jsonl"))


def test_short_instructions_are_dropped_and_counted(world, tmp_path):  # noqa: F811
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in ("Hi", "What color is the sky?")))
    assert run("generate.py", "config/tiny.py", f"--prompts={tmp_path}/p.jsonl", f"--out={tmp_path}/c.jsonl", "--n_prompts=0", "--min_prompt_tokens=4").returncode == 0
    assert len(list(files.read_records(f"{tmp_path}/c.jsonl"))) == 1 and json.load(open(tmp_path / "c.manifest.json"))["counts"]["too_short"] == 1


def test_an_endpoint_writes_candidates_that_a_kill_does_not_ask_twice(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"prompt {k}"}) + "\n" for k in range(6)))
    server = Judge(misbehave=lambda server, handler, text: handler.reply({"choices": [
        {"finish_reason": "length" if "3" in text else "stop", "message": {"content": f"reply {sum(server.asked.values())}"}}]}) is None)
    asked = ("generate.py", "--engine=openai", "--model=gpt", f"--engine_url={server.url}", f"--prompts={tmp_path}/p.jsonl", "--n_responses=2", "--block=4", f"--out={tmp_path}/c.jsonl")
    done = run(*asked, env={"OPENAI_API_KEY": KEY})
    assert done.returncode == 0 and KEY not in done.stdout + done.stderr
    rows = [r for _, r in files.read_records(f"{tmp_path}/c.jsonl")]
    assert [len(r["responses"]) for r in rows] == [2] * 6 and len({r["text"] for row in rows for r in row["responses"]}) == 12 and "prompt_ids" not in rows[0]
    assert [row["responses"][0]["finished"] for row in rows] == [True, True, True, False, True, True]
    os.remove(tmp_path / "c.jsonl")
    assert run(*asked).returncode == 0 and sum(server.asked.values()) == 12
    broken = Judge(misbehave=lambda server, handler, text: handler.reply({"error": {"message": "no such parameter"}}, 400) is None)
    again = [a.replace("c.jsonl", "d.jsonl") for a in asked]
    done = run(*(a.replace(server.url, broken.url) for a in again))
    assert done.returncode == 1 and "not one answer to 8 questions" in done.stderr and "no such parameter" in done.stderr
    assert not os.path.exists(tmp_path / "d.jsonl") and run(*again).returncode == 0         # refused is not answered: asked again
    assert [len(row["responses"]) for _, row in files.read_records(f"{tmp_path}/d.jsonl")] == [2] * 6
    lines = [json.dumps({"prompt": f"prompt {k}", "prompt_ids": [1]}) + "\n" for k in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    flaky = Judge(misbehave=lambda server, handler, text: handler.reply({"error": {"message": "filtered"}}, 400) is None if server.asked[text] <= 2 or "5" in text
                  else handler.reply({"choices": [{"finish_reason": "stop", "message": {"content": "yes"}}]}) is None)
    done = run(*(a.replace(server.url, flaky.url).replace("c.jsonl", "e.jsonl").replace("block=4", "block=5") for a in asked))      # the last block: 5 alone
    rows = [r for _, r in files.read_records(f"{tmp_path}/e.jsonl")]
    assert done.returncode == 0 and [len(r["responses"]) for r in rows] == [2] * 5 + [0] and "prompt_ids" not in rows[0]
    refused = run(*(a for a in asked if "engine_url" not in a), "--iteration=1")
    assert refused.returncode == 1 and "--engine=openai: writes candidates, wants --engine_url" in refused.stderr


def test_answers_come_turn_after_turn_in_the_official_formats(world, tmp_path):  # noqa: F811
    questions = [{"question_id": 1, "category": "math", "turns": ["What color is the sky?", "And the sea?"]}, {"question_id": 2, "category": "writing", "turns": ["Name a fruit."]},
                 {"question_id": 3, "category": "reasoning", "turns": ["What color is the sky?", "Is it cold?"]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    asked = ("generate.py", "config/tiny.py", "--task=answers", "--n_prompts=0")
    assert run(*asked, f"--prompts={tmp_path}/q.jsonl", f"--out={tmp_path}/a.jsonl", "--max_new_tokens=16").returncode == 0
    ours, official = ([r for _, r in files.read_records(f"{tmp_path}/{name}.jsonl")] for name in ("a", "a.model_answer"))
    given = [r["responses"] + r["later_responses"] for r in ours]
    assert [len(r) for r in given] == [2, 1, 2] and [r["question_id"] for r in official] == [1, 2, 3] and {r["model_id"] for r in official} == {"base"}
    assert [r["choices"][0]["turns"] for r in official[::2]] == [[x["text"] for x in r] for r in given[::2]]
    assert official[1]["choices"][0]["turns"] == [{"content": given[1][0]["text"], "token_len": len(given[1][0]["ids"])}]      # one turn: Arena-Hard's form
    assert ours[0]["responses"][0]["text"] == ours[2]["responses"][0]["text"]                                   # temperature 0 in both categories
    tokenizer, _ = chat.load_tokenizer(str(ROOT / "tiny/world/base"))
    from transformers import AutoModelForCausalLM
    policy = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/world/base")
    first, second = given[0]
    talk = [*ours[0]["prompt"], {"role": "assistant", "content": first["text"]}, {"role": "user", "content": "And the sea?"}]
    ids = chat.render(tokenizer, talk, "here")
    logits = policy(torch.tensor([ids + second["ids"]])).logits[0, len(ids) - 1:-1]
    assert logits.argmax(-1).tolist() == second["ids"]                  # greedy, after both turns
    (tmp_path / "i.json").write_text(json.dumps([{"instruction": "Name a fruit.", "dataset": "d"}]))
    assert run(*asked, f"--prompts={tmp_path}/i.json", f"--out={tmp_path}/b.jsonl", "--temperature=0").returncode == 0
    (row,) = json.load(open(tmp_path / "b.model_outputs.json"))
    assert row.keys() == {"dataset", "instruction", "output", "generator"} and row["output"] == next(files.read_records(f"{tmp_path}/b.jsonl"))[1]["responses"][0]["text"]
    done = run(*asked, f"--prompts={tmp_path}/q.jsonl", f"--out={tmp_path}/c.jsonl", "--max_new_tokens=4096")
    assert done.returncode == 1 and "'1' may take " in done.stderr and "lower --max_new_tokens" in done.stderr
    two = torchrun(2, *asked, f"--prompts={tmp_path}/q.jsonl", f"--out={tmp_path}/d.jsonl", "--max_new_tokens=16", "--answer_name=me")
    assert two.returncode == 0 and len(list(files.read_records(f"{tmp_path}/d.jsonl"))) == 3 and not list(tmp_path.glob("*.tmp"))
    (tmp_path / "d.model_answer.jsonl").rename(tmp_path / "one.jsonl")                                         # one file of all processes, in order
    assert [(r["question_id"], r["model_id"]) for _, r in files.read_records(f"{tmp_path}/one.jsonl")] == [(1, "me"), (2, "me"), (3, "me")]
    again = run(*asked, f"--prompts={tmp_path}/q.jsonl", f"--out={tmp_path}/d.jsonl", "--max_new_tokens=16", "--answer_name=me", env={"RANK": "1", "WORLD_SIZE": "2"})
    assert "nothing to do" in again.stdout and (tmp_path / "d.model_answer.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def fake_tiktoken(folder, body):
    folder.mkdir()
    (folder / "tiktoken.py").write_text(body)
    return {"PYTHONPATH": str(folder)}


def test_arena_hard_answers_are_counted_by_tiktoken_or_say_that_they_are_not(world, generate, tmp_path):  # noqa: F811
    (tmp_path / "new.jsonl").write_text(json.dumps({"uid": "u1", "category": "hard_prompt", "subcategory": "x", "prompt": "Name a fruit."}) + "\n")
    (tmp_path / "old.jsonl").write_text(json.dumps({"question_id": "q1", "category": "arena-hard-v0.1", "turns": [{"content": "Name a fruit."}]}) + "\n")
    here = fake_tiktoken(tmp_path / "with", "class get_encoding:\n    def __init__(self, name): self.name = name\n"
                         "    def encode(self, text, disallowed_special): return [self.name] * (100 if self.name == 'cl100k_base' else 200)\n")
    offline = fake_tiktoken(tmp_path / "without", "def get_encoding(name): raise ConnectionError('no network')\n")
    for name, env in (("with", here), ("without", offline)):
        for file in ("old", "new"):
            done = run("generate.py", "config/tiny.py", "--task=answers", "--n_prompts=0", "--max_new_tokens=8", f"--prompts={tmp_path}/{file}.jsonl",
                       f"--out={tmp_path}/{name}-{file}.jsonl", "--answer_name=me", env=env)
            assert done.returncode == 0, done.stderr
    (old, new), (old_by, new_by) = ([next(files.read_records(f"{tmp_path}/{name}-{file}.model_answer.jsonl"))[1] for file in ("old", "new")] for name in ("with", "without"))
    ours = next(files.read_records(f"{tmp_path}/with-new.jsonl"))[1]
    text, own = ours["responses"][0]["text"].strip(), len(ours["responses"][0]["ids"])
    assert old == {"question_id": "q1", "answer_id": "me-q1", "model_id": "me", "tstamp": 0, "token_len_by": "tiktoken cl100k_base",
                   "choices": [{"index": 0, "turns": [{"content": old["choices"][0]["turns"][0]["content"], "token_len": 100}]}]}
    assert new.keys() == {"uid", "ans_id", "model", "messages", "tstamp", "metadata", "token_len_by"} and new["uid"] == ours["id"] == "u1" and new["model"] == "me"
    assert new["messages"] == [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": {"answer": text}}] and new["token_len_by"] == "tiktoken o200k_base"
    assert list(new["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"] and new["metadata"]["token_len"] == 200       # show_result.py sums by place
    assert old_by["token_len_by"] == new_by["token_len_by"] == "the policy's tokenizer" and new_by["metadata"]["token_len"] == own
    row = {"id": "a", "uid": "a", "prompt": [], "responses": [{"text": " # H\n## I\n1. a\n - b\n* c\n**d** __e__ ```\n# no\n- no```\n", "ids": [1]}]}
    answer = generate.model_answer(row, "me")
    assert answer["messages"][0]["content"]["answer"].startswith("# H") and not answer["messages"][0]["content"]["answer"].endswith("\n")
    counts = answer["metadata"]
    assert counts["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0} and counts["list_count"] == {"ordered": 1, "unordered": 2}
    assert counts["bold_count"] == {"**": 1, "__": 1}
    two = generate.model_answer({"id": "b", "turns": ["x", "y"], "responses": [{"text": " s "}], "later_responses": [{"text": "t\n"}]}, "me")
    assert two["choices"][0]["turns"] == ["s", "t"] and "token_len_by" not in two


def test_a_kill_costs_one_block_of_answers_and_every_turn_is_there(world, tmp_path):  # noqa: F811
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question_id": k, "category": ("writing", "math", "other")[k % 3], "turns": [f"What is {k} plus 2?", "And 3 more?"][:1 + k % 2]})
                                              + "\n" for k in range(24)))
    asked = ("generate.py", "config/tiny.py", "--task=answers", "--n_prompts=0", "--max_new_tokens=16", "--block=3", f"--prompts={tmp_path}/q.jsonl")
    assert run(*asked, f"--out={tmp_path}/whole.jsonl").returncode == 0
    process = subprocess.Popen([sys.executable, *asked, f"--out={tmp_path}/cut.jsonl"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "cut.jsonl.tmp"
    while not part.exists() or part.read_bytes().count(b"\n") < 6:
        time.sleep(0.005)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 6 <= part.read_bytes().count(b"\n") < 24 and not (tmp_path / "cut.model_answer.jsonl").exists()
    done = run(*asked, f"--out={tmp_path}/cut.jsonl")
    assert done.returncode == 0 and "goes on behind " in done.stdout
    for name in ("jsonl", "model_answer.jsonl"):
        assert (tmp_path / f"cut.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes()
    assert [len(r["later_responses"]) for _, r in files.read_records(f"{tmp_path}/cut.jsonl")] == [0, 1] * 12
    assert json.load(open(tmp_path / "cut.manifest.json"))["counts"]["responses"] == 36


def test_answers_ask_for_no_more_room_than_they_may_take(world, generate, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "turns": ["a", "b"]}) + "\n" + json.dumps({"prompt": "c", "turns": 2, "category": ["x"]}) + "\n")
    asked, (tokenizer, ends) = [], chat.load_tokenizer(str(ROOT / "tiny/world/base"))

    def engine(name, model, ends, longest, config):
        def sample(requests, **settings):
            asked.append((settings["temperature"], [tokenizer.decode(ids) for ids, _ in requests]))
            return [[(tokenizer(f"said {k}").input_ids, True, -1.0)] for k, _ in enumerate(requests)]
        asked.append(longest)
        return sample

    for name, value in (("load_engine", engine), ("positions", lambda model: 1_024_000), ("prompts", f"{tmp_path}/q.jsonl"), ("out", f"{tmp_path}/a.jsonl"), ("max_new_tokens", 16)):
        monkeypatch.setattr(generate, name, value)
    generate.answers({"settings": {}, "inputs": {}}, tokenizer, ends)
    assert asked[0] < 300 and [len(texts) for _, texts in asked[1:]] == [2, 1]       # Mistral-Nemo was built for 1,024,000: no cache holds that
    assert "said 0" in asked[2][1][0] and [len(r["later_responses"]) if "later_responses" in r else None for _, r in files.read_records(f"{tmp_path}/a.jsonl")] == [1, None]


def test_settings_that_make_no_sense_are_one_line(world, tmp_path):  # noqa: F811
    for task, setting, message in (("instructions", "instruction_unfit=(", "--instruction_unfit=(: not a regular expression: missing )"), ("instructions", "instruction_examples=0", "has to be 1 at least"),
                                   ("instructions", "instruction_similarity=1.5", "has to be between 0 and 1"), ("candidates", "block=0", "--block=0: has to be 1 at least"),
                                   ("answers", "n_prompts=-1", "has to be 0 at least"), ("candidates", "max_new_tokens=4096", "4096 above max_prompt_tokens and what max_new_tokens leaves, -")):
        done = run("generate.py", "config/tiny.py", f"--out={tmp_path}/x.jsonl", f"--task={task}", f"--{setting}")
        assert done.returncode == 1 and "Traceback" not in done.stderr and message in done.stderr and not (tmp_path / "x.jsonl").exists()


def test_the_counts_of_shards_add_up(world, tmp_path):  # noqa: F811
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in ("What color is the sky?", "Name a fruit. " * 99, "Name a fruit.", "Is it cold?")))
    asked = ("generate.py", "config/tiny.py", f"--prompts={tmp_path}/p.jsonl", "--n_prompts=0", "--max_prompt_tokens=64", "--n_responses=2", "--max_new_tokens=8")
    assert run(*asked, f"--out={tmp_path}/one.jsonl").returncode == 0
    for rank in "01":
        assert run(*asked, f"--out={tmp_path}/two.jsonl", env={"RANK": rank, "WORLD_SIZE": "2"}).returncode == 0
    one, *two = (json.load(open(tmp_path / f"{name}.manifest.json"))["counts"] for name in ("one", "two-00000-of-00002", "two-00001-of-00002"))
    assert {k: two[0][k] + two[1][k] for k in ("prompts", "too_long", "responses")} == {k: one[k] for k in ("prompts", "too_long", "responses")} == {
        "prompts": 3, "too_long": 1, "responses": 6}


def test_a_gpu_that_is_held_is_waited_for_and_its_holder_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "nvidia-smi").write_text(f"""#!{sys.executable}
import os, sys
calls = os.path.join({str(tmp_path)!r}, "calls")
n = os.path.getsize(calls) if os.path.exists(calls) else 0
if "gpu=" in sys.argv[3]:
    open(calls, "a").write("x")
    print("3, GPU-a, " + ("80000" if n >= 2 else "1000") + ", 81000")
else:
    print("GPU-b, 1, 5, other")
    print("GPU-a, 4242, 79000, python train.py")
""")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    engines.wait_for_gpus("3", 0.9, patience=3, pause=1)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and told[0] == ("GPU 3: 1000 MiB are free, --gpu_memory=0.9 wants 72900; it is held by process 4242 (79000 MiB, python train.py); "
                                          "waiting, 3 s at most")
    (tmp_path / "calls").unlink()
    with pytest.raises(SystemExit, match="held by process 4242 .*; end that, or lower --gpu_memory"):
        engines.wait_for_gpus("3", 0.9, patience=1, pause=1)


def test_a_stop_text_ends_a_response_without_an_end_token_and_its_log_prob_is_that_of_its_ids(world):  # noqa: F811
    from transformers import AutoModelForCausalLM
    model = str(ROOT / "tiny/world/base")
    tokenizer, ends = chat.load_tokenizer(model)
    rows = prompts.read_prompts(str(ROOT / "tiny/world/prompts.jsonl"))[:12]
    ids = [chat.render(tokenizer, row["prompt"], "here") for row in rows]
    sample = engines.load_engine("transformers", model, ends, 600, dtype="float32", generate_rows=64, seed=0, tensor_parallel=1, gpu_memory=0.9)
    told = sample([(i, k) for k, i in enumerate(ids)], n_responses=2, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=24, stop=("e", "a"))
    policy = AutoModelForCausalLM.from_pretrained(model)
    for prompt, responses in zip(ids, told):
        for response, finished, logp in responses:
            text = tokenizer.decode(response, skip_special_tokens=True)
            assert finished and (set(text) & {"e", "a"} and not set(response) & ends or response[-1] in ends)
            logits = policy(torch.tensor([prompt + response])).logits.log_softmax(-1)[0, len(prompt) - 1:-1]
            assert abs(logits.gather(1, torch.tensor(response)[:, None]).sum().item() - logp) < 1e-3
    assert sum(not set(r) & ends for responses in told for r, *_ in responses) > 12


# ---------------------------------------------------------------------------------------------- new instructions


@pytest.mark.parametrize("reply, text", [
    (" Name three rivers.\n\n10. Next", "Name three rivers."), (" Name three rivers.\n10. Next one", "Name three rivers."), ("List:\n1. one\n2. two", "List:\n1. one\n2. two"),
    (" Add 2 and 3. Answer: 5", "Add 2 and 3."), ("Sum up the data: 1, 2", "Sum up the data: 1, 2"), ("Translate. Example: a. Output: b", "Translate. Example: a. Output: b"),
    ("Which?\nA: x\nB: y", "Which?\nA: x\nB: y"), ("Name one.\nA: x", "Name one."), ("What does vitamin A: do", "What does vitamin A: do"), ("Draw a cat", None), ("Describe the image", None), ("Imagine a filed claim", "Imagine a filed claim"), ("Write a program that adds", None), ("- a point", None),
    ("\u00dcbersetze das", None), ("   \n\n10.", None), ("Where do I go to vote?", None), ("KEEP the Case of Words", "KEEP the Case of Words")])
def test_the_head_of_a_reply_is_an_instruction_or_is_filtered(generate, reply, text):
    found = generate.instruction_of(reply)
    assert (None if not found or re.search(generate.instruction_unfit, found, re.IGNORECASE) else found) == text


def test_near_duplicates_are_known_and_others_are_not(generate):
    known = generate.Known(["Name three rivers of Europe and say how long each of them is.", "Hi"])
    assert "name three rivers of Europe, and say how long each of them is" in known and "Hi!" in known and "Name three rivers of Europe and say how long each is." not in known
    assert "Name three lakes of Africa and say how deep each of them is." not in known and "Hello" not in known
    known.add("Hello")
    assert "hello" in known


def test_the_filters_of_instructions_are_settings(generate, monkeypatch):
    known = generate.Known(["a b c d e f g h i j k l"])                 # ten shingles
    near = "a b c d e f g h i"                                          # seven of them
    assert near in known
    for value, found in ((0.71, False), (1.0, False), (0.0, False), (0.7, True)):
        monkeypatch.setattr(generate, "instruction_similarity", value)
        assert (near in known) is found and ("A b c d e f g h i j k l." in known) is (value > 0)
    assert generate.instruction_of("Add.\n5. more") == "Add.\n5. more"
    monkeypatch.setattr(generate, "instruction_examples", 3)
    assert generate.instruction_of("Add.\n5. more") == "Add."


def test_topics_share_the_pool_out(generate, monkeypatch):
    texts = [f"cook {w} soup with {w}" for w in ("bean", "leek", "corn")] * 3 + [f"paint {w} walls of {w}" for w in ("red", "blue", "green")] * 3
    assert generate.topics(texts) == [texts]
    monkeypatch.setattr(generate, "instruction_clusters", 2)
    groups = generate.topics(texts)
    assert len(groups) == 2 and sorted(sum(groups, [])) == sorted(texts) and all(len({t.split()[0] for t in g}) == 1 for g in groups)


@pytest.fixture(scope="session")
def writer(tmp_path_factory):
    """Folder of a small Llama that was taught to go on with a numbered list: three words, a blank line."""
    from transformers import AutoModelForCausalLM
    folder = str(build_model(tmp_path_factory.mktemp("writer") / "model", head_dim=32, max_position_embeddings=2048, initializer_range=0.02))
    tokenizer, _ = chat.load_tokenizer(folder)
    policy, draw = AutoModelForCausalLM.from_pretrained(folder), random.Random(0)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
    words = "name sing tell rivers songs towns of near about europe asia home".split()
    line = lambda n: " ".join(draw.choices(words, k=n)) + "."
    for step in range(260):                                             # spelling first, then after long lists
        rows = []
        for _ in range(8):
            items = range(1, 2 if step < 180 else draw.randint(4, 9))
            start = tokenizer("Tasks.\n" + "".join(f"\n{k}. {line(6)}" for k in items) + "\n9.", add_special_tokens=False).input_ids
            reply = tokenizer(f" {line(3)}\n\n", add_special_tokens=False).input_ids
            rows.append((start + reply, [-100] * len(start) + reply))
        ids, labels = (torch.nn.utils.rnn.pad_sequence([torch.tensor(r[k]) for r in rows], True, v) for k, v in ((0, tokenizer.pad_token_id), (1, -100)))
        loss = policy(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1                                                     # of a byte; 3 words of 12 are 7.5 nats in some 18 bytes
    policy.save_pretrained(folder)
    return folder


def pool(path, n=40):
    draw = random.Random(1)
    texts = [" ".join(draw.choices("name sing tell rivers songs towns of near about europe".split(), k=6)) + "." for _ in range(n)]
    path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    return texts


INSTRUCT = ("--task=instructions", "--engine=transformers", "--dtype=float32", "--max_new_tokens=48", "--iteration=1", "--instruction_temperature=1.0")


def test_new_instructions_are_distinct_from_each_other_and_from_the_pool(writer, generate, tmp_path):
    texts = pool(tmp_path / "pool.jsonl")
    done = run("generate.py", *INSTRUCT, f"--model={writer}", f"--prompts={tmp_path}/pool.jsonl", f"--out={tmp_path}/new.jsonl", "--n_prompts=30")
    assert done.returncode == 0, done.stderr
    made = [r["prompt"][0]["content"] for r in prompts.read_prompts(f"{tmp_path}/new.jsonl")]
    known = generate.Known(texts)
    for text in made:
        assert text not in known and "\n\n" not in text and not text.startswith("10")
        known.add(text)
    counts = json.load(open(tmp_path / "new.manifest.json"))["counts"]
    assert len(made) == 30 and counts["calls"] % 128 == 0 and counts["prompts"] == len(texts) and not os.path.exists(tmp_path / "new.jsonl.tmp")
    assert run("generate.py", *INSTRUCT, f"--model={writer}", f"--prompts={tmp_path}/pool.jsonl", f"--out={tmp_path}/again.jsonl", "--n_prompts=30").returncode == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "new.jsonl").read_bytes()


def test_processes_keep_apart_from_those_before_them(writer, generate, tmp_path):
    texts = pool(tmp_path / "pool.jsonl")
    asked = ("generate.py", *INSTRUCT, f"--model={writer}", f"--prompts={tmp_path}/pool.jsonl", f"--out={tmp_path}/two.jsonl", "--n_prompts=151")
    two = torchrun(2, *asked)
    assert two.returncode == 0, two.stderr
    rows, known = prompts.read_prompts(f"{tmp_path}/two.jsonl"), generate.Known(texts)
    for row in rows:
        assert row["prompt"][0]["content"] not in known
        known.add(row["prompt"][0]["content"])
    assert len(rows) == len({r["id"] for r in rows}) == 151
    second = tmp_path / "two-00001-of-00002.jsonl"                      # killed after the first process was done
    before = second.read_bytes()
    second.unlink()
    assert torchrun(2, *asked).returncode == 0 and second.read_bytes() == before
    second.unlink()
    done = run(*asked, "--seed=1", env={"RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == 1 and "two-00000-of-00002.jsonl: was made with another 'seed' (0, now 1)" in done.stderr and not second.exists()


def test_the_end_of_a_longer_talk_is_no_example_and_a_task_must_fit_its_template(writer, tmp_path):
    texts = pool(tmp_path / "pool.jsonl", 8)
    talk = [{"role": "user", "content": "sing."}, {"role": "assistant", "content": "la"}, {"role": "user", "content": "again."}]
    rows = [{"prompt": t} for t in texts[:7] + texts[:1]] + [{"prompt": talk}]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = run("generate.py", *INSTRUCT, f"--model={writer}", f"--prompts={tmp_path}/pool.jsonl", f"--out={tmp_path}/new.jsonl", "--n_prompts=4")
    assert done.returncode == 1 and "7 prompts that fit; a call shows 8" in done.stderr
    asked = ("generate.py", *INSTRUCT, f"--model={writer}", f"--prompts={tmp_path}/pool.jsonl", f"--out={tmp_path}/new.jsonl", "--n_prompts=12", "--instruction_examples=7")
    pool(tmp_path / "pool.jsonl")
    done = run(*asked, "--max_prompt_tokens=50")
    assert done.returncode == 0, done.stderr
    tokenizer, _ = chat.load_tokenizer(writer)
    longest = max(len(chat.render(tokenizer, r["prompt"], "here")) for r in prompts.read_prompts(f"{tmp_path}/new.jsonl"))
    assert longest <= 50


def test_a_policy_that_cannot_write_instructions_is_told_so_in_one_line(world, tmp_path):  # noqa: F811
    done = run("generate.py", "config/tiny.py", "--task=instructions", "--n_prompts=4", f"--out={tmp_path}/new.jsonl")
    assert done.returncode == 1 and "0 of 4 distinct instructions" in done.stderr and "1280 calls" in done.stderr and not os.path.exists(tmp_path / "new.jsonl")
    pool(tmp_path / "few.jsonl", 3)
    done = run("generate.py", "config/tiny.py", "--task=instructions", f"--prompts={tmp_path}/few.jsonl", "--n_prompts=4", f"--out={tmp_path}/new.jsonl")
    assert done.returncode == 1 and "3 prompts that fit; a call shows 8 of them" in done.stderr


def test_the_loop_writes_new_instructions_and_answers_those(writer, world, tmp_path):  # noqa: F811
    texts = pool(tmp_path / "pool.jsonl")
    done = subprocess.run(["bash", "iterate.sh", "config/tiny.py", f"--model={writer}", f"--prompts={tmp_path}/pool.jsonl", "--prompt_field=prompt", "--new_instructions=12",
                           "--n_prompts=3", "--iterations=1", "--eval_prompts=", "--max_new_tokens=40", "--n_responses=3", "--batch_size=4", f"--out={tmp_path}/run"],
                          cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    new, rows = ([r for _, r in files.read_records(f"{tmp_path}/run/iter_1/{name}.jsonl")] for name in ("prompts", "candidates"))
    assert len(new) == 12 and [r["id"] for r in new] == [r["id"] for r in rows] and not {r["prompt"][0]["content"] for r in new} & set(texts)
    assert (tmp_path / "run" / "iter_1" / "model" / "model.safetensors").exists()
