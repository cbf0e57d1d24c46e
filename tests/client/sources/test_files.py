"""Files as hospitals export them: delimiters, encodings, decimal commas, NDJSON, DuckDB files, further files."""

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.sources import engine, extract, files
from client.sources.extract import load_table
from client.sources.source import DataSource
from client.sources.table import Table
from common.contract import Category, Contract, Events, Label, Number, Series
from common.errors import ContractError, FailureError

KEY = b"\x05" * 32
SECRET = "Grünwald-4711"
CONTRACT = Contract(
    patient="pid",
    features=(
        Number(kind="number", name="hb", unit="g/dL", minimum=0.0, maximum=20.0),
        Category(kind="category", name="sex", codes=("männlich", "weiblich")),
    ),
    label=Label(name="died", classes=("0", "1")),
)
LISTS = Contract(
    patient="pid",
    features=(
        Series(
            kind="series", name="vitals", steps=3,
            channels=(Number(kind="number", name="pulse", unit="/min", minimum=0.0, maximum=200.0),),
        ),
        Events(kind="events", name="codes", codes=("I10", "E11")),
    ),
    label=Label(name="died", classes=("0", "1")),
)  # fmt: skip


def load(path: Path, kind: str, contract: Contract = CONTRACT, **more: Any) -> Table:
    source = DataSource(source=f"{kind}:{path}", patient="pid", **more)
    return load_table(source, contract, key=KEY)


def refusal(path: Path, kind: str, contract: Contract = CONTRACT, **more: Any) -> ContractError:
    with pytest.raises(ContractError) as caught:
        load(path, kind, contract, **more)
    assert caught.value.__context__ is None
    assert path.name in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.remedy
    return caught.value


