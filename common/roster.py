"""The roster: which hospitals exist at a hub, by id, name and their two public keys, signed by the hub.

Source: PROTOCOL "Roster". Rules: the hub's signature says only that the hub wrote it; a hospital trusts a
roster when every other member's fingerprint equals the one that a person there pinned out of band; ids,
names and keys are used once; the digest names the exact bytes that a manifest refers to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common import identity
from common.encoding import canonical_json, digest, labelled, parse_canonical_json
from common.errors import RefusedError, VerificationError
from common.identity import MAX_ID, key_bytes, key_text, party_fingerprint

SCHEMA: Final = 1
MAX_MEMBERS: Final = 1000


@dataclass(frozen=True, slots=True)
class Member:
    """One hospital. ``id`` is 1 to 65535; both keys are raw Ed25519 public keys of 32 bytes."""

    id: int
    name: str
    protocol_key: bytes
    ledger_key: bytes

    @property
    def fingerprint(self) -> str:
        """What people compare and pin: over the name and both keys (party_fingerprint)."""
        return party_fingerprint(self.name, self.protocol_key, self.ledger_key)

    def to_fields(self) -> dict[str, str | int]:
        """The member as JSON."""
        keys = {"protocol_key": key_text(self.protocol_key), "ledger_key": key_text(self.ledger_key)}
        return {"id": self.id, "name": self.name, **keys}

    @classmethod
    def from_fields(cls, entry: Any) -> "Member":
        """Read to_fields strictly. Raises VerificationError."""
        if not isinstance(entry, dict) or set(entry) != {"id", "name", "protocol_key", "ledger_key"}:
            raise VerificationError("roster.member", "a roster member does not have exactly its four fields")
        number, name, *keys = (entry[field] for field in ("id", "name", "protocol_key", "ledger_key"))
        if type(number) is not int or not all(isinstance(text, str) for text in (name, *keys)):
            raise VerificationError("roster.member", "a field of a roster member has the wrong type")
        protocol_key, ledger_key = (key_bytes(text, f"key of roster member {number}") for text in keys)
        return cls(number, name, protocol_key, ledger_key)


@dataclass(frozen=True, slots=True)
class Roster:
    """Members in ascending order of id. Raises VerificationError on construction.

    Guarantee: inconsistent_rosters_are_refused - no member, more than 1000, a bad or repeated id, name (in
    any case of its letters) or key, or another order.
    """

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.members) <= MAX_MEMBERS:
            raise VerificationError("roster.size", f"a roster has 1 to {MAX_MEMBERS} members")
        last, names, keys = 0, set[str](), set[bytes]()
        for member in self.members:
            if not last < member.id <= MAX_ID:
                raise VerificationError("roster.order", f"member ids must ascend within 1 to {MAX_ID}")
            last = member.id
            if problem := identity.name_problem(member.name, f"name of roster member {member.id}"):
                raise VerificationError("roster.name", problem)
            if member.name.lower() in names:
                raise VerificationError("roster.name", f"the name of roster member {member.id} is used twice")
            names.add(member.name.lower())
            for key in (member.protocol_key, member.ledger_key):
                if identity.check_public_key(key, f"key of roster member {member.id}") in keys:
                    raise VerificationError("roster.key", f"a key of roster member {member.id} is used twice")
                keys.add(key)

    def member(self, member_id: int) -> Member:
        """The member with that id. Raises VerificationError when there is none."""
        for member in self.members:
            if member.id == member_id:
                return member
        raise VerificationError("roster.stranger", f"the roster has no member {member_id}")

    def to_bytes(self) -> bytes:
        """RFC 8785 form."""
        return canonical_json({"schema": SCHEMA, "members": [m.to_fields() for m in self.members]})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Roster":
        """Read to_bytes strictly: only the bytes that it makes are accepted. Raises VerificationError."""
        value = parse_canonical_json(data, "the roster")
        shaped = isinstance(value, dict) and set(value) == {"schema", "members"}
        shaped = shaped and (type(value["schema"]), value["schema"]) == (int, SCHEMA)
        if not (shaped and isinstance(value["members"], list)):
            raise VerificationError("roster.shape", f"the roster is not of schema {SCHEMA}")
        return cls(tuple(Member.from_fields(entry) for entry in value["members"]))

    @property
    def digest(self) -> bytes:
        """H("roster", bytes), 32 bytes, as manifests state it."""
        return digest("roster", self.to_bytes())


@dataclass(frozen=True, slots=True)
class SignedRoster:
    """A roster as it travels: its exact bytes and the hub's signature, neither trusted until verify."""

    data: bytes
    signature: bytes

    @classmethod
    def create(cls, roster: Roster, hub_key: Ed25519PrivateKey) -> "SignedRoster":
        """Sign a roster as the hub."""
        data = roster.to_bytes()
        return cls(data, identity.sign(hub_key, _signed_bytes(data)))

    @property
    def digest(self) -> bytes:
        """H("roster", data), 32 bytes."""
        return digest("roster", self.data)

    def verify(self, hub_key: bytes) -> Roster:
        """The roster, when the hub (raw public key) signed these bytes. Raises VerificationError.

        Guarantee: forged_rosters_are_refused - a changed byte, another signer or another label fails.
        """
        identity.verify(hub_key, self.signature, _signed_bytes(self.data), "roster")
        return Roster.from_bytes(self.data)


def check_pins(roster: Roster, pins: Mapping[str, str]) -> None:
    """Check that each member has the fingerprint that was pinned for its name.

    ``pins`` maps name to Member.fingerprint; pins of hospitals that are not in the roster do not matter.

    Guarantee: unpinned_members_are_refused - a new member, a changed key and a swapped name are named.
    Raises: RefusedError naming the unpinned members; VerificationError naming the changed ones.
    """
    changed = [m.name for m in roster.members if m.name in pins and pins[m.name] != m.fingerprint]
    if changed:
        problem = f"the roster has other keys than were pinned for: {', '.join(changed)}"
        remedy = "Call that hospital; pin the new fingerprint only when it says that its keys changed."
        raise VerificationError("roster.pin-changed", problem, remedy=remedy)
    unknown = [m.name for m in roster.members if m.name not in pins]
    if unknown:
        problem = f"no fingerprint is pinned for: {', '.join(unknown)}"
        remedy = "Compare each fingerprint with that hospital out of band, then pin it."
        raise RefusedError("roster.unpinned", problem, remedy=remedy)


def _signed_bytes(data: bytes) -> bytes:
    return labelled("sig/roster", data)
