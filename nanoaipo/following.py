"""Does a response do as it was told? Instructions that a few lines of code can check.

`answer` of a prompt may be {"follow": [{"at_most_words": 25}, {"no": ","}, ...]}, each instruction
one check of this table. In the spirit of IFEval (2311.07911), with checks and wording of our own.

    at_most_words N        N words or fewer; a word has a letter or digit and no space or dash in it
    at_least_words N       N words or more
    at_most_sentences N    N sentences or fewer; one ends at . ! ? before a space (Dr. and J. go
    at_least_sentences N   on), at an empty line, and with an item of a list
    sentences N            exactly N
    at_most_paragraphs N   N paragraphs or fewer; they stand between empty lines, and a line of
    at_least_paragraphs N  dashes or stars is none
    paragraphs N           exactly N
    bullets N              exactly N lines that begin with "- ", "* ", "+ " or "• "
    numbered N             exactly N lines that begin with a number and "." or ")", from 1 to N
    contains TEXT          the text is in it, as whole words; beside it "times" K: at least K times
    contains_any [TEXT]    one of these texts is in it
    no TEXT                the text is nowhere in it, as whole words; "," and the like anywhere
    begins_with TEXT       the text comes first, as whole words
    ends_with TEXT         the text comes last, as whole words
    lowercase true         it has letters, and no capital ones
    uppercase true         it has letters, and all are capital ones
    title true             its first line holds a title in double angle brackets: <<On rivers>>
    quoted true            all of it stands between two double quotes
    varied true            no sentence, item of a list or six words in a row comes a third time
    json true              all of it is a JSON object or array, markdown's ``` around it or not

White space around a response does not count, nor do quotes and markdown's * _ # > before what
begins or behind what ends it. Texts are sought in upper or lower case, and curly quotes are
straight ones. An empty response follows nothing.
"""

import collections
import json
import re

WORD = re.compile(r"[^\s—–]*\w[^\s—–]*")
STRAIGHT = str.maketrans("‘’“”", "''\"\"")

# a letter or digit of a script that parts its words by spaces, unlike Chinese, Thai or Korean
LETTER = r"[^\W\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uac00-\ud7ff]"

# any mark of markdown's, also where the instruction's words show a dash: what they ask is a list
BULLET = re.compile(r"\s*[-*+•]\s+.*\w")
NUMBERED = re.compile(r"\s*(?:\*\*)?(\d{1,3})[.)](?:\*\*)?\s+.*\w")

# where a sentence ends; the dots of abbreviations and initials are taken out before
END = re.compile(r"[.!?…]+[\"'”’)\]*_]*\s+|[。！？]")
ABBREVIATION = re.compile(r"(?<![\w'’])(Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|[a-hj-z])\.", re.IGNORECASE)
LIST_MARK = re.compile(r"^\s*(?:[-*+•]|(?:\*\*)?\d{1,3}[.)])\s+", re.MULTILINE)


def share_followed(text, instructions):
    """The share of the instructions that a response follows, from 0 to 1.

    Raises LookupError or TypeError for an instruction that is not as in the table above.
    """
    verdicts = [followed(text, instruction) for instruction in instructions]
    return sum(verdicts) / len(verdicts)


def followed(text, instruction):
    """Whether a response follows an instruction; the table of them is at the top of this file.

    Raises LookupError for a check that there is not, TypeError for a value that it does not take.
    """
    name, value, times = parse_instruction(instruction)
    text = text.strip()
    if not text:
        return False
    if name == "contains":
        return CHECKS[name](text, value, times)
    return CHECKS[name](text, value)


def instructions_of(answer):
    """The instructions of a prompt's `answer`, or None where it is of another kind.

    Raises TypeError where they are no list of instructions.
    """
    if not isinstance(answer, dict) or answer.get("follow") is None:
        return None
    instructions = answer["follow"]
    if not isinstance(instructions, list) or not instructions:
        raise TypeError(f"'follow' takes a list of instructions, not {instructions!r}")
    return instructions


def parse_instruction(instruction):
    """(name of the check, its value, times) of an instruction, which is checked for sense."""
    if not isinstance(instruction, dict):
        raise TypeError(
            f'an instruction is an object such as {{"at_most_words": 25}}, not {instruction!r}'
        )

    # a data set gives each of its rows every key, most of them null
    named = {key: value for key, value in instruction.items() if value is not None}
    times = named.pop("times", None)
    if len(named) != 1:
        raise TypeError(f"an instruction names one check, not {', '.join(named) or 'none'}")

    # the check, and how often, which only one of them is asked
    ((name, value),) = named.items()
    if name not in CHECKS:
        raise LookupError(f"no check '{name}'; there are {', '.join(CHECKS)}")
    if times is None:
        times = 1
    elif name != "contains":
        raise TypeError(f"'times' belongs to 'contains', not to '{name}'")

    # the value has to be of its check's type
    if name in TEXTS and (not isinstance(value, str) or not value.strip()):
        raise TypeError(f"'{name}' takes a text, not {value!r}")
    if name in LISTS and not is_list_of_texts(value):
        raise TypeError(f"'{name}' takes a list of texts, not {value!r}")
    if name in FORMS and value is not True:
        raise TypeError(f"'{name}' takes true, not {value!r}")
    if name in AMOUNTS and not is_count(value):
        raise TypeError(f"'{name}' takes a whole number above 0, not {value!r}")
    if not is_count(times):
        raise TypeError(f"'times' takes a whole number above 0, not {times!r}")
    return name, value, times


