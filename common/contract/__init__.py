"""The data contract: which columns a study reads, what they mean, and how a row becomes numbers.

Source: PRIVACY.md "Everything upstream is separable by patient"; DESIGN.md "Privacy" (scaling from public
ranges). Rules: ranges, codes, vocabularies and constants are public and stand in the contract; nothing is
ever taken from the rows; encoding is total, so no cell can make it fail, and each row's numbers depend on
that row alone.
"""

import tomllib
from collections.abc import Collection, Mapping
from datetime import date
from typing import Annotated, Final, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationError, model_validator

from common.contract.cells import UNUSABLE, Values, text_of
from common.contract.features import Category, Derived, Number
from common.contract.fields import (
    DIFFERENT,
    LARGEST,
    LISTED,
    PRINTABLE,
    STRICT,
    Code,
    Column,
    Finite,
    Line,
    Strict,
    broken,
    refuse,
)  # fmt: skip
from common.contract.labels import Amount, AnyLabel, Label, LabelField, NoLabel, TimeToEvent, labels_of
from common.contract.sequences import Events, Image, Series, Text
from common.errors import ContractError, UsageError

__all__ = [
    "FORMS", "LARGEST", "LISTED", "PRINTABLE", "STRICT", "UNUSABLE", "Amount", "AnyLabel", "Category",
    "Code", "Column", "Contract", "Derived", "Events", "Feature", "Finite", "Form", "Image", "Label",
    "Line", "NoLabel", "Number", "PublicTable", "Series", "Strict", "Text", "TimeToEvent", "Values",
    "Window", "broken", "refuse", "text_of",
]  # fmt: skip

Form: TypeAlias = Literal["columns", "omop", "fhir"]
FORMS: Final[tuple[Form, ...]] = ("columns", "omop", "fhir")
MAX_WIDTH: Final = 1_000_000
MAX_QUERY: Final = 20_000

Feature: TypeAlias = Annotated[
    Number | Category | Series | Events | Text | Image, Field(discriminator="kind")
]


def _day(value: str) -> str:
    if date.fromisoformat(value).isoformat() != value:
        raise ValueError("must be a day as YYYY-MM-DD")
    return value


def _statement(value: str) -> str:
    if not all(c.isprintable() or c == "\n" for c in value) or value != value.strip():
        raise ValueError("must be printable text without blanks around it")
    return value


Day: TypeAlias = Annotated[str, Field(min_length=10, max_length=10), AfterValidator(_day)]
Cell: TypeAlias = Annotated[str, Field(max_length=200), PRINTABLE]


class Window(Strict):
    """Rows whose date in ``column`` is before ``first`` or after ``last``, or is none, are left out."""

    column: Column
    first: Day
    last: Day

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.first > self.last:
            raise broken("last", "must not be before first")
        return self


