"""The data contract: which columns a study reads, what they mean, and how a row becomes numbers.

Source: PRIVACY.md "Everything upstream is separable by patient"; DESIGN.md "Privacy" (scaling from public
ranges). Rules: ranges, codes and constants are public and stand in the contract; nothing is ever taken from
the rows; encoding is total, so no cell can make it fail, and each row's numbers depend on that row alone.
"""

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Final, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from common.errors import ContractError

STRICT: Final = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
LARGEST: Final = 1e15
"""Bound of every float in a manifest: below 2^53, so that its RFC 8785 form reads back as itself."""
MAX_WIDTH: Final = 100_000
UNUSABLE: Final = -1
NUMBER: Final = r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
"""Text of a number: decimal point, ASCII digits, no grouping; the same expression for RE2 and Python."""
BLANKS: Final = " \t\r\n\v\f"
"""What is ignored around the text of a cell."""

_NUMBER: Final = re.compile(NUMBER)


def broken(field: str, rule: str) -> PydanticCustomError:
    """A broken rule between fields, told at ``field`` (dotted, below the model that checks it)."""
    return PydanticCustomError("rule", "{rule}", {"field": field, "rule": rule})


def _as_tuple(value: object) -> object:
    # TOML and JSON know lists only; strict validation wants the tuple that a frozen model holds.
    return tuple(value) if isinstance(value, list) else value


def _printable(value: str) -> str:
    # What a person approves must look like what it is: no control or direction characters, no stray blanks.
    if not value.isprintable() or value != value.strip():
        raise ValueError("must be printable text on one line without blanks around it")
    return value


def _different(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise ValueError("must differ from each other")
    return values


LISTED: Final = BeforeValidator(_as_tuple)
DIFFERENT: Final = AfterValidator(_different)
Column: TypeAlias = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]
Code: TypeAlias = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Line: TypeAlias = Annotated[str, Field(max_length=2000), AfterValidator(_printable)]
Finite: TypeAlias = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Values: TypeAlias = Sequence[object] | NDArray[np.float64]


class Strict(BaseModel):
    """A frozen document: unknown fields, values of another JSON type, NaN and infinity are refused."""

    model_config = STRICT


