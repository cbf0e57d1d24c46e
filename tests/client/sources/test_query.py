"""Studies' queries on hospitals' tables: what they make, that patients stay apart, and what stops them."""

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.snapshot import local
from client.sources import engine, query
from client.sources.extract import Extract, load_table, opened
from client.sources.source import DataSource
from common.contract import Category, Contract, Label, Number, PublicTable, Series
from common.errors import ContractError, FailureError
from common.query import check_query

LABEL = Label(name="died", classes=("0", "1"))
UNITS = PublicTable(name="units", columns=("code", "factor"), rows=(("mg", "1"), ("g", "1000")))


def contract(sql: str, *names: str, tables: tuple[PublicTable, ...] = (UNITS,)) -> Contract:
    features = tuple(
        Number(kind="number", name=name, unit="1", minimum=0.0, maximum=10.0)
        if name != "sex" else Category(kind="category", name=name, codes=("f", "m"))
        for name in names
    )  # fmt: skip
    return Contract(patient="pid", features=features, label=LABEL, query=sql, tables=tables)


def source(folder: Path, visits: Sequence[dict[str, Any]], patients: Sequence[dict[str, Any]]) -> DataSource:
    """Two NDJSON files: patients as the source, their visits beside it."""
    for name, rows, keys in (
        ("a", patients, ("pid", "sex", "died", "x")),
        ("v", visits, ("pid", "day", "x", "died")),
    ):
        full = [dict.fromkeys(keys)] + [dict.fromkeys(keys) | row for row in rows]
        (folder / f"{name}.ndjson").write_text("".join(json.dumps(row) + "\n" for row in full))
    return DataSource(
        source=f"ndjson:{folder}/a.ndjson", patient="pid", columns=["sex", "died", "x", "day"],
        tables={"visits": f"ndjson:{folder}/v.ndjson"},
    )  # fmt: skip


PATIENTS = [
    {"pid": "p1", "sex": "f", "died": 0, "x": 1.5},
    {"pid": " p2 ", "sex": "m", "died": 1, "x": "soon"},
    {"pid": 3, "sex": "f", "died": 1, "x": -0.0},
    {"pid": "nan", "sex": "f", "died": 1, "x": 5},
]
VISITS = [
    {"pid": "p1", "day": "2020-01-01", "x": 4},
    {"pid": "p1", "day": "2020-02-01", "x": 7},
    {"pid": "p2", "day": "x", "x": 1},
    {"pid": "3", "day": "2020-01-05", "x": 2},
    {"pid": None, "day": "2020-01-05", "x": 9},
]
LATEST = """WITH v AS (
        SELECT pid, max({'day': day, 'x': x}).x AS x, count(*) AS n FROM visits GROUP BY pid
    )
    SELECT e.pid, TRY_CAST(v.x AS DOUBLE) AS x, v.n, e.sex, e.died FROM extract e LEFT JOIN v ON e.pid = v.pid"""


def rows(of: DataSource, made: Contract) -> list[tuple[Any, ...]]:
    with opened(of, made) as found:
        return sorted(found.run("SELECT * FROM extract").fetchall(), key=repr)


def test_a_query_makes_the_columns_of_the_contract(tmp_path: Path) -> None:
    held, made = source(tmp_path, VISITS, PATIENTS), contract(LATEST, "x", "n", "sex")
    assert rows(held, made) == [("3", 2.0, 1, "f", "1"), ("p1", 7.0, 2, "f", "0"), ("p2", 1.0, 1, "m", "1")]
    table = load_table(held, made, key=bytes(32))
    assert (table.ids, table.y.tolist()) == (["3", "p1", "p2"], [1, 0, 1])


