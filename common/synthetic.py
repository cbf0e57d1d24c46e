"""Rows that look like a contract's and are nobody's: for trying a study out before a hospital sees it.

Source: DESIGN.md "Three people, one program". Rules: made from the contract and a seed alone; every row is
marked twice, by its patient's id and by the column ``synthetic``; columns are independent of each other, so
that nothing can be learnt from them.
"""

import json
import math
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Final

import duckdb
import numpy as np

from common.contract import (
    Amount,
    Category,
    Contract,
    Events,
    Feature,
    Image,
    Label,
    Number,
    Series,
    Text,
    TimeToEvent,
)
from common.errors import UsageError

MARK: Final = "synthetic"
MAX_ROWS: Final = 1_000_000
MAX_LISTED: Final = 20
"""Entries of a list or words of a text, at the most."""

ABSENT: Final = 0.05
"""The share of cells of a feature that are empty."""

FORMATS: Final = {".csv": "csv, header", ".parquet": "parquet", ".ndjson": "json"}

_Generator = np.random.Generator
_Column = Sequence[str | float | None]


def write(contract: Contract, rows: int, seed: int, out: Path) -> None:
    """Write ``rows`` rows (1 to MAX_ROWS) as CSV, Parquet or NDJSON, by the suffix of ``out``.

    Guarantee: synthetic_rows_fit_the_contract - every row is usable and every value inside its range.
    Guarantee: synthetic_rows_are_marked - each one, whatever of the file is kept.
    Guarantee: the_seed_decides_all - equal arguments give equal bytes of CSV and NDJSON.
    Raises: UsageError for another suffix, a file that exists, or a contract with images or a query.
    """
    if out.suffix not in FORMATS or out.exists():
        problem = f"{out} exists already" if out.suffix in FORMATS else f"{out.name} has no suffix known here"
        remedy = f"Name a new file that ends in {', '.join(FORMATS)}."
        raise UsageError("output.file", problem, remedy=remedy)
    if contract.query or any(isinstance(feature, Image) for feature in contract.features):
        problem = "no table can be made for a contract with images or a query"
        remedy = "Leave them out of the contract for a try."
        raise UsageError("synthetic.contract", problem, remedy=remedy)
    generator = np.random.default_rng(seed)
    columns: dict[str, _Column] = dict(_columns(contract, rows, generator))
    if MARK not in columns:
        columns[MARK] = ("true",) * rows
    chosen = []
    for at, (name, column) in enumerate(columns.items()):
        kind = "DOUBLE" if any(isinstance(cell, float) for cell in column) else "VARCHAR"
        quoted = name.replace('"', '""')
        chosen.append(f'CAST(c{at} AS {kind}) AS "{quoted}"')
    with duckdb.connect(":memory:") as connection:
        arrays = {f"c{at}": np.array(column, dtype=object) for at, column in enumerate(columns.values())}
        connection.register("made", arrays)
        path = str(out).replace("'", "''")
        try:
            rows_of = f"SELECT {', '.join(chosen)} FROM made"
            connection.execute(f"COPY ({rows_of}) TO '{path}' (FORMAT {FORMATS[out.suffix]})")
        except duckdb.IOException as error:
            remedy = "Name a file in a folder that exists and can be written to."
            raise UsageError("output.file", f"{out} cannot be written", remedy=remedy) from error


def _columns(contract: Contract, rows: int, generator: _Generator) -> Sequence[tuple[str, _Column]]:
    per_patient = generator.integers(1, contract.rows_per_patient + 1, rows)
    numbers = np.repeat(np.arange(rows), per_patient)[:rows]
    made: list[tuple[str, _Column]] = [(contract.patient, [f"{MARK}-{number:07}" for number in numbers])]
    for feature in contract.features:
        for name in feature.columns:
            cell = _cell(feature, name)
            absent = generator.random(rows) < ABSENT
            made.append((name, [None if empty else cell(generator) for empty in absent]))
    label = contract.label
    if isinstance(label, Label):
        made.append((label.name, _picked(label.classes, rows, generator)))
    elif isinstance(label, Amount):
        made.append((label.name, [_number(label, generator) for _ in range(rows)]))
    elif isinstance(label, TimeToEvent):
        made.append((label.name, [float(f"{t:.6g}") for t in generator.uniform(0, label.ends[-1], rows)]))
        made.append((label.event, _picked(label.codes, rows, generator)))
    window = contract.window
    if window is not None and window.column not in dict(made):
        first = date.fromisoformat(window.first)
        days = generator.integers(0, (date.fromisoformat(window.last) - first).days + 1, rows)
        made.append((window.column, [(first + timedelta(int(day))).isoformat() for day in days]))
    return made


def _cell(feature: Feature, name: str) -> Callable[[_Generator], str | float]:
    """What makes one cell of a column."""
    if isinstance(feature, Number):
        return lambda generator: _number(feature, generator)
    if isinstance(feature, Category):
        return lambda generator: str(generator.choice(feature.codes))
    if isinstance(feature, Text):
        return lambda generator: " ".join(_picked(feature.vocabulary, _length(generator), generator))
    if isinstance(feature, Events):
        horizon = feature.horizon or 365.0
        return lambda generator: _list(
            _picked(feature.codes, _length(generator), generator), -horizon, 0.0, generator
        )
    if isinstance(feature, Series):
        channel = next(c for c in feature.channels if name == c.name or name.startswith(f"{c.name}_"))
        if feature.wide:
            return lambda generator: _number(channel, generator)
        end = feature.start + feature.steps * feature.step
        return lambda generator: _list(
            [_number(channel, generator) for _ in range(_length(generator))], feature.start, end, generator
        )
    raise TypeError(f"no cell is made for {type(feature).__name__}")


def _number(number: Number, generator: _Generator) -> float:
    if number.transform == "log":
        drawn = math.exp(generator.uniform(math.log(number.minimum), math.log(number.maximum)))
    else:
        drawn = generator.uniform(number.minimum, number.maximum)
    return min(max(float(f"{drawn:.6g}"), number.minimum), number.maximum)


def _picked(codes: Sequence[str], count: int, generator: _Generator) -> list[str]:
    return [str(codes[int(at)]) for at in generator.integers(0, len(codes), count)]


def _length(generator: _Generator) -> int:
    return int(generator.integers(1, MAX_LISTED + 1))


def _list(values: Sequence[object], first: float, last: float, generator: _Generator) -> str:
    """A list with times, as JSON."""
    times = sorted(float(f"{time:.6g}") for time in generator.uniform(first, last, len(values)))
    return json.dumps([{"t": time, "v": value} for time, value in zip(times, values, strict=True)])
