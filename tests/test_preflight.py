"""preflight.py: its counts against real models and real training, what it refuses, and that it leaves nothing behind. A whole run: test_loop.py."""
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import losses
from nanoaipo import estimate as preflight
from configurator import SCRIPTS, declared
from conftest import ROOT, build_model, run, write_pairs

GIB = 2**30


def settings(**changed):
    """All settings of all scripts at their defaults, but for those given."""
    every = {k: v for script in (*SCRIPTS, "nanoaipo/estimate.py") for k, (v, *_) in declared(script).items()}
    assert changed.keys() <= every.keys()
    return SimpleNamespace(**every | {"out": "out/none", "prompts": "nobody/nothing:train"} | changed)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture, config", [("Llama", {}), ("Gemma2", {"query_pre_attn_scalar": 8}), ("Qwen2", {})])
def test_parameters_are_counted_as_the_real_model_has_them(architecture, config, tied, tmp_path):
    from transformers import AutoModelForCausalLM
    real = AutoModelForCausalLM.from_pretrained(build_model(tmp_path / "model", architecture, tie_word_embeddings=tied, **config))
    m = preflight.shapes(str(tmp_path / "model"), "float32")
    assert m.size == m.trained == sum(p.numel() for p in real.parameters()) and m.head == real.lm_head.weight.numel()
    assert m.body == sum(p.numel() for p in real.model.layers.parameters()) and m.softcap is (architecture == "Gemma2")


def test_adapters_are_counted_as_peft_makes_them(tiny_model):
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM
    adapted = inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), AutoModelForCausalLM.from_pretrained(tiny_model))
    assert preflight.shapes(str(tiny_model), "float32", 4).trained == sum(p.numel() for name, p in adapted.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_what_a_token_keeps_for_backward_is_what_the_packed_row_keeps(architecture, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    from nanoaipo.packing import pack
    name = build_model(tmp_path / "model", architecture, num_key_value_heads=4)
    lm = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), attn_implementation="packed_sdpa")
    ids = lambda n: torch.randint(6, 200, (n,), dtype=torch.int32).numpy()
    row = pack([{"prompt_ids": ids(16), "chosen_ids": ids(72), "rejected_ids": ids(72)} for _ in range(4)], "packed_sdpa")[0]
    own, kept = {p.untyped_storage().data_ptr() for p in lm.parameters()}, {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = lm.base_model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False, segments=row["segments"])
    real = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own) / row["input_ids"].numel()
    del out
    assert preflight.shapes(str(name), dtype).kept == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("given", [{"recompute": False, "dtype": "float32"}, {"recompute": True, "dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_training_takes_the_memory_it_says(given, tmp_path):
    name = build_model(tmp_path / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8, head_dim=64,
                       num_key_value_heads=4, vocab_size=8000, initializer_range=0.02)
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "prompt_ids": [9] * 50, "chosen_ids": [10] * 100, "rejected_ids": [11] * 100}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)
    done = run("train.py", python=["-u"], model=name, pairs=tmp_path / "pairs.jsonl", out=tmp_path / "policy", loss="dpo", batch_size=4, lr=1e-5,
               **given)                                                 # -u: a process of its own, with its own memory
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "policy/metrics.jsonl").read_text().splitlines()[-1])["memory_gib"]
    bare = int(run("-c", "import nanoaipo.estimate, nanoaipo.policy, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)").stdout)
    need = preflight.train_memory(preflight.shapes(str(name), given["dtype"]), settings(**given), 1000, 800, False, True)
    assert 0.75 * need / GIB < measured < 1.25 * (need + bare) / GIB    # a system may take back the libraries' pages, which are files


def test_a_70b_model_is_planned_on_gpus_that_are_not_here(tmp_path, monkeypatch):
    from transformers import LlamaConfig
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e13))
    LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                num_key_value_heads=8).save_pretrained(tmp_path)
    given = {"model": str(tmp_path), "engine": "vllm", "processes": 8, "engines": 2, "tensor_parallel": 4, "ranker": "answer", "gpus": "8x80x400"}

    def refused(**changed):
        s = settings(**given | changed)
        lines, refusals = preflight.report(s, preflight.machine(s), 0, 0)
        assert "70,553.71M parameters" in lines[0] and lines[1].startswith(f"{s.gpus[0]} GPUs of ")
        return refusals

    full, = refused()                                                   # 16 bytes a parameter: 131 GiB on each of 8
    assert full.startswith("train: needs 1") and "there are 80.0; weights, gradients and moments alone are 131.4: more --processes" in full
    assert refused(lora_rank=16) == [] and refused(gpus="8x192x1000") == []
    alone, = refused(engines=8, tensor_parallel=1, lora_rank=16)
    assert alone.startswith("generate: beside weights of 131.4 GiB") and "--tensor_parallel" in alone
    assert refused(gpus="4x800x400") == ["--processes: 8 GPUs are wanted, there are 4", "--engines: 8 GPUs are wanted, there are 4"]
    assert refused(lora_rank=16, gpu_memory=0.99) == []                 # vLLM's share is of all memory, its CUDA context included
    disk, = refused(lora_rank=16, iterations=100)                       # a model of 131 GiB each
    assert 13141 < float(disk.split()[2]) < 13500 and disk.startswith("out/none: needs ") and "GiB of disk, 9313.2 are free" in disk


