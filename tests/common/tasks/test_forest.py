"""The forest: its trees are public, its counts a naive descent's, its scores readable without the project."""

import json
import math

import numpy as np
import pytest

from common.methods import RandomForest
from common.tasks import forest
from tests.common.tasks.kinds import encoded, study_of


def tiny(**changes: int) -> tuple[RandomForest, forest.Planted, np.ndarray, np.ndarray]:
    study = study_of("forest")
    model = RandomForest.model_validate(
        {"kind": "random_forest", "trees": 5, "depth": 2, "seed": 1} | changes
    )
    x, y = encoded(study.contract, 60)
    return model, forest.plant(model, study.contract), x, y


def descended(planted: forest.Planted, tree: int, row: np.ndarray) -> int:
    """The leaf of one row, one test after the other."""
    node, leaf = 0, 0
    for _ in range(planted.depth):
        right = row[planted.coordinates[tree, node]] > planted.thresholds[tree, node]
        node, leaf = 2 * node + (2 if right else 1), 2 * leaf + int(right)
    return leaf


def test_forests_are_public() -> None:
    _, first, *_ = tiny()
    _, again, *_ = tiny()
    _, other, *_ = tiny(seed=2)
    assert np.array_equal(first.coordinates, again.coordinates)
    assert np.array_equal(first.thresholds, again.thresholds)
    assert not np.array_equal(first.thresholds, other.thresholds)
    codes = np.isin(first.coordinates, (3, 4))
    assert codes.any()
    assert (first.thresholds[codes] == 0.5).all()
    assert (np.abs(first.thresholds[~codes]) < 1).all()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_counts_are_a_naive_descent(depth: int) -> None:
    _, planted, x, y = tiny(depth=depth, trees=7)
    expected = np.zeros((7, 2**depth, 3))
    for row, label in zip(x, y, strict=True):
        for tree in range(7):
            expected[tree, descended(planted, tree, row), label] += 1
    assert np.array_equal(forest.phi(planted, x, y, 3).sum(axis=0).reshape(expected.shape), expected)


def test_a_row_has_the_norm_of_its_trees() -> None:
    model, planted, x, y = tiny()
    norms = np.linalg.norm(forest.phi(planted, x, y, 3), axis=1)
    assert norms == pytest.approx(math.sqrt(5))
    assert forest.bound(model, 3) == 3 * math.sqrt(5)


def test_a_forest_is_scored_without_the_project() -> None:
    _, planted, x, y = tiny()
    counts = forest.phi(planted, x, y, 3).sum(axis=0).reshape(5, 4, 3)
    found = forest.read_out(planted, counts, 0.5)
    read = json.loads(found.to_json())
    for row, scores in zip(x, found.scores(x), strict=True):
        total = [0.0] * 3
        for tree in range(5):
            node = 0
            for _ in range(read["depth"]):
                above = row[read["coordinates"][tree][node]] > read["thresholds"][tree][node]
                node = 2 * node + 1 + int(above)
            leaf = node - (2 ** read["depth"] - 1)
            for k in range(3):
                total[k] += read["weights"][tree] * read["log_levels"][tree][leaf][k]
        shares = [math.exp(value) for value in total]
        assert scores.tolist() == pytest.approx([share / sum(shares) for share in shares])


def test_what_can_be_told_is_learnt() -> None:
    """A class that a coordinate decides; noise alone teaches nothing."""
    model, planted, x, _ = tiny(trees=60, depth=3)
    y = (x[:, 0] > 0).astype(np.int64)
    counts = forest.phi(planted, x, y, 2).sum(axis=0).reshape(60, 8, 2)
    found = forest.read_out(planted, counts, 0.0)
    assert (found.scores(x).argmax(axis=1) == y).mean() > 0.9
    noise = np.random.default_rng(0).normal(0, 50.0, counts.shape)
    empty = forest.read_out(planted, noise, 50.0)
    assert np.abs(empty.scores(x) - 0.5).max() < 0.4
    assert np.isfinite(forest.read_out(planted, np.zeros_like(counts), 0.0).scores(x)).all()
    assert model.trees == 60
