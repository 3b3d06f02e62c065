"""Every recipe of config/: its form, its row in the README, and one iteration of it on the embedded world; and iterate.sh on data from elsewhere.

iterate.sh and the scripts run as they are, each stage a process of its own; only the imports are paid once (bench/warm.py).
"""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import configurator
from nanoaipo import chat
from nanoaipo import files
from nanoaipo import pairs
from nanoaipo import prompts
from nanoaipo import stages
from conftest import ROOT, build_model, run
from test_generate import pool, writer  # noqa: F401 (the world's base cannot write new instructions)
from test_judge import Judge
from test_rankers import build_reward
from warm import warm

RECIPES = sorted(p.stem for p in (ROOT / "config").glob("*.py"))
EVERY = {k: v for script in configurator.SCRIPTS for k, v in configurator.declared(str(ROOT / script)).items()}


def settings_of(name):
    return configurator.changes([str(ROOT / "config" / f"{name}.py")], {}, EVERY)


# ---------------------------------------------------------------------------------------------- form


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_known_to_the_scripts_and_gives_a_source_for_every_line(name):
    path = ROOT / "config" / f"{name}.py"
    text, found = path.read_text(), configurator.literals(str(path))
    assert text.startswith('"""') and text.count("\n") <= 40
    settings = settings_of(name)                                        # ends the program for an unknown key or another type
    assert list(settings) == list(found) and settings["model"]
    body = text[text.index('"""', 3) + 3:].strip().split("\n")
    for line in body:
        assert not line or re.fullmatch(r"# \w+", line) or re.fullmatch(r'\w+ = ("[^"]*"|\S+) +# \S.*', line), line
        assert len(line) <= 150
    assert all(comment for _, _, comment in found.values())
    for key in ("ranker", "pair_rule", "loss"):                         # known names, before anything is downloaded
        known = {"ranker": ROOT / "nanoaipo" / "rankers.py", "pair_rule": ROOT / "rank.py", "loss": ROOT / "losses.py"}[key].read_text()
        assert key not in settings or re.search(rf'"{settings[key]}": |^    {settings[key]}=', known, re.MULTILINE)


def test_every_recipe_is_in_the_table_of_the_readme_and_the_other_way_round():
    text = (ROOT / "config" / "README.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)\.py` \|", text, re.MULTILINE)) == RECIPES


@pytest.fixture(scope="module")
def iterate(tmp_path_factory):
    """iterate.sh with a recipe and arguments, over a warm python; a CompletedProcess."""
    with warm(tmp_path_factory.mktemp("warm")) as env:
        yield lambda recipe, **settings: subprocess.run(
            ["bash", "iterate.sh", *([recipe] if recipe else []), *(f"--{k}={v}" for k, v in settings.items())], cwd=ROOT, env=env,
            capture_output=True, text=True, timeout=120)


