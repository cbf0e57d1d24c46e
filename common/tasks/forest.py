"""A random-split forest: grown from a seed without data, filled by one sum of counts, read out with noise.

Source: Fan et al., ICDM 2003; Jagannathan, Pillaipakkamnatt, Wright, TDP 5 (2012) (random trees and private
counts). Rules: features, thresholds and depth are public; a patient's rows fall into one leaf of each tree
each, so the vector has norm at most sqrt(trees) a row; numpy only; what is read out is post-processing.

A node of a tree tests one coordinate of the encoded row, drawn evenly among the features: a number by a
threshold drawn evenly in (-1, 1), anything that is 0 or 1 by 1/2. Leaf i holds the rows whose answers, first
test first, are the binary digits of i.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.contract import Category, Contract, Events, Text
from common.encoding import digest, u64
from common.methods import RandomForest
from common.secagg.masks import apply_keystreams

Counts = NDArray[np.float64]

BLOCK_ROWS: Final = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Planted:
    """The public part of a forest: of each of a tree's 2^depth - 1 tests, in heap order, what it asks.

    ``coordinates`` int64 and ``thresholds`` float64, [trees, tests]; a row goes right where it is above.
    """

    coordinates: NDArray[np.int64]
    thresholds: NDArray[np.float64]
    depth: int

    def leaves(self, x: NDArray[np.float64]) -> NDArray[np.int64]:
        """In which leaf of each tree each row of x [n, width] is: int64 [n, trees]."""
        trees = np.arange(len(self.coordinates))
        node = np.zeros((len(x), len(trees)), dtype=np.int64)
        for _ in range(self.depth):
            values = np.take_along_axis(x, self.coordinates[trees, node], axis=1)
            node = 2 * node + 1 + (values > self.thresholds[trees, node])
        found: NDArray[np.int64] = node - (2**self.depth - 1)
        return found


def plant(model: RandomForest, contract: Contract) -> Planted:
    """The forest of a manifest, a function of its seed, sizes and features alone.

    Guarantee: forests_are_public - the same manifest gives the same trees, whatever the data.
    """
    tests = 2**model.depth - 1
    words = np.zeros(3 * model.trees * tests, dtype="<u4")
    apply_keystreams(words, [digest("forest", u64(model.seed))])
    first, second, third = words.reshape(3, model.trees, tests) / 2.0**32
    starts, widths, binary = [], [], []
    at = 0
    for feature in contract.features:
        starts.append(at)
        widths.append(feature.width)
        bag = isinstance(feature, Events | Text) and feature.form == "bag"
        binary.append(isinstance(feature, Category) or bag)
        at += feature.width
    chosen = np.floor(first * len(starts)).astype(np.int64)
    place = np.floor(second * np.array(widths)[chosen]).astype(np.int64)
    thresholds = np.where(np.array(binary)[chosen], 0.5, 2.0 * third - 1.0)
    return Planted(np.array(starts)[chosen] + place, thresholds, model.depth)


def shape(model: RandomForest, classes: int) -> tuple[int, int, int]:
    """The shape of the sum: trees, leaves, classes."""
    return model.trees, 2**model.depth, classes


def bound(model: RandomForest, rows_per_patient: int) -> float:
    """The largest norm of one patient's vector: all rows in the same leaves."""
    return rows_per_patient * math.sqrt(model.trees)


def phi(planted: Planted, x: NDArray[np.float64], y: NDArray[np.int64], classes: int) -> Counts:
    """The vectors of rows x [n, width] of classes y [n]: 1 in each one's leaves, float64 [n, d]."""
    trees, leaves = len(planted.coordinates), 2**planted.depth
    found = np.zeros((len(x), trees, leaves, classes))
    rows = np.arange(len(x))[:, None]
    found[rows, np.arange(trees), planted.leaves(x), y[:, None]] = 1.0
    return found.reshape(len(x), -1)


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """A forest that scores: of each leaf the logarithm of each class's level, of each tree its weight."""

    planted: Planted
    logs: Counts
    weights: NDArray[np.float64]

    def scores(self, x: NDArray[np.float64]) -> Counts:
        """The probability of each class for rows x [n, width]: float64 [n, classes]."""
        trees = np.arange(len(self.weights))
        total = np.zeros((len(x), self.logs.shape[2]))
        for start in range(0, len(x), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            found = self.logs[trees, self.planted.leaves(x[part])]
            total[part] = np.einsum("ntc,t->nc", found, self.weights)
        total -= total.max(axis=1, keepdims=True)
        shares = np.exp(total)
        result: Counts = shares / shares.sum(axis=1, keepdims=True)
        return result

    def to_json(self) -> str:
        """All that scoring needs, for a program that knows nothing of this one."""
        form: dict[str, Any] = {
            "format": "wardround-forest-1",
            "depth": self.planted.depth,
            "coordinates": self.planted.coordinates.tolist(),
            "thresholds": self.planted.thresholds.tolist(),
            "log_levels": self.logs.tolist(),
            "weights": self.weights.tolist(),
        }
        return json.dumps(form, allow_nan=False)


def read_out(planted: Planted, counts: Counts, noise_sd: float) -> Forest:
    """What noisy counts [trees, leaves, classes] say; ``noise_sd`` of one count, 0 without noise.

    Counts are taken relative to their class, so that a rare class is not outvoted: scores are those of
    classes equally common. To each a = max(1, 2 variance of the noise / mean count of a cell) is added before
    the logarithm, so that what noise could have made says little. A tree counts by how far its classes differ
    over its leaves beyond what noise makes them differ, drawn three to one towards the mean of all trees.
    """
    _, leaves, classes = counts.shape
    # Every tree counts the same patients: the mean over trees is far surer than one of them.
    sizes = np.maximum(counts.sum(axis=1).mean(axis=0), 1.0)
    # So what its leaves have too much together is noise, and is shared out among them.
    counts = counts + (sizes - counts.sum(axis=1))[:, None, :] / leaves
    extra = max(1.0, 2.0 * noise_sd**2 / (sizes.mean() / leaves))
    level = counts / sizes * sizes.mean()
    logs = np.log(np.maximum(level, -0.9 * extra) + extra)
    shares = counts / sizes
    spread = np.square(shares - shares.mean(axis=2, keepdims=True)).sum(axis=(1, 2))
    strength = spread - (leaves - 1) * np.square(noise_sd / sizes).sum() * (classes - 1) / classes
    weights = np.maximum(strength, 0.0) + 3.0 * max(float(strength.mean()), 1e-12)
    return Forest(planted, logs - logs.mean(axis=2, keepdims=True), weights / weights.sum())
