"""Evaluation in the same sum as training: held-out patients count how the model does on them.

Source: PRIVACY.md "The release gate" (score bins 1, g overlapping tables sqrt(g)); notes of the metrics
themselves. Rules: a held-out patient's vector is zero on the model's coordinates and a trained one's is zero
here, so that both together have the sensitivity of one; the table is scaled to use all of the clip norm; each
patient is scored alone, so that nobody else's rows can move a count; bins and groups are public.

The cells: a table of everybody, one of each code of each subgroup, and with ``per_hospital`` the sums of 1
and of the error of each hospital.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.contract import Category, Contract
from common.contract.labels import AMOUNT_STEPS
from common.methods import Evaluation, Model
from common.study import DifferentialPrivacy, Study
from common.tasks import metrics
from common.tasks.estimates import Counts, Estimate, estimates
from common.tasks.fit import places

RISK_BINS: Final = 8
_SHARES: Final = {
    "skip_gram": ("top 5 of neighbours", "probability of neighbours"),
    "sequence_to_sequence": ("tokens right", "sequences right"),
}


@dataclass(frozen=True, slots=True)
class Table:
    """The cells of one table: their ``shape``, and the squared norm of one row in it."""

    shape: tuple[int, ...]
    squared_norm: float

    @property
    def size(self) -> int:
        """Number of cells."""
        return math.prod(self.shape)


def table_of(model: Model, contract: Contract, bins: int) -> Table:
    """The table of a kind of model."""
    label = contract.label
    if model.kind in _SHARES:
        return Table((3,), 3.0)
    if model.kind == "autoencoder":
        return Table((label.limit, bins), 1.0)
    if label.kind == "number":
        return Table((6,), 6.0)
    if label.kind == "time_to_event":
        return Table((RISK_BINS, label.outputs, 2), 1.0)
    if label.outputs == 2:
        return Table((2, bins), 1.0)
    return Table((label.outputs, label.outputs), 1.0)


def length(evaluation: Evaluation, model: Model, contract: Contract, members: int) -> int:
    """Cells of the whole evaluation."""
    tables = 1 + sum(len(_codes(contract, name)) for name in evaluation.subgroups)
    return tables * table_of(model, contract, evaluation.bins).size + 2 * members * evaluation.per_hospital


def bound(evaluation: Evaluation, model: Model, contract: Contract) -> float:
    """The largest norm of one patient's counts before they are scaled to the clip norm."""
    squared = table_of(model, contract, evaluation.bins).squared_norm * (1 + len(evaluation.subgroups))
    return contract.rows_per_patient * math.sqrt(squared + 2.0 * evaluation.per_hospital)


def scale(study: Study) -> float:
    """By what counts are multiplied before clipping, so that one patient's have the clip norm."""
    if study.evaluation is None or not isinstance(study.privacy, DifferentialPrivacy):
        return 1.0
    return study.privacy.clip_norm / bound(study.evaluation, study.model, study.contract)


def cells(
    evaluation: Evaluation,
    model: Model,
    contract: Contract,
    member: tuple[int, int],
    x: NDArray[np.float64],
    y: NDArray[np.int64],
    predicted: NDArray[np.float64],
) -> Counts:
    """The counts of rows: float64 [n, length]. ``member`` is (place among the members, how many).

    ``predicted`` as ``common.tasks.models.prediction`` gives it.

    Guarantee: no_row_exceeds_the_bound - whatever the model says of it.
    """
    n = len(x)
    table = table_of(model, contract, evaluation.bins)
    own, errors = _row_cells(model, contract, table, y, predicted)
    blocks, where = [own], places(contract)
    for name in evaluation.subgroups:
        start, stop = where[name]
        blocks.append((x[:, start:stop, None] * own[:, None]).reshape(n, -1))
    if evaluation.per_hospital:
        at, members = member
        sums = np.zeros((n, members, 2))
        sums[:, at, 0], sums[:, at, 1] = 1.0, errors
        blocks.append(sums.reshape(n, -1))
    return np.concatenate(blocks, axis=1)


def read_out(
    evaluation: Evaluation,
    model: Model,
    contract: Contract,
    members: tuple[str, ...],
    counts: Counts,
    noise_sd: float,
) -> dict[str, Any]:
    """All that the counts say: ``everybody``, by subgroup, and between hospitals; leaves are ``Estimate``."""
    table = table_of(model, contract, evaluation.bins)
    found: dict[str, Any] = {"everybody": _read(model, contract, table, counts[: table.size], noise_sd)}
    start = table.size
    for name in evaluation.subgroups:
        for code in _codes(contract, name):
            part = counts[start : start + table.size]
            found[f"{name} = {code}"] = _read(model, contract, table, part, noise_sd)
            start += table.size
    if evaluation.per_hospital:
        found["hospitals"] = _spread(counts[start:].reshape(len(members), 2), members, noise_sd)
    return found


