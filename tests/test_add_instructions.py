"""Instructions added to prompts: what is drawn, how it is worded, what is written."""

import json
import subprocess
import sys

import pytest
from benchmark_files import read, write
from conftest import ROOT

from nanoaipo import add_instructions, following
from nanoaipo.add_instructions import COUNTERPARTS, KINDS
from nanoaipo.grading import is_right


def add(tmp_path, rows, **settings):
    """Run the script on prompts. Returns (the records that it wrote, what it printed)."""
    n = len(list(tmp_path.glob("*.jsonl")))
    prompts = write(tmp_path / f"prompts{n}.jsonl", rows)
    out = tmp_path / f"out{n}.jsonl"
    settings |= {"prompts": prompts, "out": out}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "nanoaipo.add_instructions", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr
    return read(out), done.stdout


@pytest.fixture(scope="module")
def instructed(tmp_path_factory):
    """Records of 2,000 plain prompts with instructions."""
    rows = [{"id": f"p{k}", "prompt": f"What do otters think, case {k}?"} for k in range(2000)]
    records, _ = add(tmp_path_factory.mktemp("instructed"), rows, seed=3)
    return records


def respond(instructions):
    """A response that follows all of these instructions."""
    wanted = {}
    for instruction in instructions:
        wanted |= instruction
    if "json" in wanted:
        return '{"otters": "fish"}'

    # sentences, paragraphs or items, of which the first takes the words
    n_sentences = wanted.get("sentences") or wanted.get("at_least_sentences") or 1
    first = ["Otters"] + [wanted.get("contains", "eat")] * wanted.get("times", 1)
    first += ["fish"] * wanted.get("at_least_words", 0)
    if "ends_with" in wanted and n_sentences > 1:
        n_sentences -= 1
    parts = [" ".join(first) + "." + " They swim." * (n_sentences - 1)]
    n_parts = wanted.get("paragraphs") or wanted.get("at_least_paragraphs") or 1
    n_parts = wanted.get("bullets") or wanted.get("numbered") or n_parts
    parts += ["They swim."] * (n_parts - 1)

    # marks of lists, what comes first and last, case
    if "begins_with" in wanted:
        parts[0] = wanted["begins_with"] + " " + parts[0]
    if "bullets" in wanted:
        parts = ["- " + part for part in parts]
    if "numbered" in wanted:
        parts = [f"{k}. {part}" for k, part in enumerate(parts, 1)]
    if "begins_with" in wanted and ("bullets" in wanted or "numbered" in wanted):
        parts = [wanted["begins_with"], *parts]
    if "ends_with" in wanted:
        parts[-1] += " " + wanted["ends_with"]
    separator = "\n" if "bullets" in wanted or "numbered" in wanted else "\n\n"
    text = separator.join(parts)
    if "title" in wanted:
        text = "<<Otters>>\n" + text
    if "quoted" in wanted:
        text = f'"{text}"'
    if "lowercase" in wanted:
        text = text.lower()
    if "uppercase" in wanted:
        text = text.upper()
    return text


def test_what_is_drawn_can_be_followed_all_at_once(instructed):
    for record in instructed:
        text = respond(record["answer"]["follow"])
        assert is_right(text, record["answer"]), (text, record["answer"])


def test_as_many_instructions_ask_for_more_as_for_less(instructed):
    numbers = dict.fromkeys(KINDS, 0)
    for record in instructed:
        for instruction in record["answer"]["follow"]:
            numbers[next(iter(instruction))] += 1

    not_asked = {"contains_any", "varied"}  # what an answer has to be in any case
    assert set(KINDS) == set(following.CHECKS) - not_asked
    assert min(numbers.values()) > 20
    for less, more in COUNTERPARTS:
        total = numbers[less] + numbers[more]
        assert abs(numbers[less] - numbers[more]) < 3 * total**0.5
    assert {len(record["answer"]["follow"]) for record in instructed} == {1, 2, 3}


def test_the_prompt_says_in_words_what_is_checked(instructed):
    wordings = {}
    for record in instructed:
        question, _, instructions = record["prompt"][-1]["content"].partition("\n\n")
        assert question == f"What do otters think, case {record['id'][1:]}?"
        for instruction in record["answer"]["follow"]:
            name, value = next(iter(instruction.items()))
            if type(value) is int and name != "at_most_paragraphs":
                assert str(value) in instructions
            elif isinstance(value, str):
                assert add_instructions.FORBIDDEN.get(value, value) in instructions
        if len(record["answer"]["follow"]) == 1:
            wordings.setdefault(name, set()).add(instructions)
    for name, texts in wordings.items():
        assert len(texts) >= len(KINDS[name].wordings)


