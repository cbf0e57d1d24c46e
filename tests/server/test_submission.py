"""From a TOML file to a signed manifest: everything is fixed, checked and named when it is wrong."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common import identity
from common.errors import RefusedError, UsageError
from server.submission import prepare
from tests.federation import small_study
from tests.server.conftest import RunningHub

NAMES = ["St. Mary", "Northgate", "Riverside"]
TOKEN = "0123456789abcdef" * 2


def write(folder: Path, name: str = "study.toml", **changes: Any) -> Path:
    path = folder / name
    path.write_text(tomli_w.dumps(small_study(changes.pop("members", NAMES), **changes)), encoding="utf-8")
    return path


def test_names_become_ids_and_keys_are_stated(running: RunningHub, tmp_path: Path) -> None:
    path = write(tmp_path)
    signed = prepare(running.founded.coordinator, path, running.desk, "")
    manifest = signed.verify()
    assert [(party.id, party.name) for party in manifest.members] == [
        (1, "St. Mary"),
        (2, "Northgate"),
        (3, "Riverside"),
    ]
    assert manifest.roster == running.founded.signed_roster().digest.hex()
    assert manifest.hub == running.founded.coordinator.load_settings().hub_key
    signing = identity.load_signing_key(running.founded.coordinator.signing_key)
    assert manifest.coordinator == identity.key_text(identity.public_key(signing))
    assert manifest.study.name == tomllib.loads(path.read_text())["name"]
    # A run id is never used again.
    assert prepare(running.founded.coordinator, path, running.desk, "").verify().run != manifest.run


def test_a_token_makes_the_same_file_the_same_study(running: RunningHub, tmp_path: Path) -> None:
    home, desk = running.founded.coordinator, running.desk
    path = write(tmp_path)
    first = prepare(home, path, desk, TOKEN)
    assert prepare(home, path, desk, TOKEN) == first
    runs = {
        first.verify().run,
        prepare(home, path, desk, "f" * 32).verify().run,
        prepare(home, write(tmp_path, "other.toml", training__rounds=4), desk, TOKEN).verify().run,
    }
    assert len(runs) == 3
    # With another roster it is another manifest, and so another run.
    running.founded.admit("Holy Cross")
    later = prepare(home, path, desk, TOKEN).verify()
    assert later.digest != first.verify().digest
    assert later.run not in runs


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"members": [*NAMES[:2], "Nowhere"]}, "study.members", "Nowhere"),
        ({"privacy__grid_step": 0.1}, "study.privacy.grid_step", "grid_step"),
        ({"expires": "2020-01-01T00:00Z"}, "study.expires", "2020"),
        ({"training__rounds": 0}, "study.training.rounds", "rounds"),
        ({"unknown": 1}, "study.unknown", "unknown"),
    ],
)
def test_what_is_wrong_is_named(
    running: RunningHub, tmp_path: Path, changes: dict[str, Any], code: str, names: str
) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(running.founded.coordinator, write(tmp_path, **changes), running.desk, "")
    assert caught.value.code == code
    assert names in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize("token", ["x", "A" * 32, "0" * 31, "0" * 33, "0" * 32 + "\n"])
def test_a_malformed_token_is_refused(running: RunningHub, tmp_path: Path, token: str) -> None:
    with pytest.raises(UsageError, match="32 hex digits"):
        prepare(running.founded.coordinator, write(tmp_path), running.desk, token)


def test_an_unreadable_file_is_named(running: RunningHub, tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name in ("missing.toml", "binary.toml"):
        with pytest.raises(UsageError, match=name):
            prepare(running.founded.coordinator, tmp_path / name, running.desk, "")


def test_a_missing_signing_key_is_named(running: RunningHub, tmp_path: Path) -> None:
    key = running.founded.coordinator.signing_key
    moved = key.rename(tmp_path / "away.pem")
    try:
        with pytest.raises(RefusedError, match=r"coordinator\.pem"):
            prepare(running.founded.coordinator, write(tmp_path), running.desk, "")
    finally:
        moved.rename(key)
