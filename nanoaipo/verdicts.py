r"""What a judge's reply says: points for a response, or which of two responses is the better one.

    read_score("It is right, and short.\nScore: 4")    4.0
    read_verdict("Both are right.\nBetter: A")         1.0; of B 0.0, of a tie 0.5

The last such line counts, or JSON behind it, such as {"score": 4}. Where there is neither, what the
reply marks as its verdict counts: [RESULT] 4, [[A]]. What says nothing of the kind gives None.
"""

import json
import re

from nanoaipo.errors import InputError
from nanoaipo.thoughts import marks_of, split_thought

# ------------------------------------------------------------------------------------------- points

# "Score (0-5): 4": what the judge says of the score, on its line or, under a heading, the next one
SCORE_LINE = re.compile(
    r"^\W*(?:(?:final|total|overall) )?score\b"
    r"(?:[^\w\n]*\n)*"  # it may be a heading
    r"([^\w\n]*(?:\([^()\n]*\)\W*)?(?:is\W*)?\d.*)$",  # perhaps a remark, then a number
    re.IGNORECASE | re.MULTILINE,
)
REMARK = re.compile(r"\((?!\s*\d+(?:\.\d+)?\s*\))[^()]*\)")  # in brackets; (4) is none

# what the points are out of, at the end of a remark: (0-10), (out of 10)
SCALE = re.compile(
    r"(?:/|\bof\b|\bmax(?:imum)?\b|\b[01]\s*(?:[-–—]|\bto\b))\W*(\d+(?:\.\d+)?)\W*$",
    re.IGNORECASE,
)
# behind the number: where a sentence ends, or its reason begins
CLAUSE_END = re.compile(r"[.!?;:\"]|\b(?:because|since|as)\b", re.IGNORECASE)

# one number from 0 up, perhaps "out of 5"
POINTS = re.compile(
    r"\W*(?:is\W*)?"
    r"(?<![-−–<>≤≥.\d])(\d+(?:\.\d+)?)(?![\w%])"  # not -4, <4, 4th, 40%
    r"(?:\s*points?\b)?"
    r"(?:\W*(?:/|out of|of)\W*5(?:\.0)?)?"
    r"(?!\W*(?:or\b|(?:to|and|plus|minus|out of|of)?\W*\d))"  # not 3 or 4, 3-4, 4 of 10
    r"(?!.*\+\W*(?:\d|$))",  # not 1 (relevant) + 1 (complete)
    re.IGNORECASE,
)

# points that are marked or stand in JSON, and the keys that JSON has them under
MARKED_POINTS = re.compile(r"(?:(?:score|rating)\W+)?(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*5)?")
SCORE_KEYS = re.compile(r"(?:(?:final|total|overall)_)?(?:score|rating)")


def read_score(reply):
    """The number on the last line "Score: N" of a reply, in JSON behind it, else marked, or None.

    A sum counts as what it comes to. A range, a fraction, one of several numbers, a number below 0
    or above 5 or on another scale, and what stands in a thought are no score.
    """
    in_json, answer = cut_json(without_thought(reply), SCORE_KEYS)
    lines = SCORE_LINE.findall(plain_lines(answer))
    if lines:
        return points_of(lines[-1])
    points = one_verdict(in_json or marked_texts(answer), MARKED_POINTS)
    if points is None or float(points) > 5:
        return None
    return float(points)


def points_of(line):
    """The points that a line gives behind its word "score", or None."""
    # another scale, in brackets before or behind the number
    for remark in REMARK.findall(line):
        scale = SCALE.search(remark)
        if scale and float(scale[1]) != 5:
            return None

    line = REMARK.sub("", line)
    terms, _, line = line.rpartition("=")  # 1 + 1 + 0 = 2
    match = POINTS.match(line)
    if match is None or float(match[1]) > 5 or "/" in terms:
        return None

    # "3, perhaps 4", "1 for relevance, 1 for depth"
    rest = CLAUSE_END.split(line[match.end() :])[0]
    if re.search(r"\d", rest):
        return None
    return float(match[1])