def test_the_draw_depends_on_the_seed_and_the_id_alone(tmp_path):
    rows = [{"id": f"p{k}", "prompt": "What do otters think?"} for k in range(30)]

    records, _ = add(tmp_path, rows, seed=5)
    reversed_records, _ = add(tmp_path, rows[::-1], seed=5)
    others, _ = add(tmp_path, rows, seed=6)

    assert records == reversed_records[::-1]
    assert sum(a == b for a, b in zip(records, others)) < 5
    assert len({json.dumps(record["answer"]) for record in records}) > 20


def test_what_the_prompt_itself_decides_is_left_to_it(tmp_path):
    rows = [{"id": str(k), "prompt": "Write an essay in lower case."} for k in range(100)]

    records, _ = add(tmp_path, rows)

    drawn = set()
    for record in records:
        drawn |= {next(iter(instruction)) for instruction in record["answer"]["follow"]}
    assert drawn == {"contains", "no", "begins_with", "ends_with"}


def all_but(*names):
    """The setting that leaves these kinds of instructions."""
    return ",".join(name for name in KINDS if name not in names)


def test_who_only_follows_has_not_answered(tmp_path):
    rows = [
        {"id": "tea", "prompt": "How can I make green tea?"},
        {"id": "none", "prompt": "What is it for?"},  # no word tells its topic
    ]

    settings = {"most": 1, "untold": True, "unasked": all_but("ends_with")}
    (tea, none), _ = add(tmp_path, rows, **settings)

    told = tea["answer"]["follow"][0]["ends_with"]
    assert tea["prompt"][-1]["content"].count("\n\n") == 1  # and nothing else is told
    answer = f"Warm some water, put the leaves of the tea in and wait. {told}"
    assert is_right(answer, tea["answer"])
    for response in (
        f"The last words of your answer must be so, and here they are now. {told}",  # no topic
        f"Tea it is. {told}",  # too short
        f"{answer} {answer} {answer}",  # in circles
        answer.removesuffix(told),
    ):
        assert not is_right(response, tea["answer"]), response
    assert none["answer"]["follow"][1:] == [{"at_least_words": 10}, {"varied": True}]


def test_any_layout_of_prompts_gets_them_and_keeps_its_other_columns(tmp_path):
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What do cats eat? \n"},
    ]
    rows = [
        {"id": "a", "messages": talk, "category": "animals"},
        {"question_id": 7, "turns": ["What is a river?", "And a lake?"]},
        {"instruction": "Name a colour.", "input": "Red is taken.", "answer": "blue"},
        {"prompt": "Write a list of words without a title in capital letters. End with json."},
    ]

    records, printed = add(tmp_path, rows, most=1, unasked=all_but("lowercase", "bullets"))

    asked = [record["prompt"][-1]["content"].partition("\n\n")[0] for record in records]
    assert asked == ["What do cats eat?", "What is a river?", "Name a colour."]
    assert records[0]["prompt"][:3] == talk[:3]
    assert records[0]["category"] == "animals"
    assert "turns" not in records[1]
    assert "Red is taken." in records[2]["prompt"][0]["content"]
    for record in records:
        assert record["answer"]["follow"] != []
        assert next(iter(record["answer"]["follow"][0])) in ("lowercase", "bullets")
    assert "1 row dropped: 1 no_room (prompt '" in printed
    assert "1 prompts had an 'answer', which their instructions replace" in printed
    assert "3 prompts, 3 instructions (" in printed


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"unasked": "no,bulets"}, "--unasked=no,bulets: no 'bulets'; there are at_most_words"),
        ({"most": 0}, "--most=0: at least 1"),
        (
            {"unasked": all_but("uppercase")},
            "no prompt is left (1 no_room (prompt '0'",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(tmp_path, settings, message):
    rows = [{"id": "0", "prompt": "Write it in lower case."}]

    _, printed = add(tmp_path, rows, **settings)

    assert message in printed
    assert "Traceback" not in printed
