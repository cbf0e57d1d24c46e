"""A table built row by row, the naive way: what the product's loader is compared with."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.sources.table import Part, Table, build_table, in_part, patient_id
from common.contract import UNUSABLE, Contract


def table_of(
    cells: Sequence[object],
    x: NDArray[np.float64],
    y: NDArray[np.int64],
    contract: Contract,
    *,
    key: bytes,
    part: Part = "train",
) -> Table:
    """The table of rows whose patients are in ``cells``, in the order of the file."""
    named = [(patient_id(cell), row) for row, cell in enumerate(cells) if y[row] != UNUSABLE]
    usable = sorted((patient, row) for patient, row in named if patient is not None)
    ids = np.array([patient for patient, _ in usable], dtype=object)
    kept = in_part(ids, contract, key=key, part=part)
    rows = np.array([row for _, row in usable], dtype=np.int64)[kept]
    return build_table(ids[kept], x[rows], y[rows], contract, key=key)
