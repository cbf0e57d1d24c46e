"""A table or view of a hospital's database, read once with an account that cannot write.

Source: PostgreSQL 15 documentation (has_table_privilege, statement_timeout, libpq's sslmode); SQLite "URI
filenames"; SQLAlchemy 2.1 "Using Server Side Cursors". Rules: no SQL comes from a study; everything is read
in one read-only transaction; cells come as text, so that no driver has to understand them; what a database
says may quote rows and is never passed on.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import duckdb
import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import ArgumentError, DataError, NoSuchTableError, ProgrammingError, SQLAlchemyError

from client.sources import engine
from client.sources.engine import identifier
from client.sources.source import DataSource
from common.errors import ContractError, FailureError, WardroundError
from common.identity import read_secret

BATCH_ROWS: Final = 20_000
CONNECT_TIMEOUT_S: Final = 10
STATEMENT_TIMEOUT_S: Final = 600

# The text forms below do not depend on how the database was set up.
_SETTINGS: Final = (f"SET statement_timeout = '{STATEMENT_TIMEOUT_S}s'", "SET datestyle = 'ISO, YMD'")
_CAN_WRITE: Final = sa.text(
    "SELECT has_table_privilege(:table, 'INSERT, UPDATE, DELETE, TRUNCATE') "
    "OR has_any_column_privilege(:table, 'INSERT, UPDATE')"
)
_TYPES: Final[tuple[tuple[type[sa.types.TypeEngine[Any]], str], ...]] = (
    (sa.Boolean, "BOOLEAN"),
    (sa.Integer, "BIGINT"),
    (sa.Numeric, "DOUBLE"),
    (sa.Float, "DOUBLE"),
    (sa.Date, "DATE"),
    (sa.DateTime, "TIMESTAMP"),
)


def read(source: DataSource, work: Callable[[sa.Connection], None]) -> None:
    """Do ``work`` in one read-only transaction of the source's database.

    Guarantee: a_database_is_never_written - the transaction is read-only, whatever the account may do.
    Guarantee: database_errors_hold_no_value - nor the password; in text, fields, cause and context.
    Raises: FailureError when the database cannot be reached or drops; ContractError.
    """
    failure: WardroundError
    database: sa.Engine | None = None
    try:
        database = _database(source)
        with database.connect() as opened:
            if opened.dialect.name == "postgresql":
                opened.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
                for setting in _SETTINGS:
                    opened.execute(sa.text(setting))
            work(opened)
            return
    except (ProgrammingError, DataError, NoSuchTableError):
        problem = (
            f"{source.where}: a table or column is missing, may not be read, or cannot be read as it stands"
        )
        remedy = "Check table in policy.toml, and that the account may SELECT from it."
        failure = ContractError("source.table", problem, remedy=remedy)
    except (ArgumentError, ImportError):
        problem = f"{source.where} is no address of a database that can be read here"
        remedy = "Write postgresql://USER@HOST/DATABASE (with wardround's extra 'postgres' installed) or sqlite:///PATH."
        failure = ContractError("source.address", problem, remedy=remedy)
    except SQLAlchemyError:
        problem = f"{source.where} cannot be reached, refused the account, or ended the connection"
        remedy = "Check that the database is up, the account and its password_file; then try again."
        failure = FailureError("source.database", problem, remedy=remedy)
    finally:
        if database is not None:
            database.dispose()
    # Raised outside of the handlers, so that the database's words are not in its context either.
    raise failure


def fill(
    connection: duckdb.DuckDBPyConnection, source: DataSource, patient: str, wanted: Sequence[str]
) -> None:
    """Make ``extract`` of a table or view, with ``patient`` and ``wanted`` by their names in contracts.

    A cell that is not what its column's type says, as SQLite allows, is absent.

    Raises: FailureError, ContractError.
    """
    read(source, lambda opened: _fill(connection, source, opened, list(dict.fromkeys((patient, *wanted)))))


def _fill(
    connection: duckdb.DuckDBPyConnection, source: DataSource, opened: sa.Connection, wanted: Sequence[str]
) -> None:
    if not source.table:
        remedy = "Add table to this source in policy.toml: the table or view that studies may read."
        raise ContractError("source.table", f"{source.where}: the policy names no table", remedy=remedy)
    schema, _, name = source.table.rpartition(".")
    check_account(opened, source.where, [source.table])
    types = {c["name"]: c["type"] for c in sa.inspect(opened).get_columns(name, schema or None)}
    chosen: list[sa.ColumnElement[object]] = []
    casts = []
    for at, column in enumerate(wanted):
        own = source.mapped(column).column or column
        if own not in types:
            problem = f"{source.table} has no column {own!r}, which the contract needs"
            remedy = f"Add it to the view, or map {column!r} in policy.toml; upper and lower case must agree."
            raise ContractError("source.column", problem, remedy=remedy)
        held = next((to for kind, to in _TYPES if isinstance(types[own], kind)), "VARCHAR")
        # A numeric id is exact as text only.
        if at == 0 and not isinstance(types[own], sa.Float):
            held = "VARCHAR"
        if isinstance(types[own], sa.LargeBinary):
            problem = f"{source.table}: column {own!r} is binary, the contract needs numbers, text or dates"
            raise ContractError("source.type", problem, remedy="Convert the column in a view.")
        cell = _as_text(opened, sa.column(sa.quoted_name(own, quote=True)), types[own])
        chosen.append(cell.label(f"c{at}"))
        casts.append(f"TRY_CAST(c{at} AS {held}) AS {identifier(column)}")
    statement = sa.select(*chosen).select_from(
        sa.table(
            sa.quoted_name(name, quote=True), schema=sa.quoted_name(schema, quote=True) if schema else None
        )
    )
    copy(opened, statement, connection, "staged", what=source.table)
    connection.execute(f"CREATE TABLE extract AS SELECT {', '.join(casts)} FROM staged")
    connection.execute("DROP TABLE staged")


def check_account(opened: sa.Connection, where: str, tables: Iterable[str]) -> None:
    """Check that the account cannot write to these tables, where the database can tell.

    Guarantee: accounts_that_can_write_are_refused - on PostgreSQL, superusers and owners too.
    Raises: ContractError.
    """
    if opened.dialect.name != "postgresql":
        return
    for table in tables:
        quoted = ".".join(identifier(part) for part in table.rpartition(".")[::2] if part)
        if opened.execute(_CAN_WRITE, {"table": quoted}).scalar():
            problem = f"{where}: the account may write to {table}; wardround takes one that can only read"
            remedy = (
                "Make an account with CONNECT, USAGE on the schema and SELECT on the view, and nothing else."
            )
            raise ContractError("source.account", problem, remedy=remedy)


def copy(
    opened: sa.Connection,
    statement: sa.Executable,
    connection: duckdb.DuckDBPyConnection,
    into: str,
    *,
    what: str,
) -> None:
    """Stream a statement's rows into a new DuckDB table ``into`` of text, ``BATCH_ROWS`` at a time."""
    found = opened.execute(statement, execution_options={"yield_per": BATCH_ROWS})
    columns = ", ".join(f"{identifier(name)} VARCHAR" for name in list(found.keys()))
    connection.execute(f"CREATE TABLE {into} ({columns})")
    for rows in found.partitions():
        batch = {f"c{at}": _texts(cells) for at, cells in enumerate(zip(*rows, strict=True))}
        connection.register("batch", batch)
        engine.execute(connection, f"INSERT INTO {into} FROM batch", what=what, remedy="Check its texts.")
        connection.unregister("batch")


