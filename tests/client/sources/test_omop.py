"""OMOP CDM 5.4 as extract: against a naive reading in Python, on DuckDB, Parquet and PostgreSQL."""

import math
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.snapshot import local
from client.sources import engine, omop
from client.sources.extract import load_table, opened
from client.sources.source import DataSource
from common.contract import Category, Contract, Derived, Events, Label, Number, Series, Window
from common.contract.units import factor
from common.errors import ContractError, WardroundError
from tests.client.sources import postgres
from tests.client.sources.cdm import (
    TABLES,
    Cdm,
    cohort,
    duckdb_file,
    event,
    parquet_folder,
    statements,
    without,
)
from tests.client.sources.postgres import Postgres

GLUCOSE, HB, HYPERTENSION, DIABETES, METFORMIN, INPATIENT = 3004501, 3000963, 320128, 201826, 1503297, 9201
YEAR = (-365, 0)


def number(name: str, unit: str, derived: Derived, analyte: Any = "") -> Number:
    return Number(
        kind="number", name=name, unit=unit, minimum=0.0, maximum=1000.0, analyte=analyte, source=derived
    )


def derived(what: Any, take: Any, *concepts: int, days: tuple[int, int] = YEAR) -> Derived:
    return Derived(what=what, take=take, omop=concepts, days=days)


CONTRACT = Contract(
    patient="person",
    rows_per_patient=3,
    features=(
        number("age", "a", Derived(what="age")),
        number("glucose", "mg/dL", derived("measurement", "last", GLUCOSE), "glucose"),
        number("measured", "1", derived("measurement", "count", GLUCOSE, HB, days=(-30, -1))),
        number("visits", "1", derived("visit", "count")),
        Category(kind="category", name="sex", codes=("female", "male"), source=Derived(what="sex")),
        Category(kind="category", name="htn", codes=("true", "false"), source=derived("condition", "any", HYPERTENSION)),
        Events(
            kind="events", name="history", codes=(str(HYPERTENSION), str(DIABETES)), form="tokens", length=4,
            horizon=365.0, source=derived("condition", "list", HYPERTENSION, DIABETES),
        ),
        Series(
            kind="series", name="lab", steps=12, step=31.0, start=-365.0,
            channels=(number("sugar", "mmol/L", derived("measurement", "list", GLUCOSE), "glucose"),),
        ),
    ),
    label=Label(name="ill", classes=("true", "false"), source=derived("drug", "any", METFORMIN, days=(1, 90))),
)  # fmt: skip

CDM: Cdm = {
    "cohort": [
        *cohort(
            (1, "2020-06-15"), (2, "2020-06-15"), (3, "2020-01-01"), (3, "2021-01-01"), (3, "2021-01-01")
        ),
        *cohort((4, "2020-06-15"), number=18),
    ],
    "person": [
        (1, 8532, 1950, 6, 16),
        (2, 8507, 1980, None, None),
        (3, 0, 2000, 2, 29),
        (4, 8507, 1970, 1, 1),
    ],
    "measurement": [
        event(1, GLUCOSE, "2020-06-01", "08:00:00", 100, 8840, None),
        event(1, GLUCOSE, "2020-06-01", "20:00:00", 6, 8753, None),
        event(1, GLUCOSE, "2020-06-16", None, 999, 8840, None),
        event(1, HB, "2020-06-10", None, 13, None, "g/dL"),
        event(2, GLUCOSE, "2020-05-01", None, 90, None, "MG/DL?"),
        event(2, GLUCOSE, "2020-05-01", None, None, 8840, None),
        event(3, GLUCOSE, "2020-12-31", None, 5.5, None, "mmol/L"),
    ],
    "condition_occurrence": [
        event(1, HYPERTENSION, "2020-06-15"),
        event(1, DIABETES, "2019-12-31", "10:00:00"),
        event(2, HYPERTENSION, "2019-06-14"),
        event(3, HYPERTENSION, "2019-06-14"),
    ],
    "drug_exposure": [event(1, METFORMIN, "2020-07-01"), event(2, METFORMIN, "2020-06-15")],
    "visit_occurrence": [
        event(1, INPATIENT, "2020-01-01"),
        event(1, 0, "2020-02-01"),
        event(2, INPATIENT, "2021-01-01"),
    ],
}


