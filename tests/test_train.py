"""train.py: against TRL and transformers, one process against several, its log, its restarts."""

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from array import array

import pytest
import torch
from conftest import CHATML, PLAIN, ROOT, build_model, run, torchrun, write_pairs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rank
import train as train_script
from nanoaipo import chat, packing, stages
from nanoaipo.errors import InputError
from nanoaipo.packing import pack
from nanoaipo.pairs import read_pairs
from nanoaipo.transformers_engine import TransformersEngine

FLOAT32 = {"dtype": "float32", "recompute": 0, "shuffle": False}
DPO = {"loss": "dpo", **FLOAT32}


def read_lines(path):
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(out):
    """What a run has logged."""
    return read_lines(out / "metrics.jsonl")


def values(records, key):
    """One number of each record."""
    return [record[key] for record in records]


def train(out, processes=1, **settings):
    """The metrics and the weights of a run that has to succeed; DPO in float32 and in file order
    unless set otherwise."""
    settings = {**DPO, **settings, "out": out}
    if processes > 1:
        done = torchrun(processes, "train.py", **settings)
    else:
        done = run("train.py", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(out), load_file(out / "model.safetensors")


def apart(a, b):
    """The largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


def start_weights(settings):
    """The weights of the model that a run with these settings starts from."""
    return load_file(settings["model"] / "model.safetensors")


def assert_same_steps(one, other):
    """Losses and gradient norms agree: AdamW alone would forgive a wrong scale of the gradient."""
    for a, b in zip(one, other):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def response_logp(lm, prompt_ids, response_ids):
    """Log-probs (L, V) by plain transformers, where the tokens of the response are predicted."""
    logits = lm(torch.tensor([prompt_ids + response_ids])).logits
    return logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Seven pairs: batches of three leave a last one of a single pair, too few for two."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(path, 7)
    return str(path)


@pytest.fixture(scope="module")
def plain_run(tiny_model, pairs, tmp_path_factory):
    """(folder, settings, metrics, weights) of one process over two epochs of the seven pairs.

    Several tests compare with it.
    """
    settings = {"model": tiny_model, "pairs": pairs, "batch_size": 3, "epochs": 2, "lr": 1e-3}
    out = tmp_path_factory.mktemp("plain") / "model"
    logged, weights = train(out, **settings)
    return out, settings, logged, weights


# ---------------------------------------------------------------------------- against TRL

TRL_NAMES = {  # ours: TRL's
    "loss": "loss",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "logp_chosen": "logps/chosen",
    "grad_norm": "grad_norm",
}


@pytest.mark.parametrize(
    "template, ld_alpha",
    [(PLAIN, 1.0), (CHATML, 1.0), (CHATML, 0.5)],
    ids=["plain", "chatml", "ld_dpo"],
)
def test_eight_steps_of_dpo_log_the_losses_and_rewards_of_trl(
    template, ld_alpha, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    model = build_model(tmp_path / "model", template=template)
    records = write_pairs(tmp_path / "pairs.jsonl", 32, seed=1)

    ours, _ = train(
        tmp_path / "ours",
        model=model,
        pairs=tmp_path / "pairs.jsonl",
        batch_size=4,
        lr=5e-4,
        tokens_per_microbatch=256,
        ld_alpha=ld_alpha,
    )

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.1,
        ld_alpha=None if ld_alpha == 1 else ld_alpha,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=1.0,
        weight_decay=0.0,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
    )
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=datasets.Dataset.from_list(records),
    )
    trainer.train()
    theirs = [r for r in trainer.state.log_history if "loss" in r]

    assert len(ours) == len(theirs) == 8
    # the policy has moved, or the comparison would be empty
    assert max(abs(r["reward_chosen"]) for r in ours) > 0.05
    for our_step, their_step in zip(ours, theirs):
        assert our_step["lr"] == pytest.approx(their_step["learning_rate"], abs=1e-9)
        for name, their_name in TRL_NAMES.items():
            expected = pytest.approx(their_step[their_name], abs=1e-4, rel=1e-6)
            assert our_step[name] == expected, (our_step["step"], name)


# ---------------------------------------------------------------------------- processes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_processes_give_the_weights_of_one_when_the_pairs_do_not_divide(
    tied, tiny_model, pairs, plain_run, tmp_path
):
    _, settings, one, weights = plain_run
    if tied:
        model = build_model(tmp_path / "tied", tie_word_embeddings=True, vocab_size=263)
        settings = settings | {"model": model}
        one, weights = train(tmp_path / "one", **settings)

    two, weights_two = train(tmp_path / "two", processes=2, **settings)

    # the last batch leaves one process without a pair
    assert values(two, "pairs") == [3, 3, 1] * 2
    assert apart(weights_two, weights) < 1e-5
    assert apart(weights, start_weights(settings)) > 1e-3
    assert ("lm_head.weight" in weights) is not tied
    assert_same_steps(one, two)


def test_many_small_microbatches_give_the_weights_of_one_large(plain_run, tmp_path):
    _, settings, large, weights = plain_run

    small, weights_small = train(tmp_path / "small", **settings, tokens_per_microbatch=1)

    assert apart(weights_small, weights) < 1e-5
    assert_same_steps(large, small)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_plan_deals_every_pair_once_within_budget_and_to_all_processes_alike(world_size):
    rng = random.Random(world_size)
    for _ in range(100):
        n_pairs = rng.randint(1, 60)
        lengths = [max(3, round(rng.lognormvariate(4, 1))) for _ in range(n_pairs)]
        order = rng.sample(range(n_pairs), n_pairs)
        batch_size = rng.randint(1, 20)
        budget = rng.choice([1, 100, 400, 10**6])

        steps = packing.plan(lengths, order, batch_size, world_size, budget)

        assert len(steps) == math.ceil(n_pairs / batch_size)
        for n, micro_batches in enumerate(steps):
            batch = order[n * batch_size : (n + 1) * batch_size]
            dealt = []
            for micro_batch in micro_batches:
                assert len(micro_batch) == world_size
                for indices in micro_batch:
                    n_tokens = sum(lengths[i] for i in indices)
                    assert n_tokens <= budget or len(indices) == 1
                    dealt += indices
            assert sorted(dealt) == sorted(batch)


def test_a_plan_has_no_rounds_without_pairs_when_the_budget_is_below_a_pair():
    steps = packing.plan([400] * 7, range(7), 4, 2, 100)

    assert [len(micro_batches) for micro_batches in steps] == [2, 2]
    assert packing.plan([900, 10], [0, 1], 2, 1, 100) == [[[[0]], [[1]]]]


@pytest.mark.parametrize("kernel", ["packed_sdpa", "padded"])
def test_the_tokens_that_are_planned_for_a_pair_are_those_of_its_rows(kernel, tiny_model, pairs):
    records, _ = read_pairs(pairs, *chat.load_tokenizer(tiny_model), 2560)

    planned = packing.tokens_of_pairs(records, padded=kernel == "padded")

    for record, n_tokens in zip(records, planned):
        row, *_ = pack([record], kernel)
        assert row["input_ids"].numel() == n_tokens


@pytest.mark.parametrize("layout", [(2, 1), (4, 2)], ids=["2-copies", "2-copies-of-2-shards"])
def test_copies_of_the_weights_give_the_weights_of_one_process(layout, plain_run, tmp_path):
    processes, shard_size = layout
    _, settings, one, weights = plain_run

    many, weights_many = train(
        tmp_path / "many", processes=processes, shard_size=shard_size, **settings
    )

    assert apart(weights_many, weights) < 1e-5
    assert_same_steps(one, many)


def test_two_processes_train_the_adapters_of_one_and_nothing_else_moves(
    tiny_model, plain_run, tmp_path
):
    settings = plain_run[1] | {"lora_rank": 4, "lr": 1e-2}

    one, weights = train(tmp_path / "one", **settings)
    two, weights_two = train(tmp_path / "two", processes=2, **settings)

    assert apart(weights, weights_two) < 1e-5
    assert values(one, "loss") == pytest.approx(values(two, "loss"), abs=1e-5)
    assert one[-1]["loss"] < one[0]["loss"] - 0.1

    start = load_file(tiny_model / "model.safetensors")
    moved = {key for key in start if not torch.equal(start[key], weights[key])}
    assert moved == {key for key in start if key.endswith("_proj.weight")}

    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    for key, parameter in lm.named_parameters():
        assert torch.equal(parameter, weights[key])
    assert lm(torch.arange(6, 100)[None]).logits.isfinite().all()


def test_compiled_layers_give_the_weights_of_plain_ones(pairs, tmp_path):
    model = build_model(tmp_path / "model", num_hidden_layers=1)
    settings = {"model": model, "pairs": pairs, "batch_size": 3, "lr": 1e-3}

    plain, weights = train(tmp_path / "plain", **settings)
    compiled, weights_compiled = train(tmp_path / "compiled", compile=True, **settings)

    assert apart(weights, weights_compiled) < 1e-5
    assert apart(weights, start_weights(settings)) > 1e-3
    assert values(plain, "loss") == pytest.approx(values(compiled, "loss"), abs=1e-5)


# starts and stops its processes as train.py does, and says what happens after
STOPS = f"""import atexit, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from nanoaipo.processes import start_processes, stop_processes
atexit.register(print, "Python finalizes")
start_processes(torch.device("cpu"))
print("all is done")
stop_processes()
print("goes on")
"""


def test_several_processes_on_a_cpu_end_without_finalizing_python_and_one_goes_on(tmp_path):
    script = tmp_path / "stops.py"
    script.write_text(STOPS)

    two = torchrun(2, script.as_posix())
    one = run(script.as_posix(), python=["-u"])

    assert two.returncode == 0, two.stdout + two.stderr
    assert two.stdout.count("all is done") == 2
    assert "goes on" not in two.stdout
    assert "Python finalizes" not in two.stdout
    assert one.returncode == 0, one.stdout + one.stderr
    assert one.stdout == "all is done\ngoes on\nPython finalizes\n"


# ---------------------------------------------------------------------------- records and logs


def test_records_keep_ids_as_numbers_of_four_bytes_and_no_text(tiny_model, tmp_path):
    tokenizer, eos_ids = chat.load_tokenizer(tiny_model)
    path = tmp_path / "pairs.jsonl"
    (pair,) = write_pairs(path, 1, z=0.5, scores=[1, 2], id="a")

    (record,), _ = read_pairs(str(path), tokenizer, eos_ids, 2560)

    ids = {key: record.pop(key) for key in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert record == {"z": 0.5, "id": "a"}
    for numbers in ids.values():
        assert isinstance(numbers, array)
        assert numbers.typecode == "i"
        assert numbers.itemsize == 4
    assert tokenizer.decode(ids["chosen_ids"]) == pair["chosen"][0]["content"] + "<|end|>"


def test_logged_log_probs_are_those_of_plain_transformers(pairs, tmp_path):
    model = build_model(
        tmp_path / "model",
        "Gemma2",
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
        sliding_window=16,
        tie_word_embeddings=True,
    )
    (logged,), weights = train(
        tmp_path / "out",
        model=model,
        pairs=pairs,
        batch_size=7,
        max_steps=1,
        tokens_per_microbatch=200,
        lr=0.0,
    )

    tokenizer, eos_ids = chat.load_tokenizer(model)
    records, _ = read_pairs(pairs, tokenizer, eos_ids, 2560)
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    for name in ("chosen", "rejected"):
        total = 0
        for record in records:
            response = record[f"{name}_ids"].tolist()
            logp = response_logp(lm, record["prompt_ids"].tolist(), response)
            total += logp.gather(-1, torch.tensor(response)[:, None]).sum().item()
        mean = total / len(records)
        assert logged[f"logp_{name}"] == pytest.approx(mean, rel=1e-6, abs=1e-5)
    # what is saved is what was loaded
    assert apart(weights, load_file(model / "model.safetensors")) == 0


def test_wpo_scales_the_gradient_of_a_pair_by_its_weight(tiny_model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, 1)
    settings = {"model": tiny_model, "pairs": path, "batch_size": 1, "clip": 1e9}

    (plain,), _ = train(tmp_path / "plain", wpo=False, **settings)
    (weighed,), _ = train(tmp_path / "weighed", wpo=True, **settings)

    tokenizer, eos_ids = chat.load_tokenizer(tiny_model)
    (record,), _ = read_pairs(str(path), tokenizer, eos_ids, 2560)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    exponent = 0.0
    for name in ("chosen_ids", "rejected_ids"):
        response = record[name].tolist()
        logp = response_logp(lm, record["prompt_ids"].tolist(), response)
        logp_of_labels = logp.gather(-1, torch.tensor(response)[:, None])[:, 0]
        exponent += (logp_of_labels - (2 * logp).logsumexp(-1)).mean().item()

    assert plain["weight"] == 1
    assert weighed["weight"] == pytest.approx(math.exp(exponent), rel=1e-5)
    assert weighed["weight"] < 0.9
    assert weighed["loss"] == plain["loss"]
    scaled = weighed["weight"] * plain["grad_norm"]
    assert weighed["grad_norm"] == pytest.approx(scaled, rel=1e-5)


def test_every_record_counts_its_tokens_padding_memory_and_flops(tiny_model, pairs, plain_run):
    records, _ = read_pairs(pairs, *chat.load_tokenizer(tiny_model), 2560)
    tokens = []
    for record in records:
        tokens.append(sum(len(record[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")))
    logged = plain_run[2]

    assert values(logged, "tokens") == [sum(tokens[:3]), sum(tokens[3:6]), tokens[6]] * 2
    assert values(logged, "step") == list(range(6))
    for r in logged:
        assert 0 <= r["padding"] < 0.2
        assert 0 < r["mfu"] < 10
        assert r["seconds"] > 0
        assert 0.05 < r["memory_gib"] < 10
        assert r["tokens_per_s"] == pytest.approx(r["tokens"] / r["seconds"])
    assert max(values(logged, "padding")) > 0  # responses of unlike lengths leave some


def test_bfloat16_logs_nearly_the_losses_of_float32(plain_run, tmp_path):
    _, settings, exact, _ = plain_run

    rough, _ = train(tmp_path / "out", dtype="bfloat16", **settings)

    assert values(rough, "loss") == pytest.approx(values(exact, "loss"), abs=2e-2)
    assert exact[-1]["loss"] < exact[0]["loss"] - 0.1
    assert rough[0]["logp_chosen"] != exact[0]["logp_chosen"]


# ---------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize("template", [PLAIN, CHATML], ids=["plain", "chatml"])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
def test_responses_from_text_get_exactly_one_end_token(template, pad, pairs, tmp_path):
    model = build_model(tmp_path / "model", template=template, pad=pad)
    tokenizer, eos_ids = chat.load_tokenizer(model)
    records, _ = read_pairs(pairs, tokenizer, eos_ids, 2560)

    row, lengths, _ = pack(records, "packed_sdpa")

    labels = row["labels"].split(lengths.tolist())
    responses = []
    for record in records:
        responses += [record["chosen_ids"], record["rejected_ids"]]
        assert record["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert len(labels) == len(responses) == 14
    ending = "<|end|>\n" if template == CHATML else "<|end|>"
    for part, ids in zip(labels, responses):
        assert part.tolist() == ids.tolist()
        assert ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids).endswith(ending)


def test_a_template_that_writes_no_end_token_gets_one(pairs, tmp_path):
    model = build_model(tmp_path / "model", template=PLAIN.replace("<|end|>", ""))
    tokenizer, eos_ids = chat.load_tokenizer(model)

    records, _ = read_pairs(pairs, tokenizer, eos_ids, 2560)

    for record in records:
        for name in ("chosen_ids", "rejected_ids"):
            assert record[name][-1] == tokenizer.eos_token_id
            assert record[name].count(tokenizer.eos_token_id) == 1


def test_pairs_with_ids_keep_them_and_a_response_cut_at_its_length_has_no_end_token(
    tiny_model, tmp_path
):
    tokenizer, eos_ids = chat.load_tokenizer(tiny_model)
    cut = tokenizer("an answer without end", add_special_tokens=False).input_ids
    whole = tokenizer("an answer<|end|>", add_special_tokens=False).input_ids
    prompt = [0, 3, 70, 1, 4]
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, 1, prompt_ids=prompt, chosen_ids=cut, rejected_ids=whole)

    (record,), _ = read_pairs(str(path), tokenizer, eos_ids, 2560)
    row, *_ = pack([record], "packed_sdpa")

    chosen, rejected = row["labels"].split([len(cut), len(whole)])
    assert chosen.tolist() == cut
    assert rejected.tolist() == whole
    assert record["prompt_ids"].tolist() == prompt
    assert tokenizer.eos_token_id not in chosen


# ---------------------------------------------------------------------------- the result


def assert_same_logits(before, after):
    """Two models give the same logits, bit for bit, on random tokens."""
    ids = torch.randint(0, 262, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)


def test_the_result_is_a_bfloat16_folder_that_plain_transformers_load(tiny_model, pairs, tmp_path):
    out = tmp_path / "out"
    done = run("train.py", model=tiny_model, pairs=pairs, out=out, lr=0.0)  # dtype's default
    assert done.returncode == 0, done.stdout + done.stderr

    # weights
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    after = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert after.dtype == torch.bfloat16
    assert_same_logits(before, after)

    # tokenizer
    a = AutoTokenizer.from_pretrained(tiny_model)
    b = AutoTokenizer.from_pretrained(out)
    assert a.chat_template == b.chat_template
    assert a("abc <|end|>").input_ids == b("abc <|end|>").input_ids
    assert a.eos_token == b.eos_token
    assert after.generation_config.eos_token_id in (a.eos_token_id, [a.eos_token_id])

    # what the run was
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["lr"] == 0
    assert manifest["settings"]["loss"] == "aipo"
    assert set(manifest["inputs"]) == {"model", "pairs"}
    assert manifest["counts"] == {"pairs": 7, "too_long": 0, "control_text": 0}
    assert manifest["versions"]["torch"]
    assert values(metrics(out), "step") == [0]
    assert not out.with_name("out.tmp").exists()


def test_the_saved_float32_weights_have_the_logits_of_the_start_when_the_rate_is_zero(
    tiny_model, pairs, tmp_path
):
    train(tmp_path / "out", model=tiny_model, pairs=pairs, batch_size=4, lr=0.0)

    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert after.dtype == torch.float32
    assert_same_logits(before, after)


def test_nearly_all_weights_of_every_tensor_move_at_a_rate_of_5e_7(tiny_model, pairs, tmp_path):
    _, weights = train(
        tmp_path / "out",
        model=tiny_model,
        pairs=pairs,
        batch_size=7,
        epochs=4,
        lr=5e-7,
        schedule="constant",
        warmup=0.0,
    )

    for key, start in load_file(tiny_model / "model.safetensors").items():
        moved = weights[key] != start
        least = 0.95
        if "embed" in key:  # only the rows of tokens that occur
            moved = moved.any(1)
            least = 0.05
        assert moved.float().mean() > least, f"{key}: {moved.float().mean():.0%} moved"


def test_computing_in_bfloat16_keeps_updates_too_small_for_bfloat16_weights(
    tiny_model, pairs, tmp_path
):
    _, weights = train(
        tmp_path / "out",
        model=tiny_model,
        pairs=pairs,
        batch_size=7,
        epochs=16,
        lr=4e-4,
        schedule="constant",
        warmup=0.0,
        dtype="bfloat16",
    )

    for key, start in load_file(tiny_model / "model.safetensors").items():
        large = start.abs() > 0.26  # neighbours are 2e-3 apart: one step of 4e-4 rounds to none
        if "layers" in key and large.sum() > 100:
            moved = weights[key][large] != start[large].bfloat16()
            assert moved.float().mean() > 0.5, f"{key}: {moved.float().mean():.0%} moved"


# ---------------------------------------------------------------------------- errors and restarts


def refused(out, **settings):
    """The one line with which a run ends that must not succeed; nothing stands under its name."""
    done = run("train.py", out=out, **settings)
    assert done.returncode not in (0, None), done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stdout + done.stderr
    assert not out.exists()
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr.strip()


@pytest.fixture
def refused_here(tiny_model, pairs, tmp_path):
    """`refused` for the tiny model and the seven pairs, with other settings."""

    def refused_with(**settings):
        return refused(tmp_path / "out", **{"model": tiny_model, "pairs": pairs, **settings})

    return refused_with


def test_a_missing_pairs_file_is_named(refused_here, tmp_path):
    nowhere = tmp_path / "nowhere.jsonl"
    assert str(nowhere) in refused_here(pairs=nowhere)


TEXTS = '"prompt": "a", "chosen": "b", "rejected": "c"'
MALFORMED = {  # name: (line, what the message says)
    "cut": ('{"prompt": "a", "chosen": "b", "rejec', "not JSON"),
    "no-object": ('["a", "b"]', "object"),
    "some-ids": (f'{{{TEXTS}, "prompt_ids": [1], "chosen_ids": [2]}}', "'rejected_ids'"),
    "no-prompt": (
        f'{{{TEXTS}, "prompt_ids": [], "chosen_ids": [2], "rejected_ids": [2]}}',
        "'prompt_ids'",
    ),
}


@pytest.mark.parametrize("line, message", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_named_by_file_and_line(
    line, message, tiny_model, refused_here, tmp_path
):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, 2)
    path.write_text(path.read_text() + line + "\n")
    tokenizer, eos_ids = chat.load_tokenizer(tiny_model)

    with pytest.raises(InputError) as error:
        read_pairs(str(path), tokenizer, eos_ids, 2560)

    assert f"{path}:3" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if "'rejected_ids'" in message:  # and once as people see it
        assert refused_here(pairs=path) == str(error.value)


def test_no_pair_left_is_an_error_that_counts_the_drops(refused_here, pairs):
    message = refused_here(max_length=8)

    assert str(pairs) in message
    assert "7 too_long" in message


def test_a_missing_model_is_named(refused_here, tmp_path):
    assert str(tmp_path / "nowhere") in refused_here(model=tmp_path / "nowhere")


def test_an_unknown_loss_is_refused_with_the_list_of_known_ones(refused_here):
    message = refused_here(loss="aipoo")

    assert "--loss=aipoo" in message
    assert "alpha_dpo" in message


def test_a_mix_that_cannot_be_read_is_refused_with_what_can_be_written(refused_here):
    message = refused_here(loss="0.8dpo+0.2*bco")

    assert message.startswith("--loss=0.8dpo+0.2*bco: loss '0.8dpo' is unknown")
    assert "a mix is written 0.8*dpo+0.2*bco+nll" in message


def test_a_mix_trains_and_logs_each_term_under_hard_labels(tiny_model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, 4, z=0.5)
    settings = {"model": tiny_model, "pairs": path, "batch_size": 4, "lr": 1e-3, "epochs": 3}

    logged, _ = train(tmp_path / "out", loss="0.8*dpo+0.2*irepo+nll", **settings)

    # z is the target of irepo alone: dpo's label is hard, and its first loss is log 2
    assert logged[0]["loss_dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert logged[0]["loss_irepo"] == pytest.approx(0.25, abs=1e-6)
    for record in logged:
        assert record["loss_nll"] == pytest.approx(record["nll"])
        total = 0.8 * record["loss_dpo"] + 0.2 * record["loss_irepo"] + record["loss_nll"]
        assert record["loss"] == pytest.approx(total)
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_sampo_sums_the_same_tokens_in_policy_and_reference_whatever_the_micro_batches(
    tiny_model, pairs, tmp_path
):
    settings = {"model": tiny_model, "pairs": pairs, "batch_size": 3, "epochs": 2, "lr": 1e-3}
    settings |= {**DPO, "sampo": True, "reference_cache": tmp_path / "reference.logps"}

    whole, _ = train(tmp_path / "whole", **settings)
    split, _ = train(tmp_path / "split", **settings, tokens_per_microbatch=64)
    plain, _ = train(tmp_path / "plain", **settings | {"sampo": False})
    other, _ = train(tmp_path / "other", **settings | {"seed": 1, "shuffle": False})

    # the second found the first one's reference, and the others could not use it
    assert_same_steps(whole, split)
    for run_, seeds in ((whole, 0), (plain, 0), (other, 1)):
        assert run_[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), seeds
    assert sum(r["logp_chosen"] for r in plain) < sum(r["logp_chosen"] for r in whole)


def test_sampo_with_a_loss_that_averages_over_tokens_is_refused(refused_here):
    message = refused_here(loss="dpo+nll", sampo=True)

    assert "--sampo=True: --loss=dpo+nll reads nll" in message


def test_a_loss_that_needs_a_column_names_it(refused_here):
    message = refused_here(loss="irepo")

    assert "--loss=irepo" in message
    assert "'z'" in message


def test_no_more_epochs_are_planned_than_max_steps_needs(monkeypatch):
    monkeypatch.setattr(train_script, "max_steps", 3)
    monkeypatch.setattr(train_script, "epochs", 2)
    expected = train_script.plan_epochs([5] * 600, padded=False)

    monkeypatch.setattr(train_script, "epochs", 10**9)
    assert train_script.plan_epochs([5] * 600, padded=False) == expected
    assert len(expected) == 3


def test_settings_that_make_no_sense_are_named(refused_here):
    assert "--betas=0.9: has to be two numbers" in refused_here(betas="0.9")
    assert "has to be two numbers" in refused_here(betas="0.99999999999999999999,0.9")  # 1.0
    assert "--reference_cache=.: is a folder" in refused_here(reference_cache=".")
    assert "--batch_size=0: has to be above 0" in refused_here(batch_size=0)
    assert "the loss is nan before the first step" in refused_here(loss="robust", eps=0.5)
    assert "--dtype=bf16: there are" in refused_here(dtype="bf16")


def test_a_shard_size_that_does_not_divide_the_processes_is_named(refused_here):
    assert refused_here(shard_size=2) == "--shard_size=2: has to divide the 1 processes"


@pytest.mark.parametrize(
    "package, key, value", [("peft", "lora_rank", 4), ("wandb", "wandb", True)]
)
def test_a_package_that_is_not_installed_is_named(package, key, value, refused_here):
    if stages.version(package):
        pytest.skip(f"{package} is installed")

    assert refused_here(**{key: value}) == f"--{key}: pip install {package} first"


def test_a_schedule_that_does_not_exist_is_named(refused_here):
    assert "--schedule" in refused_here(schedule="cosin")


def test_a_run_whose_loss_is_no_longer_finite_keeps_its_checkpoint_and_the_pairs_of_the_step(
    tiny_model, pairs, tmp_path
):
    settings = DPO | {"model": tiny_model, "pairs": pairs, "batch_size": 3, "epochs": 4}
    done = run("train.py", **settings, out=tmp_path / "out", lr=1e6, checkpoint_every=1)

    assert done.returncode == 1
    (message,) = done.stderr.splitlines()
    step = int(re.match(r"step (\d+): the loss is ", message)[1])
    assert message.endswith(f"look at its pairs in {tmp_path}/out.not_finite.jsonl")
    assert not (tmp_path / "out").exists()
    checkpoints = sorted(folder.name for folder in (tmp_path / "out.tmp").glob("step_*"))
    assert checkpoints[-1] == f"step_{step - 1:06d}"

    # the pairs can be trained on as they are; an epoch of 7 has steps of 3, 3 and 1
    kept = (tmp_path / "out.not_finite.jsonl").read_text().splitlines()
    assert len(kept) == [3, 3, 1][(step - 1) % 3]
    settings |= {"pairs": tmp_path / "out.not_finite.jsonl", "epochs": 1, "lr": 1e-5}
    assert run("train.py", **settings, out=tmp_path / "again").returncode == 0


def test_a_slash_after_the_name_of_the_result_changes_nothing(tiny_model, pairs, tmp_path):
    done = run("train.py", model=tiny_model, pairs=pairs, out=f"{tmp_path}/new/")

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "model.safetensors").exists()


def test_truncated_safetensors_are_named(tiny_model, refused_here, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    halve(model / "model.safetensors")

    assert str(model / "model.safetensors") in refused_here(model=model)


def test_a_folder_from_elsewhere_is_not_overwritten(tiny_model, pairs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")

    done = run("train.py", model=tiny_model, pairs=pairs, out=out)

    assert done.returncode
    assert f"{out}: exists" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [f.name for f in out.iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_done_in_an_instant_and_refused_with_other_settings_or_pairs(
    plain_run, tmp_path
):
    out, settings, *_ = plain_run
    settings = {**DPO, **settings, "out": out}
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    (tmp_path / "torch.py").write_text("raise SystemExit('a finished run imported torch')")
    no_torch = {"env": {"PYTHONPATH": str(tmp_path)}}

    # the same command
    done = run("train.py", **settings, **no_torch)
    assert done.returncode == 0, done.stderr
    assert f"{out}: complete, nothing to do" in done.stdout

    # another setting, other pairs
    other_pairs = tmp_path / "pairs.jsonl"
    write_pairs(other_pairs, 7, seed=5)
    for key, value in (("lr", 2e-3), ("pairs", other_pairs)):
        done = run("train.py", **settings | {key: value}, **no_torch)
        assert done.returncode
        assert f"'{key}'" in done.stderr
        assert str(out) in done.stderr
        assert len(done.stderr.splitlines()) == 1

    # the same pairs elsewhere: content counts, not the path
    moved = shutil.copy(settings["pairs"], other_pairs)
    done = run("train.py", **settings | {"pairs": moved}, **no_torch)
    assert done.returncode == 0
    assert before == {f.name: f.read_bytes() for f in out.iterdir()}


def test_a_killed_run_leaves_nothing_under_its_name_and_runs_again_to_the_same_bytes(
    tiny_model, pairs, tmp_path
):
    settings = {**DPO, "model": tiny_model, "pairs": pairs, "batch_size": 2, "epochs": 40}
    settings |= {"lr": 1e-3, "shuffle": True, "checkpoint_every": 0}
    out = tmp_path / "out"
    log = tmp_path / "out.tmp" / "metrics.jsonl"

    def lines_logged():
        return log.read_text().count("\n") if log.exists() else 0

    process = subprocess.Popen(
        [sys.executable, "train.py", *(f"--{k}={v}" for k, v in settings.items()), f"--out={out}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and lines_logged() < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5 <= lines_logged() < 160
    assert not out.exists()

    logged, _ = train(out, **settings)
    uninterrupted = tmp_path / "uninterrupted"
    again, _ = train(uninterrupted, **settings)

    weights = (out / "model.safetensors").read_bytes()
    assert weights == (uninterrupted / "model.safetensors").read_bytes()
    assert values(logged, "loss") == values(again, "loss")
    assert len(again) == 160
    assert not (tmp_path / "out.tmp").exists()


# ---------------------------------------------------------------------------- checkpoints

# sitecustomize: kills the process when Python is about to do what DIES_AT says, "EVENT END OF PATH"
DIES = """import os, sys
event, where = os.environ["DIES_AT"].split()

def kill(name, arguments):
    if name == event and any(str(a).endswith(where) for a in arguments):
        os.kill(os.getpid(), 9)

sys.addaudithook(kill)
"""
# all 12 steps are done, the weights too, not yet the rest
SAVING = "open out.tmp/config.json"


def start(out, **settings):
    """A finished process, whatever came of it; DPO in float32."""
    return run("train.py", out=out, **{**DPO, **settings})


def dies(folder, where, **settings):
    """Run train.py, out being FOLDER/out, until it is killed at `where`; return FOLDER/out.tmp."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(DIES)
    env = {"PYTHONPATH": str(folder), "DIES_AT": where}

    done = start(folder / "out", env=env, **settings)

    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert not (folder / "out").exists()
    return folder / "out.tmp"


def goes_on(folder, first, uninterrupted, **settings):
    """Run FOLDER/out again: it goes on at step `first` and ends like the uninterrupted run.

    Its losses and the bytes of its weights are the same. Returns what it printed.
    """
    whole_out, whole_log = uninterrupted
    out = folder / "out"

    done = start(out, **settings)

    assert done.returncode == 0, done.stdout + done.stderr
    from_checkpoint = f"going on from {folder / 'out.tmp'}/step_{first:06d}\n"
    assert (from_checkpoint in done.stdout) is (first > 0)
    assert ("going on" in done.stdout) is (first > 0)
    # steps that were computed again are none of those before
    assert done.stdout.count("  loss ") == len(whole_log) - first
    for key in ("step", "lr", "loss"):
        assert values(metrics(out), key) == values(whole_log, key)
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (whole_out / "model.safetensors").read_bytes()
    assert not (folder / "out.tmp").exists()
    assert not list(out.glob("step_*"))
    return done.stdout


def checkpoints(folder):
    """The names of the checkpoints in a folder."""
    return sorted(f.name for f in folder.glob("step_*"))


@pytest.fixture(scope="module")
def long(tiny_model, pairs):
    """Settings of twelve steps in four epochs, with checkpoints at 2, 4, 6, 8 and 10.

    They lie on the edge of an epoch, before and after it.
    """
    settings = {"model": tiny_model, "pairs": pairs, "batch_size": 3, "epochs": 4, "lr": 1e-3}
    return settings | {"shuffle": True, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def uninterrupted(long, tmp_path_factory):
    """(folder, metrics) of those steps without a checkpoint."""
    out = tmp_path_factory.mktemp("whole") / "out"
    logged, _ = train(out, **long | {"checkpoint_every": 0})
    return out, logged


@pytest.fixture(scope="module")
def killed(long, tmp_path_factory):
    """FOLDER/out.tmp of a run that died at its end, with checkpoints 8 and 10; to be copied."""
    return dies(tmp_path_factory.mktemp("killed"), SAVING, **long)


@pytest.fixture
def copied(killed, tmp_path):
    """A folder with a copy of that out.tmp."""
    shutil.copytree(killed, tmp_path / "out.tmp")
    return tmp_path


# where a run is killed, the lines logged by then, the checkpoints that are left: never more than
# keep_checkpoints, 2, but for the moment at a new one
DEATHS = [
    # while the checkpoint is written
    ("open step_000004.tmp/__0_0.distcp", 4, ["step_000002", "step_000004.tmp"]),
    # whole, not yet named
    ("os.rename step_000006", 6, ["step_000002", "step_000004", "step_000006.tmp"]),
    # named just now
    ("shutil.rmtree step_000004", 8, ["step_000004", "step_000006", "step_000008"]),
    # two steps later
    (SAVING, 12, ["step_000008", "step_000010"]),
]


def test_a_run_killed_again_and_again_goes_on_to_the_same_bytes(long, uninterrupted, tmp_path):
    for where, n_lines, left in DEATHS:
        folder = dies(tmp_path, where, **long)
        assert checkpoints(folder) == left
        assert values(metrics(folder), "step") == list(range(n_lines))

    assert "reference log-probs from" in goes_on(tmp_path, 10, uninterrupted, **long)


@pytest.mark.parametrize(
    "where, first", [("open step_000004.tmp/__0_0.distcp", 2), ("shutil.rmtree step_000002", 6)]
)
def test_a_run_killed_once_goes_on_to_the_same_bytes(where, first, long, uninterrupted, tmp_path):
    dies(tmp_path, where, **long)

    goes_on(tmp_path, first, uninterrupted, **long)


def test_brackets_in_a_path_hide_no_checkpoint(long, killed, uninterrupted, tmp_path):
    folder = tmp_path / "run[1]"
    shutil.copytree(killed, folder / "out.tmp")

    goes_on(folder, 10, uninterrupted, **long)


def test_only_as_many_checkpoints_are_kept_as_asked(long, tmp_path):
    folder = dies(tmp_path, SAVING, **long, keep_checkpoints=3)

    assert checkpoints(folder) == ["step_000006", "step_000008", "step_000010"]


def test_two_processes_go_on_from_the_checkpoint_of_one(long, copied, uninterrupted):
    whole_out, whole_log = uninterrupted
    shutil.rmtree(copied / "out.tmp" / "step_000010")  # four steps are left
    before = metrics(copied / "out.tmp")

    logged, weights = train(copied / "out", processes=2, **long)

    assert values(logged, "step") == list(range(12))
    assert values(logged, "lr") == values(whole_log, "lr")
    assert values(logged, "loss") == pytest.approx(values(whole_log, "loss"), abs=1e-5)
    # it did go on: the lines before stay, with their seconds
    assert logged[:8] == before[:8]
    assert logged[8] != before[8]
    assert apart(weights, load_file(whole_out / "model.safetensors")) < 1e-5


def halve(path):
    """Cut a file in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_broken_checkpoint_is_passed_over_aloud(long, copied, uninterrupted):
    broken = copied / "out.tmp" / "step_000010"
    halve(broken / "__0_0.distcp")

    printed = goes_on(copied, 8, uninterrupted, **long)

    assert f"{broken}: passed over, __0_0.distcp is not whole\n" in printed


def test_without_a_whole_checkpoint_a_run_starts_from_the_beginning(long, copied, uninterrupted):
    halve(copied / "out.tmp" / "step_000008" / "__0_0.distcp")
    # as when a run dies while it removes its checkpoints
    (copied / "out.tmp" / "step_000010" / "manifest.json").unlink()

    assert goes_on(copied, 0, uninterrupted, **long).count("passed over") == 2


def test_a_run_goes_on_with_settings_that_do_not_enter_the_result_only(long, copied, uninterrupted):
    message = refused(copied / "out", **{**DPO, **long, "lr": 2e-3})
    assert "another 'lr' (0.001, now 0.002)" in message
    assert str(copied / "out.tmp") in message

    done = start(copied / "out", **long, tokens_per_microbatch=100)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from" in done.stdout
    assert done.stdout.count("  loss ") == 2
    weights = load_file(copied / "out" / "model.safetensors")
    assert apart(weights, load_file(uninterrupted[0] / "model.safetensors")) < 1e-5


def test_without_checkpoints_a_run_starts_over_with_other_settings(long, tmp_path):
    out = tmp_path / "out"
    dies(tmp_path, SAVING, **long | {"checkpoint_every": 0})

    done = start(out, **long | {"checkpoint_every": 0, "lr": 2e-3})

    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stdout
    assert done.stdout.count("  loss ") == 12
    assert json.loads((out / "manifest.json").read_text())["settings"]["lr"] == 2e-3
    assert len(metrics(out)) == 12


# ---------------------------------------------------------------------------- reference log-probs


def test_kept_reference_log_probs_are_those_that_would_be_computed(plain_run, tmp_path):
    out, settings, *_ = plain_run
    cache = out / "reference.logps"
    from_cache = f"reference log-probs from {cache}\n"

    cached = start(tmp_path / "cached", **settings, beta=0.3, reference_cache=cache)
    computed = start(tmp_path / "computed", **settings, beta=0.3)

    assert cached.returncode == 0, cached.stdout + cached.stderr
    assert computed.returncode == 0, computed.stdout + computed.stderr
    assert from_cache in cached.stdout
    assert from_cache not in computed.stdout
    weights = (tmp_path / "cached" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "computed" / "model.safetensors").read_bytes()
    assert weights != (out / "model.safetensors").read_bytes()


def test_reference_log_probs_of_another_dtype_or_of_other_pairs_are_computed_again(
    plain_run, tmp_path
):
    out, settings, *_ = plain_run
    cache = tmp_path / "reference.logps"
    shutil.copy(out / cache.name, cache)
    write_pairs(tmp_path / "pairs.jsonl", 7, seed=5)
    message = (
        f"{cache}: not whole, or made by another model, dtype or version, "
        "or for other pairs; computed again"
    )

    for key, value in (("dtype", "bfloat16"), ("pairs", tmp_path / "pairs.jsonl")):
        before = cache.read_bytes()
        changed = settings | {key: value}
        done = start(tmp_path / key, **changed, reference_cache=cache, max_steps=1)

        assert done.returncode == 0, done.stdout + done.stderr
        assert message in done.stdout
        assert "reference log-probs in " in done.stdout
        assert cache.read_bytes() != before


# ---------------------------------------------------------------------------- policy and sampler

WINDOWED = {
    "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 0.5,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "tie_word_embeddings": True,
}
LINE = re.compile(
    r"policy against sampler: mean ([-+.\d]+), mean absolute ([.\d]+), largest ([.\d]+) "
    r"nats per token, of (\d+) responses"
)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """(model, pairs) of a Gemma-2 with soft-caps and a window, its pairs sampled by an engine."""
    folder = tmp_path_factory.mktemp("sampled")
    model = build_model(folder / "model", "Gemma2", **WINDOWED)
    engine = TransformersEngine(model, {1}, dtype="float32", generate_rows=64)
    rng = random.Random(0)
    requests = []
    for seed in range(12):
        prompt_ids = [0, 3, *rng.choices(range(6, 262), k=rng.randint(4, 30)), 1, 4]
        requests.append((prompt_ids, seed))

    # what is compared is the distribution before these three
    sampling = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "max_new_tokens": 40}
    results = engine.sample(requests, n_responses=2, **sampling)

    records = []
    for (prompt_ids, _), responses in zip(requests, results):
        row = {"id": str(len(records)), "prompt_ids": prompt_ids}
        candidates = [{"text": "", "ids": ids, "logp": logp} for ids, _, logp in responses]
        records.append(rank.pair_record(row, *candidates, has_ids=True))
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return model, path


@pytest.mark.parametrize(
    "settings",
    [
        {"wpo": True, "tokens_per_microbatch": 100},
        {"ld_alpha": 0.5},
        {"sampo": True, "loss": "dpo"},
        {"processes": 2, "batch_size": 5},
        {"lora_rank": 4, "epochs": 2},
    ],
    ids=["wpo", "ld-dpo", "sampo", "two-processes", "lora"],
)
def test_policy_and_sampler_agree_and_every_record_says_so(settings, sampled, tmp_path):
    model, pairs = sampled

    logged, _ = train(tmp_path / "out", **{"model": model, "pairs": pairs, **settings})

    for record in logged:
        assert abs(record["sampler_diff"]) <= record["sampler_abs_diff"]
        assert record["sampler_abs_diff"] <= record["sampler_max_diff"] < 1e-5


def test_only_pairs_with_a_reference_and_a_sampled_log_prob_are_compared(sampled, tmp_path):
    model, pairs = sampled
    records = read_lines(pairs)
    for record in records[3:]:
        del record["chosen_logp"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"model": model, "pairs": path, **DPO, "batch_size": 4, "max_steps": 1}
    cache = tmp_path / "reference.logps"

    computed = start(tmp_path / "computed", **settings, reference_cache=cache)
    cached = start(tmp_path / "cached", **settings, reference_cache=cache)

    assert computed.returncode == 0, computed.stdout + computed.stderr
    assert f"reference log-probs from {cache}" in cached.stdout
    assert LINE.search(computed.stdout)[4] == "7"
    assert LINE.search(computed.stdout)[0] == LINE.search(cached.stdout)[0]


def test_pairs_without_sampled_log_probs_are_compared_with_nothing(plain_run):
    for record in plain_run[2]:
        assert not any(name.startswith("sampler") for name in record)


def changed_config(model, folder, **config):
    """A copy of a model with other settings in its config.json."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"final_logit_softcapping": 50.0},
        {"attn_logit_softcapping": None},
        {"sliding_window": 512},
    ],
    ids=["logit-cap", "attention-cap", "window"],
)
def test_a_policy_that_computes_otherwise_than_its_sampler_is_refused(config, sampled, tmp_path):
    model, pairs = sampled
    wrong = changed_config(model, tmp_path / "wrong", **config)

    message = refused(tmp_path / "out", model=wrong, pairs=pairs, **DPO)

    for setting in (f"--pairs={pairs}", f"--model={wrong}", "--sampler_tolerance=0.05"):
        assert setting in message


