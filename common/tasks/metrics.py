"""How good a model is, from counts alone: histograms of scores, confusion tables, moments, exits.

Source: Hanley and McNeil 1982 (AUROC as a share of pairs); Brier 1950; Naeini et al., AAAI 2015 (expected
calibration error); Harrell et al. 1982 (C-index); definitions as scikit-learn's. Rules: numpy only; what
is a product of sums takes noisy counts as they are, for cutting them at zero would move it; what needs shares
cuts them; what cannot be computed is NaN; scores are in [0, 1] in equal
bins, so that a curve is that of scores rounded to a bin.
"""

import math
from typing import Final

import numpy as np

from common.tasks.estimates import Counts

THRESHOLDS: Final = (0.1, 0.2, 0.3, 0.5, 0.7)


def binary(counts: Counts) -> dict[str, float]:
    """AUROC, average precision, Brier score, calibration of scores [2, bins]: negatives, positives."""
    negatives, positives = counts
    n, p = float(negatives.sum()), float(positives.sum())
    if n < 1 or p < 1:
        return dict.fromkeys(("auroc", "auprc", "brier", "accuracy", "ece", "slope", "prevalence"), math.nan)
    bins = len(positives)
    middle = (np.arange(bins) + 0.5) / bins
    below = np.cumsum(negatives) - negatives
    area = float((positives * (below + negatives / 2)).sum() / (n * p))
    # From the highest score down: precision at each step, weighted by the recall it adds.
    least = np.maximum(positives, 0.0), np.maximum(negatives, 0.0)
    hits, alarms = np.cumsum(least[0][::-1]), np.cumsum((least[0] + least[1])[::-1])
    precision = np.divide(hits, alarms, out=np.zeros(bins), where=alarms > 0)
    squared = (negatives * middle**2 + positives * (1 - middle) ** 2).sum() / (n + p)
    high = middle > 0.5
    right = negatives[~high].sum() + positives[high].sum()
    return {
        "auroc": area,
        "auprc": float((precision * least[0][::-1]).sum() / max(1.0, least[0].sum())),
        "brier": float(squared),
        "accuracy": float(right / (n + p)),
        "ece": float(np.abs(positives - middle * (positives + negatives)).sum() / (n + p)),
        "slope": _slope(least[1], least[0], middle),
        "prevalence": p / (n + p),
    }


def thresholds(counts: Counts) -> dict[str, float]:
    """Sensitivity, specificity and predictive value of calling everybody from a score on; [2, bins]."""
    negatives, positives = counts
    found: dict[str, float] = {}
    for threshold in THRESHOLDS:
        start = round(threshold * len(positives))
        hits, alarms = float(positives[start:].sum()), float(negatives[start:].sum())
        found[f"sensitivity at {threshold:g}"] = _ratio(hits, float(positives.sum()))
        found[f"specificity at {threshold:g}"] = 1.0 - _ratio(alarms, float(negatives.sum()))
        found[f"predictive value at {threshold:g}"] = _ratio(hits, hits + alarms)
    return found


def calibration(counts: Counts) -> dict[str, float]:
    """The observed share of positives in each bin of the score; [2, bins]."""
    negatives, positives = np.maximum(counts, 0.0)
    shares = (_ratio(float(p), float(n + p)) for n, p in zip(negatives, positives, strict=True))
    return {f"bin {at}": share for at, share in enumerate(shares)}


def multiclass(confusion: Counts) -> dict[str, float]:
    """Accuracy, balanced accuracy and macro F1 of a confusion table [true class, said class]."""
    table = np.maximum(confusion, 0.0)
    right, true, said = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    recall = np.divide(right, true, out=np.full(len(true), np.nan), where=true > 0)
    scores = np.divide(2 * right, true + said, out=np.zeros(len(true)), where=true + said > 0)
    return {
        "accuracy": _ratio(float(right.sum()), float(table.sum())),
        "balanced accuracy": float(np.nanmean(recall)) if (true > 0).any() else math.nan,
        "macro f1": float(scores[true + said > 0].mean()) if (true + said > 0).any() else math.nan,
    }


def regression(moments: Counts) -> dict[str, float]:
    """Mean absolute error, root mean square, bias and R2 in units of the scaled range [-1, 1].

    ``moments`` are the sums of 1, e, |e|, e^2, y, y^2 with e half the error.
    """
    count, errors, sizes, squares, values, value_squares = map(float, moments)
    if count < 1:
        return dict.fromkeys(("mae", "rmse", "bias", "r2"), math.nan)
    variance = value_squares / count - (values / count) ** 2
    return {
        "mae": 2 * max(0.0, sizes) / count,
        "rmse": 2 * math.sqrt(max(0.0, squares) / count),
        "bias": 2 * errors / count,
        "r2": 1.0 - 4 * max(0.0, squares) / count / variance if variance > 0 else math.nan,
    }


def sequence(sums: Counts, names: tuple[str, str]) -> dict[str, float]:
    """Two mean shares, from the sums of 1 and of each."""
    return {name: _ratio(float(total), float(sums[0])) for name, total in zip(names, sums[1:], strict=True)}


def anomaly(counts: Counts) -> dict[str, float]:
    """The mean of a bounded error u in [0, 1), and its AUROC for the last class; [classes, bins]."""
    table = counts
    bins = table.shape[1]
    middle = (np.arange(bins) + 0.5) / bins
    found = {"bounded error": _ratio(float((table * middle).sum()), float(table.sum()))}
    if len(table) == 2:
        found["auroc"] = binary(table)["auroc"]
    return found


def concordance(counts: Counts) -> dict[str, float]:
    """Harrell's C of risks in bins [bins, intervals, 2], censored and events; a tied risk counts half.

    A pair is comparable where one has its event in an earlier interval, or the other is censored in the same.
    """
    table = counts
    intervals = table.shape[1]
    right = pairs = 0.0
    total = table.sum(axis=2)
    for at in range(intervals):
        events = table[:, at, 1]
        later = total[:, at + 1 :].sum(axis=1) + table[:, at, 0]
        lower = np.cumsum(later) - later
        right += float((events * (lower + later / 2)).sum())
        pairs += float(events.sum() * later.sum())
    return {"c-index": _ratio(right, pairs)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _slope(negatives: Counts, positives: Counts, middle: Counts) -> float:
    """The slope of a logistic regression of the outcome on the score's logit, by Newton; 1 is ideal."""
    logits = np.log(middle / (1 - middle))
    weights, design = negatives + positives, np.stack([np.ones_like(logits), logits], axis=1)
    beta = np.array([0.0, 1.0])
    for _ in range(25):
        shares = 1 / (1 + np.exp(-np.clip(design @ beta, -30, 30)))
        gradient = design.T @ (positives - weights * shares)
        curvature = (design * (weights * shares * (1 - shares))[:, None]).T @ design
        try:
            step = np.linalg.solve(curvature, gradient)
        except np.linalg.LinAlgError:
            return math.nan
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            return float(beta[1])
    return math.nan