# ---------------------------------------------------------------------------------- which is better

# a verdict: which is better, perhaps by how much (Arena-Hard), or neither
NOUN = r"(?:response|answer|assistant|model)"
CHOICE = r"(a\s*(?:>>?|<<?|=)\s*b|b\s*(?:>>?|<<?|=)\s*a|a|b|c|tie)"

VERDICT = re.compile(
    r"^\W*better\b(?:"
    rf"\W*(?:{NOUN}\W*)?{CHOICE}"  # Better: A
    r"(?:\W*\((?!or\b)[^()\n]*\)|\W+(?:because|since|as)\b.*)?\W*$"  # perhaps a remark or reason
    r"|[^\w\n]*:.*$)",  # or anything else, such as "Better: A or B": the group is empty
    re.IGNORECASE | re.MULTILINE,
)
# a verdict that is marked or stands in JSON, and the keys that JSON has it under: {"winner": "A"}
MARKED_VERDICT = re.compile(rf"(?:{NOUN}[\s_]*)?{CHOICE}")
VERDICT_KEYS = re.compile(
    rf"(?:final_)?(?:winner|better|verdict|choice|preference|preferred)(?:_{NOUN})?"
)

# what verdicts count; MT-Bench's tie is [[C]]; Arena-Hard's judges write B<A for A>B now and then
# fmt: off
OUTCOMES = {
    "a": 1.0, "a>b": 1.0, "a>>b": 1.0, "b<a": 1.0, "b<<a": 1.0,
    "b": 0.0, "b>a": 0.0, "b>>a": 0.0, "a<b": 0.0, "a<<b": 0.0,
    "c": 0.5, "tie": 0.5, "a=b": 0.5, "b=a": 0.5,
}
# fmt: on


def read_verdict(reply):
    """The last line "Better: A", "B" or "tie" of a reply as 1, 0 or a half, or None.

    JSON behind it counts in its place, and what is marked where there is neither.
    """
    in_json, answer = cut_json(without_thought(reply), VERDICT_KEYS)
    lines = VERDICT.findall(plain_lines(answer))
    if lines:
        verdict = re.sub(r"\s", "", lines[-1].lower())
    else:
        verdict = one_verdict(in_json or marked_texts(answer), MARKED_VERDICT)
    return OUTCOMES.get(verdict)


# --------------------------------------------------------------------------- where a verdict stands

# a thought in tags that a prompt asked for, wherever it stands; one cut short has no end
THOUGHT_TAG = r"<(thinking|reasoning|analysis|scratchpad)>"
TAGGED_THOUGHT = re.compile(
    rf"{THOUGHT_TAG}.*?</\1>|\A\s*{THOUGHT_TAG}.*", re.IGNORECASE | re.DOTALL
)


def without_thought(reply):
    """What a judge says behind its thought, and outside of those in tags that a prompt asks for."""
    _, answer = split_thought(reply)
    return TAGGED_THOUGHT.sub("", answer)


# LaTeX's commands, such as \boxed; HTML's tags; bold and italics
MARKUP = re.compile(r"\\[a-z]+|</?[a-z]+>|\b_+|_+\b", re.IGNORECASE)


def plain_lines(answer):
    """An answer without markup and without the lines that have no word in them.

    A judge that falls into a loop writes thousands of those, and a pattern would try each.
    """
    lines = MARKUP.sub("", answer).splitlines()
    return "\n".join(line for line in lines if re.search(r"\w", line))


# texts may hold line breaks; an object is read as its (key, value) pairs, for a key may come twice
JSON = json.JSONDecoder(strict=False, object_pairs_hook=list)