def add_adapter(weights):
    """Add to every linear layer what a LoRA adapter adds, a fifth as large as the layer."""
    torch.manual_seed(0)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            product = torch.randn(len(weight), 4) @ torch.randn(4, weight.shape[1])
            weight += 0.2 * product * weight.norm() / product.norm()


def scale_logits(weights):
    """Make the logits, before their soft-cap, half as large again."""
    weights["model.norm.weight"] += 0.5  # Gemma's norms count their weight and 1


@pytest.mark.parametrize("change", [add_adapter, scale_logits])
def test_a_policy_with_other_weights_than_its_sampler_is_refused(change, sampled, tmp_path):
    model, pairs = sampled
    wrong = changed_config(model, tmp_path / "wrong")
    weights = load_file(wrong / "model.safetensors")
    change(weights)
    save_file(weights, wrong / "model.safetensors", {"format": "pt"})

    message = refused(tmp_path / "out", model=wrong, pairs=pairs, **DPO)

    assert f"--model={wrong}" in message
    assert "above --sampler_tolerance" in message


def test_a_prompt_of_another_template_is_refused_unless_the_tolerance_is_off(sampled, tmp_path):
    model, pairs = sampled
    records = read_lines(pairs)
    for record in records:
        del record["prompt_ids"][-1]  # the token that opens the answer
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"model": model, "pairs": path, **DPO}

    assert "template" in refused(tmp_path / "refused", **settings)
    (record,), _ = train(tmp_path / "out", **settings, sampler_tolerance=0)

    assert record["sampler_abs_diff"] > 0.05


def test_a_run_of_a_single_step_trains_and_its_folder_holds_no_weights_but_the_models(
    tiny_model, pairs, tmp_path
):
    out = tmp_path / "out"

    logged, weights = train(out, model=tiny_model, pairs=pairs, batch_size=7, lr=1e-3)

    assert len(logged) == 1
    assert apart(weights, load_file(tiny_model / "model.safetensors")) > 1e-4
    # vLLM reads them all
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]

    # the cache is no part of the model that the next stage reads
    whole = stages.fingerprint(str(out))
    (out / "reference.logps").unlink()
    assert stages.fingerprint(str(out)) == whole
