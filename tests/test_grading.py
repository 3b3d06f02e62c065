"""The rule for right answers."""

import random

import pytest

from nanoaipo.grading import is_right

OPPOSITE = {"accept": ["cold"], "among": r"\b(?:cold|hot|wet)\b"}
TWO_VEHICLES = {"accept": ["car", "bus"], "among": r"\b(?:car|bus|tea)\b", "count": 2}


@pytest.mark.parametrize(
    "text, answer, right",
    [
        # numbers
        ("It is 12.", 12, True),
        ("7 plus 5 is 12", "12", True),
        ("12, no, 13", "12", False),
        ("1,200 apples", "1200", True),
        ("1200 apples", "1,200", True),
        ("-3", -3, True),
        ("none", 3, False),
        ("The answer is 42. I hope this answer is clear.", 42, True),
        ("It is .5", 0.5, True),
        ("10-2 is 8", 8, True),
        ("so 10-2", -2, False),
        ("It is 1/2 of it", "0.5", True),
        ("It is 0.5", "1/2", True),
        ("It is 2/4", "1/2", True),
        ("It is 1/3", "1/2", False),
        ("It is 1/0", "1", False),
        ("\\boxed{\\frac{1}{2}}", "1/2", True),
        ("\\boxed{-\\dfrac{3}{4}}", "-0.75", True),
        ("\\boxed{0.5}", "$\\boxed{\\frac{1}{2}}$", True),
        ("\\boxed{0.25}", "\\frac{1}{2}", False),
        ("It costs $5.", "$5", True),
        ("-$1{,}200", "-1200", True),
        ("It costs $5 for 2", "$5", True),
        ("It costs $6", "$5", False),
        ("About 50%", "50", True),
        ("About 50", "50\\%", True),
        ("It is −3", "-3", True),
        ("It is 3", "−3", False),
        ("1.5e3 of them", 1500, True),
        ("$1.5 \\times 10^{3}$", "1,500", True),
        ("It is 0.00001", 1e-05, True),
        ("It is 2 × 10^-3", "0.002", True),
        # several numbers
        ("The roots are \\boxed{-2,1}", "-2,1", True),
        ("The roots are \\boxed{1, -2}", "-2,1", True),
        ("The roots are \\boxed{-2,2}", "-2,1", False),
        ("The roots are -2 and 1.", "-2, 1", True),
        ("The answer is x = 1 or x = -2.", "-2,1", True),
        ("Of 3, 4 and 5 it has 2. Answer: 3,4 as 3+4=7", "3, 4", True),
        ("Answer: 3, 4, 5", "3,4", False),
        ("Answer: 3", "3,4", False),
        ("\\boxed{\\{2, \\frac{1}{2}\\}}", "{0.5, 2}", True),
        ("They are 100,200", "100, 200", True),
        ("They are 1,200 and 3,400", "1200; 3400", True),
        ("(2, 1)", "(1, 2)", False),
        # lists of accepted answers
        ("It is Paris", ["Paris", "Paris, France"], True),
        ("The answer is 4.", ["4"], True),
        ("It is 5", [3, 4], False),
        ("It is cold", ["7", OPPOSITE], True),
        # text
        ("Yes, it is", True, False),
        ("It is true.", True, True),
        ("The answer is no", "no", True),
        ("The answer is Paris.", "paris", True),
        ("Parisian", "Paris", False),
        ("The answer is Paris. Is the answer: Rome?", "Paris", True),
        # choices
        ("(B)", "B", True),
        ("I would say B, but I am not sure.", "B", True),
        ("A good question: it is C", "C", True),
        ("The answer is B", "(B)", True),
        ("The answer is (B)", "B,", True),
        ("\\boxed{\\textbf{(B)}}", "B.", True),
        ("The answer is (C), not (B)", "(B)", False),
        ("(B) because C is too long", "(B)", True),
        ("(B) because C is too long", "C", False),
        ("B, because C is too long.", "B", True),
        ("It is (B). C is too long.", "B", True),
        ("(A) is too short, so (B)", "B", True),
        ("It is B, not C", "B", True),
        ("Since C is too long, it is B.", "B", True),
        ("The answer is not C but B", "B", True),
        # all statements of a kind
        ("cold. Again, it is cold.", OPPOSITE, True),
        ("cold. Again, it is wet.", OPPOSITE, False),
        ("Sure!", OPPOSITE, False),
        ("car and car", TWO_VEHICLES, False),
        ("Car and bus", TWO_VEHICLES, True),
    ],
)
def test_the_rule_for_right_answers(text, answer, right):
    assert is_right(text, answer) is right


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("The set is 1,2", "1,2", True),
        ("The set is 1, 2", "1,2", True),
        ("It is 12", "1,2", False),
        ("It is 12, I think", "12,", True),
        ("It is 12", "12,", False),
        ("from 4 ,5", ",5", True),
        ("It is 5", ",5", False),
    ],
)
def test_an_answer_whose_commas_are_not_those_of_thousands_is_no_single_number(text, answer, right):
    assert is_right(text, answer) is right


def test_a_number_is_right_however_it_is_written_and_another_one_is_wrong():
    rng = random.Random(0)
    frames = ("The answer is {}.", "3 and 4: {}", "so #### {}", "answer: 1? The answer is {} or 2")
    for _ in range(2000):
        number = rng.randrange(-(10**7), 10**7)
        written = (f"{number}", f"{number:,}", f"{number}.0", f"{number:,}.00")
        frame = rng.choice(frames)

        response = frame.format(rng.choice(written))
        answer = rng.choice((number, *written))

        assert is_right(response, answer), (response, answer)
        assert not is_right(response, number + 1), (response, number + 1)


def test_every_answer_is_graded_whatever_it_looks_like():
    rng = random.Random(0)
    pieces = ["####", "answer is ", "\\boxed{", " ", ",", ".", "-", "1", "12", "345", "A", "B", "é"]
    pieces += ["/", "0", "e", " and ", "\\frac{1}{2}", "}", "$", "%", "−", "10^9", " × ", "("]
    for _ in range(20000):
        text = "".join(rng.choices(pieces, k=rng.randrange(8)))
        answer = "".join(rng.choices(pieces, k=rng.randrange(1, 5)))

        assert is_right(text, answer) in (True, False), (text, answer)


def test_an_answer_of_no_kind_is_an_error_that_the_ranker_knows():
    for answer in ([], {"accept": ["a"]}, {"accept": ["a"], "among": 7}):
        with pytest.raises((LookupError, TypeError)):
            is_right("a", answer)
