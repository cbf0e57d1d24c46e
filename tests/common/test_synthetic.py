"""Made-up rows: they fit their contract, are marked, and follow from the seed."""

import csv
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from client.sources.extract import load_table
from client.sources.source import DataSource
from common.contract import Contract
from common.errors import UsageError
from common.synthetic import MARK, write
from server.cli import study

FEATURES: list[dict[str, Any]] = [
    {"kind": "number", "name": "age", "unit": "a", "minimum": 18.0, "maximum": 90.0},
    {"kind": "number", "name": "crp", "unit": "mg/L", "minimum": 0.1, "maximum": 300.0, "transform": "log"},
    {"kind": "category", "name": 'se"x', "codes": ["f", "m"]},
    {"kind": "text", "name": "note", "vocabulary": ["pain", "fever"]},
    {"kind": "events", "name": "codes", "codes": ["I10", "E11"], "length": 4},
    {"kind": "series", "name": "vitals", "steps": 5, "channels": [
        {"kind": "number", "name": "pulse", "unit": "/min", "minimum": 30.0, "maximum": 220.0}]},
    {"kind": "series", "name": "days", "steps": 3, "wide": True, "channels": [
        {"kind": "number", "name": "temp", "unit": "Cel", "minimum": 34.0, "maximum": 42.0}]},
]  # fmt: skip
WHOLE = Contract.model_validate(
    {
        "patient": "pid",
        "rows_per_patient": 3,
        "features": FEATURES,
        "label": {"name": "died", "classes": ["no", "yes"]},
        "window": {"column": "seen", "first": "2020-02-01", "last": "2020-02-29"},
    }
)


def load(path: Path, contract: Contract) -> Any:
    source = DataSource(source=f"{path.suffix[1:]}:{path}", patient=contract.patient)
    return load_table(source, contract, key=bytes(32))


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".ndjson"])
@given(
    chosen=st.sets(st.integers(0, len(FEATURES) - 1), min_size=1),
    rows=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_synthetic_rows_fit_the_contract(
    tmp_path: Path, suffix: str, chosen: set[int], rows: int, seed: int
) -> None:
    contract = Contract.model_validate(
        WHOLE.model_dump(mode="json") | {"features": [FEATURES[i] for i in sorted(chosen)]}
    )
    out = tmp_path / f"a{suffix}"
    out.unlink(missing_ok=True)
    write(contract, rows, seed, out)
    table = load(out, contract)
    # None is outside the window, without label or patient, or more than a patient may have.
    assert len(table.y) == rows
    assert all(patient.startswith(MARK) for patient in table.ids)
    assert np.bincount(table.patient_index).max() <= 3


def test_numbers_stay_inside_and_some_cells_are_empty(tmp_path: Path) -> None:
    write(WHOLE, 2000, 1, tmp_path / "a.parquet")
    low, high, share, ages = duckdb.sql(
        f"SELECT min(age), max(age), avg(CAST(age IS NULL AS INTEGER)), count(DISTINCT age) FROM '{tmp_path}/a.parquet'"
    ).fetchall()[0]
    assert 18 <= float(low) < 20 < 88 < float(high) <= 90
    assert 0.03 < share < 0.07
    assert ages > 1000


def test_synthetic_rows_are_marked(tmp_path: Path) -> None:
    write(WHOLE, 50, 1, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    assert all(row["pid"].startswith("synthetic-") and row[MARK] == "true" for row in rows)


@pytest.mark.parametrize("suffix", [".csv", ".ndjson"])
def test_the_seed_decides_all(tmp_path: Path, suffix: str) -> None:
    made = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write(WHOLE, 30, seed, tmp_path / f"{name}{suffix}")
        made.append((tmp_path / f"{name}{suffix}").read_bytes())
    assert made[0] == made[1] != made[2]


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    image = {
        "kind": "image",
        "name": "i",
        "height": 2,
        "width_px": 2,
        "modality": "CT",
        "low": 0.0,
        "high": 1.0,
    }
    plain = WHOLE.model_dump(mode="json")
    for contract in (
        Contract.model_validate(plain | {"features": [image]}),
        Contract.model_validate(plain | {"query": "SELECT 1"}),
    ):
        with pytest.raises(UsageError) as caught:
            write(contract, 1, 0, tmp_path / "a.csv")
        assert caught.value.code == "synthetic.contract"
    (tmp_path / "there.csv").write_text("kept")
    for name in ("there.csv", "a.xlsx", "absent/a.csv", "absent/a.parquet"):
        with pytest.raises(UsageError) as caught:
            write(WHOLE, 1, 0, tmp_path / name)
        assert caught.value.code == "output.file"
    assert (tmp_path / "there.csv").read_text() == "kept"


def test_synth_takes_a_study_or_a_contract(tmp_path: Path) -> None:
    file, out = tmp_path / "contract.toml", tmp_path / "a.csv"
    body = 'patient = "pid"\nlabel = {name = "y", classes = ["0", "1"]}\nfeatures = [{kind = "category", name = "x", codes = ["a"]}]\n'
    for text, code in ((body, 0), (f"[contract]\n{body}", 0), ("patient = 1", 2), ("=", 2), ("\udcff", 2)):
        file.write_bytes(text.encode(errors="surrogateescape"))
        out.unlink(missing_ok=True)
        found = CliRunner().invoke(study, ["synth", str(file), "--out", str(out), "--rows", "5"])
        assert found.exit_code == code, found.output
        assert out.exists() == (code == 0)
    file.write_text("patient = 1")
    refused = CliRunner().invoke(study, ["synth", str(file), "--out", str(out), "--json"])
    assert "study.contract.patient" in refused.output
