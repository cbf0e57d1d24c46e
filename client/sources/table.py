"""A hospital's rows as training sees them: numbers, grouped by patient, chosen by the hospital's secret.

Source: PRIVACY.md "Everything upstream is separable by patient". Rules: which rows of a patient are used, in
what order and on which side of the split depends on the site's key and that patient's own rows, never on
other patients or the order of the file; ids stay inside, and neither they nor a size is ever printed.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.contract import BLANKS, UNUSABLE, Contract
from common.encoding import derive, u64

Part: TypeAlias = Literal["train", "holdout"]

NO_ID: Final = frozenset({"", "-", "?", "na", "n/a", "nan", "<na>", "nat", "none", "null"})
"""Texts, in lower case, with which exports write an absent patient id."""

_ROUNDED: Final = re.compile(r"[0-9](\.[0-9]+)?[eE]\+[0-9]+")
"""A long number as spreadsheets show it: its last digits are lost, so that patients share it."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Table:
    """Rows of one study at one hospital.

    ``x`` float64 [n, width] in [-1, 1]; ``y`` int64 [n] classes, all usable; ``patient_index`` int64 [n],
    ascending, values in [0, patients); ``ids`` the patients' ids in that order. Arrays are read-only.

    Guarantee: tables_print_no_record - repr and str hold no id, value or count.
    """

    x: NDArray[np.float64]
    y: NDArray[np.int64]
    patient_index: NDArray[np.int64]
    ids: list[str]

    def __post_init__(self) -> None:
        for array in (self.x, self.y, self.patient_index):
            array.setflags(write=False)

    def __repr__(self) -> str:
        return f"Table(width={self.x.shape[1]})"

    @property
    def patients(self) -> int:
        """How many patients have rows here."""
        return len(self.ids)

    def without(self, patients: Collection[str]) -> "Table":
        """The table that there would be without the rows of these patients.

        Guarantee: leaving_out_is_not_having - bit for bit the table of an extract without their rows.
        """
        stays = np.array([patient not in patients for patient in self.ids], dtype=np.bool_)
        rows = stays[self.patient_index]
        index = (np.cumsum(stays) - 1)[self.patient_index[rows]].astype(np.int64)
        return Table(
            self.x[rows], self.y[rows], index, [p for p, kept in zip(self.ids, stays, strict=True) if kept]
        )


def patient_id(cell: object) -> str | None:
    """The id in a cell as text without blanks around it, None when the row names no one patient.

    Two patients under one id would be clipped as one, which is not what the guarantee counts on.
    """
    text = cell.strip(BLANKS) if isinstance(cell, str) else ""
    return None if text.lower() in NO_ID or _ROUNDED.fullmatch(text) else text


def in_holdout(key: bytes, patient: str, share: float) -> bool:
    """Whether a patient is held out: the first 64 bits of KDF(key, "holdout", id) are below share 2^64.

    ``key`` 32 secret bytes of the site for this study; ``share`` in [0, 0.5].

    Guarantee: the_split_is_a_function_of_the_patient - it does not move when other patients come or go.
    """
    bits = int.from_bytes(derive(key, "holdout", patient.encode())[:8], "little")
    numerator, denominator = share.as_integer_ratio()
    return bits * denominator < numerator << 64


def build_table(
    patients: Sequence[object],
    x: NDArray[np.float64],
    y: NDArray[np.int64],
    contract: Contract,
    *,
    key: bytes,
    part: Part,
) -> Table:
    """One part of the rows, ordered by patient id and, within a patient, by KDF rank.

    ``patients`` [n] cells of the patient column; ``x`` [n, width], ``y`` [n] from ``Contract.encode``. Rows
    without a patient or a usable label are left out; of a patient with more than ``rows_per_patient`` rows,
    those with the lowest ranks stay.

    Guarantee: tables_are_separable_by_patient - without a patient's rows the table is the same, without them.
    Guarantee: file_order_changes_nothing - any order of the same rows gives the same table.
    Guarantee: row_cap_holds - no patient has more than rows_per_patient rows.
    """
    rows_of: dict[str, list[int]] = {}
    for row, cell in enumerate(patients):
        if y[row] != UNUSABLE and (patient := patient_id(cell)) is not None:
            rows_of.setdefault(patient, []).append(row)
    if contract.holdout > 0:
        wanted = part == "holdout"
        ids = sorted(p for p in rows_of if in_holdout(key, p, contract.holdout) == wanted)
    else:
        ids = sorted(rows_of) if part == "train" else []
    chosen: list[int] = []
    counts: list[int] = []
    for patient in ids:
        rows = rows_of[patient]
        if len(rows) > 1:
            ranks = {row: _rank(key, patient, x[row], int(y[row])) for row in rows}
            rows = sorted(rows, key=ranks.__getitem__)[: contract.rows_per_patient]
        chosen += rows
        counts.append(len(rows))
    index = np.array(chosen, dtype=np.int64)
    return Table(x[index], y[index], np.repeat(np.arange(len(ids)), counts).astype(np.int64), ids)


def _rank(key: bytes, patient: str, x: NDArray[np.float64], y: int) -> bytes:
    # Rows of equal rank have equal content, so that it does not matter which of them comes first.
    return derive(key, "row-rank", patient.encode(), x.astype("<f8").tobytes(), u64(y))
