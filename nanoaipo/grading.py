"""Is this answer right? Numbers, choices, text, instructions.

`answer` is what a right response has to say. Where a response says it shows by marks: "####",
"\\boxed{", "answer:" or "answer is".

    a number        equals the first number behind the last mark that has one behind it; if no mark
                    has, the last number before the first mark. 1,234.0 is 1234, 1/2 and
                    \\frac{1}{2} are 0.5, 1.5e3 and 1.5 \\times 10^3 are 1500; $ and % say nothing
    several numbers "3, 5", "3 and 5" or "{3, 5}" is what is stated in the same place, in any order;
                    a response without several numbers is searched for the text
    one capital     the same with choices, the words A and I aside; "(B)" and "B," are B. One
                    behind "because", "since", "not" or "than" is not chosen, and without a mark
                    one in brackets goes before a bare one
    other text      stands behind the first mark, or anywhere without a mark, as whole words, upper
                    or lower case
    a list          one of its answers is given
    {"accept": [...], "among": regex, "count": k}
                    at least k distinct texts in the response match `among`, and all of them are in
                    `accept`
    {"follow": [...]}
                    each of these instructions is followed (nanoaipo/following.py)
"""

import re

from nanoaipo.following import instructions_of, share_followed

MARK = re.compile(r"####|\\boxed\{|\b(?i:answer)\b[*\s]*(?::|is\b)")  # what an answer stands behind
NUMBER = re.compile(
    r"(?:(?<!\w)-)?(?:\d+/0*[1-9]\d*|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?)"
)
SEPARATOR = r"\s*(?:,\s*and\b|[,;]|\band\b|\bor\b)\s*(?:[a-z]\s*=\s*)?"  # x = 3 or x = 5
NUMBERS = re.compile(rf"{NUMBER.pattern}(?:{SEPARATOR}{NUMBER.pattern})+")
CHOICE = re.compile(r"(?<![\w'])(?:[B-HJ-Z]|[AI](?! [a-z]))(?![\w'])")  # not the words A and I
BRACKETED = re.compile(rf"(?<=\(){CHOICE.pattern}(?=\))")  # (B)
NOT_CHOSEN = re.compile(r"\b(?i:because|since|not|than)\s+\(?[A-Z]\b")  # because C is too long
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")  # the commas of 1,234,567

# other ways to write what NUMBER finds, and how it finds them
SPELLINGS = [
    (re.compile("−"), "-"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\?[$€£¥%]"), ""),
    (re.compile(r"\\text\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"(?<=\d)\s*(?:×|\\times|\\cdot|\*)\s*10\s*\^\s*\{?([+-]?\d+)\}?"), r"e\1"),
]


def is_right(text, answer):
    """Whether a response gives the right answer; the rule is at the top of this file.

    Raises LookupError, TypeError or re.error for an answer of none of its kinds.
    """
    instructions = instructions_of(answer)
    if instructions is not None:
        return share_followed(text, instructions) == 1
    if isinstance(answer, dict):
        return states_only(text, answer)
    if isinstance(answer, list):
        if not answer:
            raise TypeError("a list of no answers")
        return any(is_right(text, one) for one in answer)

    # what kind of answer it is decides what is looked for in the response
    answer = str(answer).split("####")[-1].strip()  # GSM8K's own column ends so
    boxed = re.fullmatch(r"\$*\\boxed\{(.*)\}\$*", answer)
    if boxed:
        answer = boxed[1]
    number = THOUSANDS.sub("", respell(answer))
    if NUMBER.fullmatch(number):
        stated = stated_answer(NUMBER, THOUSANDS.sub("", respell(text)))
        if stated is not None and value(stated) == value(number):
            return True
        has_signs = re.search(r"[^\d.,-]", answer)
        return has_signs is not None and says(text, answer)  # "$5 for 2" says $5

    numbers = number.strip("\\{} ")
    if NUMBERS.fullmatch(numbers):
        return states_all(text, answer, numbers)
    choice = answer.strip("(),. ")
    if CHOICE.fullmatch(choice):
        return stated_choice(text) == choice
    return says(text, answer)


def respell(text):
    """The text with its numbers written as NUMBER finds them, but for commas of thousands."""
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    return text


def value(number):
    """The value of a match of NUMBER."""
    numerator, _, denominator = number.partition("/")
    return float(numerator) / float(denominator or 1)


def values(numbers):
    """The sorted values of a match of NUMBERS."""
    return sorted(value(number) for number in NUMBER.findall(numbers))


def states_all(text, answer, numbers):
    """Whether a response states these numbers, and no others with them, in any order."""
    text = respell(text)
    stated = [stated_answer(NUMBERS, text), stated_answer(NUMBERS, THOUSANDS.sub("", text))]
    if stated == [None, None]:
        return says(text, answer)
    # 100,200 may be one number or two
    return any(some is not None and values(some) == values(numbers) for some in stated)


def stated_answer(pattern, text):
    """What a response states as its answer: a match of the pattern, or None.

    The last mark with a match behind it decides, and there the first match. If no mark has one,
    it is the last match before all of them, where a derivation ends.
    """
    before, *behind_marks = MARK.split(text)
    for part in reversed(behind_marks):
        match = pattern.search(part)
        if match:
            return match[0]

    matches = pattern.findall(before)
    if not matches:
        return None
    return matches[-1]


def stated_choice(text):
    """What a response states as its choice, a capital, or None."""
    text = NOT_CHOSEN.sub("", text)
    bracketed = BRACKETED.findall(text)
    if bracketed and MARK.search(text) is None:
        return bracketed[-1]
    return stated_answer(CHOICE, text)


def says(text, answer):
    """Whether the words of an answer stand behind the first mark, or anywhere if there is none."""
    behind_marks = " ".join(MARK.split(text)[1:])
    words = rf"(?<!\w){re.escape(answer)}(?!\w)"
    return re.search(words, behind_marks or text, re.IGNORECASE) is not None


def states_only(text, rule):
    """Whether a response states enough of what is accepted, and nothing else of its kind."""
    stated = set(re.findall(rule["among"], text.lower()))
    return len(stated) >= rule.get("count", 1) and stated <= set(rule["accept"])
