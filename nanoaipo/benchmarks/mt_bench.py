"""MT-Bench: single-answer grading of two turns (2306.05685)."""

import glob
import os
import re
import time

from nanoaipo.benchmarks.answers import (
    check_no_duplicates,
    files_below,
    find_bench_file,
    last_day,
    only_judge,
    read_answers,
    select_model,
)
from nanoaipo.errors import InputError
from nanoaipo.files import read_records
from nanoaipo.served import served_fields, served_scores
from nanoaipo.verdicts import without_thought

REPOSITORY = "lm-sys/FastChat"
SUFFIX = ".jsonl"  # of a judgments file
N_RATINGS = 160  # 80 questions of two turns

# ten questions each, from question 81 on
CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
REFERRED = ("math", "reasoning", "coding")  # judged beside a reference answer


# ---- score ----


def category_of(question_id):
    """The category of an official question, else "other"."""
    if isinstance(question_id, int) and 81 <= question_id <= 160:
        return CATEGORIES[(question_id - 81) // 10]
    return "other"


def judge_of(row):
    """The judge's name in a record: alone, or in a list with the name of its template."""
    if isinstance(row["judge"], str):
        return row["judge"]
    return row["judge"][0]


def mean_score(rows):
    """Mean rating of some records, None of none."""
    if not rows:
        return None
    return sum(row["score"] for row in rows) / len(rows)


def score(judgments, model, **_):
    """Mean of all ratings (1 to 10), by turn and by category.

    A reply without a rating has the score -1 or null and is invalid. model: whose judgments, where
    the file has several. Raises InputError.
    """
    fields = ("question_id", "model", "judge", "score", "turn")
    rows = list(read_records(judgments, *fields))
    rows, model = select_model(rows, lambda r: r["model"], judgments, model)
    check_no_duplicates(rows, lambda r: f"question {r['question_id']}, turn {r['turn']}")

    # -1: a reply in which the official code found no rating
    rated = [row for _, row in rows if row["score"] is not None and row["score"] >= 0]
    if not rated:
        raise InputError(f"{judgments}: not one rating of {model}")

    by_category = {category: [] for category in (*CATEGORIES, "other")}
    for row in rated:
        by_category[category_of(row["question_id"])].append(row)

    return {
        "model": model,
        "judge": only_judge(rows, judge_of, judgments),
        **served_scores([row for _, row in rows], judgments),
        "date": last_day(rows),
        "n": len(rated),
        "invalid": len(rows) - len(rated),
        "missing": max(0, N_RATINGS - len(rows)),
        "score": mean_score(rated),
        "turn_1": mean_score([row for row in rated if row["turn"] == 1]),
        "turn_2": mean_score([row for row in rated if row["turn"] == 2]),
        "categories": {name: mean_score(some) for name, some in by_category.items() if some},
    }


# ---- judge ----


def judge(ask, bench_data, answers, baseline, judge_model):
    """Ratings of both turns of each answer; math, reasoning, coding beside a reference answer.

    The reference answers are the judge's own where there are any. MT-Bench has no baseline.
    """
    templates = read_templates(bench_data)
    references = read_references(bench_data, judge_model)
    ours, model = read_answers(answers)

    # a record and a question to the judge for each turn of each question that has an answer
    rows = []
    questions = []
    for where, question in read_questions(bench_data):
        key = question["question_id"]
        if key not in ours:
            continue
        texts = ours[key].texts
        check_question(question, where, texts, answers, references)
        prompts = prompts_of(question, texts, references, templates)
        for turn, (name, messages) in enumerate(prompts, 1):
            rows.append(
                {
                    "question_id": key,
                    "model": model,
                    "judge": [judge_model, name],
                    "user_prompt": messages[1]["content"],
                    "turn": turn,
                }
            )
            questions.append(
                {
                    "messages": messages,
                    "temperature": 0.0,
                    "max_tokens": 2048,
                    "about": [key, turn],
                }
            )
    if not rows:
        raise InputError(f"{answers}: answers none of MT-Bench's questions")

    # the replies come in the order of the questions
    for row, reply in zip(rows, ask(questions)):
        row["judgment"] = reply["reply"]
        row["score"] = rating_of(without_thought(reply["reply"]))
        row["tstamp"] = time.time()
        row |= served_fields(reply)
    return rows


def check_question(question, where, texts, answers, references):
    """Raise InputError for a turn without an answer, or a question without its reference answer.

    texts: the answers to its turns; where, answers: its line and their file, for messages.
    """
    key = question["question_id"]
    if len(texts) != len(question["turns"]):
        raise InputError(
            f"{answers}: {len(texts)} answers to the {len(question['turns'])} turns of "
            f"question {key}"
        )
    if question["category"] in REFERRED and key not in references:
        raise InputError(f"{where}: its reference answer is missing in reference_answer/")


def read_questions(bench_data):
    """The (where, record) pairs of the benchmark's questions."""
    path = find_bench_file(bench_data, "question.jsonl", REPOSITORY)
    return read_records(path, "question_id", "category", "turns")


def read_templates(bench_data):
    """{name: record} of what the official code asks a judge."""
    path = find_bench_file(bench_data, "judge_prompts.jsonl", REPOSITORY)
    records = read_records(path, "name", "prompt_template", "system_prompt")
    return {row["name"]: row for _, row in records}


def read_references(bench_data, judge_model):
    """{question id: Answer} of the judge's own reference answers, else of GPT-4's."""
    pattern = os.path.join("reference_answer", glob.escape(judge_model) + ".jsonl")
    if not files_below(bench_data, pattern):
        pattern = "reference_answer/gpt-4.jsonl"
    references, _ = read_answers(find_bench_file(bench_data, pattern, REPOSITORY))
    return references


def prompts_of(question, texts, references, templates):
    """[(name of the judge's template, messages to the judge)] of each turn of a question."""
    is_referred = question["category"] in REFERRED

    # placeholders have no number in a template of the first turn, and numbers in the others
    fields = {"question": question["turns"][0], "answer": texts[0]}
    fields |= numbered_fields("question", question["turns"])
    fields |= numbered_fields("answer", texts)
    if is_referred:
        fields |= numbered_fields("ref_answer", references[question["question_id"]].texts)

    prompts = []
    for turn in range(1, len(texts) + 1):
        template = templates[template_name(is_referred, turn)]
        messages = [
            {"role": "system", "content": template["system_prompt"]},
            {"role": "user", "content": template["prompt_template"].format(**fields)},
        ]
        prompts.append((template["name"], messages))
    return prompts


def numbered_fields(field, texts):
    """{field_1: the first text, field_2: the second, ...}"""
    return {f"{field}_{n}": text for n, text in enumerate(texts, 1)}


def template_name(is_referred, turn):
    """The official name of the judge's template, such as single-math-v1-multi-turn."""
    name = "single"
    if is_referred:
        name += "-math"
    name += "-v1"
    if turn > 1:
        name += "-multi-turn"
    return name


def rating_of(reply):
    """The first [[rating]], else the first [rating]; -1 without one."""
    for pattern in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]"):
        rating = re.search(pattern, reply)
        if rating:
            return float(rating[1])
    return -1