def test_the_first_loss_is_what_train_prints(tiny_model, tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "prompt_ids": [9, 10, 11], "chosen_ids": [12, 13, 14], "rejected_ids": [12, 13, 14]}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)                 # s_ref = 0, lengths are equal
    for loss, text in {"aipo": "0.6931 + 0.2 x nll", "simpo": f"{math.log(1 + math.exp(0.5)):.4f}"}.items():
        assert preflight.first_loss(settings(loss=loss)) == text + ", for pairs with s_ref = 0 and equal lengths"
        done = run("train.py", model=tiny_model, pairs=tmp_path / "pairs.jsonl", out=tmp_path / loss, loss=loss, dtype="float32")
        assert done.returncode == 0, done.stdout + done.stderr
        first = json.loads((tmp_path / loss / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(float(text.split()[0]) + (0.2 * first["nll"] if "nll" in text else 0), abs=1e-4)


def test_every_objective_has_a_first_loss_or_says_what_it_hangs_on():
    told = {name: preflight.first_loss(settings(loss=name)) for name in losses.OBJECTIVES}
    assert {name for name, text in told.items() if text.startswith("depends on the labels")} == {"irepo", "sppo", "rebel"}
    assert {name for name, text in told.items() if text == "depends on the pairs"} == {"rpo", "slic"}
    assert told["hinge"].startswith("1.0000,") and told["irpo"].startswith("0.6931 + 0.2 x nll") and told["orpo"].startswith("0.1386 + 1 x nll")
    with pytest.raises(SystemExit, match="--loss=dp: loss 'dp' is unknown"):
        preflight.first_loss(settings(loss="dp"))


# ---------------------------------------------------------------------------------------------- as a user calls it


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A folder with prompts and a recipe."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {k}"}) + "\n" for k in range(20)))
    (folder / "r.py").write_text(f"model = {str(tiny_model)!r}\nprompts = 'prompts.jsonl'\neval_prompts = 'prompts.jsonl'\nengine = 'transformers'\n"
                                 "max_new_tokens = 32\nranker = 'answer'\neval_ranker = 'answer'\ndtype = 'float32'\nloss = 'dpo'\n")
    return folder


def loop(folder, *arguments):
    """(exit code, output) of iterate.sh in a folder."""
    env = os.environ | {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"], "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(["bash", str(ROOT / "iterate.sh"), *arguments], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_it_prints_the_plan_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    code, text = loop(folder, "r.py", "--preflight")
    assert code == 0, text
    assert "0.04M parameters" in text and "first loss: 0.6931, " in text and "a response has 16 tokens (half of max_new_tokens" in text
    assert all(f"\n{stage} " in text for stage in ("generate", "rank", "train", "answers", "eval", "together"))
    assert sorted(folder.rglob("*")) == before


def test_it_refuses_what_cannot_fit_or_is_not_there(folder):
    code, text = loop(folder, "r.py", "--preflight", "--gpus=8x1x100")
    assert code == 1 and "does not fit:\n  generate: needs 1.5 GiB in each of 1 processes, there are 1.0; lower --generate_rows\n" in text
    assert loop(folder, "r.py", "--preflight", "--n_prompt=3") == (1, "--n_prompt=3: unknown setting 'n_prompt', did you mean 'n_prompts'?\n")
    assert loop(folder, "r.py", "--preflight", "--gpus=8")[1].endswith("--gpus=8: write NUMBERxGIBxTFLOPS, such as 8x80x400\n")
    assert loop(folder, "r.py", "--preflight", "--model=nowhere/none")[1].splitlines()[-1].startswith("--model=nowhere/none: no config.json")
    assert "unknown setting 'response_tokens'" in loop(folder, "r.py", "--response_tokens=3")[1]         # of the preflight alone
