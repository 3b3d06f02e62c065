"""Settings: what beats what, what is refused and how; and importing the scripts."""

import ast
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import configurator
from nanoaipo.errors import InputError
from nanoaipo.run import SET_FOR_STAGES, settings_of_run

SCRIPT = '''"""What it does."""
from configurator import configure
beta = 0.1                              # strength
steps = 10                              # count
name = "x"                              # text
fast = False                            # flag
config = configure(globals())
print(config, beta)
'''


def every_setting():
    """The settings of all scripts, as `declared` gives them."""
    every = {}
    for script in configurator.SCRIPTS:
        every |= configurator.declared(script)
    return every


@pytest.fixture
def run(tmp_path):
    """Runs a script with the settings above, with arguments; returns (exit code, output)."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*arguments, **recipe):
        if recipe:
            lines = [f"{key} = {value!r}  # why\n" for key, value in recipe.items()]
            (tmp_path / "recipe.py").write_text("".join(lines))
            arguments = ("recipe.py", *arguments)
        done = subprocess.run(
            [sys.executable, "script.py", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run


# -------------------------------------------------------------------------------------- one script


def test_the_command_line_beats_the_recipe_and_the_recipe_the_default(run):
    code, text = run("--beta=0.3", beta=0.2, steps=5)

    assert code == 0
    assert "{'beta': 0.3, 'steps': 5, 'name': 'x', 'fast': False} 0.3" in text


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--beta=1", "'beta': 1.0"),
        ("--steps=3", "'steps': 3"),
        ("--name=3", "'name': '3'"),
        ("--fast=True", "'fast': True"),
        ("--fast=false", "'fast': False"),
        ("--name=", "'name': ''"),
    ],
)
def test_a_value_takes_the_type_of_the_default(run, argument, value):
    code, text = run(argument)

    assert code == 0
    assert value in text


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--bета=1", "unknown setting"),
        ("--bete=1", "did you mean 'beta'"),
        ("--steps=0.5", "takes a value of type int"),
        ("--fast=1", "takes a value of type bool"),
        ("--beta", "write --beta=value"),
        ("--loss=dpo", "unknown setting 'loss'"),
        ("--beta 0.2", "--beta 0.2: write --beta=0.2"),
        ("--steps -1 --beta=1", "--steps -1: write --steps=-1"),
        ("--bete 0.2", "--bete: unknown setting 'bete', did you mean 'beta'"),
        ("--steps= 3", "--steps= 3: write --steps=3"),
        ("--steps= -1", "--steps= -1: write --steps=-1"),
        ("--steps =3", "--steps =3: write --steps=3"),
        ("--steps = 3", "--steps =: write --steps=value"),
        ("-steps=3", "-steps=3: write --steps=3"),
        ("—steps=3", "—steps=3: write --steps=3"),
        ("steps=3", "steps=3: write --steps=3"),
        ("-stebs=3", "-stebs=3: unknown setting 'stebs', did you mean 'steps'"),
        ("--steps=4294967296", "--steps=4294967296: at most 4294967295 is what 'steps' takes"),
    ],
)
def test_a_wrong_argument_ends_with_one_line_that_says_what_is_right(run, argument, message):
    code, text = run(*argument.split())

    assert code == 1
    assert message in text
    assert text.count("\n") == 1


def refusal(*arguments):
    """The line with which these arguments are refused."""
    every = every_setting()
    with pytest.raises(InputError) as refused:
        configurator.changes(arguments, every, every)
    return str(refused.value)


@pytest.mark.parametrize("address", ["http://me:KEY@host/v1", "https://h/v1?k=KEY", "http://h#KEY"])
def test_a_key_in_an_address_is_refused_and_shown_nowhere(address, tmp_path):
    recipe = tmp_path / "r=1.py"
    recipe.write_text(f"judge_url = '{address}'\n")

    fix = ": holds a user or a key (@, ? or #); the key belongs in OPENAI_API_KEY"
    assert refusal(f"--judge_url={address}") == "--judge_url" + fix
    assert refusal(f"--engine_url={address}") == "--engine_url" + fix
    assert refusal(str(recipe)) == f"{recipe}:1" + fix

    # where it is written otherwise, too
    assert "KEY" not in refusal("--judge_url", address)
    assert "KEY" not in refusal(f"-judge_url={address}")
    assert "KEY" not in refusal("--api_key=KEY")


def test_a_share_is_one_at_most():
    for key in configurator.SHARES:
        assert refusal(f"--{key}=1.5").startswith(f"--{key}=1.5: at most 1 is what '{key}' takes")


def test_a_recipe_may_stand_behind_an_empty_setting(run, tmp_path):
    (tmp_path / "r=1.py").write_text("steps = 3\n")

    code, text = run("--name=", "r=1.py")

    assert code == 0
    assert "'steps': 3, 'name': ''" in text


def test_a_recipe_may_hold_keys_of_every_script_but_no_unknown_one(run):
    code, _ = run(loss="dpo", n_prompts=3, beta=1)
    assert code == 0

    code, text = run(los="dpo")
    assert code == 1
    assert "recipe.py:1: unknown setting 'los', did you mean 'loss'?" in text

    code, text = run(beta="high")
    assert code == 1
    assert "recipe.py:1: 'beta' takes a value of type float" in text


def test_a_recipe_is_data_not_code(run, tmp_path):
    (tmp_path / "bad.py").write_text('beta = 0.1\nsteps = open("x")\n')

    code, text = run("bad.py")

    assert code == 1
    assert "bad.py:2: a recipe holds `name = literal` lines only" in text

    # the second name of such a line used to be ignored in silence
    (tmp_path / "bad.py").write_text("beta = alpha = 0.2\n")
    code, text = run("bad.py")
    assert code == 1
    assert "bad.py:1: a recipe holds `name = literal` lines only" in text

    assert run("missing.py") == (1, "missing.py: no such recipe\n")


def test_a_recipe_is_read_as_python_counts_its_lines(run, tmp_path):
    # a byte order mark before it, and in a comment what only some take for the end of a line
    (tmp_path / "r.py").write_text("\ufeff# a\u2028b\x0c\nsteps = 3\n", encoding="utf-8")
    code, text = run("r.py")
    assert code == 0
    assert "'steps': 3" in text

    (tmp_path / "r.py").write_text("# a\u2028b\x0c\nsteps = int(3)\n", encoding="utf-8")
    _, text = run("r.py")
    assert text.endswith(
        "r.py:2: a recipe holds `name = literal` lines only, not: steps = int(3)\n"
    )


def test_help_lists_every_setting_with_its_comment(run):
    code, text = run("--help")

    assert code == 0
    assert "What it does." in text
    assert "--beta=0.1" in text
    assert "strength" in text


def test_at_a_python_prompt_a_wrong_setting_is_an_error_and_not_the_end(tmp_path):
    own = configurator.declared("train.py")
    (tmp_path / "bad.py").write_text("import os\n")

    with pytest.raises(InputError, match="--bta=1: unknown setting 'bta', did you mean 'beta'"):
        configurator.changes(["--bta=1"], own, own)
    with pytest.raises(InputError, match="one recipe at most, got a.py b.py"):
        configurator.changes(["a.py", "b.py"], own, own)
    with pytest.raises(InputError, match="here: 'beta' takes a value of type float"):
        configurator.cast("here", "beta", "high", 0.1)
    with pytest.raises(InputError, match="nowhere.py: no such recipe"):
        configurator.literals("nowhere.py")
    with pytest.raises(InputError, match="bad.py:1: a recipe holds `name = literal` lines only"):
        configurator.literals(str(tmp_path / "bad.py"))
    with pytest.raises(InputError, match="run: 'model' is not set"):
        settings_of_run(["--iterations=1"], every_setting())


# ------------------------------------------------------------------------------------- all scripts


def test_a_setting_that_two_scripts_declare_has_the_same_default_and_meaning_in_both():
    seen = {}  # setting -> (default, script)
    for script in configurator.SCRIPTS:
        for key, (default, _, comment) in configurator.declared(script).items():
            assert comment, f"{script}: {key} has no comment"
            first_default, first_script = seen.setdefault(key, (default, script))
            assert first_default == default, f"{key} differs between {script} and {first_script}"


def test_every_recipe_of_the_repository_names_settings_that_exist_in_their_type():
    every = every_setting()
    recipes = sorted((ROOT / "config").glob("*.py"))
    names = [recipe.name for recipe in recipes]

    assert "aipo_nemo.py" in names
    assert "tiny.py" in names
    for recipe in recipes:
        assert configurator.changes([str(recipe)], every, every)


def test_no_setting_is_taken_by_torchrun_for_an_abbreviation_of_its_own():
    from torch.distributed.run import get_args_parser

    for action in get_args_parser()._actions:
        for option in action.option_strings:
            for key in every_setting():
                assert not option.startswith("--" + key)


@pytest.mark.parametrize("name", ["generate", "rank", "eval"])
def test_importing_a_script_does_no_work_and_keeps_its_defaults(name, tmp_path):
    code = f"import sys, {name}; print([{name}.config, sorted(sys.modules)])"
    settings = configurator.declared(f"{name}.py")
    defaults = {key: default for key, (default, _, _) in settings.items()}

    # arguments that would change or stop a script that is run
    for argument in ("--seed=5", "--no_such_setting=1", "--help"):
        done = subprocess.run(
            [sys.executable, "-c", code, argument],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1  # nothing but what is printed above
        config, modules = ast.literal_eval(done.stdout)
        assert config == defaults
        assert not {"torch", "transformers", "vllm"} & set(modules)
        assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------- runs of iterate.sh


@pytest.fixture
def resolve(tmp_path):
    """Resolves a run as iterate.sh does, in a folder; returns (exit code, output)."""

    def resolve(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "nanoaipo.run", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return resolve


def iterate(folder, *arguments):
    """Run iterate.sh in a folder with this Python."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "iterate.sh"), *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )


