"""What the log-probs of a reply's first token say: a judge that answers with a single token.

first_token({"reply": "4", "logprobs": {"content": [...]}})    {"4": 0.7, "3": 0.2, " 4": 0.05}
"""

import math


def first_token(reply):
    """{token: probability} of the likeliest first tokens; None where the judge gives none."""
    tokens = (reply.get("logprobs") or {}).get("content")
    if not tokens or not tokens[0].get("top_logprobs"):  # null, or of the chosen token alone
        return None
    return {top["token"]: math.exp(top["logprob"]) for top in tokens[0]["top_logprobs"]}


def expected_digit(reply):
    """The mean of the digits that the first token may be, by probability (G-Eval, 2303.16634).

    The probability of anything else is left out. None where no digit is among the likeliest tokens.
    """
    mass = 0.0
    weighted = 0.0
    for token, probability in (first_token(reply) or {}).items():
        digit = token.strip()
        if len(digit) == 1 and digit in "0123456789":
            mass += probability
            weighted += probability * int(digit)
    if not mass:
        return None
    return weighted / mass
