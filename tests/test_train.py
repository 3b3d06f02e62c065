"""train.py and the packing of pairs: against TRL, against plain transformers, one process against two, killed and run again."""
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import CHATML, PLAIN, ROOT, build_model, run, torchrun, write_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import losses

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


@pytest.mark.parametrize("template", [PLAIN, CHATML], ids=["plain", "chatml"])
def test_eight_steps_of_dpo_log_the_losses_and_rewards_of_trl(template, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    model = build_model(tmp_path / "model", template=template)
    records = write_pairs(tmp_path / "pairs.jsonl", 32, seed=1)
    ours, _ = train(tmp_path / "ours", model=model, pairs=tmp_path / "pairs.jsonl", batch_size=4, lr=5e-4, tokens_per_microbatch=256)

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.1, learning_rate=5e-4, lr_scheduler_type="cosine", warmup_steps=0.1, max_grad_norm=1.0,
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
        settings = settings | {"model": build_model(tmp_path / "tied", tie_word_embeddings=True)}
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
        steps = data.plan(lengths, order, batch_size, world_size, budget)
        assert len(steps) == math.ceil(len(order) / batch_size)
        for n, rounds in enumerate(steps):
            assert all(len(groups) == world_size for groups in rounds)
            groups = [g for groups in rounds for g in groups]
            assert sorted(i for g in groups for i in g) == sorted(order[n * batch_size:(n + 1) * batch_size])
            assert all(sum(lengths[i] for i in g) <= budget or len(g) == 1 for g in groups)


def test_a_plan_has_no_rounds_without_pairs_when_the_budget_is_below_a_pair():
    assert [len(rounds) for rounds in data.plan([400] * 7, range(7), 4, 2, 100)] == [2, 2]
    assert data.plan([900, 10], [0, 1], 2, 1, 100) == [[[[0]], [[1]]]]


# ---------------------------------------------------------------------------------------------- packing


def test_the_trained_labels_of_a_packed_batch_read_as_the_responses(tiny_model, pairs):
    tokenizer, ends = data.load_tokenizer(tiny_model)
    records, _ = data.read_pairs(pairs, tokenizer, ends, 2560)
    batch = data.pack(records)
    assert batch["input_ids"].shape[0] < 2 * len(records)               # sequences do share rows
    flat, positions = batch["input_ids"].flatten(), batch["position_ids"].flatten()
    texts = [tokenizer.decode(part) for part in batch["labels"].split(batch["lengths"])]
    assert texts == [r[key][0]["content"] + "<|end|>" for key in ("chosen", "rejected") for r in records]
    assert torch.equal(flat[batch["index"] + 1], batch["labels"])       # each label follows the place that predicts it
    for part, r in zip(batch["index"].split(batch["lengths"]), records * 2):
        start = part[0].item() - len(r["prompt_ids"]) + 1
        assert flat[start:part[0] + 1].tolist() == r["prompt_ids"]
        assert positions[start:part[-1] + 1].tolist() == list(range(len(part) + len(r["prompt_ids"]) - 1))
    assert tokenizer.decode(records[0]["prompt_ids"]) == f"<s><|user|>{records[0]['prompt'][0]['content']}<|end|><|assistant|>"


def test_a_packed_batch_of_no_pairs_has_no_labels():
    batch = data.pack([])
    assert batch["input_ids"].numel() > 0 and len(batch["labels"]) == len(batch["index"]) == 0


ARCHITECTURES = {
    "Llama": {}, "Mistral": {"sliding_window": 16}, "Qwen2": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 16,
               "tie_word_embeddings": True}}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_log_probs_equal_each_sequence_alone_in_plain_transformers(architecture, pairs, tmp_path):
    model = build_model(tmp_path / "model", architecture, **ARCHITECTURES[architecture])
    logged, weights = train(tmp_path / "out", model=model, pairs=pairs, batch_size=7, max_steps=1)
    tokenizer, ends = data.load_tokenizer(model)
    records, _ = data.read_pairs(pairs, tokenizer, ends, 2560)
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    batch, softcap = data.pack(records), getattr(lm.config, "final_logit_softcapping", None)
    with torch.no_grad():
        alone = []
        for ids, start in [(r["prompt_ids"] + r[k], len(r["prompt_ids"])) for k in ("chosen_ids", "rejected_ids") for r in records]:
            logp = lm(torch.tensor([ids])).logits[0, start - 1:-1].log_softmax(-1)
            alone.append(logp.gather(-1, torch.tensor(ids[start:])[:, None])[:, 0])
        hidden = lm.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
        packed = losses.logprob(hidden.flatten(0, 1)[batch["index"]], lm.get_output_embeddings().weight, batch["labels"], 16, softcap)
    assert (packed - torch.cat(alone)).abs().max() < 1e-5
    sums = torch.stack([a.sum() for a in alone]).view(2, -1).mean(1).tolist()
    assert [logged[0]["logp_chosen"], logged[0]["logp_rejected"]] == pytest.approx(sums, rel=1e-6, abs=1e-5)
    assert apart(weights, load_file(model / "model.safetensors")) == 0  # the warm-up's first step has rate 0: what is saved is what was loaded


# ---------------------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize("template", [PLAIN, CHATML], ids=["plain", "chatml"])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
def test_responses_from_text_get_exactly_one_end_token(template, pad, pairs, tmp_path):
    tokenizer, ends = data.load_tokenizer(build_model(tmp_path / "model", template=template, pad=pad))
    records, _ = data.read_pairs(pairs, tokenizer, ends, 2560)
    batch = data.pack(records)
    for part, ids in zip(batch["labels"].split(batch["lengths"]), [r[k] for k in ("chosen_ids", "rejected_ids") for r in records]):
        assert part.tolist() == ids and sum(i == tokenizer.eos_token_id for i in ids) == 1
        assert tokenizer.decode(ids).endswith("<|end|>\n" if template == CHATML else "<|end|>")
    assert all(r["prompt_ids"].count(tokenizer.bos_token_id) == 1 for r in records)


def test_a_template_that_writes_no_end_token_gets_one(pairs, tmp_path):
    tokenizer, ends = data.load_tokenizer(build_model(tmp_path / "model", template=PLAIN.replace("<|end|>", "")))
    records, _ = data.read_pairs(pairs, tokenizer, ends, 2560)
    assert all(r[k][-1] == tokenizer.eos_token_id and r[k].count(tokenizer.eos_token_id) == 1 for r in records for k in ("chosen_ids", "rejected_ids"))


def test_pairs_with_ids_keep_them_and_a_response_cut_at_its_length_has_no_end_token(tiny_model, tmp_path):
    tokenizer, ends = data.load_tokenizer(tiny_model)
    cut, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in ("an answer without end", "an answer<|end|>"))
    write_pairs(tmp_path / "pairs.jsonl", 1, prompt_ids=[0, 3, 70, 1, 4], chosen_ids=cut, rejected_ids=whole)
    (record,), _ = data.read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, ends, 2560)
    labels = data.pack([record])["labels"].split([len(cut), len(whole)])
    assert [part.tolist() for part in labels] == [cut, whole] and record["prompt_ids"] == [0, 3, 70, 1, 4]
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
    tokenizer, ends = data.load_tokenizer(tiny_model)
    with pytest.raises(SystemExit) as end:
        data.read_pairs(str(path), tokenizer, ends, 2560)
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
    settings = {"loss": "dpo", **FLOAT32, "model": tiny_model, "pairs": pairs, "batch_size": 2, "epochs": 40, "lr": 1e-3, "shuffle": True}
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