def test_no_value_fails_a_query(tmp_path: Path) -> None:
    sql = (
        "SELECT pid, CAST(x AS INTEGER) / 0 AS a, ln(CAST(x AS DOUBLE) - 1000) + CAST(sex AS INTEGER) AS b, "
        "CASE WHEN CAST(x AS INTEGER) > 1 THEN 1 END AS c, died FROM extract "
        "WHERE CAST(died AS INTEGER) >= 0 AND (CAST(x AS DOUBLE) < 100 OR sex = 'm' OR sex = 'f')"
    )
    found = rows(source(tmp_path, VISITS, PATIENTS), contract(sql, "a", "b", "c"))
    # A condition that cannot be computed does not hold; a row is never lost for another one's value.
    assert {row[0] for row in found} <= {"p1", "p2", "3"}
    assert {"p1", "3"} <= {row[0] for row in found}
    assert all(row[2] is None for row in found)


def test_public_tables_are_joined(tmp_path: Path) -> None:
    sql = "SELECT e.pid, e.died, CAST(u.factor AS DOUBLE) * TRY_CAST(e.x AS DOUBLE) AS x FROM extract e JOIN units u ON u.code = 'g'"
    assert [row[0] for row in rows(source(tmp_path, VISITS, PATIENTS), contract(sql, "x"))] == [
        "3",
        "p1",
        "p2",
    ]


def refusal(held: DataSource, made: Contract) -> ContractError:
    with pytest.raises(ContractError) as caught:
        rows(held, made)
    assert caught.value.remedy
    assert caught.value.__context__ is None or caught.value.code == "contract.query"
    return caught.value


def test_what_does_not_fit_this_hospital_is_refused(tmp_path: Path) -> None:
    held = source(tmp_path, VISITS, PATIENTS)
    for sql in (
        "SELECT pid, absent AS x, died FROM extract",
        "SELECT pid, x, died FROM absent",
        'SELECT pid, x, died FROM "rows of extract"',
        "SELECT pid, x, died FROM duckdb_settings",
        "SELECT pid, rowid AS x, died FROM extract",
        "SELECT pid, x, died FROM extract LIMIT 1",
        "SELECT pid, substring(x, 1, 2, 3) AS x, died FROM extract",
    ):
        assert refusal(held, contract(sql, "x")).code == "contract.query", sql
    taken = contract(
        "SELECT pid, x, died FROM extract", "x", tables=(UNITS.model_copy(update={"name": "visits"}),)
    )
    assert "'visits'" in refusal(held, taken).problem


def test_columns_that_the_policy_does_not_name_are_not_there(tmp_path: Path) -> None:
    held = source(tmp_path, VISITS, PATIENTS).model_copy(update={"columns": ["died"]})
    for table in ("extract", "visits"):
        assert refusal(held, contract(f"SELECT pid, x, died FROM {table}", "x")).code == "contract.query"


def test_a_query_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"pid": "p1", "x": i, "day": "d"} for i in range(4000)]
    sql = (
        "SELECT a.pid, max(a.x) AS x, max(b.died) AS died FROM visits a JOIN visits b ON a.pid = b.pid "
        "JOIN visits c ON c.pid = b.pid AND c.x < b.x GROUP BY a.pid"
    )
    monkeypatch.setattr(query.run, "__defaults__", (0.3,))
    with pytest.raises(FailureError) as caught:
        rows(source(tmp_path, many, PATIENTS), contract(sql, "x"))
    assert caught.value.code == "contract.query-limit"


