"""Add instructions that can be checked to the prompts of a file, and the `answer` that checks them.

    python -m nanoaipo.add_instructions --prompts=prompts.jsonl --out=instructed.jsonl --seed=1

Each prompt gets one to `most` instructions in plain words behind its last user message:

    What do cats eat?

    Use no more than 30 words. Do not use any commas.

and the `answer` {"follow": [{"at_most_words": 30}, {"no": ","}]} (nanoaipo/following.py). Which
these are depends on the seed and the prompt's id alone. They contradict neither each other nor what
the prompt itself says of length, layout and the like. What asks for less has a counterpart that
asks for more, and a coin decides between the two, so that a policy gains nothing by being short.

An instruction alone can be followed without an answer ("I hope this helps." ends with these words).
With --untold=True the `answer` also holds what any answer to the prompt has, and what nobody tells
the policy: ten words or more, a word of the prompt's topic, nothing said three times.
"""

import collections
import random
import re

from configurator import configure, run_script
from nanoaipo.errors import InputError
from nanoaipo.messages import Dropped
from nanoaipo.prompts import read_prompts
from nanoaipo.seeds import derive_seed
from nanoaipo.stages import open_output, open_stage

# fmt: off
# ---- settings ----
prompts = ""                            # file or NAME:SPLIT, with prompts of any layout
prompt_field = ""                       # column that holds the prompt; empty: the first known one
out = ""                                # prompts with instructions to write (JSONL)
most = 3                                # instructions that a prompt gets at most
unasked = ""                            # kinds of instructions to leave out: "json,uppercase"
untold = False                          # check, too, that a response answers; for training on it
seed = 0                                # of the draw
config = configure(globals())

# aspects: what an instruction decides; of a prompt's instructions no two decide the same.
# values: what is drawn from; `contains` has none, its word is the prompt's own.
# wordings: what the prompt says, one of them, with the value in it.
Kind = collections.namedtuple("Kind", "aspects values wordings")
KINDS = {
    "at_most_words": Kind({"length"}, [20, 25, 30, 40], [
        "Use no more than {} words.",
        "Answer in {} words or fewer.",
        "Your answer may have {} words at most.",
    ]),
    "at_least_words": Kind({"length"}, [40, 50, 60, 80], [
        "Use no fewer than {} words.",
        "Answer in {} words or more.",
        "Your answer must have at least {} words.",
    ]),
    "at_most_sentences": Kind({"length", "layout"}, [2, 3], [
        "Use no more than {} sentences.",
        "Answer in {} sentences or fewer.",
    ]),
    "at_least_sentences": Kind({"length", "layout"}, [4, 5], [
        "Use no fewer than {} sentences.",
        "Answer in {} sentences or more.",
    ]),
    "sentences": Kind({"length", "layout"}, [2, 3, 4], [
        "Answer in exactly {} sentences.",
        "Write {} sentences, no more and no fewer.",
    ]),
    "at_most_paragraphs": Kind({"layout"}, [1], [
        "Write a single paragraph.",
        "Put everything in one paragraph, without empty lines.",
    ]),
    "at_least_paragraphs": Kind({"layout"}, [2, 3], [
        "Write {} paragraphs or more, with empty lines between them.",
        "Split your answer into at least {} paragraphs, with an empty line between two of them.",
    ]),
    "paragraphs": Kind({"layout"}, [2, 3], [
        "Write exactly {} paragraphs, with empty lines between them.",
        "Your answer must have {} paragraphs, with an empty line between two of them.",
    ]),
    "bullets": Kind({"layout"}, [2, 3, 4], [
        'Answer with exactly {} bullet points, each on a line that begins with "- ".',
        'Make a list of {} points. Each has a line of its own, which begins with "- ".',
    ]),
    "numbered": Kind({"layout"}, [2, 3, 4], [
        "Answer with a numbered list (1., 2., ...) of exactly {} items.",
        "Make a list of {} items, each on a line that begins with its number and a dot.",
    ]),
    "contains": Kind({"words"}, [], [
        'Use the word "{}" at least {} times.',
        'The word "{}" must be in your answer {} times or more.',
    ]),
    "no": Kind({"words"}, [",", "and", "the"], [
        "Do not use {}.",
        "Avoid {} altogether.",
    ]),
    "begins_with": Kind({"start"}, ["Certainly", "In short", "Good question", "As far as I know"], [
        'Begin your answer with "{}".',
        'The first words of your answer must be "{}".',
    ]),
    "ends_with": Kind({"end"}, ["I hope this helps.", "That is all.", "Is there anything else?"], [
        'End your answer with "{}"',
        'The last words of your answer must be "{}"',
    ]),
    "lowercase": Kind({"case", "start", "end"}, [True], [
        "Write in lower case only, without any capital letter.",
        "Use no capital letters.",
    ]),
    "uppercase": Kind({"case", "start", "end"}, [True], [
        "Write in capital letters only.",
        "Use no lower-case letters: all have to be capital ones.",
    ]),
    "title": Kind({"start", "layout"}, [True], [
        "Put a title in double angle brackets, such as <<My title>>, on the first line.",
        "Your first line must be a title, written <<like this>>.",
    ]),
    "quoted": Kind({"start", "end", "layout"}, [True], [
        "Put your whole answer in double quotation marks.",
        'The whole answer must stand between two double quotes (").',
    ]),
    "json": Kind({"length", "layout", "words", "start", "end", "case"}, [True], [
        "Answer with a JSON object and nothing else.",
        "Your whole answer must be valid JSON: one object.",
    ]),
}
# names of what `no` forbids
FORBIDDEN = {",": "any commas", "and": 'the word "and"', "the": 'the word "the"'}