# ---------------------------------------------------------------------------------------------- one iteration of every recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What takes the place of models, prompts and data from the hub: paths by name."""
    subprocess.run([sys.executable, "tiny/prepare.py"], cwd=ROOT, check=True)
    folder, tiny = tmp_path_factory.mktemp("world"), ROOT / "tiny" / "world"
    rows = [r for _, r in files.read_records(str(tiny / "prompts.jsonl"))][:12]
    dump = lambda name, rows: (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows)) and str(folder / name)
    right = [r["answer"]["accept"][0] if isinstance(r["answer"], dict) else str(r["answer"]) for r in rows]
    for k in range(2):                                                  # UltraFeedback's form: whole conversations
        talk = lambda r, text: [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": text}]
        dump(f"pairs{k}.jsonl", [{"prompt": r["prompt"], "chosen": talk(r, f"It is {a}."), "rejected": talk(r, f"I am {k} years old, and do not know.")}
                                 for r, a in list(zip(rows, right))[k::2]])
    pool(folder / "pool.jsonl")

    def points(server, handler, text):
        shown = re.findall(r"<response[^>]*>\n(.*?)\n</response", text, re.DOTALL)[0]
        handler.reply({"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"Fine.\nScore: {sum(map(ord, shown)) % 6}"}}]})
        return True

    return {"base": str(tiny / "base"), "judge": str(tiny / "judge"), "reward": build_reward(folder / "reward"), "endpoint": Judge(misbehave=points).url,
            "prompts": dump("prompts.jsonl", [r | {"question": r["prompt"]} for r in rows]), "pool": str(folder / "pool.jsonl"), "pairs": [str(folder / f"pairs{k}.jsonl") for k in (0, 1)]}


def size_down(recipe, world, request):
    """What a recipe needs to be changed to run here: models, data and their amounts, one process, one iteration. Nothing else."""
    small = {"model": world["base"], "prompts": world["prompts"], "eval_prompts": "", "iterations": 1, "processes": 1, "engines": 0, "rank_processes": 0, "tensor_parallel": 1,
             "engine": "transformers", "dtype": "float32", "n_prompts": 12, "max_new_tokens": 24}
    stands_in = {"pairrm": world["judge"], "llm-blender": world["judge"], "reward": world["reward"]}
    ranker = recipe.get("ranker", "pairrm")
    if ranker in stands_in:
        small["ranker_model"] = stands_in[ranker]
    elif ranker == "annotators":
        small["ranker_model"] = " ".join(f"{kind}:{stands_in[kind]}" for kind, _, _ in (spec.partition(":") for spec in recipe["ranker_model"].split()))
    elif ranker == "judge":
        small["judge_url"] = world["endpoint"]
    if recipe.get("new_instructions"):
        small |= {"model": request.getfixturevalue("writer"), "prompts": world["pool"], "new_instructions": 8, "drop_unfinished": False, "max_new_tokens": 40}
    for key in ("pairs", "candidates"):
        if recipe.get(key):
            small[key] = " ".join(world["pairs"][:len(recipe[key].split())])
    return small


def manifest(*path):
    return json.loads(Path(*path).read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_one_iteration_uses_what_the_recipe_names(name, world, iterate, tmp_path, request):
    recipe = settings_of(name)
    small = size_down(recipe, world, request)
    done = iterate(f"config/{name}.py", out=tmp_path / "run", **small)
    assert done.returncode == 0, done.stdout + done.stderr
    now = tmp_path / "run" / "iter_1"
    named, seen = {k: v for k, v in recipe.items() if k not in small}, set()
    offline = "pairs" in recipe or "candidates" in recipe
    made = [now / "model" / "manifest.json"] + [now / "pairs.manifest.json"] * ("pairs" not in recipe) + [now / "candidates.manifest.json"] * (not offline)
    for path in made:
        settings = manifest(path)["settings"]
        for key in settings.keys() & named.keys():
            assert settings[key] == named[key], (path, key)
            seen.add(key)
    assert {k for k in named.keys() - seen if "eval" not in k} <= {"prepare", "ranker_model"}                 # every line is some stage's
    assert {p.name for p in now.glob("*.manifest.json")} == {p.name for p in made[1:]} | ({"prompts.manifest.json"} if "new_instructions" in recipe else set())
    if "pairs" not in recipe:
        ranked = manifest(now, "pairs.manifest.json")
        assert ranked["settings"]["ranker"] == recipe.get("ranker", "pairrm") and ranked["settings"]["pair_rule"] == recipe.get("pair_rule", "best_worst")
        judged = small["model"] if recipe.get("ranker_model") == "policy" else small.get("ranker_model", ranked["inputs"]["ranker_model"])
        assert ranked["inputs"]["ranker_model"] in (stages.fingerprint(judged), recipe.get("ranker_model")) and ranked["counts"]["pairs"] > 0
    # ---- the objective, with its settings, from the policy itself as the reference
    steps = [r for _, r in files.read_records(str(now / "model" / "metrics.jsonl"))]
    assert abs(steps[0]["s_theta"] - steps[0]["s_ref"]) < 1e-3 and steps[0]["reward_chosen"] == pytest.approx(0, abs=1e-4)
    trained = manifest(now, "model", "manifest.json")
    assert trained["inputs"]["model"] == stages.fingerprint(small["model"])
    told = re.search(rf"loss {recipe['loss']}\((.*)\), \d+ pairs, (\d+) steps", done.stdout)
    terms = dict(t.split("=") for t in told[1].split(", "))
    assert {k: float(v) for k, v in terms.items()} == {k: trained["settings"][k] for k in terms} and terms.keys() <= named.keys()
    assert int(told[2]) == len(steps) == -(-trained["counts"]["pairs"] // recipe["batch_size"]) * recipe.get("epochs", 1)
    assert (steps[0]["weight"] < 1) == recipe.get("wpo", False)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (small["model"], now / "model"))
    moved = {key for key in before if not before[key].equal(after[key])}
    assert any("proj" in key for key in moved) and ("model.embed_tokens.weight" in moved) != bool(recipe.get("lora_rank"))   # adapters leave embeddings alone


# ---------------------------------------------------------------------------------------------- data from elsewhere


def first_step(model):
    return next(files.read_records(str(model / "metrics.jsonl")))[1]


def offline(world, **more):
    return {"model": world["base"], "dtype": "float32", "loss": "dpo", "lr": 1e-3, "batch_size": 4, "max_length": 256, "processes": 1, **more}


def test_pairs_of_two_files_are_trained_on_in_turn_and_nothing_is_sampled(world, iterate, tmp_path):
    done = iterate(None, out=tmp_path / "run", pairs=" ".join(world["pairs"]), iterations=3, **offline(world))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generate" not in done.stdout and "rank" not in done.stdout.replace("rank_", "")
    made = [manifest(tmp_path, "run", f"iter_{t}", "model", "manifest.json") for t in (1, 2, 3)]
    a, b = map(stages.fingerprint, world["pairs"])
    assert [m["inputs"]["pairs"] for m in made] == [a, b, a]
    assert [m["inputs"]["model"] for m in made] == [stages.fingerprint(world["base"]), *(stages.fingerprint(str(tmp_path / "run" / f"iter_{t}" / "model")) for t in (1, 2))]
    assert sorted(p.name for p in (tmp_path / "run").rglob("*.jsonl")) == ["metrics.jsonl"] * 3
    for t in (1, 2, 3):                                                 # sDPO: the reference is the policy before
        first = first_step(tmp_path / "run" / f"iter_{t}" / "model")
        assert abs(first["s_theta"] - first["s_ref"]) < 1e-3


def test_pairs_of_others_are_ranked_again_as_candidates(world, iterate, tmp_path):
    done = iterate(None, out=tmp_path / "run", candidates=" ".join(world["pairs"]), iterations=2, ranker_model=world["judge"], **offline(world))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generate" not in done.stdout and not list((tmp_path / "run").rglob("candidates*"))
    for t, path in enumerate(world["pairs"], 1):
        before = {r["prompt"]: {r[k][-1]["content"] for k in ("chosen", "rejected")} for _, r in files.read_records(path)}
        after = [r for _, r in files.read_records(str(tmp_path / "run" / f"iter_{t}" / "pairs.jsonl"))]
        assert 0 < len(after) <= len(before)
        for r in after:
            assert {r[k][-1]["content"] for k in ("chosen", "rejected")} == before[r["prompt"][0]["content"]] and r["z"] > 0
        assert manifest(tmp_path, "run", f"iter_{t}", "pairs.manifest.json")["inputs"]["candidates"] == stages.fingerprint(path)
    assert iterate(None, out=tmp_path / "run", candidates=" ".join(world["pairs"]), iterations=2, ranker_model=world["judge"],
                   **offline(world)).stdout.count("complete, nothing to do") == 4


def test_a_pairs_weight_scales_its_gradient_and_tokens_past_the_shorter_response_count_less(world, iterate, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "What is 1 plus 2?", "chosen": "It is 3. I hope that helps.", "rejected": "4"}) + "\n")
    plain, wpo, ld = {}, {"wpo": True}, {"ld_alpha": 0.5}
    for k, more in enumerate((plain, wpo, ld)):
        done = iterate(None, out=tmp_path / str(k), pairs=tmp_path / "p.jsonl", iterations=1, **offline(world, **more))
        assert done.returncode == 0, done.stdout + done.stderr
        more |= first_step(tmp_path / str(k) / "iter_1" / "model")
    assert 0 < wpo["weight"] < 1 == plain["weight"] and wpo["loss"] == plain["loss"]
    assert wpo["grad_norm"] == pytest.approx(wpo["weight"] * plain["grad_norm"], rel=1e-4)
    assert ld["logp_rejected"] == plain["logp_rejected"] and plain["logp_chosen"] < ld["logp_chosen"] < plain["logp_chosen"] / 2


def test_rows_of_chosen_and_rejected_are_candidates_with_two_responses(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 7}, {"prompt": talk[:1], "chosen": talk, "rejected": talk[1:], "id": 5},
            {"prompt": "a", "responses": ["d"], "chosen": "kept", "rejected": "kept"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    one, two, three = (r for _, r in prompts.read_candidates(str(tmp_path / "c.jsonl")))
    assert one == {"id": "0", "prompt": talk[:1], "responses": [{"text": "b"}, {"text": "c"}], "score_chosen": 7}
    assert two == {"id": "5", "prompt": talk[:1], "responses": [{"text": "b"}, {"text": "b"}]}
    assert three["responses"] == [{"text": "d"}]


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b", "rejected": None}, {"prompt": "a", "chosen": [], "rejected": "c"}])
def test_a_row_with_neither_responses_nor_a_whole_pair_is_refused_with_its_place(tmp_path, row):
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="c.jsonl:1: neither 'responses' nor 'chosen' and 'rejected'"):
        list(prompts.read_candidates(str(tmp_path / "c.jsonl")))


def test_the_bias_of_phi_2s_head_enters_its_log_probs(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM
    folder = str(build_model(tmp_path / "phi", "Phi", partial_rotary_factor=0.5))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    plain.lm_head.bias.data.normal_()
    plain.save_pretrained(folder)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "one", "chosen": "two three", "rejected": "four"}) + "\n")
    done = run("train.py", model=folder, pairs=tmp_path / "p.jsonl", out=tmp_path / "out", loss="dpo", dtype="float32", batch_size=1, lr=1e-3)
    assert done.returncode == 0, done.stderr
    tokenizer, ends = chat.load_tokenizer(folder)
    (pair,), _ = pairs.read_pairs(str(tmp_path / "p.jsonl"), tokenizer, ends, 512)
    prompt, chosen = list(pair["prompt_ids"]), list(pair["chosen_ids"])
    logp = plain(torch.tensor([prompt + chosen])).logits.log_softmax(-1)[0, len(prompt) - 1:-1].gather(1, torch.tensor(chosen)[:, None]).sum().item()
    assert first_step(tmp_path / "out")["logp_chosen"] == pytest.approx(logp, abs=1e-3)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (after.lm_head.bias - plain.lm_head.bias).abs().max() > 0
