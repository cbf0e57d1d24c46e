"""Transcripts of ``wardround site data …``: what a hospital is told of its own data."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.cli import app
from common.contract import Contract
from tests.client.federation import Federation
from tests.federation import extract_rows


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def data(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


@pytest.fixture
def home(federation: Federation) -> Path:
    return federation.sites[1].folder


@pytest.fixture
def digest(federation: Federation) -> str:
    return federation.receive(1, federation.manifest())


def test_a_received_study_is_checked_before_it_is_approved(
    federation: Federation, home: Path, digest: str
) -> None:
    told = run("check", digest[:8], "--home", home)
    assert told.exit_code == 0
    assert "the contract holds" in told.stdout
    assert "extract.csv" in told.stdout
    rows = [list(row) for row in extract_rows(1)]
    rows[0][1] = "-4"
    rows[1][1] = "x"
    federation.write_extract(1, rows)
    broken = run("check", digest, "--home", home)
    assert broken.exit_code == 7
    lines = [line for line in broken.stdout.splitlines() if line.startswith("error")]
    assert len(lines) == 2
    for line, rule in zip(lines, ("no number: 1", "below zero: 1"), strict=True):
        assert "column 'age'" in line
        assert rule in line
        assert "extract.csv" in line
    found = data("check", digest, "--home", home)
    assert (found["code"], [one["count"] for one in found["data"]["findings"]]) == (
        "contract.quality",
        [1, 1],
    )
    # Nothing was decided, and nothing charged.
    approval = CliRunner().invoke(
        app, ["approve", digest, "--home", str(home), "--yes", "--fingerprints-compared", "--by", "x"]
    )
    assert approval.exit_code == 7
    assert "extract.csv: column 'age'" in approval.output.replace("\n", " ")
    assert not [entry for entry in federation.entries(1) if entry.type in ("approval", "charge")]


def test_the_page_is_written_for_this_account_alone(home: Path, digest: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run("check", digest, "--home", home, "--page", page).exit_code == 0
    assert page.stat().st_mode & 0o777 == 0o600
    assert "does not leave the hospital" in page.read_text()


CONTRACT = """patient = "patient"
label = {name = "readmitted", classes = ["no", "yes"]}
features = [
  {kind = "number", name = "age", unit = "a", minimum = 0.0, maximum = 100.0},
  {kind = "category", name = "bmi", codes = ["20.0", "30.0"]},
]
"""


def test_a_contract_can_be_checked_before_any_study_comes(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "contract.toml"
    file.write_text(CONTRACT)
    assert run("check", file, "--home", home).exit_code == 7
    assert run("check", file, "--home", home, "--data", "extract").exit_code == 7
    for text, options, code in (
        (CONTRACT, ["--data", "absent"], 3),
        (
            CONTRACT.replace('patient = "patient"', 'patient = "age"').replace('"age", unit', '"ag", unit'),
            [],
            7,
        ),
        (CONTRACT.replace('"age"', '"absent"'), [], 7),
        ("patient = 1", [], 2),
    ):
        file.write_text(text)
        assert run("check", file, "--home", home, *options).exit_code == code
    assert run("check", tmp_path / "absent.toml", "--home", home).exit_code == 2
    assert run("check", "abcdef", "--home", home).exit_code == 2


def test_a_preview_shows_three_rows_as_the_model_sees_them(
    federation: Federation, home: Path, digest: str
) -> None:
    found = data("preview", digest, "--home", home)["data"]
    rows = extract_rows(1)[:3]
    assert found["coordinates"] == ["age", "bmi"]
    assert found["classes"] == [row[3] for row in rows]
    expected = [[2 * float(row[1]) / 100 - 1, 2 * (float(row[2]) - 10) / 40 - 1] for row in rows]
    assert found["rows"] == [pytest.approx(row, abs=1e-6) for row in expected]
    text = run("preview", digest, "--home", home).stdout
    assert "age" in text
    assert str(rows[0][0]) not in text
    federation.write_extract(1, [])
    assert run("preview", digest, "--home", home).exit_code == 7


def test_coordinates_have_names(tmp_path: Path) -> None:
    from client.data_cli import coordinates

    contract = Contract.from_toml(CONTRACT)
    assert coordinates(contract) == ["age", "bmi = 20.0", "bmi = 30.0"]
    assert len(coordinates(contract)) == contract.width
