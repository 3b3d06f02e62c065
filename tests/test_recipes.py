"""Every recipe of config/: its form, its row in the README, one iteration of it on the tiny world.

Then iterate.sh on data from elsewhere. It and the scripts run as they are, each stage a process of
its own; only the imports are paid once (bench/warm.py).
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, build_model, run, warm_environment
from safetensors.torch import load_file
from test_generate import pool, writer  # noqa: F401 (the world's base writes no instructions)
from test_judge import Judge, choice
from test_rankers import build_reward

import configurator
from nanoaipo import chat, files, pairs, prompts, stages
from nanoaipo.errors import InputError

RECIPES = sorted(path.stem for path in (ROOT / "config").glob("*.py"))


def all_settings():
    """The settings of all scripts, as the configurator declares them."""
    settings = {}
    for script in configurator.SCRIPTS:
        settings |= configurator.declared(str(ROOT / script))
    return settings


EVERY = all_settings()


def settings_of(name):
    """What a recipe sets, checked by the configurator."""
    return configurator.changes([str(ROOT / "config" / f"{name}.py")], {}, EVERY)


def read(path):
    """The records of a file."""
    return [record for _, record in files.read_records(str(path))]


def write(path, rows):
    """Write rows as JSONL; the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def manifest(*path):
    """The manifest in this file."""
    return json.loads(Path(*path).read_text())


# ---------------------------------------------------------------------------- form


def names_in(path, name):
    """Whether a name is a key of one of this file's tables."""
    text = path.read_text()
    return re.search(rf'"{name}": |^    {name}=', text, re.MULTILINE) is not None


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_known_to_the_scripts_and_gives_a_source_for_every_line(name):
    path = ROOT / "config" / f"{name}.py"
    text = path.read_text()
    found = configurator.literals(str(path))

    assert text.startswith('"""')
    assert text.count("\n") <= 40
    assert all(len(line) <= 100 for line in text.split("\n"))

    # the configurator refuses an unknown key or another type
    settings = settings_of(name)
    assert list(settings) == list(found)
    assert settings["model"]

    # behind the docstring: settings with a comment each, headings, empty lines
    body = text[text.index('"""', 3) + 3 :].strip().split("\n")
    for line in body:
        is_setting = re.fullmatch(r'\w+ = ("[^"]*"|\S+) +# \S.*', line)
        is_heading = re.fullmatch(r"# \w+", line)
        assert not line or is_heading or is_setting, line
    for _, _, comment in found.values():
        assert comment

    # known names, before anything is downloaded
    tables = {
        "ranker": ROOT / "nanoaipo" / "rankers.py",
        "pair_rule": ROOT / "rank.py",
        "loss": ROOT / "losses.py",
    }
    for key, table in tables.items():
        if key in settings:
            assert names_in(table, settings[key]), key


def test_every_recipe_is_in_the_table_of_the_readme_and_the_other_way_round():
    text = (ROOT / "config" / "README.md").read_text()

    assert sorted(re.findall(r"^\| `(\w+)\.py` \|", text, re.MULTILINE)) == RECIPES


# ---------------------------------------------------------------------------- one iteration of each


