"""Settings: defaults at the top of each script, a recipe file, then --key=value.

    python train.py config/aipo_nemo.py --beta=0.05        a recipe, and one setting changed
    python train.py --help                                 every setting of the script with its comment

Every script begins with plain literal assignments and closes them with `config = configure(globals())`. A recipe is a
file of such assignments too, and one recipe serves all scripts: a key in it is valid if any script declares it, a --key
if this one does. Run as a script itself, this file resolves a whole run for iterate.sh (see `main` below).
"""
import ast
import difflib
import glob
import os
import shlex
import sys

from nanoaipo.errors import InputError
from nanoaipo.stages import FREE

# ---- settings of iterate.sh, which is shell and cannot declare its own ----
iterations = 3                          # T, rounds of generate, rank, train, eval
model = ""                              # the policy of iteration 0: Hugging Face folder or hub name
out = ""                                # where a result goes; for iterate.sh the run's folder, out/<recipe> when empty
processes = 1                           # processes per stage, one per GPU; above 1 each stage starts under torchrun
engines = 0                             # processes of generate, each with tensor_parallel GPUs; 0: as many as processes
rank_processes = 0                      # processes of rank: fewer for a local judge with tensor_parallel GPUs; 0: as many as processes
new_instructions = 0                    # instructions written by self-instruct at each iteration (AIPO: 20,000); 0: prompts are drawn from the pool
pairs = ""                              # pairs to train on, not the policy's own: file or NAME:SPLIT; several, with spaces: iterations in turn
candidates = ""                         # responses to rank, not the policy's own, likewise
prepare = ""                            # script that makes what the recipe needs (model, prompts), run first
eval_prompts = ""                       # held-out prompts on which every iteration is evaluated; empty: no evaluation
eval_prompt_field = ""                  # their column, as prompt_field
n_eval = 0                              # how many of them; 0: all
eval_temperature = 0.7                  # sampling temperature of the evaluated answers

SCRIPTS = ("configurator.py", "generate.py", "rank.py", "train.py", "eval.py")
HERE = os.path.dirname(os.path.abspath(__file__))


