"""Is this answer right? Numbers, choices, text.

`answer` is what a right response has to say. Where a response says it shows by marks: "####",
"\\boxed{", "answer:" or "answer is".

    a number        equals the first number behind the last mark that has one behind it; if no mark
                    has, the last number before the first mark (1,234.0 is 1234)
    one capital     the same with choices, the words A and I aside
    other text      stands behind the first mark, or anywhere without a mark, as whole words, upper
                    or lower case
    {"accept": [...], "among": regex, "count": k}
                    at least k distinct texts in the response match `among`, and all of them are in
                    `accept`
"""

import re

MARK = re.compile(r"####|\\boxed\{|\b(?i:answer)\b[*\s]*(?::|is\b)")  # what an answer stands behind
NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d+(?:\.\d+)?|\.\d+)")
CHOICE = re.compile(r"(?<![\w'])(?:[B-HJ-Z]|[AI](?! [a-z]))(?![\w'])")  # not the words A and I
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")  # the commas of 1,234,567


def is_right(text, answer):
    """Whether a response gives the right answer; the rule is at the top of this file."""
    if isinstance(answer, dict):
        return states_only(text, answer)

    # what kind of answer it is decides what is looked for in the response
    answer = str(answer).split("####")[-1].strip()  # GSM8K's own column ends so
    number = THOUSANDS.sub("", answer)
    if NUMBER.fullmatch(number):
        stated = stated_answer(NUMBER, text)
        return stated is not None and float(stated) == float(number)
    if CHOICE.fullmatch(answer.replace(",", "")):  # "B," is one too, which no response can state
        return stated_answer(CHOICE, text) == answer
    return says(text, answer)


def stated_answer(pattern, text):
    """What a response states as its answer: a match of the pattern, or None.

    The last mark with a match behind it decides, and there the first match. If no mark has one,
    it is the last match before all of them, where a derivation ends.
    """
    before, *behind_marks = MARK.split(THOUSANDS.sub("", text))
    for part in reversed(behind_marks):
        match = pattern.search(part)
        if match:
            return match[0]

    matches = pattern.findall(before)
    if not matches:
        return None
    return matches[-1]


def says(text, answer):
    """Whether the words of an answer stand behind the first mark, or anywhere if there is none."""
    behind_marks = " ".join(MARK.split(text)[1:])
    words = rf"(?<!\w){re.escape(answer)}(?!\w)"
    return re.search(words, behind_marks or text, re.IGNORECASE) is not None


def states_only(text, rule):
    """Whether a response states enough of what is accepted, and nothing else of its kind."""
    stated = set(re.findall(rule["among"], text.lower()))
    return len(stated) >= rule.get("count", 1) and stated <= set(rule["accept"])