def test_help_of_the_loop_lists_its_settings_and_writes_nothing(tmp_path):
    done = iterate(tmp_path, "r.py", "--help")

    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("usage: bash iterate.sh config/x.py")
    for name in configurator.declared("nanoaipo/run.py"):
        assert f"\n  --{name}=" in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", SET_FOR_STAGES)
def test_what_the_loop_sets_for_each_stage_is_refused(key, resolve, tmp_path):
    (tmp_path / "r.py").write_text('model = "m"\n')

    code, text = resolve("r.py", f"--{key}=1")

    assert code == 1
    assert text == f"--{key}=1: leave it out, the loop sets it\n"
    assert f"--{key}=" in (ROOT / "iterate.sh").read_text()


def test_a_loss_that_is_none_is_refused_before_the_first_stage(tmp_path):
    (tmp_path / "r.py").write_text("model = 'm'\nloss = 'dp'\n")
    for setting, reason in {
        "--loss=nonsense": "--loss=nonsense: loss 'nonsense' is unknown; a mix is written 0.8*dpo",
        "--loss=dpo+dpo": "--loss=dpo+dpo: 'dpo' comes twice: write one term with the sum",
        "--seed=1": "--loss=dp: loss 'dp' is unknown",  # the recipe's
    }.items():
        done = iterate(tmp_path, "r.py", setting)

        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith(reason)
        assert done.stderr.count("\n") == 1
        assert os.listdir(tmp_path) == ["r.py"]


