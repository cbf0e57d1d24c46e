"""One source as the rows that a contract reads, a batch at a time, and as the table that training sees.

Source: PRIVACY.md "Everything upstream is separable by patient"; DESIGN.md "Libraries" (duckdb). Rules:
whatever the source is, it becomes one table ``extract`` whose files are then out of reach; types are turned
into the contract's by SQL, a cell never fails; the order of rows, batches and files changes nothing.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from client.sources.table import (
    IN_MEMORY_SIZE_BYTES,
    NO_ID,
    ROUNDED,
    Part,
    Table,
    allocated,
    build_table,
    in_part,
)
from common.contract import (
    Amount,
    AnyLabel,
    Category,
    Contract,
    Events,
    Feature,
    Image,
    Label,
    NoLabel,
    Number,
    Series,
    Text,
    TimeToEvent,
    Values,
)
from common.contract.cells import BLANKS, NUMBER, UNUSABLE
from common.contract.units import factor
from common.errors import ContractError

BATCH_ROWS: Final = 1 << 16
BATCH_CELLS: Final = 1 << 22

_WHOLE: Final = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}
_WHOLE_TYPES: Final = _WHOLE | {f"U{name}" for name in _WHOLE}
_EXACT_BELOW: Final = {"FLOAT": 1 << 24, "DOUBLE": 1 << 53}
_PLAIN_TYPES: Final = {"VARCHAR", "DATE", "UUID", "BOOLEAN"}
_BLANKS: Final = " || ".join(f"chr({ord(blank)})" for blank in BLANKS)
_NO_ID: Final = ", ".join(quoted(text) for text in sorted(NO_ID))


@dataclass(frozen=True)
class Extract:
    """The table ``extract`` of a source in ``connection``, or ``table``.

    ``row`` is the column that numbers its rows from 0.
    """

    connection: duckdb.DuckDBPyConnection
    source: DataSource
    contract: Contract
    row: str
    table: str = "extract"

    @cached_property
    def types(self) -> dict[str, str]:
        """The columns of ``extract`` and their DuckDB types."""
        return {str(row[0]): str(row[1]) for row in self.run(f"DESCRIBE {identifier(self.table)}").fetchall()}

    def run(self, query: str) -> duckdb.DuckDBPyConnection:
        """Run SQL on ``extract``. Raises ContractError that holds no value."""
        remedy = files.REMEDIES.get(self.source.kind, "Check the source.")
        return engine.execute(self.connection, query, what=self.source.where, remedy=remedy)

    @property
    def patient(self) -> str:
        """SQL for the patient's id as text.

        NULL where a row names no one patient (see ``table.patient_id``).
        """
        return _one_patient(self.patient_text)

    @property
    def patient_text(self) -> str:
        """SQL for the patient's id as it stands there."""
        return self.text(self.contract.patient)

    @property
    def usable(self) -> str:
        """SQL for whether a row's label can be used; what it is, ``Contract.encode`` says."""
        label = self.contract.label
        if isinstance(label, NoLabel):
            return "true"
        if isinstance(label, Label):
            return f"({self.code(label.name, label.classes)}) >= 0"
        number = self.number(label.name, label)
        if isinstance(label, Amount):
            return f"coalesce(isfinite({number}), false)"
        known = f"isfinite({number}) AND ({number}) >= 0"
        return f"coalesce({known}, false) AND ({self.code(label.event, label.codes)}) >= 0"

    @property
    def inside(self) -> str:
        """SQL for whether a row lies in the contract's window of dates."""
        window = self.contract.window
        if window is None:
            return "true"
        day = self.day(window.column)
        return f"coalesce({day} BETWEEN DATE {quoted(window.first)} AND DATE {quoted(window.last)}, false)"

    def plain(self, name: str) -> str:
        """SQL for a column as a query sees it.

        In the contract's codes, and without what would hide in it: quotes of JSON, the sign of a zero.
        """
        column, kind = self._column(name)
        if kind == "JSON":
            column = f"({column} ->> '$')"
        elif kind in _EXACT_BELOW:
            column = f"{column} + 0.0"
        return self._recoded(column, name)

    def day(self, name: str) -> str:
        """SQL for a column as a DATE, NULL where it is none."""
        column, kind = self._column(name)
        if kind == "DATE" or kind.startswith("TIMESTAMP"):
            return f"CAST({column} AS DATE)"
        text, form = self.text(name), self.source.mapped(name).date_format
        if form:
            return f"CAST(try_strptime({text}, {quoted(form)}) AS DATE)"
        return f"TRY_CAST({text} AS DATE)"

    def number(self, name: str, feature: Number | TimeToEvent) -> str:
        """SQL for a column as a DOUBLE in the contract's unit, NULL where it is no number."""
        column, kind = self._column(name)
        expression = _as_number(column, kind, self.source.decimal)
        if expression is None:
            raise self._wrong_type(name, kind, "numbers")
        return self._in_unit(expression, feature)

    def _in_unit(self, expression: str, feature: Number | TimeToEvent) -> str:
        """SQL for a number of the hospital's unit in the contract's."""
        own = self.source.mapped(feature.name).unit or feature.unit
        analyte = feature.analyte if isinstance(feature, Number) else ""
        change = factor(analyte, own, feature.unit)
        if change is None:
            problem = f"no conversion of {feature.name!r} from {own} to {feature.unit} is known"
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
            for feature in self.contract.features:
                if isinstance(feature, Image):
                    columns[feature.name] = self._pixels(feature, columns[feature.name])
            yield start, columns

    def count(self) -> int:
        """How many rows there are."""
        found = self.run("SELECT count(*) FROM extract").fetchone()
        return int(found[0]) if found else 0

    def _pixels(self, image: Image, names: Values) -> NDArray[np.float64]:
        from client.sources.dicom import pixels

        found = np.full((len(names), image.width), np.nan)
        for row, name in enumerate(names):
            try:
                found[row] = pixels(self.source.path, str(name or ""), image)
            except ContractError:
                # In a round a file that cannot be read is a constant, for a refusal would be a release.
                continue
        return found

    def _expression(self, name: str, feature: Feature | AnyLabel) -> str:
        if isinstance(feature, TimeToEvent):
            return self.number(name, feature) if name == feature.name else self.code(name, feature.codes)
        if isinstance(feature, Number):
            return self.number(name, feature)
        if isinstance(feature, Category):
            return self.code(name, feature.codes)
        if isinstance(feature, Label):
            return self.code(name, feature.classes)
        if isinstance(feature, Series) and feature.wide:
            channel = next(c for c in feature.channels if name.startswith(f"{c.name}_"))
            return self.number(name, channel)
        if isinstance(feature, Series | Events):
            return self.list_of(name, feature)
        if isinstance(feature, Text | Image):
            return self.text(name)
        raise TypeError(f"no column holds {type(feature).__name__}")

    def present(self, name: str) -> str:
        """SQL for whether a cell holds anything."""
        column, kind = self._column(name)
        if kind in ("VARCHAR", "JSON"):
            held = f"{column} ->> '$'" if kind == "JSON" else column
            return f"coalesce(trim({held}, {_BLANKS}) <> '', false)"
        return f"{column} IS NOT NULL"

    def text(self, name: str) -> str:
        """SQL for a cell as text, in the contract's codes."""
        column, kind = self._column(name)
        text = _as_text(column, kind)
        if text is None:
            raise self._wrong_type(name, kind, "text, whole numbers or dates")
        return self._recoded(text, name)

    def _recoded(self, text: str, name: str) -> str:
        """SQL for a text of the hospital's codes in the contract's."""
        codes = self.source.mapped(name).codes
        if not codes:
            return text
        cases = " ".join(f"WHEN {quoted(own)} THEN {quoted(theirs)}" for own, theirs in codes.items())
        return f"CASE {text} {cases} ELSE {text} END"

    def code(self, name: str, codes: tuple[str, ...]) -> str:
        """SQL for a cell's place among codes, -1 for none."""
        among = ", ".join(quoted(code) for code in codes)
        return (
            f"coalesce(CAST(enum_code(TRY_CAST({self.text(name)} AS ENUM({among}))) AS BIGINT), {UNUSABLE})"
        )

    def list_of(self, name: str, feature: Feature) -> str:
        """SQL for a cell as a list with times, in the contract's unit or codes."""
        if isinstance(feature, Series):
            channel = next(c for c in feature.channels if c.name == name)
            return self._list(name, "DOUBLE", self._in_unit("e.v", channel))
        return self._list(name, "VARCHAR", self._recoded("e.v", name))

    def _list(self, name: str, item: str, value: str) -> str:
        """SQL for a list of ``item`` with times; ``value`` is made of the value e.v of an entry e."""
        column, kind = self._column(name)
        if kind in ("VARCHAR", "JSON"):
            # A list in a file of text is JSON, of plain values or of objects with t and v.
            plain, timed = f"{item}[]", f"STRUCT(t DOUBLE, v {item})[]"
            parsed = f"TRY_CAST({column} AS JSON)"
            entries = (
                f"CASE WHEN json_type({parsed}, '$[0]') = 'OBJECT' THEN TRY_CAST({parsed} AS {timed}) "
                f"ELSE {_timed(f'TRY_CAST({parsed} AS {plain})')} END"
            )
        elif kind.startswith("STRUCT(") and kind.endswith("[]"):
            entries = column
        elif kind.endswith("[]"):
            entries = _timed(column)
        else:
            raise self._wrong_type(name, kind, "lists")
        return (
            entries if value == "e.v" else f"list_transform({entries}, lambda e: {{'t': e.t, 'v': {value}}})"
        )

    def _column(self, name: str) -> tuple[str, str]:
        types = self.types
        if name not in types:
            raise ContractError("source.column", f"{self.source.where} has no column {name!r}")
        if types[name] == '"NULL"':
            # A column without a single value may have no type either.
            return "CAST(NULL AS VARCHAR)", "VARCHAR"
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
    kind = source.kind
    if source.on_server:
        problem = f"{source.where} is a database on a server, which a copy must be made of first"
        raise ContractError("source.kind", problem)
    if contract.query and kind not in files.KINDS:
        problem = f"a query cannot be run on a source of kind {kind}"
        raise ContractError("source.query", problem, remedy="Offer the study an extract in files.")
    if contract.query and any(own.unit for own in source.map.values()):
        problem = "a query reads values as they are, so its source may map no units"
        raise ContractError("source.query", problem, remedy="Convert them in the extract, or deny the study.")
    paths, folders = _places(source, contract)
    real = [engine.regular_file(path) for path in paths]
    before = [_identity(path) for path in real]
    # DuckDB looks for the log of a database file beside it.
    logs = [Path(f"{path}.wal") for path in real if kind in ("duckdb", "omop")]
    with ExitStack() as stack:
        scratch = ""
        large = kind in ("csv", "ndjson") and real[0].stat().st_size > IN_MEMORY_SIZE_BYTES
        if large and not contract.query:
            # Without a name from the start: nothing of it stays, however the process ends.
            scratch = f"/proc/self/fd/{stack.enter_context(tempfile.TemporaryFile()).fileno()}"
            logs.append(Path(scratch))
        connection = stack.enter_context(engine.connect([*real, *logs], folders))
        row = _filled(connection, source, contract, scratch)
        # A query was given the contract's codes already.
        source = source.recoded() if contract.query else source
        yield Extract(connection, source, contract, row)
    if [_identity(path) for path in real] != before:
        problem = f"{source.where} changed while it was read"
        remedy = "Write a new extract beside it and rename it into place."
        raise ContractError("source.changed", problem, remedy=remedy)


