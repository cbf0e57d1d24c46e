"""One CSV or Parquet extract as a table, read by a DuckDB that can open that file and nothing else.

Source: DESIGN.md "Libraries" (duckdb), RFC 4180 (CSV). Rules: the file is copied into memory, then all files
are out of reach and the settings are locked; nothing is inferred from rows (no type or dialect sniffing); a
cell never fails, a malformed file always does, with its name, the column, the rule and the remedy, and
without any value: DuckDB quotes the offending line in its errors, so those are never passed on or chained.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import duckdb
import numpy as np

from client.sources.table import Part, Table, build_table
from common.contract import BLANKS, NUMBER, Contract, Number, Values
from common.errors import ContractError, FailureError

KINDS: Final = ("csv", "parquet")

_GLOB: Final = frozenset("*?[]{}")
_LINE: Final = re.compile(r"CSV Error on Line: ([0-9]+)")
_MAX_HEADER_COLUMNS: Final = 100_000
_CSV_REMEDY: Final = "Export as CSV of RFC 4180: UTF-8, comma, double quotes, one line of column names first."
_WHOLE: Final = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}
_WHOLE_TYPES: Final = _WHOLE | {f"U{name}" for name in _WHOLE}
_EXACT_BELOW: Final = {"FLOAT": 1 << 24, "DOUBLE": 1 << 53}
_PLAIN_TYPES: Final = {"VARCHAR", "DATE", "UUID", "BOOLEAN"}


def load_table(kind: str, path: Path, contract: Contract, *, key: bytes, part: Part = "train") -> Table:
    """The rows of one part of the extract at ``path`` (csv or parquet), as the contract reads them.

    ``key`` 32 secret bytes of the site for this study: it decides the split and which rows of a patient stay.

    Guarantee: other_files_are_out_of_reach - this reads ``path`` and nothing else, whatever its name or rows.
    Guarantee: csv_and_parquet_agree - the same cells give the same table.
    Guarantee: source_errors_hold_no_value - in text, fields, cause and context.
    Assumes: the file is well-formed, so that the bytes of one row don't reach into another.
    Raises: ContractError.
    """
    file = _approved(kind, path)
    names = _csv_names(file) if kind == "csv" else []
    with duckdb.connect(":memory:") as connection:
        connection.execute(f"SET allowed_paths = [{_quoted(str(file))}]; SET temp_directory = ''")
        for option in ("autoinstall_known_extensions", "autoload_known_extensions", "enable_external_access"):
            connection.execute(f"SET {option} = false")
        _copy(connection, file, names)
        connection.execute("SET disabled_filesystems = 'LocalFileSystem'; SET lock_configuration = true")
        patients, columns = _columns(connection, file, names, contract)
    x, y = contract.encode(columns)
    return build_table(patients, x, y, contract, key=key, part=part)


def _approved(kind: str, path: Path) -> Path:
    if kind not in KINDS:
        raise ContractError("source.kind", f"a source is {' or '.join(KINDS)}, not {kind!r}")
    if _GLOB & set(str(path)):
        problem = f"{path}: a source is one file, its path without any of * ? [ ] {{ }}"
        raise ContractError("source.path", problem, remedy="Rename it.")
    file, reason = path, ""
    try:
        file = path.resolve(strict=True)
        # Opening a pipe in place of the file would wait for ever.
        if file.is_file():
            file.open("rb").close()
        else:
            reason = "not a regular file"
    except OSError as error:
        reason = error.strerror or "unreadable"
    if reason:
        remedy = "Check the path in policy.toml and that the agent's account may read the file."
        raise ContractError("source.unreadable", f"{path} cannot be read: {reason}", remedy=remedy)
    if _GLOB & set(str(file)):
        raise ContractError("source.path", f"{path}: its real path must be without any of * ? [ ] {{ }}")
    return file


def _csv_names(file: Path) -> list[str]:
    """The column names in the first line of a CSV file."""
    problem = ""
    names: list[str] = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            names = [name.strip(BLANKS) for name in next(csv.reader(handle, strict=True), [])]
    except UnicodeDecodeError:
        problem = "is not UTF-8"
    except csv.Error:
        problem = "has a malformed first line"
    if not problem and not any(names):
        problem = "has no line of column names"
    if not problem and len(names) > _MAX_HEADER_COLUMNS:
        problem = f"has more than {_MAX_HEADER_COLUMNS} columns"
    if problem:
        raise ContractError("source.header", f"{file} {problem}", remedy=_CSV_REMEDY)
    return names


def _copy(connection: duckdb.DuckDBPyConnection, file: Path, names: Sequence[str]) -> None:
    """Copy the file into the memory table ``extract``; CSV columns are named c0, c1, ... and hold text."""
    if names:
        types = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(len(names)))
        source = (
            f"read_csv(?, columns = {{{types}}}, auto_detect = false, header = true, delim = ',', "
            "quote = '\"', escape = '\"', nullstr = '', strict_mode = true)"
        )
    else:
        source = "read_parquet(?, hive_partitioning = false)"
    query = f"CREATE TABLE extract AS SELECT * FROM {source}"  # noqa: S608 - c0, c1, ... and constants
    _execute(connection, query, file, names, [str(file)])


def _execute(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    file: Path,
    names: Sequence[str],
    values: Sequence[str] = (),
) -> None:
    """Run ``query``; a failure is told without DuckDB's message, which quotes a line of the file."""
    failure: FailureError | ContractError
    try:
        connection.execute(query, values)
    except duckdb.OutOfMemoryException:
        remedy = "Give the agent more memory."
        failure = FailureError("source.memory", f"{file} does not fit into memory", remedy=remedy)
    except duckdb.Error as error:
        line = _LINE.search(str(error))
        failure = _malformed(file, names, f"line {line[1]}" if line else "the file")
    else:
        return
    # Raised outside of the handlers, so that the message is not in its context either.
    raise failure


