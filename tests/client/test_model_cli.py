"""Transcripts of ``wardround site predict`` and ``site benefit``: what is refused, and why."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.cli import app
from common.admissible import check
from common.study import Manifest
from common.tasks.models import initial_state
from common.tasks.state import state_bytes
from tests.client.federation import Federation


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def said(*arguments: str | Path) -> tuple[int, str]:
    result = run(*arguments)
    return result.exit_code, json.loads(result.stdout)["code"]


class Here:
    """A hospital that has received a study, and the study's model as exported."""

    def __init__(self, federation: Federation, folder: Path, **changes: Any) -> None:
        self.federation, self.manifest = federation, federation.manifest(**changes)
        self.digest = federation.receive(1, self.manifest)
        self.home = federation.sites[1].folder
        self.model = folder / "model.safetensors"
        state = initial_state(self.manifest)
        self.model.write_bytes(state_bytes(state, check(self.manifest, None).layout))
        self.given = (self.digest, "--home", self.home, "--model", self.model)


@pytest.fixture
def here(federation: Federation, tmp_path: Path) -> Here:
    return Here(federation, tmp_path, contract__holdout=0.4)


def test_rows_are_answered_into_a_file_of_this_account(here: Here, tmp_path: Path) -> None:
    out = tmp_path / "said.csv"
    result = run("predict", *here.given, "--in", here.home / "extract.csv", "--out", out)
    assert result.exit_code == 0, result.output
    lines = out.read_text().splitlines()
    assert lines[0] == "patient,probability of no,probability of yes"
    assert lines[1].endswith(",0.5,0.5")
    assert out.stat().st_mode & 0o777 == 0o600
    assert not [entry for entry in here.federation.entries(1) if entry.type == "charge"]


def test_what_cannot_be_answered_is_refused_by_name(here: Here, tmp_path: Path) -> None:
    out = tmp_path / "said.csv"
    extract = here.home / "extract.csv"
    assert said("predict", *here.given, "--in", tmp_path / "rows.xlsx", "--out", out) == (2, "predict.in")
    absent = here.digest, "--home", here.home, "--model", tmp_path / "no"
    assert said("predict", *absent, "--in", extract, "--out", out) == (2, "model.file")
    here.model.write_bytes(here.model.read_bytes()[:-4])
    code, name = said("predict", *here.given, "--in", extract, "--out", out)
    assert (code, name.partition(".")[0]) == (1, "state")
    assert not out.exists()


def test_gain_is_shown_only_after_the_last_release(here: Here, tmp_path: Path) -> None:
    assert said("benefit", *here.given) == (3, "benefit.running")
    federation = here.federation
    federation.decide(1, here.manifest)
    assert said("benefit", *here.given) == (3, "benefit.running")
    federation.guard(1).closed(here.manifest.digest)
    found = json.loads(run("benefit", *here.given).stdout)["data"]
    assert set(found["models"]) == {"local only", "global", "fine-tuned"}
    assert found["held_out"] >= 1
    plot = tmp_path / "plot.svg"
    assert run("benefit", *here.given, "--out", plot).exit_code == 0
    assert plot.read_text().startswith("<svg")
    assert "local only" in CliRunner().invoke(app, ["benefit", *map(str, here.given)]).stdout


def test_a_study_that_holds_nobody_out_has_nothing_to_compare(federation: Federation, tmp_path: Path) -> None:
    assert said("benefit", *Here(federation, tmp_path).given) == (3, "benefit.holdout")


def test_counts_say_nothing_of_single_rows(federation: Federation, tmp_path: Path) -> None:
    features = [
        {"kind": "number", "name": "age", "unit": "a", "minimum": 0.0, "maximum": 100.0, "present": True},
    ]
    changes: dict[str, Any] = {
        "model": {"kind": "statistics", "numbers": ["age"]}, "contract__features": features,
        "training__rounds": 1, "privacy__clip_norm": 4.0, "aggregation__codec__range": 5000.0,
    }  # fmt: skip
    here = Here(federation, tmp_path, **changes)
    assert isinstance(here.manifest, Manifest)
    given = (*here.given, "--in", here.home / "extract.csv", "--out", tmp_path / "x")
    assert said("predict", *given) == (3, "predict.kind")
