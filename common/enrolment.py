"""How a hospital joins: the admission request it sends, and the admission that the hub sends back.

Source: PROTOCOL "Roster"; RFC 4211 section 4 (proof of possession). Rules: both documents are public and
hold no secret; a request proves that its sender holds all three private keys, each made for one purpose;
an admission is checked whole against the request before anything of it is used; neither replaces the
comparison of fingerprints by people.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.certificates import (
    MAX_PEM_BYTES,
    Peer,
    check_issued,
    key_fingerprint,
    peer_identity,
    read_request,
)
from common.encoding import canonical_json, labelled, parse_canonical_json
from common.errors import UsageError, VerificationError
from common.identity import (
    base64url,
    base64url_bytes,
    check_name,
    key_bytes,
    key_text,
    party_fingerprint,
    public_key,
    sign,
    verify,
)
from common.roster import Member, Roster, SignedRoster

SCHEMA: Final = 1
MAX_DOCUMENT_BYTES: Final = 1 << 20
_ADDRESS: Final = re.compile(r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([1-9][0-9]{0,4})")

_REQUEST_FIELDS: Final = (
    "name",
    "csr",
    "protocol_key",
    "ledger_key",
    "protocol_proof",
    "ledger_proof",
)
_ADMISSION_FIELDS: Final = (
    "id",
    "name",
    "certificate",
    "authority",
    "hub_key",
    "address",
    "roster",
    "roster_signature",
)


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """A hospital's public keys under its name, each with a proof that the sender holds the private half.

    ``csr_pem`` proves the TLS key by its own signature; the proofs are Ed25519 signatures of 64 bytes by
    the protocol key and the ledger key over everything else in the request.
    """

    name: str
    csr_pem: bytes
    protocol_key: bytes
    ledger_key: bytes
    protocol_proof: bytes
    ledger_proof: bytes

    @classmethod
    def create(
        cls, name: str, csr_pem: bytes, protocol_key: Ed25519PrivateKey, ledger_key: Ed25519PrivateKey
    ) -> "AdmissionRequest":
        """Make and check a request. Raises UsageError on a bad name, VerificationError on unfit keys."""
        check_name(name, "name of the hospital")
        protocol, ledger = public_key(protocol_key), public_key(ledger_key)
        request = cls(
            name,
            csr_pem,
            protocol,
            ledger,
            sign(protocol_key, _proof_bytes("protocol", name, csr_pem, protocol, ledger)),
            sign(ledger_key, _proof_bytes("ledger", name, csr_pem, protocol, ledger)),
        )
        request.check()
        return request

    @property
    def fingerprint(self) -> str:
        """What the hospital reads out to the coordinator and to the other hospitals."""
        return party_fingerprint(self.name, self.protocol_key, self.ledger_key)

    @property
    def tls_fingerprint(self) -> str:
        """SHA-256 of the TLS key, as peer_identity will report it; 64 hex digits."""
        return key_fingerprint(read_request(self.csr_pem))

    def check(self) -> None:
        """Check the name, the request's signature and both proofs.

        Guarantee: requests_without_proof_are_refused - every key must have signed this very request.

        Raises: VerificationError.
        """
        _check_party_name(self.name)
        read_request(self.csr_pem)
        if self.protocol_key == self.ledger_key:
            raise VerificationError("enrolment.key-reuse", "the protocol key and the ledger key are the same")
        for purpose, key, proof in (
            ("protocol", self.protocol_key, self.protocol_proof),
            ("ledger", self.ledger_key, self.ledger_proof),
        ):
            data = _proof_bytes(purpose, self.name, self.csr_pem, self.protocol_key, self.ledger_key)
            verify(key, proof, data, f"admission request by its {purpose} key")

    def to_bytes(self) -> bytes:
        """RFC 8785 form."""
        return canonical_json(
            {
                "schema": SCHEMA,
                "name": self.name,
                "csr": self.csr_pem.decode("ascii"),
                "protocol_key": key_text(self.protocol_key),
                "ledger_key": key_text(self.ledger_key),
                "protocol_proof": base64url(self.protocol_proof),
                "ledger_proof": base64url(self.ledger_proof),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "AdmissionRequest":
        """Read to_bytes strictly and check everything. Raises VerificationError."""
        fields = _read_document(data, _REQUEST_FIELDS, "admission request")
        request = cls(
            name=_text(fields, "name"),
            csr_pem=_pem(fields, "csr"),
            protocol_key=key_bytes(_text(fields, "protocol_key"), "protocol key"),
            ledger_key=key_bytes(_text(fields, "ledger_key"), "ledger key"),
            protocol_proof=base64url_bytes(_text(fields, "protocol_proof"), "protocol key's proof"),
            ledger_proof=base64url_bytes(_text(fields, "ledger_proof"), "ledger key's proof"),
        )
        request.check()
        return request


@dataclass(frozen=True, slots=True)
class Admission:
    """What the hub sends back: the id, the certificate, whom to trust and dial, and the signed roster.

    ``ca_pem`` is the hub's authority, ``hub_key`` the raw Ed25519 key that signs rosters and rounds,
    ``address`` is host:port.
    """

    id: int
    name: str
    certificate_pem: bytes
    ca_pem: bytes
    hub_key: bytes
    address: str
    roster: bytes
    roster_signature: bytes

    def signed_roster(self) -> SignedRoster:
        """The roster at the time of admission, as it travels."""
        return SignedRoster(self.roster, self.roster_signature)

    def verified_roster(self) -> Roster:
        """The roster under ``hub_key``. Raises VerificationError."""
        return self.signed_roster().verify(self.hub_key)

    def member(self) -> Member:
        """The admitted hospital's own entry. Raises VerificationError when missing or of another name."""
        member = self.verified_roster().member(self.id)
        if member.name != self.name:
            raise VerificationError("enrolment.roster", "the roster has another name under the admitted id")
        return member

    def check(self) -> Peer:
        """Check that certificate, authority, roster, id, name and address belong together.

        Guarantee: inconsistent_admissions_are_refused - each part is compared with every other.
        Assumes: the fingerprint of ``hub_key`` is compared by people; the document cannot vouch for it.

        Raises: VerificationError.
        """
        _check_party_name(self.name)
        match = _ADDRESS.fullmatch(self.address)
        if match is None or int(match[1]) > 65535:
            raise VerificationError("enrolment.address", "the hub's address is not host:port")
        check_issued(self.certificate_pem, self.ca_pem)
        peer = peer_identity(self.certificate_pem)
        if (peer.role, peer.number, peer.name) != ("site", self.id, self.name):
            raise VerificationError(
                "enrolment.identity", "the certificate names another party than the admission"
            )
        self.member()
        return peer

    def check_answers(self, request: AdmissionRequest) -> None:
        """Check that this admission is the answer to ``request``: same name and the same three keys.

        Raises: VerificationError.
        """
        peer, member = self.check(), self.member()
        if (
            self.name != request.name
            or peer.tls_fingerprint != request.tls_fingerprint
            or member.protocol_key != request.protocol_key
            or member.ledger_key != request.ledger_key
        ):
            raise VerificationError(
                "enrolment.other-request",
                "the admission answers another request than this site's",
                remedy="Ask the coordinator for the admission that belongs to this site's request.",
            )

    def to_bytes(self) -> bytes:
        """RFC 8785 form."""
        return canonical_json(
            {
                "schema": SCHEMA,
                "id": self.id,
                "name": self.name,
                "certificate": self.certificate_pem.decode("ascii"),
                "authority": self.ca_pem.decode("ascii"),
                "hub_key": key_text(self.hub_key),
                "address": self.address,
                "roster": base64url(self.roster),
                "roster_signature": base64url(self.roster_signature),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Admission":
        """Read to_bytes strictly and check that it is consistent. Raises VerificationError."""
        fields = _read_document(data, _ADMISSION_FIELDS, "admission")
        if type(fields["id"]) is not int:
            raise VerificationError("enrolment.field", "the field 'id' must be an integer")
        admission = cls(
            id=fields["id"],
            name=_text(fields, "name"),
            certificate_pem=_pem(fields, "certificate"),
            ca_pem=_pem(fields, "authority"),
            hub_key=key_bytes(_text(fields, "hub_key"), "hub's key"),
            address=_text(fields, "address"),
            roster=base64url_bytes(_text(fields, "roster"), "roster"),
            roster_signature=base64url_bytes(_text(fields, "roster_signature"), "roster's signature"),
        )
        admission.check()
        return admission


def _proof_bytes(purpose: str, name: str, csr_pem: bytes, protocol_key: bytes, ledger_key: bytes) -> bytes:
    # The purpose is signed too: a proof by one key cannot be shown as a proof by the other.
    return labelled(
        "admission", purpose.encode("ascii"), name.encode("ascii"), csr_pem, protocol_key, ledger_key
    )


def _check_party_name(name: str) -> None:
    try:
        check_name(name, "name of the hospital")
    except UsageError as error:
        raise VerificationError("enrolment.name", error.problem) from error


def _read_document(data: bytes, names: tuple[str, ...], what: str) -> dict[str, Any]:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise VerificationError("enrolment.size", f"the {what} is longer than {MAX_DOCUMENT_BYTES} bytes")
    value = parse_canonical_json(data, f"the {what}")
    if not isinstance(value, dict) or set(value) != {"schema", *names}:
        raise VerificationError("enrolment.shape", f"the {what} does not have exactly its fields")
    if type(value["schema"]) is not int or value["schema"] != SCHEMA:
        raise VerificationError("enrolment.schema", f"the {what} is not of schema {SCHEMA}")
    return value


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise VerificationError("enrolment.field", f"the field {name!r} must be text")
    return value


def _pem(fields: dict[str, Any], name: str) -> bytes:
    text = _text(fields, name)
    if len(text) > MAX_PEM_BYTES or not text.isascii():
        raise VerificationError("enrolment.field", f"the field {name!r} must be PEM")
    return text.encode("ascii")
