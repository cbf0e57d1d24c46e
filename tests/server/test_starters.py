"""Templates: each is a whole study that is admitted, whose planned cost is what it says."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.admissible import check
from common.errors import UsageError
from common.privacy.filter import noise_for_filter
from common.study import DifferentialPrivacy, Study
from common.tasks.models.layout import size, state_layout
from server import starters
from server.cli import study as command
from tests.common.tasks.kinds import manifest_of

NAMES = ("St. Mary", "Northgate", "Riverside", "Holy Cross")
METHODS = {
    "logistic_regression", "linear_svm", "kernel_svm", "cnn", "recurrent", "autoencoder", "skip_gram",
    "sequence_to_sequence", "transformer", "cox", "random_forest", "statistics",
}  # fmt: skip


def read(name: str) -> Study:
    return Study.from_toml(starters.filled(name, NAMES))


def test_there_is_one_for_each_method() -> None:
    assert {read(name).model.kind for name in starters.names()} == METHODS
    assert len(starters.names()) == 13


@pytest.mark.parametrize("name", starters.names())
def test_templates_are_admitted_and_spend_what_they_say(name: str) -> None:
    study = read(name)
    assert study.members == tuple(sorted(NAMES))
    assert starters.summary(name).endswith(".")
    check(manifest_of(study), None)
    assert isinstance(study.privacy, DifferentialPrivacy)
    dim = size(state_layout(study))
    least = noise_for_filter(3.0, 1e-6, study.rounds, study.rounds, dim=dim, members=4)
    assert study.privacy.noise_multiplier == pytest.approx(least, rel=2e-3)
    assert study.privacy.noise_multiplier >= least - 1e-3


def test_an_unknown_template_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no template") as caught:
        starters.text("../heart_disease")
    assert "diagnosis" in caught.value.remedy


def test_a_study_file_is_written_once(tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "study.toml"
    listed = runner.invoke(command, ["new", "--list", "--json"])
    assert set(json.loads(listed.output)["data"]["templates"]) == set(starters.names())
    given = ["new", "--template", "diagnosis", "--out", str(out)]
    for name in NAMES:
        given += ["--member", name]
    assert runner.invoke(command, given).exit_code == 0
    assert Study.from_toml(out.read_text()).members == tuple(sorted(NAMES))
    kept = out.read_bytes()
    again = runner.invoke(command, given)
    assert (again.exit_code, out.read_bytes()) == (2, kept)
    assert (
        runner.invoke(command, ["new", "--template", "nothing", "--out", str(tmp_path / "x")]).exit_code == 2
    )
