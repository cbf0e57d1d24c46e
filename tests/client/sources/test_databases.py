"""Tables of hospitals' databases: SQLite always, PostgreSQL where it is installed."""

import sqlite3
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import numpy as np
import pytest

from client.snapshot import local
from client.sources import databases
from client.sources.extract import load_table
from client.sources.source import DataSource
from common.contract import Category, Contract, Label, Number, Window
from common.errors import FailureError, WardroundError
from tests.client.sources import postgres
from tests.client.sources.postgres import READER_PASSWORD, Postgres

NAME = "a &#%41.db"
SECRET = "Grünwald-4711"
CONTRACT = Contract(
    patient="pid",
    features=(
        Number(kind="number", name="hb", unit="g/dL", minimum=0.0, maximum=20.0),
        Category(kind="category", name="sex", codes=("m", "w")),
    ),
    label=Label(name="died", classes=("0", "1")),
)
COLUMNS = [*CONTRACT.columns]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres.cluster() as made:
        made.run(
            "CREATE SCHEMA study",
            "CREATE TABLE study.patients (pid bigint, hb numeric(6, 2), sex text, died boolean, seen timestamptz, "
            "scan bytea, weight double precision)",
            "INSERT INTO study.patients VALUES (12345678901234567, 13.5, 'w', true, '2020-05-01 23:30+00', 'x', 1e300), "
            f"(2, NULL, '{SECRET}', false, NULL, NULL, 'NaN'), (NULL, 1, 'm', true, NULL, NULL, 0)",
            "CREATE VIEW study.shown AS SELECT pid, hb, sex, CAST(died AS int) AS died, seen FROM study.patients",
            "GRANT USAGE ON SCHEMA study TO reader",
            "GRANT SELECT ON study.patients, study.shown TO reader",
            "CREATE TABLE study.closed (pid int, hb int, sex text, died int)",
        )
        yield made


def on_server(server: Postgres, tmp_path: Path, table: str = "study.shown", **more: Any) -> DataSource:
    file = server.password_file(tmp_path)
    fields = {"columns": COLUMNS, "password_file": file, **more}
    return DataSource(source=f"sql:{server.address}", patient="pid", table=table, **fields)


def sqlite(tmp_path: Path, script: str) -> DataSource:
    file = tmp_path / NAME
    connection = sqlite3.connect(file)
    connection.executescript(script)
    connection.close()
    return DataSource(source=f"sql:sqlite:///{quote(str(file))}", patient="pid", table="t", columns=COLUMNS)


def filled(source: DataSource, contract: Contract = CONTRACT) -> list[tuple[Any, ...]]:
    window = () if contract.window is None else (contract.window.column,)
    with duckdb.connect(":memory:") as connection:
        databases.fill(connection, source, "pid", (*contract.columns, *window))
        return connection.execute("SELECT * FROM extract ORDER BY ALL").fetchall()


def refusal(source: DataSource) -> WardroundError:
    with pytest.raises(WardroundError) as caught:
        filled(source)
    error = caught.value
    assert error.__context__ is None
    assert error.__cause__ is None
    shown = "".join(traceback.format_exception(error)) + repr(vars(error))
    assert SECRET not in shown
    assert READER_PASSWORD not in shown
    assert error.remedy
    return error


SCRIPT = f"""CREATE TABLE t (pid TEXT, hb REAL, sex TEXT, died INTEGER);
INSERT INTO t VALUES ('p1', 13.5, 'w', 1), ('p2', '{SECRET}', 'm', 0), ('p3', 0.1, x'00ff', 1);"""


