"""A cell of a hospital's table as a number, a code or a list, whatever it was written as.

Source: PRIVACY.md "Everything upstream is separable by patient". Rules: total, so that no cell can make it
fail; nothing is guessed from other cells; what is no number is absent.
"""

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

UNUSABLE: Final = -1
NUMBER: Final = r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
"""Text of a number: decimal point, ASCII digits, no grouping; the same expression for RE2 and Python."""
BLANKS: Final = " \t\r\n\v\f"
"""What is ignored around the text of a cell."""

_NUMBER: Final = re.compile(NUMBER)

Values: TypeAlias = Sequence[object] | NDArray[np.float64] | NDArray[np.int64]


def text_of(value: object) -> str | None:
    """A cell as the text that codes are compared with: None when absent, whole numbers without decimals."""
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    number = number_of(value) if not isinstance(value, str) else math.nan
    if abs(number) < 2**53:
        return str(int(number)) if number.is_integer() else repr(number)
    return value.strip(BLANKS) if isinstance(value, str) else None


def number_of(value: object) -> float:
    """The float64 of a cell, NaN when it is none. Grouped digits and decimal commas are none."""
    if isinstance(value, str):
        text = value.strip(BLANKS)
        return float(text) if _NUMBER.fullmatch(text) else math.nan
    if isinstance(value, int | float | Decimal | np.floating | np.integer | np.bool_):
        try:
            return float(value)
        except (OverflowError, ValueError):
            return math.nan
    return math.nan


def numbers_of(values: Values) -> NDArray[np.float64]:
    """float64 [n], NaN where a cell is no finite number; a float64 array is taken as it is."""
    if isinstance(values, np.ndarray) and values.dtype == np.float64:
        return np.where(np.isfinite(values), values, np.nan)
    found = np.fromiter((number_of(value) for value in values), dtype=np.float64, count=len(values))
    return np.where(np.isfinite(found), found, np.nan)


def positions_of(values: Values, codes: Sequence[str]) -> NDArray[np.int64]:
    """int64 [n], the place of each cell's text among ``codes``, -1 for none.

    An int64 array holds places already.
    """
    if isinstance(values, np.ndarray) and values.dtype == np.int64:
        return np.where((values >= 0) & (values < len(codes)), values, UNUSABLE)
    position = {code: index for index, code in enumerate(codes)}
    found = (position.get(text_of(value) or "", UNUSABLE) for value in values)
    return np.fromiter(found, dtype=np.int64, count=len(values))


def entries_of(cell: object) -> list[tuple[float, object]]:
    """A list cell as (time, value) pairs in its own order: the time is ``t`` of an entry, else its place."""
    if not isinstance(cell, list | tuple | np.ndarray):
        return []
    found: list[tuple[float, object]] = []
    for place, entry in enumerate(cell):
        if isinstance(entry, Mapping):
            found.append((number_of(entry.get("t")), entry.get("v")))
        else:
            found.append((float(place), entry))
    return found
