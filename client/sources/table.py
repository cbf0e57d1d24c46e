"""A hospital's rows as training sees them: numbers, grouped by patient, chosen by the hospital's secret.

Source: PRIVACY.md "Everything upstream is separable by patient". Rules: which rows of a patient are used, in
what order and on which side of the split depends on the site's key and that patient's own rows, never on
other patients or the order of the file; ids stay inside, and neither they nor a size is ever printed.
"""

import os
import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.contract import Contract
from common.contract.cells import BLANKS
from common.encoding import derive, u64
from common.errors import FailureError

Part: TypeAlias = Literal["train", "holdout"]

NO_ID: Final = frozenset({"", "-", "?", "na", "n/a", "nan", "<na>", "nat", "none", "null"})
"""Texts, in lower case, with which exports write an absent patient id."""

ROUNDED: Final = r"[0-9](\.[0-9]+)?[eE]\+[0-9]+"
"""A long number as spreadsheets show it: its last digits are lost, so that patients share it."""


IN_MEMORY_SIZE_BYTES: Final = 1 << 28
"""Encoded rows beyond this lie in an unnamed file that ends with the process."""


def allocated(rows: int, width: int) -> NDArray[np.float64]:
    """float64 [rows, width], in a file without a name where it is large. Raises FailureError."""
    size_bytes = 8 * rows * width
    if size_bytes <= IN_MEMORY_SIZE_BYTES:
        return np.empty((rows, width))
    try:
        with tempfile.TemporaryFile() as file:
            # Reserved now: a full disk under a mapping would end the process without a word.
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            return np.memmap(file, dtype=np.float64, mode="r+", shape=(rows, width))
    except OSError as error:
        remedy = "Free space in the folder for temporary files, or set TMPDIR for the agent."
        raise FailureError(
            "source.scratch", "the encoded rows do not fit onto the disk", remedy=remedy
        ) from error


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
        x = np.compress(rows, self.x, axis=0, out=allocated(int(rows.sum()), self.x.shape[1]))
        ids = [patient for patient, kept in zip(self.ids, stays, strict=True) if kept]
        return Table(x, self.y[rows], index, ids)


def patient_id(cell: object) -> str | None:
    """The id in a cell as text without blanks around it, None when the row names no one patient.

    Two patients under one id would be clipped as one, which is not what the guarantee counts on.
    """
    text = cell.strip(BLANKS) if isinstance(cell, str) else ""
    return None if text.lower() in NO_ID or re.fullmatch(ROUNDED, text) else text


def in_holdout(key: bytes, patient: str, share: float) -> bool:
    """Whether a patient is held out: the first 64 bits of KDF(key, "holdout", id) are below share 2^64.

    ``key`` 32 secret bytes of the site for this study; ``share`` in [0, 0.5].

    Guarantee: the_split_is_a_function_of_the_patient - it does not move when other patients come or go.
    """
    bits = int.from_bytes(derive(key, "holdout", patient.encode())[:8], "little")
    numerator, denominator = share.as_integer_ratio()
    return bits * denominator < numerator << 64


def in_part(ids: NDArray[np.object_], contract: Contract, *, key: bytes, part: Part) -> NDArray[np.bool_]:
    """Which rows belong to a part: bool [n] from the patients of the rows, in ascending order."""
    if contract.holdout == 0:
        return np.full(len(ids), part == "train", dtype=np.bool_)
    starts, counts = _patients(ids)
    held = [in_holdout(key, patient, contract.holdout) for patient in ids[starts]]
    return np.repeat(np.array(held, dtype=np.bool_) == (part == "holdout"), counts)


def build_table(
    ids: NDArray[np.object_], x: NDArray[np.float64], y: NDArray[np.int64], contract: Contract, *, key: bytes
) -> Table:
    """The table of the rows of one part; a patient's rows are put in the order of their KDF ranks.

    ``ids`` [n] in ascending order, ``x`` [n, width] and ``y`` [n], all usable, as ``Contract.encode`` gives
    them; both are reordered in place. Of a patient with more than ``rows_per_patient`` rows, those with the
    lowest ranks stay.

    Guarantee: tables_are_separable_by_patient - without a patient's rows the table is the same, without them.
    Guarantee: file_order_changes_nothing - any order of the same rows gives the same table.
    Guarantee: row_cap_holds - no patient has more than rows_per_patient rows.
    """
    starts, counts = _patients(ids)
    patients = ids[starts].tolist()
    if len(ids) > len(patients):
        end = 0
        for at, (patient, start, count) in enumerate(zip(patients, starts, counts, strict=True)):
            rows = list(range(start, start + count))
            if count > 1:
                ranks = {row: _rank(key, patient, x[row], int(y[row])) for row in rows}
                rows = sorted(rows, key=ranks.__getitem__)[: contract.rows_per_patient]
            # What is written over here belongs to this patient, or to one whose rows were moved before.
            into = slice(end, end + len(rows))
            x[into], y[into] = x[rows], y[rows]
            counts[at], end = len(rows), into.stop
        x, y = x[:end], y[:end]
    return Table(x, y, np.repeat(np.arange(len(patients)), counts).astype(np.int64), patients)


def _patients(ids: NDArray[np.object_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each patient's rows start and how many there are."""
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)]).astype(np.int64)
    return starts, np.diff(np.append(starts, len(ids))).astype(np.int64)


def _rank(key: bytes, patient: str, x: NDArray[np.float64], y: int) -> bytes:
    # Rows of equal rank have equal content, so that it does not matter which of them comes first.
    return derive(key, "row-rank", patient.encode(), x.astype("<f8").tobytes(), u64(y))
