"""train.py: against TRL and plain transformers, one process against two and four, what it logs and saves, killed and run again."""
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from array import array

import pytest
import torch
from conftest import CHATML, PLAIN, ROOT, build_model, run, torchrun, write_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoaipo import chat
from nanoaipo import packing
from nanoaipo.pairs import read_pairs
from nanoaipo import stages
from nanoaipo.packing import pack

FLOAT32 = {"dtype": "float32", "recompute": False, "shuffle": False}


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train(out, processes=1, **settings):
    """The metrics and the weights of a run that has to succeed; DPO in float32 and in file order unless set otherwise."""
    settings = {"loss": "dpo", **FLOAT32, **settings, "out": out}
    done = torchrun(processes, "train.py", **settings) if processes > 1 else run("train.py", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(out), load_file(out / "model.safetensors")


def apart(a, b):
    """The largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Seven pairs: batches of three leave a last one of a single pair, too few for two processes."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(path, 7)
    return str(path)


@pytest.fixture(scope="module")
def plain_run(tiny_model, pairs, tmp_path_factory):
    """(folder, settings, metrics, weights) of one process over two epochs of the seven pairs, the reference of several tests."""
    settings = {"model": tiny_model, "pairs": pairs, "batch_size": 3, "epochs": 2, "lr": 1e-3}
    out = tmp_path_factory.mktemp("plain") / "model"
    return out, settings, *train(out, **settings)


# ---------------------------------------------------------------------------------------------- against TRL


@pytest.mark.parametrize("template, ld_alpha", [(PLAIN, 1.0), (CHATML, 1.0), (CHATML, 0.5)], ids=["plain", "chatml", "ld_dpo"])
def test_eight_steps_of_dpo_log_the_losses_and_rewards_of_trl(template, ld_alpha, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    model = build_model(tmp_path / "model", template=template)
    records = write_pairs(tmp_path / "pairs.jsonl", 32, seed=1)
    ours, _ = train(tmp_path / "ours", model=model, pairs=tmp_path / "pairs.jsonl", batch_size=4, lr=5e-4, tokens_per_microbatch=256, ld_alpha=ld_alpha)

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.1, ld_alpha=None if ld_alpha == 1 else ld_alpha, learning_rate=5e-4, lr_scheduler_type="cosine", warmup_steps=0.1, max_grad_norm=1.0,
        weight_decay=0.0, per_device_train_batch_size=4, num_train_epochs=1, max_length=None, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, bf16=False, use_cpu=True, gradient_checkpointing=False)
    trainer = InOrder(model=AutoModelForCausalLM.from_pretrained(model), args=arguments, processing_class=AutoTokenizer.from_pretrained(model),
                      train_dataset=datasets.Dataset.from_list(records))
    trainer.train()
    theirs = [r for r in trainer.state.log_history if "loss" in r]
    assert len(ours) == len(theirs) == 8
    assert max(abs(r["reward_chosen"]) for r in ours) > 0.05            # the policy has moved, or the comparison would be empty
    for here, there in zip(ours, theirs):
        assert here["lr"] == pytest.approx(there["learning_rate"], abs=1e-9)
        for name, theirs_name in (("loss", "loss"), ("reward_chosen", "rewards/chosen"), ("reward_rejected", "rewards/rejected"),
                                  ("logp_chosen", "logps/chosen"), ("grad_norm", "grad_norm")):
            assert here[name] == pytest.approx(there[theirs_name], abs=1e-4, rel=1e-6), (here["step"], name)


# ---------------------------------------------------------------------------------------------- processes and micro-batches


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_processes_give_the_weights_of_one_when_the_pairs_do_not_divide(tied, tiny_model, pairs, plain_run, tmp_path):
    _, settings, one, weights = plain_run
    if tied:
        settings = settings | {"model": build_model(tmp_path / "tied", tie_word_embeddings=True, vocab_size=263)}
        one, weights = train(tmp_path / "one", **settings)
    two, weights_two = train(tmp_path / "two", processes=2, **settings)
    assert [r["pairs"] for r in two] == [3, 3, 1] * 2                   # the last batch leaves one process without a pair
    assert apart(weights_two, weights) < 1e-5 < 1e-3 < apart(weights, load_file(settings["model"] / "model.safetensors"))
    assert ("lm_head.weight" in weights) is not tied
    for a, b in zip(one, two):                                          # AdamW forgives a wrong scale of the gradient, its norm does not
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_many_small_microbatches_give_the_weights_of_one_large(plain_run, tmp_path):
    _, settings, large, weights = plain_run
    small, weights_small = train(tmp_path / "small", **settings, tokens_per_microbatch=1)
    assert apart(weights_small, weights) < 1e-5
    for a, b in zip(large, small):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_plan_deals_every_pair_once_within_budget_and_to_all_processes_alike(world_size):
    draw = random.Random(world_size)
    for _ in range(100):
        lengths = [max(3, round(draw.lognormvariate(4, 1))) for _ in range(draw.randint(1, 60))]
        order, batch_size, budget = draw.sample(range(len(lengths)), len(lengths)), draw.randint(1, 20), draw.choice([1, 100, 400, 10**6])
        steps = packing.plan(lengths, order, batch_size, world_size, budget)
        assert len(steps) == math.ceil(len(order) / batch_size)
        for n, rounds in enumerate(steps):
            assert all(len(groups) == world_size for groups in rounds)
            groups = [g for groups in rounds for g in groups]
            assert sorted(i for g in groups for i in g) == sorted(order[n * batch_size:(n + 1) * batch_size])
            assert all(sum(lengths[i] for i in g) <= budget or len(g) == 1 for g in groups)


def test_a_plan_has_no_rounds_without_pairs_when_the_budget_is_below_a_pair():
    assert [len(rounds) for rounds in packing.plan([400] * 7, range(7), 4, 2, 100)] == [2, 2]
    assert packing.plan([900, 10], [0, 1], 2, 1, 100) == [[[[0]], [[1]]]]


@pytest.mark.parametrize("layout", [(2, 1), (4, 2)], ids=["2-copies", "2-copies-of-2-shards"])
def test_copies_of_the_weights_give_the_weights_of_one_process(layout, plain_run, tmp_path):
    processes, shard_size = layout
    _, settings, one, weights = plain_run
    many, weights_many = train(tmp_path / "many", processes=processes, shard_size=shard_size, **settings)
    assert apart(weights_many, weights) < 1e-5
    for a, b in zip(one, many):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_two_processes_train_the_adapters_of_one_and_nothing_else_moves(tiny_model, plain_run, tmp_path):
    settings = plain_run[1] | {"lora_rank": 4, "lr": 1e-2}
    (one, weights), (two, weights_two) = train(tmp_path / "one", **settings), train(tmp_path / "two", processes=2, **settings)
    assert apart(weights, weights_two) < 1e-5
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], abs=1e-5) and one[-1]["loss"] < one[0]["loss"] - 0.1
    start = load_file(tiny_model / "model.safetensors")
    assert {k for k in start if not torch.equal(start[k], weights[k])} == {k for k in start if k.endswith("_proj.weight")}
    lm, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "one"), torch.arange(6, 100)[None]
    assert all(torch.equal(p, weights[k]) for k, p in lm.named_parameters()) and lm(ids).logits.isfinite().all()


def test_compiled_layers_give_the_weights_of_plain_ones(pairs, tmp_path):
    settings = {"model": build_model(tmp_path / "model", num_hidden_layers=1), "pairs": pairs, "batch_size": 3, "lr": 1e-3}
    (plain, weights), (compiled, weights_compiled) = train(tmp_path / "plain", **settings), train(tmp_path / "compiled", compile=True, **settings)
    assert apart(weights, weights_compiled) < 1e-5 < 1e-3 < apart(weights, load_file(settings["model"] / "model.safetensors"))
    assert [r["loss"] for r in plain] == pytest.approx([r["loss"] for r in compiled], abs=1e-5)


# ---------------------------------------------------------------------------------------------- records and logs


def test_records_keep_ids_as_numbers_of_four_bytes_and_no_text(tiny_model, tmp_path):
    tokenizer, ends = chat.load_tokenizer(tiny_model)
    (text,) = write_pairs(tmp_path / "pairs.jsonl", 1, z=0.5, scores=[1, 2], id="a")
    (record,), _ = read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, ends, 2560)
    ids = {k: record.pop(k) for k in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert record == {"z": 0.5, "id": "a"} and all(isinstance(v, array) and v.typecode == "i" and v.itemsize == 4 for v in ids.values())
    assert tokenizer.decode(ids["chosen_ids"]) == text["chosen"][0]["content"] + "<|end|>"


def test_logged_log_probs_are_those_of_plain_transformers(pairs, tmp_path):
    model = build_model(tmp_path / "model", "Gemma2", final_logit_softcapping=3.0, attn_logit_softcapping=2.0, query_pre_attn_scalar=8,
                        sliding_window=16, tie_word_embeddings=True)
    logged, weights = train(tmp_path / "out", model=model, pairs=pairs, batch_size=7, max_steps=1, tokens_per_microbatch=200, lr=0.0)
    tokenizer, ends = chat.load_tokenizer(model)
    records, _ = read_pairs(pairs, tokenizer, ends, 2560)
    lm, sums = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager"), {}
    for name in ("chosen", "rejected"):
        for r in records:
            prompt, response = r["prompt_ids"].tolist(), r[name + "_ids"].tolist()
            logp = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
            sums[name] = sums.get(name, 0) + logp.gather(-1, torch.tensor(response)[:, None]).sum().item() / len(records)
    assert [logged[0]["logp_chosen"], logged[0]["logp_rejected"]] == pytest.approx([sums["chosen"], sums["rejected"]], rel=1e-6, abs=1e-5)
    assert apart(weights, load_file(model / "model.safetensors")) == 0  # what is saved is what was loaded


def test_wpo_scales_the_gradient_of_a_pair_by_its_weight(tiny_model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 1)
    plain, weighed = (train(tmp_path / str(wpo), model=tiny_model, pairs=tmp_path / "pairs.jsonl", batch_size=1, clip=1e9, wpo=wpo)[0][0] for wpo in (False, True))
    tokenizer, ends = chat.load_tokenizer(tiny_model)
    (r,), _ = read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, ends, 2560)
    lm, exponent = AutoModelForCausalLM.from_pretrained(tiny_model), 0.0
    for response in (r["chosen_ids"].tolist(), r["rejected_ids"].tolist()):
        logp = lm(torch.tensor([r["prompt_ids"].tolist() + response])).logits[0, len(r["prompt_ids"]) - 1:-1].log_softmax(-1)
        exponent += (logp.gather(-1, torch.tensor(response)[:, None])[:, 0] - (2 * logp).logsumexp(-1)).mean().item()
    assert plain["weight"] == 1 and weighed["weight"] == pytest.approx(math.exp(exponent), rel=1e-5) and weighed["weight"] < 0.9
    assert weighed["loss"] == plain["loss"] and weighed["grad_norm"] == pytest.approx(weighed["weight"] * plain["grad_norm"], rel=1e-5)


def test_every_record_counts_its_tokens_padding_memory_and_flops(tiny_model, pairs, plain_run):
    records, _ = read_pairs(pairs, *chat.load_tokenizer(tiny_model), 2560)
    tokens = [sum(len(r[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")) for r in records]
    logged = plain_run[2]
    assert [r["tokens"] for r in logged] == [sum(tokens[:3]), sum(tokens[3:6]), tokens[6]] * 2 and [r["step"] for r in logged] == list(range(6))
    for r in logged:
        assert 0 <= r["padding"] < 0.2 and 0 < r["mfu"] < 10 and r["seconds"] > 0 and 0.05 < r["memory_gib"] < 10
        assert r["tokens_per_s"] == pytest.approx(r["tokens"] / r["seconds"])
    assert max(r["padding"] for r in logged) > 0                        # responses of unlike lengths leave some


def test_bfloat16_logs_nearly_the_losses_of_float32(plain_run, tmp_path):
    _, settings, exact, _ = plain_run
    rough, _ = train(tmp_path / "out", dtype="bfloat16", **settings)
    assert [r["loss"] for r in rough] == pytest.approx([r["loss"] for r in exact], abs=2e-2) and exact[-1]["loss"] < exact[0]["loss"] - 0.1
    assert rough[0]["logp_chosen"] != exact[0]["logp_chosen"]


# ---------------------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize("template", [PLAIN, CHATML], ids=["plain", "chatml"])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
def test_responses_from_text_get_exactly_one_end_token(template, pad, pairs, tmp_path):
    tokenizer, ends = chat.load_tokenizer(build_model(tmp_path / "model", template=template, pad=pad))
    records, _ = read_pairs(pairs, tokenizer, ends, 2560)
    row, lengths, _ = pack(records, "packed_sdpa")
    parts, responses = row["labels"].split(lengths.tolist()), [r[k] for r in records for k in ("chosen_ids", "rejected_ids")]
    assert len(parts) == len(responses) == 14
    for part, ids in zip(parts, responses):
        assert part.tolist() == ids.tolist() and sum(i == tokenizer.eos_token_id for i in ids) == 1
        assert tokenizer.decode(ids).endswith("<|end|>\n" if template == CHATML else "<|end|>")
    assert all(r["prompt_ids"].count(tokenizer.bos_token_id) == 1 for r in records)


def test_a_template_that_writes_no_end_token_gets_one(pairs, tmp_path):
    tokenizer, ends = chat.load_tokenizer(build_model(tmp_path / "model", template=PLAIN.replace("<|end|>", "")))
    records, _ = read_pairs(pairs, tokenizer, ends, 2560)
    assert all(r[k][-1] == tokenizer.eos_token_id and r[k].count(tokenizer.eos_token_id) == 1 for r in records for k in ("chosen_ids", "rejected_ids"))


def test_pairs_with_ids_keep_them_and_a_response_cut_at_its_length_has_no_end_token(tiny_model, tmp_path):
    tokenizer, ends = chat.load_tokenizer(tiny_model)
    cut, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in ("an answer without end", "an answer<|end|>"))
    write_pairs(tmp_path / "pairs.jsonl", 1, prompt_ids=[0, 3, 70, 1, 4], chosen_ids=cut, rejected_ids=whole)
    (record,), _ = read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, ends, 2560)
    labels = pack([record], "packed_sdpa")[0]["labels"].split([len(cut), len(whole)])
    assert [part.tolist() for part in labels] == [cut, whole] and record["prompt_ids"].tolist() == [0, 3, 70, 1, 4]
    assert tokenizer.eos_token_id not in labels[0]


# ---------------------------------------------------------------------------------------------- the result


def test_the_result_is_a_bfloat16_folder_that_plain_transformers_load(tiny_model, pairs, tmp_path):
    out = tmp_path / "out"
    done = run("train.py", model=tiny_model, pairs=pairs, out=out, lr=0.0)       # dtype is left at its default
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16), AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert after.dtype == torch.bfloat16
    ids = torch.randint(0, 262, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)
    a, b = AutoTokenizer.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(out)
    assert a.chat_template == b.chat_template and a("abc <|end|>").input_ids == b("abc <|end|>").input_ids and a.eos_token == b.eos_token
    assert after.generation_config.eos_token_id in (a.eos_token_id, [a.eos_token_id])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["lr"] == 0 and manifest["settings"]["loss"] == "aipo" and set(manifest["inputs"]) == {"model", "pairs"}
    assert manifest["counts"] == {"pairs": 7, "too_long": 0, "control_text": 0} and manifest["versions"]["torch"]
    assert [r["step"] for r in metrics(out)] == [0] and not out.with_name("out.tmp").exists()


def test_the_saved_float32_weights_have_the_logits_of_the_start_when_the_rate_is_zero(tiny_model, pairs, tmp_path):
    train(tmp_path / "out", model=tiny_model, pairs=pairs, batch_size=4, lr=0.0)
    before, after = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (tiny_model, tmp_path / "out"))
    ids = torch.randint(0, 262, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert after.dtype == torch.float32 and torch.equal(before(ids).logits, after(ids).logits)


def test_nearly_all_weights_of_every_tensor_move_at_a_rate_of_5e_7(tiny_model, pairs, tmp_path):
    _, weights = train(tmp_path / "out", model=tiny_model, pairs=pairs, batch_size=7, epochs=4, lr=5e-7, schedule="constant", warmup=0.0)
    for key, start in load_file(tiny_model / "model.safetensors").items():
        moved = (weights[key] != start).any(1) if "embed" in key else weights[key] != start         # tokens that occur; all else
        assert moved.float().mean() > (0.05 if "embed" in key else 0.95), f"{key}: {moved.float().mean():.0%} moved"


def test_computing_in_bfloat16_keeps_updates_too_small_for_bfloat16_weights(tiny_model, pairs, tmp_path):
    _, weights = train(tmp_path / "out", model=tiny_model, pairs=pairs, batch_size=7, epochs=16, lr=4e-4, schedule="constant", warmup=0.0,
                       dtype="bfloat16")
    for key, start in load_file(tiny_model / "model.safetensors").items():
        large = start.abs() > 0.26                                      # neighbours are 2e-3 apart: one step of 4e-4 rounds to none
        if "layers" in key and large.sum() > 100:
            moved = weights[key][large] != start[large].bfloat16()
            assert moved.float().mean() > 0.5, f"{key}: {moved.float().mean():.0%} moved"


# ---------------------------------------------------------------------------------------------- errors and restarts


def refused(out, **settings):
    """The one line with which a run ends that must not succeed; nothing may stand under its final name."""
    done = run("train.py", out=out, **settings)
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert not out.exists() and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr.strip()


def test_a_missing_pairs_file_is_named(tiny_model, tmp_path):
    assert str(tmp_path / "nowhere.jsonl") in refused(tmp_path / "out", model=tiny_model, pairs=tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "a", "chosen": "b", "rejec', "not JSON"),
    ('["a", "b"]', "object"),
    ('{"prompt": "a", "chosen": "b"}', "'rejected' is missing"),
    ('{"prompt": "a", "chosen": 7, "rejected": "c"}', "'chosen'"),
    ('{"prompt": [{"role": "user", "content": null}], "chosen": "b", "rejected": "c"}', "'prompt'"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "prompt_ids": [1], "chosen_ids": [2]}', "'rejected_ids'"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "prompt_ids": [], "chosen_ids": [2], "rejected_ids": [2]}', "'prompt_ids'"),
], ids=["cut", "no-object", "missing", "type", "null", "some-ids", "no-prompt"])
def test_a_malformed_line_is_named_by_file_and_line(line, message, tiny_model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, 2)
    path.write_text(path.read_text() + line + "\n")
    tokenizer, ends = chat.load_tokenizer(tiny_model)
    with pytest.raises(SystemExit) as end:
        read_pairs(str(path), tokenizer, ends, 2560)
    assert f"{path}:3" in str(end.value) and message in str(end.value) and "\n" not in str(end.value)
    if "'rejected' is missing" in message:                              # and once as people see it
        assert refused(tmp_path / "out", model=tiny_model, pairs=path) == str(end.value)


def test_no_pair_left_is_an_error_that_counts_the_drops(tiny_model, pairs, tmp_path):
    message = refused(tmp_path / "out", model=tiny_model, pairs=pairs, max_length=8)
    assert str(pairs) in message and "7 too_long" in message


def test_a_missing_model_is_named(pairs, tmp_path):
    assert str(tmp_path / "nowhere") in refused(tmp_path / "out", model=tmp_path / "nowhere", pairs=pairs)


def test_an_unknown_loss_is_refused_with_the_list_of_known_ones(tiny_model, pairs, tmp_path):
    message = refused(tmp_path / "out", model=tiny_model, pairs=pairs, loss="aipoo")
    assert "--loss=aipoo" in message and "alpha_dpo" in message


def test_a_loss_that_needs_a_column_names_it(tiny_model, pairs, tmp_path):
    message = refused(tmp_path / "out", model=tiny_model, pairs=pairs, loss="irepo")
    assert "--loss=irepo" in message and "'z'" in message


def test_settings_that_make_no_sense_are_named(tiny_model, pairs, tmp_path):
    for settings, message in (({"betas": "0.9"}, "--betas=0.9: has to be two numbers"), ({"batch_size": 0}, "--batch_size=0: has to be above 0"),
                              ({"loss": "robust", "eps": 0.5}, "the loss is nan before the first step"), ({"dtype": "bf16"}, "--dtype=bf16: there are")):
        assert message in refused(tmp_path / "out", model=tiny_model, pairs=pairs, **settings)


def test_a_shard_size_that_does_not_divide_the_processes_is_named(tiny_model, pairs, tmp_path):
    assert refused(tmp_path / "out", model=tiny_model, pairs=pairs, shard_size=2) == "--shard_size=2: has to divide the 1 processes"


@pytest.mark.parametrize("package, settings", [("peft", {"lora_rank": 4}), ("wandb", {"wandb": True}), ("tensorboard", {"tensorboard": True})])
def test_a_package_that_is_not_installed_is_named(package, settings, tiny_model, pairs, tmp_path):
    if stages.version(package):
        pytest.skip(f"{package} is installed")
    assert refused(tmp_path / "out", model=tiny_model, pairs=pairs, **settings) == f"--{next(iter(settings))}: pip install {package} first"


def test_a_schedule_that_does_not_exist_is_named(tiny_model, pairs, tmp_path):
    assert "'schedule'" in (message := refused(tmp_path / "out", model=tiny_model, pairs=pairs, schedule="cosin")) or "--schedule" in message


def test_a_run_whose_loss_is_no_longer_finite_ends_without_a_result(tiny_model, pairs, tmp_path):
    message = refused(tmp_path / "out", model=tiny_model, pairs=pairs, **FLOAT32, loss="dpo", batch_size=3, epochs=4, lr=1e6)
    assert "step" in message and "nan" in message.lower()


def test_a_slash_after_the_name_of_the_result_changes_nothing(tiny_model, pairs, tmp_path):
    done = run("train.py", model=tiny_model, pairs=pairs, out=f"{tmp_path}/new/")
    assert done.returncode == 0 and (tmp_path / "new" / "model.safetensors").exists(), done.stderr


def test_truncated_safetensors_are_named(tiny_model, pairs, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    assert str(model / "model.safetensors") in refused(tmp_path / "out", model=model, pairs=pairs)


def test_a_folder_from_elsewhere_is_not_overwritten(tiny_model, pairs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    done = run("train.py", model=tiny_model, pairs=pairs, out=tmp_path / "out")
    assert done.returncode and f"{tmp_path / 'out'}: exists" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_done_in_an_instant_and_refused_with_other_settings_or_pairs(plain_run, tmp_path):
    out, settings, *_ = plain_run
    settings = {"loss": "dpo", **FLOAT32, **settings, "out": out}
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    (tmp_path / "torch.py").write_text("raise SystemExit('a finished run imported torch')")
    no_torch = {"env": {"PYTHONPATH": str(tmp_path)}}
    done = run("train.py", **settings, **no_torch)
    assert done.returncode == 0 and f"{out}: complete, nothing to do" in done.stdout, done.stderr
    write_pairs(tmp_path / "pairs.jsonl", 7, seed=5)
    for key, value in (("lr", 2e-3), ("pairs", tmp_path / "pairs.jsonl")):
        done = run("train.py", **settings | {key: value}, **no_torch)
        assert done.returncode and f"'{key}'" in done.stderr and str(out) in done.stderr and len(done.stderr.splitlines()) == 1
    moved = shutil.copy(settings["pairs"], tmp_path / "pairs.jsonl")
    assert run("train.py", **settings | {"pairs": moved}, **no_torch).returncode == 0               # content counts, not the path
    assert before == {f.name: f.read_bytes() for f in out.iterdir()}


def test_a_killed_run_leaves_nothing_under_its_name_and_runs_again_to_the_same_bytes(tiny_model, pairs, tmp_path):
    settings = {"loss": "dpo", **FLOAT32, "model": tiny_model, "pairs": pairs, "batch_size": 2, "epochs": 40, "lr": 1e-3, "shuffle": True,
                "checkpoint_every": 0}
    out, log = tmp_path / "out", tmp_path / "out.tmp" / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "train.py", *(f"--{k}={v}" for k, v in settings.items()), f"--out={out}"], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 5 <= log.read_text().count("\n") < 160
    assert not out.exists()
    logged, _ = train(out, **settings)
    again, _ = train(tmp_path / "uninterrupted", **settings)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "uninterrupted" / "model.safetensors").read_bytes()
    assert [r["loss"] for r in logged] == [r["loss"] for r in again] and len(again) == 160
    assert not (tmp_path / "out.tmp").exists()


# ---------------------------------------------------------------------------------------------- checkpoints and the reference's cache


DIES = """import os, sys
event, where = os.environ["DIES_AT"].split()
sys.addaudithook(lambda e, args: e == event and any(str(a).endswith(where) for a in args) and os.kill(os.getpid(), 9))
"""
SAVING = "open out.tmp/config.json"                                     # all 12 steps are done, the weights too, not yet the rest


def start(out, **settings):
    """A finished process, whatever came of it; DPO in float32."""
    return run("train.py", out=out, **{"loss": "dpo", **FLOAT32, **settings})


def dies(folder, where, **settings):
    """Run train.py, out being FOLDER/out, until Python is about to do what `where` says, "EVENT END OF PATH": killed there. FOLDER/out.tmp"""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(DIES)
    done = start(folder / "out", env={"PYTHONPATH": str(folder), "DIES_AT": where}, **settings)
    assert done.returncode == -signal.SIGKILL and not (folder / "out").exists(), done.stdout + done.stderr
    return folder / "out.tmp"


def goes_on(folder, first, logged, **settings):
    """The output of a run of FOLDER/out that succeeds, goes on at step `first` and ends with the same losses and the same bytes as `logged`'s."""
    done = start(folder / "out", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (f"going on from {folder / 'out.tmp'}/step_{first:06d}\n" in done.stdout) is (first > 0) and ("going on" in done.stdout) is (first > 0)
    assert done.stdout.count("  loss ") == len(logged[1]) - first       # steps that were computed again are none of those before
    assert [(r["step"], r["lr"], r["loss"]) for r in metrics(folder / "out")] == [(r["step"], r["lr"], r["loss"]) for r in logged[1]]
    assert (folder / "out" / "model.safetensors").read_bytes() == (logged[0] / "model.safetensors").read_bytes()
    assert not (folder / "out.tmp").exists() and not list((folder / "out").glob("step_*"))
    return done.stdout


@pytest.fixture(scope="module")
def long(tiny_model, pairs):
    """Settings of twelve steps in four epochs, with checkpoints at 2, 4, 6, 8 and 10: on the edge of an epoch, before and after it."""
    return {"model": tiny_model, "pairs": pairs, "batch_size": 3, "epochs": 4, "lr": 1e-3, "shuffle": True, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def uninterrupted(long, tmp_path_factory):
    """(folder, metrics) of those steps without a checkpoint."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, train(out, **long | {"checkpoint_every": 0})[0]


@pytest.fixture(scope="module")
def killed(long, tmp_path_factory):
    """FOLDER/out.tmp of a run that died at its end, with the checkpoints of steps 8 and 10; to be copied."""
    return dies(tmp_path_factory.mktemp("killed"), SAVING, **long)


@pytest.fixture
def copied(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "out.tmp")
    return tmp_path


def test_a_run_killed_again_and_again_goes_on_to_the_same_bytes(long, uninterrupted, tmp_path):
    for where, lines, left in (("open step_000004.tmp/__0_0.distcp", 4, ["step_000002", "step_000004.tmp"]),               # while it is written
                               ("os.rename step_000006", 6, ["step_000002", "step_000004", "step_000006.tmp"]),       # whole, not yet named
                               ("shutil.rmtree step_000004", 8, ["step_000004", "step_000006", "step_000008"]),         # named just now
                               (SAVING, 12, ["step_000008", "step_000010"])):                                      # two steps later
        work = dies(tmp_path, where, **long)
        assert sorted(f.name for f in work.glob("step_*")) == left      # never more than keep_checkpoints, 2, but for the moment at a new one
        assert [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()] == list(range(lines))
    assert "reference log-probs from" in goes_on(tmp_path, 10, uninterrupted, **long)


@pytest.mark.parametrize("where, first", [("open step_000004.tmp/__0_0.distcp", 2), ("shutil.rmtree step_000002", 6)])
def test_a_run_killed_once_goes_on_to_the_same_bytes(where, first, long, uninterrupted, tmp_path):
    dies(tmp_path, where, **long)
    goes_on(tmp_path, first, uninterrupted, **long)


def test_only_as_many_checkpoints_are_kept_as_asked(long, tmp_path):
    work = dies(tmp_path, SAVING, **long, keep_checkpoints=3)
    assert sorted(f.name for f in work.glob("step_*")) == ["step_000006", "step_000008", "step_000010"]


def test_two_processes_go_on_from_the_checkpoint_of_one(long, copied, uninterrupted):
    shutil.rmtree(copied / "out.tmp" / "step_000010")                   # four steps are left
    before = [json.loads(line) for line in (copied / "out.tmp" / "metrics.jsonl").read_text().splitlines()]
    logged, weights = train(copied / "out", processes=2, **long)
    assert [r["step"] for r in logged] == list(range(12)) and [r["lr"] for r in logged] == [r["lr"] for r in uninterrupted[1]]
    assert [r["loss"] for r in logged] == pytest.approx([r["loss"] for r in uninterrupted[1]], abs=1e-5)
    assert logged[:8] == before[:8] and logged[8] != before[8]          # it did go on: these lines stay, with their seconds
    assert apart(weights, load_file(uninterrupted[0] / "model.safetensors")) < 1e-5


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def test_a_broken_checkpoint_is_passed_over_aloud(long, copied, uninterrupted):
    broken = copied / "out.tmp" / "step_000010"
    halve(broken / "__0_0.distcp")
    assert f"{broken}: passed over, __0_0.distcp is not whole\n" in goes_on(copied, 8, uninterrupted, **long)


def test_without_a_whole_checkpoint_a_run_starts_from_the_beginning(long, copied, uninterrupted):
    halve(copied / "out.tmp" / "step_000008" / "__0_0.distcp")
    (copied / "out.tmp" / "step_000010" / "sizes.json").unlink()        # as when a run dies while it removes its checkpoints
    assert goes_on(copied, 0, uninterrupted, **long).count("passed over") == 2


def test_a_run_goes_on_with_settings_that_do_not_enter_the_result_only(long, copied, uninterrupted):
    message = refused(copied / "out", **{"loss": "dpo", **FLOAT32, **long, "lr": 2e-3})
    assert "another 'lr' (0.001, now 0.002)" in message and str(copied / "out.tmp") in message
    done = start(copied / "out", **long, tokens_per_microbatch=100)
    assert done.returncode == 0 and "going on from" in done.stdout and done.stdout.count("  loss ") == 2, done.stdout + done.stderr
    assert apart(*(load_file(folder / "model.safetensors") for folder in (copied / "out", uninterrupted[0]))) < 1e-5


def test_without_checkpoints_a_run_starts_over_with_other_settings(long, tmp_path):
    dies(tmp_path, SAVING, **long | {"checkpoint_every": 0})
    done = start(tmp_path / "out", **long | {"checkpoint_every": 0, "lr": 2e-3})
    assert done.returncode == 0 and "going on" not in done.stdout and done.stdout.count("  loss ") == 12, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["lr"] == 2e-3 and len(metrics(tmp_path / "out")) == 12


def test_kept_reference_log_probs_are_those_that_would_be_computed(plain_run, tmp_path):
    out, settings, *_ = plain_run
    cache, weights = out / "reference.logps", {}
    for name, more in (("cached", {"reference_cache": cache}), ("computed", {})):
        done = start(tmp_path / name, **settings, beta=0.3, **more)
        assert done.returncode == 0 and (f"reference log-probs from {cache}\n" in done.stdout) is (name == "cached"), done.stdout + done.stderr
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["cached"] == weights["computed"] != (out / "model.safetensors").read_bytes()


def test_reference_log_probs_of_another_dtype_or_of_other_pairs_are_computed_again(plain_run, tmp_path):
    out, settings, *_ = plain_run
    cache = tmp_path / "reference.logps"
    shutil.copy(out / cache.name, cache)
    write_pairs(tmp_path / "pairs.jsonl", 7, seed=5)
    for name, more in (("dtype", {"dtype": "bfloat16"}), ("pairs", {"pairs": tmp_path / "pairs.jsonl"})):
        before, done = cache.read_bytes(), start(tmp_path / name, **settings | more, reference_cache=cache, max_steps=1)
        assert f"{cache}: not whole, or made by another model, dtype or version, or for other pairs; computed again" in done.stdout, done.stdout + done.stderr
        assert done.returncode == 0 and "reference log-probs in " in done.stdout and cache.read_bytes() != before


def test_a_run_of_a_single_step_trains_and_its_folder_holds_no_weights_but_the_models(tiny_model, pairs, tmp_path):
    logged, weights = train(tmp_path / "out", model=tiny_model, pairs=pairs, batch_size=7, lr=1e-3)
    assert len(logged) == 1 and apart(weights, load_file(tiny_model / "model.safetensors")) > 1e-4
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]           # vLLM reads them all
    whole = stages.fingerprint(str(tmp_path / "out"))
    (tmp_path / "out" / "reference.logps").unlink()                     # no part of the model that the next stage reads
    assert stages.fingerprint(str(tmp_path / "out")) == whole
