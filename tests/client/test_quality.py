"""What is wrong with a hospital's data: one finding for each way in which real extracts are bad."""

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.quality import BINS, Report, check
from client.sources.source import DataSource
from common.contract import Category, Contract, Events, Image, Label, Number, Window
from common.errors import ContractError
from tests.client.sources.test_dicom import write as write_dicom

SECRET = "Grünwald-4711"
CONTRACT = Contract(
    patient="pid",
    rows_per_patient=2,
    features=(
        Number(kind="number", name="age", unit="a", minimum=0.0, maximum=120.0),
        Number(kind="number", name="glucose", unit="mg/dL", minimum=20.0, maximum=600.0, analyte="glucose"),
        Category(kind="category", name="sex", codes=("f", "m")),
    ),
    label=Label(name="died", classes=("0", "1")),
    window=Window(column="seen", first="2020-01-01", last="2020-12-31"),
)
HEADER = "pid,age,glucose,sex,died,seen"
GOOD = [f"p{i},{30 + i % 60},{80 + i},{'fm'[i % 2]},{i % 2},2020-05-{1 + i % 28:02}" for i in range(40)]


def report(tmp_path: Path, lines: list[str], contract: Contract = CONTRACT, **more: Any) -> Report:
    path = tmp_path / "a.csv"
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return check(DataSource(source=f"csv:{path}", patient="pid", **more), contract)


def errors(found: Report) -> list[tuple[str, int]]:
    return [(finding.column, finding.count) for finding in found.errors]


def test_good_data_have_no_errors(tmp_path: Path) -> None:
    found = report(tmp_path, GOOD)
    assert (found.rows, found.patients, found.findings) == (40, 40, [])
    found.refuse()
    assert [column.name for column in found.columns] == ["age", "glucose", "sex", "died"]
    assert [sum(count for _, count in column.bars) for column in found.columns] == [40] * 4


def change(place: int, cell: str, count: int = 1) -> list[str]:
    """The good rows, with a cell of the first ``count`` changed."""
    rows = [line.split(",") for line in GOOD]
    for row in rows[:count]:
        row[place] = cell
    return [",".join(row) for row in rows]


@pytest.mark.parametrize(
    ("lines", "finding"),
    [
        (change(1, '"47,5"'), ("age", "decimal comma", 1)),
        (change(1, '"47,5"', 7), ("age", "decimal comma", 7)),
        (change(1, SECRET, 2), ("age", "no number", 2)),
        (change(1, "nan", 3), ("age", "no number", 3)),
        (change(1, "inf"), ("age", "no number", 1)),
        (change(1, "-3", 2), ("age", "below zero", 2)),
        (change(1, "1e5", 3), ("age", "outside the public range", 3)),
        (change(3, SECRET, 2), ("sex", "does not know", 2)),
        (change(4, SECRET, 2), ("died", "does not know", 2)),
        (change(4, "1", 40), ("died", "two classes", 1)),
        (change(5, "soon", 2), ("seen", "no date", 2)),
    ],
)
def test_each_fault_is_one_line_with_column_rule_count_and_remedy(
    tmp_path: Path, lines: list[str], finding: tuple[str, str, int]
) -> None:
    found = report(tmp_path, lines)
    column, rule, count = finding
    first = next(one for one in found.errors if one.column == column)
    assert (rule in first.rule, first.count, bool(first.remedy)) == (True, count, True)
    with pytest.raises(ContractError) as caught:
        found.refuse()
    error = caught.value
    assert error.exit_code == 7
    assert "a.csv" in error.problem
    assert SECRET not in str(error) + repr(found)


def test_three_forms_of_dates_are_told(tmp_path: Path) -> None:
    lines = [line.replace("2020-05-", "") for line in GOOD]
    forms = [line[:-2] + ("2020-05-01", "01.05.2020", "05/01/2020")[i % 3] for i, line in enumerate(lines)]
    (finding,) = [one for one in report(tmp_path, forms).errors if one.column == "seen"]
    assert "written in 3 ways" in finding.rule
    assert "date_format" in finding.remedy


def test_swapped_units_are_named(tmp_path: Path) -> None:
    rows = [line.split(",") for line in GOOD]
    lines = [",".join([*row[:2], f"{float(row[2]) / 18.0156:.2f}", *row[3:]]) for row in rows]
    found = report(tmp_path, lines)
    (finding,) = found.errors
    assert (finding.column, finding.count) == ("glucose", 40)
    assert "mmol/L" in finding.remedy
    mapped = report(tmp_path, lines, map={"glucose": {"unit": "mmol/L"}})
    assert mapped.errors == []


def test_a_few_values_outside_the_range_are_a_note(tmp_path: Path) -> None:
    lines = [f"p{i},{i % 100},{100},{'fm'[i % 2]},{i % 2},2020-05-01" for i in range(300)]
    lines[0] = "p0,130,100,f,0,2020-05-01"
    found = report(tmp_path, lines)
    assert [(one.error, one.count) for one in found.findings] == [(False, 1)]


def test_a_column_without_a_value_is_a_note(tmp_path: Path) -> None:
    found = report(tmp_path, change(1, "", 40))
    assert [(one.error, one.column, one.count) for one in found.findings] == [(False, "age", 40)]
    assert found.columns[0].absent == 40


