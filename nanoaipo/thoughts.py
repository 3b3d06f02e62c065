"""What a model thinks before it answers, told apart from the answer."""

THOUGHT_BEGINS = "<think>"
THOUGHT_ENDS = "</think>"


def split_thought(text):
    """(Thought, answer) of a response; the thought is None where there is none.

    A thought that does not end leaves an empty answer. A response may begin inside its thought,
    which the template has opened.
    """
    thought, mark, answer = text.partition(THOUGHT_ENDS)
    begins = thought.lstrip().startswith(THOUGHT_BEGINS)
    if not mark and not begins:
        return None, text
    thought = thought.replace(THOUGHT_BEGINS, "", 1)
    return thought.strip(), answer.lstrip()
