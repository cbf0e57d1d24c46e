"""Extracts read by a DuckDB that sees one file, and the files that are refused."""

import csv
import math
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client.sources import engine, extract, table
from client.sources.extract import load_table
from client.sources.source import DataSource
from client.sources.table import Table
from common.contract import Category, Contract, Label, Number, Window
from common.errors import ContractError, FailureError
from tests.tables import table_of

KEY = b"\x07" * 32
SECRET = "Müller-Secret-4711"

CONTRACT = Contract(
    patient="pid",
    rows_per_patient=2,
    features=(
        Number(kind="number", name="age", unit="a", minimum=0.0, maximum=100.0),
        Number(kind="number", name="crp", unit="mg/l", minimum=0.1, maximum=1000.0, transform="log"),
        Category(kind="category", name="chest pain", codes=("1", "2", "asymptomatic")),
    ),
    label=Label(name="died", classes=("0", "1")),
)
HEADER = ["pid", "age", "crp", "chest pain", "died"]


def write(path: Path, rows: list[list[object]], header: list[str] = HEADER) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def parquet(path: Path, select: str) -> Path:
    duckdb.sql(f"COPY ({select}) TO '{path}' (FORMAT parquet)")
    return path


def ndjson(path: Path, select: str) -> Path:
    duckdb.sql(f"COPY ({select}) TO '{path}' (FORMAT json)")
    return path


def source(path: Path, kind: str = "csv", **more: Any) -> DataSource:
    return DataSource(source=f"{kind}:{path}", patient="pid", **more)


def load(path: Path, kind: str = "csv", contract: Contract = CONTRACT) -> Table:
    return load_table(source(path, kind), contract, key=KEY)


def refusal(path: Path, kind: str = "csv", contract: Contract = CONTRACT) -> ContractError:
    with pytest.raises(ContractError) as caught:
        load(path, kind, contract)
    assert caught.value.problem
    return caught.value


def same(first: Table, second: Table) -> bool:
    return first.ids == second.ids and all(
        getattr(first, name).tobytes() == getattr(second, name).tobytes()
        for name in ("x", "y", "patient_index")
    )


def test_a_csv_extract_is_read(tmp_path: Path) -> None:
    table = load(
        write(
            tmp_path / "a.csv",
            [
                ["p2", " 50 ", "10", "1", "1"],
                ["p1", "150", "1e9", "asymptomatic", "0"],
                ["", "50", "10", "1", "1"],
                ["p3", "x", "", "3", "0"],
                ["p4", "50", "10", "1", "unknown"],
            ],
        )
    )
    assert table.ids == ["p1", "p2", "p3"]
    assert table.y.tolist() == [0, 1, 0]
    assert table.patient_index.tolist() == [0, 1, 2]
    assert table.x.tolist() == [
        [1.0, 1.0, 0.0, 0.0, 1.0],
        [0.0, pytest.approx(0.0, abs=1e-15), 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]


cell_texts = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=6),
    st.floats().map(repr),
    st.integers(-10, 200).map(str),
    st.sampled_from(
        ["1_000", "0x1A", "1,5", '"', "a\nb", " 7 ", "\t7", "NA", "1e400", "inf", "-.5", "1.", "٣"]
    ),
)


@given(st.lists(st.lists(cell_texts, min_size=5, max_size=5), max_size=8))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_agrees_with_encoding_the_cells(tmp_path: Path, rows: list[list[str]]) -> None:
    path = write(tmp_path / "cells.csv", [list(row) for row in rows])
    x, y = CONTRACT.encode({name: [row[i] for row in rows] for i, name in enumerate(HEADER)})
    expected = table_of([row[0] for row in rows], x, y, CONTRACT, key=KEY)
    assert same(load(path), expected)