def _row_cells(
    model: Model, contract: Contract, table: Table, y: NDArray[np.int64], predicted: NDArray[np.float64]
) -> tuple[Counts, Counts]:
    """The cells of each row in the table, and its error in [0, 1]."""
    n = len(y)
    known = np.nan_to_num(predicted, nan=0.0, posinf=1e9, neginf=-1e9)
    found = np.zeros((n, *table.shape))
    rows = np.arange(n)
    label = contract.label
    if model.kind in _SHARES:
        shares = np.clip(known[:, :2], 0.0, 1.0)
        found[:, 0], found[:, 1:] = 1.0, shares
        return found, 1.0 - shares[:, 0]
    if model.kind == "autoencoder":
        bounded = bounded_error(known[:, 0])
        found[rows, y, _bin(bounded, table.shape[1])] = 1.0
        return found.reshape(n, -1), bounded
    if label.kind == "number":
        truth = 2.0 * y / AMOUNT_STEPS - 1.0
        half = np.clip((known[:, 0] - truth) / 2.0, -1.0, 1.0)
        found[:] = np.stack([np.ones(n), half, np.abs(half), half**2, truth, truth**2], axis=1)
        return found, np.abs(half)
    if label.kind == "time_to_event":
        risk = np.clip(1.0 - known.mean(axis=1), 0.0, 1.0)
        found[rows, _bin(risk, RISK_BINS), y // 2, y % 2] = 1.0
        last = np.clip(known[rows, y // 2], 0.0, 1.0)
        return found.reshape(n, -1), np.where(y % 2 == 1, last, 1.0 - last)
    said = known.argmax(axis=1)
    if label.outputs == 2:
        found[rows, y, _bin(np.clip(known[:, 1], 0.0, 1.0), table.shape[1])] = 1.0
    else:
        found[rows, y, said] = 1.0
    return found.reshape(n, -1), (said != y).astype(np.float64)


def bounded_error(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """A squared error e as e / (1 + e), in [0, 1)."""
    positive = np.maximum(errors, 0.0)
    return positive / (1.0 + positive)


def _bin(values: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    return np.clip(np.floor(values * bins), 0, bins - 1).astype(np.int64)


def _codes(contract: Contract, name: str) -> tuple[str, ...]:
    feature = next(feature for feature in contract.features if feature.name == name)
    return feature.codes if isinstance(feature, Category) else ()


def _read(
    model: Model, contract: Contract, table: Table, counts: Counts, noise_sd: float
) -> dict[str, Estimate]:
    cells_of = counts.reshape(table.shape)
    label = contract.label
    if model.kind in _SHARES:
        names = _SHARES[model.kind]
        return estimates(lambda c: metrics.sequence(c, names), cells_of, noise_sd, (0.0, 1.0))
    if model.kind == "autoencoder":
        return estimates(metrics.anomaly, cells_of, noise_sd, (0.0, 1.0))
    if label.kind == "number":
        return estimates(metrics.regression, cells_of, noise_sd)
    if label.kind == "time_to_event":
        return estimates(metrics.concordance, cells_of, noise_sd, (0.0, 1.0))
    if label.outputs == 2:
        found = estimates(metrics.binary, cells_of, noise_sd)
        found |= estimates(metrics.thresholds, cells_of, noise_sd, (0.0, 1.0))
        return found | estimates(metrics.calibration, cells_of, noise_sd, (0.0, 1.0))
    return estimates(metrics.multiclass, cells_of, noise_sd, (0.0, 1.0))


def _spread(sums: Counts, members: tuple[str, ...], noise_sd: float) -> dict[str, Estimate]:
    """Each hospital's mean error, and the distance between the best and the worst."""

    def read(counts: Counts) -> dict[str, float]:
        rates = [float(e / n) if n >= 1 else math.nan for n, e in counts]
        known = [rate for rate in rates if math.isfinite(rate)]
        widest = max(known) - min(known) if known else math.nan
        return dict(zip(members, rates, strict=True)) | {"widest gap": widest}

    return estimates(read, sums, noise_sd, (0.0, 1.0))