def _places(source: DataSource, contract: Contract) -> tuple[list[Path], list[Path]]:
    """The files and the folders that a source is made of."""
    further = source.tables.values() if contract.query else ()
    paths = [Path(text.partition(":")[2]) for text in further]
    if source.kind == "fhir" and source.cohort:
        paths.append(Path(source.cohort))
    if source.kind == "dicom" and source.table:
        paths.append(Path(source.table))
    if source.kind in ("fhir", "dicom", "omop") and source.path.is_dir():
        return paths, [source.path.resolve()]
    return [source.path, *paths], []


def _filled(
    connection: duckdb.DuckDBPyConnection, source: DataSource, contract: Contract, scratch: str
) -> str:
    """Make ``extract`` and lock the connection; the column that numbers the rows."""
    kind = source.kind
    copied = not scratch and (kind != "parquet" or bool(contract.query))
    if contract.query:
        wanted = list(dict.fromkeys((contract.patient, *source.columns)))
        for table, where in (("extract", source.source), *source.tables.items()):
            one = source.model_copy(update={"source": where})
            files.fill(connection, one, wanted, copied=True, table=table, partly=True)
    elif kind in files.KINDS:
        window = () if contract.window is None else (contract.window.column,)
        wanted = list(dict.fromkeys((contract.patient, *contract.columns, *window)))
        files.fill(connection, source, wanted, copied=copied, scratch=scratch)
    elif kind == "omop":
        from client.sources import omop

        omop.fill(connection, source, contract)
    elif kind == "fhir":
        from client.sources import fhir

        fhir.fill(connection, source, contract)
    else:
        from client.sources import dicom

        dicom.fill(connection, source, contract)
    engine.lock(connection, copied=copied, limited=bool(contract.query))
    if contract.query:
        from client.sources import query

        tables = ["extract", *source.tables]
        query.run([Extract(connection, source, contract, "rowid", table) for table in tables])
    return "rowid" if copied else files.ROW


