"""What a hospital and the hub exchange when a hospital joins: a request with proofs, an admission.

Source: PROTOCOL "Roster". Rules: canonical JSON with a closed set of fields; a request proves possession of
every key in it; an admission is checked against the hospital's own keys before anything of it is used.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common import identity
from common.certificates import NAME, peer_identity, requested_key
from common.encoding import canonical_json, labelled, parse_canonical_json
from common.errors import VerificationError
from common.roster import Member, SignedRoster

MAX_DOCUMENT_BYTES: Final = 1 << 24


def _fields(data: bytes, names: set[str], what: str) -> dict[str, Any]:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise VerificationError("enrolment.size", f"{what} is larger than 16 MiB")
    value = parse_canonical_json(data, what)
    if not isinstance(value, dict) or set(value) != names or value["schema"] != 1:
        raise VerificationError("enrolment.fields", f"{what} has unknown or missing fields")
    return value


def _texts(value: dict[str, Any], names: tuple[str, ...], what: str) -> list[str]:
    texts = [value[name] for name in names]
    if not all(isinstance(text, str) for text in texts):
        raise VerificationError("enrolment.fields", f"{what} holds a field that must be a text")
    return texts


def _signature(text: Any, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise VerificationError("enrolment.signature", f"{what} holds a malformed signature") from error


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """What a hospital sends to the coordinator; all of it is public. Keys as ``ed25519:`` text."""

    name: str
    csr_pem: bytes
    protocol_key: str
    ledger_key: str
    protocol_proof: bytes
    ledger_proof: bytes

    @classmethod
    def make(
        cls, name: str, csr_pem: bytes, protocol: Ed25519PrivateKey, ledger: Ed25519PrivateKey
    ) -> "AdmissionRequest":
        """A request with a proof of possession by each key."""
        protocol_key = identity.key_text(identity.public_bytes(protocol))
        ledger_key = identity.key_text(identity.public_bytes(ledger))
        data = cls._proved(name, csr_pem, protocol_key, ledger_key)
        return cls(name, csr_pem, protocol_key, ledger_key, protocol.sign(data), ledger.sign(data))

    @staticmethod
    def _proved(name: str, csr_pem: bytes, protocol_key: str, ledger_key: str) -> bytes:
        return labelled("admission", name.encode(), csr_pem, protocol_key.encode(), ledger_key.encode())

    def to_bytes(self) -> bytes:
        """RFC 8785 bytes."""
        return canonical_json(
            {
                "schema": 1,
                "name": self.name,
                "csr": self.csr_pem.decode(),
                "protocol_key": self.protocol_key,
                "ledger_key": self.ledger_key,
                "protocol_proof": base64.b64encode(self.protocol_proof).decode(),
                "ledger_proof": base64.b64encode(self.ledger_proof).decode(),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "AdmissionRequest":
        """Read and verify a request.

        Guarantee: requests_prove_every_key - each of the three keys signed this very request.
        Raises: VerificationError.
        """
        what = "the admission request"
        names = {"schema", "name", "csr", "protocol_key", "ledger_key", "protocol_proof", "ledger_proof"}
        value = _fields(data, names, what)
        name, csr, protocol_key, ledger_key = _texts(value, ("name", "csr", "protocol_key", "ledger_key"), what)
        if not NAME.fullmatch(name) or name != name.strip():
            raise VerificationError("enrolment.name", "the request's name must be 1-64 letters, digits or . ' _ -")
        if protocol_key == ledger_key:
            raise VerificationError("enrolment.keys", "the protocol key and the ledger key must differ")
        request = cls(
            name,
            csr.encode(),
            protocol_key,
            ledger_key,
            _signature(value["protocol_proof"], what),
            _signature(value["ledger_proof"], what),
        )
        proved = cls._proved(name, request.csr_pem, protocol_key, ledger_key)
        identity.verify(identity.key_bytes(protocol_key), request.protocol_proof, proved, "the protocol key's proof")
        identity.verify(identity.key_bytes(ledger_key), request.ledger_proof, proved, "the ledger key's proof")
        requested_key(request.csr_pem)
        return request


@dataclass(frozen=True, slots=True)
class Admission:
    """What the coordinator sends back: certificate, authority, the hub's key and address, the roster."""

    id: int
    name: str
    certificate_pem: bytes
    authority_pem: bytes
    hub_key: str
    address: str
    roster: SignedRoster

    def member(self) -> Member:
        """This hospital's own entry in the roster. Raises VerificationError or RefusedError."""
        return self.roster.verify(identity.key_bytes(self.hub_key)).member(self.id)

    def to_bytes(self) -> bytes:
        """RFC 8785 bytes."""
        return canonical_json(
            {
                "schema": 1,
                "id": self.id,
                "name": self.name,
                "certificate": self.certificate_pem.decode(),
                "authority": self.authority_pem.decode(),
                "hub_key": self.hub_key,
                "address": self.address,
                **self.roster.to_fields(),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Admission":
        """Read an admission and check that its parts agree with each other. Raises VerificationError."""
        what = "the admission"
        names = {"schema", "id", "name", "certificate", "authority", "hub_key", "address", "roster", "signature"}
        value = _fields(data, names, what)
        texts = _texts(value, ("name", "certificate", "authority", "hub_key", "address", "roster"), what)
        name, certificate, authority, hub_key, address, roster = texts
        if type(value["id"]) is not int:
            raise VerificationError("enrolment.fields", "the admission's id must be a whole number")
        admission = cls(
            value["id"],
            name,
            certificate.encode(),
            authority.encode(),
            hub_key,
            address,
            SignedRoster(roster.encode(), _signature(value["signature"], what)),
        )
        peer = peer_identity(admission.certificate_pem)
        if (peer.role, peer.number, peer.name) != ("site", admission.id, name) or admission.member().name != name:
            raise VerificationError("enrolment.mismatch", "the admission's certificate, roster and name do not agree")
        return admission

    def check_own_keys(self, protocol_key: bytes, ledger_key: bytes, tls_fingerprint: str) -> None:
        """Refuse an admission for other keys than this hospital's. Raises VerificationError."""
        member = self.member()
        own = (member.protocol_key, member.ledger_key, peer_identity(self.certificate_pem).tls_fingerprint)
        if own != (protocol_key, ledger_key, tls_fingerprint):
            raise VerificationError(
                "enrolment.foreign",
                "the admission was made for other keys than this site's",
                remedy="Send request.json of this folder and use the admission made from it.",
            )
