"""Which responses follow an instruction."""

import pytest

from nanoaipo.following import (
    CHECKS,
    FORMS,
    TEXTS,
    followed,
    instructions_of,
    share_followed,
)
from nanoaipo.grading import is_right

TWO_PARAGRAPHS = "Rivers carry water.\n \nThey also carry sand."
FENCED = '```json\n{"river": "Nile"}\n```'


@pytest.mark.parametrize(
    "text, instruction, verdict",
    [
        # words
        ("one two three", {"at_most_words": 3}, True),
        ("one two three four", {"at_most_words": 3}, False),
        ("- well-known - don't 3.5", {"at_most_words": 3}, True),
        ("one — two—three", {"at_least_words": 3}, True),
        ("one two", {"at_least_words": 3}, False),
        # sentences
        ("It is cold. It is wet!", {"sentences": 2}, True),
        ("It is cold. It is wet. Is it dry?", {"sentences": 2}, False),
        ("it is cold. it is wet.", {"at_most_sentences": 1}, False),
        ("Dr. J. Smith paid 3.5 francs, e.g. for www.a.com.", {"sentences": 1}, True),
        ('"Stop." He left (at last.) Then', {"sentences": 3}, True),
        ("1. First\n2. Second\n- third", {"at_least_sentences": 3}, True),
        ("It is cold. :)", {"at_least_sentences": 2}, False),
        ("今日は寒い。明日も寒い。", {"sentences": 2}, True),
        # paragraphs
        (TWO_PARAGRAPHS, {"paragraphs": 2}, True),
        (TWO_PARAGRAPHS + "\n\n---\n\n", {"at_most_paragraphs": 2}, True),
        ("Rivers.\r\n\r\nSand.\r\n", {"at_least_paragraphs": 2}, True),
        ("Rivers.\nSand.", {"paragraphs": 2}, False),
        ("Rivers.\n\nSand.\n\nMud.", {"paragraphs": 2}, False),
        # lists
        ("Here:\n- a\n* b\n  • c", {"bullets": 3}, True),
        ("- a\n- b\n- c\n- d", {"bullets": 3}, False),
        ("*a* is\n**b**\n---\n-5\n- ", {"bullets": 1}, False),
        ("1. a\n2) b\n\n**3.** c", {"numbered": 3}, True),
        ("1. a\n1. b", {"numbered": 2}, False),
        ("1. a\n2. b\n3. c", {"numbered": 2}, False),
        # texts
        ("The river. A RIVER!", {"contains": "river", "times": 2}, True),
        ("The river.", {"contains": "river", "times": 2}, False),
        ("Rivers", {"contains": "river"}, False),
        ("黄河很长", {"contains": "河"}, True),
        ("A lake.", {"contains_any": ["river", "lake"]}, True),
        ("A pond.", {"contains_any": ["river", "lake"]}, False),
        ("Red and blue", {"no": ","}, True),
        ("Red, blue", {"no": ","}, False),
        ("A party", {"no": "art"}, True),
        ("Modern Art.", {"no": "art"}, False),
        ("certainly, it is", {"begins_with": "Certainly"}, True),
        ("\n **Certainly!** It is", {"begins_with": "Certainly"}, True),
        ("Certainlyness", {"begins_with": "Certainly"}, False),
        ("It is. Certainly", {"begins_with": "Certainly"}, False),
        ("It’s so", {"begins_with": "It's"}, True),
        ("So. I hope this helps. \n", {"ends_with": "I hope this helps."}, True),
        ("So. *I hope this helps.*", {"ends_with": "I hope this helps."}, True),
        ("So. I hope this helps", {"ends_with": "I hope this helps."}, False),
        ("I hope this helps. So.", {"ends_with": "I hope this helps."}, False),
        # forms
        ("it is 3 é", {"lowercase": True}, True),
        ("it is I", {"lowercase": True}, False),
        ("123", {"lowercase": True}, False),
        ("IT IS 3", {"uppercase": True}, True),
        ("IT iS 3", {"uppercase": True}, False),
        ("It flows. It flows. Rivers do.", {"varied": True}, True),
        ("It flows. it flows. Rivers do. It flows!", {"varied": True}, False),
        ("- sand\n- mud\n- sand\n- sand", {"varied": True}, False),
        (
            "It is a way to go, and it is a way to go, and it is a way to go.",
            {"varied": True},
            False,
        ),
        ("In art, a river is a way to go; so in law a river is a way.", {"varied": True}, True),
        ("<<On rivers>>\n\nThey flow.", {"title": True}, True),
        ("# <<On rivers>>\nThey flow.", {"title": True}, True),
        ("They flow.\n<<On rivers>>", {"title": True}, False),
        ("<< >>\nThey flow.", {"title": True}, False),
        ('"They flow.\nOr not."', {"quoted": True}, True),
        ("“They flow.”", {"quoted": True}, True),
        ('"They flow." I think', {"quoted": True}, False),
        ('"', {"quoted": True}, False),
        (' {"river": ["Nile"]}\n', {"json": True}, True),
        (FENCED, {"json": True}, True),
        ("[1, 2]", {"json": True}, True),
        ("Here: " + FENCED, {"json": True}, False),
        ("{'river': 'Nile'}", {"json": True}, False),
        ("12", {"json": True}, False),
        ("[" * 100000, {"json": True}, False),
    ],
)
def test_what_follows_an_instruction(text, instruction, verdict):
    assert followed(text, instruction) is verdict


