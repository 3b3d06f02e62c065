"""Arena-Hard, v0.1 and v2.0: two games a question against a baseline (2406.11939)."""

import collections
import re
import time

import numpy as np

from nanoaipo.benchmarks.answers import (
    check_no_duplicates,
    find_bench_file,
    last_day,
    only_judge,
    read_answers,
    select_model,
)
from nanoaipo.errors import InputError
from nanoaipo.files import read_records
from nanoaipo.served import served_fields, served_scores
from nanoaipo.thoughts import split_thought

REPOSITORY = "lm-sys/arena-hard-auto"
SUFFIX = ".jsonl"  # of a judgments file

# verdict: what A wins of a game, and the weight of the game; v2.0 reads those of the second table
# too. A strong verdict weighs 3.
# fmt: off
VERDICTS = {"A>>B": (1, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}
MIRRORED = {"B<<A": (1, 3), "B<A": (1, 1), "B=A": (0.5, 1), "A<B": (0, 1), "A<<B": (0, 3)}
# fmt: on
WINNERS = {"model_a": (0, 1), "model_b": (1, 1), "tie": (0.5, 1)}  # of battles: the model is B
GO_ON = "continue your judgment and finish by outputting a final verdict label"


def key_of(row):
    """What a question is known by: question_id in v0.1, uid in v2.0."""
    return row.get("question_id", row.get("uid"))


# ---- score ----


def score(judgments, model, *, answers="", resamples=1000, **_):
    """Win rate against the baseline, its 95 % interval by a bootstrap over questions; mean tokens.

    As every game is against the baseline, the Bradley-Terry win probability is the weighted share
    of games won. v0.1 leaves out a game without a verdict, v2.0 the whole question. A battles file
    has the games one by one. model: whose judgments, where the file has several; answers: its
    answers file, for the tokens. Raises InputError.
    """
    rows = list(read_records(judgments))
    battles = len(rows) > 0 and "winner" in rows[0][1]
    model_field = "model_b" if battles else "model"
    rows, model = select_model(rows, lambda r: r[model_field], judgments, model)
    if battles:  # a question has several of them, and none names its judge
        judge_name = "unknown (a battles file does not say)"
        games = []
    else:
        judge_name = only_judge(rows, lambda r: r["judge"], judgments)
        check_no_duplicates(rows, key_of)
        games = [game for _, row in rows for game in row["games"] if game]

    won, category, invalid = tally(rows)
    if not won:
        raise InputError(f"{judgments}: not one verdict on {model}")

    scores = {
        "model": model,
        "judge": judge_name,
        **served_scores(games, judgments),
        "date": last_day(rows),
        "invalid": invalid,
        **win_rate(list(won.values()), resamples),
        "avg_tokens": mean_tokens(answers),
    }
    # v2.0 has two categories, hard prompts and creative writing
    names = sorted(set(category.values()))
    if len(names) > 1:
        scores["categories"] = {}
        for name in names:
            some = [won[key] for key in won if category[key] == name]
            scores["categories"][name] = win_rate(some, resamples)
    return scores


def tally(rows):
    """({key: [won, weight]}, {key: category}, number of games without a verdict) of the questions.

    won: what the model has won of the summed weight of a question's games.
    """
    won = collections.defaultdict(lambda: np.zeros(2))
    category = {}
    invalid = 0
    for _, row in rows:
        games = games_of(row)
        invalid += games.count(None)
        if "uid" in row and None in games:  # v2.0
            continue
        for game in games:
            if game is None:
                continue
            share, weight = game
            won[key_of(row)] += share * weight, weight
            category[key_of(row)] = row.get("category", "all")
    return won, category, invalid


def mean_tokens(answers):
    """Mean tokens of the answers in a file, None without a file or where it does not say."""
    if not answers:
        return None
    lengths = [answer.tokens for answer in read_answers(answers)[0].values()]
    if None in lengths:
        return None
    return int(np.mean(lengths))


def games_of(row):
    """[(share that the model wins, weight), or None without a verdict] of a record's games."""
    if "winner" in row:  # of a battles file, such as "tie (bothbad)"
        return [WINNERS.get(row["winner"].partition(" ")[0])]

    verdicts = VERDICTS
    if "uid" in row:  # v2.0
        verdicts = VERDICTS | MIRRORED
    first, second = row["games"]  # a game that was not judged may be null
    first = verdicts.get((first or {}).get("score"))
    second = verdicts.get((second or {}).get("score"))
    if first is not None:  # game 1 shows the baseline as A
        share, weight = first
        first = 1 - share, weight
    return [first, second]


def win_rate(counts, resamples):
    """Questions, win rate and its interval, of [won, weight] of each question."""
    counts = np.array(counts)  # (Q, 2)

    # the games of a question hang together, so questions are drawn
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(counts), size=(resamples, len(counts)))  # (resamples, Q)
    sums = counts[chosen].sum(1)  # (resamples, 2)
    ci = 100 * np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return {
        "n": len(counts),
        "win_rate": 100 * counts[:, 0].sum() / counts[:, 1].sum(),
        "ci": ci.tolist(),
    }


# ---- judge ----