# less, more
COUNTERPARTS = [
    ("at_most_words", "at_least_words"),
    ("at_most_sentences", "at_least_sentences"),
    ("at_most_paragraphs", "at_least_paragraphs"),
    ("no", "contains"),
]

# words of a prompt that do not tell its topic
NOT_TOPIC = set(
    "about advantages and are between bring can day days difference does for from get good having "
    "how keep life live make making name names new over place places short some suggest take tell "
    "that the them things this use using ways well what when who why with words work works write "
    "year you your".split()
)

# a prompt with such a word decides an aspect itself
DECIDED = {
    "length": r"words?|sentences?|characters|short|brief\w*|concise\w*|long|detail\w*|essay|in one",
    "layout": r"list|bullets?|paragraphs?|lines?|steps?|table|json|csv|html|xml|format\w*|poem|"
              r"haiku|song|e-?mail|letter|essay|code|program|script|function|sentences?",
    "words": r"words?|without|avoid|do not use|don't use|commas?|include|mention",
    "start": r"begin\w*|starts?|starting|title|headline|json|quot\w+",
    "end": r"end|ends|ending|finish|conclude|json|quot\w+",
    "case": r"upper[- ]?case|lower[- ]?case|capital letters?|capitali[sz]e\w*|caps|code|program|"
            r"script|function|json",
}
# fmt: on


# ---- drawing ----


def draw_instructions(rng, messages, allowed):
    """Between one and `most` instructions and their words, for a prompt; none where none fits.

    allowed: the checks to draw from. Returns [(instruction, text)].
    """
    # aspects that the prompt itself does not decide
    said = "\n".join(message["content"] for message in messages)
    free = set()
    for aspect, words in DECIDED.items():
        if not re.search(rf"\b(?:{words})\b", said, re.IGNORECASE):
            free.add(aspect)
    own_words = long_words(messages)
    if not own_words:
        free.discard("words")

    # counterparts are drawn as one, then a coin decides
    paired = set().union(*COUNTERPARTS)
    groups = COUNTERPARTS + [(name,) for name in KINDS if name not in paired]
    rng.shuffle(groups)

    # an instruction takes its aspects, so that no other decides them too
    drawn = []
    n = rng.randint(1, most)
    for group in groups:
        names = [name for name in group if name in allowed]
        if len(drawn) == n or not names:
            continue
        name = rng.choice(names)
        if KINDS[name].aspects <= free:
            free -= KINDS[name].aspects
            drawn.append(word_instruction(rng, name, own_words))
    return drawn


