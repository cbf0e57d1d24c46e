"""Extracts in files: CSV, Parquet, NDJSON, a DuckDB file; each becomes the table ``extract``.

Source: RFC 4180 (CSV); DuckDB documentation. Rules: nothing is inferred from rows (no type or dialect
sniffing): text stays text until a contract says what it is; a malformed file always fails, with its name, the
line where it is known, the rule and the remedy, and without any value.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import duckdb

from client.sources.engine import execute, identifier, quoted
from client.sources.source import DataSource
from common.contract.cells import BLANKS
from common.errors import ContractError

KINDS: Final = ("csv", "parquet", "ndjson", "duckdb")
CSV_REMEDY: Final = (
    "Export as CSV of RFC 4180: one line of column names first, double quotes, the delimiter and encoding "
    "that policy.toml names (comma and UTF-8 if it names none)."
)
REMEDIES: Final = {
    "csv": CSV_REMEDY,
    "parquet": "Export it again as Parquet.",
    "ndjson": "Export it again: one JSON object a line, in UTF-8.",
    "duckdb": "Check that it is a DuckDB file of this DuckDB's version, not open for writing elsewhere.",
}
_MAX_COLUMNS: Final = 100_000
_MAX_HEADER_CHARACTERS: Final = 1 << 24
ROW: Final = "file_row_number"
"""Column of the view on a Parquet file that holds the place of each row."""


def fill(
    connection: duckdb.DuckDBPyConnection,
    source: DataSource,
    wanted: Sequence[str],
    *,
    copied: bool,
    table: str = "extract",
    partly: bool = False,
    scratch: str = "",
) -> None:
    """Make ``table`` with the columns ``wanted``, by their names in contracts, as they are in the file.

    ``partly``: of those after the first, only what the file has. A Parquet file that is not ``copied``
    becomes a view with the further column ``file_row_number``, so that it may be larger than memory; so does
    another file whose rows are written as Parquet to the path ``scratch``. Raises ContractError,
    FailureError.
    """
    file, kind = source.path.resolve(), source.kind
    if kind == "duckdb":
        _attach(connection, source)
        reader, names = f"held.{_table_name(source)}", None
    else:
        reader, names = _reader(kind, file, source)
    what, remedy = str(source.path), REMEDIES[kind]
    # Nothing is read twice by chance: the names are those of the columns as DuckDB has them.
    found = execute(connection, f"DESCRIBE SELECT * FROM {reader}", what=what, remedy=remedy).fetchall()
    columns = [str(row[0]) for row in found]
    chosen = []
    for place, name in enumerate(wanted):
        own = source.mapped(name).column or name
        if not place or not partly or own in (names or columns):
            at = _only(own, names or columns, what)
            chosen.append(f"{identifier(columns[at])} AS {identifier(name)}")
    if scratch:
        path = quoted(scratch)
        rows = (
            f"COPY (SELECT {', '.join(chosen)} FROM {reader}) TO {path} (FORMAT parquet, USE_TMP_FILE false)"
        )
        execute(connection, rows, what=what, remedy=remedy)
        # Parquet forgets that a text is JSON.
        types = "JSON" if kind == "ndjson" else "VARCHAR"
        chosen = [f"CAST({identifier(name)} AS {types}) AS {identifier(name)}" for name in wanted]
        reader = f"read_parquet({path}, hive_partitioning = false, file_row_number = true)"
    streamed = bool(scratch) or (kind == "parquet" and not copied)
    if streamed:
        chosen.append(ROW)
    made = "VIEW" if streamed else "TABLE"
    query = f"CREATE {made} {identifier(table)} AS SELECT {', '.join(chosen)} FROM {reader}"
    execute(connection, query, what=what, remedy=remedy)
    if kind == "duckdb":
        connection.execute("DETACH held")


def _reader(kind: str, file: Path, source: DataSource) -> tuple[str, list[str] | None]:
    """SQL that reads a file, and its column names where DuckDB has others (CSV: c0, c1, ...)."""
    path = quoted(str(file))
    if kind == "parquet":
        return f"read_parquet({path}, hive_partitioning = false, file_row_number = true)", None
    if kind == "ndjson":
        types = ", ".join(f"{quoted(name)}: 'JSON'" for name in _ndjson_names(file))
        return f"read_ndjson({path}, columns = {{{types}}}, maximum_object_size = 16777216)", None
    names = _csv_names(file, source)
    types = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(len(names)))
    return (
        f"read_csv({path}, columns = {{{types}}}, auto_detect = false, header = true, "
        f"delim = {quoted(source.delimiter)}, encoding = {quoted(source.encoding)}, "
        "quote = '\"', escape = '\"', nullstr = '', strict_mode = true)"
    ), names


def _csv_names(file: Path, source: DataSource) -> list[str]:
    """The column names in the first line of a CSV file."""
    problem = ""
    names: list[str] = []
    encoding = "utf-8-sig" if source.encoding == "utf-8" else source.encoding
    try:
        with file.open(newline="", encoding=encoding) as handle:
            names = [
                name.strip(BLANKS)
                for name in next(csv.reader(handle, delimiter=source.delimiter, strict=True), [])
            ]
    except (UnicodeDecodeError, UnicodeError):
        problem = f"is not {source.encoding.upper()}"
    except csv.Error:
        problem = "has a malformed first line"
    if not problem and not any(names):
        problem = "has no line of column names"
    if not problem and len(names) > _MAX_COLUMNS:
        problem = f"has more than {_MAX_COLUMNS} columns"
    if problem:
        raise ContractError("source.header", f"{file} {problem}", remedy=CSV_REMEDY)
    return names


def _ndjson_names(file: Path) -> list[str]:
    """The keys of the first object of an NDJSON file; a key that only later lines have is no column."""
    first: Any = None
    try:
        with file.open(encoding="utf-8-sig") as handle:
            first = json.loads(handle.readline(_MAX_HEADER_CHARACTERS))
    except (UnicodeDecodeError, ValueError, RecursionError):
        first = None
    if not isinstance(first, dict) or not first or len(first) > _MAX_COLUMNS:
        problem = f"{file}: its first line is no JSON object with columns"
        raise ContractError("source.header", problem, remedy=REMEDIES["ndjson"])
    return list(first)


def _attach(connection: duckdb.DuckDBPyConnection, source: DataSource) -> None:
    if not source.table:
        remedy = "Add table to this source in policy.toml: the table or view that studies may read."
        raise ContractError("source.table", f"{source.path}: the policy names no table", remedy=remedy)
    query = f"ATTACH {quoted(str(source.path.resolve()))} AS held (READ_ONLY)"
    execute(connection, query, what=str(source.path), remedy=REMEDIES["duckdb"])


def _table_name(source: DataSource) -> str:
    return ".".join(identifier(part) for part in source.table.split(".", 1))


def _only(name: str, names: Sequence[str], what: str) -> int:
    """The place of the one column of this name. Raises ContractError."""
    places = [index for index, found in enumerate(names) if found == name]
    if len(places) == 1:
        return places[0]
    times = "no column" if not places else "more than one column"
    problem = f"{what} has {times} {name!r}, which the contract needs once"
    remedy = _near(name, names) if not places else "Give each column its own name."
    raise ContractError("source.column", problem, remedy=remedy)


def _near(name: str, names: Sequence[str]) -> str:
    """How to get a column that is not there."""
    alike = [found for found in names if found.casefold() == name.casefold()]
    if alike:
        return f"Rename the column {alike[0]!r}, or map it in policy.toml; upper and lower case must agree."
    if len(names) == 1:
        return CSV_REMEDY
    return (
        "Add the column to the extract, map it in policy.toml, or ask the coordinator to change the contract."
    )