def literals(path, stop=None):
    """The top-level assignments `name = literal` of a file, as {name: (value, line number, trailing comment)}.

    Reading ends at the first assignment whose value calls `stop`. Without `stop` the file is a recipe, and anything but
    docstrings and literal assignments ends the program with the place.
    """
    if not os.path.isfile(path):
        sys.exit(f"{path}: no such recipe")
    with open(path, encoding="utf-8") as f:
        text = f.read()
    try:
        tree = ast.parse(text)
    except SyntaxError as e:
        sys.exit(f"{path}:{e.lineno}: {e.msg}")
    lines, found = text.splitlines(), {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and stop and stop in ast.unparse(node.value):
            break
        try:
            name, value = node.targets[0].id, ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            if stop or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            sys.exit(f"{path}:{node.lineno}: a recipe holds `name = literal` lines only, not: {lines[node.lineno - 1].strip()}")
        found[name] = (value, node.lineno, lines[node.end_lineno - 1].partition("#")[2].strip())
    return found


def declared(script):
    """Settings a script declares: its literal assignments up to `config = configure(...)` or the first constant."""
    settings = literals(os.path.join(HERE, script), stop="configure(")
    return {k: v for k, v in settings.items() if k.islower()}           # capitals are constants


def refuse(place, key, known):
    near = difflib.get_close_matches(key, known, 1)
    sys.exit(f"{place}: unknown setting '{key}'" + (f", did you mean '{near[0]}'?" if near else "; --help lists them"))


def cast(place, key, value, default):
    """The value in the type of the default: text is parsed, an int widens to a float, anything else is refused."""
    kind = type(default)
    if isinstance(value, str) and kind is not str:
        try:
            value = {"true": True, "false": False}.get(value.lower(), None) if kind is bool else kind(value)
        except ValueError:
            value = None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        sys.exit(f"{place}: '{key}' takes a value of type {kind.__name__}, such as {default!r}")
    return value


def changes(arguments, own, every):
    """What recipe and command line set, as {key: value} in order; `own` settings are allowed on the command line."""
    changed = {}
    recipes = [a for a in arguments if not a.startswith("--")]
    if len(recipes) > 1:
        sys.exit(f"one recipe at most, got {' '.join(recipes)}")
    for recipe in recipes:
        for key, (value, line, _) in literals(recipe).items():
            key in every or refuse(f"{recipe}:{line}", key, every)
            changed[key] = cast(f"{recipe}:{line}", key, value, every[key][0])
    for argument in arguments:
        if argument not in recipes:
            key, equals, value = argument[2:].partition("=")
            key in own or refuse(argument, key, own)
            equals or sys.exit(f"{argument}: write --{key}=value")
            changed[key] = cast(argument, key, value, own[key][0])
    return changed


def run_script(main):
    """Call a script's main; what whoever runs it can mend ends the program with its one line and exit code 1."""
    try:
        main()
    except InputError as e:
        sys.exit(str(e))


def configure(namespace):
    """Set a script's globals from recipe and command line; return its settings as a dict, in the script's order.

    A script that is imported keeps its defaults.

    Ends the program with one line that names the place when a key is unknown or a value has another type.
    """
    own = declared(namespace["__file__"])
    if namespace["__name__"] != "__main__":
        return {k: namespace[k] for k in own}
    if "--help" in sys.argv or "-h" in sys.argv:
        print(namespace["__doc__"].strip(), "\n\nsettings:")
        print("\n".join(f"  --{k + '=' + str(v):<34} {comment}" for k, (v, _, comment) in own.items()))
        sys.exit(0)
    every = {k: v for script in SCRIPTS for k, v in declared(script).items()} | own
    changed = {k: v for k, v in changes(sys.argv[1:], own, every).items() if k in own}
    namespace.update(changed)
    if os.environ.get("RANK", "0") == "0":
        script = os.path.basename(namespace["__file__"])
        print(f"{script}: " + (" ".join(f"{k}={v}" for k, v in changed.items()) or "all defaults"), flush=True)
    return {k: namespace[k] for k in own}


def resolve(arguments, every):
    """(What recipe and command line set, the run's folder) of a run of iterate.sh, checked; nothing is written.

    A run keeps the settings it was started with. Those in FREE may change, so that it can go on for more iterations or
    fit into less memory: beyond rounding they do not enter what is computed (kto_pair and alpha_dpo_24 excepted).
    """
    if not arguments or "--help" in arguments:
        sys.exit("usage: bash iterate.sh config/x.py [--preflight] [--key=value ...]")
    changed = changes(arguments, every, every)
    name = next((a for a in arguments if not a.startswith("--")), "run")
    run = changed.pop("out", "") or os.path.join("out", os.path.splitext(os.path.basename(name))[0])
    changed.get("model") or sys.exit(f"{name}: 'model' is not set: a Hugging Face folder or hub name")
    path = os.path.join(run, "recipe.py")
    if sum(bool(changed.get(key)) for key in ("pairs", "candidates", "new_instructions")) > 1:
        sys.exit(f"{name}: of pairs, candidates and new_instructions only one can be what a run is made of")
    if os.path.exists(path) and glob.glob(os.path.join(run, "iter_*", "*")):
        before = {k: v for k, (v, *_) in literals(path).items()}
        for key in sorted(before.keys() | changed.keys()):
            default = every[key][0] if key in every else None
            if key not in FREE and before.get(key, default) != changed.get(key, default):
                sys.exit(f"{path}: this run was started with {key}={before.get(key, default)!r}, not "
                         f"{changed.get(key, default)!r}: choose another --out, or remove {run}")
    return changed, run


def main():
    """Resolve a run for iterate.sh: check every setting, keep them as out/RUN/recipe.py, print the loop's for the shell."""
    every = {k: v for script in SCRIPTS for k, v in declared(script).items()}
    if "--preflight" in sys.argv:
        from nanoaipo.estimate import preflight
        every |= declared("nanoaipo/estimate.py")
        changed, run = resolve([a for a in sys.argv[1:] if a != "--preflight"], every)
        preflight({k: v for k, (v, *_) in every.items()} | changed | {"out": run})
        return
    changed, run = resolve(sys.argv[1:], every)
    path = os.path.join(run, "recipe.py")
    os.makedirs(run, exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(f"{k} = {v!r}\n" for k, v in changed.items())
    os.replace(path + ".tmp", path)
    loop = {k: changed.get(k, v) for k, (v, *_) in declared("configurator.py").items()} | {"out": run}
    print("\n".join(f"{k}={shlex.quote(str(v))}" for k, v in loop.items()))


if __name__ == "__main__":
    run_script(main)