def test_what_is_not_separable_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a query to pass the syntax tree, the halves would still tell."""
    sql = "SELECT pid, count(*) OVER () AS x, max(died) OVER () AS died FROM extract"
    monkeypatch.setattr(query, "check_query", lambda *_: (("pid", "x", "died"), sql))
    held = source(tmp_path, VISITS, [{"pid": f"p{i}", "died": i % 2} for i in range(40)])
    assert refusal(held, contract("SELECT 1", "x")).code == "contract.query-mixes"


def test_a_long_table_becomes_a_series(tmp_path: Path) -> None:
    visits = [{"pid": "p1", "day": day, "x": x} for day, x in ((2, 7), (0, 4), (9, 1), ("x", 3))]
    sql = (
        "WITH v AS (SELECT pid, CAST(day AS DOUBLE) AS t, CAST(x AS DOUBLE) AS v FROM visits), "
        "l AS (SELECT pid, list({'t': t, 'v': v} ORDER BY {'t': t, 'v': v}) AS x FROM v GROUP BY pid) "
        "SELECT e.pid, l.x, e.died FROM extract e LEFT JOIN l ON e.pid = l.pid"
    )
    channel = Number(kind="number", name="x", unit="1", minimum=0.0, maximum=10.0)
    made = Contract(
        patient="pid",
        features=(Series(kind="series", name="s", steps=3, channels=(channel,)),),
        label=LABEL,
        query=sql,
    )
    table = load_table(source(tmp_path, visits, PATIENTS), made, key=bytes(32))
    first = table.x[table.ids.index("p1")].reshape(3, 2)
    assert [round((value + 1) * 5, 6) if there else None for value, there in first] == [4.0, None, 7.0]
    assert not table.x[table.ids.index("p2")].reshape(3, 2)[:, 1].any()


def test_a_query_on_a_kind_without_tables_is_refused(tmp_path: Path) -> None:
    held = DataSource(source=f"fhir:{tmp_path}", patient="pid", cohort=str(tmp_path / "c.csv"))
    assert refusal(held, contract("SELECT pid, x, died FROM extract", "x")).code == "source.query"


def test_a_query_runs_on_the_copy_of_a_database(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("CREATE TABLE t (id INTEGER, x REAL, sex TEXT, died INTEGER, note TEXT)")
        database.executemany(
            "INSERT INTO t VALUES (?, ?, ?, ?, 'kept')",
            [(1, 1.5, "w", 0), (1, 4.0, "w", 1), (2, 2.0, "m", 0)],
        )
    database.close()
    held = DataSource(
        source=f"sql:sqlite:///{tmp_path}/a.db", patient="pid", table="t", columns=["x", "sex", "died"],
        map={"pid": {"column": "id"}, "sex": {"codes": {"w": "f"}}},  # type: ignore[dict-item]
    )  # fmt: skip
    sql = "SELECT pid, sex, max(x) AS x, max(died) AS died FROM extract GROUP BY pid, sex"
    made = contract(sql, "x", "sex")
    with local(held, made, tmp_path / "copies") as copy:
        assert sorted(rows(copy, made)) == [("1", "f", 4.0, 1), ("2", "m", 2.0, 0)]
        wrong = contract(sql.replace("max(x)", "max(note)"), "x", "sex")
        assert refusal(copy, wrong).code == "contract.query"


# Separability: random tables, random queries ------------------------------------------------------------

CELLS = st.sampled_from([None, 0, -0.0, 1, 2.5, "2", "x", "", 1e300, True])
PEOPLE = st.sampled_from(["p1", "p2", "p3", "1", "01", 1, None, "nan"])
ROWS = st.lists(
    st.fixed_dictionaries({"pid": PEOPLE, "x": CELLS, "sex": CELLS, "day": CELLS, "died": CELLS}), max_size=8
)
SCALAR = st.sampled_from([
    "{0}.x", "CAST({0}.x AS DOUBLE) + 1", "1 / CAST({0}.x AS INTEGER)", "TRY_CAST({0}.x AS DOUBLE)",
    "CASE WHEN {0}.x > {0}.died THEN {0}.x ELSE {0}.died END", "{0}.x || ''", "coalesce({0}.x, '7')",
    "ln(CAST({0}.x AS DOUBLE))", "CAST({0}.x AS INTEGER)", "round(CAST({0}.x AS DOUBLE), 1) * -1",
    "CAST({0}.x AS BIGINT) * 9223372036854775807",
])  # fmt: skip
AGGREGATE = st.sampled_from([
    "count(*)", "count({0}.x)", "max({0}.x)", "min(TRY_CAST({0}.x AS DOUBLE))", "sum(TRY_CAST({0}.x AS DECIMAL(18, 2)))",
    "avg(CAST({0}.x AS INTEGER))", "max({{'a': {0}.x, 'b': {0}.died}}).b", "list({0}.x ORDER BY {0}.x)",
    "bool_or(CAST({0}.x AS DOUBLE) > 1)", "count(*) FILTER (WHERE {0}.x > {0}.died)",
])  # fmt: skip
WINDOW = st.sampled_from([
    "rank() OVER (PARTITION BY {0}.pid ORDER BY {0}.x)", "count(*) OVER (PARTITION BY {0}.died, {0}.pid)",
    "max({0}.x) OVER (PARTITION BY {0}.pid ORDER BY {0}.died)",
    "sum(CAST({0}.x AS BIGINT)) OVER (PARTITION BY {0}.pid ORDER BY {0}.x)",
])  # fmt: skip
WHERE = st.sampled_from(
    [
        "",
        " WHERE CAST({0}.x AS DOUBLE) > 1",
        " WHERE {0}.x = {0}.died OR {0}.x IS NULL",
        " WHERE CAST({0}.x AS INTEGER) < 3",
    ]
)


@st.composite
def selects(draw: st.DrawFn, depth: int = 2) -> str:
    """An allowed SELECT of pid, x and died."""
    inner = draw(selects(depth - 1)) if depth and draw(st.booleans()) else None
    first = f"({inner}) AS a" if inner else f"{draw(st.sampled_from(['extract', 'visits']))} AS a"
    join = draw(st.sampled_from([
        "", " JOIN visits b ON a.pid = b.pid", " LEFT JOIN visits b ON b.pid = a.pid AND b.x > a.x",
        " LEFT JOIN (SELECT pid, max(x) AS x, max(died) AS died FROM extract GROUP BY pid) AS b ON a.pid = b.pid",
        " JOIN units u ON u.factor <> a.x",
    ]))  # fmt: skip
    other = draw(st.sampled_from(["a", "b"])) if " b ON" in join else "a"
    where = draw(WHERE).format("a")
    form = draw(st.sampled_from(["plain", "grouped", "window"]))
    if form == "grouped":
        return f"SELECT a.pid, {draw(AGGREGATE).format(other)} AS x, max({other}.died) AS died FROM {first}{join}{where} GROUP BY a.pid"
    item = draw(SCALAR if form == "plain" else WINDOW).format(other if form == "plain" else "a")
    return f"SELECT a.pid, {item} AS x, {other}.died AS died FROM {first}{join}{where}"


def answered(
    folder: Path, sql: str, patients: list[dict[str, Any]], visits: list[dict[str, Any]]
) -> list[str]:
    """What the query makes of the hospital's tables, as texts: without encoding nothing is forgiven."""
    held, made = source(folder, visits, patients), contract(sql, "x")
    try:
        return [repr(row) for row in rows(held, made)]
    except ContractError as error:
        # Of two types that do not fit together: with any rows, then.
        if error.code != "contract.query":
            raise
        return ["refused"]