def haemoglobin(table: Table) -> list[float]:
    """The numbers as the hospital wrote them."""
    return [float(value) for value in np.round((table.x[:, 0] + 1) * 10, 9)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_dialects_agree(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [["pid", "hb", "sex", "died"], ["p1", "13.5", "weiblich", "0"], ["ü2", "9", "männlich", "1"]]
    path = tmp_path / "a.csv"
    path.write_bytes("".join(delimiter.join(row) + "\r\n" for row in rows).encode(encoding))
    declared = "utf-8" if encoding == "utf-8-sig" else encoding
    table = load(path, "csv", delimiter=delimiter, encoding=declared)
    assert table.ids == ["p1", "ü2"]
    assert haemoglobin(table) == [13.5, 9.0]
    assert table.x[:, 1:].tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_another_encoding_than_declared_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for at in ("pid", SECRET):
        text = f"pid,hb,sex,died\np1,1,weiblich,0\n{SECRET},2,männlich,1\n"
        path.write_bytes(text.replace("pid", at, 1).encode("latin-1"))
        assert refusal(path, "csv").code in ("source.header", "source.malformed")
    path.write_bytes(f"pid,hb,sex,died\n{SECRET},2,x,1\n".encode("utf-16"))
    assert refusal(path, "csv").code == "source.header"


def test_mixed_encodings_are_refused_and_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        "pid,hb,sex,died\np1,1,weiblich,0\np2,1,männlich,1\n".encode() + "p3,1,männlich,0\n".encode("latin-1")
    )
    assert "UTF-8" in refusal(path, "csv").problem
    # Far from the header too, where the line is known.
    more = "".join(f"p{i},1,weiblich,0\n" for i in range(9000)).encode()
    path.write_bytes(b"pid,hb,sex,died\n" + more + f"{SECRET},1,männlich,0\n".encode("latin-1"))
    error = refusal(path, "csv")
    assert error.code == "source.malformed"
    assert "line 9002" in error.problem


def test_decimal_commas_are_numbers_where_the_policy_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("pid;hb;sex;died\np1;13,5;weiblich;0\np2;9;weiblich;1\np3;1.234,5;weiblich;1\n")
    table = load(path, "csv", delimiter=";", decimal=",")
    # Grouped digits are no number, and so absent: in the middle of the range.
    assert haemoglobin(table) == [13.5, 9.0, 10.0]
    assert haemoglobin(load(path, "csv", delimiter=";")) == [10.0, 9.0, 10.0]


def test_duplicate_headers_are_refused_where_they_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("pid,hb,note,note,sex,died\np1,1,a,b,weiblich,0\n")
    assert load(path, "csv").patients == 1
    path.write_text("pid,hb,hb,sex,died\np1,1,2,weiblich,0\n")
    error = refusal(path, "csv")
    assert (error.code, "'hb'" in error.problem) == ("source.column", True)


def test_columns_are_mapped_with_their_codes_and_units(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("pid,Hb (g/l),Geschlecht,died\np1,135,W,0\np2,90,M,1\np3,,?,1\n")
    mapping = {
        "hb": {"column": "Hb (g/l)", "unit": "g/L"},
        "sex": {"column": "Geschlecht", "codes": {"W": "weiblich", "M": "männlich"}},
    }
    table = load(path, "csv", map=mapping)
    assert haemoglobin(table) == [13.5, 9.0, 10.0]
    assert table.x[:, 1:].tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    error = refusal_of_unit(
        path, {"hb": {"column": "Hb (g/l)", "unit": "mmol/L"}, "sex": {"column": "Geschlecht"}}
    )
    assert "'hb'" in error.problem
    assert "mmol/L" in error.problem


def refusal_of_unit(path: Path, mapping: dict[str, Any]) -> ContractError:
    with pytest.raises(ContractError) as caught:
        load(path, "csv", map=mapping)
    assert caught.value.code == "source.unit"
    return caught.value


def test_ndjson_holds_numbers_texts_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    rows = [
        {"pid": "p1", "pulse": [60, None, 80], "codes": ["I10", "X"], "died": 0},
        {"pid": "p2", "pulse": [{"t": 2, "v": 100}, {"t": 0.5, "v": 50}], "codes": [{"t": -3, "v": "E11"}], "died": "1"},
        {"pid": "p3", "pulse": "no list", "codes": {"a": 1}, "died": 1},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = load(path, "ndjson", LISTS)
    series = table.x[:, :6].reshape(3, 3, 2)
    pulse = np.where(series[:, :, 1] == 1, (series[:, :, 0] + 1) * 100, np.nan)
    np.testing.assert_allclose(pulse, [[60, np.nan, 80], [50, np.nan, 100], [np.nan] * 3])
    assert table.x[:, 6:].tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


def test_lists_are_converted_and_recoded_too(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_text(json.dumps({"pid": "p1", "p": [1, 2], "c": [{"t": 0, "v": "hyp"}], "died": 0}) + "\n")
    contract = LISTS.model_copy(
        update={
            "features": (
                LISTS.features[0].model_copy(
                    update={
                        "channels": (Number(kind="number", name="pulse", unit="1/h", minimum=0, maximum=200),)
                    }
                ),
                LISTS.features[1],
            )
        }
    )
    mapping = {"pulse": {"column": "p", "unit": "1/h"}, "codes": {"column": "c", "codes": {"hyp": "I10"}}}
    x = load(path, "ndjson", contract, map=mapping).x[0]
    assert x[6:].tolist() == [1.0, 0.0]
    glucose = Number(kind="number", name="glucose", unit="mg/dL", minimum=0, maximum=400, analyte="glucose")
    vitals = Series(kind="series", name="lab", steps=2, channels=(glucose,))
    contract = Contract(patient="pid", features=(vitals,), label=CONTRACT.label)
    (first, _), (second, _) = (
        load(path, "ndjson", contract, map={"glucose": {"column": "p", "unit": "mmol/L"}}).x[0].reshape(2, 2)
    )
    assert ((first + 1) * 200, (second + 1) * 200) == pytest.approx((18.0156, 36.0312))
    parquet = tmp_path / "a.parquet"
    duckdb.sql(f"COPY (SELECT 'p1' AS pid, [1.0, 2.0] AS p, '0' AS died) TO '{parquet}' (FORMAT parquet)")
    mapped = {"glucose": {"column": "p", "unit": "mmol/L"}}
    assert (
        load(parquet, "parquet", contract, map=mapped).x.tolist()
        == load(path, "ndjson", contract, map=mapped).x.tolist()
    )


@pytest.mark.parametrize("body", ["", "[1]\n", "{}\n", "not json\n", '{"pid": 1\n', "\xff"])
def test_ndjson_without_an_object_first_is_refused(tmp_path: Path, body: str) -> None:
    path = tmp_path / "a.ndjson"
    path.write_bytes(body.encode("latin-1"))
    assert refusal(path, "ndjson").code == "source.header"


def test_a_malformed_line_of_ndjson_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    good = '{"pid": "p1", "hb": 1, "sex": "weiblich", "died": "0"}\n'
    for bad in (f'{{"pid": "{SECRET}", \n', "[]]\n", f'"{SECRET}" x\n'):
        path.write_text(good + bad)
        assert refusal(path, "ndjson").code == "source.malformed"


def test_a_duckdb_file_gives_the_table_that_the_policy_names(tmp_path: Path) -> None:
    path = tmp_path / "a.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "CREATE SCHEMA lab; CREATE TABLE lab.visits (pid INTEGER, hb DOUBLE, sex VARCHAR, died BOOLEAN)"
        )
        connection.execute("INSERT INTO lab.visits VALUES (1, 13.5, 'weiblich', true), (2, NULL, 'x', false)")
        connection.execute(
            "CREATE VIEW shown AS SELECT pid, hb, sex, CAST(died AS INTEGER) AS died FROM lab.visits"
        )
    assert haemoglobin(load(path, "duckdb", table="shown")) == [13.5, 10.0]
    mapping = {"died": {"codes": {"true": "1", "false": "0"}}}
    assert load(path, "duckdb", table="lab.visits", map=mapping).y.tolist() == [1, 0]
    assert refusal(path, "duckdb").code == "source.table"
    assert refusal(path, "duckdb", table="absent").code == "source.malformed"
    assert refusal(path, "duckdb", table='visits"; DROP TABLE lab.visits; --').code == "source.malformed"
    with duckdb.connect(str(path), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM lab.visits").fetchone() == (2,)


def test_what_is_no_duckdb_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.duckdb"
    path.write_bytes(SECRET.encode() * 100)
    assert refusal(path, "duckdb", table="t").code == "source.malformed"


def test_further_files_have_the_columns_that_the_policy_names(tmp_path: Path) -> None:
    main, visits = tmp_path / "a.csv", tmp_path / "visits.csv"
    main.write_text("pid,hb,sex,died\np1,1,weiblich,0\n")
    visits.write_text("pid,hb,ward\np1,12,A\np1,13,B\n")
    source = DataSource(
        source=f"csv:{main}", patient="pid", columns=["hb", "sex", "died"], tables={"visits": f"csv:{visits}"}
    )
    one = source.model_copy(update={"source": source.tables["visits"]})
    with engine.connect([main.resolve(), visits.resolve()]) as connection:
        files.fill(connection, one, ("pid", *source.columns), copied=True, table="visits", partly=True)
        # The ward is nobody's to see: the policy does not name it.
        assert connection.execute("SELECT * FROM visits ORDER BY hb").fetchall() == [
            ("p1", "12"),
            ("p1", "13"),
        ]


CELLS = st.one_of(
    st.none(), st.integers(-5, 30), st.floats(-5, 30, allow_nan=False), st.sampled_from(["9", "x", ""])
)


@given(st.lists(st.tuples(CELLS, st.sampled_from(["männlich", "weiblich", ""])), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ndjson_agrees_with_csv(tmp_path: Path, rows: list[tuple[Any, str]]) -> None:
    lines = [{"pid": f"p{i:02}", "hb": hb, "sex": sex, "died": "1"} for i, (hb, sex) in enumerate(rows)]
    (tmp_path / "a.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))
    body = "".join(",".join("" if v is None else str(v) for v in line.values()) + "\n" for line in lines)
    (tmp_path / "a.csv").write_text("pid,hb,sex,died\n" + body)
    found: list[NDArray[np.float64]] = [load(tmp_path / f"a.{kind}", kind).x for kind in ("ndjson", "csv")]
    np.testing.assert_array_equal(*found)


LINES = [
    {"pid": f"p{i % 30}", "hb": [None, 13.5, "x", -0.0][i % 4], "sex": "weiblich", "died": str(i % 2)}
    for i in range(90)
]


@pytest.mark.parametrize("kind", ["csv", "ndjson"])
def test_files_larger_than_memory_are_streamed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        rows = (",".join("" if cell is None else str(cell) for cell in line.values()) for line in LINES)
        path.write_text("pid,hb,sex,died\n" + "\n".join(rows) + "\n")
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    contract = CONTRACT.model_copy(update={"rows_per_patient": 2})
    whole = load(path, kind, contract)
    monkeypatch.setattr(extract, "IN_MEMORY_SIZE_BYTES", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    streamed = load(path, kind, contract)
    assert streamed.ids == whole.ids
    for name in ("x", "y", "patient_index"):
        assert getattr(streamed, name).tobytes() == getattr(whole, name).tobytes()
    # The scratch file never had a name.
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_no_fault_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("pid,hb,sex,died\np1,1,weiblich,0\n" * 1)
    source = DataSource(source=f"csv:{path}", patient="pid")
    with engine.connect([path, Path("/dev/full")]) as connection, pytest.raises(FailureError) as caught:
        files.fill(connection, source, ["pid", "hb"], copied=False, scratch="/dev/full")
    assert caught.value.code == "source.scratch"
    assert caught.value.__context__ is None


def test_a_file_that_is_not_text_at_all_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"pid,hb,sex,died\n" + bytes(range(256)) * 4)
    with pytest.raises((ContractError, FailureError)) as caught:
        load(path, "csv")
    assert caught.value.__context__ is None
