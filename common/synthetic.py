"""Rows that look like a contract's and are nobody's, with something in them to learn.

Source: DESIGN.md "Three people, one program". Rules: made from contract and seed alone; every row is
marked twice, by its patient's id and by the column ``synthetic``; what is planted is stated here, so that
what a method finds can be compared with it.

What is planted. Two hidden numbers a row move its numbers, series and images together (an autoencoder's
anomalies are rows where they do not). Words and codes come in runs of a topic, four neighbours of the
vocabulary each. The label follows the signal: the weighted sum, standardised, of what the features say. A
second feature of tokens beside one of text is its translation: the words at places 0, 3, 6... of the
vocabulary have a code each.
"""

import json
import math
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias

import duckdb
import numpy as np
from numpy.typing import NDArray

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

ANOMALOUS: Final = 0.15
"""The share of rows of the last class where anomalies are planted."""

FORMATS: Final = {".csv": "csv, header", ".parquet": "parquet", ".ndjson": "json"}
TOPIC: Final = 4
STEEPNESS: Final = 3.0
"""Log odds of a label for one standard deviation of the signal."""

_Generator: TypeAlias = np.random.Generator
_Cells: TypeAlias = Sequence[object]
_Signal: TypeAlias = NDArray[np.floating[Any]]


def columns_of(contract: Contract, rows: int, seed: int, *, anomalies: bool = False) -> dict[str, _Cells]:
    """The columns of ``rows`` rows; an image's cells are its pixels, float64 [height * width].

    Guarantee: the_seed_decides_all - equal arguments give equal cells.
    """
    generator = np.random.default_rng(seed)
    per_patient = generator.integers(1, contract.rows_per_patient + 1, rows)
    numbers = np.repeat(np.arange(rows), per_patient)[:rows]
    hidden = generator.normal(size=(rows, 2))
    strange = generator.random(rows) < ANOMALOUS if anomalies else np.zeros(rows, dtype=np.bool_)
    made: dict[str, _Cells] = {contract.patient: [f"{MARK}-{number:07}" for number in numbers]}
    signal, source = np.zeros(rows), None
    for at, feature in enumerate(contract.features):
        if isinstance(feature, Events) and source is not None:
            made[feature.name] = _translated(source, made[source.name], feature)
            continue
        cells, says = _feature(feature, at, hidden, strange, generator)
        made |= cells
        signal += (0.9**at) * says
        if isinstance(feature, Text) and len(contract.features) == 2:
            source = feature
    spread = float(signal.std())
    made |= _label(contract, signal / spread if spread > 0 else signal, strange, anomalies, generator)
    window = contract.window
    if window is not None and window.column not in made:
        first = date.fromisoformat(window.first)
        days = generator.integers(0, (date.fromisoformat(window.last) - first).days + 1, rows)
        made[window.column] = [(first + timedelta(int(day))).isoformat() for day in days]
    return made


def write(contract: Contract, rows: int, seed: int, out: Path, *, anomalies: bool = False) -> None:
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
    columns = columns_of(contract, rows, seed, anomalies=anomalies)
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


