"""New instructions: what is read out of a reply, near-duplicates, rounds, and several processes."""

import json
import os
import random
import subprocess

import pytest
import torch
from conftest import ROOT, build_model, run, torchrun, warm_environment
from test_loop import world  # noqa: F401 (a fixture)

import generate
from nanoaipo import chat, files, prompts
from nanoaipo.instruct import NearDuplicateFinder, compile_unfit, instruction_of

INSTRUCT = (
    "--task=instructions",
    "--engine=transformers",
    "--dtype=float32",
    "--max_new_tokens=48",
    "--iteration=1",
    "--instruction_temperature=1.0",
)
POOL_WORDS = "name sing tell rivers songs towns of near about europe".split()
WRITER_WORDS = "name sing tell rivers songs towns of near about europe asia home".split()


# -------------------------------------------------------------------------------- parts of the task


@pytest.mark.parametrize(
    "reply, text",
    [
        (" Name three rivers.\n\n10. Next", "Name three rivers."),
        (" Name three rivers.\n10. Next one", "Name three rivers."),
        ("List:\n1. one\n2. two", "List:\n1. one\n2. two"),
        (" Add 2 and 3. Answer: 5", "Add 2 and 3."),
        ("Sum up the data: 1, 2", "Sum up the data: 1, 2"),
        ("Translate. Example: a. Output: b", "Translate. Example: a. Output: b"),
        ("Which?\nA: x\nB: y", "Which?\nA: x\nB: y"),
        ("Name one.\nA: x", "Name one."),
        ("What does vitamin A: do", "What does vitamin A: do"),
        ("Draw a cat", None),
        ("Describe the image", None),
        ("Imagine a filed claim", "Imagine a filed claim"),
        ("Write a program that adds", None),
        ("- a point", None),
        ("\u00dcbersetze das", None),
        ("   \n\n10.", None),
        ("Where do I go to vote?", None),
        ("KEEP the Case of Words", "KEEP the Case of Words"),
    ],
)
def test_the_head_of_a_reply_is_an_instruction_or_is_filtered(reply, text):
    unfit = compile_unfit(generate.instruction_unfit)

    found = instruction_of(reply, n_examples=8)

    if text is None:
        assert not found or unfit.search(found)
    else:
        assert found == text
        assert not unfit.search(found)


def test_near_duplicates_are_known_and_others_are_not():
    rivers = "Name three rivers of Europe and say how long each of them is."
    finder = NearDuplicateFinder(0.7, [rivers, "Hi"])

    for near in ("name three rivers of Europe, and say how long each of them is", "Hi!"):
        assert finder.is_near_duplicate(near)
    for other in (
        "Name three rivers of Europe and say how long each is.",
        "Name three lakes of Africa and say how deep each of them is.",
        "Hello",
    ):
        assert not finder.is_near_duplicate(other)

    finder.add("Hello")
    assert finder.is_near_duplicate("hello")


@pytest.mark.parametrize(
    "similarity, is_near", [(0.7, True), (0.71, False), (1.0, False), (0.0, False)]
)
def test_the_filters_of_instructions_are_settings(similarity, is_near):
    assert generate.instruction_similarity == 0.7
    finder = NearDuplicateFinder(similarity, ["a b c d e f g h i j k l"])  # ten shingles

    assert finder.is_near_duplicate("a b c d e f g h i") is is_near  # seven of them
    assert finder.is_near_duplicate("A b c d e f g h i j k l.") is (similarity > 0)


def test_an_instruction_ends_where_the_number_behind_its_own_begins():
    assert instruction_of("Add.\n5. more", n_examples=8) == "Add.\n5. more"
    assert instruction_of("Add.\n5. more", n_examples=3) == "Add."


# --------------------------------------------------------------------------------- a small policy


def sentence(rng, words, n):
    return " ".join(rng.choices(words, k=n)) + "."


