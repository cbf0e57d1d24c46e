"""Fingerprints that a person accepted: kept, compared, never replaced."""

import json

import pytest

from client.pins import Pins
from common.errors import RefusedError, VerificationError
from common.identity import new_signing_key, public_key
from common.roster import Member, Roster
from tests.client.federation import Federation

ME = 1


def with_new_key(roster: Roster, number: int) -> Roster:
    members = [
        Member(
            m.id, m.name, public_key(new_signing_key()) if m.id == number else m.protocol_key, m.ledger_key
        )
        for m in roster.members
    ]
    return Roster(tuple(members))


@pytest.fixture
def pins(federation: Federation) -> Pins:
    return Pins(federation.sites[ME])


def test_members_are_new_until_they_are_accepted(federation: Federation, pins: Pins) -> None:
    manifest, roster = federation.manifest((1, 2, 3)), federation.verified_roster
    with pytest.raises(RefusedError) as caught:
        pins.check(manifest, roster, ME)
    assert caught.value.code == "roster.unpinned"
    assert federation.name(2) in caught.value.problem
    new = pins.unpinned(manifest, roster, ME)
    # This hospital itself and hospitals outside of the study need no pin.
    assert set(new) == {federation.name(2), federation.name(3)}
    pins.accept(new)
    pins.check(manifest, roster, ME)
    assert pins.unpinned(manifest, roster, ME) == {}
    larger = federation.manifest((1, 2, 3, 4))
    assert set(pins.unpinned(larger, roster, ME)) == {federation.name(4)}
    with pytest.raises(RefusedError):
        pins.check(larger, roster, ME)
    pins.accept(pins.unpinned(larger, roster, ME))
    pins.check(larger, roster, ME)
    pins.check(manifest, roster, ME)


def test_a_changed_key_is_named_and_never_taken_over(federation: Federation, pins: Pins) -> None:
    manifest, roster = federation.manifest((1, 2, 3)), federation.verified_roster
    pins.accept(pins.unpinned(manifest, roster, ME))
    before = federation.sites[ME].pins.read_bytes()
    changed = with_new_key(roster, 3)
    for look in (pins.check, pins.unpinned):
        with pytest.raises(VerificationError) as caught:
            look(manifest, changed, ME)
        assert caught.value.code == "roster.pin-changed"
        assert federation.name(3) in caught.value.problem
    with pytest.raises(RefusedError):
        pins.accept({changed.member(3).name: changed.member(3).fingerprint})
    assert federation.sites[ME].pins.read_bytes() == before
    # A change of a hospital that is not in the study does not matter, nor does one's own entry.
    pins.check(manifest, with_new_key(roster, 4), ME)
    pins.check(manifest, with_new_key(roster, ME), ME)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"St. Mary": 7}', '"x"', "null", "\ud800"])
def test_a_damaged_file_is_refused_and_not_started_anew(
    federation: Federation, pins: Pins, content: str
) -> None:
    path = federation.sites[ME].pins
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    manifest, roster = federation.manifest(), federation.verified_roster
    for use in (
        lambda: pins.check(manifest, roster, ME),
        lambda: pins.unpinned(manifest, roster, ME),
        lambda: pins.accept({"x": "y"}),
    ):
        with pytest.raises(VerificationError) as caught:
            use()
        assert caught.value.code == "pins.file"
    assert path.read_bytes() == content.encode("utf-8", "surrogatepass")


def test_the_file_is_public_data_that_people_can_read(federation: Federation, pins: Pins) -> None:
    manifest, roster = federation.manifest(), federation.verified_roster
    pins.accept(pins.unpinned(manifest, roster, ME))
    kept = json.loads(federation.sites[ME].pins.read_text())
    assert kept == {roster.member(n).name: roster.member(n).fingerprint for n in (2, 3)}