def _malformed(file: Path, names: Sequence[str], where: str) -> ContractError:
    if names:
        problem = f"{file}: {where} is not CSV with {len(names)} columns, as the first line has them"
        return ContractError("source.malformed", problem, remedy=_CSV_REMEDY)
    remedy = "Export it again as Parquet."
    return ContractError("source.malformed", f"{file} is not a readable Parquet file", remedy=remedy)


def _columns(
    connection: duckdb.DuckDBPyConnection, file: Path, csv_names: Sequence[str], contract: Contract
) -> tuple[list[object], dict[str, Values]]:
    """The patient column, and the contract's: float64 for numbers, text for all others."""
    described = connection.execute("DESCRIBE extract").fetchall()
    types = [str(row[1]) for row in described]
    names = csv_names or [str(row[0]) for row in described]
    numbers = {feature.name for feature in contract.features if isinstance(feature, Number)}
    wanted = (contract.patient, *contract.columns)
    expressions = []
    for name in wanted:
        places = [index for index, found in enumerate(names) if found == name]
        if len(places) != 1:
            times = "no column" if not places else "more than one column"
            problem = f"{file} has {times} {name!r}, which the contract needs once"
            remedy = _near(name, names) if not places else "Give each column its own name."
            raise ContractError("source.column", problem, remedy=remedy)
        column, kind = _identifier(str(described[places[0]][0])), types[places[0]]
        expression = _as_number(column, kind) if name in numbers else _as_text(column, kind)
        if expression is None:
            needed = "numbers" if name in numbers else "text, whole numbers or dates"
            problem = f"{file}: column {name!r} is {kind.split('(')[0]}, the contract needs {needed}"
            raise ContractError("source.type", problem, remedy="Convert the column in the extract.")
        expressions.append(expression)
    selected = ", ".join(f"{text} AS v{index}" for index, text in enumerate(expressions))
    query = f"SELECT {selected} FROM extract"  # noqa: S608 - every name is quoted
    _execute(connection, query, file, csv_names)
    found = connection.fetchnumpy()
    columns: dict[str, Values] = {}
    for index, name in enumerate(wanted):
        array = found[f"v{index}"]
        if name in numbers:
            columns[name] = np.ma.filled(array.astype(np.float64), np.nan)
        else:
            columns[name] = np.ma.filled(array.astype(object), None).tolist()
    return list(columns.pop(contract.patient)), columns


def _as_number(column: str, kind: str) -> str | None:
    if kind == "VARCHAR":
        text = f"trim({column}, {_BLANKS})"
        return f"CASE WHEN regexp_full_match({text}, {_quoted(NUMBER)}) THEN TRY_CAST({text} AS DOUBLE) END"
    if kind in _WHOLE_TYPES | _EXACT_BELOW.keys() | {"BOOLEAN"} or kind.startswith("DECIMAL("):
        return f"CAST({column} AS DOUBLE)"
    return None


def _as_text(column: str, kind: str) -> str | None:
    """SQL for a cell as ``common.contract.text_of`` has it: whole numbers without decimals."""
    text = f"CAST({column} AS VARCHAR)"
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


def _near(name: str, names: Sequence[str]) -> str:
    """How to get a column that is not there."""
    alike = [found for found in names if found.casefold() == name.casefold()]
    if alike:
        return f"Rename the column {alike[0]!r}; upper and lower case must agree."
    if len(names) == 1:
        return _CSV_REMEDY
    return "Add the column to the extract, or ask the coordinator to change the contract."


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_BLANKS: Final = " || ".join(f"chr({ord(blank)})" for blank in BLANKS)
