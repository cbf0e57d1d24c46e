"""Labels of every kind from files: the same table whatever the file is, and what is wrong with them told."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from client.quality import check
from client.sources.extract import load_table
from client.sources.source import DataSource
from common.contract import Amount, Contract, NoLabel, Number, TimeToEvent

AGE = Number(kind="number", name="age", unit="a", minimum=0.0, maximum=100.0, present=True)
BEDS = Amount(kind="number", name="stay", unit="d", minimum=0.0, maximum=10.0)
EXIT = TimeToEvent(
    kind="time_to_event", name="stay", unit="d", event="died", codes=("no", "yes"), ends=(2.0, 5.0, 10.0)
)
ROWS = [
    ("a", "50", "1.5", "yes"), ("b", "", "4", "no"), ("c", "70", "", "yes"), ("d", "20", "12.25", "yes"),
    ("e", "30", "5", "maybe"), ("f", "10", "-1", "no"), ("g", "90", "0", "no"),
]  # fmt: skip
SUFFIXES = (".csv", ".parquet", ".ndjson")


def contract_of(label: Any, **more: Any) -> Contract:
    return Contract(patient="pid", features=(AGE,), label=label, **more)


def file_of(folder: Path, suffix: str) -> DataSource:
    table = folder / f"rows{suffix}"
    text = "\n".join(["pid,age,stay,died", *(",".join(row) for row in ROWS)])
    (folder / "plain.csv").write_text(text + "\n")
    form = {".csv": "csv, header", ".parquet": "parquet", ".ndjson": "json"}[suffix]
    chosen = f"SELECT * FROM read_csv('{folder}/plain.csv', header = true)"
    duckdb.sql(f"COPY ({chosen}) TO '{table}' (FORMAT {form})")
    return DataSource(source=f"{suffix[1:]}:{table}", patient="pid", columns=["age", "stay", "died"])


def labels_of(source: DataSource, contract: Contract) -> dict[str, int]:
    table = load_table(source, contract, key=bytes(32))
    return dict(zip(table.ids, table.y.tolist(), strict=True))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_kinds_of_label_agree_with_the_contract(suffix: str, tmp_path: Path) -> None:
    source = file_of(tmp_path, suffix)
    for label in (BEDS, EXIT):
        columns = {"stay": [row[2] for row in ROWS], "died": [row[3] for row in ROWS]}
        expected = label.labels(*(columns[name] for name in label.columns))
        known = {row[0]: int(y) for row, y in zip(ROWS, expected, strict=True) if y >= 0}
        assert labels_of(source, contract_of(label)) == known
    assert labels_of(source, contract_of(NoLabel(kind="none"))) == {row[0]: 0 for row in ROWS}


def test_a_value_that_is_absent_is_told_from_the_middle(tmp_path: Path) -> None:
    table = load_table(file_of(tmp_path, ".csv"), contract_of(NoLabel(kind="none")), key=bytes(32))
    assert np.array_equal(table.x[:2], [[0.0, 1.0], [0.0, 0.0]])


def test_labels_in_another_unit_are_converted(tmp_path: Path) -> None:
    source = file_of(tmp_path, ".csv").model_copy(update={})
    hours = DataSource.model_validate(source.model_dump(mode="json") | {"map": {"stay": {"unit": "h"}}})
    exits = labels_of(hours, contract_of(EXIT))
    assert exits["d"] == 1  # half a day, in the first interval


def test_what_is_wrong_with_a_label_is_counted(tmp_path: Path) -> None:
    source = file_of(tmp_path, ".csv")
    report = check(source, contract_of(EXIT))
    assert report.patients == 4
    said = {(finding.column, finding.rule) for finding in report.findings}
    assert ("died", "codes that the contract does not know") in said
    assert ("stay", "values below zero") in said
    amounts = check(source, contract_of(BEDS))
    assert amounts.patients == 6
    assert any(finding.column == "stay" for finding in amounts.findings)
    assert not [f for f in check(source, contract_of(NoLabel(kind="none"))).findings if f.column != "age"]
