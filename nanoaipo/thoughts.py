"""What a model thinks before it answers, told apart from the answer.

A response is a thought between two marks and then the answer, or the answer alone. Marks may be
plain text, added tokens or special tokens; what they look like depends on who made the model.
"""

import bisect
import re

# (mark that begins the thought, mark behind which the answer stands)
MARKS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, SmolLM3, OLMo-3, GLM-4.5, Nemotron, ...
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel|>", "<|channel|>final<|message|>"),  # gpt-oss: analysis and commentary, then final
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
)
# what some write around the answer behind a thought, and Command R without one too
ANSWER_MARKS = (
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),  # Command R and A
    ("<answer>", "</answer>"),  # Hunyuan
    ("<response>", "</response>"),  # Granite 3.3, ERNIE 4.5
    ("<|begin_of_solution|>", "<|end_of_solution|>"),  # OpenThinker, Sky-T1
)
# what Seed-OSS opens a thought with that is to be short, behind its first mark
BUDGET = "<seed:cot_budget_reflect>"
# what gpt-oss writes around the messages of a thought
HEADERS = re.compile(r"<\|channel\|>[^<]*<\|message\|>|<\|end\|>|<\|start\|>assistant")


def marks_of(text):
    """The marks of the thought that a response begins with, or None.

    A response that has only the second mark began inside its thought, which the template had
    opened. A mark that stands further behind is part of the answer.
    """
    for marks in MARKS:
        if text.lstrip().startswith(marks):
            return marks
    for marks in MARKS:
        begins, ends = marks
        before, found, _ = text.partition(ends)
        if found and begins not in before:
            return marks
    return None


def split_thought(text, opened=False):
    """(Thought, answer) of a response; the thought is None where there is none.

    opened: whether the prompt ends inside a thought. A thought that does not end leaves an empty
    answer.
    """
    marks = marks_of(text)
    if marks is None and opened:
        return text.strip(), ""
    if marks is None:
        return None, without_marks(text, ANSWER_MARKS[:1])

    begins, ends = marks
    thought, _, answer = text.partition(ends)
    if begins == "<|channel|>":
        thought = HEADERS.sub("", thought)
    else:
        thought = thought.replace(begins, "", 1)
    return thought.strip(), without_marks(answer.lstrip())


def without_marks(answer, all_marks=ANSWER_MARKS):
    """An answer without the marks around it; where there are none, it stays as it is."""
    inside = answer.strip()
    for begins, ends in all_marks:
        if inside.startswith(begins):
            return inside.removeprefix(begins).removesuffix(ends).strip()
    return answer


def with_thought(thought, answer, marks=MARKS[0]):
    """A response's text as most models write it, for a template to make its own."""
    begins, ends = marks
    return f"{begins}\n{thought}\n{ends}\n\n{answer}"


def begins_thought(text):
    """Whether a text begins with the first mark of a thought."""
    return text.lstrip().startswith(tuple(begins for begins, _ in MARKS))


def marks_at_end(text):
    """The marks of the thought that a rendered prompt ends in, or right behind, or None."""
    text = text.rstrip().removesuffix(BUDGET)
    for marks in MARKS:
        if text.endswith(marks):
            return marks
    return None


def opens_thought(text):
    """Whether a rendered prompt ends inside a thought: the template has written its first mark."""
    marks = marks_at_end(text)
    return marks is not None and text.rstrip().removesuffix(BUDGET).endswith(marks[0])


def closes_thought(text):
    """Whether a rendered prompt ends behind a thought: the model is not to think."""
    return marks_at_end(text) is not None and not opens_thought(text)


def split_thought_ids(tokenizer, prompt_ids, ids):
    """(Thought, answer, tokens of the thought, whether it has ended) of a sampled response.

    The texts have no special tokens in them. Without a thought: (None, text, 0, True).
    """
    # special tokens are decoded too, since the marks may be among them
    opened = opens_thought(tokenizer.decode(prompt_ids[-64:]))  # no mark is longer
    marked = tokenizer.decode(ids)
    thought, _ = split_thought(marked, opened)
    if thought is None:
        _, answer = split_thought(tokenizer.decode(ids, skip_special_tokens=True))
        return None, answer, 0, True

    # a thought without an end
    marks = marks_of(marked)
    if marks is None or marks[1] not in marked:
        return thought, "", len(ids), False

    # the fewest tokens that hold the whole thought; the last may hold a part of the answer too
    def holds_thought(n):
        return marks[1] in tokenizer.decode(ids[:n])

    n = bisect.bisect_left(range(len(ids)), True, key=holds_thought)
    _, _, rest = tokenizer.decode(ids[:n]).partition(marks[1])
    answer = rest + tokenizer.decode(ids[n:], skip_special_tokens=True)
    return thought, without_marks(answer.lstrip()), n, True
