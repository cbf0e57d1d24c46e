"""Whom an auditor believes: a file, or a fingerprint, and nothing that only the evidence says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.audit.evidence import Evidence
from common.audit.trust import Trust, claimed, read_trust
from common.encoding import canonical_json, parse_canonical_json
from common.errors import UsageError, VerificationError
from common.identity import fingerprint, key_text, new_signing_key, public_key
from common.roster import Roster, SignedRoster
from tests.common.audit.federation import Federation


def test_trust_is_read_as_written(ran: Federation) -> None:
    data = ran.trust.to_bytes()
    assert Trust.from_bytes(data) == ran.trust
    assert Trust.from_bytes(data).roster == ran.roster
    assert ran.trust.ledger_key(0) == public_key(ran.hub_key)
    assert ran.trust.ledger_key(2) == public_key(ran.keepers[2].key)
    with pytest.raises(VerificationError, match="no member 9"):
        ran.trust.ledger_key(9)
    value = parse_canonical_json(data, "")
    other = key_text(public_key(new_signing_key()))
    wrong: list[dict[str, Any]] = [
        {"schema": 2},
        {"schema": True},
        {"more": 1},
        {"hub": other},
        {"hub": 1},
        {"roster": "?"},
        {"roster": 1},
        {"roster": value["signature"]},
        {"signature": value["roster"]},
        {"signature": value["signature"][:-3] + chr(ord(value["signature"][-3]) + 1) + "=="},
    ]
    for change in wrong:
        with pytest.raises(VerificationError):
            Trust.from_bytes(canonical_json({**value, **change}))
    for name in value:
        with pytest.raises(VerificationError):
            Trust.from_bytes(canonical_json({key: value[key] for key in value if key != name}))
    for bytes_ in (b"", b"[]", b'"x"', data + b"\n"):
        with pytest.raises(VerificationError):
            Trust.from_bytes(bytes_)


def test_trust_is_given_as_a_file(ran: Federation, evidences: list[Evidence], tmp_path: Path) -> None:
    path = tmp_path / "trust.json"
    path.write_bytes(ran.trust.to_bytes())
    assert read_trust(str(path), evidences) == ran.trust
    with pytest.raises(UsageError, match="no fingerprint, and as a file") as error:
        read_trust(str(tmp_path / "nothing"), evidences)
    assert "hub roster" in error.value.remedy
    path.write_bytes(b"x")
    with pytest.raises(VerificationError):
        read_trust(str(path), evidences)


def test_trust_is_given_as_a_fingerprint(ran: Federation, evidences: list[Evidence]) -> None:
    hub = fingerprint(public_key(ran.hub_key))
    assert read_trust(hub, evidences) == ran.trust
    with pytest.raises(VerificationError, match="no evidence here holds a roster signed by the hub key"):
        read_trust(fingerprint(b"another"), evidences)
    # A hub key with that fingerprint, under a roster that it did not sign.
    forged = SignedRoster.create(ran.roster, new_signing_key())
    with pytest.raises(VerificationError, match="no evidence"):
        read_trust(hub, [replace(evidence, roster=forged) for evidence in evidences])
    # A whole other federation, sound in itself, is not taken for this one.
    other = new_signing_key()
    invented = replace(evidences[1], hub_key=public_key(other), roster=SignedRoster.create(ran.roster, other))
    assert read_trust(hub, [invented, evidences[2]]).hub_key == public_key(ran.hub_key)
    assert claimed([invented]).hub_key == public_key(other)


def test_the_newest_roster_is_taken(ran: Federation, evidences: list[Evidence]) -> None:
    hub, first, second, *_ = evidences
    older = SignedRoster.create(Roster(ran.roster.members[:3]), ran.hub_key)
    late = replace(second, roster=older, time="2026-12-31T00:00Z")
    assert claimed([first, late]).roster.members == ran.roster.members[:3]
    assert claimed([first, replace(late, time="2020-01-01T00:00Z")]).roster == ran.roster
    assert claimed([late, hub]).roster == ran.roster
