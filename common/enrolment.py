"""How a hospital joins: the admission request it sends, and the admission that the hub sends back.

Source: PROTOCOL "Roster"; RFC 4211 section 4 (proof of possession). Rules: both documents are public and
hold no secret; a request proves that its sender holds all three private keys, each made for one purpose;
an admission is checked whole against the request before anything of it is used; neither replaces the
comparison of fingerprints by people.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common import identity
from common.certificates import (
    MAX_PEM_BYTES,
    Peer,
    check_issued,
    key_fingerprint,
    peer_identity,
    read_request,
)
from common.encoding import annotations_of, canonical_json, labelled, parse_canonical_json
from common.errors import VerificationError
from common.identity import check_name, name_problem, party_fingerprint, public_key, sign, verify
from common.roster import Member, Roster, SignedRoster

SCHEMA: Final = 1
MAX_DOCUMENT_BYTES: Final = 1 << 20
_ADDRESS: Final = re.compile(r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([1-9][0-9]{0,4})")


class _Form(NamedTuple):
    """How a field of a record stands in its document: under which name, how it is written and read."""

    name: str
    write: Callable[[Any], str | int]
    read: Callable[[Any], Any]
    kind: type[str | int] = str


def _pem(name: str) -> _Form:
    def read(text: str) -> bytes:
        if len(text) > MAX_PEM_BYTES or not text.isascii():
            raise VerificationError("enrolment.field", f"the field {name!r} must be PEM")
        return text.encode("ascii")

    return _Form(name, lambda pem: pem.decode("ascii"), read)


def _key(name: str, what: str) -> _Form:
    return _Form(name, identity.key_text, lambda text: identity.key_bytes(text, what))


def _base64(name: str, what: str) -> _Form:
    return _Form(name, identity.base64url, lambda text: identity.base64url_bytes(text, what))


class _Document:
    """A frozen dataclass that is sent as canonical JSON; each field's annotation holds its form there."""

    __slots__ = ()
    TITLE: ClassVar[str]

    def check(self) -> object:
        """Check what the document says. Raises VerificationError."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """RFC 8785 form."""
        fields = {form.name: form.write(getattr(self, name)) for name, form in annotations_of(type(self))}
        return canonical_json({"schema": SCHEMA, **fields})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read to_bytes strictly and check everything. Raises VerificationError."""
        if len(data) > MAX_DOCUMENT_BYTES:
            problem = f"the {cls.TITLE} is longer than {MAX_DOCUMENT_BYTES} bytes"
            raise VerificationError("enrolment.size", problem)
        value = parse_canonical_json(data, f"the {cls.TITLE}")
        forms = annotations_of(cls)
        if not isinstance(value, dict) or set(value) != {"schema", *(form.name for _, form in forms)}:
            raise VerificationError("enrolment.shape", f"the {cls.TITLE} does not have exactly its fields")
        if type(value["schema"]) is not int or value["schema"] != SCHEMA:
            raise VerificationError("enrolment.schema", f"the {cls.TITLE} is not of schema {SCHEMA}")
        for _, form in forms:
            if type(value[form.name]) is not form.kind:
                kind = "text" if form.kind is str else "an integer"
                raise VerificationError("enrolment.field", f"the field {form.name!r} must be {kind}")
        document = cls(**{name: form.read(value[form.name]) for name, form in forms})
        document.check()
        return document


_NAME: Final = _Form("name", str, str)