def text_id(row: dict[str, Any]) -> str:
    return str(row["pid"])


@given(selects(), ROWS, ROWS, st.sampled_from(["p1", "p2", "1", "01"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_queries_are_separable(
    tmp_path: Path, sql: str, patients: list[dict[str, Any]], visits: list[dict[str, Any]], person: str
) -> None:
    check_query(sql, "pid", {"units": UNITS.columns})
    whole = answered(tmp_path, sql, patients, visits)
    left = answered(
        tmp_path,
        sql,
        [r for r in patients if text_id(r) != person],
        [r for r in visits if text_id(r) != person],
    )
    assert left == [row for row in whole if not row.startswith(f"({person!r},")]
    hypothesis.event("refused" if whole == ["refused"] else f"{min(len(whole), 3)} rows")


def test_the_connection_of_a_query_reaches_nothing_else(tmp_path: Path) -> None:
    held, made = source(tmp_path, VISITS, PATIENTS), contract(LATEST, "x", "n", "sex")
    with opened(held, made) as found:
        for statement in (
            f"FROM '{tmp_path}/a.ndjson'",
            "SET memory_limit = '64GiB'",
            "SET threads = 2",
            "LOAD httpfs",
        ):
            with pytest.raises(engine.duckdb.Error):
                found.connection.execute(statement)
        assert isinstance(found, Extract)
        names = found.run("SELECT table_name FROM information_schema.tables").fetchall()
        assert sorted(names) == [("extract",), ("units",)]