def test_all_kinds_agree(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    rows: list[list[object]] = [
        [f"p{generator.integers(40)}", a, c, k, d]
        for a, c, k, d in zip(
            generator.uniform(-10, 110, 100),
            np.exp(generator.normal(0, 5, 100)),
            generator.integers(0, 4, 100),
            generator.integers(0, 3, 100),
            strict=True,
        )
    ]
    text = write(tmp_path / "a.csv", rows)
    types = "'pid': 'VARCHAR', 'age': 'DOUBLE', 'crp': 'DOUBLE', 'chest pain': 'DOUBLE', 'died': 'INTEGER'"
    typed = parquet(
        tmp_path / "a.parquet", f"FROM read_csv('{text}', columns = {{{types}}}) SELECT died, * EXCLUDE died"
    )
    strings = parquet(tmp_path / "b.parquet", f"FROM read_csv('{text}', all_varchar = true)")
    table = load(text)
    assert table.patients > 20
    assert same(table, load(typed, "parquet"))
    assert same(table, load(strings, "parquet"))
    for select in (f"FROM '{typed}'", f"FROM '{strings}'"):
        assert same(table, load(ndjson(tmp_path / "a.ndjson", select), "ndjson"))
        base = tmp_path / "a.duckdb"
        base.unlink(missing_ok=True)
        with duckdb.connect(str(base)) as connection:
            connection.execute(f"CREATE SCHEMA s; CREATE TABLE s.t AS {select}; CREATE VIEW v AS FROM s.t")
        for name in ("s.t", "v"):
            assert same(table, load_table(source(base, "duckdb", table=name), CONTRACT, key=KEY))


@pytest.mark.parametrize(
    ("sql", "ids"),
    [
        ("1::DOUBLE", ["1"]),
        ("17.5::DOUBLE", ["17.5"]),
        ("1234567890123456789::BIGINT", ["1234567890123456789"]),
        ("9007199254740991::DOUBLE", ["9007199254740991"]),
        ("9007199254740992::DOUBLE", []),
        ("12345678901234567890::DOUBLE", []),
        ("'-inf'::DOUBLE", []),
        ("16777215::FLOAT", ["16777215"]),
        ("16777217::FLOAT", []),
        ("'1.23457E+15'", []),
        ("-0.0::DOUBLE", ["0"]),
        ("12345678901234567890::DECIMAL(20,0)", ["12345678901234567890"]),
        ("7.00::DECIMAL(9,2)", ["7"]),
        ("7.50::DECIMAL(9,2)", ["7.5"]),
        ("100::DECIMAL(9,0)", ["100"]),
        ("3::UTINYINT", ["3"]),
        ("uuid '00000000-0000-0000-0000-0000000000ab'", ["00000000-0000-0000-0000-0000000000ab"]),
        ("'  p 1 '", ["p 1"]),
        ("NULL::VARCHAR", []),
        ("'nan'::DOUBLE", []),
        ("NULL::BIGINT", []),
    ],
)
def test_patient_ids_of_all_types_are_text(tmp_path: Path, sql: str, ids: list[str]) -> None:
    select = f"""SELECT {sql} AS pid, 1 AS age, 1 AS crp, '1' AS "chest pain", 1 AS died"""
    assert load(parquet(tmp_path / "a.parquet", select), "parquet").ids == ids


def test_numbers_of_all_types_are_read(tmp_path: Path) -> None:
    for sql, expected in [
        ("50::TINYINT", 0.0),
        ("50.0::DECIMAL(4,1)", 0.0),
        ("true", -0.98),
        ("25::FLOAT", -0.5),
        ("'inf'::DOUBLE", 0.0),
        ("'nan'::FLOAT", 0.0),
        ("NULL::INTEGER", 0.0),
        ("'5e1'", 0.0),
    ]:
        select = f"""SELECT 'p' AS pid, {sql} AS age, 1 AS crp, '1' AS "chest pain", false AS died"""
        contract = CONTRACT.model_copy(update={"label": Label(name="died", classes=("false", "true"))})
        table = load(parquet(tmp_path / "a.parquet", select), "parquet", contract)
        assert table.x[0, 0] == pytest.approx(expected, abs=1e-15)
        assert table.y.tolist() == [0]


def test_excel_marks_and_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = ['﻿"pid", age ,crp,chest pain,died,"a ""note"", long"', 'p1,50,10,1,1,"two\r\nlines"', ""]
    path.write_bytes("\r\n".join(lines).encode())
    assert load(path).ids == ["p1"]


def test_columns_that_are_not_asked_for_are_not_looked_at(tmp_path: Path) -> None:
    header = ["name", *HEADER, "name"]
    path = write(tmp_path / "a.csv", [["x", "p1", "50", "10", "1", "1", "y"]], header)
    assert load(path).x.shape == (1, 5)


@pytest.mark.parametrize(
    "name", ["it's.csv", 'q"uote.csv', "sp ace.csv", "ünï.csv", "semi;colon.csv", "a.parquet"]
)
def test_any_file_name_is_only_a_name(tmp_path: Path, name: str) -> None:
    assert load(write(tmp_path / name, [["p1", "50", "10", "1", "1"]])).patients == 1


def test_column_names_are_only_names(tmp_path: Path) -> None:
    odd = 'a"; DROP TABLE extract; --'
    contract = CONTRACT.model_copy(
        update={"features": (Number(kind="number", name=odd, unit="1", minimum=0.0, maximum=2.0),)}
    )
    text = write(tmp_path / "a.csv", [["p", "1", "1"]], ["pid", odd, "died"])
    assert load(text, contract=contract).x.tolist() == [[0.0]]
    quoted = odd.replace('"', '""')
    typed = parquet(tmp_path / "a.parquet", f"""SELECT 'p' AS pid, 1 AS "{quoted}", 1 AS died""")
    assert load(typed, "parquet", contract).x.tolist() == [[0.0]]


@pytest.mark.parametrize("kind", ["csv", "parquet", "ndjson"])
def test_other_files_are_out_of_reach(tmp_path: Path, kind: str) -> None:
    text = write(tmp_path / "a.csv", [["p1", "50", "10", "1", "1"]])
    path = {
        "csv": text,
        "parquet": parquet(tmp_path / "a.parquet", f"FROM read_csv('{text}', all_varchar = true)"),
        "ndjson": ndjson(tmp_path / "a.ndjson", f"FROM read_csv('{text}', all_varchar = true)"),
    }[kind]
    other = write(tmp_path / "b.csv", [["p1", "50", "10", "1", "1"]])
    before = sorted(entry.name for entry in tmp_path.iterdir())
    forbidden = [
        f"FROM read_csv('{other}')",
        f"FROM '{other}'",
        f"FROM glob('{tmp_path}/*')",
        f"FROM read_text('{other}')",
        f"ATTACH '{tmp_path / 'x.db'}'",
        f"COPY (SELECT 1) TO '{tmp_path / 'out.csv'}'",
        "SET enable_external_access = true",
        f"SET allowed_paths = ['{other}']",
        "SET temp_directory = '/tmp'",
        "SET disabled_filesystems = ''",
        "SET threads = 1",
        "LOAD httpfs",
        "INSTALL httpfs",
    ]
    # Where the rows were copied, the file itself is out of reach too; it is never written.
    forbidden += [f"COPY extract TO '{path}'"] if kind == "parquet" else [f"FROM read_csv('{path}')"]
    with extract.opened(source(path, kind), CONTRACT) as found:
        assert found.count() == 1
        for query in forbidden:
            with pytest.raises(duckdb.Error):
                found.connection.execute(query)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before
    assert load(path, kind).patients == 1


def test_other_files_are_out_of_reach_before_the_lock(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [["p1", "50", "10", "1", "1"]])
    other = write(tmp_path / "b.csv", [["p1", "50", "10", "1", "1"]])
    with engine.connect([path]) as connection:
        assert connection.execute(f"SELECT count(*) FROM read_csv('{path}')").fetchone() == (1,)
        for query in (f"FROM read_csv('{other}')", f"FROM '{other}'", f"ATTACH '{tmp_path / 'x.db'}'"):
            with pytest.raises(duckdb.Error):
                connection.execute(query)
        with pytest.raises(duckdb.Error):
            connection.execute("SET enable_external_access = true")


def test_the_file_is_not_changed_and_the_connection_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.csv", [["p1", "50", "10", "1", "1"]])
    held: list[duckdb.DuckDBPyConnection] = []
    real = duckdb.connect

    def connect(name: str) -> duckdb.DuckDBPyConnection:
        held.append(real(name))
        return held[-1]

    monkeypatch.setattr(duckdb, "connect", connect)
    before = path.read_bytes()
    load(path)
    refusal(write(tmp_path / "b.csv", [[SECRET]], HEADER))
    assert path.read_bytes() == before
    assert len(held) == 2
    for connection in held:
        with pytest.raises(duckdb.ConnectionException):
            connection.execute("SELECT 1")


@pytest.mark.parametrize("name", ["*.csv", "a?.csv", "a[1].csv", "{a,b}.csv"])
def test_patterns_are_not_paths(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, [["p1", "50", "10", "1", "1"]])
    assert refusal(tmp_path / name).code == "source.path"
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / name)
    assert refusal(link).code == "source.path"


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    link = tmp_path / "link.csv"
    link.symlink_to(write(tmp_path / "a.csv", [["p1", "50", "10", "1", "1"]]))
    assert load(link).patients == 1


