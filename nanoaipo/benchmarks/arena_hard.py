"""Arena-Hard, v0.1 and v2.0: two games a question against a baseline (2406.11939)."""

import ast
import collections
import itertools
import os
import re
import time

import numpy as np

from nanoaipo.benchmarks.answers import (
    check_no_duplicates,
    files_below,
    find_bench_file,
    last_day,
    only_judge,
    read_answers,
    select_model,
)
from nanoaipo.benchmarks.style_control import (
    Battle,
    controlled_win_rate,
    pool_files,
    pool_hash,
    read_styles,
    style_difference,
)
from nanoaipo.errors import InputError
from nanoaipo.files import read_records
from nanoaipo.served import served_fields, served_scores
from nanoaipo.verdicts import without_thought

REPOSITORY = "lmarena/arena-hard-auto"
SUFFIX = ".jsonl"  # of a judgments file

# verdict: what A wins of a game, and the weight of the game; v2.0 reads those of the second table
# too. A strong verdict weighs 3.
# fmt: off
VERDICTS = {"A>>B": (1, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}
MIRRORED = {"B<<A": (1, 3), "B<A": (1, 1), "B=A": (0.5, 1), "A<B": (0, 1), "A<<B": (0, 3)}
# fmt: on
WINNERS = {"model_a": (0, 1), "model_b": (1, 1), "tie": (0.5, 1)}  # of battles: the model is B
NO_JUDGE = "unknown (a battles file does not say)"
GO_ON = "continue your judgment and finish by outputting a final verdict label"

# category: whose answers a model is compared with; a judgment of v0.1 has no category
BASELINES = {
    "all": "gpt-4-0314",
    "arena-hard-v0.1": "gpt-4-0314",
    "hard_prompt": "o3-mini-2025-01-31",
    "creative_writing": "gemini-2.0-flash-001",
}


def question_key(row):
    """What a question is known by: question_id in v0.1, uid in v2.0."""
    return row.get("question_id", row.get("uid"))


def category_of(row):
    """The category of a record's question; v0.1 has but one."""
    return row.get("category", "all")


def model_of(row):
    """The model that a judgment is about; of a battle it is B."""
    if "winner" in row:
        return row["model_b"]
    return row["model"]


def judge_of(row):
    """The judge of a record; a battle does not name it."""
    if "winner" in row:
        return NO_JUDGE
    return row["judge"]


# ---- score ----


def score(judgments, model, *, answers="", baseline="", pool="", resamples=1000, **_):
    """Win rate against the baseline, its 95 % interval by a bootstrap over questions; mean tokens.

    As every game is against the baseline, the Bradley-Terry win probability is the weighted share
    of games won. v0.1 leaves out a game without a verdict, v2.0 the whole question. A battles file
    has the games one by one. Each category of v2.0 has scores of its own. model: whose judgments,
    where the file has several; answers: its answers file, for the tokens. pool: a folder with
    answers and judgments of other models, for the win rate under style control. Raises InputError.
    """
    rows = list(read_records(judgments))
    rows, model = select_model(rows, model_of, judgments, model)
    judge_name = only_judge(rows, judge_of, judgments)
    rows = [(where, without_texts(row)) for where, row in rows]
    if "winner" not in rows[0][1]:  # a question has several battles
        check_no_duplicates(rows, question_key)

    won, _, invalid = tally(rows)
    if not won:
        raise InputError(f"{judgments}: not one verdict on {model}")
    tokens = read_tokens(answers)
    parts = scores_by_category(rows, tokens, resamples)

    if pool:
        by_model = read_pool_judgments(pool, judge_name, model) | {model: rows}
        battles = pool_battles(by_model, model, pool, answers, baseline)
        for name, part in parts.items():
            if part["n"]:
                part.update(controlled_win_rate(battles[name], model))

    scores = {
        "model": model,
        "judge": judge_name,
        **served_scores(judged_games(rows), judgments),
        "date": last_day(rows),
        "invalid": invalid,
    }
    if len(parts) > 1:
        scores["categories"] = parts
        scores["pooled"] = "what follows is of all categories together, which is no published score"
        scores |= win_rate(list(won.values()), resamples)
    else:
        ((name, part),) = parts.items()
        if name != "all":
            scores["category"] = name
        scores |= part
    scores["avg_tokens"] = mean_tokens(tokens.values())
    if pool:
        scores["pool"] = ", ".join(sorted(by_model))
        scores["pool_sha256"] = pool_hash(pool)
    return scores


def scores_by_category(rows, tokens, resamples):
    """{category: invalid games, win rate, mean tokens}; tokens: of each question's answer.

    v2.0 has two categories, hard prompts and creative writing, each with a baseline of its own.
    """
    by_category = collections.defaultdict(list)
    for where, row in rows:
        by_category[category_of(row)].append((where, row))

    parts = {}
    for name, own_rows in sorted(by_category.items()):
        won, _, invalid = tally(own_rows)
        keys = {question_key(row) for _, row in own_rows}
        parts[name] = {
            "invalid": invalid,
            **win_rate(list(won.values()), resamples),
            "avg_tokens": mean_tokens([tokens.get(key) for key in keys]),
        }
    return parts


def tally(rows):
    """({key: [won, weight]}, {key: category}, number of games without a verdict).

    won: what the model has won of the summed weight of a question's games.
    """
    won = collections.defaultdict(lambda: np.zeros(2))
    categories = {}
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
            won[question_key(row)] += share * weight, weight
            categories[question_key(row)] = category_of(row)
    return won, categories, invalid


def read_tokens(answers):
    """{key: tokens, or None where the file does not say} of an answers file; {} without a file."""
    if not answers:
        return {}
    return {key: answer.tokens for key, answer in read_answers(answers)[0].items()}


def mean_tokens(tokens):
    """Mean tokens of answers, None without any or where one of them is unknown."""
    tokens = list(tokens)
    if not tokens or None in tokens:
        return None
    return int(np.mean(tokens))


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


def judged_games(rows):
    """What the judge has said, of all games in the (where, record) pairs; battles say nothing."""
    games = []
    for _, row in rows:
        games += [game for game in row.get("games", ()) if game]
    return games


def without_texts(row):
    """A record without what the judge read and wrote, so that a whole pool fits in memory."""
    if "winner" in row:
        return row
    fields = ("score", "served_model", "system_fingerprint")
    games = []
    for game in row["games"]:
        if game is not None:
            game = {field: game[field] for field in fields if field in game}
        games.append(game)
    return row | {"games": games}


def win_rate(counts, resamples):
    """Questions, win rate and its interval, of [won, weight] of each question; None of none."""
    if not counts:
        return {"n": 0, "win_rate": None, "ci": None}
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


# ---- style control ----


def read_pool_judgments(pool, judge_name, model):
    """{other model: its (where, record) pairs} of what the judge has judged in a folder."""
    by_model = collections.defaultdict(list)
    other_judges = set()
    for path in pool_files(pool).judgments:
        for where, row in read_records(path):
            if model_of(row) == model:  # its judgments are those that are scored
                continue
            if judge_of(row) == judge_name:
                by_model[model_of(row)].append((where, without_texts(row)))
            else:
                other_judges.add(judge_of(row))

    if other_judges and not by_model:
        names = ", ".join(sorted(other_judges))
        raise InputError(
            f"--pool={pool}: no judgments by {judge_name}, but by {names}; judges are never mixed"
        )
    return by_model


def pool_battles(by_model, model, pool, answers, baseline):
    """{category: [Battle]} of all models' records, {model: (where, record) pairs}.

    The styles come from the answers in the pool. answers, baseline: the files of the model that is
    scored and of the baseline, where they are set.
    """
    is_v2 = "uid" in by_model[model][0][1]
    styles = read_pool_styles(pool, model, answers, baseline, is_v2)

    # one served judge for all, as within a file
    served_scores(judged_games(itertools.chain(*by_model.values())), pool)

    # in each category all models have one baseline
    battles = collections.defaultdict(list)
    baselines = {}
    for name, rows in by_model.items():
        for category, other, battle in model_battles(name, rows, styles, pool, is_v2):
            if baselines.setdefault(category, other) != other:
                raise InputError(
                    f"--pool={pool}: {category} is compared with {other} and with "
                    f"{baselines[category]}; a pool has one baseline"
                )
            battles[category].append(battle)
    return battles


def model_battles(name, rows, styles, pool, is_v2):
    """Yield (category, baseline, Battle) of each question that a model was judged on."""
    if "winner" not in rows[0][1]:
        check_no_duplicates(rows, question_key)
    won, categories, _ = tally(rows)
    others = {question_key(row): baseline_of(row) for _, row in rows}
    for key, (share, weight) in won.items():
        other = others[key]
        for side in (name, other):
            if key not in styles.get(side, {}):
                raise InputError(f"--pool={pool}: no answer of {side} to '{key}' in it")
        difference = style_difference(styles[name][key], styles[other][key], is_v2)
        yield categories[key], other, Battle(name, key, share, weight, difference)


def read_pool_styles(pool, model, answers, baseline, is_v2):
    """{model: {key: style}} of the pool's answers, and of these two files where they are set."""
    styles = {}
    for path in pool_files(pool).answers:
        name, of_model = read_styles(path, is_v2)
        if name in styles:
            raise InputError(f"{path}: answers of {name}, which another file of the pool has too")
        styles[name] = of_model
    if baseline:
        name, of_model = read_styles(baseline, is_v2)
        styles[name] = of_model
    if answers:
        _, styles[model] = read_styles(answers, is_v2)
    return styles


def baseline_of(row):
    """The model that a record compares with: as it says, or its category's."""
    return row.get("baseline") or row.get("model_a") or BASELINES[category_of(row)]


# ---- judge ----


def judge(ask, bench_data, answers, baseline, judge_model):
    """Records of two games a question: game 1 shows the baseline as A, game 2 the model.

    The baseline's answers are those beside the questions, each category having its own, or
    `baseline`. v0.1 asks a judge that gives no verdict once to go on and finish with one.
    """
    ours, model = read_answers(answers)
    questions = read_questions(bench_data, ours)
    if not questions:
        raise InputError(f"{answers}: answers none of Arena-Hard's questions")
    settings = {}  # category: the judge's
    theirs = {}  # key: (the baseline's answer, its name)
    for category in {question.get("category") for question in questions.values()}:
        some = {k: q for k, q in questions.items() if q.get("category") == category}
        settings[category] = read_judge_settings(bench_data, next(iter(some.values())))
        theirs |= read_baseline(some, baseline)

    # all games of all questions are played at once
    games = {}  # key: the two of a question
    for key, question in questions.items():
        their_text, _ = theirs[key]
        games[key] = games_to_play(
            key, question, settings[question.get("category")], ours[key].texts[0], their_text
        )
    play(list(itertools.chain(*games.values())), ask)

    rows = []
    for key, question in questions.items():
        fields = {
            "model": model,
            "judge": judge_model,
            "baseline": theirs[key][1],
            "tstamp": time.time(),
        }
        rows.append(record_of(key, question, fields, games[key]))
    return rows


def games_to_play(key, question, settings, ours, theirs):
    """The two games of a question, as play takes them; settings: the judge's."""
    games = []
    for number, a, b in ((1, theirs, ours), (2, ours, theirs)):
        asked = {
            "messages": fill_template(settings, first_turn(question), a, b),
            "temperature": float(settings["temperature"]),
            "max_tokens": settings["max_tokens"],
            "about": [key, number],
        }
        games.append({"asked": asked, "is_v2": "uid" in question})
    return games


def read_judge_settings(bench_data, question):
    """The judge's system_prompt, prompt_template (a text), temperature and max_tokens.

    Of a question with a question_id they stand in judge_config.yaml, which the repository had until
    v2.0. Since then system prompts are code, which is read, never run.
    """
    import yaml

    if "uid" not in question:
        origin = f"{REPOSITORY} (its tree of September 2024)"
        path = find_bench_file(bench_data, "*judge_config*.y*ml", origin)
    else:
        version = "arena-hard-v2.0"
        if question["category"] == "arena-hard-v0.1":
            version = "arena-hard-v0.1"
        path = find_bench_file(bench_data, f"{version}.y*ml", REPOSITORY)
    with open(path, encoding="utf-8") as f:
        settings = yaml.safe_load(f)

    if "uid" in question:
        code = find_bench_file(bench_data, "judge_utils.py", REPOSITORY)
        settings["system_prompt"] = read_system_prompt(code, question["category"])
    for field in ("system_prompt", "prompt_template", "temperature", "max_tokens"):
        if field not in settings:
            raise InputError(f"{path}: '{field}' is missing")
    if not isinstance(settings["prompt_template"], str):
        settings["prompt_template"] = settings["prompt_template"][0]
    return settings


def read_system_prompt(path, category):
    """A category's system_prompt in the table JUDGE_SETTINGS of judge_utils.py.

    The file's top level is names for texts, and the table, which may use such a name for a text.
    """
    with open(path, encoding="utf-8") as f:
        code = f.read()
    assigned = {}
    try:
        for statement in ast.parse(code).body:
            if isinstance(statement, ast.Assign):
                assigned[ast.unparse(statement.targets[0])] = statement.value
        entry = entry_of(assigned["JUDGE_SETTINGS"], category)
        text = entry_of(entry, "system_prompt")
        if isinstance(text, ast.Name):
            text = assigned[text.id]
        return ast.literal_eval(text)
    except (LookupError, AttributeError, SyntaxError, ValueError) as e:
        raise InputError(
            f"{path}: no system_prompt of '{category}' in a table JUDGE_SETTINGS, as {REPOSITORY} "
            "has it"
        ) from e


def entry_of(table, name):
    """The value, not evaluated, of a key of a dict in source code."""
    keys = [ast.literal_eval(key) for key in table.keys]
    return dict(zip(keys, table.values))[name]


def read_questions(bench_data, answers):
    """{key: question} of the benchmark's questions that have an answer, in its order.

    A clone holds the questions of v0.1 and v2.0. Each gets `folder`, where its file lies.
    """
    find_bench_file(bench_data, "question.jsonl", REPOSITORY)
    questions = {}
    for path in sorted(files_below(bench_data, "question.jsonl"), key=lambda p: (len(p), p)):
        folder = os.path.dirname(path)
        for _, row in read_records(path):
            if question_key(row) in answers:
                questions.setdefault(question_key(row), row | {"folder": folder})
    return questions


def read_baseline(questions, path):
    """{key: (the baseline's answer, its name)} to questions of one category.

    path: its answers; when empty, those in model_answer/ beside the questions.
    """
    if not path:
        first = next(iter(questions.values()))
        name = BASELINES.get(first.get("category", "all"))
        path = os.path.join(first["folder"], "model_answer", f"{name}.jsonl")
        if not os.path.exists(path):
            raise InputError(f"--baseline is not set, and the answers of {name} are not in {path}")

    answers, name = read_answers(path)
    missing = [key for key in questions if key not in answers]
    if missing:
        raise InputError(
            f"{path}: no answer to {len(missing)} of the questions, such as '{missing[0]}'"
        )
    return {key: (answers[key].texts[0], name) for key in questions}


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


def play(games, ask):
    """Put the judge's reply into each game as `judgment`; v0.1 asks again where it has no verdict.

    answer: the same without thoughts, which may quote verdicts. served: who gave it.
    """
    # all games at once
    replies = ask([game["asked"] for game in games])
    for game, reply in zip(games, replies):
        game["judgment"] = reply["reply"]
        game["answer"] = without_thought(reply["reply"])
        game["served"] = served_fields(reply)

    # then once more those that ended without a verdict; an empty reply was refused
    silent = []
    for game in games:
        has_verdict = re.search(r"\[\[[AB<>=]+\]\]", game["answer"])
        if game["judgment"] and not has_verdict and not game["is_v2"]:
            silent.append(game)
            messages = game["asked"]["messages"]
            messages.append({"role": "assistant", "content": game["judgment"]})
            messages.append({"role": "user", "content": GO_ON})
    if silent:
        replies = ask([game["asked"] for game in silent])
        for game, reply in zip(silent, replies):
            game["judgment"] += "\n" + reply["reply"]
            game["answer"] += "\n" + without_thought(reply["reply"])
            game["served"] |= served_fields(reply)


def record_of(key, question, fields, games):
    """A record of the judgments file, of one question's games, with the fields all records have."""
    row = {"question_id": key}
    if "uid" in question:
        row = {"uid": key, "category": question["category"]}
    row |= fields
    row["games"] = []
    for game in games:
        messages = game["asked"]["messages"][:2]
        played = {"score": verdict_of(game["answer"], game["is_v2"])}
        if game["is_v2"]:
            played |= {"judgment": {"answer": game["judgment"]}, "prompt": messages}
        else:
            played |= {"user_prompt": messages[1]["content"], "judgment": game["judgment"]}
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
