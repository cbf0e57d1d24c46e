"""Heads of ledgers at a hospital: what it shows, cosigns, remembers, and refuses to run without."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.participation import Participation
from client.state import SiteHome
from common import messages
from common.errors import RefusedError, VerificationError
from common.ledger.entries import Charge
from common.ledger.store import Ledger
from common.secagg import records
from common.witness import HUB, read_state
from tests.client.federation import ComputedHere, Federation, Hub

UNAVAILABLE = messages.encode_reply(messages.Reply(messages.READY, available=False))


@pytest.fixture
def hub(federation: Federation) -> Iterator[Hub]:
    """Three hospitals that share keys, computing in this process."""
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
    made = Hub(federation, federation.manifest(training__rounds=20), sites).joined()
    yield made
    for site in made.sites.values():
        site.close()


def charges(hub: Hub, number: int) -> int:
    return sum(isinstance(entry, Charge) for entry in hub.federation.entries(number))


def reopened(hub: Hub, number: int) -> Participation:
    hub.sites[number].close()
    hub.sites[number] = Participation(hub.federation.sites[number], computation=ComputedHere)
    return hub.sites[number]


def seen_by(home: SiteHome) -> dict[int, int]:
    """The sizes of the ledgers that a hospital remembers, by party."""
    return {party: head.size for party, head in read_state(home.heads.read_bytes())[0].items()}


def test_no_round_is_charged_without_cosignatures(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Neither for a missing exchange, nor one of another round, nor one that was used up."""
    round_ = hub.start()
    for stale in (None, 7):
        with caplog.at_level(logging.WARNING, "wardround"):
            if stale is None:
                hub.ask(1, messages.HEAD, records.HeadPlease(1, ()))
            else:
                hub.cosign(stale)
            assert hub.raw(1, messages.READY, round_.start, attachment=hub.state)[0] == UNAVAILABLE
        assert "witness.cosignatures" in caplog.text
        caplog.clear()
    assert charges(hub, 1) == 0
    # A machine that was never started: the same round goes on once it is cosigned.
    assert hub.ready(round_) == {1: True, 2: True, 3: True}
    assert charges(hub, 1) == 1
    assert hub.raw(1, messages.READY, hub.start(2).start, attachment=hub.state)[0] != UNAVAILABLE


def test_a_head_is_of_this_ledger_now(hub: Hub) -> None:
    hub.whole_round()
    asked = hub.ask(1, messages.HEAD, records.HeadPlease(2, (2,)))
    (head,) = asked.records
    assert isinstance(head, records.Head)
    with Ledger.open(hub.federation.sites[1].ledger) as ledger:
        size, root = ledger.head()
    assert (head.id, head.man, head.round, head.size, head.root) == (1, hub.man, 2, size, root)
    records.check_signature(head, hub.man, hub.federation.verified_roster.member(1).ledger_key, "1")
    (again,) = hub.ask(1, messages.HEAD, records.HeadPlease(2, (2,))).records
    assert isinstance(again, records.Head)
    assert again.nonce != head.nonce
    assert not hub.ask(1, messages.HEAD, records.HeadPlease(2, (size + 1,))).available


def test_what_was_seen_is_remembered_over_a_restart(hub: Hub) -> None:
    hub.whole_round()
    sizes = seen_by(hub.federation.sites[1])
    assert set(sizes) == {2, 3}
    reopened(hub, 1)
    hub.whole_round()
    assert all(size > sizes[party] for party, size in seen_by(hub.federation.sites[1]).items())
    hub.federation.sites[1].heads.write_bytes(b"{}")
    with pytest.raises(VerificationError, match="heads"):
        reopened(hub, 1)
    # For the end of the test.
    hub.federation.sites[1].heads.unlink()
    hub.sites[1] = Participation(hub.federation.sites[1], computation=ComputedHere)


def test_a_restored_folder_is_cosigned_by_nobody(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ledger, run file and mark are of one moment: only the others can know that it has gone by."""
    hub.whole_round()
    hub.sites[2].close()
    shutil.copytree(hub.federation.sites[2].folder, tmp_path / "copy")
    reopened(hub, 2)
    hub.whole_round()
    # The others see what a round has charged before the next one, or when the study ends.
    hub.cosign(hub.round_number + 1)
    hub.sites[2].close()
    shutil.rmtree(hub.federation.sites[2].folder)
    shutil.copytree(tmp_path / "copy", hub.federation.sites[2].folder)
    reopened(hub, 2)
    before = charges(hub, 2)
    with caplog.at_level(logging.WARNING, "wardround"):
        # Of three hospitals each needs the cosignatures of both others.
        assert hub.ready(hub.start()) == {1: False, 2: False, 3: False}
        assert "others have seen 9 entries of this ledger, but it has 6" in caplog.text
        # Grown to the size that the others saw, it is another ledger.
        for number in range(3):
            hub.federation.decide(2, hub.federation.manifest(training__rounds=3 + number), "denied")
        assert hub.ready(hub.start()) == {1: True, 2: False, 3: True}
    assert "a head of party 2 is older than the last seen here" in caplog.text
    assert charges(hub, 2) == before


def test_a_hub_whose_ledger_went_back_is_not_cosigned(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    def head(size: int) -> records.Head:
        unsigned = records.Head(HUB, hub.man, 1, bytes(32), size, bytes([size]) * 32, ())
        return records.signed(unsigned, hub.man, hub.federation.hub_key.sign)

    (other,) = hub.ask(2, messages.HEAD, records.HeadPlease(1, ())).records
    assert hub.ask(1, messages.COSIGN, head(5)).available
    with caplog.at_level(logging.WARNING, "wardround"):
        (answer,) = hub.ask(1, messages.COSIGN, head(4), other).records
    assert isinstance(answer, records.Cosigned)
    assert [cosign.head for cosign in answer.cosigns] == [records.head_digest(other)]  # type: ignore[arg-type]
    assert answer.remembered == ((HUB, 5),)
    assert "a head of party 0 is older than the last seen here" in caplog.text
    assert seen_by(hub.federation.sites[1])[HUB] == 5
    wrong: list[Any] = [replace(head(6), sig=bytes(64)), replace(head(6), man=bytes(32))]
    for forged in wrong:
        assert not hub.ask(1, messages.COSIGN, forged).available


def test_a_site_that_is_paused_or_has_denied_cosigns_nothing(hub: Hub) -> None:
    (head,) = hub.ask(2, messages.HEAD, records.HeadPlease(1, ())).records
    hub.federation.decide(1, hub.manifest, "denied")
    for kind, parts in (
        (messages.HEAD, (records.HeadPlease(1, ()),)),
        (messages.COSIGN, (head,)),
        (messages.COSIGNED, ()),
    ):
        assert not hub.ask(1, kind, *parts).available
    assert not hub.federation.sites[1].heads.exists()


def test_cosignatures_are_used_up_by_one_round(hub: Hub) -> None:
    hub.start()
    site = hub.sites[1]
    run = site._run(hub.man)
    site._heads.spend(run, 1)
    with pytest.raises(RefusedError, match="2 are needed"):
        site._heads.spend(run, 1)