def example(name):
    """An instruction with a check of this name."""
    if name in TEXTS:
        return {name: "x"}
    if name in FORMS:
        return {name: True}
    if name == "contains_any":
        return {name: ["x", "y"]}
    return {name: 2}


@pytest.mark.parametrize("name", CHECKS)
def test_an_empty_response_follows_nothing_and_any_other_text_has_a_verdict(name):
    assert followed("", example(name)) is False
    assert followed(" \n\t ", example(name)) is False
    for text in ("x", "<<", "1.", "- ", '"', "```", "。", "\u2028", "[" * 2000, "a b. " * 3000):
        assert followed(text, example(name)) in (True, False)


def test_strictly_all_are_followed_and_loosely_a_share_of_them():
    instructions = [{"at_most_words": 3}, {"no": ","}, {"lowercase": True}, {"bullets": 1}]
    answer = {"follow": instructions}

    assert share_followed("- red blue", instructions) == 1
    assert share_followed("red, blue", instructions) == 0.5
    assert is_right("- red blue", answer) is True
    assert is_right("- Red blue", answer) is False
    assert share_followed("- Red blue", instructions) == 0.75


def test_keys_that_a_data_set_fills_with_null_are_no_keys():
    answer = {"follow": [{"no": ",", "bullets": None, "times": None}], "accept": None}

    assert is_right("red", answer)
    assert not is_right("red, blue", answer)
    assert instructions_of({"accept": ["cold"], "among": "cold|hot", "follow": None}) is None


@pytest.mark.parametrize(
    "answer, error, message",
    [
        ({"follow": [{"at_most_word": 3}]}, LookupError, "no check 'at_most_word'; there are"),
        ({"follow": [{"bullets": "3"}]}, TypeError, "'bullets' takes a whole number above 0"),
        ({"follow": [{"bullets": True}]}, TypeError, "'bullets' takes a whole number above 0"),
        ({"follow": [{"paragraphs": 0}]}, TypeError, "'paragraphs' takes a whole number above 0"),
        ({"follow": [{"no": 3}]}, TypeError, "'no' takes a text, not 3"),
        ({"follow": [{"contains_any": "a"}]}, TypeError, "'contains_any' takes a list of texts"),
        ({"follow": [{"contains_any": []}]}, TypeError, "'contains_any' takes a list of texts"),
        ({"follow": [{"begins_with": " "}]}, TypeError, "'begins_with' takes a text"),
        ({"follow": [{"json": False}]}, TypeError, "'json' takes true, not False"),
        ({"follow": [{"contains": "a", "times": 0}]}, TypeError, "'times' takes a whole number"),
        ({"follow": [{"no": "a", "times": 2}]}, TypeError, "'times' belongs to 'contains'"),
        ({"follow": [{"no": "a", "json": True}]}, TypeError, "names one check, not no, json"),
        ({"follow": [{}]}, TypeError, "names one check, not none"),
        ({"follow": ["json"]}, TypeError, "an instruction is an object"),
        ({"follow": []}, TypeError, "'follow' takes a list of instructions"),
        ({"follow": {"json": True}}, TypeError, "'follow' takes a list of instructions"),
    ],
)
def test_an_instruction_that_makes_no_sense_is_named_whatever_the_response(answer, error, message):
    for text in ("", "red, blue"):
        with pytest.raises(error, match=message):
            is_right(text, answer)
