"""Admission requests and admissions: whole and proven, or refused."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from common.certificates import Authority, new_tls_key_and_csr
from common.encoding import canonical_json, labelled
from common.enrolment import Admission, AdmissionRequest
from common.errors import UsageError, VerificationError
from common.identity import base64url, key_text, new_signing_key, public_key, sign
from common.roster import Member, Roster, SignedRoster

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
NAME = "St. Mary's"
AUTHORITY = Authority.create("Test hub", NOW)
HUB, PROTOCOL, LEDGER, OTHER = (new_signing_key() for _ in range(4))
_, CSR = new_tls_key_and_csr(NAME)
_, OTHER_CSR = new_tls_key_and_csr(NAME)
REQUEST = AdmissionRequest.create(NAME, CSR, PROTOCOL, LEDGER)


def _roster(*extra: Member) -> Roster:
    return Roster((Member(3, NAME, public_key(PROTOCOL), public_key(LEDGER)), *extra))


def _admission(roster: Roster | None = None) -> Admission:
    signed = SignedRoster.create(roster or _roster(), HUB)
    return Admission(
        id=3,
        name=NAME,
        certificate_pem=AUTHORITY.issue_client(CSR, "site", 3, NAME, NOW),
        ca_pem=AUTHORITY.certificate_pem,
        hub_key=public_key(HUB),
        address="hub.example.org:7443",
        roster=signed.data,
        roster_signature=signed.signature,
    )


ADMISSION = _admission()


def test_request_round_trip() -> None:
    again = AdmissionRequest.from_bytes(REQUEST.to_bytes())
    assert again == REQUEST
    assert again.fingerprint == _roster().member(3).fingerprint
    assert b"PRIVATE" not in REQUEST.to_bytes()


def test_requests_without_proof_are_refused() -> None:
    def proof(
        key: Any, purpose: bytes = b"protocol", name: bytes = NAME.encode(), label: str = "admission"
    ) -> bytes:
        return sign(key, labelled(label, purpose, name, CSR, REQUEST.protocol_key, REQUEST.ledger_key))

    assert proof(PROTOCOL) == REQUEST.protocol_proof
    wrong = [
        replace(REQUEST, protocol_proof=proof(OTHER)),
        replace(REQUEST, ledger_proof=proof(OTHER, b"ledger")),
        replace(REQUEST, protocol_proof=REQUEST.ledger_proof),
        replace(REQUEST, ledger_proof=proof(LEDGER, b"protocol")),
        replace(REQUEST, protocol_proof=proof(PROTOCOL, name=b"Other")),
        replace(REQUEST, protocol_proof=proof(PROTOCOL, label="sig/admission")),
        replace(REQUEST, protocol_proof=b""),
        # Somebody else's key under this name, with this hospital's proofs.
        replace(REQUEST, protocol_key=public_key(OTHER)),
        replace(REQUEST, ledger_key=public_key(OTHER)),
        replace(REQUEST, protocol_key=bytes(32)),
        # The proofs cover the TLS key: another one cannot be slipped in.
        replace(REQUEST, csr_pem=OTHER_CSR),
        replace(REQUEST, csr_pem=CSR + b"\n"),
        replace(REQUEST, name="Other"),
        replace(REQUEST, name="Ho\u0455pital"),
    ]
    for request in wrong:
        with pytest.raises(VerificationError):
            request.check()
    for request in wrong[:-1]:
        if request.protocol_key != bytes(32):
            with pytest.raises(VerificationError):
                AdmissionRequest.from_bytes(request.to_bytes())


def test_one_key_for_two_purposes_is_refused() -> None:
    with pytest.raises(VerificationError, match="are the same"):
        AdmissionRequest.create(NAME, CSR, PROTOCOL, PROTOCOL)
    with pytest.raises(UsageError, match="is not a name"):
        AdmissionRequest.create("A/B", CSR, PROTOCOL, LEDGER)


def _variants(data: bytes, changes: list[tuple[str, Any]]) -> list[bytes]:
    value = json.loads(data)
    variants = [canonical_json({**value, field: content}) for field, content in changes]
    variants += [canonical_json({k: v for k, v in value.items() if k != field}) for field in value]
    variants += [
        canonical_json({**value, "extra": 1}),
        json.dumps(value).encode(),
        data + b"\n",
        b"[]",
        b"null",
        b"",
        b"\xff",
        b"[" * 100_000,
        canonical_json({**value, "extra": "x" * (1 << 20)}),
    ]
    return variants


def test_only_exact_requests_are_read() -> None:
    changes = [
        ("schema", 2),
        ("schema", True),
        ("name", 1),
        ("name", None),
        ("csr", CSR.decode() + "é"),
        ("csr", 1),
        ("protocol_key", key_text(public_key(OTHER))),
        ("protocol_key", public_key(PROTOCOL).hex()),
        ("ledger_proof", base64url(REQUEST.ledger_proof) + "="),
        ("ledger_proof", base64url(REQUEST.ledger_proof)[:-2]),
    ]
    for data in _variants(REQUEST.to_bytes(), changes):
        with pytest.raises(VerificationError):
            AdmissionRequest.from_bytes(data)


def test_admission_round_trip() -> None:
    again = Admission.from_bytes(ADMISSION.to_bytes())
    assert again == ADMISSION
    assert again.member() == _roster().member(3)
    again.check_answers(REQUEST)
    peer = again.check()
    assert (peer.role, peer.number, peer.name) == ("site", 3, NAME)


def test_inconsistent_admissions_are_refused() -> None:
    impostor = Authority.create("Test hub", NOW)
    unsigned = SignedRoster(_roster().to_bytes(), bytes(64))
    without = SignedRoster.create(Roster((Member(4, NAME, public_key(PROTOCOL), public_key(LEDGER)),)), HUB)
    renamed = SignedRoster.create(
        Roster((Member(3, "Other", public_key(PROTOCOL), public_key(LEDGER)),)), HUB
    )
    wrong = [
        replace(ADMISSION, id=4),
        replace(ADMISSION, name="Other"),
        replace(ADMISSION, name=""),
        replace(ADMISSION, certificate_pem=AUTHORITY.issue_client(CSR, "site", 4, NAME, NOW)),
        replace(ADMISSION, certificate_pem=AUTHORITY.issue_client(CSR, "coordinator", 3, NAME, NOW)),
        replace(ADMISSION, certificate_pem=AUTHORITY.issue_client(CSR, "site", 3, "Other", NOW)),
        replace(ADMISSION, certificate_pem=AUTHORITY.issue_server(CSR, ["localhost"], NOW)),
        replace(ADMISSION, certificate_pem=impostor.issue_client(CSR, "site", 3, NAME, NOW)),
        replace(ADMISSION, ca_pem=impostor.certificate_pem),
        replace(ADMISSION, ca_pem=ADMISSION.certificate_pem),
        replace(ADMISSION, hub_key=public_key(OTHER)),
        replace(ADMISSION, roster_signature=unsigned.signature),
        replace(ADMISSION, roster=without.data, roster_signature=without.signature),
        replace(ADMISSION, roster=renamed.data, roster_signature=renamed.signature),
        *(
            replace(ADMISSION, address=address)
            for address in (
                "",
                "hub",
                "hub:",
                ":1",
                "hub:0",
                "hub:65536",
                "hub:1 ",
                "h ub:1",
                "https://h:1",
                "a:1\n",
            )
        ),
    ]
    for admission in wrong:
        with pytest.raises(VerificationError):
            admission.check()
        with pytest.raises(VerificationError):
            Admission.from_bytes(admission.to_bytes())
    for address in ("127.0.0.1:1", "localhost:65535", "[::1]:7443"):
        replace(ADMISSION, address=address).check()


def test_only_exact_admissions_are_read() -> None:
    changes: list[tuple[str, Any]] = [
        ("schema", 2),
        ("id", "3"),
        ("id", True),
        ("id", 3.5),
        ("id", None),
        ("hub_key", public_key(HUB).hex()),
        ("roster", _roster().to_bytes().decode()),
        ("certificate", None),
        ("authority", []),
        ("address", 7443),
    ]
    for data in _variants(ADMISSION.to_bytes(), changes):
        with pytest.raises(VerificationError):
            Admission.from_bytes(data)


def test_the_admission_answers_this_request() -> None:
    others = [
        AdmissionRequest.create(NAME, OTHER_CSR, PROTOCOL, LEDGER),
        AdmissionRequest.create(NAME, CSR, OTHER, LEDGER),
        AdmissionRequest.create(NAME, CSR, PROTOCOL, OTHER),
        AdmissionRequest.create("Other", CSR, PROTOCOL, LEDGER),
    ]
    for request in others:
        with pytest.raises(VerificationError, match="another request"):
            ADMISSION.check_answers(request)
    # A hub that puts other keys under this hospital's id is seen by the hospital itself.
    swapped = Roster((Member(3, NAME, public_key(OTHER), public_key(LEDGER)),))
    with pytest.raises(VerificationError, match="another request"):
        _admission(swapped).check_answers(REQUEST)
