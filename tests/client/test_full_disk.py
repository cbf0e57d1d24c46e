"""A disk that is full at any step of a round: nothing is charged too little, nothing leaves unrecorded, and it heals."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from client.participation import Participation
from common import messages
from common.ledger.entries import Charge, Outcome
from tests.client.federation import ComputedHere, Federation, Hub

# No file may grow past so many bytes: nothing can be written, or only the beginning of it.
LIMITS = (0, 1000, 5000, 40_000)


@contextmanager
def no_file_past(size_bytes: int) -> Iterator[None]:
    """Writing further fails, as on a full disk, in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def hub(template: Path, tmp_path: Path) -> Iterator[Hub]:
    federation = Federation(template, tmp_path / "federation", epsilon=20.0)
    manifest = federation.manifest((1, 2, 3, 4), training__rounds=20)
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3, 4)}
    found = Hub(federation, manifest, sites).joined()
    found.whole_round()
    yield found
    for site in sites.values():
        site.close()


def charged(hub: Hub) -> list[Any]:
    """Rounds charged at hospital 1, from a ledger that verifies."""
    return [entry.event["round"] for entry in hub.federation.entries(1) if isinstance(entry, Charge)]


@pytest.mark.parametrize("limit", LIMITS)
def test_a_disk_full_before_the_computation_charges_what_is_computed(hub: Hub, limit: int) -> None:
    before = charged(hub)
    round_ = hub.start()
    with no_file_past(limit):
        answered = hub.ready(round_, 1)[1]
    assert not answered or limit
    # Whatever was answered: a vector exists only where the charge is on the disk.
    assert charged(hub) in (before, [*before, round_.start.round])
    assert not answered or charged(hub) == [*before, round_.start.round]
    assert all(hub.ready(round_, 2, 3, 4).values())
    cohort = round_.cohort(without=[] if answered else [1])
    assert all(hub.upload(round_, cohort).values())
    hub.finish(round_, cohort)
    hub.whole_round()
    assert charged(hub)[-1] == round_.start.round + 1


@pytest.mark.parametrize("limit", LIMITS)
def test_a_disk_full_at_the_upload_is_a_dropout(hub: Hub, limit: int) -> None:
    round_ = hub.start()
    assert all(hub.ready(round_).values())
    mark = len(hub.frames)
    with no_file_past(limit):
        body, payload = hub.raw(1, messages.UPLOAD, round_.cohort())
    left = messages.decode_reply(messages.UPLOAD.message_type, body).available
    assert left == bool(payload)
    assert not left or limit
    recorded = [
        entry
        for entry in hub.federation.entries(1)
        if isinstance(entry, Outcome) and entry.reason == "upload_started"
    ]
    # Recorded before its first byte, or nothing of it has left.
    assert len(recorded) == 2 if left else len(recorded) in (1, 2)
    assert len(hub.frames) == mark + 1
    second = round_.cohort(without=[1])
    assert all(hub.upload(round_, second).values())
    hub.finish(round_, second)
    hub.whole_round()
    assert charged(hub) == [1, 2, 3]


@pytest.mark.parametrize("limit", LIMITS)
def test_a_disk_full_at_the_opening_opens_nothing(hub: Hub, limit: int) -> None:
    round_ = hub.start()
    assert all(hub.ready(round_).values())
    cohort = round_.cohort()
    assert all(hub.upload(round_, cohort).values())
    please = round_.open_please()
    with no_file_past(limit):
        first = hub.ask(1, messages.OPEN, please)
    assert not first.available or limit
    again = hub.ask(1, messages.OPEN, please)
    # The opening leaves only when it is on the disk, and then it is the same for ever.
    assert again.available
    assert not first.available or first.records == again.records
    total = hub.finish(round_, cohort)
    assert total.shape == (hub.admitted.dim,)
    hub.whole_round()
    assert charged(hub) == [1, 2, 3]