def test_unreadable_sources_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.csv").code == "source.unreadable"
    assert refusal(tmp_path).code == "source.unreadable"
    with pytest.raises(ValidationError):
        source(tmp_path / "a.csv", "xlsx")
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").code == "source.unreadable"
    for name in ("absent.csv", "pipe"):
        assert name in refusal(tmp_path / name).problem
        assert refusal(tmp_path / name).remedy


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"\n\npid,age,crp,chest pain,died\n",
        b",,,,\n",
        b'"pid,age\n',
        b"\xff\xfepid",
        b'p"id\x00"x,"a"b\n',
    ],
)
def test_files_without_column_names_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    error = refusal(path)
    assert error.code in {"source.header", "source.column"}
    assert str(path) in error.problem


def test_missing_and_ambiguous_columns_are_named(tmp_path: Path) -> None:
    for name in HEADER:
        header = [f"other {i}" if column == name else column for i, column in enumerate(HEADER)]
        error = refusal(write(tmp_path / "a.csv", [[SECRET] * 5], header))
        assert error.code == "source.column"
        assert f"no column {name!r}" in error.problem
        error = refusal(write(tmp_path / "a.csv", [[SECRET] * 6], [*HEADER, name]))
        assert f"more than one column {name!r}" in error.problem
    error = refusal(write(tmp_path / "a.csv", [[SECRET] * 5], ["PID", *HEADER[1:]]))
    assert "'PID'" in error.remedy
    semicolons = tmp_path / "semi.csv"
    semicolons.write_text(";".join(HEADER) + "\n")
    assert "comma" in refusal(semicolons).remedy


