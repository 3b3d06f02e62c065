"""estimate.py: its counts against real models and real training, and what it refuses.

What it says of a whole run is compared with the run in test_loop.py.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PLAIN, ROOT, build_model, run

from configurator import SCRIPTS, declared
from nanoaipo import estimate

GIB = 2**30


def settings(**changed):
    """All settings of all scripts at their defaults, but for those given."""
    every = {"out": "out/none", "prompts": "nobody/nothing:train"}
    for script in (*SCRIPTS, "nanoaipo/estimate.py"):
        for key, (value, *_) in declared(script).items():
            every.setdefault(key, value)
    assert changed.keys() <= every.keys()
    return SimpleNamespace(**every | changed)


def count(parameters):
    """How many numbers these parameters are."""
    return sum(p.numel() for p in parameters)


# ---- sizes, memory and losses against the real ones ----


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "architecture, config",
    [("Llama", {}), ("Gemma2", {"query_pre_attn_scalar": 8}), ("Qwen2", {})],
)
def test_parameters_are_counted_as_the_real_model_has_them(architecture, config, tied, tmp_path):
    from transformers import AutoModelForCausalLM

    name = build_model(tmp_path / "model", architecture, tie_word_embeddings=tied, **config)
    real = AutoModelForCausalLM.from_pretrained(name)

    m = estimate.model_sizes(str(name), "float32")

    assert m.parameters == count(real.parameters())
    assert m.trained == count(real.parameters())
    assert m.head == real.lm_head.weight.numel()
    assert m.body == count(real.model.layers.parameters())
    assert m.softcap is (architecture == "Gemma2")


def test_adapters_are_counted_as_peft_makes_them(tiny_model):
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), lm)

    m = estimate.model_sizes(str(tiny_model), "float32", 4)

    assert m.trained == count(p for name, p in adapted.named_parameters() if ".lora_" in name)


def random_ids(n):
    """Random ids of plain tokens, int32, as packing.pack reads them."""
    return torch.randint(6, 200, (n,), dtype=torch.int32).numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_what_a_token_keeps_for_backward_is_what_the_packed_row_keeps(
    architecture, dtype, tmp_path
):
    from transformers import AutoModelForCausalLM

    from nanoaipo.packing import pack

    name = build_model(tmp_path / "model", architecture, num_key_value_heads=4)
    lm = AutoModelForCausalLM.from_pretrained(
        name, dtype=getattr(torch, dtype), attn_implementation="packed_sdpa"
    )
    pairs = []
    for _ in range(4):
        pair = {
            "prompt_ids": random_ids(16),
            "chosen_ids": random_ids(72),
            "rejected_ids": random_ids(72),
        }
        pairs.append(pair)
    row, _, _ = pack(pairs, "packed_sdpa")

    # The storages that a real forward pass saves, weights left out
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    saved = {}

    def save(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        output = lm.base_model(
            input_ids=row["input_ids"],
            position_ids=row["position_ids"],
            use_cache=False,
            segments=row["segments"],
        )
    activations = [x.untyped_storage() for key, x in saved.items() if key not in weights]
    real = sum(storage.nbytes() for storage in activations) / row["input_ids"].numel()
    del output

    m = estimate.model_sizes(str(name), dtype)

    assert m.activation_bytes == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize(
    "given",
    [
        {"recompute": 0, "dtype": "float32"},
        {"recompute": 2, "dtype": "float32"},
        {"recompute": 1, "dtype": "bfloat16"},
    ],
    ids=["float32", "half", "bfloat16"],
)
def test_training_takes_the_memory_it_says(given, tmp_path):
    name = build_model(
        tmp_path / "model",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        head_dim=64,
        num_key_value_heads=4,
        vocab_size=8000,
        initializer_range=0.02,
    )
    pair = {
        "prompt": "p",
        "chosen": "c",
        "rejected": "r",
        "prompt_ids": [9] * 50,
        "chosen_ids": [10] * 100,
        "rejected_ids": [11] * 100,
    }
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)

    # -u: in a process of its own, with its own memory
    done = run(
        "train.py",
        python=["-u"],
        model=name,
        pairs=tmp_path / "pairs.jsonl",
        out=tmp_path / "policy",
        loss="dpo",
        batch_size=4,
        lr=1e-5,
        **given,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = (tmp_path / "policy/metrics.jsonl").read_text().splitlines()
    measured = json.loads(metrics[-1])["memory_gib"]
    imports = (
        "import nanoaipo.estimate, nanoaipo.policy, resource; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    baseline = int(run("-c", imports).stdout)

    m = estimate.model_sizes(str(name), given["dtype"])
    need = estimate.train_memory(m, settings(**given), 1000, 800, on_cpu=True)

    # A system may take back the libraries' pages, which are files
    assert 0.75 * need / GIB < measured
    assert measured < 1.25 * (need + baseline) / GIB


def test_recomputing_every_other_layer_lies_between_all_and_none(tmp_path):
    m = estimate.model_sizes(str(build_model(tmp_path / "model", num_hidden_layers=8)), "float32")
    need = {}
    for every in (0, 1, 2):
        s = settings(dtype="float32", recompute=every)
        need[every] = estimate.train_memory(m, s, 1000, 800, on_cpu=True)

    # half of the layers keep theirs, and one of the others is computed again
    share = (need[2] - need[1]) / (need[0] - need[1])
    assert 0.4 < share < 0.7


# ---- GPUs that are not here ----


@pytest.fixture
def refusals_of_70b(tmp_path, monkeypatch):
    """A function: the reasons why a 70B model cannot be trained on 8 GPUs of 80 GiB."""
    from transformers import LlamaConfig

    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e13))
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    config.save_pretrained(tmp_path)
    defaults = {
        "model": str(tmp_path),
        "engine": "vllm",
        "processes": 8,
        "engines": 2,
        "tensor_parallel": 4,
        "ranker": "answer",
        "gpus": "8x80",
    }

    def refusals(**changed):
        s = settings(**defaults | changed)
        lines, reasons = estimate.report(s, estimate.find_machine(s), 0)
        assert "70,553.71M parameters" in lines[0]
        assert lines[1].startswith(f"{s.gpus[0]} GPUs of ")
        assert not any(line.startswith("training time") for line in lines)  # not measured
        return reasons

    return refusals


def test_a_70b_model_is_planned_on_gpus_that_are_not_here(refusals_of_70b):
    # 16 bytes a parameter: 131 GiB on each of 8
    [train] = refusals_of_70b()
    assert train.startswith("train: needs 1")
    assert (
        "there are 80.0; weights, gradients and moments alone are 131.4: more --processes" in train
    )
    assert refusals_of_70b(lora_rank=16) == []

    [engine] = refusals_of_70b(engines=8, tensor_parallel=1, lora_rank=16)
    assert engine.startswith("generate: beside weights of 131.4 GiB")
    assert "--tensor_parallel" in engine

    # vLLM's share is of all memory, its CUDA context included
    assert refusals_of_70b(lora_rank=16, gpu_memory=0.99) == []

    assert refusals_of_70b(gpus="4x800") == [
        "--processes: 8 GPUs are wanted, there are 4",
        "--engines: 8 GPUs are wanted, there are 4",
    ]


def test_the_disk_is_checked_for_every_model_of_the_run(refusals_of_70b):
    [disk] = refusals_of_70b(lora_rank=16, iterations=100)

    assert disk.startswith("out/none: needs ")
    assert 13141 < float(disk.split()[2]) < 13500  # a model of 131 GiB each
    assert "GiB of disk, 9313.2 are free" in disk


# ---- as a user calls it ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A folder with prompts and a recipe."""
    folder = tmp_path_factory.mktemp("run")
    with open(folder / "prompts.jsonl", "w") as f:
        for k in range(20):
            f.write(json.dumps({"prompt": f"question {k}"}) + "\n")
    recipe = {
        "model": str(tiny_model),
        "prompts": "prompts.jsonl",
        "eval_prompts": "prompts.jsonl",
        "engine": "transformers",
        "max_new_tokens": 32,
        "ranker": "answer",
        "eval_ranker": "answer",
        "dtype": "float32",
        "loss": "dpo",
    }
    (folder / "r.py").write_text("".join(f"{k} = {v!r}\n" for k, v in recipe.items()))
    return folder


