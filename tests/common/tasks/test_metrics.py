"""Metrics from counts against scikit-learn on the rows that were counted."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    roc_auc_score,
)

from common.tasks import metrics

BINS = 20


def scored(seed: int, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores at the middles of bins so that nothing is lost by counting."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    y[:2] = 0, 1
    scores = 1 / (1 + np.exp(-(rng.normal(0, 1.2, n) + 1.3 * y - 0.6)))
    return y, (np.floor(scores * BINS) + 0.5) / BINS


def table(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    counts = np.zeros((2, BINS))
    np.add.at(counts, (y, np.floor(scores * BINS).astype(int)), 1.0)
    return counts


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_binary_metrics_are_scikit_learns(seed: int) -> None:
    y, scores = scored(seed)
    found = metrics.binary(table(y, scores))
    assert found["auroc"] == pytest.approx(roc_auc_score(y, scores))
    assert found["auprc"] == pytest.approx(average_precision_score(y, scores))
    assert found["brier"] == pytest.approx(brier_score_loss(y, scores))
    assert found["accuracy"] == pytest.approx(((scores > 0.5) == y).mean())
    assert found["prevalence"] == pytest.approx(y.mean())


def test_the_slope_is_a_logistic_regressions() -> None:
    y, scores = scored(3)
    logits = np.log(scores / (1 - scores))[:, None]
    expected = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000).fit(logits, y).coef_[0, 0]
    assert metrics.binary(table(y, scores))["slope"] == pytest.approx(expected, rel=1e-4)


def test_calibration_and_thresholds_are_shares() -> None:
    y, scores = scored(5)
    counts = table(y, scores)
    bins = np.floor(scores * BINS).astype(int)
    expected = sum(abs((y[bins == b] - (b + 0.5) / BINS).sum()) for b in range(BINS)) / len(y)
    assert metrics.binary(counts)["ece"] == pytest.approx(expected)
    found = metrics.thresholds(counts)
    said = scores >= 0.3
    assert found["sensitivity at 0.3"] == pytest.approx(said[y == 1].mean())
    assert found["specificity at 0.3"] == pytest.approx((~said[y == 0]).mean())
    assert found["predictive value at 0.3"] == pytest.approx(y[said].mean())
    shares = metrics.calibration(counts)
    for b in range(BINS):
        here = y[bins == b]
        assert shares[f"bin {b}"] == (
            pytest.approx(here.mean()) if len(here) else pytest.approx(math.nan, nan_ok=True)
        )


def test_classes_are_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    true, said = rng.integers(0, 4, 300), rng.integers(0, 4, 300)
    said[rng.random(300) < 0.5] = true[: (rng.random(300) < 0.5).sum()][0]
    counts = np.zeros((4, 4))
    np.add.at(counts, (true, said), 1.0)
    found = metrics.multiclass(counts)
    assert found["accuracy"] == pytest.approx((true == said).mean())
    assert found["balanced accuracy"] == pytest.approx(balanced_accuracy_score(true, said))
    assert found["macro f1"] == pytest.approx(f1_score(true, said, average="macro"))


def test_amounts_are_scikit_learns() -> None:
    rng = np.random.default_rng(2)
    truth, said = rng.uniform(-1, 1, 200), rng.uniform(-1, 1, 200)
    half = (said - truth) / 2
    moments = np.stack([np.ones(200), half, np.abs(half), half**2, truth, truth**2]).sum(axis=1)
    found = metrics.regression(moments)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, said))
    assert found["rmse"] == pytest.approx(math.sqrt(mean_squared_error(truth, said)))
    assert found["bias"] == pytest.approx((said - truth).mean())
    assert found["r2"] == pytest.approx(r2_score(truth, said))


def test_concordance_is_a_naive_count_of_pairs() -> None:
    rng = np.random.default_rng(4)
    risk, at, event = rng.integers(0, 8, 60), rng.integers(0, 5, 60), rng.integers(0, 2, 60)
    counts = np.zeros((8, 5, 2))
    np.add.at(counts, (risk, at, event), 1.0)
    right = pairs = 0.0
    for i in range(60):
        for j in range(60):
            if event[i] and (at[j] > at[i] or (at[j] == at[i] and not event[j])):
                pairs += 1
                right += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    assert metrics.concordance(counts)["c-index"] == pytest.approx(right / pairs)


def test_anomalies_are_told_by_their_error() -> None:
    y, scores = scored(6)
    found = metrics.anomaly(table(y, scores))
    assert found["auroc"] == pytest.approx(roc_auc_score(y, scores))
    assert found["bounded error"] == pytest.approx(scores.mean())
    assert set(metrics.anomaly(np.ones((1, 10)))) == {"bounded error"}


def test_shares_are_means() -> None:
    assert metrics.sequence(np.array([4.0, 3.0, 1.0]), ("a", "b")) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize("counts", [np.zeros((2, BINS)), np.full((2, BINS), -3.0)])
def test_nothing_is_unknown(counts: np.ndarray) -> None:
    assert all(math.isnan(value) for value in metrics.binary(counts).values())
    assert math.isnan(metrics.multiclass(np.zeros((3, 3)))["accuracy"])
    assert math.isnan(metrics.regression(np.zeros(6))["mae"])
    assert math.isnan(metrics.concordance(np.zeros((8, 3, 2)))["c-index"])
    assert math.isnan(metrics.sequence(np.zeros(3), ("a", "b"))["a"])
