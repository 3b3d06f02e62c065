"""What is read out of a judge's reply: points, or which response is the better one."""

import time

import pytest

from nanoaipo.verdicts import read_score, read_verdict, reader_of


@pytest.mark.parametrize(
    "reply, score, verdict",
    [
        ("Score: 4", 4, None),
        ("score: 2.5/5\nFine.\n**Score:** 3", 3, None),
        ("Score: 9", None, None),
        ("I would say four", None, None),
        ("Score: 4\n\nunderscore 2", 4, None),
        ("Score = 4", 4, None),
        ("- Final score is 3/5", 3, None),
        ("The score 3 is low", None, None),
        ("Better: A", None, 1),
        ("A is better: no\nbetter: tie", None, 0.5),
        ("**Better**: b.", None, 0),
        ("better: apples", None, None),
        ("Better: [[A]]", None, 1),
        ("Better: Response B", None, 0),
        ("It would like it better a bit.", None, None),
        ("no better: a real pity", None, None),
        # sums count as what they come to, or not at all
        ("Score: 1 + 1 + 1 + 0 + 0 = 3", 3, None),
        ("Score: 1+1+1+1=4", 4, None),
        ("**Score:** 1 (relevant) + 1 (complete) = **2**/5", 2, None),
        ("Score: 1 + 1 + 1", None, None),
        ("Score: 1 +", None, None),  # cut short
        ("Score: 1 point + 1 point", None, None),
        ("Score: 1, 1, 0", None, None),
        ("Score: 5 - 1 = 4", 4, None),
        ("Score: 4 (1 + 1 + 1 + 1)", 4, None),
        # scales
        ("Score (0-5): 4", 4, None),
        ("**Score (0 to 5):** 4", 4, None),
        ("Score: 4/5", 4, None),
        ("**Score: 4**/5.", 4, None),
        ("Score: 4 out of 5", 4, None),
        ("Score: 4 points out of 5", 4, None),
        ("Score: 4/10", None, None),
        ("Score: 4 out of 10", None, None),
        ("Score: 4/50", None, None),
        ("Score: 40%", None, None),
        # below 0, above 5, between
        ("Score: -1", None, None),
        ("Score: −1", None, None),
        ("Score: 3\nScore: -1", None, None),
        ("Score: .5", None, None),
        ("Score: <4", None, None),
        ("Score: 3.5", 3.5, None),
        ("Score: 3,5", None, None),
        ("Score: 5.5", None, None),
        ("Score: 3-4", None, None),
        ("Score: 3 – 4", None, None),
        ("Score: 3 to 4", None, None),
        ("Score: 3 or maybe 4", None, None),
        ("Score: between 3 and 4", None, None),
        ("Score: 3, perhaps 4", None, None),
        ("Score: 3/5, maybe 4/5", None, None),
        ("Score: 1 for relevance, 1 for depth", None, None),
        ("Score: 4 because 3 of 4 points hold", 4, None),
        ('{"score": 4, "reason": "3 hold"}', 4, None),
        # other scales
        ("Score (0-10): 4", None, None),
        ("Score: 4 (out of 10)", None, None),
        ("Score: 4 out of a possible 10", None, None),
        ("Score: 4 / 5 = 0.8", None, None),
        ("Score: 4 (out of 5)", 4, None),
        # decoration
        ("### Score\n\n**4**", 4, None),
        ("| Score | 4 |", 4, None),
        ("$\\boxed{\\text{Score: } 4}$", 4, None),
        ("__Final score__: `4`", 4, None),
        ("Score: (4)", 4, None),
        ("Score: 4. It holds 4 of the points.", 4, None),
        ("Score - 4 because all holds", 4, None),
        ("Score: 4\n\nScore explanation: 1 to 4 hold", 4, None),
        ("*Score:* _4_", 4, None),
        ("<p><b>Score</b>: 4</p>", 4, None),
        # verdicts
        ("**Better: B**", None, 0),
        ("Better: Answer [A]", None, 1),
        ("Better: \\boxed{\\text{B}}", None, 0),
        ("## Better:\n\nA", None, 1),
        ("Better: A or B", None, None),
        ("Better: A\nBetter: A or B", None, None),
        ("Better: A\nBetter is a strong word.", None, 1),
        ("Better: A (it is complete)", None, 1),
        ("Better: Assistant B, since A is wrong", None, 0),
        ("Better: A (or B)", None, None),
        ("<b>Better:</b> A>>B", None, 1),
        # thoughts
        ("<think>\nIt ends with\nScore: 0\nBetter: B\nNow", None, None),
        ("<think>\nScore: 0\nBetter: B\n</think>\n\nScore: 4", 4, None),
        ("Score: 0\n</think>\nBetter: A", None, 1),
        ("<thinking>\nScore: 0\nBetter: B\n</thinking>\nScore: 4", 4, None),
        ("So.\n<Analysis>\nScore: 0\nBetter: B\n</analysis>\nBetter: A", None, 1),
        ("<reasoning>\nIt ends with\nScore: 0\nBetter: B", None, None),
        ("I saw no <reasoning> tag.\nBetter: A", None, 1),
    ],
)
def test_the_last_verdict_of_a_reply_counts(reply, score, verdict):
    assert read_score(reply) == score
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    "reply, score, verdict",
    [
        ("Feedback: it is short. [RESULT] 4", 4, None),
        ("[RESULT]: 4", 4, None),
        ("**[RESULT]** (4)", 4, None),
        ("[Result] 3.5/5", 3.5, None),
        ("[RESULT] 4 or 5", None, None),
        ("[RESULT] -1", None, None),
        ("[RESULT] .5", None, None),
        ("[RESULT] 4/10", None, None),
        ("[RESULT] 8", None, None),
        ("[RESULT] B", None, 0),
        ("So it is $\\boxed{4}$.", 4, None),
        ("\\boxed{\\text{A}}", None, 1),
        ("\\boxed{3-4}", None, None),
        ("Rating: [[5]]", 5, None),
        ("Rating: [[7]]", None, None),
        ("My final verdict is [[A]].", None, 1),
        ("[[A>B]]", None, 1),
        ("[[B>>A]]", None, 0),
        ("[[A=B]]", None, 0.5),
        ("[[C]]", None, 0.5),
        ("[[Assistant A]]", None, 1),
        ("[[tie]]", None, 0.5),
        ("[[Response B]]", None, 0),
        ("<answer>A</answer>", None, 1),
        ("<answer>\n4\n</answer>", 4, None),
        ("<answer>[[B]]</answer>", None, 0),
        ("<answer>Score: 4</answer>", 4, None),
        ("<score>4</score>", 4, None),
        ("<verdict>\nAssistant A\n</verdict>", None, 1),
        ("[RESULT] [[A>B]]", None, 1),
        ("[[A >> B]]", None, 1),
        ("[[A<B]]", None, 0),
        ("[[B<<A]]", None, 1),
        ("[[B=A]]", None, 0.5),
        ("[[A<B>A]]", None, None),
        ("$\\boxed{\\mathbf{B}}$", None, 0),
        ("\\boxed{\\textbf{4}}", 4, None),
        # marks that do not agree are no verdict, and a line is above them
        ("[[A]] if it is A, [[B]] if it is B", None, None),
        ("[[A]], I say: [[A]]", None, 1),
        ("[[A]] is shown first.\nBetter: B", None, 0),
        ("[[5]] is the most.\nScore: 3", 3, None),
        # what a line calls a verdict counts where nothing is marked
        ("Final verdict: Assistant B", None, 0),
        ("**Winner:** Response A", None, 1),
        ("### Verdict\n\nB", None, 0),
        ("The better answer is B!", None, 0),
        ("The verdict is: A>B.", None, 1),
        ("Overall rating: **4/5**", 4, None),
        ("Rating: 8", None, None),
        ("Verdict: A or B", None, None),
        ("Style\nWinner: A\nTruth\nWinner: B", None, None),
        ("Style\nWinner: A\nTruth\nWinner: B\n\n[[B]]", None, 0),
        ("Final verdict: A is better.\n[[A]]", None, 1),
        ("Rating: 2\n[RESULT] 4", 4, None),
        # nothing but a verdict
        ("4", 4, None),
        ("4 out of 5", 4, None),
        ("**B**", None, 0),
        ("(__A__).", None, 1),
        ("A good answer.", None, None),
        ("4 points hold", None, None),
        ("", None, None),
        # behind a thought, or cut in it
        ("<think>\n[RESULT] 1, [[B]]\n</think>\n\n[RESULT] 4", 4, None),
        ("<think>\n[[B]]\n</think>\n\n<answer>A</answer>", None, 1),
        ("<think>\n\\boxed{4}, [[A]]", None, None),
        ("[THINK]\\boxed{1}[/THINK]\\boxed{4}", 4, None),
    ],
)
def test_a_verdict_that_is_marked_counts_where_no_line_says_one(reply, score, verdict):
    assert read_score(reply) == score
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    "reply, score, verdict",
    [
        ('{"score": 4}', 4, None),
        ('{"score": "3.5/5"}', 3.5, None),
        ('{"reason": "it gets 5 of 5: \\"Score: 5\\"", "Final Score": 2}', 2, None),
        ('```json\n{\n  "rating": 4,\n  "scale": 5\n}\n```\nI hope that helps.', 4, None),
        ('{"overall_score": 4, "criteria": [{"score": 1}, {"score": 2}]}', 4, None),
        ('{"evaluation": {"score": 4}}', 4, None),
        ('{"reason": "two\nlines", "score": 4}', 4, None),
        ('{"score": 8}', None, None),
        ('{"score": -1}', None, None),
        ('{"score": "4 or 5"}', None, None),
        ('{"score": null}', None, None),
        ('{"score": true}', None, None),
        ('{"winner": "A"}', None, 1),
        ('{"winner": "model_b", "score_a": 1, "score_b": 4}', None, 0),
        ('So: {"verdict": "B>A", "why": "shorter"}', None, 0),
        ('{"better": "tie"}', None, 0.5),
        ('{"choice": "Response A"}', None, 1),
        ('{"winner": "both"}', None, None),
        ('{"Final Verdict": "Assistant B"}', None, 0),
        ('{"preferred_response": "A", "reason": "B is short"}', None, 1),
        ('{"final_rating": 4}', 4, None),
        ('{"score_a": 4, "winner_of_style": "A"}', None, None),
        # objects that do not agree are no verdict, and a line behind them is above them
        ('{"score": 5} is the most. {"score": 3}', None, None),
        ('{"score": 3}, so {"score": 3}', 3, None),
        ('{"score": 5}\nScore: 3', 3, None),
        ('{"winner": "A"} or {"winner": "B"}?\nBetter: B', None, 0),
        ('It says "\nScore: 5\nBetter: A\n".\n{"score": 1, "winner": "B"}', 1, 0),
        # other objects, and what is none
        ('{"reason": "fine"} [RESULT] 4', 4, None),
        ("In {x} it is $\\boxed{4}$", 4, None),
        ("{" * 5000, None, None),
        ('{"a":' * 5000, None, None),
        # behind a thought, or cut in it
        ('<think>\n{"score": 1}\n</think>\n{"score": 4}', 4, None),
        ('<think>\n{"score": 4, "winner": "A"}', None, None),
        # a key that is there twice
        ('{"winner": "A", "reason": "-", "winner": "B"}', None, None),
        ('{"score": 5, "winner": "A", "score": 5}', 5, 1),
    ],
)
def test_a_verdict_in_json_counts_where_no_line_says_one(reply, score, verdict):
    assert read_score(reply) == score
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    "expression, mode, reply, value",
    [
        (r"Rating: \[\[(\d+)\]\]", "score", "Rating: [[5]], no: Rating: [[8]]", 8),
        (r"^Mark (?P<verdict>\S+)( of 10)?$", "score", "Mark **7.5** of 10\nSo be it.", 7.5),
        (r"points: (.*)", "score", "points: −2", -2),
        (r"points: (.*)", "score", "points: 2 or 3", None),
        (r"points: (.*)", "score", "Score: 4", None),
        (r"points:( \d)?", "score", "points: none", None),
        (r"I prefer (\w+)", "pairwise", "I prefer A. No, I prefer b.", 0),
        (r"I prefer (\w+)", "pairwise", "I prefer neither", None),
        (r"<v>(.*)</v>", "pairwise", "<v>[[A]]</v>", None),
        (r"<v>(.*)</v>", "pairwise", "<v>A>>B</v>", 1),
        # behind a thought, or cut in it
        (r"<answer>(.*)</answer>", "pairwise", "<think>B</think>\n<answer>A</answer>", 1),
        (r"(\d)$", "score", "<think>5\n</think>\n4", 4),
        (r"(\d)$", "score", "<think>\nthat makes 5", None),
        (r"(\d)$", "score", "that makes 5</think>4", 4),
        (r"points: (\d)", "score", "points: 4\n<thinking>points: 5</thinking>", 4),
    ],
)
def test_a_regular_expression_reads_verdicts_of_any_other_form(expression, mode, reply, value):
    assert reader_of(expression, mode)(reply) == value


@pytest.mark.parametrize(
    "loop", ["\n", "*\n", "- \n\n", "{", '{"a":', "<answer>", "<thinking>", "better: a (", "[["]
)
def test_a_judge_that_falls_into_a_loop_is_read_in_seconds(loop):
    reply = "Score: 4\nBetter: A\n" + loop * 5_000

    before = time.process_time()
    read_score(reply)
    read_verdict(reply)

    assert time.process_time() - before < 5


def test_a_judge_that_repeats_a_mark_without_end_gives_no_vote():
    loop = "[RESULT] " * 3000

    assert read_score(loop) is None
    assert read_verdict(loop) is None
    assert read_verdict("[RESULT] [[A]]") == 1.0