def pool(path, n=40):
    """Write n prompts of six words; their texts."""
    rng = random.Random(1)
    texts = [sentence(rng, POOL_WORDS, 6) for _ in range(n)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return texts


@pytest.fixture(scope="session")
def writer(tmp_path_factory):
    """Folder of a small Llama taught to go on with a numbered list: three words, a blank line."""
    from transformers import AutoModelForCausalLM

    folder = build_model(
        tmp_path_factory.mktemp("writer") / "model",
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.02,
    )
    folder = str(folder)
    tokenizer, _ = chat.load_tokenizer(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
    rng = random.Random(0)

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    for step in range(260):
        # spelling first, after one item, then after long lists
        ids = []
        labels = []
        for _ in range(8):
            n_items = 1 if step < 180 else rng.randint(4, 9) - 1
            text = "Tasks.\n"
            for k in range(1, n_items + 1):
                text += f"\n{k}. {sentence(rng, WRITER_WORDS, 6)}"
            start = encode(text + "\n9.")
            reply = encode(f" {sentence(rng, WRITER_WORDS, 3)}\n\n")
            ids.append(torch.tensor(start + reply))
            labels.append(torch.tensor([-100] * len(start) + reply))

        pad = torch.nn.utils.rnn.pad_sequence
        loss = policy(
            input_ids=pad(ids, True, tokenizer.pad_token_id),  # (B, T)
            labels=pad(labels, True, -100),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # of a byte; three words of twelve are 7.5 nats in some 18 bytes
    assert loss < 1
    policy.save_pretrained(folder)
    return folder


def instruct_command(writer, folder, name):
    """The arguments that write new instructions after folder/pool.jsonl's into NAME.jsonl."""
    return (
        "generate.py",
        *INSTRUCT,
        f"--model={writer}",
        f"--prompts={folder}/pool.jsonl",
        f"--out={folder}/{name}.jsonl",
    )


def assert_all_distinct(texts, pool_texts):
    """No text is a near-duplicate of the pool's or of one before it."""
    finder = NearDuplicateFinder(generate.instruction_similarity, pool_texts)
    for text in texts:
        assert not finder.is_near_duplicate(text)
        finder.add(text)


# ----------------------------------------------------------------------------------- the whole task


def test_new_instructions_are_distinct_from_each_other_and_from_the_pool(writer, tmp_path):
    pool_texts = pool(tmp_path / "pool.jsonl")

    done = run(*instruct_command(writer, tmp_path, "new"), "--n_prompts=30")

    assert done.returncode == 0, done.stderr
    rows = prompts.read_prompts(f"{tmp_path}/new.jsonl")
    texts = [row["prompt"][0]["content"] for row in rows]
    assert len(texts) == 30
    assert_all_distinct(texts, pool_texts)
    for text in texts:
        assert "\n\n" not in text
        assert not text.startswith("10")

    counts = json.loads((tmp_path / "new.manifest.json").read_text())["counts"]
    assert counts["calls"] % 16 == 0
    assert counts["prompts"] == len(pool_texts)
    assert not os.path.exists(tmp_path / "new.jsonl.tmp")

    again = run(*instruct_command(writer, tmp_path, "again"), "--n_prompts=30")
    assert again.returncode == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "new.jsonl").read_bytes()


def test_processes_keep_apart_from_those_before_them(writer, tmp_path):
    pool_texts = pool(tmp_path / "pool.jsonl")
    command = (*instruct_command(writer, tmp_path, "two"), "--n_prompts=151")

    two = torchrun(2, *command)

    assert two.returncode == 0, two.stderr
    rows = prompts.read_prompts(f"{tmp_path}/two.jsonl")
    assert len(rows) == 151
    assert len({row["id"] for row in rows}) == 151
    assert_all_distinct([row["prompt"][0]["content"] for row in rows], pool_texts)

    # killed after the first process was done
    second = tmp_path / "two-00001-of-00002.jsonl"
    before = second.read_bytes()
    second.unlink()
    assert torchrun(2, *command).returncode == 0
    assert second.read_bytes() == before

    # of another run than the first process
    second.unlink()
    done = run(*command, "--seed=1", env={"RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == 1
    message = "two-00000-of-00002.jsonl: was made with another 'seed' (0, now 1)"
    assert message in done.stderr
    assert not second.exists()


def test_the_end_of_a_longer_talk_is_no_example_and_a_task_must_fit_its_template(writer, tmp_path):
    texts = pool(tmp_path / "pool.jsonl", 8)
    conversation = [
        {"role": "user", "content": "sing."},
        {"role": "assistant", "content": "la"},
        {"role": "user", "content": "again."},
    ]
    rows = [{"prompt": text} for text in texts[:7] + texts[:1]] + [{"prompt": conversation}]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    done = run(*instruct_command(writer, tmp_path, "new"), "--n_prompts=4")
    assert done.returncode == 1
    assert "7 prompts that fit; a call shows 8" in done.stderr

    pool(tmp_path / "pool.jsonl")
    done = run(
        *instruct_command(writer, tmp_path, "new"),
        "--n_prompts=12",
        "--instruction_examples=7",
        "--max_prompt_tokens=50",
    )
    assert done.returncode == 0, done.stderr
    tokenizer, _ = chat.load_tokenizer(writer)
    rows = prompts.read_prompts(f"{tmp_path}/new.jsonl")
    assert max(len(chat.render(tokenizer, row["prompt"], "here")) for row in rows) <= 50


def test_a_policy_that_cannot_write_instructions_is_told_so_in_one_line(world, tmp_path):
    command = (
        "generate.py",
        "config/tiny.py",
        "--task=instructions",
        "--n_prompts=4",
        f"--out={tmp_path}/new.jsonl",
    )

    done = run(*command)
    assert done.returncode == 1
    assert "0 of 4 distinct instructions" in done.stderr
    assert "1392 calls" in done.stderr
    assert not os.path.exists(tmp_path / "new.jsonl")

    pool(tmp_path / "few.jsonl", 3)
    done = run(*command, f"--prompts={tmp_path}/few.jsonl")
    assert done.returncode == 1
    assert "3 prompts that fit; a call shows 8 of them" in done.stderr


def test_the_loop_writes_new_instructions_and_answers_those(writer, world, tmp_path):
    texts = pool(tmp_path / "pool.jsonl")

    done = subprocess.run(
        [
            "bash",
            "iterate.sh",
            "config/tiny.py",
            f"--model={writer}",
            f"--prompts={tmp_path}/pool.jsonl",
            "--prompt_field=prompt",
            "--new_instructions=12",
            "--n_prompts=3",
            "--iterations=1",
            "--eval_prompts=",
            "--max_new_tokens=40",
            "--n_responses=3",
            "--batch_size=4",
            f"--out={tmp_path}/run",
        ],
        cwd=ROOT,
        env=warm_environment(),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    iteration_dir = tmp_path / "run" / "iter_1"
    new = [row for _, row in files.read_records(f"{iteration_dir}/prompts.jsonl")]
    candidates = [row for _, row in files.read_records(f"{iteration_dir}/candidates.jsonl")]
    assert len(new) == 12
    assert [row["id"] for row in new] == [row["id"] for row in candidates]
    assert not {row["prompt"][0]["content"] for row in new} & set(texts)
    assert (iteration_dir / "model" / "model.safetensors").exists()
