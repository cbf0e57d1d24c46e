"""The roster: consistent or refused, signed by the hub, pinned by people."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoding import canonical_json, digest, labelled
from common.errors import RefusedError, VerificationError
from common.identity import key_text, new_signing_key, public_key, sign
from common.roster import Member, Roster, SignedRoster, check_pins

HUB = new_signing_key()
KEYS = [public_key(new_signing_key()) for _ in range(8)]


def member(number: int, name: str, first_key: int) -> Member:
    return Member(number, name, KEYS[first_key], KEYS[first_key + 1])


A, B, C = member(1, "Alpha", 0), member(2, "Beta", 2), member(7, "Gamma", 4)
ROSTER = Roster((A, B, C))


def test_round_trip_and_digest() -> None:
    data = ROSTER.to_bytes()
    assert Roster.from_bytes(data) == ROSTER
    assert ROSTER.digest == digest("roster", data)
    signed = SignedRoster.create(ROSTER, HUB)
    assert signed.verify(public_key(HUB)) == ROSTER
    assert signed.digest == ROSTER.digest
    assert ROSTER.member(7) == C
    with pytest.raises(VerificationError, match="no member 3"):
        ROSTER.member(3)


@pytest.mark.parametrize(
    "members",
    [
        (),
        (B, A),
        (A, A),
        (A, member(1, "Beta", 2)),
        (A, member(2, "Alpha", 2)),
        (A, member(2, "ALPHA", 2)),
        (A, member(2, "Beta", 1)),
        (A, Member(2, "Beta", KEYS[2], KEYS[0])),
        (Member(1, "Alpha", KEYS[0], KEYS[0]),),
        (member(0, "Alpha", 0),),
        (member(-1, "Alpha", 0),),
        (member(65536, "Alpha", 0),),
        (member(1, "", 0),),
        (member(1, "Al  pha", 0),),
        (Member(1, "Alpha", KEYS[0][:31], KEYS[1]),),
        (Member(1, "Alpha", bytes(32), KEYS[1]),),
    ],
)
def test_inconsistent_rosters_are_refused(members: tuple[Member, ...]) -> None:
    with pytest.raises(VerificationError):
        Roster(members)


def test_size_limit() -> None:
    many = tuple(Member(i + 1, f"H{i}", KEYS[0], KEYS[1]) for i in range(1001))
    with pytest.raises(VerificationError, match="1 to 1000"):
        Roster(many)


def _value() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(ROSTER.to_bytes())
    return value


def test_only_exact_documents_are_read() -> None:
    def changed(**fields: object) -> dict[str, Any]:
        value = _value()
        value["members"][0].update(fields)
        return value

    wrong: list[Any] = [
        {**_value(), "extra": 1},
        {"members": _value()["members"]},
        {**_value(), "schema": 2},
        {**_value(), "schema": True},
        {**_value(), "members": {}},
        {**_value(), "members": [1]},
        [],
        None,
        changed(extra=1),
        changed(id="1"),
        changed(id=True),
        changed(id=1.5),
        changed(name=1),
        changed(protocol_key=None),
        changed(protocol_key=key_text(KEYS[0])[8:]),
    ]
    for value in wrong:
        with pytest.raises(VerificationError):
            Roster.from_bytes(canonical_json(value))
    for data in (ROSTER.to_bytes() + b"\n", json.dumps(_value()).encode(), b"", b"\xff", b"{"):
        with pytest.raises(VerificationError):
            Roster.from_bytes(data)


def test_forged_rosters_are_refused() -> None:
    signed = SignedRoster.create(ROSTER, HUB)
    hub = public_key(HUB)
    other = SignedRoster.create(Roster((A, B)), HUB)
    wrong = [
        SignedRoster(other.data, signed.signature),
        SignedRoster(signed.data, other.signature),
        SignedRoster(signed.data + b" ", signed.signature),
        SignedRoster(signed.data, b""),
        SignedRoster.create(ROSTER, new_signing_key()),
        SignedRoster(signed.data, sign(HUB, signed.data)),
        SignedRoster(signed.data, sign(HUB, labelled("sig/manifest", signed.data))),
    ]
    for forged in wrong:
        with pytest.raises(VerificationError, match="signature of the roster"):
            forged.verify(hub)
    # A signature does not make a malformed roster good.
    junk = b'{"members":[],"schema":1}'
    with pytest.raises(VerificationError, match="1 to 1000"):
        SignedRoster(junk, sign(HUB, labelled("sig/roster", junk))).verify(hub)


@settings(max_examples=50)
@given(st.integers(0, len(ROSTER.to_bytes()) - 1), st.integers(1, 255))
def test_every_changed_byte_breaks_the_signature(place: int, change: int) -> None:
    signed = SignedRoster.create(ROSTER, HUB)
    data = bytearray(signed.data)
    data[place] ^= change
    with pytest.raises(VerificationError):
        SignedRoster(bytes(data), signed.signature).verify(public_key(HUB))


def test_unpinned_members_are_refused() -> None:
    pins = {m.name: m.fingerprint for m in ROSTER.members}
    check_pins(ROSTER, pins)
    check_pins(ROSTER, {**pins, "Left long ago": "0000"})
    for missing in ROSTER.members:
        with pytest.raises(RefusedError, match=missing.name):
            check_pins(ROSTER, {k: v for k, v in pins.items() if k != missing.name})
    swapped = {**pins, "Alpha": pins["Beta"], "Beta": pins["Alpha"]}
    with pytest.raises(VerificationError, match="Alpha, Beta"):
        check_pins(ROSTER, swapped)
    new_ledger_key = Roster((Member(1, "Alpha", KEYS[0], KEYS[6]), B, C))
    new_protocol_key = Roster((Member(1, "Alpha", KEYS[6], KEYS[1]), B, C))
    for roster in (new_ledger_key, new_protocol_key):
        with pytest.raises(VerificationError, match="Alpha"):
            check_pins(roster, pins)
    with pytest.raises(RefusedError, match="Alpha, Beta, Gamma"):
        check_pins(ROSTER, {})