@dataclass(frozen=True, slots=True)
class AdmissionRequest(_Document):
    """A hospital's public keys under its name, each with a proof that the sender holds the private half.

    ``csr_pem`` proves the TLS key by its own signature; the proofs are Ed25519 signatures of 64 bytes by
    the protocol key and the ledger key over everything else in the request.
    """

    name: Annotated[str, _NAME]
    csr_pem: Annotated[bytes, _pem("csr")]
    protocol_key: Annotated[bytes, _key("protocol_key", "protocol key")]
    ledger_key: Annotated[bytes, _key("ledger_key", "ledger key")]
    protocol_proof: Annotated[bytes, _base64("protocol_proof", "protocol key's proof")]
    ledger_proof: Annotated[bytes, _base64("ledger_proof", "ledger key's proof")]
    TITLE = "admission request"

    @classmethod
    def create(
        cls, name: str, csr_pem: bytes, protocol_key: Ed25519PrivateKey, ledger_key: Ed25519PrivateKey
    ) -> Self:
        """Make and check a request. Raises UsageError on a bad name, VerificationError on unfit keys."""
        check_name(name, "name of the hospital")
        request = cls(name, csr_pem, public_key(protocol_key), public_key(ledger_key), b"", b"")
        request = replace(
            request,
            protocol_proof=sign(protocol_key, request._proven("protocol")),
            ledger_proof=sign(ledger_key, request._proven("ledger")),
        )
        request.check()
        return request

    def _proven(self, purpose: str) -> bytes:
        # The purpose is signed too: a proof by one key cannot be shown as a proof by the other.
        names = (purpose.encode("ascii"), self.name.encode("ascii"))
        return labelled("admission", *names, self.csr_pem, self.protocol_key, self.ledger_key)

    @property
    def fingerprint(self) -> str:
        """What the hospital reads out to the coordinator and to the other hospitals."""
        return party_fingerprint(self.name, self.protocol_key, self.ledger_key)

    @property
    def tls_fingerprint(self) -> str:
        """SHA-256 of the TLS key, as peer_identity will report it; 64 hex digits."""
        return key_fingerprint(read_request(self.csr_pem))

    def check(self) -> None:
        """Check the name, the request's signature and both proofs. Raises VerificationError.

        Guarantee: requests_without_proof_are_refused - every key must have signed this very request.
        """
        _check_party_name(self.name)
        read_request(self.csr_pem)
        if self.protocol_key == self.ledger_key:
            raise VerificationError("enrolment.key-reuse", "the protocol key and the ledger key are the same")
        for purpose, key, proof in (
            ("protocol", self.protocol_key, self.protocol_proof),
            ("ledger", self.ledger_key, self.ledger_proof),
        ):
            verify(key, proof, self._proven(purpose), f"admission request by its {purpose} key")


@dataclass(frozen=True, slots=True)
class Admission(_Document):
    """What the hub sends back: the id, the certificate, whom to trust and dial, and the signed roster.

    ``ca_pem`` is the hub's authority, ``hub_key`` the raw Ed25519 key that signs rosters and rounds,
    ``address`` is host:port.
    """

    id: Annotated[int, _Form("id", int, int, int)]
    name: Annotated[str, _NAME]
    certificate_pem: Annotated[bytes, _pem("certificate")]
    ca_pem: Annotated[bytes, _pem("authority")]
    hub_key: Annotated[bytes, _key("hub_key", "hub's key")]
    address: Annotated[str, _Form("address", str, str)]
    roster: Annotated[bytes, _base64("roster", "roster")]
    roster_signature: Annotated[bytes, _base64("roster_signature", "roster's signature")]
    TITLE = "admission"

    def verified_roster(self) -> Roster:
        """The roster at the time of admission, under ``hub_key``. Raises VerificationError."""
        return SignedRoster(self.roster, self.roster_signature).verify(self.hub_key)

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
            problem = "the certificate names another party than the admission"
            raise VerificationError("enrolment.identity", problem)
        self.member()
        return peer

    def check_answers(self, request: AdmissionRequest) -> None:
        """Check that this answers ``request``: same name, same three keys. Raises VerificationError."""
        peer, member = self.check(), self.member()
        found = (self.name, peer.tls_fingerprint, member.protocol_key, member.ledger_key)
        if found != (request.name, request.tls_fingerprint, request.protocol_key, request.ledger_key):
            problem = "the admission answers another request than this site's"
            remedy = "Ask the coordinator for the admission that belongs to this site's request."
            raise VerificationError("enrolment.other-request", problem, remedy=remedy)


def _check_party_name(name: str) -> None:
    if problem := name_problem(name, "name of the hospital"):
        raise VerificationError("enrolment.name", problem)