def load_table(source: DataSource, contract: Contract, *, key: bytes, part: Part = "train") -> Table:
    """The rows of one part of a source, as the contract reads them.

    ``key`` 32 secret bytes of the site for this study: it decides the split and which rows of a patient stay.

    Guarantee: all_kinds_agree - the same cells give the same table, whatever kind of file holds them.
    Raises: ContractError, FailureError.
    """
    with opened(source, contract) as extract:
        # One step inside the other, so that DuckDB makes each text once.
        texts = f"SELECT {extract.row} AS r, {extract.patient_text} AS t, {extract.usable} AS u FROM extract"
        named = f"SELECT r, {_one_patient('t')} AS p, u FROM ({texts} WHERE {extract.inside})"
        query = f"SELECT r, p FROM ({named}) WHERE p IS NOT NULL AND u ORDER BY p, r"
        found = extract.run(query).fetchnumpy()
        ids = np.ma.filled(found["p"], None).astype(object)
        kept = in_part(ids, contract, key=key, part=part)
        ids, rows = ids[kept], np.ma.filled(found["r"], 0).astype(np.int64)[kept]
        place = np.full(extract.count(), UNUSABLE, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        x, y = allocated(len(rows), contract.width), np.zeros(len(rows), dtype=np.int64)
        for start, columns in extract.batches():
            encoded, labels = contract.encode(columns)
            into = place[start : start + len(encoded)]
            x[into[into != UNUSABLE]] = encoded[into != UNUSABLE]
            y[into[into != UNUSABLE]] = labels[into != UNUSABLE]
    return build_table(ids, x, y, contract, key=key)


def _one_patient(text: str) -> str:
    """SQL for the id of one patient, NULL where a text names none (see ``table.patient_id``)."""
    return (
        f"CASE WHEN strlen({text}) <= {max(map(len, NO_ID))} "
        f"THEN CASE WHEN lower({text}) NOT IN ({_NO_ID}) THEN {text} END "
        f"WHEN contains({text}, '+') AND regexp_full_match({text}, {quoted(ROUNDED)}) THEN NULL "
        f"ELSE {text} END"
    )


def _timed(plain: str) -> str:
    """SQL for a list of plain values with their places for times."""
    return f"list_transform({plain}, lambda x, i: {{'t': (i - 1)::DOUBLE, 'v': x}})"


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