def judge(ask, bench_data, answers, baseline, judge_model):
    """Records of two games a question: game 1 shows the baseline as A, game 2 the model.

    A judge that gives no verdict is asked once to go on and finish with one.
    """
    settings = read_judge_config(bench_data)
    if not baseline:
        raise InputError(
            "--baseline is not set: the answers file of the model to compare with "
            "(v0.1: model_answer/gpt-4-0314.jsonl)"
        )
    ours, model = read_answers(answers)
    theirs, baseline_name = read_answers(baseline)

    questions = read_questions(bench_data, ours)
    if not questions:
        raise InputError(f"{answers}: answers none of Arena-Hard's questions")
    missing = [key for key in questions if key not in theirs]
    if missing:
        raise InputError(
            f"{baseline}: no answer to {len(missing)} of the questions, such as '{missing[0]}'"
        )

    # two games a question, one after the other
    games = []
    for key, question in questions.items():
        their_text = theirs[key].texts[0]
        our_text = ours[key].texts[0]
        for number, a, b in ((1, their_text, our_text), (2, our_text, their_text)):
            messages = fill_template(settings, first_turn(question), a, b)
            games.append({"about": [key, number], "messages": messages})
    play(games, ask, settings)

    # games 2k and 2k + 1 are those of question k
    fields = {
        "model": model,
        "judge": judge_model,
        "baseline": baseline_name,
        "tstamp": time.time(),
    }
    rows = []
    for k, (key, question) in enumerate(questions.items()):
        rows.append(record_of(key, question, fields, games[2 * k : 2 * k + 2]))
    return rows


def read_judge_config(bench_data):
    """The judge's system_prompt, prompt_template (a text), temperature and max_tokens.

    They stand in judge_config.yaml, which the repository had until v2.0 put them into code.
    """
    import yaml

    origin = f"{REPOSITORY} (its tree of September 2024)"
    path = find_bench_file(bench_data, "*judge_config*.y*ml", origin)
    with open(path, encoding="utf-8") as f:
        settings = yaml.safe_load(f)
    for field in ("system_prompt", "prompt_template", "temperature", "max_tokens"):
        if field not in settings:
            raise InputError(f"{path}: '{field}' is missing")
    if not isinstance(settings["prompt_template"], str):
        settings["prompt_template"] = settings["prompt_template"][0]
    return settings


def read_questions(bench_data, answers):
    """{key: record} of the benchmark's questions that have an answer, in its order."""
    path = find_bench_file(bench_data, "question.jsonl", REPOSITORY)
    questions = {key_of(row): row for _, row in read_records(path)}
    return {key: question for key, question in questions.items() if key in answers}


def first_turn(question):
    """The text of a question: v2.0 has it as `prompt`, v0.1 as a turn, which may be an object."""
    turn = question.get("prompt") or question["turns"][0]
    if isinstance(turn, str):
        return turn
    return turn["content"]


def fill_template(settings, question, a, b):
    """Messages to the judge of one game, for a template with v0.1's placeholders or v2.0's."""
    text = settings["prompt_template"].format(
        question_1=question,
        answer_1=a,
        answer_2=b,
        QUESTION=question,
        ANSWER_A=a,
        ANSWER_B=b,
    )
    return [
        {"role": "system", "content": settings["system_prompt"]},
        {"role": "user", "content": text},
    ]


def play(games, ask, settings):
    """Put the judge's reply into each game as `judgment`, and a second one if it has no verdict.

    answer: the same without thoughts, which may quote verdicts. served: who gave it.
    """

    def replies_to(some):
        questions = [
            {
                "messages": game["messages"],
                "temperature": float(settings["temperature"]),
                "max_tokens": settings["max_tokens"],
                "about": game["about"],
            }
            for game in some
        ]
        return ask(questions)

    # all games at once
    for game, reply in zip(games, replies_to(games)):
        game["judgment"] = reply["reply"]
        _, game["answer"] = split_thought(reply["reply"])
        game["served"] = served_fields(reply)

    # then once more those that ended without a verdict; an empty reply was refused
    silent = []
    for game in games:
        if game["judgment"] and not re.search(r"\[\[[AB<>=]+\]\]", game["answer"]):
            silent.append(game)
            game["messages"].append({"role": "assistant", "content": game["judgment"]})
            game["messages"].append({"role": "user", "content": GO_ON})
    if silent:
        for game, reply in zip(silent, replies_to(silent)):
            game["judgment"] += "\n" + reply["reply"]
            game["answer"] += "\n" + split_thought(reply["reply"])[1]
            game["served"] |= served_fields(reply)


def record_of(key, question, fields, games):
    """A record of the judgments file, of one question's games, with the fields all records have."""
    is_v2 = "uid" in question
    row = {"question_id": key}
    if is_v2:
        row = {"uid": key, "category": question["category"]}
    row |= fields
    row["games"] = []
    for game in games:
        verdict = verdict_of(game["answer"], is_v2)
        text = game["messages"][1]["content"]
        played = {"user_prompt": text, "judgment": game["judgment"], "score": verdict}
        row["games"].append(played | game["served"])
    return row


def verdict_of(reply, is_v2):
    """The [[verdict]] of a reply, or None.

    v0.1 wants one distinct verdict. v2.0 takes the last, in lower case or single brackets too.
    """
    # as the official code of each version has it
    if is_v2:
        reply = reply.upper()
    verdicts = re.findall(r"\[\[([AB<>=]+)\]\]", reply)
    if is_v2 and not verdicts:
        verdicts = re.findall(r"\[([AB<>=]+)\]", reply)
    if not verdicts:
        return None
    if not is_v2 and len(set(verdicts)) > 1:
        return None
    return verdicts[-1]