def test_a_run_keeps_its_settings_and_may_only_grow(resolve, tmp_path):
    (tmp_path / "r.py").write_text('model = "m"\nbeta = 0.2\n')
    prompts = "--prompts=my prompts.jsonl"

    # the settings of the loop come as shell, those of all scripts are kept
    code, text = resolve("r.py", "--iterations=2", prompts)
    assert code == 0
    assert "iterations=2\n" in text
    assert "out=out/r\n" in text
    assert "model=m\n" in text
    assert (tmp_path / "out/r/recipe.py").read_text() == (
        "model = 'm'\nbeta = 0.2\niterations = 2\nprompts = 'my prompts.jsonl'\n"
        f"date = '{time.strftime('%Y-%m-%d')}'\n"
    )

    # nothing is written yet: a slip can be mended
    assert resolve("r.py", "--iterations=3", prompts)[0] == 0
    assert resolve("r.py", prompts, "--beta=0.1")[0] == 0
    assert resolve("r.py", prompts)[0] == 0

    # once something is, only the number of iterations and the like may change
    (tmp_path / "out/r/iter_0").mkdir()
    (tmp_path / "out/r/iter_0/answers.jsonl").write_text("")
    code, text = resolve("r.py", "--iterations=3", prompts, "--beta=0.3")
    assert code == 1
    assert "this run was started with beta=0.2, not 0.3" in text
    assert resolve("r.py", "--iterations=4", prompts)[0] == 0

    code, text = resolve("r.py", "--modle=x")
    assert text == "--modle=x: unknown setting 'modle', did you mean 'model'?\n"


def test_a_run_is_made_of_its_own_pairs_or_candidates_or_of_others_but_not_of_both(resolve):
    sources = ("--pairs=a.jsonl", "--candidates=b.jsonl")

    for source in sources:
        assert resolve("--model=m", source)[0] == 0
    code, text = resolve("--model=m", *sources)

    assert code == 1
    assert "of pairs, candidates and new_instructions only one can be" in text


def test_checkable_instructions_are_for_the_prompts_that_a_run_writes(resolve):
    assert resolve("--model=m", "--new_instructions=8", "--checkable=1")[0] == 0
    code, text = resolve("--model=m", "--checkable=1")

    assert code == 1
    assert "--checkable=1: is for new_instructions" in text


def test_a_run_keeps_the_day_on_which_it_was_started(resolve, tmp_path):
    recipe = tmp_path / "out/run/recipe.py"

    # a new run takes today's, or the one it is given
    assert resolve("--model=m")[0] == 0
    assert f"date = '{time.strftime('%Y-%m-%d')}'\n" in recipe.read_text()
    assert resolve("--model=m", "--date=2026-01-31")[0] == 0
    started = recipe.read_text()

    # it goes on another day
    (tmp_path / "out/run/iter_1").mkdir()
    (tmp_path / "out/run/iter_1/candidates.jsonl").write_text("")
    assert resolve("--model=m")[0] == 0
    assert "date = '2026-01-31'\n" in recipe.read_text()
    assert sorted(recipe.read_text().splitlines()) == sorted(started.splitlines())
    code, text = resolve("--model=m", "--date=2026-02-01")
    assert code == 1
    assert "this run was started with date='2026-01-31', not '2026-02-01'" in text

    # a run from before there were dates goes on without
    recipe.write_text("model = 'm'\n")
    assert resolve("--model=m")[0] == 0
    assert "2026" not in recipe.read_text()
