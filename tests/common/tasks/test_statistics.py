"""Statistics: their cells against naive counts, what is read out against plain formulas on pooled rows."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from common.contract import Contract
from common.methods import Statistics
from common.study import Study
from common.tasks import statistics
from common.tasks.estimates import Estimate, estimates
from tests.common.tasks.kinds import CLASSES, NOTHING, PRESENT, SEX, encoded, study_of


def parts(study: Study) -> tuple[Statistics, Contract]:
    assert isinstance(study.model, Statistics)
    return study.model, study.contract


def summed(study: Study, x: Any, y: Any) -> Any:
    return statistics.phi(*parts(study), x, y).sum(axis=0)


def whole(n: int = 400, **model: Any) -> tuple[Study, Any, Any, dict[str, Any]]:
    study = study_of("statistics")
    if model:
        study = study.model_copy(update={"model": study.model.model_copy(update=model)})
    x, y = encoded(study.contract, n, 4)
    return study, x, y, statistics.read_out(*parts(study), summed(study, x, y), 0.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 3))
def test_no_patient_exceeds_the_bound(seed: int, rows: int) -> None:
    study = study_of("statistics", rows=rows)
    x, y = encoded(study.contract, rows, seed)
    # All rows the same is the worst case.
    for chosen in (np.arange(rows), np.zeros(rows, dtype=int)):
        vector = statistics.phi(*parts(study), x[chosen], y[chosen]).sum(axis=0)
        assert np.linalg.norm(vector) <= statistics.bound(*parts(study)) * (1 + 1e-12)


def test_the_bound_is_reached() -> None:
    study = study_of("statistics", rows=1)
    x, y = encoded(study.contract, 1, 0)
    x[0, [0, 1, 2, 3]] = 1.0
    vector = statistics.phi(*parts(study), x, y)[0]
    assert np.linalg.norm(vector) == pytest.approx(statistics.bound(*parts(study)))
    assert len(vector) == statistics.length(*parts(study))


def test_moments_are_the_pooled_ones() -> None:
    _, x, _, found = whole()
    for group, column in (("f", 6), ("m", 7)):
        here = x[:, column] == 1
        there = here & (x[:, 1] == 1)
        raw = (x[there, 0] + 1) / 2
        read = found["groups"][group]["moments a"]
        assert read["count"].value == there.sum()
        assert read["mean"].value == pytest.approx(raw.mean())
        assert read["sd"].value == pytest.approx(raw.std())
        assert found["groups"][group]["rows"]["count"].value == here.sum()


def test_quantiles_are_within_a_bin_of_the_pooled_ones() -> None:
    _, x, _, found = whole()
    for group, column in (("f", 6), ("m", 7)):
        there = (x[:, column] == 1) & (x[:, 1] == 1)
        raw = (x[there, 0] + 1) / 2
        read = found["groups"][group]["histogram a"]
        for q in statistics.QUANTILES:
            assert abs(read[f"quantile {q:g}"].value - np.quantile(raw, q)) <= 1 / 8
        counts, _ = np.histogram(raw, bins=8, range=(0, 1))
        assert [read[f"bin {at}"].value for at in range(8)] == pytest.approx(counts.tolist())


def test_correlations_are_those_of_complete_rows() -> None:
    _, x, _, found = whole()
    there = (x[:, 6] == 1) & (x[:, 1] == 1) & (x[:, 3] == 1)
    expected = np.corrcoef(x[there, 0], x[there, 2])[0, 1]
    assert found["groups"]["f"]["correlation a and b"]["a with b"].value == pytest.approx(expected)


def test_cross_tables_count_pairs_and_none() -> None:
    _, x, _, found = whole()
    table = found["groups"]["m"]["crossed sex and site"]
    here = x[:, 7] == 1
    for at, site in enumerate(("1", "2", "3")):
        assert table[f"m / {site}"].value == (here & (x[:, 8 + at] == 1)).sum()
    assert table["m / none"].value == (here & ~x[:, 8:11].any(axis=1)).sum()
    assert table["f / 1"].value == 0
    assert found["groups"]["none"]["codes sex"]["none"].value == (~x[:, 6:8].any(axis=1)).sum()


def test_survival_is_kaplan_meiers() -> None:
    _, x, y, found = whole()
    here = y[x[:, 6] == 1]
    alive, expected = 1.0, []
    for interval in range(3):
        at_risk = (here // 2 >= interval).sum()
        alive *= 1 - ((here == 2 * interval + 1).sum() / at_risk)
        expected.append(alive)
    read = found["groups"]["f"]["survival"]
    assert [read[f"interval {at}"].value for at in range(3)] == pytest.approx(expected)


def test_log_rank_of_two_groups_is_the_textbooks() -> None:
    """Mantel's z squared, computed interval by interval."""
    exits = np.array([[5.0, 9, 4, 7, 30, 2], [6.0, 3, 5, 4, 40, 3]])
    pairs = exits.reshape(2, 3, 2)
    observed = expected = variance = 0.0
    for at in range(3):
        risk = [pairs[g, at:].sum() for g in range(2)]
        d, n = pairs[:, at, 1].sum(), sum(risk)
        observed += pairs[0, at, 1]
        expected += d * risk[0] / n
        variance += d * (n - d) / (n - 1) * risk[0] * risk[1] / n**2
    z = (observed - expected) / math.sqrt(variance)
    found = statistics._log_rank(exits.reshape(2, -1))
    assert found["statistic"] == pytest.approx(z**2)
    assert found["p"] == pytest.approx(2 * norm.sf(abs(z)))


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_the_tree_adds_up(levels: int, seed: int) -> None:
    """Against least squares on the tree, solved directly."""
    rng = np.random.default_rng(seed)
    bins = 2**levels
    matrix = np.concatenate(
        [np.kron(np.eye(2**level), np.ones(bins // 2**level)) for level in range(1, levels + 1)]
    )
    cells = matrix @ rng.integers(0, 50, bins) + rng.normal(0, 5, len(matrix))
    expected, *_ = np.linalg.lstsq(matrix, cells, rcond=None)
    assert statistics.consistent(cells) == pytest.approx(expected, abs=1e-8)


def test_intervals_cover_the_pooled_value() -> None:
    study, x, y, exact = whole(3000)
    counts = summed(study, x, y)
    rng = np.random.default_rng(7)
    held = total = 0
    for _ in range(12):
        noisy = statistics.read_out(*parts(study), counts + rng.normal(0, 4.0, counts.shape), 4.0)
        for group in ("f", "m"):
            for block in ("rows", "moments a", "survival"):
                for name, value in exact["groups"][group][block].items():
                    read = noisy["groups"][group][block][name]
                    held += read.low <= value.value <= read.high
                    total += 1
    assert 0.88 <= held / total <= 1.0


def test_groups_by_the_label_and_a_study_without_one() -> None:
    model = {"kind": "statistics", "numbers": ["a"], "bins": 0, "by": "ill"}
    contract = {"patient": "p", "features": [*PRESENT, SEX], "label": CLASSES}
    study = study_of("statistics", model=model, contract=contract)
    x, y = encoded(study.contract, 50)
    found = statistics.read_out(*parts(study), summed(study, x, y), 0.0)
    assert [found["groups"][k]["rows"]["count"].value for k in CLASSES["classes"]] == [
        float((y == k).sum()) for k in range(3)
    ]
    plain = study_of("statistics", model=model | {"by": ""}, contract=contract | {"label": NOTHING})
    x, y = encoded(plain.contract, 50)
    assert set(statistics.read_out(*parts(plain), summed(plain, x, y), 0.0)) == {"groups"}
    assert any("mean" in line for line in statistics.lines(found))


def test_nothing_is_claimed_of_nothing() -> None:
    study, *_ = whole(5)
    empty = statistics.read_out(*parts(study), np.zeros(statistics.length(*parts(study))), 3.0)
    assert str(empty["groups"]["f"]["moments a"]["mean"]) == "unknown"
    assert empty["groups"]["f"]["moments a"]["mean"].to_json()["value"] is None
    assert estimates(lambda c: {"x": float(c[0])}, np.array([3.0]), 0.0) == {"x": Estimate(3.0, 3.0, 3.0)}
    assert str(Estimate(3.0, 3.0, 3.0)) == "3"
    assert str(Estimate(3.0, 2.0, 4.0)) == "3 (2 to 4)"
