"""Style control: what an Arena-Hard win rate is when the judge's taste in style is taken out.

    model, styles = read_styles("answers.jsonl", is_v2=False)
    difference = style_difference(styles["q1"], styles_of_the_baseline["q1"], is_v2=False)
    scores = controlled_win_rate([Battle(model, "q1", 1.5, 2, difference), ...], model)

A judge tends to like long answers with headings, lists and bold words. For all models of a pool
at once,

    logit P(model wins a battle) = strength of the model + coefficients * style differences

is fitted, and a model's score is the sigmoid of its strength. The differences, of its answer from
the baseline's, are standardised over all battles of the pool. So a score belongs to a pool: with
other models in it, it is another one. The method is the official code's (show_result.py of
lmarena/arena-hard-auto).
"""

import collections
import os

import numpy as np

from nanoaipo.benchmarks.answers import files_below, read_answers
from nanoaipo.benchmarks.official_files import load_encoding, markdown_style
from nanoaipo.errors import InputError
from nanoaipo.files import read_records
from nanoaipo.stages import hash_files
from nanoaipo.stats import sigmoid

# v0.1's official penalty, of scikit-learn on doubled battles, on the scale of logits. It is too
# weak to move a score, but a model that lost every battle has one.
RIDGE = 0.5 / np.log(10) ** 2

PoolFiles = collections.namedtuple("PoolFiles", "answers judgments")

# a model's games on a question: what it won of their summed weight; difference (4,)
Battle = collections.namedtuple("Battle", "model key won weight difference")

# ---- the pool's files ----


def pool_files(pool):
    """Paths of the answers and the judgments anywhere below a folder; their first records tell."""
    if not os.path.isdir(pool):
        raise InputError(f"--pool={pool}: no such folder")
    files = PoolFiles([], [])
    for path in sorted(files_below(pool, "*.jsonl") + files_below(pool, "*.jsonl.gz")):
        _, first = next(read_records(path), ("", {}))
        if "choices" in first or "messages" in first:
            files.answers.append(path)
        elif "games" in first or "winner" in first:
            files.judgments.append(path)
    return files


def pool_hash(pool):
    """SHA-256 of the pool's answers and judgments, their names below the folder included."""
    files = pool_files(pool)
    return hash_files(files.answers + files.judgments, root=pool)


# ---- style ----


def read_styles(path, is_v2):
    """(Model, {key: style}) of an answers file; style_of says what a style is."""
    answers, model = read_answers(path)

    # some files have the wrong count, which moves a score by tens of points
    n_tokens = [answer.tokens for answer in answers.values()]
    n_characters = [len(answer.texts[0]) for answer in answers.values()]
    if n_tokens == n_characters and sum(n_characters) > 1000:
        raise InputError(f"{path}: token_len counts characters; it has to count tokens")
    return model, {key: style_of(answer, is_v2, path) for key, answer in answers.items()}


def style_of(answer, is_v2, path):
    """Tokens, and headers, lists and bold texts outside code, of an Answer, as (4,) counts."""
    text = answer.texts[0]
    n_tokens = answer.tokens
    if n_tokens is None:
        encoding = load_encoding("o200k_base" if is_v2 else "cl100k_base")
        if encoding is None:
            raise InputError(
                f"{path}: an answer has no token_len, and without tiktoken or its file of "
                "encodings it cannot be counted"
            )
        n_tokens = len(encoding.encode(text, disallowed_special=()))
    counts = [sum(kinds.values()) for kinds in markdown_style(text).values()]
    return np.array([n_tokens, *counts], dtype=float)


def style_difference(ours, theirs, is_v2):
    """How our style differs from theirs, each between -1 and 1, as (4,).

    (a - b) / (a + b) of tokens, (a - b) / (a + b + 1) of headers, lists and bold. There v2.0 takes
    the counts per token, v0.1 the counts.
    """
    if is_v2:
        ours = markdown_per_token(ours)
        theirs = markdown_per_token(theirs)
    total = ours + theirs + [0, 1, 1, 1]
    total[0] = max(total[0], 1)  # two empty answers do not differ
    return (ours - theirs) / total


def markdown_per_token(style):
    """A style (4,) whose headers, lists and bold texts are divided by its tokens + 1."""
    return np.append(style[:1], style[1:] / (style[0] + 1))


# ---- the fit ----


def controlled_win_rate(battles, model, resamples=100):
    """A model's win rate under style control and its 95 % interval, in percent.

    battles: a Battle for each question of each model in the pool, all against one baseline. The
    interval is a bootstrap over questions; the official code draws battles.
    """
    weight = np.array([battle.weight for battle in battles])  # (N,)
    share = np.array([battle.won for battle in battles]) / weight  # (N,)
    names, features = battle_features(battles, weight)

    # the strength of the model is one of the first M coefficients
    place = names.index(model)
    beta = fit_battles(features, share, weight, np.zeros(len(names) + 4))

    # the battles of a question are drawn together
    keys, question_index = np.unique([str(battle.key) for battle in battles], return_inverse=True)
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(resamples):
        drawn = rng.integers(len(keys), size=len(keys))
        times = np.bincount(drawn, minlength=len(keys))[question_index]  # (N,)
        rates.append(sigmoid(fit_battles(features, share, weight * times, beta)[place]))
    return {
        "sc_win_rate": 100 * float(sigmoid(beta[place])),
        "sc_win_rate_ci": (100 * np.percentile(rates, [2.5, 97.5])).tolist(),
    }


def battle_features(battles, weight):
    """(Names of the M models, features (N, M + 4)): who fights, and how the styles differ."""
    names, model_index = np.unique([battle.model for battle in battles], return_inverse=True)
    one_hot = np.eye(len(names))[model_index]  # (N, M)

    # standardised over single battles, of which a strong verdict is three
    difference = np.array([battle.difference for battle in battles])  # (N, 4)
    mean = np.average(difference, axis=0, weights=weight)  # (4,)
    sd = np.sqrt(np.average((difference - mean) ** 2, axis=0, weights=weight))  # (4,)
    sd[sd == 0] = 1  # a style that all share: the column is 0
    return list(names), np.column_stack([one_hot, (difference - mean) / sd])


def fit_battles(features, share, weight, start):
    """Coefficients (K,) of a logistic regression with the penalty RIDGE / 2 beta^2, by Newton.

    features (N, K); share (N,) won, in [0, 1]; weight (N,); start (K,).
    """
    beta = start
    penalty = RIDGE * np.eye(len(beta))
    for _ in range(100):
        p = sigmoid(features @ beta)  # (N,)
        gradient = features.T @ (weight * (share - p)) - RIDGE * beta  # (K,)
        curvature = (features.T * (weight * p * (1 - p))) @ features + penalty  # (K, K)
        step = np.linalg.solve(curvature, gradient)
        beta = beta + step / max(1, abs(step).max())  # no coefficient moves beyond 1 at once
        if abs(step).max() < 1e-8:
            break
    return beta
