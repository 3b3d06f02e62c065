import os
import subprocess
import sys

import pytest

import configurator

ROOT = os.path.dirname(configurator.__file__)
SCRIPT = '''"""What it does."""
from configurator import configure
beta = 0.1                              # strength
steps = 10                              # count
name = "x"                              # text
fast = False                            # flag
config = configure(globals())
print(config, beta)
'''


@pytest.fixture
def run(tmp_path):
    """Runs a script with the settings above, with arguments; returns (exit code, output)."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*arguments, **recipe):
        if recipe:
            (tmp_path / "recipe.py").write_text("".join(f"{k} = {v!r}  # why\n" for k, v in recipe.items()))
            arguments = ("recipe.py", *arguments)
        done = subprocess.run([sys.executable, "script.py", *arguments], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": ROOT})
        return done.returncode, done.stdout + done.stderr

    return run


def test_the_command_line_beats_the_recipe_and_the_recipe_the_default(run):
    code, text = run("--beta=0.3", beta=0.2, steps=5)
    assert code == 0 and "{'beta': 0.3, 'steps': 5, 'name': 'x', 'fast': False} 0.3" in text


@pytest.mark.parametrize("argument, value", [("--beta=1", "'beta': 1.0"), ("--steps=3", "'steps': 3"), ("--name=3", "'name': '3'"),
                                             ("--fast=True", "'fast': True"), ("--fast=false", "'fast': False"), ("--name=", "'name': ''")])
def test_a_value_takes_the_type_of_the_default(run, argument, value):
    code, text = run(argument)
    assert code == 0 and value in text


@pytest.mark.parametrize("argument, message", [("--bета=1", "unknown setting"), ("--bete=1", "did you mean 'beta'"), ("--steps=0.5", "takes a value of type int"),
                                               ("--fast=1", "takes a value of type bool"), ("--beta", "write --beta=value"), ("--loss=dpo", "unknown setting 'loss'")])
def test_a_wrong_argument_ends_with_one_line_that_says_what_is_right(run, argument, message):
    code, text = run(argument)
    assert code == 1 and message in text and text.count("\n") == 1


def test_a_recipe_may_hold_keys_of_every_script_but_no_unknown_one(run):
    assert run(loss="dpo", n_prompts=3, beta=1)[0] == 0
    code, text = run(los="dpo")
    assert code == 1 and "recipe.py:1: unknown setting 'los', did you mean 'loss'?" in text
    code, text = run(beta="high")
    assert code == 1 and "recipe.py:1: 'beta' takes a value of type float" in text


def test_a_recipe_is_data_not_code(run, tmp_path):
    (tmp_path / "bad.py").write_text('beta = 0.1\nsteps = open("x")\n')
    code, text = run("bad.py")
    assert code == 1 and "bad.py:2: a recipe holds `name = literal` lines only" in text
    assert run("missing.py") == (1, "missing.py: no such recipe\n")


def test_help_lists_every_setting_with_its_comment(run):
    code, text = run("--help")
    assert code == 0 and "What it does." in text and "--beta=0.1" in text and "strength" in text


def test_a_setting_that_two_scripts_declare_has_the_same_default_and_meaning_in_both():
    seen = {}
    for script in configurator.SCRIPTS:
        for key, (value, _, comment) in configurator.declared(script).items():
            assert comment, f"{script}: {key} has no comment"
            assert seen.setdefault(key, (value, script))[0] == value, f"{key} differs between {script} and {seen[key][1]}"


def test_every_recipe_of_the_repository_names_settings_that_exist_in_their_type():
    recipes = sorted(f for f in os.listdir(os.path.join(ROOT, "config")) if f.endswith(".py"))
    every = {k: v for script in configurator.SCRIPTS for k, v in configurator.declared(script).items()}
    assert "aipo_nemo.py" in recipes and "tiny.py" in recipes
    for recipe in recipes:
        assert configurator.changes([os.path.join(ROOT, "config", recipe)], every, every)


def test_a_run_keeps_its_settings_and_may_only_grow(tmp_path):
    def loop(*arguments):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "configurator.py"), *arguments], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    (tmp_path / "r.py").write_text('model = "m"\nbeta = 0.2\n')
    code, text = loop("r.py", "--iterations=2", "--prompts=my prompts.jsonl")
    assert code == 0 and "iterations=2\n" in text and "out=out/r\n" in text and "model=m\n" in text
    assert (tmp_path / "out/r/recipe.py").read_text() == "model = 'm'\nbeta = 0.2\niterations = 2\nprompts = 'my prompts.jsonl'\n"
    assert loop("r.py", "--iterations=3", "--prompts=my prompts.jsonl")[0] == 0
    assert loop("r.py", "--prompts=my prompts.jsonl", "--beta=0.1")[0] == 0     # nothing is written yet: a slip can be mended
    assert loop("r.py", "--prompts=my prompts.jsonl")[0] == 0
    (tmp_path / "out/r/iter_0").mkdir()
    (tmp_path / "out/r/iter_0/answers.jsonl").write_text("")
    code, text = loop("r.py", "--iterations=3", "--prompts=my prompts.jsonl", "--beta=0.3")
    assert code == 1 and "this run was started with beta=0.2, not 0.3" in text
    assert loop("r.py", "--modle=x")[1] == "--modle=x: unknown setting 'modle', did you mean 'model'?\n"


def test_no_setting_is_taken_by_torchrun_for_an_abbreviation_of_its_own():
    from torch.distributed.run import get_args_parser
    options = [o for action in get_args_parser()._actions for o in action.option_strings]
    every = {k for script in configurator.SCRIPTS for k in configurator.declared(script)}
    assert not [(k, o) for k in every for o in options if o.startswith("--" + k)]