def cut_json(answer, keys):
    """What JSON objects in an answer have under these keys, as texts, and the answer behind them.

    keys: a pattern of names in lower case with underscores. Where no object has such a key, that is
    all of the answer.
    """
    values = []
    end = 0  # of the last object
    for match in re.finditer(r"\{", answer):
        begin = match.start()
        if begin < end:
            continue
        try:
            fields, stop = JSON.raw_decode(answer, begin)
        except ValueError:  # no JSON
            continue
        except RecursionError:  # thousands of brackets: each would be tried in turn
            break
        found = []
        for name, value in fields:
            if keys.fullmatch(re.sub(r"\W+", "_", name.lower())):
                found.append(str(value))
        if found:
            values += found
            end = stop
    return values, answer[end:]


# where no line says so, how judges mark a verdict: [RESULT] 4 (Prometheus), \boxed{4}, [[4]]
MARKED = re.compile(
    r"\[result\][\s:]*(?P<result>(?:(?!\[result\]).)*)"
    r"|\\boxed\{(?:\\[a-z]+\{)?(?P<boxed>[^{}]*)\}"
    r"|\[\[(?P<brackets>[^\[\]]*)\]\]"
    r"|<(?P<tag>answer|score|rating|verdict|winner)>(?P<tagged>[^<]*)</(?P=tag)>",
    re.IGNORECASE,
)
# and where nothing is marked: "Final verdict: Assistant B", "Rating: 4/5"
LABELLED = re.compile(
    rf"^\W*(?:(?:my|the|final|overall)\W+)*(?:verdict|winner|rating|better {NOUN})\b"
    r"\W*(?:is\b\W*)?(.+)$",
    re.IGNORECASE | re.MULTILINE,
)


def marked_texts(answer):
    """What an answer marks as its verdict, else what lines call one, else the whole answer."""
    marked = []
    for match in MARKED.finditer(answer):
        marked += marked_texts(match[match.lastgroup])  # <answer>[[A]]</answer>
    return marked or LABELLED.findall(plain_lines(answer)) or [answer]


def one_verdict(texts, pattern):
    """The verdict that all these texts give, in lower case, or None where one gives another.

    pattern: of a verdict; its group is returned, and text of another form is none.
    """
    verdicts = set()
    for text in texts:
        match = pattern.fullmatch(without_bold(text))
        verdicts.add(match and re.sub(r"\s", "", match[1]))
    if len(verdicts) != 1:
        return None
    return verdicts.pop()


def without_bold(text):
    """A verdict without the brackets, quotes and bold around it, in lower case."""
    return text.lstrip(" \n*_`($\"'").rstrip(" \n*_`)$\"'}.!").lower()


# ----------------------------------------------------------------------------------- any other form

NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?")  # what --verdict finds where points are asked for


def reader_of(verdict, judge_mode):
    """A function as read_score or read_verdict, which reads what a regular expression finds.

    Of several matches behind the thought the last counts, in it the group `verdict`, or the only
    group. Points may be any number: the scale is that of the judge_prompt. Raises InputError.
    """
    try:
        pattern = re.compile(verdict, re.MULTILINE)
    except re.error as e:
        raise InputError(f"--verdict={verdict}: no regular expression: {e}") from e
    group = 1
    if "verdict" in pattern.groupindex:
        group = "verdict"
    elif pattern.groups != 1:
        raise InputError(
            f"--verdict={verdict}: has {pattern.groups} groups; wanted is one, "
            "or one that is named: (?P<verdict>...)"
        )

    def read(reply):
        # not split_thought: marks around the answer may be what the expression looks for
        marks = marks_of(reply)
        if marks:
            _, _, reply = reply.partition(marks[1])
        matches = list(pattern.finditer(TAGGED_THOUGHT.sub("", reply)))
        if not matches:
            return None
        text = without_bold(matches[-1][group] or "")
        if judge_mode == "pairwise":
            return OUTCOMES.get(one_verdict([text], MARKED_VERDICT))
        if NUMBER.fullmatch(text) is None:
            return None
        return float(text.replace("−", "-"))

    return read