def source(where: Path | str, **more: Any) -> DataSource:
    return DataSource(source=f"omop:{where}", patient="person", **{"cohort": "17", **more})


def rows(of: DataSource, contract: Contract = CONTRACT) -> dict[tuple[str, date], dict[str, Any]]:
    """The extract by patient and index date."""
    with opened(of, contract) as found:
        cursor = found.run("SELECT * FROM extract")
        columns = [str(column[0]) for column in cursor.description or []]
        made = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]
    keys = {(row.pop("person"), row.pop("index_date")): row for row in made}
    assert len(keys) == len(made)
    return keys


def test_a_cohort_is_read_with_what_the_contract_derives(tmp_path: Path) -> None:
    found = rows(source(duckdb_file(tmp_path / "cdm.duckdb", CDM)))
    assert found.keys() == {
        ("1", date(2020, 6, 15)), ("2", date(2020, 6, 15)), ("3", date(2020, 1, 1)), ("3", date(2021, 1, 1)),
    }  # fmt: skip
    first = found["1", date(2020, 6, 15)]
    assert (first["age"], first["sex"], first["htn"], first["ill"]) == (69, "female", True, True)
    assert first["glucose"] == pytest.approx(108.0936)
    assert (first["measured"], first["visits"]) == (3, 2)
    assert first["history"] == [
        {"t": pytest.approx(-166.5833, abs=1e-3), "v": str(DIABETES)},
        {"t": 0.0, "v": str(HYPERTENSION)},
    ]
    second = found["2", date(2020, 6, 15)]
    # A unit that nobody knows is no value; the year before the index date begins a day too late for one.
    assert (second["age"], second["sex"], second["glucose"], second["htn"], second["ill"]) == (
        40,
        "male",
        None,
        False,
        False,
    )
    assert (second["measured"], second["visits"], second["history"], second["sugar"]) == (0, 0, [], [])
    assert [found["3", date(year, 1, 1)]["age"] for year in (2020, 2021)] == [19, 20]
    assert found["3", date(2021, 1, 1)]["sex"] == "unknown"
    assert found["3", date(2021, 1, 1)]["sugar"] == [{"t": -1.0, "v": 5.5}]


def naive(cdm: Cdm, contract: Contract) -> dict[tuple[str, date], dict[str, Any]]:
    """The same, member by member and record by record."""
    people = {row[0]: row for row in cdm["person"]}
    found = {}
    for _, person, day, _ in (row for row in cdm["cohort"] if row[0] == 17):
        index = date.fromisoformat(day)
        made: dict[str, Any] = {}
        for name, of in contract.derived.items():
            if of.what in ("age", "sex"):
                made[name] = _person(people.get(person), of.what, index)
                continue
            table = {
                "condition": "condition_occurrence",
                "drug": "drug_exposure",
                "visit": "visit_occurrence",
            }
            records = []
            for row in cdm.get(table.get(of.what, of.what), []):
                offset = (date.fromisoformat(row[2]) - index).days
                if (
                    row[0] == person
                    and of.days[0] <= offset <= of.days[1]
                    and (not of.omop or row[1] in of.omop)
                ):
                    moment = datetime.fromisoformat(row[3]) if row[3] else datetime.fromisoformat(row[2])
                    t = (moment - datetime.combine(index, datetime.min.time())).total_seconds() / 86400
                    records.append(
                        (t, _value(contract, name, row) if of.what == "measurement" else str(row[1]))
                    )
            known = sorted((t, v) for t, v in records if v is not None)
            made[name] = {
                "any": lambda records=records: bool(records),
                "count": lambda records=records: len(records),
                "last": lambda known=known: known[-1][1] if known else None,
                "list": lambda known=known: [{"t": t, "v": v} for t, v in known],
            }[of.take]()
        found[str(person), index] = made
    return found


