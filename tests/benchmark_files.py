"""What the tests of eval.py and of the benchmarks share: published data, small files, a grader.

from benchmark_files import ALPACA, Grader, published, read, score, write
"""

import collections
import csv
import gzip
import json
import math
import os
import random
import re
import threading

import pytest
from conftest import ROOT, run
from test_judge import KEY, Judge

from nanoaipo import files
from nanoaipo.benchmarks import BENCHMARKS

SHARED = ROOT.parent / "shared" / "data" / "eval"
ALPACA = SHARED / "alpaca_eval"
MT = SHARED / "mt_bench"
ARENA = SHARED / "arena_hard_v0.1"
published = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"{SHARED} is not there: published judgments were not scored"
)
JUDGED = ("gpt-3.5-turbo-1106", "FuseChat-Llama-3.1-8B-Instruct")  # on AlpacaEval's leaderboard


# ---- files ----


def write(path, rows):
    """Write rows as JSONL, as an array in a .json file, gzipped in a .gz; the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".json" in path.suffixes:
        text = json.dumps(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    content = text.encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return str(path)


def read(path):
    """The records of a JSONL file or a .json array."""
    return [row for _, row in files.read_records(str(path))]


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def names_in(folder):
    return set(os.listdir(folder))


def key_is_in_a_file(folder):
    """Whether the endpoint's key has leaked into any file of the folder."""
    return any(KEY in f.read_text() for f in folder.rglob("*") if f.is_file())


# ---- running ----


def score(bench, path, name="", answers="", lc_data="", baseline=""):
    """Scores of a file of judgments, in this process."""
    return BENCHMARKS[bench].score(
        str(path), name, answers=str(answers), lc_data=str(lc_data), baseline=str(baseline)
    )


def judge_by(url, tmp_path, bench, **settings):
    """The command that has a benchmark judged at an endpoint and scores it."""
    judgments = "j.json" if bench == "alpaca_eval" else "j.jsonl"
    arguments = {
        "bench": bench,
        "answers": tmp_path / "answers.json",
        "baseline": tmp_path / "baseline.json",
        "bench_data": tmp_path / "bench",
        "judge_model": "gpt-j",
        "judge_url": url,
        "judgments": tmp_path / judgments,
        "lc_data": tmp_path / "lc",
        "out": tmp_path / "score.json",
        "judge_concurrency": 8,
    }
    arguments |= settings
    return ["eval.py", *(f"--{key}={value}" for key, value in arguments.items() if value != "")]


def succeed(*command):
    """Run a command with the endpoint's key; its output when it exits 0 and never shows the key."""
    result = run(*command, env={"OPENAI_API_KEY": KEY})
    assert result.returncode == 0, result.stderr
    assert KEY not in result.stdout + result.stderr
    return result.stdout


# ---- a judge behind an endpoint ----


def no_trouble(server, handler):
    return False


class Grader(Judge):
    """An OpenAI-compatible endpoint that says what the test wants.

    say(messages) gives the reply, or (reply, {token: probability}). trouble(server, handler) may
    answer first; it returns whether it did. paid counts the questions that had a reply. who: the
    fields of a completion that tell which model answered.
    """

    def __init__(self, say, trouble=no_trouble, port=0):
        self.say = say
        self.trouble = trouble
        self.paid = collections.Counter()
        self.who = {"model": "x"}
        self.lock = threading.Lock()
        super().__init__(port, misbehave=Grader.grade)

    def grade(self, handler, text):
        if self.trouble(self, handler):
            return True
        reply = self.say(handler.body["messages"])
        top = {}
        if isinstance(reply, tuple):
            reply, top = reply

        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": reply},
        }
        if top and handler.body.get("logprobs"):
            token = {"token": reply, "logprob": 0.0, "bytes": None, "top_logprobs": top_list(top)}
            choice["logprobs"] = {"content": [token]}
        with self.lock:
            self.paid[json.dumps(handler.body["messages"])] += 1
        handler.reply(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "choices": [choice],
                **self.who,
                "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8},
            }
        )
        return True


def top_list(top):
    """{token: probability} as an endpoint has its top_logprobs."""
    return [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top.items()]


def longer_wins(messages):
    """AlpacaEval's judge: the longer of two answers is the better one, with log-probs."""
    shown = re.search(r"\nm: (.*)\|\nM: (.*)\|", messages[-1]["content"], re.DOTALL)
    if len(shown[1]) > len(shown[2]):
        return "m", {"m": 0.8, "M": 0.1}
    return "M", {"m": 0.1, "M": 0.8}


def longer_wins_in_words(messages):
    """The same judge without log-probs."""
    return longer_wins(messages)[0]


# ---- AlpacaEval ----

