"""Settings: defaults at the top of each script, a recipe file, then --key=value.

    python train.py config/aipo_nemo.py --beta=0.05        a recipe, and one setting changed
    python train.py --help                                 every setting with its comment

Every script begins with plain literal assignments and closes them with
`config = configure(globals())`. A recipe is a file of such assignments too, and one recipe serves
all scripts: a key in it is valid if any script declares it, a --key if this one does. For a whole
run of iterate.sh, see nanoaipo/run.py.
"""

import ast
import difflib
import math
import os
import re
import select
import sys

from nanoaipo.errors import InputError, disk_fault, reason_of
from nanoaipo.files import holds_surrogate
from nanoaipo.locks import release_locks
from nanoaipo.processes import check_rank, end_with_launcher

SCRIPTS = (
    "nanoaipo/run.py",
    "generate.py",
    "rank.py",
    "train.py",
    "eval.py",
    "nanoaipo/add_instructions.py",
)
HERE = os.path.dirname(os.path.abspath(__file__))
DASHES = "-–—"  # text that is copied from a page may have long ones
SIGNED = ("alpha", "lambda_", "gamma", "eta", "delta", "min_gap")  # other numbers are at least 0
SHARES = ("top_p", "gpu_memory", "warmup", "label_smoothing", "eps", "ld_alpha")  # 1 at most
LARGEST = 2**32 - 1  # of whole numbers; numpy, which vLLM seeds, takes no larger one

# ----------------------------------------------------------------------------- reading assignments