def _person(row: Any, what: str, index: date) -> Any:
    if row is None:
        return None
    if what == "sex":
        return {8532: "female", 8507: "male", 8521: "other"}.get(row[1], "unknown")
    born = (row[3] or 1, row[4] or 1)
    return index.year - row[2] - ((index.month, index.day) < born)


def _value(contract: Contract, name: str, row: Any) -> float | None:
    _, _, _, _, value, concept, text = row
    channels = {c.name: c for f in contract.features for c in (f.channels if isinstance(f, Series) else (f,))}
    unit = {8840: "mg/dL", 8753: "mmol/L"}.get(concept, text)
    of = channels[name]
    assert isinstance(of, Number)
    change = factor(of.analyte, unit or "", of.unit)
    return None if value is None or change is None else value * change[0] + change[1]


# Few days, so that records fall into windows, on their edges and beside them.
DAYS = st.sampled_from(
    ["2019-06-15", "2019-06-16", "2020-05-16", "2020-06-14", "2020-06-15", "2020-06-16", "2020-09-13"]
)
PEOPLE = st.integers(1, 2)
TIMES = st.sampled_from([None, "00:00:00", "08:30:00"])


def events(concepts: list[int], *more: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(
        st.builds(event, PEOPLE, st.sampled_from(concepts), DAYS, TIMES, *more), min_size=1, max_size=8
    )


CDMS = st.fixed_dictionaries(
    {
        "cohort": st.lists(st.tuples(PEOPLE, DAYS), min_size=1, max_size=4).map(lambda members: cohort(*members)),
        "person": st.lists(
            st.tuples(PEOPLE, st.sampled_from([8507, 8532, 8521, 0]), st.integers(1920, 2018), st.sampled_from([None, 2, 12]), st.sampled_from([None, 1, 28])),
            max_size=4, unique_by=lambda row: row[0],
        ),
        "measurement": events([GLUCOSE, HB, 1], st.sampled_from([None, 4, 5.5, 90]), st.sampled_from([None, 8840, 8753, 7]), st.sampled_from([None, "mg/dL", "stone"])),
        "condition_occurrence": events([HYPERTENSION, DIABETES, 5]),
        "drug_exposure": events([METFORMIN, 5]),
        "visit_occurrence": events([INPATIENT, 0]),
    }
)  # fmt: skip


def close(first: Any, second: Any) -> bool:
    if isinstance(first, list):
        return len(first) == len(second) and all(close(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[name], second[name]) for name in first)
    if isinstance(first, float):
        return second is not None and math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-9)
    return bool(first == second)