def is_count(value):
    """Whether a value is a whole number above 0; True is none."""
    return type(value) is int and value > 0


def is_list_of_texts(value):
    """Whether a value is a list of one text or more."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(text, str) and text.strip() for text in value)


# ---- counts ----


def count_words(text):
    return len(WORD.findall(text))


def sentences_of(text):
    """The sentences and the items of lists in a text, each without the mark of its end."""
    found = []
    for block in text_blocks(text):
        # each item of a list begins anew
        for part in LIST_MARK.split(block):
            pieces = END.split(ABBREVIATION.sub(r"\1", part))
            found += [piece.strip(" \n.!?…。") for piece in pieces if WORD.search(piece)]
    return found


def count_sentences(text):
    return len(sentences_of(text))


def text_blocks(text):
    """What stands between empty lines and has a letter or digit in it."""
    return [block for block in re.split(r"\n\s*\n", text) if WORD.search(block)]


def count_paragraphs(text):
    return len(text_blocks(text))


def count_bullets(text):
    return sum(1 for line in text.splitlines() if BULLET.match(line))


def numbers_of_items(text):
    """The numbers that lines begin with, in their order."""
    matches = [NUMBERED.match(line) for line in text.splitlines()]
    return [int(match[1]) for match in matches if match]


# ---- texts ----


def phrase_pattern(phrase):
    """The regular expression of a text as whole words, in straight quotes."""
    phrase = phrase.translate(STRAIGHT)
    pattern = re.escape(phrase)
    if re.match(LETTER, phrase):
        pattern = rf"(?<!{LETTER})" + pattern
    if re.match(LETTER, phrase[-1]):
        pattern += rf"(?!{LETTER})"
    return pattern


def occurrences(text, phrase):
    """All places of a text in a response."""
    return re.findall(phrase_pattern(phrase), text.translate(STRAIGHT), re.IGNORECASE)


def begins_with(text, phrase):
    pattern = r'[*_#>"\s]*' + phrase_pattern(phrase.strip())
    return re.match(pattern, text.translate(STRAIGHT), re.IGNORECASE) is not None


def ends_with(text, phrase):
    pattern = phrase_pattern(phrase.strip()) + r'[*_"\s]*\Z'
    return re.search(pattern, text.translate(STRAIGHT), re.IGNORECASE) is not None


# ---- forms ----


def has_title(text):
    return re.search(r"<<[^<>]*\w[^<>]*>>", text.splitlines()[0]) is not None


def is_quoted(text):
    return re.fullmatch(r'".*\w.*"', text.translate(STRAIGHT), re.DOTALL) is not None


def is_varied(text):
    repeats = collections.Counter(sentence.lower() for sentence in sentences_of(text))

    # within a sentence, too, a policy may run in a circle
    words = re.findall(r"\w+", text.lower())
    runs = collections.Counter(tuple(words[k : k + 6]) for k in range(len(words) - 5))
    return max((repeats | runs).values(), default=0) < 3


def is_json(text):
    fenced = re.fullmatch(r"```\w*\s*\n(.*)```", text, re.DOTALL)
    if fenced:
        text = fenced[1]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # "[[[[[..." is a thing that models write
        return False
    return isinstance(value, (dict, list))


# ---- the table ----

AMOUNTS = {  # take a whole number
    "at_most_words": lambda text, n: count_words(text) <= n,
    "at_least_words": lambda text, n: count_words(text) >= n,
    "at_most_sentences": lambda text, n: count_sentences(text) <= n,
    "at_least_sentences": lambda text, n: count_sentences(text) >= n,
    "sentences": lambda text, n: count_sentences(text) == n,
    "at_most_paragraphs": lambda text, n: count_paragraphs(text) <= n,
    "at_least_paragraphs": lambda text, n: count_paragraphs(text) >= n,
    "paragraphs": lambda text, n: count_paragraphs(text) == n,
    "bullets": lambda text, n: count_bullets(text) == n,
    "numbered": lambda text, n: numbers_of_items(text) == list(range(1, n + 1)),
}
TEXTS = {  # take a text
    "contains": lambda text, phrase, times: len(occurrences(text, phrase)) >= times,
    "no": lambda text, phrase: not occurrences(text, phrase),
    "begins_with": begins_with,
    "ends_with": ends_with,
}
FORMS = {  # take true
    "lowercase": lambda text, _: text.islower(),
    "uppercase": lambda text, _: text.isupper(),
    "title": lambda text, _: has_title(text),
    "quoted": lambda text, _: is_quoted(text),
    "varied": lambda text, _: is_varied(text),
    "json": lambda text, _: is_json(text),
}
LISTS = {  # take a list of texts
    "contains_any": lambda text, phrases: any(occurrences(text, one) for one in phrases),
}
CHECKS = AMOUNTS | TEXTS | FORMS | LISTS
