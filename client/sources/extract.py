"""One source as the rows that a contract reads, a batch at a time, and as the table that training sees.

Source: PRIVACY.md "Everything upstream is separable by patient"; DESIGN.md "Libraries" (duckdb). Rules:
whatever the source is, it becomes one table ``extract`` whose files are then out of reach; types are turned
into the contract's by SQL, a cell never fails; the order of rows, batches and files changes nothing.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import duckdb
import numpy as np
from numpy.typing import NDArray

from client.sources import engine, files
from client.sources.engine import identifier, quoted
from client.sources.source import DataSource
from client.sources.table import NO_ID, ROUNDED, Part, Table, build_table, in_part
from common.contract import Category, Contract, Events, Feature, Image, Label, Number, Series, Text, Values
from common.contract.cells import BLANKS, NUMBER, UNUSABLE
from common.contract.units import factor
from common.errors import ContractError, FailureError

BATCH_ROWS: Final = 1 << 16
BATCH_CELLS: Final = 1 << 22
IN_MEMORY_SIZE_BYTES: Final = 1 << 28
"""Encoded rows beyond this lie in an unnamed file that ends with the process."""

_WHOLE: Final = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}
_WHOLE_TYPES: Final = _WHOLE | {f"U{name}" for name in _WHOLE}
_EXACT_BELOW: Final = {"FLOAT": 1 << 24, "DOUBLE": 1 << 53}
_PLAIN_TYPES: Final = {"VARCHAR", "DATE", "UUID", "BOOLEAN"}
_BLANKS: Final = " || ".join(f"chr({ord(blank)})" for blank in BLANKS)
_NO_ID: Final = ", ".join(quoted(text) for text in sorted(NO_ID))


@dataclass(frozen=True)
class Extract:
    """The table ``extract`` of a source in ``connection``.

    ``row`` is the column that numbers its rows from 0.
    """

    connection: duckdb.DuckDBPyConnection
    source: DataSource
    contract: Contract
    row: str

    @cached_property
    def types(self) -> dict[str, str]:
        """The columns of ``extract`` and their DuckDB types."""
        return {str(row[0]): str(row[1]) for row in self.run("DESCRIBE extract").fetchall()}

    def run(self, query: str) -> duckdb.DuckDBPyConnection:
        """Run SQL on ``extract``. Raises ContractError that holds no value."""
        remedy = files.REMEDIES.get(self.source.kind, "Check the source.")
        return engine.execute(self.connection, query, what=self.source.where, remedy=remedy)

    @property
    def patient(self) -> str:
        """SQL for the patient's id as text.

        NULL where a row names no one patient (see ``table.patient_id``).
        """
        text = self._text(self.contract.patient)
        return (
            f"CASE WHEN lower({text}) NOT IN ({_NO_ID}) AND NOT regexp_full_match({text}, {quoted(ROUNDED)}) "
            f"THEN {text} END"
        )

    @property
    def label(self) -> str:
        """SQL for the label's place among the classes, -1 for none."""
        return self._code(self.contract.label.name, self.contract.label.classes)

    @property
    def inside(self) -> str:
        """SQL for whether a row lies in the contract's window of dates."""
        window = self.contract.window
        if window is None:
            return "true"
        day = self.day(window.column)
        return f"coalesce({day} BETWEEN DATE {quoted(window.first)} AND DATE {quoted(window.last)}, false)"

    def day(self, name: str) -> str:
        """SQL for a column as a DATE, NULL where it is none."""
        column, kind = self._column(name)
        if kind == "DATE" or kind.startswith("TIMESTAMP"):
            return f"CAST({column} AS DATE)"
        text, form = self._text(name), self.source.mapped(name).date_format
        if form:
            return f"CAST(try_strptime({text}, {quoted(form)}) AS DATE)"
        return f"TRY_CAST({text} AS DATE)"

    def number(self, name: str, feature: Number) -> str:
        """SQL for a column as a DOUBLE in the contract's unit, NULL where it is no number."""
        column, kind = self._column(name)
        expression = _as_number(column, kind, self.source.decimal)
        if expression is None:
            raise self._wrong_type(name, kind, "numbers")
        own = self.source.mapped(feature.name).unit or feature.unit
        change = factor(feature.analyte, own, feature.unit)
        if change is None:
            problem = f"no conversion of {name!r} from {own} to {feature.unit} is known"
            remedy = (
                f"Convert the column in the extract, or correct the unit of {feature.name!r} in policy.toml."
            )
            raise ContractError("source.unit", problem, remedy=remedy)
        return expression if change == (1.0, 0.0) else f"{change[0]!r} * ({expression}) + {change[1]!r}"

    def batches(self) -> Iterator[tuple[int, dict[str, Values]]]:
        """The columns of the contract, a range of rows at a time, with the number of the first row."""
        chosen = [
            (name, self._expression(name, feature))
            for feature in (*self.contract.features, self.contract.label)
            for name in feature.columns
        ]
        selected = ", ".join(f"{text} AS v{index}" for index, (_, text) in enumerate(chosen))
        size = max(1, min(BATCH_ROWS, BATCH_CELLS // self.contract.width))
        for start in range(0, self.count(), size):
            where = f"{self.row} >= {start} AND {self.row} < {start + size}"
            found = self.run(f"SELECT {selected} FROM extract WHERE {where}").fetchnumpy()
            columns = {name: _values(found[f"v{index}"]) for index, (name, _) in enumerate(chosen)}
            yield start, columns

    def count(self) -> int:
        """How many rows there are."""
        found = self.run("SELECT count(*) FROM extract").fetchone()
        return int(found[0]) if found else 0

    def _expression(self, name: str, feature: Feature | Label) -> str:
        if isinstance(feature, Number):
            return self.number(name, feature)
        if isinstance(feature, Category):
            return self._code(name, feature.codes)
        if isinstance(feature, Label):
            return self._code(name, feature.classes)
        if isinstance(feature, Series) and feature.wide:
            channel = next(c for c in feature.channels if name.startswith(f"{c.name}_"))
            return self.number(name, channel)
        if isinstance(feature, Series | Events):
            return self._list(name, "DOUBLE" if isinstance(feature, Series) else "VARCHAR")
        if isinstance(feature, Text | Image):
            return self._text(name)
        raise TypeError(f"no column holds {type(feature).__name__}")

    def _text(self, name: str) -> str:
        column, kind = self._column(name)
        text = _as_text(column, kind)
        if text is None:
            raise self._wrong_type(name, kind, "text, whole numbers or dates")
        codes = self.source.mapped(name).codes
        if not codes:
            return text
        cases = " ".join(f"WHEN {quoted(own)} THEN {quoted(theirs)}" for own, theirs in codes.items())
        return f"CASE {text} {cases} ELSE {text} END"

    def _code(self, name: str, codes: tuple[str, ...]) -> str:
        among = ", ".join(quoted(code) for code in codes)
        return (
            f"coalesce(CAST(enum_code(TRY_CAST({self._text(name)} AS ENUM({among}))) AS BIGINT), {UNUSABLE})"
        )

    def _list(self, name: str, item: str) -> str:
        column, kind = self._column(name)
        if kind in ("VARCHAR", "JSON"):
            # A list in a file of text is JSON, of plain values or of objects with t and v.
            plain, timed = f"{item}[]", f"STRUCT(t DOUBLE, v {item})[]"
            parsed = f"TRY_CAST({column} AS JSON)"
            placed = "lambda x, i: {'t': (i - 1)::DOUBLE, 'v': x}"
            return (
                f"CASE WHEN json_type({parsed}, '$[0]') = 'OBJECT' THEN TRY_CAST({parsed} AS {timed}) "
                f"ELSE list_transform(TRY_CAST({parsed} AS {plain}), {placed}) END"
            )
        if not kind.endswith("[]"):
            raise self._wrong_type(name, kind, "lists")
        return column

    def _column(self, name: str) -> tuple[str, str]:
        types = self.types
        if name not in types:
            raise ContractError("source.column", f"{self.source.where} has no column {name!r}")
        return identifier(name), types[name]

    def _wrong_type(self, name: str, kind: str, needed: str) -> ContractError:
        problem = f"{self.source.where}: column {name!r} is {kind.split('(')[0]}, the contract needs {needed}"
        return ContractError("source.type", problem, remedy="Convert the column in the extract.")


@contextmanager
def opened(source: DataSource, contract: Contract) -> Iterator[Extract]:
    """The extract of a source, as this contract may see it.

    Guarantee: other_files_are_out_of_reach - this reads the source's own files and nothing else.
    Assumes: the file is well-formed, so that the bytes of one row don't reach into another.
    Raises: ContractError, also when a file has changed meanwhile; FailureError.
    """
    _refuse_query(contract)
    paths = [source.path] if source.kind not in ("fhir", "dicom", "omop", "sql") else []
    paths += [Path(text.partition(":")[2]) for text in source.tables.values()]
    real = [engine.regular_file(path) for path in paths]
    before = [_identity(path) for path in real]
    with _connected(source, contract, real) as extract:
        yield extract
        if [_identity(path) for path in real] != before:
            problem = f"{source.where} changed while it was read"
            remedy = "Write a new extract beside it and rename it into place."
            raise ContractError("source.changed", problem, remedy=remedy)


def _refuse_query(contract: Contract) -> None:
    if contract.query:
        problem = "this version runs no query on a source"
        raise ContractError("source.query", problem, remedy="Offer the study an extract in files.")


@contextmanager
def _connected(source: DataSource, contract: Contract, real: list[Path]) -> Iterator[Extract]:
    kind = source.kind
    if kind in ("csv", "parquet", "ndjson", "duckdb"):
        copied = kind != "parquet" or bool(contract.query)
        window = () if contract.window is None else (contract.window.column,)
        wanted = source.columns if contract.query else dict.fromkeys((*contract.columns, *window))
        # DuckDB looks for the log of a database file beside it.
        logs = [Path(f"{real[0]}.wal")] if kind == "duckdb" else []
        with engine.connect([*real, *logs]) as connection:
            files.fill(connection, source, list(dict.fromkeys((contract.patient, *wanted))), copied=copied)
            for name in source.tables if contract.query else ():
                files.fill_further(connection, source, name, (contract.patient, *source.columns))
            engine.lock(connection, copied=copied)
            yield Extract(connection, source, contract, "rowid" if copied else files.ROW)
        return
    raise ContractError("source.kind", f"a source of kind {kind} cannot be read here")


def load_table(source: DataSource, contract: Contract, *, key: bytes, part: Part = "train") -> Table:
    """The rows of one part of a source, as the contract reads them.

    ``key`` 32 secret bytes of the site for this study: it decides the split and which rows of a patient stay.

    Guarantee: all_kinds_agree - the same cells give the same table, whatever kind of file holds them.
    Raises: ContractError, FailureError.
    """
    with opened(source, contract) as extract:
        query = (
            f"SELECT r, p, y FROM (SELECT {extract.row} AS r, {extract.patient} AS p, {extract.label} AS y "
            f"FROM extract WHERE {extract.inside}) WHERE p IS NOT NULL AND y >= 0 ORDER BY p, r"
        )
        found = extract.run(query).fetchnumpy()
        ids = np.ma.filled(found["p"], None).astype(object)
        kept = in_part(ids, contract, key=key, part=part)
        ids, rows = ids[kept], np.ma.filled(found["r"], 0).astype(np.int64)[kept]
        y = np.ma.filled(found["y"], UNUSABLE).astype(np.int64)[kept]
        place = np.full(extract.count(), UNUSABLE, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        x = _allocated(len(rows), contract.width)
        for start, columns in extract.batches():
            encoded, _ = contract.encode(columns)
            into = place[start : start + len(encoded)]
            x[into[into != UNUSABLE]] = encoded[into != UNUSABLE]
    return build_table(ids, x, y, contract, key=key)


def _allocated(rows: int, width: int) -> NDArray[np.float64]:
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


def _identity(path: Path) -> tuple[int, int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0, 0
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _values(found: NDArray[np.generic]) -> Values:
    if found.dtype == np.float64:
        return np.ma.filled(found.astype(np.float64, copy=False), np.nan)
    if found.dtype == np.int64:
        return np.ma.filled(found.astype(np.int64, copy=False), UNUSABLE)
    return list(np.ma.filled(found.astype(object), None))


def _as_number(column: str, kind: str, decimal: str) -> str | None:
    if kind in ("VARCHAR", "JSON"):
        held = column if kind == "VARCHAR" else f"({column} ->> '$')"
        text = f"trim({held}, {_BLANKS})"
        if decimal == ",":
            text = f"replace({text}, ',', '.')"
        return f"CASE WHEN regexp_full_match({text}, {quoted(NUMBER)}) THEN TRY_CAST({text} AS DOUBLE) END"
    if kind in _WHOLE_TYPES | _EXACT_BELOW.keys() | {"BOOLEAN"} or kind.startswith("DECIMAL("):
        return f"CAST({column} AS DOUBLE)"
    return None


def _as_text(column: str, kind: str) -> str | None:
    """SQL for a cell as ``common.contract.text_of`` has it: whole numbers without decimals."""
    text = f"CAST({column} AS VARCHAR)"
    if kind == "JSON":
        number = _as_text(f"CAST({column} AS DOUBLE)", "DOUBLE")
        held = f"trim(({column} ->> '$'), {_BLANKS})"
        return f"CASE WHEN json_type({column}) = 'DOUBLE' THEN {number} ELSE {held} END"
    if kind in _EXACT_BELOW:
        # An integer column with gaps is often exported as float: 17.0 is patient 17. Beyond its exact
        # integers a float has merged ids, and so names nobody.
        exact = f"abs({column}) < {_EXACT_BELOW[kind]}"
        whole = f"CAST(TRY_CAST({column} AS BIGINT) AS VARCHAR)"
        return f"CASE WHEN {exact} THEN CASE WHEN {column} = trunc({column}) THEN {whole} ELSE {text} END END"
    if kind.startswith("DECIMAL("):
        return text if kind.endswith(",0)") else f"rtrim(rtrim({text}, '0'), '.')"
    if kind in _WHOLE_TYPES | _PLAIN_TYPES or kind.startswith(("ENUM(", "TIMESTAMP")):
        return f"trim({text}, {_BLANKS})"
    return None
