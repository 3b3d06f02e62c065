"""MT-Bench: single-answer grading of two turns.
"""
import glob
import os
import re
import sys
import time

from nanoaipo.benchmarks.answers import answers_of, find, judged_at, once, one_judge, one_model
from nanoaipo.files import read_records

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")   # MT-Bench: ten questions each, from 81
REFERRED = ("math", "reasoning", "coding")                              # judged beside a reference answer


def category_of(question):
    return CATEGORIES[(question - 81) // 10] if isinstance(question, int) and 81 <= question <= 160 else "other"


def score_mt_bench(judgments, name, answers, tables):
    """Mean of all ratings (1 to 10) of single-answer grading, by turn and by category; -1, a reply without a rating, is invalid."""
    rows = list(read_records(judgments, "question_id", "model", "judge", "score", "turn"))
    rows, name = one_model(rows, lambda r: r["model"], judgments, name)
    once(rows, lambda r: f"question {r['question_id']}, turn {r['turn']}")
    rated = [r for _, r in rows if r["score"] is not None and r["score"] >= 0] or sys.exit(f"{judgments}: not one rating of {name}")
    judge = one_judge(rows, lambda r: r["judge"] if isinstance(r["judge"], str) else r["judge"][0], judgments)
    categories = sorted({category_of(r["question_id"]) for r in rated}, key=[*CATEGORIES, "other"].index)

    def mean(which):
        kept = [r["score"] for r in rated if which(r)]
        return sum(kept) / len(kept) if kept else None

    return {"model": name, "judge": judge, "date": judged_at(rows),
            "n": len(rated), "invalid": len(rows) - len(rated), "missing": max(0, 160 - len(rows)),
            "score": mean(lambda r: True), "turn_1": mean(lambda r: r["turn"] == 1), "turn_2": mean(lambda r: r["turn"] == 2),
            "categories": {c: mean(lambda r: category_of(r["question_id"]) == c) for c in categories}}


def judge_mt_bench(folder, answers, baseline, judge, asked):
    """Single-answer grading of both turns; math, reasoning and coding beside a reference answer (the judge's own where there is one)."""
    prompts = find(folder, "judge_prompts.jsonl", "lm-sys/FastChat")
    templates = {row["name"]: row for _, row in read_records(prompts, "name", "prompt_template", "system_prompt")}
    own = os.path.join("reference_answer", glob.escape(judge) + ".jsonl")
    there = glob.glob(os.path.join(glob.escape(folder), "**", own), recursive=True)
    references, _ = answers_of(find(folder, own if there else "reference_answer/gpt-4.jsonl", "lm-sys/FastChat"))
    ours, name = answers_of(answers)
    rows, questions = [], []
    for place, question in read_records(find(folder, "question.jsonl", "lm-sys/FastChat"), "question_id", "category", "turns"):
        key, asks = question["question_id"], question["turns"]
        if key not in ours:
            continue
        given, referred = ours[key][0], question["category"] in REFERRED
        len(given) == len(asks) or sys.exit(f"{answers}: {len(given)} answers to the {len(asks)} turns of question {key}")
        not referred or key in references or sys.exit(f"{place}: its reference answer is missing in reference_answer/")
        fields = {"question": asks[0], "answer": given[0]}
        for kind, texts_of in (("question", asks), ("answer", given), ("ref_answer", references[key][0] if referred else ())):
            fields |= {f"{kind}_{n}": text for n, text in enumerate(texts_of, 1)}
        for turn in range(1, len(asks) + 1):
            template = templates["single" + "-math" * referred + "-v1" + "-multi-turn" * (turn > 1)]
            text = template["prompt_template"].format(**fields)
            rows.append({"question_id": key, "model": name, "judge": [judge, template["name"]], "user_prompt": text, "turn": turn})
            questions.append({"messages": [{"role": "system", "content": template["system_prompt"]}, {"role": "user", "content": text}],
                              "temperature": 0.0, "max_tokens": 2048, "about": [key, turn]})
    rows or sys.exit(f"{answers}: answers none of MT-Bench's questions")
    replies = [reply["reply"] for reply in asked(questions)]
    return [row | {"judgment": reply, "score": rating_of(reply), "tstamp": time.time()} for row, reply in zip(rows, replies)]


def rating_of(reply):
    """The first [[rating]], else the first [rating]; -1 without one."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply) or re.search(r"\[(\d+\.?\d*)\]", reply)
    return float(found[1]) if found else -1
