"""Intervals, and the win rate at equal length.
"""
import numpy as np

LENGTH_ALARM = 1.5                                                      # answers that many times as long as the baseline's are told aloud
PENALTY_C = 10 ** (4 / 9)                                               # inverse strength of L1, the one the leaderboard mostly ends up with


def error_of(values):
    """Standard error of the mean of (N,) values."""
    return values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0


def length_controlled(difference, won, others, extra=None):
    """Win probabilities (N,) were both answers of one length: the logistic model of length-controlled AlpacaEval (2404.04475).

    p = sigmoid(a tanh(difference / sd) + others b), fitted by Newton's method with the leaderboard's L1 penalty, then a = 0.
    difference (N,): characters or tokens, baseline minus model; won (N,): in [0, 1], nan is left out of the fit; others (N, K):
    further columns, of which one is 1. extra: features (R, 1 + K), targets (R,) and weights (R,) of rows that regularise.
    """
    spread = difference.std(ddof=1) if len(difference) > 1 else 0
    valid = ~np.isnan(won)
    features, target = np.column_stack([np.tanh(difference / (spread or 1)), others])[valid], won[valid]
    weight = np.ones(len(target))
    if extra:
        features, target, weight = np.vstack([features, extra[0]]), np.append(target, extra[1]), np.append(weight, extra[2])
    beta = np.zeros(features.shape[1])
    for _ in range(200):
        p, size = 1 / (1 + np.exp(-features @ beta)), np.sqrt(beta ** 2 + 1e-4)          # |beta|, smooth at 0
        gradient = features.T @ (weight * (target - p)) - beta / size / PENALTY_C
        step = np.linalg.solve((features.T * (weight * p * (1 - p))) @ features + np.diag(1e-4 / size ** 3 / PENALTY_C), gradient)
        beta += step / max(1, abs(step).max())
        if abs(step).max() < 1e-9:
            break
    return 1 / (1 + np.exp(-others @ beta[1:]))
