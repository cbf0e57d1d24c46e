"""The coordinator's client: digests by prefix, and every error with its own exit code."""

import json
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from common import errors
from common.errors import FailureError, UnreachableError, UsageError, VerificationError, WardroundError
from server.desk import CoordinatorDesk, _raised
from server.home import CoordinatorHome
from tests.server.conftest import RunningHub
from tests.server.hospitals import found

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not WardroundError]


@dataclass
class Broken(grpc.RpcError):
    status: grpc.StatusCode
    text: str | None

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str | None:
        return self.text


def raised(
    details: str | None, status: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION
) -> WardroundError:
    return _raised(Broken(status, details), "hub:1")


@pytest.mark.parametrize("kind", [k for k in KINDS if issubclass(k, WardroundError)])
def test_every_error_keeps_its_exit_code(kind: type[WardroundError]) -> None:
    sent = {"code": "a.b", "exit": kind.exit_code, "problem": "it broke", "remedy": "mend it"}
    error = raised(json.dumps(sent))
    assert type(error) is kind
    assert (error.code, error.problem, error.remedy) == ("a.b", "it broke", "mend it")


@pytest.mark.parametrize(
    "details", [None, "", "{", "[]", "1", "{}", '{"exit": 3}', '{"exit": [], "code": "a", "problem": "b"}']
)
def test_an_error_that_cannot_be_read_is_a_failure(details: str | None) -> None:
    error = raised(details)
    assert type(error) is FailureError
    assert error.code == "studies.error"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnreachableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnreachableError),
        (grpc.StatusCode.CANCELLED, UnreachableError),
        (grpc.StatusCode.UNKNOWN, FailureError),
        (grpc.StatusCode.INTERNAL, FailureError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, FailureError),
        (grpc.StatusCode.UNIMPLEMENTED, FailureError),
    ],
)
def test_only_silence_is_worth_trying_again(status: grpc.StatusCode, kind: type[WardroundError]) -> None:
    error = raised("some text of the library", status)
    assert type(error) is kind
    assert "hub:1" in error.problem
    assert error.remedy
    assert "some text" not in str(error)


@pytest.mark.parametrize("prefix", ["", "a", "zzzzzz", "00000"])
def test_a_prefix_that_names_no_study(running: RunningHub, prefix: str) -> None:
    running.submit(name="one")
    with pytest.raises(UsageError, match="names 0 studies") as caught:
        running.desk.resolve(prefix)
    assert "6 or more" in caught.value.remedy


def test_a_prefix_shorter_than_six_is_never_resolved(running: RunningHub) -> None:
    digest = running.submit(name="two")
    assert running.desk.resolve(digest[:6]) == digest
    with pytest.raises(UsageError):
        running.desk.resolve(digest[:5])


def test_a_roster_under_another_key_is_refused(running: RunningHub) -> None:
    settings = running.founded.coordinator.settings
    text = settings.read_text()
    (other := running.founded.home.folder.parent / "other").mkdir()
    stranger = found(other, 0)
    try:
        settings.write_text(
            text.replace(
                running.founded.coordinator.load_settings().hub_key,
                stranger.coordinator.load_settings().hub_key,
            )
        )
        home = CoordinatorHome(running.founded.home.coordinator)
        with CoordinatorDesk(home) as desk, pytest.raises(VerificationError):
            desk.roster()
    finally:
        settings.write_text(text)


def test_a_hub_under_another_authority_is_not_talked_to(running: RunningHub) -> None:
    (other := running.founded.home.folder.parent / "elsewhere").mkdir()
    stranger = found(other, 0).coordinator
    text = stranger.settings.read_text()
    address = stranger.load_settings().hub
    stranger.settings.write_text(text.replace(address, running.founded.coordinator.load_settings().hub))
    with CoordinatorDesk(stranger) as desk, pytest.raises(UnreachableError):
        desk.studies()


def test_a_hub_that_is_down_is_unreachable(tmp_path: Path) -> None:
    founded = found(tmp_path, 0)
    with CoordinatorDesk(founded.coordinator) as desk, pytest.raises(UnreachableError) as caught:
        desk.studies()
    assert "hub run" in caught.value.remedy
