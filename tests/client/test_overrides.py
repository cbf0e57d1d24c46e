"""Overrides from the command line to the ledger: a key each, two signatures, and what they then allow."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.cli import app
from common.admissible import check
from common.errors import BudgetExhaustedError, RefusedError
from common.ledger.entries import Override, Restored
from common.ledger.store import Ledger
from tests.client.federation import Federation
from tests.client.test_guard import refused


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def data(*words: object) -> Any:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["data"]


@pytest.fixture
def officers(federation: Federation, tmp_path: Path) -> list[Path]:
    files = [tmp_path / "one.pem", tmp_path / "two.pem", tmp_path / "stranger.pem"]
    named = [data("officer", "--out", file)["key"] for file in files]
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    federation.edit_policy(1, rules={"officers": named[:2]})
    return files


def propose(federation: Federation, out: Path, *what: object) -> Path:
    home = federation.sites[1].folder
    data("override", "propose", "--home", home, "--reason", "the board decided", "--out", out, *what)
    return out


def test_two_officers_raise_a_cap(federation: Federation, officers: list[Path], tmp_path: Path) -> None:
    home, manifest = federation.sites[1].folder, federation.manifest(training__rounds=40)
    file = propose(federation, tmp_path / "o.json", "--raise-caps", "--epsilon-t", 4, "--epsilon-w", 4)
    for key, code in ((officers[0], 3), (officers[0], 3), (officers[1], 0), (officers[1], 3)):
        said = call("override", "sign", file, "--key", key)
        assert said.exit_code == 0
        assert "epsilon_t 4, epsilon_w 4" in said.stdout
        assert call("override", "apply", file, "--home", home).exit_code == code
    (entry,) = [e for e in federation.entries(1) if isinstance(e, Override)]
    assert (entry.action, entry.epsilon_t, entry.reason) == ("raise_caps", "4", "the board decided")
    guard, admitted = federation.guard(1), check(manifest, None)
    before = guard.rounds_left(manifest, admitted)
    # The policy decides still: it may go up to the new caps, and no further.
    assert guard.cap.epsilon_t == 3.0
    federation.edit_policy(1, register={"epsilon_t": 4.0, "epsilon_w": 4.0})
    assert guard.rounds_left(manifest, admitted) > before
    guard.charge(manifest, admitted, 1)
    federation.edit_policy(1, register={"epsilon_t": 4.5})
    refused(lambda: guard.charge(manifest, admitted, 2), RefusedError, "guard.cap-raised")
    # A cap that is lowered acts at once, also after that.
    federation.edit_policy(1, register={"epsilon_t": 0.2, "epsilon_w": 0.2})
    refused(lambda: guard.charge(manifest, admitted, 2), BudgetExhaustedError, "budget.exhausted")
    guard.close()


def test_a_stranger_and_a_changed_file_are_refused(
    federation: Federation, officers: list[Path], tmp_path: Path
) -> None:
    home = federation.sites[1].folder
    file = propose(federation, tmp_path / "o.json", "--raise-caps", "--epsilon-t", 4)
    for key in (officers[0], officers[2]):
        assert call("override", "sign", file, "--key", key).exit_code == 0
    assert "[override.refused]" in call("override", "apply", file, "--home", home).output
    file = propose(federation, tmp_path / "p.json", "--raise-caps", "--epsilon-t", 4)
    for key in officers[:2]:
        call("override", "sign", file, "--key", key)
    file.write_bytes(file.read_bytes().replace(b'"epsilon_t":"4"', b'"epsilon_t":"9"'))
    assert call("override", "apply", file, "--home", home).exit_code == 5
    assert not [e for e in federation.entries(1) if isinstance(e, Override)]


@pytest.mark.parametrize(
    "what",
    [
        (),
        ("--raise-caps",),
        ("--reopen", "--epsilon-t", 4),
        ("--raise-caps", "--reopen", "--epsilon-t", 4),
        ("--raise-caps", "--epsilon-t", "nan"),
    ],
    ids=str,
)
def test_an_override_does_one_thing(federation: Federation, tmp_path: Path, what: tuple[object, ...]) -> None:
    words = ("override", "propose", "--home", federation.sites[1].folder, "--reason", "r")
    assert call(*words, "--out", tmp_path / "o", *what).exit_code == 2
    assert not (tmp_path / "o").exists()


def test_restored_then_reopened(federation: Federation, officers: list[Path], tmp_path: Path) -> None:
    home, manifest = federation.sites[1].folder, federation.manifest()
    federation.guard(1).close()
    identity = federation.identity(1)
    with Ledger.open(federation.sites[1].ledger, identity.ledger_key) as ledger:
        ledger.append(Restored(actor=ledger.entries()[0].actor, reason="A. Person: the disk broke"))
    guard, admitted = federation.guard(1), check(manifest, None)
    refused(lambda: guard.check_budget(manifest, admitted, 1), RefusedError, "guard.restored")
    refused(lambda: guard.charge(manifest, admitted, 1), RefusedError, "ledger.restored")
    assert call("budget", "--home", home).stdout.startswith("CLOSED")
    file = propose(federation, tmp_path / "o.json", "--reopen")
    for key in officers[:2]:
        call("override", "sign", file, "--key", key)
    assert call("override", "apply", file, "--home", home).exit_code == 0
    guard.check_budget(manifest, admitted, 1)
    guard.charge(manifest, admitted, 1)
    guard.close()
    said = call("budget", "--home", home).stdout
    assert said.startswith("REOPENED BY OVERRIDE: what was spent after the backup is unknown")
