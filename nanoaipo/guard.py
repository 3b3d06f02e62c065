"""The guard without a judge: right answers and followed instructions, and when they fall.

Win rates can rise while abilities fall (2604.02766), and a judge does not say so. The guard is what
the prompts' `answer` says of the responses, whoever judges them. It raises an alarm where the win
rate's 95 % interval lies wholly above an earlier one and the guard's wholly below. Two intervals of
like width that do not touch are 2.8 standard errors apart, which chance alone does three times in a
thousand in this direction: few enough to look at every pair of iterations. As all answer the same
prompts, the truth is better still, and a small fall may go unnoticed.
"""

import re

from nanoaipo.errors import InputError
from nanoaipo.following import instructions_of, share_followed
from nanoaipo.grading import is_right
from nanoaipo.stats import interval, wilson_interval

# what can raise the alarm, and what a sentence calls it
GUARDS = {"accuracy": "accuracy", "followed": "share of prompts followed"}
NO_GUARD = (
    "no guard: no prompt carries an 'answer', so nothing but the judge says what was learned; "
    "python -m nanoaipo.add_instructions gives prompts some"
)


def guard_scores(prompts, responses):
    """accuracy, followed and followed_share in percent with their intervals, None without any.

    n_accuracy and n_followed are the numbers of responses that they are shares of. Raises
    InputError for an `answer` of no kind.
    """
    right, shares = grade_answers(prompts, responses)
    measured = {
        "accuracy": [100 * value for value in right],
        "followed": [100 * (share == 1) for share in shares],
        "followed_share": [100 * share for share in shares],
    }
    scores = {"n_accuracy": len(right), "n_followed": len(shares)}
    for name, values in measured.items():
        scores[name], ends = interval(values)
        scores[name + "_ci"] = with_width(ends, len(values))
    return scores


def with_width(ends, n):
    """A 95 % interval in percent of n values, or Wilson's where it has no width.

    Values that are all 0, or all 100, have no spread, and an interval of no width; but n of them do
    not make it certain that the next one is another such.
    """
    if not ends or ends[0] != ends[1]:
        return ends
    return [100 * end for end in wilson_interval(ends[0] / 100, n)]


def grade_answers(prompts, responses):
    """What the prompts' `answer` says of the responses: (whether right, shares of instructions).

    A response is in the second list, with the share that it follows, where its prompt's `answer`
    lists instructions, else in the first. Prompts without `answer` are in neither.
    """
    right = []
    shares = []
    for prompt, response in zip(prompts, responses):
        if prompt.get("answer") is None:
            continue
        try:
            instructions = instructions_of(prompt["answer"])
            if instructions is None:
                right.append(is_right(response["text"], prompt["answer"]))
            else:
                shares.append(share_followed(response["text"], instructions))
        except (LookupError, TypeError, re.error) as e:
            reason = f"{type(e).__name__}: {e}"
            raise InputError(
                f"prompt '{prompt['id']}': its 'answer' is not as nanoaipo/grading.py has it "
                f"({reason})"
            ) from e
    return right, shares


def guard_interval(scores, guard):
    """The 95 % interval of a guard in percent, None without one; it has a width (see with_width).

    So one wrong answer among a few raises no alarm, in scores of older versions and of others too.
    """
    ends = scores.get(guard + "_ci")
    if not ends or None in ends:
        return None
    return with_width(ends, scores.get("n_" + guard, scores.get("n", 1)))


def lies_above(ends, others):
    """Whether an interval lies wholly above another; not where one of them is missing."""
    if not ends or not others or None in [*ends, *others]:
        return False
    return ends[0] > others[1]