def test_what_is_wrong_with_rows_is_told(tmp_path: Path) -> None:
    assert errors(report(tmp_path, [])) == [("", 0)]
    none = report(tmp_path, [line.replace(",2020", ",2021") for line in GOOD])
    assert (none.patients, none.errors[0].rule) == (
        0,
        "no row has a patient, a known label and a date inside the window",
    )
    found = report(tmp_path, [*GOOD, *GOOD[:1] * 3, ",50,100,f,0,2020-05-01", "q,50,100,f,0,2019-05-01"])
    notes = {one.rule: one.count for one in found.findings}
    assert notes == {
        "rows that name no one patient are left out": 1,
        "rows outside 2020-01-01 to 2020-12-31 are left out": 1,
        "patients with more than 2 rows; which stay is drawn by this site's secret": 1,
        "rows that occur more than once": 3,
    }
    assert found.errors == []


def test_numbers_that_are_not_finite_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    duckdb.sql(
        f"COPY (SELECT 'p' || i AS pid, CASE WHEN i < 3 THEN 'nan'::DOUBLE WHEN i < 5 THEN 'inf'::DOUBLE ELSE 50 END AS age, "
        "100 AS glucose, 'f' AS sex, i % 2 AS died, DATE '2020-05-01' AS seen "
        f"FROM range(40) AS t(i)) TO '{path}' (FORMAT parquet)"
    )
    found = check(DataSource(source=f"parquet:{path}", patient="pid"), CONTRACT)
    assert [(one.column, one.rule, one.count) for one in found.errors] == [
        ("age", "NaN or infinite values", 5)
    ]


def test_lists_and_images_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    contract = Contract(
        patient="pid", features=(Events(kind="events", name="codes", codes=("A",)),), label=CONTRACT.label
    )
    cells = [["A"], [{"t": 1, "v": "A"}], None, "none", {"a": 1}]
    rows = [{"pid": f"p{i}", "codes": cell, "died": i % 2} for i, cell in enumerate(cells)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check(DataSource(source=f"ndjson:{path}", patient="pid"), contract)
    assert [(one.column, one.rule, one.count) for one in found.errors] == [
        ("codes", "cells that are no list", 2)
    ]
    folder = tmp_path / "images"
    folder.mkdir()
    write_dicom(folder / "a.dcm")
    write_dicom(folder / "b.dcm", BurnedInAnnotation="YES")
    (tmp_path / "index.csv").write_text("pid,scan,died\np1,a.dcm,0\np2,b.dcm,1\np3,c.dcm,1\n")
    image = Image(kind="image", name="scan", height=2, width_px=2, modality="CT", low=-1.0, high=1.0)
    contract = Contract(patient="pid", features=(image,), label=CONTRACT.label)
    held = DataSource(source=f"dicom:{folder}", patient="pid", table=str(tmp_path / "index.csv"))
    found = check(held, contract)
    assert [(one.column, one.count) for one in found.errors] == [("scan", 1), ("scan", 1)]
    assert "burnt-in" in found.errors[0].rule
    assert "'b.dcm'" in found.errors[0].rule


CELLS = st.one_of(
    st.integers(-20, 700).map(str), st.sampled_from(["", " ", "x", "4,5", "nan", "-0", "1e400", "12.5"])
)


@given(
    st.lists(
        st.tuples(CELLS, st.sampled_from(["f", "m", "", "x"]), st.sampled_from(["0", "1", "2"])),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_are_those_of_a_loop(tmp_path: Path, cells: list[tuple[str, str, str]]) -> None:
    lines = [f'p{i},"{age}",100,{sex},{died},2020-05-01' for i, (age, sex, died) in enumerate(cells)]
    found = report(tmp_path, lines)
    column = next(one for one in found.columns if one.name == "age")
    values = [np.nan] * len(cells)
    for at, (age, _, _) in enumerate(cells):
        if age.strip() and age.strip() not in ("x", "4,5", "nan"):
            values[at] = float(age)
    finite = [value for value in values if np.isfinite(value)]
    assert column.absent == sum(not age.strip() for age, _, _ in cells)
    edges = np.linspace(0, 120, BINS + 1)
    counted = np.histogram([v for v in finite if 0 <= v <= 120], bins=edges)[0].tolist()
    assert [count for _, count in column.bars] == counted
    told = {one.rule: one.count for one in found.findings if one.column == "age"}
    assert told.get("values below zero", 0) == sum(value < 0 for value in finite)
    assert told.get("numbers with a decimal comma", 0) == sum(age == "4,5" for age, _, _ in cells)
    outside = [count for rule, count in told.items() if rule.startswith("values outside")]
    assert sum(outside) == sum(value > 120 for value in finite)
    assert found.patients == sum(died != "2" for _, _, died in cells)


def test_reports_hold_no_value(tmp_path: Path) -> None:
    found = report(tmp_path, [f"{SECRET},{SECRET},{SECRET},{SECRET},{SECRET},{SECRET}"] * 3)
    assert len(found.errors) >= 4
    assert SECRET not in repr(found)
