"""The roster: which hospitals there are, with the keys that everyone pins.

Source: PROTOCOL "Roster". Rules: ids, names and all keys are unique; the digest names the roster in every
manifest; the hub signs it, but a hospital trusts a member only after a person compared its fingerprint.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common import identity
from common.certificates import NAME
from common.encoding import canonical_json, digest, labelled, parse_canonical_json
from common.errors import RefusedError, VerificationError

FIELDS: Final = {"id", "name", "protocol_key", "ledger_key"}
MAX_MEMBERS: Final = 65535


@dataclass(frozen=True, slots=True)
class Member:
    """One hospital: id 1..65535, name, raw Ed25519 protocol and ledger keys (32 bytes each)."""

    id: int
    name: str
    protocol_key: bytes
    ledger_key: bytes

    @property
    def fingerprint(self) -> str:
        """What people compare out of band: both keys in one fingerprint."""
        return identity.fingerprint(self.protocol_key + self.ledger_key)


@dataclass(frozen=True, slots=True)
class Roster:
    """All members, by ascending id.

    Guarantee: rosters_hold_no_key_twice - ids, names, protocol and ledger keys are unique, across uses too.
    Raises: VerificationError.
    """

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        ids = [member.id for member in self.members]
        keys = [key for member in self.members for key in (member.protocol_key, member.ledger_key)]
        names = [member.name for member in self.members]
        if ids != sorted(set(ids)) or any(not 1 <= i <= MAX_MEMBERS for i in ids):
            raise VerificationError("roster.ids", "roster ids must ascend, from 1 to 65535")
        if len(set(names)) != len(names) or not all(NAME.fullmatch(name) for name in names):
            raise VerificationError("roster.names", "roster names must be well formed and differ")
        if len(set(keys)) != len(keys):
            raise VerificationError("roster.keys", "a key stands in the roster twice")

    def to_bytes(self) -> bytes:
        """RFC 8785 bytes."""
        return canonical_json(
            {
                "schema": 1,
                "members": [
                    {
                        "id": member.id,
                        "name": member.name,
                        "protocol_key": identity.key_text(member.protocol_key),
                        "ledger_key": identity.key_text(member.ledger_key),
                    }
                    for member in self.members
                ],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Roster":
        """Read a roster strictly. Raises VerificationError."""
        value = parse_canonical_json(data, "the roster")
        if not isinstance(value, dict) or set(value) != {"schema", "members"} or value["schema"] != 1:
            raise VerificationError("roster.fields", "the roster has unknown or missing fields")
        if not isinstance(value["members"], list):
            raise VerificationError("roster.fields", "the roster's members must be a list")
        return cls(tuple(_member(entry) for entry in value["members"]))

    @property
    def digest(self) -> bytes:
        """H("roster", bytes), 32 bytes."""
        return digest("roster", self.to_bytes())

    def member(self, member_id: int) -> Member:
        """One member. Raises RefusedError when the id is unknown."""
        for member in self.members:
            if member.id == member_id:
                return member
        raise RefusedError("roster.unknown", f"site {member_id} is not on the roster")

    def sign(self, hub_key: Ed25519PrivateKey) -> "SignedRoster":
        """The roster under the hub's signature."""
        data = self.to_bytes()
        return SignedRoster(data, hub_key.sign(labelled("sig/roster", data)))


def _member(entry: Any) -> Member:
    if not isinstance(entry, dict) or set(entry) != FIELDS or type(entry["id"]) is not int:
        raise VerificationError("roster.fields", "a roster member has unknown or missing fields")
    if not all(isinstance(entry[name], str) for name in FIELDS - {"id"}):
        raise VerificationError("roster.fields", "a roster member's name and keys must be texts")
    return Member(
        entry["id"], entry["name"], identity.key_bytes(entry["protocol_key"]), identity.key_bytes(entry["ledger_key"])
    )


@dataclass(frozen=True, slots=True)
class SignedRoster:
    """Roster bytes and the hub's signature over them (64 bytes)."""

    data: bytes
    signature: bytes

    def verify(self, hub_key: bytes) -> Roster:
        """The roster inside, under the hub's raw public key. Raises VerificationError."""
        identity.verify(hub_key, self.signature, labelled("sig/roster", self.data), "the roster")
        return Roster.from_bytes(self.data)

    @property
    def digest(self) -> bytes:
        """H("roster", bytes), 32 bytes."""
        return digest("roster", self.data)

    def to_fields(self) -> dict[str, str]:
        """As JSON fields."""
        return {"roster": self.data.decode(), "signature": base64.b64encode(self.signature).decode()}


def check_pins(roster: Roster, members: tuple[int, ...], pins: Mapping[str, str]) -> tuple[Member, ...]:
    """The members whose fingerprint is not pinned yet.

    Guarantee: changed_keys_are_refused - a pinned name with another fingerprint, always.
    Raises: RefusedError naming the hospital.
    """
    unpinned = []
    for member_id in members:
        member = roster.member(member_id)
        pinned = pins.get(member.name)
        if pinned is None:
            unpinned.append(member)
        elif pinned != member.fingerprint:
            raise RefusedError(
                "roster.pin",
                f"the keys of {member.name!r} are not those that were pinned here",
                remedy="Call that hospital on a known number and compare fingerprints before anything else.",
            )
    return tuple(unpinned)