def _texts(cells: Sequence[object]) -> NDArray[np.object_]:
    texts = [cell if cell is None or isinstance(cell, str) else str(cell) for cell in cells]
    return np.array(texts, dtype=object)


def _as_text(
    opened: sa.Connection, column: sa.ColumnClause[object], kind: sa.types.TypeEngine[Any]
) -> sa.ColumnElement[object]:
    """A column as text in SQL, a time by the clock that the database shows."""
    if opened.dialect.name == "sqlite":
        # SQLite's own text of a float is rounded; Python's is exact.
        return column
    if isinstance(kind, ARRAY):
        return sa.cast(sa.func.to_json(column), sa.String)
    if isinstance(kind, sa.DateTime):
        return sa.cast(sa.cast(column, sa.DateTime), sa.String)
    return sa.cast(column, sa.String)


def _database(source: DataSource) -> sa.Engine:
    address = sa.make_url(source.where)
    if address.password or address.query.keys() & {"password", "passfile", "service"}:
        remedy = "Put the password alone into a file of mode 0600, and name it as password_file."
        raise ContractError(
            "source.password", "the address of a database must not hold its password", remedy=remedy
        )
    if address.drivername == "sqlite" and address.database:
        file = engine.regular_file(Path(address.database))
        name = f"file:{quote(str(file))}?mode=ro"
        return sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(name, uri=True))
    if address.drivername != "postgresql":
        raise ArgumentError
    password = read_secret(Path(source.password_file)) if source.password_file else b""
    query = dict(address.query)
    local = not address.host or address.host in ("localhost", "127.0.0.1", "::1")
    if not local and "sslmode" not in query:
        # libpq by itself would take a connection without TLS, and any certificate.
        query = {"sslrootcert": "system", **query, "sslmode": "verify-full"}
    address = address.set(drivername="postgresql+psycopg", query=query)
    try:
        text = password.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        text = ""
    if password and not text:
        problem = f"{source.password_file} holds no password in UTF-8"
        raise ContractError("source.password", problem, remedy="Write the password alone into it.")
    secret = {"password": text} if text else {}
    return sa.create_engine(
        address, poolclass=sa.NullPool, connect_args={"connect_timeout": CONNECT_TIMEOUT_S, **secret}
    )
