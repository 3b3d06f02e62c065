"""Intervals, variety of answers, and the win rate at equal length."""

import collections
import math
import re

import numpy as np

LENGTH_ALARM = 1.5  # answers this many times as long as the baseline's raise the length alarm
Z_95 = 1.96  # half a 95 % interval, in standard errors
PENALTY_C = 10 ** (4 / 9)  # inverse strength of L1, the one AlpacaEval's leaderboard mostly has
SMOOTHING = 1e-4  # |beta| is computed as sqrt(beta^2 + SMOOTHING), which has a derivative at 0


def standard_error(values):
    """Standard error of the mean of (N,) values; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    return values.std(ddof=1) / np.sqrt(len(values))


def interval(values):
    """Mean of (N,) values and its 95 % interval [low, high]; (None, None) without values."""
    if len(values) == 0:
        return None, None
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    half = Z_95 * float(standard_error(values))
    return mean, [mean - half, mean + half]


def wilson_interval(share, n, z=Z_95):
    """Wilson's interval of a share among n votes, 95 % by default; n = 0 counts as one vote."""
    n = max(n, 1)
    center = share + z * z / 2 / n
    reach = z * math.sqrt((share * (1 - share) + z * z / 4 / n) / n)
    scale = 1 + z * z / n
    return [(center - reach) / scale, (center + reach) / scale]


# ---- variety ----


def distinct_2(words):
    """Share of distinct pairs of words among all pairs in the answers, and half its interval.

    words: N lists of at least two words, one per answer. The interval is the jackknife's.
    """
    pairs = [collections.Counter(zip(w, w[1:])) for w in words]
    total = collections.Counter()
    for counter in pairs:
        total.update(counter)

    # distinct-2 without answer i, whose own pairs are those that no other answer has
    own = []
    for counter in pairs:
        own.append(sum(total[pair] == n for pair, n in counter.items()))
    size = np.array([counter.total() for counter in pairs])
    without = (len(total) - np.array(own)) / (size.sum() - size)  # (N,)

    half = Z_95 * np.sqrt((len(words) - 1) * without.var())
    return len(total) / size.sum(), half


def self_similarity(words):
    """Mean cosine of TF-IDF between two answers, and half its interval.

    words: N lists of words, one per answer. The interval comes from each answer's own mean.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\w+")
    vectors = vectorizer.fit_transform([" ".join(w) for w in words])  # (N, V), of length 1
    n = len(words)
    to_all = vectors @ np.asarray(vectors.sum(0)).ravel()  # (N,)
    to_others = (to_all - 1) / (n - 1)  # 1 is the cosine to itself

    # a pair of answers is in two of these means, hence the 2
    half = 2 * Z_95 * to_others.std(ddof=1) / np.sqrt(n)
    return to_others.mean(), half


def variety(texts):
    """Distinct-2 and self-similarity of answers with their 95 % intervals, as a dict of scores.

    Answers of fewer than two words are left out. {} when fewer than two answers remain.
    """
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    words = [w for w in words if len(w) > 1]
    if len(words) < 2:
        return {}
    scores = {}
    for name, measure in (("distinct_2", distinct_2), ("self_similarity", self_similarity)):
        value, half = measure(words)
        scores[name] = float(value)
        scores[name + "_ci"] = [float(value - half), float(value + half)]
    return scores


# ---- length-controlled win rate ----


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def fit_logistic(features, targets, weights):
    """Coefficients (K,) of a logistic regression with the leaderboard's L1 penalty, by Newton.

    features (R, K); targets (R,) in [0, 1], fractions included; weights (R,). scikit-learn's
    liblinear finds the same to four digits in five times the time, but when every game is lost it
    takes them for won: it drops rows of weight 0, and with them a class.
    """
    beta = np.zeros(features.shape[1])
    for _ in range(200):
        p = sigmoid(features @ beta)  # (R,)
        magnitude = np.sqrt(beta**2 + SMOOTHING)  # (K,), |beta|
        gradient = features.T @ (weights * (targets - p)) - beta / magnitude / PENALTY_C  # (K,)
        curvature = (features.T * (weights * p * (1 - p))) @ features  # (K, K)
        curvature += np.diag(SMOOTHING / magnitude**3 / PENALTY_C)
        step = np.linalg.solve(curvature, gradient)
        beta += step / max(1, abs(step).max())  # far from the optimum no coefficient moves beyond 1
        if abs(step).max() < 1e-9:
            break
    return beta


def length_controlled(difference, won, others, extra=None):
    """Win probabilities (N,) if both answers had one length: length-controlled AlpacaEval's model.

    p = sigmoid(a tanh(difference / sd) + others b) is fitted, then a is set to 0 (2404.04475).
    difference (N,): characters or tokens, baseline minus model; won (N,): in [0, 1], nan is left
    out of the fit; others (N, K): further columns, of which one is 1. extra: features (R, 1 + K),
    targets (R,) and weights (R,) of rows that regularise the fit.
    """
    # the length difference in a range of -1 to 1, beside the other columns
    sd = 0
    if len(difference) > 1:
        sd = difference.std(ddof=1)
    if sd == 0:
        sd = 1  # one length for all: the column is constant, whatever the scale
    features = np.column_stack([np.tanh(difference / sd), others])  # (N, 1 + K)

    # fit to what was judged, and to the rows that regularise
    judged = ~np.isnan(won)
    features = features[judged]
    targets = won[judged]
    weights = np.ones(len(targets))
    if extra is not None:
        extra_features, extra_targets, extra_weights = extra
        features = np.vstack([features, extra_features])
        targets = np.append(targets, extra_targets)
        weights = np.append(weights, extra_weights)

    # the column of lengths left out, both answers have one length
    beta = fit_logistic(features, targets, weights)
    return sigmoid(others @ beta[1:])


def length_controlled_interval(difference, won, resamples=400):
    """Length-controlled win rate in percent and its 95 % interval, by a bootstrap over prompts.

    difference and won as in length_controlled. The model has an intercept only, so all prompts have
    one p.
    """
    n = len(won)

    def rate_among(chosen):
        return length_controlled(difference[chosen], won[chosen], np.ones((n, 1)))[0]

    rng = np.random.default_rng(0)
    rates = [rate_among(rng.integers(n, size=n)) for _ in range(resamples)]
    rate = 100 * float(rate_among(np.arange(n)))
    return rate, (100 * np.percentile(rates, [2.5, 97.5])).tolist()
