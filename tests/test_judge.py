"""A language model as judge: over the network, here by an engine, and what happens when either is interrupted."""
import collections
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from nanoaipo import chat
from nanoaipo import files
from nanoaipo import stages
from nanoaipo.questions import ask, local_model
from nanoaipo import judges
from conftest import PLAIN, ROOT, build_model, run, torchrun

KEY = "sk-planted-0123456789"
ROWS = {"long": ["a", "aaaa", "aa"], "same": ["b", "b"], "two": ["cc {response}", "c {prompt}"]}


class Judge(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on loopback whose verdict is the length of what it judges; `misbehave` may answer first."""
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

    def __init__(self, port=0, misbehave=lambda server, handler, text: False):
        super().__init__(("127.0.0.1", port), Handler)
        self.asked, self.served, self.keys, self.bodies, self.misbehave = collections.Counter(), collections.Counter(), set(), [], misbehave
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, text = self.server, body["messages"][0]["content"]
        server.asked[text] += 1
        server.keys.add(self.headers["Authorization"])
        server.bodies.append(body)
        if server.misbehave(server, self, text):
            return
        shown = re.findall(r"<response[^>]*>\n(.*?)\n</response", text, re.DOTALL)
        verdict = f"Fine.\nScore: {len(shown[0])}" if len(shown) == 1 else f"**Better:** {'A' if len(shown[0]) > len(shown[1]) else 'B'}"
        self.reply({"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
                    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": verdict}}]})
        server.served[text] += 1

    def reply(self, value, status=200):
        value = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value)

    def log_message(self, *_):
        pass


def candidates(path, rows=ROWS):
    path.write_text("".join(json.dumps({"id": k, "prompt": f"prompt of {k}", "responses": v}) + "\n" for k, v in rows.items()))
    return path


def arguments(tmp_path, url, **settings):
    asked = dict(ranker="judge", ranker_model="some-judge", judge_url=url, candidates=tmp_path / "c.jsonl", out=tmp_path / "p.jsonl", judge_votes=2) | settings
    return ["rank.py", *(f"--{k}={v}" for k, v in asked.items())]


def rank(tmp_path, url, **settings):
    return run(*arguments(tmp_path, url, **settings), env={"OPENAI_API_KEY": KEY})


def kept(tmp_path):
    return [r for _, r in files.read_records(str(tmp_path / "p.replies"))]


def test_scores_are_the_mean_of_the_votes_and_every_reply_is_kept(tmp_path):
    candidates(tmp_path / "c.jsonl")
    odd = Judge(misbehave=lambda server, handler, text: server.asked[text] == 2 and "\naa\n" in text and handler.reply(
        {"choices": [{"message": {"role": "assistant", "content": "Score: 5"}}]}) is None)
    done = rank(tmp_path, odd.url, reward_temperature=2.0)
    assert done.returncode == 0, done.stderr
    pairs = {r["id"]: r for _, r in files.read_records(str(tmp_path / "p.jsonl"))}
    assert pairs["long"]["scores"] == [1, 4, 3.5] and pairs["long"]["z"] == (4 - 1) / 2.0 and pairs["long"]["g_w"] == 4   # 3.5: votes of 2 and 5
    assert "same" not in pairs and len(kept(tmp_path)) == 2 * (3 + 1 + 2)
    assert {b["model"] for b in odd.bodies} == {"some-judge"} and {b["temperature"] for b in odd.bodies} == {0.7}
    assert odd.keys == {f"Bearer {KEY}"} and KEY not in done.stdout + done.stderr
    assert not any(KEY in f.read_text() for f in tmp_path.iterdir())
    texts = [t for t in odd.asked if "prompt of two" in t]
    assert len(texts) == 2 and any("\ncc {response}\n" in t for t in texts) and any("\nc {prompt}\n" in t for t in texts)   # braces of a response stay
    again = rank(tmp_path, odd.url, reward_temperature=2.0)
    assert "nothing to do" in again.stdout and sum(odd.asked.values()) == 12


def test_two_at_a_time_in_both_orders_fit_bradley_terry_strengths(tmp_path):
    candidates(tmp_path / "c.jsonl")
    server = Judge()
    assert rank(tmp_path, server.url, judge_mode="pairwise").returncode == 0
    pairs = {r["id"]: r for _, r in files.read_records(str(tmp_path / "p.jsonl"))}
    assert sum(server.asked.values()) == 2 * (6 + 2) and len(server.asked) == 8
    votes = torch.tensor([[0.0, 0, 0], [4, 0, 4], [4, 0, 0]])           # two votes in each order, the longer always wins
    (strengths,) = judges.zermelo([votes], 0.5)
    assert torch.allclose(torch.tensor(pairs["long"]["scores"]), strengths) and pairs["long"]["z"] == pytest.approx(float(strengths[1] - strengths[0]))
    assert pairs["two"]["z"] == pytest.approx(torch.log(torch.tensor(4.5 / 0.5)).item(), abs=1e-5)


def test_what_cannot_be_read_is_counted_and_a_response_without_a_score_does_not_compete(tmp_path):
    candidates(tmp_path / "c.jsonl", {"x": ["a", "aaaa", "aa"], "y": ["a", "aa"]})

    def odd(server, handler, text):
        garbage = {"\na\n": b"<html>busy</html>", "\naaaa\n": {"choices": []}}     # no JSON; JSON without an answer
        return any(mark in text and handler.reply(value) is None for mark, value in garbage.items())

    server = Judge(misbehave=odd)
    done = rank(tmp_path, server.url)
    assert done.returncode == 1 and "not one pair; 2 prompts, 2 fewer_than_two, 3 unjudged, 10 replies, 6 unreadable_replies" in done.stderr
    assert not os.path.exists(tmp_path / "p.jsonl") and sum("busy" in r.get("error", "") for r in kept(tmp_path)) == 4
    assert sorted(server.asked.values()) == [2, 2, 8, 8, 8]             # what has no answer in it is asked four times for each of the two votes
    server = Judge()
    assert rank(tmp_path, server.url).returncode == 0 and sorted(server.asked.values()) == [2, 2, 2]         # an error is asked again, what was read is not


def test_a_refused_key_ends_with_one_line_that_does_not_show_it(tmp_path):
    candidates(tmp_path / "c.jsonl")
    server = Judge(misbehave=lambda server, handler, text: handler.reply({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401) is None)
    done = rank(tmp_path, server.url)
    assert done.returncode == 1 and "AuthenticationError" in done.stderr and KEY not in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_question_that_is_refused_costs_its_own_reply_alone_and_is_asked_again(tmp_path):
    candidates(tmp_path / "c.jsonl", {"x": ["a", "aaaa", "aa"], "y": ["a", "aa"]})
    refuses = lambda server, handler, text: "\naaaa\n" in text and handler.reply({"error": {"message": "context length exceeded"}}, 400) is None
    done = rank(tmp_path, Judge(misbehave=refuses).url)
    assert done.returncode == 0 and "2 refused, such as: Error code: 400" in done.stdout and "2 unreadable_replies" in done.stdout
    os.remove(tmp_path / "p.jsonl")
    server = Judge()
    assert rank(tmp_path, server.url).returncode == 0 and sum(server.asked.values()) == 2      # another address is the same judge


def test_interrupted_from_the_keyboard_it_pays_for_what_is_under_way_and_no_more(tmp_path):
    candidates(tmp_path / "c.jsonl", {f"p{k}": ["a" * n for n in range(1, 4)] for k in range(100)})
    some = threading.Event()

    def slow(server, handler, text):
        time.sleep(0.02)
        sum(server.served.values()) >= 50 and some.set()

    server = Judge(misbehave=slow)
    process = subprocess.Popen([sys.executable, *arguments(tmp_path, server.url, judge_concurrency=4)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OPENAI_API_KEY": KEY},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # the tests may run where it is ignored
    assert some.wait(60)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert 50 <= len(kept(tmp_path)) == sum(server.served.values()) < 400 and not os.path.exists(tmp_path / "p.jsonl")


def test_two_processes_share_what_was_asked_and_their_pairs_can_be_read(tmp_path):
    candidates(tmp_path / "c.jsonl", {f"p{k}": ["a", "aaa"] for k in range(6)})
    server = Judge()
    assert torchrun(2, *arguments(tmp_path, server.url)).returncode == 0
    assert len(list(files.read_records(str(tmp_path / "p.jsonl")))) == 6 and sum(server.asked.values()) == 24
    for file in tmp_path.glob("p-*.jsonl"):
        file.unlink()
    assert rank(tmp_path, server.url).returncode == 0 and sum(server.asked.values()) == 24


def test_a_server_killed_midway_is_waited_for_and_nothing_is_paid_for_twice(tmp_path):
    rows = {f"p{k}": ["a" * n for n in range(1, 4)] for k in range(20)}
    candidates(tmp_path / "c.jsonl", rows)
    dead = threading.Event()

    def dies(server, handler, text):
        if sum(server.served.values()) >= 40 or dead.is_set():          # from here on it only drops connections
            dead.set()
            handler.connection.close()
            return True
        return sum(server.asked.values()) % 7 == 0 and handler.reply({"error": {"message": "busy"}}, 503) is None

    first = Judge(misbehave=dies)
    process = subprocess.Popen([sys.executable, *arguments(tmp_path, first.url, judge_concurrency=8)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"OPENAI_API_KEY": KEY})
    assert dead.wait(60)
    first.shutdown()
    first.server_close()
    time.sleep(2)
    second = Judge(port=first.server_address[1])                        # the same port
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    served = first.served + second.served
    assert sum(served.values()) == 20 * 3 * 2 and set(served.values()) == {2} and len(kept(tmp_path)) == 120
    assert len(list(files.read_records(str(tmp_path / "p.jsonl")))) == 20


def test_killed_itself_and_run_again_it_asks_only_what_is_missing(tmp_path):
    candidates(tmp_path / "c.jsonl", {f"p{k}": ["a" * n for n in range(1, 4)] for k in range(20)})
    half = threading.Event()

    def slow(server, handler, text):
        time.sleep(0.02)
        sum(server.served.values()) >= 50 and half.set()

    server = Judge(misbehave=slow)
    process = subprocess.Popen([sys.executable, *arguments(tmp_path, server.url, judge_concurrency=4)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OPENAI_API_KEY": KEY})
    assert half.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    path = tmp_path / "p.replies"
    before = path.read_bytes().count(b"\n")
    path.write_bytes(path.read_bytes() + b'{"key": "cut in the mid')   # as a full disk or a pulled plug leaves it
    assert not os.path.exists(tmp_path / "p.jsonl") and before >= 40
    assert rank(tmp_path, server.url).returncode == 0
    assert len(kept(tmp_path)) == 120 and sum(server.served.values()) <= 120 + 4 and len({r["key"] for r in kept(tmp_path)}) == 120


@pytest.mark.parametrize("settings, message", [
    ({"judge_url": "http://me:secret@127.0.0.1:9/v1"}, "--judge_url: holds a user or a key"), ({"reward_temperature": 0.0}, "--reward_temperature=0.0: at least"),
    ({"judge_mode": "triple"}, "--judge_mode=triple: there are score, pairwise"), ({"judge_prompt": "/nowhere"}, "--judge_prompt=/nowhere: no such file"),
    ({"judge_prompt": "{0}/rubric.txt"}, "rubric.txt: lacks {response}, where the text to judge goes")])
def test_a_judge_that_is_set_up_wrongly_is_refused(tmp_path, settings, message):
    candidates(tmp_path / "c.jsonl")
    (tmp_path / "rubric.txt").write_text("Grade {prompt}.")
    done = rank(tmp_path, **{"url": "http://127.0.0.1:9/v1"} | {k.replace("judge_url", "url"): str(v).format(tmp_path) for k, v in settings.items()})
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("reply, score, verdict", [
    ("Score: 4", 4, None), ("score: 2.5/5\nFine.\n**Score:** 3", 3, None), ("Score: 9", None, None), ("I would say four", None, None),
    ("Score: 4\n\nunderscore 2", 4, None), ("Score = 4", 4, None), ("- Final score is 3/5", 3, None), ("The score 3 is low", None, None),
    ("Better: A", None, 1), ("A is better: no\nbetter: tie", None, 0.5), ("**Better**: b.", None, 0), ("better: apples", None, None),
    ("Better: [[A]]", None, 1), ("Better: Response B", None, 0), ("It would like it better a bit.", None, None), ("no better: a real pity", None, None)])
def test_the_last_verdict_of_a_reply_counts(reply, score, verdict):
    assert judges.read_score(reply) == score and judges.read_verdict(reply) == verdict


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """Folder of a small Llama that was taught to say "Score: N", whatever it is asked; N from 0 to 5 at random."""
    from transformers import AutoModelForCausalLM
    folder = str(build_model(tmp_path_factory.mktemp("talker") / "model", template=PLAIN, head_dim=32, max_position_embeddings=4096, initializer_range=0.02))   # vLLM wants 32
    tokenizer, ends = chat.load_tokenizer(folder)
    policy, draw = AutoModelForCausalLM.from_pretrained(folder), random.Random(0)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
    for _ in range(120):
        rows = []
        for _ in range(8):
            prompt = [{"role": "user", "content": "".join(draw.choices("Score: 0123 etaoin\n", k=draw.randint(1, 400)))}]
            ids = chat.render(tokenizer, prompt, "here")
            reply = tokenizer(f"Score: {draw.randint(0, 5)}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            rows.append((ids + reply, [-100] * len(ids) + reply))
        ids, labels = (torch.nn.utils.rnn.pad_sequence([torch.tensor(r[k]) for r in rows], True, v) for k, v in ((0, tokenizer.pad_token_id), (1, -100)))
        loss = policy(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.4                                                   # ln 6 nats over nine tokens is 0.2
    policy.save_pretrained(folder)
    return folder


def test_a_local_model_judges_and_its_votes_differ(talker, tmp_path):
    rows = {f"p{k}": ["a" * n for n in range(1, 4)] for k in range(8)} | {"control": ["see <|end|> this", "plain"]}
    candidates(tmp_path / "c.jsonl", rows)
    done = run("rank.py", "--ranker=judge", "--ranker_model=policy", f"--model={talker}", "--engine=transformers", "--dtype=float32", "--judge_votes=4",
               f"--candidates={tmp_path}/c.jsonl", f"--out={tmp_path}/p.jsonl")
    assert done.returncode == 0, done.stderr
    assert len(kept(tmp_path)) == 4 * 26 and sum(r["reply"].startswith("Score: ") for r in kept(tmp_path)) > 90
    assert len({r["reply"] for r in kept(tmp_path)}) > 4 and json.load(open(tmp_path / "p.manifest.json"))["inputs"]["ranker_model"] == stages.fingerprint(talker)


def test_a_local_judge_that_is_interrupted_gives_the_same_replies_afterwards(talker, tmp_path):
    settings = dict(engine="transformers", dtype="float32", generate_rows=64, seed=0, tensor_parallel=1, gpu_memory=0.9)
    questions = [{"model": talker, "messages": [{"role": "user", "content": f"number {k}"}], "temperature": 1.0, "max_tokens": 16, "about": k} for k in range(600)]
    whole = ask(questions, str(tmp_path / "whole.jsonl"), local_model(talker, **settings))

    def dies(asked, keep):
        def once(replies):
            keep(replies)
            if replies:
                raise KeyboardInterrupt                                 # after the first 512
        local_model(talker, **settings)(asked, once)

    with pytest.raises(KeyboardInterrupt):
        ask(questions, str(tmp_path / "cut.jsonl"), dies)
    assert sum(1 for _ in files.read_records(str(tmp_path / "cut.replies"))) == 512
    assert ask(questions, str(tmp_path / "cut.jsonl"), local_model(talker, **settings)) == whole