def _feature(
    feature: Feature, at: int, hidden: _Signal, strange: NDArray[np.bool_], generator: _Generator
) -> tuple[dict[str, _Cells], _Signal]:
    """The columns of one feature, and what it says of the label, about one standard deviation."""
    rows = len(hidden)
    if isinstance(feature, Number):
        scaled = _scaled(at, hidden, strange, generator)
        absent = generator.random(rows) < ABSENT
        sign = 1.0 if at % 2 == 0 else -1.0
        return {feature.name: _raw(feature, scaled, absent)}, sign * 3 * np.where(absent, 0.0, scaled)
    if isinstance(feature, Category):
        places = generator.integers(0, len(feature.codes), rows)
        cells = [feature.codes[place] for place in places]
        return {feature.name: cells}, 0.5 * (places / max(1, len(feature.codes) - 1) - 0.5)
    if isinstance(feature, Series):
        return _series(feature, at, hidden, strange, generator)
    if isinstance(feature, Image):
        return _image(feature, hidden, generator)
    terms = feature.vocabulary if isinstance(feature, Text) else feature.codes
    lists = [_topics(len(terms), generator) for _ in range(rows)]
    lists = [found[-feature.length :] if isinstance(feature, Events) else found for found in lists]
    # Even topics speak for the label, odd ones against it.
    says = np.array([np.mean([1.0 if term // TOPIC % 2 == 0 else -1.0 for term in found]) for found in lists])
    if isinstance(feature, Text):
        return {feature.name: [" ".join(terms[term] for term in found) for found in lists]}, 2 * says
    horizon = feature.horizon or 365.0
    named = [[terms[term] for term in found] for found in lists]
    return {feature.name: [_list(found, -horizon, 0.0, generator) for found in named]}, 2 * says


def _label(
    contract: Contract, signal: _Signal, strange: NDArray[np.bool_], anomalies: bool, generator: _Generator
) -> dict[str, _Cells]:
    label, rows = contract.label, len(signal)
    if isinstance(label, Label) and anomalies:
        return {label.name: [label.classes[-1] if odd else label.classes[0] for odd in strange]}
    if isinstance(label, Label):
        # Between classes lie the quantiles of the signal, and the noise of a logistic regression.
        noisy = signal + generator.logistic(size=rows) / STEEPNESS
        cuts = np.quantile(noisy, np.arange(1, len(label.classes)) / len(label.classes))
        places = np.searchsorted(cuts, noisy)
        return {label.name: [label.classes[place] for place in places]}
    if isinstance(label, Amount):
        scaled = np.clip(0.35 * signal + 0.1 * generator.normal(size=rows), -1, 1)
        return {label.name: _raw(label, scaled, np.zeros(rows, dtype=np.bool_))}
    if isinstance(label, TimeToEvent):
        # Proportional hazards: half have had the event by the middle of the grid.
        last = label.ends[-1]
        times = generator.exponential(size=rows) * np.exp(-signal) * last / 2 / math.log(2)
        ends = generator.uniform(0.3, 1.3, rows) * last
        seen = np.minimum(times, ends)
        return {
            label.name: [float(f"{time:.6g}") for time in seen],
            label.event: [label.codes[int(event)] for event in times <= ends],
        }
    return {}


def _scaled(at: int, hidden: _Signal, strange: NDArray[np.bool_], generator: _Generator) -> _Signal:
    """One number of each row in [-1, 1]: a turn of the hidden ones, or where strange of others."""
    angle = 2.4 * at
    others = generator.normal(size=hidden.shape) * 1.5
    from_ = np.where(strange[:, None], others, hidden)
    turned = math.cos(angle) * from_[:, 0] + math.sin(angle) * from_[:, 1]
    return np.clip((turned + 0.4 * generator.normal(size=len(hidden))) / 3.0, -1.0, 1.0)


def _raw(number: Number, scaled: _Signal, absent: NDArray[np.bool_]) -> list[object]:
    """Scaled values as a hospital would write them: in the contract's unit, to six digits."""
    low, high = number.minimum, number.maximum
    share = (scaled + 1.0) / 2.0
    if number.transform == "log":
        values = np.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    else:
        values = low + share * (high - low)
    return [
        None if empty else min(max(float(f"{value:.6g}"), low), high)
        for value, empty in zip(values, absent, strict=True)
    ]


def _series(
    feature: Series, at: int, hidden: _Signal, strange: NDArray[np.bool_], generator: _Generator
) -> tuple[dict[str, _Cells], _Signal]:
    """Each channel drifts from 0 to where the hidden numbers say; a step in ten is not measured."""
    rows, ramp = len(hidden), np.linspace(0.0, 1.0, feature.steps)
    made: dict[str, _Cells] = {}
    says = np.zeros(rows)
    for place, channel in enumerate(feature.channels):
        end = _scaled(at + place, hidden, strange, generator)
        values = np.clip(end[:, None] * ramp + 0.15 * generator.normal(size=(rows, feature.steps)), -1, 1)
        absent = generator.random(values.shape) < 2 * ABSENT
        says += (3.0 if place % 2 == 0 else -3.0) * end
        raw = [_raw(channel, values[row], absent[row]) for row in range(rows)]
        if feature.wide:
            made |= {f"{channel.name}_{i}": [cells[i] for cells in raw] for i in range(feature.steps)}
            continue
        times = [feature.start + (i + 0.5) * feature.step for i in range(feature.steps)]
        made[channel.name] = [
            json.dumps([{"t": t, "v": v} for t, v in zip(times, cells, strict=True) if v is not None])
            for cells in raw
        ]
    return made, says


def _image(feature: Image, hidden: _Signal, generator: _Generator) -> tuple[dict[str, _Cells], _Signal]:
    """A bright spot, to the left or to the right of the middle by the first hidden number."""
    down, across = np.mgrid[0 : feature.height, 0 : feature.width_px]
    middle = np.tanh(hidden[:, 0])
    found = []
    for place in middle:
        x = (0.5 + 0.3 * place) * (feature.width_px - 1)
        y = generator.uniform(0.3, 0.7) * (feature.height - 1)
        spot = np.exp(-((across - x) ** 2 + (down - y) ** 2) / (feature.width_px / 5) ** 2)
        pixels = np.clip(spot + 0.1 * generator.normal(size=spot.shape), 0, 1)
        found.append((feature.low + pixels * (feature.high - feature.low)).ravel())
    return {feature.name: found}, middle


def _topics(terms: int, generator: _Generator) -> list[int]:
    """Places in a vocabulary, in runs of one topic each."""
    topics = max(1, terms // TOPIC)
    found: list[int] = []
    wanted = int(generator.integers(1, MAX_LISTED + 1))
    while len(found) < wanted:
        start = TOPIC * int(generator.integers(0, topics))
        size = min(TOPIC, terms - start)
        found += [start + int(at) for at in generator.integers(0, size, 5)]
    return found[:wanted]


def _translated(source: Text, texts: _Cells, target: Events) -> list[object]:
    """The codes of the words that have one, in their order."""
    place = {word: at for at, word in enumerate(source.vocabulary)}
    found: list[object] = []
    for text in texts:
        places = [place[word] for word in str(text).split()]
        codes = [target.codes[(at // 3) % len(target.codes)] for at in places if at % 3 == 0]
        found.append(json.dumps(codes[: target.length]))
    return found


def _list(values: Sequence[object], first: float, last: float, generator: _Generator) -> str:
    """A list with times, as JSON."""
    times = sorted(float(f"{time:.6g}") for time in generator.uniform(first, last, len(values)))
    return json.dumps([{"t": time, "v": value} for time, value in zip(times, values, strict=True)])