def test_a_table_of_sqlite_is_read_and_not_written(tmp_path: Path) -> None:
    source = sqlite(tmp_path, SCRIPT)
    before = (tmp_path / NAME).read_bytes()
    rows = filled(source)
    # A cell of another type than its column's is absent.
    assert [row[:2] for row in rows] == [("p1", 13.5), ("p2", None), ("p3", 0.1)]
    assert (tmp_path / NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_columns_are_mapped(tmp_path: Path) -> None:
    source = sqlite(tmp_path, 'CREATE TABLE t (id INTEGER, "Hb ""x" REAL, sex TEXT, died INTEGER); '
                    "INSERT INTO t VALUES (7, 135, 'W', 0)")  # fmt: skip
    mapping = {
        "pid": {"column": "id"},
        "hb": {"column": 'Hb "x', "unit": "g/L"},
        "sex": {"codes": {"W": "w"}},
    }
    source = DataSource.model_validate(source.model_dump() | {"map": mapping})
    with local(source, CONTRACT, tmp_path / "copies") as copy:
        table = load_table(copy, CONTRACT, key=bytes(32))
    assert table.ids == ["7"]
    np.testing.assert_allclose(table.x, [[0.35, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"table": ""}, "source.table"),
        ({"table": "absent"}, "source.table"),
        ({"table": "t; DROP TABLE t"}, "source.table"),
        ({"map": {"hb": {"column": "Hb"}}}, "source.column"),
        ({"source": "sql:sqlite:////absent/a.db"}, "source.unreadable"),
        ({"source": "sql:oracle://h/d"}, "source.address"),
        ({"source": "sql:nonsense"}, "source.address"),
        ({"source": "sql:postgresql://u:pw@127.0.0.1/d"}, "source.password"),
        ({"source": "sql:postgresql://u@127.0.0.1/d?password=pw"}, "source.password"),
        ({"source": "sql:postgresql+psycopg://u@127.0.0.1/d"}, "source.address"),
        ({"source": "sql:postgresql://u@127.0.0.1:1/d"}, "source.database"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    source = sqlite(tmp_path, SCRIPT)
    assert refusal(DataSource.model_validate(source.model_dump() | change)).code == code


def test_a_password_file_must_be_closed_to_others(tmp_path: Path) -> None:
    file = tmp_path / "pw"
    file.write_text("x")
    file.chmod(0o644)
    source = DataSource(
        source="sql:postgresql://u@127.0.0.1:1/d", patient="pid", table="t", password_file=str(file)
    )
    with pytest.raises(WardroundError) as caught:
        filled(source)
    assert str(file) in caught.value.problem


def test_a_password_that_is_no_text_is_refused_without_showing_it(tmp_path: Path) -> None:
    file = tmp_path / "pw"
    for content in (SECRET.encode("latin-1"), b"\n"):
        file.write_bytes(content)
        file.chmod(0o600)
        address = "sql:postgresql://u@127.0.0.1:1/d"
        held = DataSource(source=address, patient="pid", table="t", password_file=str(file))
        assert refusal(held).code == "source.password"


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    source = sqlite(tmp_path, SCRIPT)
    (tmp_path / NAME).write_bytes(SECRET.encode() * 500)
    assert refusal(source).code in ("source.database", "source.table")


def test_a_table_of_postgresql_is_read(server: Postgres, tmp_path: Path) -> None:
    assert filled(on_server(server, tmp_path)) == [
        ("12345678901234567", 13.5, "w", 1),
        ("2", None, SECRET, 0),
        (None, 1.0, "m", 1),
    ]
    assert filled(on_server(server, tmp_path, "study.patients"))[0][-1] is True


def test_times_are_those_of_the_clock_in_utc(server: Postgres, tmp_path: Path) -> None:
    for day, rows in (("2020-05-01", 1), ("2020-05-02", 0)):
        windowed = CONTRACT.model_copy(update={"window": Window(column="seen", first=day, last=day)})
        with local(on_server(server, tmp_path), windowed, tmp_path / "copies") as copy:
            assert len(load_table(copy, windowed, key=bytes(32)).y) == rows


def test_accounts_that_can_write_are_refused(server: Postgres, tmp_path: Path) -> None:
    for right in ("INSERT", "UPDATE", "DELETE", "TRUNCATE", "UPDATE (hb)"):
        server.run(f"GRANT {right} ON study.patients TO reader")
        try:
            assert refusal(on_server(server, tmp_path, "study.patients")).code == "source.account"
        finally:
            server.run(f"REVOKE {right} ON study.patients FROM reader")
    assert len(filled(on_server(server, tmp_path, "study.patients"))) == 3


def test_a_database_is_never_written(server: Postgres, tmp_path: Path) -> None:
    server.run("CREATE TABLE study.count (n int)", "GRANT INSERT ON study.count TO reader")
    source = on_server(server, tmp_path)

    def write(opened: Any) -> None:
        opened.exec_driver_sql("INSERT INTO study.count VALUES (1)")

    with pytest.raises(WardroundError):
        databases.read(source, write)
    with server.owner.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM study.count").scalar() == 0


def test_database_errors_hold_no_value(server: Postgres, tmp_path: Path) -> None:
    server.run(
        "CREATE VIEW study.broken AS SELECT pid, CAST(sex AS int) AS hb, sex, CAST(died AS int) AS died FROM study.patients",
        "GRANT SELECT ON study.broken TO reader",
    )
    assert refusal(on_server(server, tmp_path, "study.broken")).code == "source.table"
    assert refusal(on_server(server, tmp_path, "study.closed")).code == "source.table"
    other = tmp_path / "other"
    other.mkdir()
    wrong = on_server(server, other)
    Path(wrong.password_file).write_text(SECRET)
    assert refusal(wrong).code == "source.database"
    binary = on_server(server, tmp_path, "study.patients", map={"hb": {"column": "scan"}})
    assert refusal(binary).code == "source.type"


def test_a_database_that_drops_is_a_failure_and_leaves_no_copy(server: Postgres, tmp_path: Path) -> None:
    server.run(
        "CREATE VIEW study.slow AS SELECT i AS pid, i AS hb, 'm' AS sex, (i %% 2) AS died "
        "FROM generate_series(1, 3000000) AS i",
        "GRANT SELECT ON study.slow TO reader",
    )
    ended = threading.Event()

    def end() -> None:
        while not ended.is_set():
            server.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'")
            time.sleep(0.2)

    thread = threading.Thread(target=end)
    thread.start()
    try:
        with (
            pytest.raises(FailureError) as caught,
            local(on_server(server, tmp_path, "study.slow"), CONTRACT, tmp_path / "copies"),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert caught.value.code == "source.database"
    assert list((tmp_path / "copies").iterdir()) == []