@pytest.fixture(scope="module")
def iterate():
    """iterate.sh with a recipe and settings, over a warm python; a CompletedProcess."""

    def run_loop(recipe, **settings):
        command = ["bash", "iterate.sh"]
        if recipe:
            command.append(recipe)
        for key, value in settings.items():
            command.append(f"--{key}={value}")
        return subprocess.run(
            command,
            cwd=ROOT,
            env=warm_environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run_loop


def points(server, handler, text):
    """A Judge's reply whose score looks random, but depends on the response alone."""
    response = re.findall(r"<response[^>]*>\n(.*?)\n</response", text, re.DOTALL)[0]
    score = sum(map(ord, response)) % 6
    handler.reply(choice(f"Fine.\nScore: {score}", finish_reason="stop"))
    return True


def conversation(prompt, response):
    """Both as messages, as UltraFeedback has them."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What takes the place of models, prompts and data from the hub: paths by name."""
    subprocess.run([sys.executable, "tiny/prepare.py"], cwd=ROOT, check=True)
    tiny = ROOT / "tiny" / "world"
    folder = tmp_path_factory.mktemp("world")

    # the same prompts in a column of another name too
    rows = read(tiny / "prompts.jsonl")[:12]
    questions = [row | {"question": row["prompt"]} for row in rows]

    # right answers against none, in two files
    both = ([], [])
    for n, row in enumerate(rows):
        answer = row["answer"]
        right = answer["accept"][0] if isinstance(answer, dict) else str(answer)
        k = n % 2
        pair = {
            "prompt": row["prompt"],
            "chosen": conversation(row["prompt"], f"It is {right}."),
            "rejected": conversation(row["prompt"], f"I am {k} years old, and do not know."),
        }
        both[k].append(pair)

    pool(folder / "pool.jsonl")
    return {
        "base": str(tiny / "base"),
        "judge": str(tiny / "judge"),
        "reward": build_reward(folder / "reward"),
        "endpoint": Judge(misbehave=points).url,
        "prompts": write(folder / "prompts.jsonl", questions),
        "pool": str(folder / "pool.jsonl"),
        "pairs": [write(folder / f"pairs{k}.jsonl", both[k]) for k in (0, 1)],
    }


def size_down(recipe, world, request):
    """What a recipe needs to be changed to run here: models, data, amounts, processes; no more."""
    small = {
        "model": world["base"],
        "prompts": world["prompts"],
        "prepare": "",
        "eval_prompts": "",
        "iterations": 1,
        "processes": 1,
        "engines": 0,
        "rank_processes": 0,
        "tensor_parallel": 1,
        "engine": "transformers",
        "dtype": "float32",
        "compile": False,
        "n_prompts": 12,
        "max_new_tokens": 24,
    }

    # small rankers in the place of the recipe's
    models = {"pairrm": world["judge"], "llm-blender": world["judge"], "reward": world["reward"]}
    ranker = recipe.get("ranker", "pairrm")
    if ranker in models:
        small["ranker_model"] = models[ranker]
    elif ranker == "annotators":
        annotators = []
        for annotator in recipe["ranker_model"].split():
            kind = annotator.partition(":")[0]
            annotators.append(f"{kind}:{models[kind]}")
        small["ranker_model"] = " ".join(annotators)
    elif ranker == "judge":
        small["judge_url"] = world["endpoint"]

    # a policy that can write instructions
    if recipe.get("new_instructions"):
        small |= {
            "model": request.getfixturevalue("writer"),
            "prompts": world["pool"],
            "new_instructions": 8,
            "drop_unfinished": False,
            "max_new_tokens": 40,
        }

    # as many files as the recipe names
    for key in ("pairs", "candidates"):
        if recipe.get(key):
            n_files = len(recipe[key].split())
            small[key] = " ".join(world["pairs"][:n_files])
    return small


def check_stages(recipe, small, iteration_dir):
    """Every line of the recipe is some stage's, as its manifest has it; no other stage has run."""
    named = {key: value for key, value in recipe.items() if key not in small}
    made = [iteration_dir / "model" / "manifest.json"]
    if "pairs" not in recipe:
        made.append(iteration_dir / "pairs.manifest.json")
    if "pairs" not in recipe and "candidates" not in recipe:
        made.append(iteration_dir / "candidates.manifest.json")

    seen = set()
    for path in made:
        settings = manifest(path)["settings"]
        for key in settings.keys() & named.keys():
            assert settings[key] == named[key], (path, key)
            seen.add(key)
    unseen = {key for key in named.keys() - seen if "eval" not in key}
    assert unseen <= {"prepare", "ranker_model", "unasked", "untold"}  # the last two: prepare's

    expected = {path.name for path in made[1:]}
    if "new_instructions" in recipe:
        expected.add("prompts.manifest.json")
    assert {path.name for path in iteration_dir.glob("*.manifest.json")} == expected


def check_ranking(recipe, small, iteration_dir):
    """Pairs were made by the ranker, its model and the rule that the recipe names."""
    ranked = manifest(iteration_dir, "pairs.manifest.json")
    assert ranked["settings"]["ranker"] == recipe.get("ranker", "pairrm")
    assert ranked["settings"]["pair_rule"] == recipe.get("pair_rule", "best_worst")
    assert ranked["counts"]["pairs"] > 0

    # the ranker that compares answers reads no model
    if recipe.get("ranker") == "answer":
        assert "ranker_model" not in ranked["inputs"]
        return

    # a model here by its fingerprint, one at an endpoint by its name
    used = ranked["inputs"]["ranker_model"]
    if recipe.get("ranker_model") == "policy":
        ranker_model = small["model"]
    else:
        ranker_model = small.get("ranker_model", used)
    assert used in (stages.fingerprint(ranker_model), recipe.get("ranker_model"))


def check_training(recipe, small, iteration_dir, printed):
    """The objective, with its settings, from the policy itself as the reference."""
    trained = manifest(iteration_dir, "model", "manifest.json")
    steps = read(iteration_dir / "model" / "metrics.jsonl")
    assert trained["inputs"]["model"] == stages.fingerprint(small["model"])
    assert abs(steps[0]["s_theta"] - steps[0]["s_ref"]) < 1e-3
    assert steps[0]["reward_chosen"] == pytest.approx(0, abs=1e-4)

    # what train.py prints: loss NAME(key=value, ...), so many pairs, so many steps
    pattern = rf"loss {recipe['loss']}\((.*)\), \d+ pairs, (\d+) steps"
    terms_text, n_steps = re.search(pattern, printed).groups()
    terms = dict(term.split("=") for term in terms_text.split(", "))
    for key, value in terms.items():
        assert float(value) == trained["settings"][key]
        assert key in recipe
        assert key not in small

    n_batches = -(-trained["counts"]["pairs"] // recipe["batch_size"])  # rounded up
    assert int(n_steps) == len(steps) == n_batches * recipe.get("epochs", 1)
    assert (steps[0]["weight"] < 1) == recipe.get("wpo", False)

    # adapters leave the embeddings alone
    before = load_file(f"{small['model']}/model.safetensors")
    after = load_file(iteration_dir / "model" / "model.safetensors")
    moved = {key for key in before if not before[key].equal(after[key])}
    assert any("proj" in key for key in moved)
    assert ("model.embed_tokens.weight" in moved) != bool(recipe.get("lora_rank"))


@pytest.mark.parametrize("name", RECIPES)
def test_one_iteration_uses_what_the_recipe_names(name, world, iterate, tmp_path, request):
    recipe = settings_of(name)
    small = size_down(recipe, world, request)

    done = iterate(f"config/{name}.py", out=tmp_path / "run", **small)

    assert done.returncode == 0, done.stdout + done.stderr
    iteration_dir = tmp_path / "run" / "iter_1"
    check_stages(recipe, small, iteration_dir)
    if "pairs" not in recipe:
        check_ranking(recipe, small, iteration_dir)
    check_training(recipe, small, iteration_dir, done.stdout)


# ---------------------------------------------------------------------------- data from elsewhere


def first_step(model):
    """The first step's record of a trained model."""
    return next(files.read_records(str(model / "metrics.jsonl")))[1]


def offline(world, **more):
    """The settings of DPO on pairs, small enough for here."""
    settings = {
        "model": world["base"],
        "dtype": "float32",
        "loss": "dpo",
        "lr": 1e-3,
        "batch_size": 4,
        "max_length": 256,
        "processes": 1,
    }
    return settings | more


def test_pairs_of_two_files_are_trained_on_in_turn_and_nothing_is_sampled(world, iterate, tmp_path):
    run_dir = tmp_path / "run"
    names = " ".join(world["pairs"])

    done = iterate(None, out=run_dir, pairs=names, iterations=3, **offline(world))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "generate" not in done.stdout
    assert "rank" not in done.stdout.replace("rank_", "")
    assert sorted(path.name for path in run_dir.rglob("*.jsonl")) == ["metrics.jsonl"] * 3

    # first file, second file, first file; each time from the model before
    files_in_turn = [world["pairs"][0], world["pairs"][1], world["pairs"][0]]
    policy = world["base"]
    for t, path in enumerate(files_in_turn, 1):
        model = run_dir / f"iter_{t}" / "model"
        made = manifest(model, "manifest.json")
        assert made["inputs"]["pairs"] == stages.fingerprint(path)
        assert made["inputs"]["model"] == stages.fingerprint(policy)
        # sDPO: the reference is the policy before
        step = first_step(model)
        assert abs(step["s_theta"] - step["s_ref"]) < 1e-3
        policy = str(model)


def last_contents(row):
    """The texts of a pair's two responses."""
    return {row[key][-1]["content"] for key in ("chosen", "rejected")}


def test_pairs_of_others_are_ranked_again_as_candidates(world, iterate, tmp_path):
    run_dir = tmp_path / "run"
    settings = {
        "out": run_dir,
        "candidates": " ".join(world["pairs"]),
        "iterations": 2,
        "ranker_model": world["judge"],
        **offline(world),
    }

    done = iterate(None, **settings)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "generate" not in done.stdout
    assert not list(run_dir.rglob("candidates*"))
    for t, path in enumerate(world["pairs"], 1):
        before = {row["prompt"]: last_contents(row) for row in read(path)}
        after = read(run_dir / f"iter_{t}" / "pairs.jsonl")
        assert 0 < len(after) <= len(before)
        for row in after:
            assert last_contents(row) == before[row["prompt"][0]["content"]]
            assert row["z"] > 0
        ranked = manifest(run_dir, f"iter_{t}", "pairs.manifest.json")
        assert ranked["inputs"]["candidates"] == stages.fingerprint(path)

    again = iterate(None, **settings)
    assert again.stdout.count("complete, nothing to do") == 4


def test_a_pairs_weight_scales_its_gradient_and_tokens_past_the_shorter_response_count_less(
    world, iterate, tmp_path
):
    pair = {
        "prompt": "What is 1 plus 2?",
        "chosen": "It is 3. I hope that helps.",
        "rejected": "4",
    }
    path = write(tmp_path / "p.jsonl", [pair])
    steps = {}
    for name, more in {"plain": {}, "wpo": {"wpo": True}, "ld": {"ld_alpha": 0.5}}.items():
        out = tmp_path / name
        done = iterate(None, out=out, pairs=path, iterations=1, **offline(world, **more))
        assert done.returncode == 0, done.stdout + done.stderr
        steps[name] = first_step(out / "iter_1" / "model")

    plain, wpo, ld = steps["plain"], steps["wpo"], steps["ld"]
    assert 0 < wpo["weight"] < 1
    assert plain["weight"] == 1
    assert wpo["loss"] == plain["loss"]
    assert wpo["grad_norm"] == pytest.approx(wpo["weight"] * plain["grad_norm"], rel=1e-4)
    assert ld["logp_rejected"] == plain["logp_rejected"]
    assert plain["logp_chosen"] < ld["logp_chosen"] < plain["logp_chosen"] / 2


def test_rows_of_chosen_and_rejected_are_candidates_with_two_responses(tmp_path):
    talk = conversation("a", "b")
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 7},
        {"prompt": talk[:1], "chosen": talk, "rejected": talk[1:], "id": 5},
        {"prompt": "a", "responses": ["d"], "chosen": "kept", "rejected": "kept"},
    ]
    path = write(tmp_path / "c.jsonl", rows)

    texts, messages, candidates = (row for _, row in prompts.read_candidates(path))

    assert texts == {
        "id": "0",
        "prompt": talk[:1],
        "responses": [{"text": "b"}, {"text": "c"}],
        "score_chosen": 7,
    }
    assert messages == {
        "id": "5",
        "prompt": talk[:1],
        "responses": [{"text": "b"}, {"text": "b"}],
    }
    assert candidates["responses"] == [{"text": "d"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a"},
        {"prompt": "a", "chosen": "b"},
        {"prompt": "a", "chosen": "b", "rejected": None},
        {"prompt": "a", "chosen": [], "rejected": "c"},
    ],
)
def test_a_row_with_neither_responses_nor_a_whole_pair_is_refused_with_its_place(tmp_path, row):
    path = write(tmp_path / "c.jsonl", [row])

    message = "c.jsonl:1: neither 'responses' nor 'chosen' and 'rejected'"
    with pytest.raises(InputError, match=message):
        list(prompts.read_candidates(path))