BAD_BODIES = {
    "too many cells": f"{SECRET},1,2,1,0,9\n".encode(),
    "too few cells": f"p1,1,2,1,0\n{SECRET},1\n".encode(),
    "open quote": f'p1,1,2,1,"{SECRET}\n'.encode(),
    "text behind a quote": f'"{SECRET}"x,1,2,1,0\n'.encode(),
    "not UTF-8": SECRET.encode("latin-1") + b",1,2,1,0\n",
    "a line of megabytes": b"p1," + SECRET.encode() + b"9" * 3_000_000 + b",1,1,1\n",
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_source_errors_hold_no_value(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(",".join(HEADER).encode() + b"\n" + body)
    error = refusal(path)
    # A fault in the first kilobytes may be met while the column names are read.
    assert error.code in {"source.malformed", "source.header"}
    assert str(path) in error.problem
    assert error.remedy
    assert error.__cause__ is None
    assert error.__context__ is None
    shown = "".join(traceback.format_exception(error)) + repr(error) + str(error.fields) + error.diagnostics()
    for part in ("ller", "Secret", "4711", "9999"):
        assert part not in shown


def test_the_malformed_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [["p1", "1", "2", "1", "0"], ["p2", "1"]])
    assert "line 3" in refusal(path).problem


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for data in (b"", b"PAR1", SECRET.encode() * 100, b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(data)
        error = refusal(path, "parquet")
        assert error.code == "source.malformed"
        assert error.__context__ is None
        assert "Secret" not in str(error)


@pytest.mark.parametrize(
    ("column", "sql", "kind"),
    [
        ("age", "DATE '2020-01-01'", "DATE"),
        ("age", "[1, 2]", "INTEGER[]"),
        ("died", "[1]", "INTEGER[]"),
        ("chest pain", "{'a': 1}", "STRUCT"),
        ("pid", "'x'::BLOB", "BLOB"),
    ],
)
def test_columns_of_another_type_are_refused(tmp_path: Path, column: str, sql: str, kind: str) -> None:
    values = dict.fromkeys(HEADER, "1") | {column: sql}
    select = "SELECT " + ", ".join(f'{value} AS "{name}"' for name, value in values.items())
    error = refusal(parquet(tmp_path / "a.parquet", select), "parquet")
    assert error.code == "source.type"
    assert repr(column) in error.problem
    assert kind in error.problem


def test_a_column_without_any_value_is_absent(tmp_path: Path) -> None:
    select = "SELECT 'p1' AS pid, 50 AS age, NULL AS crp, NULL AS \"chest pain\", 1 AS died"
    table = load(parquet(tmp_path / "a.parquet", select), "parquet")
    assert table.x.tolist() == [[0.0, 0.0, 0.0, 0.0, 0.0]]


def test_memory_that_does_not_suffice_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.csv", [["p1", "50", "10", "1", "1"]] * 20_000)
    real = duckdb.connect

    def small(name: str) -> duckdb.DuckDBPyConnection:
        connection = real(name)
        connection.execute("SET memory_limit = '1MB'")
        return connection

    monkeypatch.setattr(duckdb, "connect", small)
    with pytest.raises(FailureError) as caught:
        load(path)
    assert caught.value.code == "source.memory"
    assert caught.value.__context__ is None


def test_the_heart_data_is_read_where_it_is_present(tmp_path: Path) -> None:
    source = Path(__file__).parents[4] / "shared" / "data" / "heart" / "processed.va.data"
    if not source.exists():
        pytest.skip("the heart data is not here")
    rows = [[f"v{i}", *line.split(",")] for i, line in enumerate(source.read_text().split())]
    header = ["pid", "age", "sex", "cp", *(f"unused {i}" for i in range(10)), "num"]
    contract = Contract(
        patient="pid",
        features=(
            Number(kind="number", name="age", unit="a", minimum=20.0, maximum=90.0),
            Category(kind="category", name="cp", codes=("1", "2", "3", "4")),
        ),
        label=Label(name="num", classes=("0", "1", "2", "3", "4")),
    )
    table = load(write(tmp_path / "va.csv", list(rows), header), contract=contract)
    assert table.patients == 200
    assert np.bincount(table.y).tolist() == [51, 56, 41, 42, 10]
    assert table.x[:, 1:].sum() == 200
    assert math.isclose(table.x[table.ids.index("v0"), 0], 2 * 43 / 70 - 1)


WINDOWED = CONTRACT.model_copy(
    update={"window": Window(column="seen", first="2020-01-01", last="2020-12-31")}
)
DAYS = {
    "2019-12-31": False, "2020-01-01": True, "2020-12-31": True, "2021-01-01": False, "": False, "soon": False,
    "2020-02-30": False, "31.12.2020": False,
}  # fmt: skip


def dated(path: Path, days: Sequence[str]) -> Path:
    rows: list[list[object]] = [[f"p{i}", "50", "10", "1", "1", day] for i, day in enumerate(days)]
    return write(path, rows, [*HEADER, "seen"])


def test_rows_outside_the_window_are_left_out(tmp_path: Path) -> None:
    table = load(dated(tmp_path / "a.csv", list(DAYS)), contract=WINDOWED)
    assert table.ids == [f"p{i}" for i, inside in enumerate(DAYS.values()) if inside]
    rows = ", ".join(f"('p{i}', TRY_CAST('{day}' AS TIMESTAMP))" for i, day in enumerate(DAYS))
    select = "SELECT pid, 50 AS age, 10 AS crp, '1' AS \"chest pain\", '1' AS died, seen FROM "
    typed = parquet(tmp_path / "a.parquet", f"{select} (VALUES {rows}) AS t(pid, seen)")
    assert load(typed, "parquet", WINDOWED).ids == table.ids


def test_dates_are_read_in_the_form_that_the_policy_names_and_no_other(tmp_path: Path) -> None:
    path = dated(tmp_path / "a.csv", ["31.12.2020", "01.02.2021", "2020-06-01", "06/01/2020"])
    mapped = source(path, map={"seen": {"date_format": "%d.%m.%Y"}})
    assert load_table(mapped, WINDOWED, key=KEY).ids == ["p0"]
    american = source(path, map={"seen": {"date_format": "%m/%d/%Y"}})
    assert load_table(american, WINDOWED, key=KEY).ids == ["p3"]
    assert load(path, contract=WINDOWED).ids == ["p2"]


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [["p1", "50", "10", "1", "1"]])
    newer = write(tmp_path / "b.csv", [["p2", "50", "10", "1", "1"]])
    with pytest.raises(ContractError) as caught, extract.opened(source(path), CONTRACT):
        newer.rename(path)
    assert caught.value.code == "source.changed"
    assert str(path) in caught.value.problem
    with pytest.raises(ContractError) as caught, extract.opened(source(path), CONTRACT):
        path.unlink()
    assert caught.value.code == "source.changed"


def test_rows_beyond_memory_lie_in_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[list[object]] = [[f"p{i % 40}", i % 100, 10, "1", i % 2] for i in range(100)]
    path = write(tmp_path / "a.csv", rows)
    whole = load(path)
    monkeypatch.setattr(table, "IN_MEMORY_SIZE_BYTES", 0)
    monkeypatch.setattr(extract, "BATCH_ROWS", 7)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    streamed = load(path)
    assert same(whole, streamed)
    base = streamed.x
    while not isinstance(base, np.memmap):
        assert isinstance(base.base, np.ndarray)
        base = base.base
    assert same(whole.without(["p7", "p30"]), streamed.without(["p7", "p30"]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.csv"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", [["p1", "50", "10", "1", "1"]])
    monkeypatch.setattr(table, "IN_MEMORY_SIZE_BYTES", 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FailureError) as caught:
        load(path)
    assert caught.value.code == "source.scratch"
