"""Is this answer right? Numbers, choices, text.

`answer` is what a right response has to say. A number must equal the first number behind the last "####", "\\boxed{", "answer:" or
"answer is" that has one behind it, or the last number before such marks (1,234.0 is 1234); a choice of one capital letter
likewise, the words A and I aside; any other text must stand behind the first mark, or anywhere without one, as whole words,
upper or lower case. {"accept": [...], "among": regex, "count": k}: of all statements in the response that match `among`, at
least k distinct ones, and every one of them in `accept`.
"""
import re

NUMBER = r"(?:(?<!\w)-)?(?:\d+(?:\.\d+)?|\.\d+)"
CHOICE = r"(?<![\w'])(?:[B-HJ-Z]|[AI](?! [a-z]))(?![\w'])"        # not the words A and I


def is_right(text, answer):
    """Whether a response gives the right answer; the rule is at the top of this file."""
    if isinstance(answer, dict):
        stated = set(re.findall(answer["among"], text.lower()))
        return len(stated) >= answer.get("count", 1) and stated <= set(answer["accept"])
    answer = str(answer).split("####")[-1].strip()                      # GSM8K's own column ends so
    parts = re.split(r"####|\\boxed\{|\b(?i:answer)\b[*\s]*(?::|is\b)", text)
    for pattern, value in ((NUMBER, lambda s: float(re.sub(r"(?<=\d),(?=\d{3})", "", s))), (CHOICE, str)):
        if re.fullmatch(pattern, answer.replace(",", "")):
            found = [re.findall(pattern, re.sub(r"(?<=\d),(?=\d{3})", "", part)) for part in parts]
            stated = next((f[0] for f in reversed(found[1:]) if f), found[0][-1] if found[0] else None)
            return stated is not None and value(stated) == value(answer)
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", " ".join(parts[1:]) or text, re.IGNORECASE) is not None
