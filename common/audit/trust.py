"""Whom an auditor believes: the hub's key and the roster of hospitals, from elsewhere than the evidence.

Source: DESIGN "Ledger". Rules: a key that arrives inside the evidence proves nothing; a roster counts when
the trusted hub key signed it; the file holds public keys alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from common.audit.evidence import Evidence
from common.encoding import base64_bytes, base64_text, canonical_json, parse_canonical_json
from common.errors import UsageError, VerificationError
from common.identity import fingerprint, key_bytes, key_text
from common.roster import Roster, SignedRoster
from common.witness import HUB

SCHEMA: Final = 1
MAX_TRUST_BYTES: Final = 1 << 20

_FIELDS: Final = ("schema", "hub", "roster", "signature")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{4}(-[0-9a-f]{4}){7}")
_REMEDY: Final = "Give what 'wardround hub roster --out FILE' wrote, or the fingerprint of the hub's key."


@dataclass(frozen=True)
class Trust:
    """The hub's raw public key (32 bytes) and a roster that it is said to have signed."""

    hub_key: bytes
    signed: SignedRoster

    @cached_property
    def roster(self) -> Roster:
        """The hospitals. Raises VerificationError unless the hub key signed them."""
        return self.signed.verify(self.hub_key)

    def ledger_key(self, party: int) -> bytes:
        """The raw key that signs that party's ledger, 0 is the hub. Raises VerificationError."""
        return self.hub_key if party == HUB else self.roster.member(party).ledger_key

    def to_bytes(self) -> bytes:
        """The file that ``--trust`` takes: canonical JSON.

        Guarantee: trust_is_read_as_written - from_bytes gives the same trust back, and reads nothing else.
        """
        signed = base64_text(self.signed.data), base64_text(self.signed.signature)
        return canonical_json(dict(zip(_FIELDS, (SCHEMA, key_text(self.hub_key), *signed), strict=True)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read to_bytes strictly. Raises VerificationError, also for a roster that the key did not sign."""
        value: Any = parse_canonical_json(data, "the trust file")
        try:
            if set(value) != set(_FIELDS) or (type(value["schema"]), value["schema"]) != (int, SCHEMA):
                raise ValueError("fields")
            signed = SignedRoster(base64_bytes(value["roster"]), base64_bytes(value["signature"]))
            trust = cls(key_bytes(value["hub"], "hub key"), signed)
        except (ValueError, TypeError, AttributeError) as error:
            raise VerificationError("audit.trust", "this is not a trust file", remedy=_REMEDY) from error
        _ = trust.roster
        return trust


def claimed(evidences: Sequence[Evidence], hub_fingerprint: str = "") -> Trust:
    """The newest roster inside the evidence that a hub key inside it signed.

    With the fingerprint of the hub's key, of that key alone; without, of a key that nobody vouched for. The
    hub's own evidence has the last word on what is newest, then the time of the evidence.

    Raises: VerificationError when there is none.
    """
    for evidence in sorted(evidences, key=lambda e: (e.party == HUB, e.time), reverse=True):
        if hub_fingerprint and fingerprint(evidence.hub_key) != hub_fingerprint:
            continue
        trust = Trust(evidence.hub_key, evidence.roster)
        try:
            _ = trust.roster
        except VerificationError:
            continue
        return trust
    whose = f"the hub key {hub_fingerprint}" if hub_fingerprint else "its own hub key"
    raise VerificationError("audit.roster", f"no evidence here holds a roster signed by {whose}")


def is_fingerprint(given: str) -> bool:
    """Whether ``--trust`` names a key: the hospitals' keys are then those of a roster that the hub signed."""
    return _FINGERPRINT.fullmatch(given) is not None


def read_trust(given: str, evidences: Sequence[Evidence]) -> Trust:
    """``--trust``: a trust file's path, or the fingerprint of the hub's key as ``hub init`` prints it.

    Raises: UsageError when it is neither; VerificationError.
    """
    if is_fingerprint(given):
        return claimed(evidences, given)
    try:
        with Path(given).open("rb") as file:
            return Trust.from_bytes(file.read(MAX_TRUST_BYTES))
    except OSError as error:
        problem = f"{given} is no fingerprint, and as a file cannot be read: {error.strerror}"
        raise UsageError("audit.trust-file", problem, remedy=_REMEDY) from error
