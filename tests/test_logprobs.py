"""A judge that answers with one token: its points are the mean over the token's log-probs."""

import math

import pytest
from test_judge import Judge, candidates, choice, kept, n_asked, pairs_of, rank

from nanoaipo.logprobs import expected_digit, first_token


def tops(probabilities):
    """{token: probability} as an endpoint has the log-probs of a reply of one token."""
    top = [{"token": t, "logprob": math.log(p)} for t, p in probabilities.items()]
    return {"content": [{"token": "?", "logprob": 0.0, "top_logprobs": top}]}


@pytest.mark.parametrize(
    "probabilities, mean",
    [
        ({"4": 1.0}, 4.0),
        ({"4": 0.5, "2": 0.25, "The": 0.25}, (4 * 0.5 + 2 * 0.25) / 0.75),
        ({"3": 0.3, " 3": 0.3, "\n5": 0.2}, (3 * 0.6 + 5 * 0.2) / 0.8),
        ({"0": 0.9, "5": 0.1}, 0.5),
        ({"0": 0.2}, 0.0),
        ({"10": 0.6, "4": 0.2, "²": 0.1, "-1": 0.1}, 4.0),  # none of them a digit, but one
        ({"Score": 0.7, "": 0.3}, None),
    ],
)
def test_the_expected_digit_is_the_mean_over_the_tokens_that_are_digits(probabilities, mean):
    reply = {"reply": "?", "logprobs": tops(probabilities)}

    if mean is None:
        assert expected_digit(reply) is None
    else:
        assert expected_digit(reply) == pytest.approx(mean)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": [{"token": "4", "logprob": 0.0}]},
        {"content": [{"token": "4", "logprob": 0.0, "top_logprobs": None}]},
        {"content": [{"token": "4", "logprob": 0.0, "top_logprobs": []}]},
    ],
)
def test_a_reply_without_the_log_probs_of_other_tokens_has_none(logprobs):
    reply = {"reply": "4", "logprobs": logprobs}

    assert first_token(reply) is None
    assert expected_digit(reply) is None


# ---- rank.py --ranker=judge --judge_mode=expected ----

ROWS = {"x": ["aaaa", "a", "aa"], "y": ["bb", "bbb"]}


def length_of(text):
    """Characters of the response in a question to the judge, which has one in tags."""
    return len(text.split("<response>\n")[1].split("\n</response>")[0])


def is_nearly_sure(server, handler, text):
    """A misbehaviour: a digit, the length of the response, or with a third of it one less."""
    length = length_of(text)
    top = {str(length): 0.6, str(length - 1): 0.3, "I": 0.1}
    handler.reply(choice(str(length), finish_reason="length", logprobs=tops(top)))
    return True


def test_the_points_of_a_response_are_the_mean_over_the_log_probs_of_one_reply(tmp_path):
    candidates(tmp_path / "c.jsonl", ROWS)
    server = Judge(misbehave=is_nearly_sure)

    done = rank(tmp_path, server.url, judge_mode="expected", judge_votes=3)

    assert done.returncode == 0, done.stderr
    pairs = pairs_of(tmp_path)
    third = 1 / 3
    assert pairs["x"]["scores"] == pytest.approx([4 - third, 1 - third, 2 - third])
    assert pairs["x"]["z"] == pytest.approx(3)
    assert pairs["y"]["chosen"][0]["content"] == "bbb"
    assert n_asked(server) == len(kept(tmp_path)) == 5
    for body in server.bodies:
        assert (body["max_tokens"], body["temperature"]) == (1, 1.0)
        assert (body["logprobs"], body["top_logprobs"]) == (True, 20)


def test_an_endpoint_without_log_probs_is_refused_after_one_question(tmp_path):
    candidates(tmp_path / "c.jsonl", ROWS)
    server = Judge()

    done = rank(tmp_path, server.url, judge_mode="expected")

    assert done.returncode == 1
    assert "--judge_mode=expected: 'some-judge' gives no log-probs with its replies" in done.stderr
    assert "Traceback" not in done.stderr
    assert n_asked(server) == 1


def test_a_reply_in_which_no_digit_is_likely_is_unreadable(tmp_path):
    def refuses_long_ones(server, handler, text):
        if length_of(text) < 4:
            return is_nearly_sure(server, handler, text)
        handler.reply(choice("I", logprobs=tops({"I": 0.9, "Sorry": 0.1})))
        return True

    candidates(tmp_path / "c.jsonl", ROWS)

    done = rank(tmp_path, Judge(misbehave=refuses_long_ones).url, judge_mode="expected")

    assert done.returncode == 0, done.stderr
    assert "1 unjudged, 5 replies, 1 unreadable_replies" in done.stdout
    assert pairs_of(tmp_path)["x"]["chosen"][0]["content"] == "aa"


@pytest.mark.parametrize("settings", [{"judge_url": ""}, {"verdict": r"(\d)"}])
def test_without_an_endpoint_or_with_a_verdict_the_mode_is_refused(tmp_path, settings):
    candidates(tmp_path / "c.jsonl", ROWS)

    done = rank(tmp_path, "http://127.0.0.1:9/v1", judge_mode="expected", **settings)

    assert done.returncode == 1
    message = "--judge_mode=expected: reads the log-probs of an endpoint: set --judge_url, and no"
    assert message in done.stderr