@given(CDMS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_features_agree_with_a_naive_reading(tmp_path: Path, cdm: Cdm) -> None:
    path = tmp_path / "cdm.duckdb"
    path.unlink(missing_ok=True)
    found, expected = rows(source(duckdb_file(path, cdm))), naive(cdm, CONTRACT)
    assert found.keys() == expected.keys()
    for key in expected:
        assert close(expected[key], found[key]), (key, expected[key], found[key])


@given(CDMS, PEOPLE)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_members_are_separable(tmp_path: Path, cdm: Cdm, person: int) -> None:
    path = tmp_path / "cdm.duckdb"
    found = []
    for data in (cdm, without(cdm, person)):
        path.unlink(missing_ok=True)
        found.append(rows(source(duckdb_file(path, data))))
    assert found[1] == {key: row for key, row in found[0].items() if key[0] != str(person)}


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres.cluster() as made:
        made.run("CREATE SCHEMA cdm", *statements(CDM, "cdm."), "GRANT USAGE ON SCHEMA cdm TO reader",
                 "GRANT SELECT ON ALL TABLES IN SCHEMA cdm TO reader")  # fmt: skip
        yield made


def test_all_places_agree(tmp_path: Path, server: Postgres) -> None:
    file = source(duckdb_file(tmp_path / "cdm.duckdb", CDM))
    folder = source(parquet_folder(tmp_path / "cdm", CDM))
    assert rows(file) == rows(folder)
    held = source(server.address, table="cdm", password_file=server.password_file(tmp_path))
    expected = load_table(file, CONTRACT, key=bytes(32))
    with local(held, CONTRACT, tmp_path / "copies") as copy:
        table = load_table(copy, CONTRACT, key=bytes(32))
    assert table.ids == expected.ids == ["1", "2", "3"]
    assert table.x.tobytes() == expected.x.tobytes()
    assert table.y.tobytes() == expected.y.tobytes()
    # Two admissions of one patient are rows of that patient.
    assert table.patient_index.tolist() == [0, 1, 2, 2]


def test_a_server_is_checked_before_it_is_read(tmp_path: Path, server: Postgres) -> None:
    held = source(server.address, table="cdm", password_file=server.password_file(tmp_path))
    server.run("GRANT DELETE ON cdm.person TO reader")
    try:
        assert refusal(held, tmp_path) == "source.account"
    finally:
        server.run("REVOKE DELETE ON cdm.person FROM reader")
    assert refusal(held.model_copy(update={"table": "absent"}), tmp_path) == "source.table"
    assert refusal(source("sqlite:////tmp/a.db"), tmp_path) in ("source.unreadable", "source.address")


def refusal(of: DataSource, tmp_path: Path) -> str:
    with pytest.raises(WardroundError) as caught, local(of, CONTRACT, tmp_path / "copies") as copy:
        load_table(copy, CONTRACT, key=bytes(32))
    assert caught.value.remedy
    return caught.value.code


def test_a_window_is_about_the_index_date(tmp_path: Path) -> None:
    windowed = CONTRACT.model_copy(
        update={"window": Window(column="index_date", first="2020-12-01", last="2021-12-31")}
    )
    path = duckdb_file(tmp_path / "cdm.duckdb", CDM)
    assert load_table(source(path), windowed, key=bytes(32)).ids == ["3"]


def test_what_lacks_or_is_no_common_data_model_is_refused(tmp_path: Path) -> None:
    path = duckdb_file(tmp_path / "cdm.duckdb", CDM)
    assert refusal(source(path, cohort=""), tmp_path) == "source.cohort"
    assert refusal(source(path, cohort="17; DROP TABLE person"), tmp_path) == "source.cohort"
    plain = CONTRACT.model_copy(
        update={"features": (Number(kind="number", name="bmi", unit="1", minimum=0.0, maximum=1.0),)}
    )
    with pytest.raises(ContractError) as caught:
        load_table(source(path), plain, key=bytes(32))
    assert (caught.value.code, "'bmi'" in caught.value.problem) == ("source.column", True)
    folder = parquet_folder(tmp_path / "cdm", CDM)
    (folder / "person.parquet").unlink()
    assert refusal(source(folder), tmp_path) == "source.unreadable"
    (tmp_path / "b.duckdb").write_text("no database")
    assert refusal(source(tmp_path / "b.duckdb"), tmp_path) == "source.malformed"


def test_only_the_tables_that_are_needed_are_read(tmp_path: Path) -> None:
    few = CONTRACT.model_copy(update={"features": CONTRACT.features[:1]})
    folder = parquet_folder(tmp_path / "cdm", CDM)
    for table in TABLES.keys() - {"cohort", "person", "drug_exposure"}:
        (folder / f"{table}.parquet").unlink()
    assert load_table(source(folder), few, key=bytes(32)).patients == 3
    with engine.connect(folders=[folder]) as connection:
        omop.fill(connection, source(folder), few)
        assert connection.execute("SELECT table_name FROM information_schema.tables").fetchall() == [
            ("extract",)
        ]