PROMPT = (
    "<|im_start|>system\nYou judge.\n<|im_end|>\n"
    "<|im_start|>user\nTask: {instruction}\nm: {output_1}|\nM: {output_2}|\n<|im_end|>"
)


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """An AlpacaEval of our own, whose judge likes length.

    (folder of the two tables, 60 annotated rows, difficulties of the 60 instructions)
    """
    folder = tmp_path_factory.mktemp("alpaca")
    rng = random.Random(0)
    difficulty = [rng.gauss(0, 1) for _ in range(60)]
    rows = []
    for k in range(60):
        row = {
            "instruction": f"task {k}",
            "output_1": "b" * 100,
            "output_2": "m" * (100 + rng.randint(-80, 160)),
            "generator_1": "base",
            "generator_2": "mine",
            "annotator": "a judge",
        }
        rows.append(row)
    for row, gamma in zip(rows, difficulty):
        longer = len(row["output_2"]) - 100
        row["preference"] = 1 + 1 / (1 + math.exp(-longer / 60 - gamma / 2 + rng.gauss(0, 1)))

    with open(folder / "df_gamed.csv", "w") as f:
        f.write("preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n")
        for _ in range(2):
            for k, gamma in enumerate(difficulty):
                f.write(f"{rng.random()},{k},{rng.gauss(0, 1)},{gamma},False,x\n")

    baseline = [
        {"instruction": row["instruction"], "output": row["output_1"], "generator": "base"}
        for row in rows
    ]
    write(folder / "alpaca_eval_gpt4_baseline.json", baseline)
    return folder, rows, difficulty


def alpaca_bench(alpaca, tmp_path, n=60):
    """Write what judging n answers takes, in the layout of a clone; return the answers' texts.

    Answer 0 is that of the baseline, answer 1 has placeholders in it.
    """
    folder, rows, _ = alpaca
    texts = [row["output_2"] for row in rows]
    texts[0] = rows[0]["output_1"]
    texts[1] = "{output_1} {instruction} " + "x" * 99
    answers = [
        {"instruction": row["instruction"], "output": text, "generator": "mine"}
        for row, text in zip(rows[:n], texts)
    ]
    write(tmp_path / "answers.json", answers[::-1])
    write(tmp_path / "baseline.json", read(folder / "alpaca_eval_gpt4_baseline.json"))

    configs = tmp_path / "bench" / "evaluators_configs"
    templates = {
        "alpaca_eval_clf_gpt4_turbo": PROMPT,
        "alpaca_eval_clf_cot_gpt4_turbo": "<|im_start|>user\nExplain.<|im_end|>",
    }
    for name, text in templates.items():
        os.makedirs(configs / name)
        (configs / name / "alpaca_eval_clf.txt").write_text(text)
    return texts[:n]


# ---- MT-Bench ----


def rating(question, turn, value, **other):
    """A record of MT-Bench's judgments."""
    row = {
        "question_id": question,
        "model": "m",
        "judge": ["gpt-4", "single-v1"],
        "user_prompt": "",
        "judgment": "",
        "score": value,
        "turn": turn,
        "tstamp": 86400.0,
    }
    return row | other


def model_answer(question_id, model_id, turns, **other):
    """A record of an answers file, as MT-Bench and Arena-Hard v0.1 have it."""
    choice = {"turns": turns} | other
    return {"question_id": question_id, "model_id": model_id, "choices": [choice]}


def mt_bench(tmp_path):
    """Write two questions in the layout of FastChat's data folder; the path of answers to them."""
    bench = tmp_path / "bench"
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["write {x}", "again"]},
        {"question_id": 111, "category": "math", "turns": ["1+1?", "2+2?"]},
    ]
    write(bench / "mt_bench" / "question.jsonl", questions)
    other = model_answer(1, "gpt-4", ["V1", "V2"])
    write(bench / "vicuna_bench" / "reference_answer" / "gpt-4.jsonl", [other])
    reference = model_answer(111, "gpt-4", ["R1", "R2"])
    write(bench / "mt_bench" / "reference_answer" / "gpt-4.jsonl", [reference])

    one = "Q {question}|A {answer}"
    two = "Q {question_1}, {question_2}|A {answer_1}, {answer_2}"
    templates = {
        "single-v1": one,
        "single-math-v1": one + "|R {ref_answer_1}",
        "single-v1-multi-turn": two,
        "single-math-v1-multi-turn": two + "|R {ref_answer_1}, {ref_answer_2}",
    }
    prompts = [
        {"name": name, "system_prompt": name.upper(), "prompt_template": text}
        for name, text in templates.items()
    ]
    write(bench / "judge_prompts.jsonl", prompts)

    answers = [
        model_answer(key, "mine", [f"{key} one {{answer}}", f"{key} two"], index=0)
        for key in (81, 111)
    ]
    return write(tmp_path / "answers.jsonl", answers)


# ---- Arena-Hard ----


def game(verdict):
    return {"user_prompt": "", "judgment": "", "score": verdict}


def arena(**games):
    """Records of Arena-Hard v0.1's judgments from the two verdicts on each question."""
    rows = []
    for question, verdicts in games.items():
        both = [game(verdict) for verdict in verdicts]
        rows.append({"question_id": question, "model": "m", "judge": "j", "games": both})
    return rows


ARENA_CONFIG = """\
temperature: 0
max_tokens: 99
system_prompt: "Judge."
prompt_template: ["{question_1}?\\nA: {answer_1}\\nB: {answer_2}"]
"""


def arena_bench(tmp_path, texts):
    """Write what judging answers takes, {question: text}, and return the settings that say so."""
    bench = tmp_path / "bench"
    (bench / "config").mkdir(parents=True)
    (bench / "config" / "judge_config.yaml").write_text(ARENA_CONFIG)
    questions = [{"question_id": key, "turns": [{"content": key}]} for key in texts]
    write(bench / "data" / "question.jsonl", questions)

    settings = {"lc_data": ""}
    for name in ("answers", "baseline"):
        rows = []
        for key, text in texts.items():
            turn = {"content": f"{name} {text}", "token_len": 8}
            rows.append(model_answer(key, name, [turn]))
        settings[name] = write(tmp_path / f"{name}.jsonl", rows)
    return settings