def literals(path, stop=None):
    """The assignments `name = literal` of a file, as {name: (value, line number, comment)}.

    With `stop` the file is a script: reading ends at the first assignment whose value contains that
    text, and other statements are passed over. Without it the file is a recipe: raises InputError,
    which names the line, for anything but docstrings and assignments.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such recipe")
    try:
        with open(path, encoding="utf-8-sig") as f:  # with a byte order mark or without
            text = f.read()
        tree = ast.parse(text)
    except SyntaxError as e:
        raise InputError(f"{path}:{e.lineno}: {e.msg}") from e
    except (ValueError, RecursionError, MemoryError) as e:  # no UTF-8, a NUL, too many brackets
        raise InputError(f"{path}: no Python: {reason_of(e)}") from e

    lines = text.split("\n")  # as Python counts them; others are line breaks for splitlines
    found = {}
    for node in tree.body:
        if stop and isinstance(node, ast.Assign) and stop in ast.unparse(node.value):
            break  # the settings of a script end here, its code begins
        try:
            (target,) = node.targets
            name = target.id
            value = ast.literal_eval(node.value)
        except (AttributeError, TypeError, ValueError):  # another statement, a computed value
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if stop or is_text:
                continue
            line = lines[node.lineno - 1].strip()
            raise InputError(
                f"{path}:{node.lineno}: a recipe holds `name = literal` lines only, not: {line}"
            ) from None
        comment = lines[node.end_lineno - 1].partition("#")[2].strip()
        found[name] = (value, node.lineno, comment)
    return found


def declared(script):
    """The settings of a script: its literals up to `config = configure(...)`, constants aside."""
    assignments = literals(os.path.join(HERE, script), stop="configure(")
    return {name: entry for name, entry in assignments.items() if name.islower()}


def declared_by_all():
    """The settings of all scripts."""
    every = {}
    for script in SCRIPTS:
        every |= declared(script)
    return every


def values_of(assignments):
    """{name: value} of what literals or declared returns."""
    return {name: value for name, (value, _, _) in assignments.items()}


# ------------------------------------------------------------------------------- changing settings


def check_known(where, key, known):
    """Raise InputError, with the nearest known name, if there is no such setting."""
    if key in known:
        return
    near = difflib.get_close_matches(key, known, 1)
    if near:
        hint = f", did you mean '{near[0]}'?"
    else:
        hint = "; --help lists them"
        where = without_value(where)  # which may be a key to something
    raise InputError(f"{where}: unknown setting '{key}'{hint}")


def without_value(where):
    """The --key of --key=value; a line of a recipe stays as it is."""
    if re.search(r"\.py:\d+$", where):
        return where
    option, _, _ = where.partition("=")
    return option


def cast(where, key, value, default):
    """The value in the type of the default: text is parsed, and an int may widen to a float.

    Raises InputError for anything else, for a number that is negative, not finite or too large, for
    a text that no file could hold, and for an address with a key in it.
    """
    # parse text, which is all that the command line has; None stands for what cannot be read
    kind = type(default)
    if kind is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower())
    elif kind is not str and isinstance(value, str):
        try:
            value = kind(value)
        except ValueError:
            value = None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # not isinstance: True is an int too
        raise InputError(
            f"{where}: '{key}' takes a value of type {kind.__name__}, such as {default!r}"
        )

    if kind in (int, float):
        if not abs(value) < math.inf:  # nan, too
            raise InputError(f"{where}: '{key}' takes a finite number, such as {default!r}")
        if value < 0 and key not in SIGNED:
            raise InputError(f"{where}: at least 0 is what '{key}' takes, such as {default!r}")
        if value > 1 and key in SHARES:
            raise InputError(f"{where}: at most 1 is what '{key}' takes, such as {default!r}")
        if kind is int and value > LARGEST:
            raise InputError(f"{where}: at most {LARGEST} is what '{key}' takes")
    if kind is str and (holds_surrogate(value) or "\0" in value):
        raise InputError(f"{where}: '{key}' takes a text that can be written as UTF-8, without NUL")

    # it would be printed and kept with the settings; the client sends nothing behind a ? anyway
    if kind is str and key.endswith("_url") and re.search(r"[@?#]", value):
        raise InputError(
            f"{without_value(where)}: holds a user or a key (@, ? or #); the key belongs in "
            "OPENAI_API_KEY"
        )
    return value


def check_spelling(arguments, own):
    """Raise InputError for a setting that would be taken for the recipe, as a whole or in part."""
    # a value behind a space
    for option, value in zip(arguments, arguments[1:]):
        if option.startswith("--") and "=" not in option and not value.startswith("--"):
            check_known(option, option.removeprefix("--"), own)
            value_alone = value.lstrip("=") or "value"
            raise InputError(f"{option} {value}: write {option}={value_alone}")
        stands_alone = value.startswith("--") or value.endswith(".py")
        if option.startswith("--") and option.endswith("=") and not stands_alone:
            raise InputError(f"{option} {value}: write {option}{value}")

    # a setting without its two dashes
    for argument in arguments:
        setting = argument.lstrip(DASHES)
        if argument.startswith("--") or os.path.isfile(argument):
            continue
        if setting != argument or "=" in argument:
            key, _, _ = setting.partition("=")
            check_known(argument, key, own)
            raise InputError(f"{argument}: write --{setting}")


def changes(arguments, own, every):
    """What recipe and command line set, as {key: value} in their order.

    own, every: settings as `declared` gives them, those that the command line may set and those
    that a recipe may. Raises InputError for a key that is unknown or a value of another type.
    """
    check_spelling(arguments, own)
    recipes = [argument for argument in arguments if not argument.startswith("--")]
    options = [argument for argument in arguments if argument.startswith("--")]
    if len(recipes) > 1:
        raise InputError(f"one recipe at most, got {' '.join(recipes)}")

    # first the recipe, in which each line may be any script's
    changed = {}
    for recipe in recipes:
        for key, (value, line, _) in literals(recipe).items():
            where = f"{recipe}:{line}"
            check_known(where, key, every)
            changed[key] = cast(where, key, value, default=every[key][0])

    # then the command line, which beats it
    for option in options:
        key, equals, value = option.removeprefix("--").partition("=")
        check_known(option, key, own)
        if not equals:
            raise InputError(f"{option}: write --{key}=value")
        changed[key] = cast(option, key, value, default=own[key][0])
    return changed


# ------------------------------------------------------------------------------------- in a script


def configure(namespace):
    """Set a script's globals from recipe and command line; its settings as a dict, in its order.

    A script that is imported keeps its defaults. In one that is run, a wrong setting ends the
    program with the one line of its InputError, because nothing above this call could catch it.
    """
    own = declared(namespace["__file__"])
    if namespace["__name__"] != "__main__":
        return {key: namespace[key] for key in own}

    if "--help" in sys.argv or "-h" in sys.argv:
        show(help_text(namespace["__doc__"].strip(), own))
        sys.exit(0)

    try:
        check_rank()
        changed = changes(sys.argv[1:], own, declared_by_all() | own)
    except InputError as e:
        sys.exit(str(e))
    changed = {key: value for key, value in changed.items() if key in own}  # not other scripts'
    namespace.update(changed)

    # print what recipe and command line set, once for all processes
    if os.environ.get("RANK", "0") == "0":
        script = os.path.basename(namespace["__file__"])
        settings = " ".join(f"{key}={value}" for key, value in changed.items())
        show(f"{script}: {settings or 'all defaults'}")
    return {key: namespace[key] for key in own}


def help_text(head, own):
    """What --help prints: a head, and a line for each setting with its default and its comment."""
    lines = [head, "", "settings:"]
    for key, (default, _, comment) in own.items():
        assignment = f"{key}={default}"
        lines.append(f"  --{assignment:<34} {comment}")
    return "\n".join(lines)


def show(text):
    """Print a text; where it cannot be written, end the program with one line."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        end_unread()
    except OSError as e:
        sys.exit(disk_fault(e, "what is printed") or f"what is printed: {e}")


def is_unread():
    """Whether whoever read what is printed has ended, such as `head`."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors alone
    return bool(poll.poll(0))


def end_unread():
    """End the program without a word, as `head` expects, and with exit code 1."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is not yet printed
    sys.exit(1)


def run_script(main):
    """Call a script's main; an InputError ends the program with its one line and exit code 1.

    So does a disk that is full or may not be written, and Ctrl-C; a pipe that nobody reads any more
    ends it without a line.
    """
    end_with_launcher()
    try:
        main()
        sys.stdout.flush()
    except InputError as e:
        sys.exit(str(e))
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again, which goes on from what is whole")
    except BrokenPipeError:
        if is_unread():
            end_unread()
        raise  # an engine's pipe
    except BaseException as e:  # torch's CheckpointException is no Exception
        line = disk_fault(e, main.__globals__.get("out"))
        if line is None:
            raise
        sys.exit(line)
    finally:
        release_locks()