def test_the_bias_of_phi_2s_head_enters_its_log_probs(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = str(build_model(tmp_path / "phi", "Phi", partial_rotary_factor=0.5))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    plain.lm_head.bias.data.normal_()
    plain.save_pretrained(folder)
    pair = {"prompt": "one", "chosen": "two three", "rejected": "four"}
    path = write(tmp_path / "p.jsonl", [pair])

    done = run(
        "train.py",
        model=folder,
        pairs=path,
        out=tmp_path / "out",
        loss="dpo",
        dtype="float32",
        batch_size=1,
        lr=1e-3,
    )

    assert done.returncode == 0, done.stderr

    # log-prob of the chosen response by transformers' own forward pass
    tokenizer, eos_ids = chat.load_tokenizer(folder)
    (pair,), _ = pairs.read_pairs(path, tokenizer, eos_ids, 512)
    prompt_ids = list(pair["prompt_ids"])
    chosen_ids = list(pair["chosen_ids"])
    logits = plain(torch.tensor([prompt_ids + chosen_ids])).logits[0]  # (T, V)
    logps = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
    logp = logps.gather(1, torch.tensor(chosen_ids)[:, None]).sum().item()
    assert first_step(tmp_path / "out")["logp_chosen"] == pytest.approx(logp, abs=1e-3)

    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (after.lm_head.bias - plain.lm_head.bias).abs().max() > 0


def test_checkable_instructions_stand_behind_the_prompts_that_the_policy_wrote(
    world, iterate, tmp_path, request
):
    small = size_down({"new_instructions": 8}, world, request)
    small |= {"checkable": 1, "loss": "dpo", "batch_size": 4}

    done = iterate("", out=tmp_path / "run", **small)

    assert done.returncode == 0, done.stdout + done.stderr
    iteration_dir = tmp_path / "run" / "iter_1"
    written = read(iteration_dir / "prompts.jsonl")
    sampled = read(iteration_dir / "candidates.jsonl")
    assert len(written) == len(sampled) == 8
    for row in sampled:
        assert len(row["answer"]["follow"]) == 1
