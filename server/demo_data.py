"""The demo's data: the Wisconsin breast cancer rows, a public test set, and hospitals of unlike size and mix.

Source: scikit-learn's ``load_breast_cancer`` (UCI WDBC 1995, CC BY 4.0). Rules: the test set is drawn first
and belongs to the demo; hospitals differ in size and in the share of malignant cases; the seed decides the
split and nothing else.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import FailureError

TEST_SHARE: Final = 0.2
CLASSES: Final = ("malignant", "benign")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the table by column name; ``diagnosis`` holds the class."""

    columns: dict[str, list[object]]


@dataclass(frozen=True, slots=True)
class HospitalRows(Rows):
    """One hospital's rows, with a patient column."""

    def write_csv(self, path: Path) -> None:
        """Write the extract as a hospital's data team would."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(zip(*self.columns.values(), strict=True))


def shares(hospitals: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each hospital's share of the malignant and of the benign rows; each sums to 1.

    Sizes fall linearly from the first hospital to the last; every other one sees more malignant cases.
    """
    size = np.linspace(1.6, 0.8, hospitals)
    tilt = np.where(np.arange(hospitals) % 2 == 0, 1.3, 0.7)
    malignant, benign = size * tilt, size * (2 - tilt)
    return malignant / malignant.sum(), benign / benign.sum()


def split_rows(hospitals: int, seed: int) -> tuple[Rows, list[HospitalRows]]:
    """The public test set and the hospitals' rows. Raises FailureError without scikit-learn."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise FailureError(
            "demo.scikit-learn", "the demo needs scikit-learn", remedy="pip install 'wardround[demo]'"
        ) from error
    data: Any = load_breast_cancer()
    generator = np.random.default_rng(seed)
    test: list[int] = []
    parts: list[list[int]] = [[] for _ in range(hospitals)]
    for label, share in enumerate(shares(hospitals)):
        rows = generator.permutation(np.flatnonzero(data.target == label))
        held_out = round(TEST_SHARE * len(rows))
        test.extend(rows[:held_out].tolist())
        cuts = np.round(np.cumsum(share) * (len(rows) - held_out)).astype(int)
        for part, piece in zip(parts, np.split(rows[held_out:], cuts[:-1]), strict=True):
            part.extend(piece.tolist())

    def columns(rows: list[int]) -> dict[str, list[object]]:
        table: dict[str, list[object]] = {
            str(name): [float(value) for value in data.data[rows, index]]
            for index, name in enumerate(data.feature_names)
        }
        table["diagnosis"] = [CLASSES[int(data.target[row])] for row in rows]
        return table

    return Rows(columns(test)), [
        HospitalRows({"patient": [f"P{row:04d}" for row in part], **columns(part)}) for part in parts
    ]


def fit_logistic(
    x: NDArray[np.float64], y: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A plain logistic regression without privacy: weights [2, width] and bias [2]."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=10.0, max_iter=2000).fit(x, y)
    weight, bias = np.asarray(model.coef_), np.asarray(model.intercept_)
    return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2


def accuracy(
    weight: NDArray[np.float64], bias: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.int64]
) -> float:
    """Share of rows whose class has the highest score, rounded to 4 places."""
    return round(float(np.mean(np.argmax(x @ weight.T + bias, axis=1) == y)), 4)
