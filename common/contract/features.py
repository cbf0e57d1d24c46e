"""The columns of one value a row: numbers and codes; and how coded data (OMOP, FHIR) give a column.

Source: PRIVACY.md "Everything upstream is separable by patient"; OMOP CDM 5.4; HL7 FHIR R4. Rules: ranges,
codes and constants are public and stand in the contract; each row's numbers depend on that row alone.
"""

import math
from typing import Annotated, ClassVar, Final, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.contract.cells import UNUSABLE, Values, numbers_of, positions_of
from common.contract.fields import DIFFERENT, LISTED, PRINTABLE, Code, Column, Finite, Line, Strict, broken
from common.contract.units import Analyte

Gives: TypeAlias = Literal["number", "code", "numbers", "codes"]
Day: TypeAlias = Annotated[int, Field(ge=-36_600, le=36_600)]
Concept: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1)]

_TAKES: Final[dict[str, tuple[str, ...]]] = {
    "age": ("any",),
    "sex": ("any",),
    "condition": ("any", "count", "list"),
    "drug": ("any", "count", "list"),
    "visit": ("any", "count", "list"),
    "measurement": ("any", "count", "last", "list"),
}


class Derived(Strict):
    """What gives a column where data are coded: OMOP concept ids, FHIR codes as ``system|code``; any counts.

    ``days``: the first and last day that count, from the index date of the cohort, both included. ``take``:
    whether there is any, how many, the last value, or the list of all with their times. A visit without codes
    is any visit.
    """

    what: Literal["age", "sex", "condition", "measurement", "visit", "drug"]
    omop: Annotated[tuple[Concept, ...], LISTED, Field(max_length=1000), DIFFERENT] = ()
    fhir: Annotated[tuple[Code, ...], LISTED, Field(max_length=1000), DIFFERENT] = ()
    days: Annotated[tuple[Day, Day], LISTED] = (-365, 0)
    take: Literal["any", "count", "last", "list"] = "any"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.take not in _TAKES[self.what]:
            raise broken("take", f"must be {' or '.join(_TAKES[self.what])} for {self.what}")
        if self.what in ("age", "sex") and (self.omop or self.fhir):
            raise broken("omop" if self.omop else "fhir", f"must be left out for {self.what}")
        if self.what in ("condition", "drug", "measurement") and not (self.omop or self.fhir):
            raise broken("omop", "or fhir must name a code")
        if self.days[0] > self.days[1]:
            raise broken("days", "must be in order")
        return self

    @property
    def gives(self) -> Gives:
        """What a cell of the column is."""
        if self.take == "list":
            return "numbers" if self.what == "measurement" else "codes"
        return "number" if self.what == "age" or self.take in ("count", "last") else "code"


class Single(Strict):
    """A feature or label that is one column, ``name``; ``source`` says what gives it where data are coded."""

    gives: ClassVar[tuple[Gives, ...]]
    name: Column
    source: Annotated[Derived | None, Field(exclude_if=lambda value: value is None)] = None

    @model_validator(mode="after")
    def _source_gives(self) -> Self:
        if self.source is not None and self.source.gives not in self.gives:
            raise broken("source.take", f"must give {' or '.join(self.gives)} here, not {self.source.gives}")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``encode`` takes, in order."""
        return (self.name,)

    @property
    def derived(self) -> dict[str, Derived]:
        """What gives each column where data are coded."""
        return {} if self.source is None else {self.name: self.source}


class Number(Single):
    """A numeric column, scaled to [-1, 1] by its public range in ``unit``.

    ``log`` takes the logarithm of value and range first. ``missing`` is what stands for an absent value, in
    raw units; without it an absent value is 0 after scaling. ``citation`` says where the range comes from;
    ``analyte`` what is measured, so that a hospital's other unit can be converted. With ``present`` a second
    coordinate is 1 where there is a value.
    """

    gives: ClassVar[tuple[Gives, ...]] = ("number", "numbers")
    kind: Literal["number"]
    unit: Annotated[str, Field(max_length=64), PRINTABLE]
    minimum: Finite
    maximum: Finite
    citation: Line = ""
    transform: Literal["linear", "log"] = "linear"
    missing: Finite | None = None
    analyte: Annotated[Analyte, Field(exclude_if=lambda value: not value)] = ""
    present: Annotated[bool, Field(exclude_if=lambda value: not value)] = False

    @model_validator(mode="after")
    def _range_holds(self) -> Self:
        if not self.minimum < self.maximum:
            raise broken("maximum", "must be above minimum")
        if self.transform == "log" and self.minimum <= 0:
            raise broken("minimum", "must be above 0 for a log transform")
        if self.missing is not None and not self.minimum <= self.missing <= self.maximum:
            raise broken("missing", "must be inside minimum and maximum")
        low, high = self._bounds
        if high <= low or not math.isfinite(2.0 / (high - low)):
            raise broken("maximum", "must be further above minimum: the range has no width in float64")
        return self

    @property
    def _bounds(self) -> tuple[float, float]:
        if self.transform == "log":
            return math.log(self.minimum), math.log(self.maximum)
        return self.minimum, self.maximum

    @property
    def width(self) -> int:
        """Coordinates of this feature."""
        return 2 if self.present else 1

    def encode(self, *values: Values) -> NDArray[np.float64]:
        """float64 [n, width] in [-1, 1]; unparsable and non-finite values count as absent."""
        raw = numbers_of(values[0])
        blocks = [self.scaled(raw), np.isfinite(raw).astype(np.float64)]
        return np.stack(blocks[: self.width], axis=1)

    def scaled(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        """Raw values of any shape, NaN for absent, in [-1, 1]."""
        low, high = self._bounds
        absent = np.isnan(raw)
        inside = np.clip(np.where(absent, self.minimum, raw), self.minimum, self.maximum)
        result = self._between(inside, low, high)
        result[absent] = (
            0.0 if self.missing is None else self._between(np.array([self.missing]), low, high)[0]
        )
        return result

    def _between(self, inside: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
        if self.transform == "log":
            # One at a time: a vectorised logarithm may round by the position in the array.
            logs = np.array(list(map(math.log, inside.ravel().tolist())), dtype=np.float64)
            inside = logs.reshape(inside.shape)
        return np.clip(2.0 * (inside - low) / (high - low) - 1.0, -1.0, 1.0)


class Category(Single):
    """A coded column as one coordinate for each code, 1 where it holds; an unknown code is all zeros.

    Codes are compared as text, blanks around them ignored; a whole number is compared without decimals.
    """

    gives: ClassVar[tuple[Gives, ...]] = ("code",)
    kind: Literal["category"]
    codes: Annotated[tuple[Code, ...], LISTED, Field(min_length=1, max_length=10_000), DIFFERENT]

    @property
    def width(self) -> int:
        """Coordinates of this feature: the number of codes."""
        return len(self.codes)

    def encode(self, *values: Values) -> NDArray[np.float64]:
        """float64 [n, codes], each row zeros or one 1."""
        chosen = positions_of(values[0], self.codes)
        rows = np.zeros((len(chosen), len(self.codes)), dtype=np.float64)
        known = np.flatnonzero(chosen != UNUSABLE)
        rows[known, chosen[known]] = 1.0
        return rows
