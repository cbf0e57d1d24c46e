"""Counts of one hospital's patients: the bounded vectors of a forest or of statistics, clipped and summed.

Source: PRIVACY.md "The release gate". Rules: a patient's rows are summed before clipping; the vector of a row
is a public function of that row; memory is bounded by pieces, which change nothing of the sum.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.methods import RandomForest
from common.privacy.clipping import clip, sanitise
from common.study import Study
from common.tasks import forest, statistics
from common.tasks.clipped_sum import pieces

PIECE_CELLS: Final = 1 << 22


def vectors(study: Study, x: NDArray[np.float64], y: NDArray[np.int64]) -> NDArray[np.float64]:
    """The vector of each row of a study that counts, float64 [rows, d]."""
    model = study.model
    if isinstance(model, RandomForest):
        return forest.phi(forest.plant(model, study.contract), x, y, study.contract.label.outputs)
    if model.kind == "statistics":
        return statistics.phi(model, study.contract, x, y)
    raise TypeError(f"{model.kind} does not count")


def counted(
    study: Study,
    x: NDArray[np.float64],
    y: NDArray[np.int64],
    patients: NDArray[np.int64],
    dim: int,
    clip_norm: float | None,
) -> NDArray[np.float64]:
    """The sum of the patients' vectors, each clipped to ``clip_norm`` (None: not at all), float64 [dim].

    Rows x [n, width], y [n] are usable, ``patients`` [n] ascending.

    Guarantee: counts_are_those_of_a_naive_loop - while no patient's norm exceeds the clip norm.
    """
    total = np.zeros(dim)
    for piece in pieces(patients, max(1, PIECE_CELLS // dim)):
        starts = np.flatnonzero(np.append(True, patients[piece][1:] != patients[piece][:-1]))
        whole = np.add.reduceat(vectors(study, x[piece], y[piece]), starts, axis=0)
        clean = sanitise(whole) if clip_norm is None else clip(whole, clip_norm)
        total += clean.sum(axis=0)
    return total