class PublicTable(Strict):
    """A small public lookup table for the query: its columns hold text."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
    columns: Annotated[tuple[Column, ...], LISTED, Field(min_length=1, max_length=64), DIFFERENT]
    rows: Annotated[tuple[Annotated[tuple[Cell, ...], LISTED], ...], LISTED, Field(max_length=10_000)]

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        for at, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise broken(f"rows.{at}", f"must have {len(self.columns)} cells")
        return self


class Contract(Strict):
    """What a hospital's table must hold: a patient column, features, a label or none.

    ``rows_per_patient`` K: at most so many rows of one patient are used. ``holdout``: the share of patients
    whom each hospital keeps out of training, by its own secret. ``query``: one SELECT that makes the columns
    out of the hospital's tables and the public ``tables``, separably by patient.
    """

    patient: Column
    rows_per_patient: Annotated[int, Field(ge=1, le=1000)] = 1
    holdout: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    features: Annotated[tuple[Feature, ...], LISTED, Field(min_length=1, max_length=100_000)]
    label: LabelField
    window: Annotated[Window | None, Field(exclude_if=lambda value: value is None)] = None
    query: Annotated[
        str, Field(max_length=MAX_QUERY, exclude_if=lambda value: not value), AfterValidator(_statement)
    ] = ""
    tables: Annotated[
        tuple[PublicTable, ...], LISTED, Field(max_length=32, exclude_if=lambda value: not value)
    ] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        seen = {self.patient.casefold()}
        places = [("label.name", name) for name in self.label.columns]
        for i, feature in enumerate(self.features):
            # The name of several columns together is a name too: a reader must not take it for another.
            own = () if feature.name in feature.columns else (feature.name,)
            places += [(f"features.{i}.name", name) for name in (*feature.columns, *own)]
        for place, name in places:
            # Databases do not tell "Age" from "age"; a contract that needs the difference can't be met.
            if name.casefold() in seen:
                raise broken(place, "must differ from every other column in more than upper and lower case")
            seen.add(name.casefold())
        if self.width > MAX_WIDTH:
            raise broken("features", f"must have at most {MAX_WIDTH} coordinates together")
        if self.tables and not self.query:
            raise broken("tables", "must be left out without a query")
        if self.query and self.derived:
            raise broken("query", "must be left out where columns are derived from coded data")
        return self

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read a contract, or that of a study file.

        Raises: UsageError as for a study.
        """
        try:
            value = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"the file is not valid TOML: {error}"
            raise UsageError("study.toml", problem, remedy="Correct that line.") from error
        try:
            return cls.model_validate(value.get("contract", value))
        except ValidationError as error:
            refuse("study.contract", error)

    @property
    def width(self) -> int:
        """Coordinates of an encoded row."""
        return sum(feature.width for feature in self.features)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``encode`` needs, the patient column not among them: features in order, label."""
        return (*(name for feature in self.features for name in feature.columns), *self.label.columns)

    @property
    def derived(self) -> dict[str, Derived]:
        """What gives each column where data are coded, by column."""
        pairs = [feature.derived for feature in self.features] + [self.label.derived]
        return {name: source for found in pairs for name, source in found.items()}

    def beyond(self, allowed: Collection[str], form: Form = "columns") -> list[str]:
        """What this contract reads of a source whose policy allows only ``allowed``.

        Of a source with codes (``form`` omop or fhir) a policy allows ``age``, ``sex``, ``condition:<code>``,
        ``drug:*``. A query sees nothing but the columns that are allowed.
        """
        if form == "columns":
            window = () if self.window is None else (self.window.column,)
            return [] if self.query else [name for name in (*self.columns, *window) if name not in allowed]
        found = []
        for name in self.columns:
            source = self.derived.get(name)
            if source is None:
                found.append(name)
            elif f"{source.what}:*" not in allowed:
                codes = source.omop if form == "omop" else source.fhir
                named = [f"{source.what}:{code}" for code in codes]
                plain = source.what if source.what in ("age", "sex") else f"{source.what}:*"
                found += [name for name in named or [plain] if name not in allowed]
        return found

    def encode(self, columns: Mapping[str, Values]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Rows as numbers: float64 [n, width] and int64 [n] labels, -1 where unusable.

        A value is any object; float64 arrays (NaN for absent) and int64 arrays (places among the codes, -1
        for none) are taken as they are. Other columns in ``columns`` are ignored.

        Guarantee: each_row_is_encoded_alone - adding, changing or reordering other rows changes no bit.
        Guarantee: encoding_is_total - no cell value raises, and every result is finite and inside [-1, 1], a
        token a whole number.
        Raises: ContractError when a column is missing or columns differ in length.
        """
        absent = [name for name in self.columns if name not in columns]
        if absent:
            problem = f"the table has no column {absent[0]!r}, which the contract needs"
            remedy = "Add the column to the extract, or ask the coordinator to change the contract."
            raise ContractError("contract.column", problem, remedy=remedy)
        if len({len(columns[name]) for name in self.columns}) != 1:
            raise ContractError("contract.length", "the table's columns have different lengths")
        blocks = [feature.encode(*(columns[name] for name in feature.columns)) for feature in self.features]
        return np.concatenate(blocks, axis=1), labels_of(self.label, columns, len(blocks[0]))
