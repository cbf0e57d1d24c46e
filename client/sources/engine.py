"""A DuckDB that can reach the files of one source and nothing else, and then nothing at all.

Source: DuckDB documentation, "Securing DuckDB" (allowed_paths, enable_external_access, lock_configuration);
DESIGN.md "Libraries". Rules: in memory, without a temporary folder, extensions or the network; its messages
quote cells, so none is ever passed on or chained.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import duckdb

from common.errors import ContractError, FailureError

QUERY_MEMORY_MIB: Final = 4096
GLOB: Final = frozenset("*?[]{}")
_LINE: Final = re.compile(r"(?:CSV Error on Line: |in line )([0-9]+)")


def connect(files: Sequence[Path] = (), folders: Sequence[Path] = ()) -> duckdb.DuckDBPyConnection:
    """A connection in memory that may open these files, by their real paths, and what is below these folders.

    Guarantee: other_files_are_out_of_reach - it opens nothing else, whatever their names or rows hold.
    """
    connection = duckdb.connect(":memory:")
    paths = ", ".join(quoted(str(file)) for file in files)
    below = ", ".join(quoted(f"{folder}/") for folder in folders)
    connection.execute(f"SET allowed_paths = [{paths}]; SET allowed_directories = [{below}]")
    connection.execute("SET temp_directory = ''; SET autoinstall_known_extensions = false")
    connection.execute("SET autoload_known_extensions = false; SET enable_external_access = false")
    return connection


def lock(connection: duckdb.DuckDBPyConnection, *, copied: bool, limited: bool = False) -> None:
    """No setting changes any more; where the rows were ``copied``, no file is reached any more either.

    ``limited`` for what a study wrote: memory has a bound of its own.
    """
    if limited:
        # One thread: what a patient's rows are does not follow from how others' were shared out.
        connection.execute(f"SET memory_limit = '{QUERY_MEMORY_MIB}MiB'; SET threads = 1")
    if copied:
        connection.execute("SET disabled_filesystems = 'LocalFileSystem'")
    connection.execute("SET lock_configuration = true")


def regular_file(path: Path) -> Path:
    """The real path of a readable regular file. Raises ContractError naming the path and the rule."""
    if GLOB & set(str(path)):
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
    if GLOB & set(str(file)):
        raise ContractError("source.path", f"{path}: its real path must be without any of * ? [ ] {{ }}")
    return file


def execute(
    connection: duckdb.DuckDBPyConnection, query: str, values: Sequence[Any] = (), *, what: str, remedy: str
) -> duckdb.DuckDBPyConnection:
    """Run ``query``; a failure says that ``what`` could not be read, and where, never DuckDB's own words.

    Guarantee: source_errors_hold_no_value - in text, fields, cause and context.
    Raises: ContractError, FailureError when memory does not suffice.
    """
    failure: FailureError | ContractError
    try:
        return connection.execute(query, list(values))
    except duckdb.OutOfMemoryException:
        failure = FailureError(
            "source.memory", f"{what} does not fit into memory", remedy="Give the agent more memory."
        )
    except duckdb.Error as error:
        line = _LINE.search(str(error))
        place = f"{what}, line {line[1]}," if line else what
        failure = ContractError(
            "source.malformed", f"{place} cannot be read as what it should be", remedy=remedy
        )
        if "No space left" in str(error):
            problem = f"the rows of {what} do not fit onto the disk"
            remedy = "Free space in the folder for temporary files, or set TMPDIR for the agent."
            failure = FailureError("source.scratch", problem, remedy=remedy)
    # Raised outside of the handlers, so that the message is not in its context either.
    raise failure


def quoted(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'