def preflight(folder, *arguments):
    """(Exit code, output) of iterate.sh --preflight with the recipe in a folder."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    done = subprocess.run(
        ["bash", str(ROOT / "iterate.sh"), "r.py", *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path, "VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_it_prints_the_plan_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))

    code, text = preflight(folder, "--preflight")

    assert code == 0, text
    assert "0.04M parameters" in text
    assert "a response has 16 tokens (half of max_new_tokens" in text
    for stage in ("generate", "train", "answers", "guard"):
        assert f"\n{stage} " in text
    assert sorted(folder.rglob("*")) == before


def test_a_loss_that_is_none_is_refused_before_the_run(folder):
    code, text = preflight(folder, "--preflight", "--loss=dp")

    assert code == 1
    assert text.startswith("--loss=dp: loss 'dp' is unknown")


def test_prompts_are_measured_as_the_runs_template_writes_them(tmp_path):
    template = PLAIN.replace("{{ bos_token }}", "{{ strftime_now('%A') }}{{ 'x' * extra }}")
    template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + template
    )
    model = build_model(tmp_path / "model", template=template)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "yes"}\n{"prompt": "no"}\n{"none": 1}\n')
    assumed = []

    def tokens(date, extra):
        kwargs = json.dumps({"extra": extra})
        s = settings(model=str(model), template_kwargs=kwargs, date=date)
        return estimate.prompt_sizes(str(path), "prompt", 0, s, assumed).tokens

    # the first is a Monday, the second a Wednesday; <|user|>yes<|end|><|assistant|> are six tokens
    assert tokens("2026-11-23", 0) == 6 + len("Monday")
    assert tokens("2026-11-25", 100) == 106 + len("Wednesday")
    assert "2 rows dropped: 1 no_messages (" in assumed[0]
    assert "1 refused_by_template (" in assumed[0]


def test_where_rows_are_padded_every_response_has_a_prompt_of_its_own(tmp_path, tiny_model):
    layers = ["conv", "full_attention"]
    padded = build_model(tmp_path / "model", "Lfm2", layer_types=layers, block_ff_dim=64)
    prompts = SimpleNamespace(number=8, tokens=300.0)
    s = settings(response_tokens=50.0, batch_size=8, tokens_per_microbatch=10_000)

    tokens = []
    for model in tiny_model, padded:
        m = estimate.model_sizes(str(model), "float32")
        assert bool(m.padded) == (model == padded)
        training = estimate.training_sizes(m, s, prompts)
        assert training.tokens == training.row_tokens
        tokens.append(training.tokens)

    assert tokens == [8 * (300 + 2 * 50), 8 * 2 * (300 + 50)]


def test_it_refuses_what_does_not_fit(folder):
    code, text = preflight(folder, "--preflight", "--gpus=8x1")

    assert code == 1
    refusal = "generate: needs 1.5 GiB in each of 1 processes, there are 1.0; lower --generate_rows"
    assert f"does not fit:\n  {refusal}\n" in text


def test_it_refuses_settings_that_cannot_be(folder):
    code, text = preflight(folder, "--preflight", "--n_prompt=3")
    assert code == 1
    assert text == "--n_prompt=3: unknown setting 'n_prompt', did you mean 'n_prompts'?\n"

    _, text = preflight(folder, "--preflight", "--gpus=8")
    assert text.endswith("--gpus=8: write NUMBERxGIB, such as 8x80\n")

    _, text = preflight(folder, "--preflight", "--model=nowhere/none")
    assert text.splitlines()[-1].startswith("--model=nowhere/none: no config.json")

    # A setting of the preflight alone
    _, text = preflight(folder, "--response_tokens=3")
    assert "unknown setting 'response_tokens'" in text