class Number(Strict):
    """A numeric column, scaled to [-1, 1] by its public range in ``unit``.

    ``log`` takes the logarithm of value and range first. ``missing`` is what stands for an absent value, in
    raw units; without it an absent value is 0 after scaling. ``citation`` says where the range comes from.
    """

    kind: Literal["number"]
    name: Column
    unit: Annotated[str, Field(max_length=64), AfterValidator(_printable)]
    minimum: Finite
    maximum: Finite
    citation: Line = ""
    transform: Literal["linear", "log"] = "linear"
    missing: Finite | None = None

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
        """Coordinates of this feature: 1."""
        return 1

    def encode(self, values: Values) -> NDArray[np.float64]:
        """float64 [n, 1] in [-1, 1]; unparsable and non-finite values count as absent."""
        low, high = self._bounds
        raw = values if isinstance(values, np.ndarray) and values.dtype == np.float64 else _numbers(values)
        absent = ~np.isfinite(raw)
        clamped = np.clip(np.where(absent, self.minimum, raw), self.minimum, self.maximum)
        scaled = self._scaled(clamped, low, high)
        scaled[absent] = 0.0 if self.missing is None else self._scaled(np.array([self.missing]), low, high)[0]
        return scaled[:, np.newaxis]

    def _scaled(self, inside: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
        if self.transform == "log":
            # One at a time: a vectorised logarithm may round by the position in the array.
            inside = np.array(list(map(math.log, inside.tolist())), dtype=np.float64)
        return np.clip(2.0 * (inside - low) / (high - low) - 1.0, -1.0, 1.0)


class Category(Strict):
    """A coded column as one coordinate for each code, 1 where it holds; an unknown code is all zeros.

    Codes are compared as text, blanks around them ignored; a whole number is compared without decimals.
    """

    kind: Literal["category"]
    name: Column
    codes: Annotated[tuple[Code, ...], LISTED, Field(min_length=1, max_length=10_000), DIFFERENT]

    @property
    def width(self) -> int:
        """Coordinates of this feature: the number of codes."""
        return len(self.codes)

    def encode(self, values: Values) -> NDArray[np.float64]:
        """float64 [n, codes], each row zeros or one 1."""
        chosen = _positions(values, self.codes)
        rows = np.zeros((len(chosen), len(self.codes)), dtype=np.float64)
        known = np.flatnonzero(chosen != UNUSABLE)
        rows[known, chosen[known]] = 1.0
        return rows


class Label(Strict):
    """The column that a model learns: its classes, in the order of the model's outputs."""

    name: Column
    classes: Annotated[tuple[Code, ...], LISTED, Field(min_length=2, max_length=1000), DIFFERENT]


Feature: TypeAlias = Annotated[Number | Category, Field(discriminator="kind")]


class Contract(Strict):
    """What a hospital's table must hold: a patient column, features, a label.

    ``rows_per_patient`` K: at most so many rows of one patient are used. ``holdout``: the share of patients
    whom each hospital keeps out of training, by its own secret.
    """

    patient: Column
    rows_per_patient: Annotated[int, Field(ge=1, le=1000)] = 1
    holdout: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    features: Annotated[tuple[Feature, ...], LISTED, Field(min_length=1, max_length=MAX_WIDTH)]
    label: Label

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        seen = {self.patient.casefold()}
        places = [(f"features.{i}.name", f.name) for i, f in enumerate(self.features)]
        for place, name in [("label.name", self.label.name), *places]:
            # Databases do not tell "Age" from "age"; a contract that needs the difference can't be met.
            if name.casefold() in seen:
                raise broken(place, "must differ from every other column in more than upper and lower case")
            seen.add(name.casefold())
        if self.width > MAX_WIDTH:
            raise broken("features", f"must have at most {MAX_WIDTH} coordinates together")
        return self

    @property
    def width(self) -> int:
        """Coordinates of an encoded row."""
        return sum(feature.width for feature in self.features)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``encode`` needs, the patient column not among them: features in order, label."""
        return (*(feature.name for feature in self.features), self.label.name)

    def encode(self, columns: Mapping[str, Values]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Rows as numbers: float64 [n, width] in [-1, 1] and int64 [n] classes, -1 where unusable.

        A value is any object; float64 arrays (NaN for absent) are taken as they are. Other columns in
        ``columns`` are ignored.

        Guarantee: each_row_is_encoded_alone - adding, changing or reordering other rows changes no bit.
        Guarantee: encoding_is_total - no cell value raises, and every result is finite and inside [-1, 1].
        Raises: ContractError when a column is missing or columns differ in length.
        """
        absent = [name for name in self.columns if name not in columns]
        if absent:
            problem = f"the table has no column {absent[0]!r}, which the contract needs"
            remedy = "Add the column to the extract, or ask the coordinator to change the contract."
            raise ContractError("contract.column", problem, remedy=remedy)
        if len({len(columns[name]) for name in self.columns}) != 1:
            raise ContractError("contract.length", "the table's columns have different lengths")
        blocks = [feature.encode(columns[feature.name]) for feature in self.features]
        return np.concatenate(blocks, axis=1), _positions(columns[self.label.name], self.label.classes)


def text_of(value: object) -> str | None:
    """A cell as the text that codes are compared with: None when absent, whole numbers without decimals."""
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    number = _number(value) if not isinstance(value, str) else math.nan
    if abs(number) < 2**53:
        return str(int(number)) if number.is_integer() else repr(number)
    return value.strip(BLANKS) if isinstance(value, str) else None


def _positions(values: Values, codes: tuple[str, ...]) -> NDArray[np.int64]:
    position = {code: index for index, code in enumerate(codes)}
    found = (position.get(text_of(value) or "", UNUSABLE) for value in values)
    return np.fromiter(found, dtype=np.int64, count=len(values))


def _numbers(values: Values) -> NDArray[np.float64]:
    return np.fromiter((_number(value) for value in values), dtype=np.float64, count=len(values))


def _number(value: object) -> float:
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
