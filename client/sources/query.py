"""A study's query on a hospital's tables, in a DuckDB that reaches nothing else, checked while it runs.

Source: PRIVACY.md "Everything upstream is separable by patient". Rules: the query has passed
``common.query`` on these very tables; it sees views in which each row has one patient's id, and so no place
of a row; it runs for a limited time, with limited memory; what it makes of halves of the patients, chosen by
chance, must be what it makes of all.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import duckdb

from client.sources.engine import identifier, quoted
from common.contract import Contract
from common.errors import ContractError, FailureError, UsageError
from common.query import check_query

if TYPE_CHECKING:
    from client.sources.extract import Extract

TIMEOUT_S: Final = 120.0
SPLITS: Final = 2
REMEDY: Final = "Deny the study, or ask the coordinator to change its query."


def run(tables: "Sequence[Extract]", timeout_s: float = TIMEOUT_S) -> None:
    """Replace the hospital's tables, ``extract`` the first of them, by what the query makes of them.

    Guarantee: what_is_not_separable_is_found - where halves of the patients do not give the whole.
    Raises: ContractError; FailureError when time or memory run out.
    """
    connection, contract = tables[0].connection, tables[0].contract
    private = {table.table: list(table.types) for table in tables}
    sql = _checked(contract, private)
    for table in tables:
        _hide(table)
    for public in contract.tables:
        columns = ", ".join(f"{identifier(name)} VARCHAR" for name in public.columns)
        connection.execute(f"CREATE TABLE {identifier(public.name)} ({columns})")
        if public.rows:
            places = ", ".join("?" * len(public.columns))
            connection.executemany(
                f"INSERT INTO {identifier(public.name)} VALUES ({places})", [list(row) for row in public.rows]
            )
    timer = threading.Timer(timeout_s, connection.interrupt)
    timer.start()
    try:
        _make(tables, sql, "made", "true")
        for _ in range(SPLITS):
            _check_halves(tables, sql)
    finally:
        timer.cancel()
    for table in tables:
        connection.execute(f"DROP VIEW {identifier(table.table)}")
        connection.execute(f"DROP TABLE {_hidden(table)}")
    connection.execute("ALTER TABLE made RENAME TO extract")


def _checked(contract: Contract, private: Mapping[str, Sequence[str]]) -> str:
    """The query as it is to be run on tables with these columns."""
    public = {table.name: table.columns for table in contract.tables}
    taken = sorted(public.keys() & private.keys())
    problem = f"a public table of the study is called {taken[0]!r}, as one of this hospital" if taken else ""
    sql = ""
    try:
        _, sql = check_query(contract.query, contract.patient, public, private)
    except UsageError as error:
        problem = problem or error.problem
    if problem:
        raise ContractError("contract.query", problem, remedy=REMEDY)
    return sql


def _hidden(table: "Extract") -> str:
    # No name that a query can write: it is not among the tables that it is checked against.
    return identifier(f"rows of {table.table}")


def _hide(table: "Extract") -> None:
    """Put a table's rows, each with one patient's id, behind a view of its name, in an order of their own."""
    own = table.contract.patient
    others = [f"{table.plain(name)} AS {identifier(name)}" for name in table.types if name != own]
    chosen = ", ".join([f"{table.patient} AS {identifier(own)}", *others])
    rows = f"FROM (SELECT {chosen} FROM {identifier(table.table)}) WHERE {identifier(own)} IS NOT NULL"
    table.run(f"CREATE TABLE {_hidden(table)} AS {rows} ORDER BY ALL")
    table.connection.execute(f"DROP TABLE {identifier(table.table)}")


def _make(tables: "Sequence[Extract]", sql: str, name: str, among: str) -> None:
    """Make a table of what the query makes of the rows of some patients. Raises as ``run``."""
    failure: FailureError | ContractError
    for table in tables:
        view = f"CREATE OR REPLACE VIEW {identifier(table.table)} AS FROM {_hidden(table)} WHERE {among}"
        table.connection.execute(view)
    try:
        tables[0].connection.execute(f"CREATE OR REPLACE TABLE {name} AS {sql}")
    except (duckdb.InterruptException, duckdb.OutOfMemoryException):
        problem = "the study's query took longer, or more memory, than a query may"
        failure = FailureError("contract.query-limit", problem, remedy=REMEDY)
    except duckdb.Error:
        problem = "the study's query does not fit the columns of this hospital, or what they hold"
        failure = ContractError("contract.query", problem, remedy=REMEDY)
    else:
        return
    # Raised outside of the handlers: DuckDB's words may quote a row.
    raise failure


def _check_halves(tables: "Sequence[Extract]", sql: str) -> None:
    """Compare the whole with what two random halves of the patients make. Raises ContractError."""
    connection, patient = tables[0].connection, identifier(tables[0].contract.patient)
    coin = f"hash({patient} || {quoted(os.urandom(16).hex())}) % 2"
    for half in (0, 1):
        _make(tables, sql, f"half{half}", f"{coin} = {half}")
    halves = "(FROM half0 UNION ALL FROM half1)"
    differing = f"((FROM made EXCEPT ALL {halves}) UNION ALL ({halves} EXCEPT ALL FROM made))"
    found = connection.execute(f"SELECT count(*) FROM {differing}").fetchone()
    connection.execute("DROP TABLE half0; DROP TABLE half1")
    if found != (0,):
        problem = "the study's query mixes patients: halves of them do not give the rows of all"
        raise ContractError("contract.query-mixes", problem, remedy=REMEDY)