def long_words(messages):
    """The three longest plain words of the last message, which are likely what it is about."""
    words = set(re.findall(r"(?<![\w'-])[a-z]{5,12}(?![\w'-])", messages[-1]["content"]))
    return sorted(sorted(words), key=len)[-3:]


def word_instruction(rng, name, own_words):
    """(instruction, text) of a check, with a value and a wording that are drawn."""
    wording = rng.choice(KINDS[name].wordings)
    if name == "contains":
        word = rng.choice(own_words)
        times = rng.choice([2, 3])
        return {"contains": word, "times": times}, wording.format(word, times)
    value = rng.choice(KINDS[name].values)
    return {name: value}, wording.format(FORBIDDEN.get(value, value))


def any_answer(prompt):
    """The checks that any answer to this text has to pass."""
    checks = [{"at_least_words": 10}, {"varied": True}]
    topic = []
    for word in re.findall(r"[A-Za-z]{3,}", prompt):
        if word.lower() not in NOT_TOPIC:
            topic += [word, word.removesuffix("s")]  # of pancakes, also pancake
    if topic:
        checks.insert(1, {"contains_any": list(dict.fromkeys(topic))})
    return checks


# ---- the file ----


def allowed_kinds():
    """The checks to draw from; raises InputError for a setting out of its range."""
    if most < 1:
        raise InputError(f"--most={most}: at least 1")
    left_out = [name.strip() for name in unasked.split(",") if name.strip()]
    for name in left_out:
        if name not in KINDS:
            raise InputError(f"--unasked={unasked}: no '{name}'; there are {', '.join(KINDS)}")
    return [name for name in KINDS if name not in left_out]


def add_to_row(row, drawn):
    """Write the drawn instructions behind a row's prompt, and what checks them to its `answer`."""
    message = row["prompt"][-1]
    instructions = [instruction for instruction, _ in drawn]
    if untold:
        instructions += any_answer(message["content"])
    row["answer"] = {"follow": instructions}

    texts = " ".join(text for _, text in drawn)
    message["content"] = message["content"].rstrip() + "\n\n" + texts
    row.pop("turns", None)  # whoever finds turns in a record would ask them


def main():
    allowed = allowed_kinds()
    manifest = open_stage(out, ".jsonl", config, "prompts")
    if manifest is None:
        return

    # the seed and a prompt's id decide, so that other prompts of the file do not
    dropped = Dropped()
    rows = []
    counts = collections.Counter(dict.fromkeys(allowed, 0))
    n_replaced = 0
    for row in read_prompts(prompts, prompt_field, dropped):
        if row["prompt"][-1]["role"] != "user":
            dropped.add("no_user", f"prompt '{row['id']}': its last message is not the user's")
            continue
        rng = random.Random(derive_seed(seed, "instructions", row["id"]))
        drawn = draw_instructions(rng, row["prompt"], allowed)
        if not drawn:
            dropped.add("no_room", f"prompt '{row['id']}': decides all that could be asked")
            continue

        n_replaced += row.get("answer") is not None
        add_to_row(row, drawn)
        rows.append(row)
        for instruction, _ in drawn:
            counts[next(iter(instruction))] += 1  # its first key is the check's name

    # all of them, or no file
    dropped.check_left(prompts, rows)
    manifest["counts"] = {"prompts": len(rows)} | counts
    with open_output(out, manifest) as write:
        for row in rows:
            write(row)

    dropped.print(prompts)
    if n_replaced:
        print(f"{n_replaced} prompts had an 'answer', which their instructions replace")
    numbers = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    print(f"{len(rows)} prompts, {counts.total()} instructions ({numbers}) -> {out}")


if __name__ == "__main__":
    run_script(main)
