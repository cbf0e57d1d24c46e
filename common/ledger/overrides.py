"""What two officers of a hospital sign against the rules of its register, and what is in force after it.

Source: PRIVACY "Registers, budget, filter" (rollback, raising a cap). Rules: two different officers whom
the ledger's policy names sign the same bytes; these hold the ledger's size and root, so they fit one ledger
at one time; an override stands once, and none that was signed before another one or before a restore; a cap
is raised for the whole history and never above 20.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Final, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.encoding import canonical_json, labelled, parse_canonical_json
from common.errors import RefusedError, VerificationError
from common.identity import key_bytes, key_text, public_key, sign, verify
from common.ledger import entries as leaves
from common.ledger.entries import Entry, Opened, Override, PolicyChange, Restored

SIGNERS: Final = 2
LARGEST_EPSILON: Final = 20
_SAME: Final = {"action", "register_id", "epsilon_t", "epsilon_w", "size", "reason"}


@dataclass(frozen=True, slots=True)
class Standing:
    """The register after some entries: the highest caps that a policy may set, as decimal text, and whether
    it is closed by a restore or was reopened after one."""

    register_id: str
    epsilon_t: str
    epsilon_w: str | None
    delta: str
    closed: bool
    reopened: bool


class Proposal(BaseModel):
    """What officers sign, and who has. Caps are those in force after it, also for ``reopen``.

    ``size`` and ``root`` (hex) are the ledger's when it was proposed; ``signatures`` by officer key, hex.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    action: Literal["raise_caps", "reopen"]
    register_id: leaves.Hex32
    epsilon_t: leaves.DecimalText
    epsilon_w: leaves.DecimalText
    size: Annotated[int, Field(ge=1, le=2**53 - 1)]
    root: leaves.Hex64
    reason: leaves.Words
    signatures: dict[leaves.KeyText, leaves.Hex128] = {}

    @property
    def signed_bytes(self) -> bytes:
        """What every officer signs: all but the signatures."""
        return labelled("override", canonical_json(self.model_dump(by_alias=True, exclude={"signatures"})))

    def signed(self, key: Ed25519PrivateKey) -> Self:
        """The same with one more officer's signature."""
        named = key_text(public_key(key))
        signature = sign(key, self.signed_bytes).hex()
        return self.model_copy(update={"signatures": {**self.signatures, named: signature}})

    def to_bytes(self) -> bytes:
        """The file: canonical JSON."""
        return canonical_json(self.model_dump(by_alias=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read to_bytes strictly.

        Guarantee: proposals_are_read_as_written - from_bytes gives the same back, and reads nothing else.
        Raises: VerificationError.
        """
        try:
            fields = parse_canonical_json(data, "the override")
            found = cls.model_validate(fields, by_alias=True, by_name=False)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the override"
            raise VerificationError("override.document", f"{where}: {first['msg']}") from error
        if found.to_bytes() != data:
            raise VerificationError("override.document", "the override lacks a field")
        return found

    def entry(self, actor: str) -> Override:
        """The leaf. It states no root, because the ledger has that itself."""
        fields = self.model_dump(include=_SAME | {"signatures"})
        return Override(actor=actor, **fields)


def standing(entries: Iterable[Entry]) -> Standing:
    """What is in force after ``entries``. Raises RefusedError where no register was opened."""
    first: Opened | None = None
    caps: Opened | Override | None = None
    closed = reopened = False
    for entry in entries:
        if isinstance(entry, Opened) and first is None:
            first = caps = entry
        elif isinstance(entry, Restored):
            closed = True
        elif isinstance(entry, Override):
            caps = entry
            if entry.action == "reopen":
                closed, reopened = False, True
    if first is None or caps is None:
        raise RefusedError("override.register", "this ledger has opened no register")
    return Standing(first.register_id, caps.epsilon_t, caps.epsilon_w, first.delta, closed, reopened)


def check_override(entry: Override, before: Sequence[Entry], root: bytes) -> None:
    """Check an override that follows ``before``; ``root`` is of the ledger's first ``entry.size`` leaves.

    Guarantee: two_officers_sign_an_override - different keys, both named by the policy in the ledger.
    Guarantee: overrides_cannot_be_replayed - not after itself, another override or a restore, nor elsewhere.
    Raises: RefusedError; VerificationError for a signature that does not verify.
    """
    now = standing(before)
    if entry.register_id != now.register_id:
        raise _refused("it is for another register")
    late = (said.seq for said in before if isinstance(said, Override | Restored))
    if not max(late, default=0) < entry.size <= len(before):
        raise _refused("it was not signed for this ledger as it stands, or was applied already")
    limits = [(entry.epsilon_t, now.epsilon_t), (entry.epsilon_w, now.epsilon_w or "0")]
    higher = [Decimal(new) - Decimal(old) for new, old in limits]
    if entry.action == "reopen" and not (now.closed and higher == [0, 0]):
        raise _refused("only a register that a restore has closed is reopened, under its own caps")
    if entry.action == "raise_caps" and (min(higher) < 0 or max(higher) == 0):
        raise _refused("it raises no cap, or lowers one, which needs no override")
    if max(Decimal(new) for new, _ in limits) > LARGEST_EPSILON:
        raise _refused(f"no cap may be above {LARGEST_EPSILON}")
    policy = next((said for said in reversed(before) if isinstance(said, PolicyChange)), None)
    officers = policy.after.officers if policy else ()
    if len(entry.signatures) < SIGNERS or not set(entry.signatures) <= set(officers):
        raise _refused("it needs the signatures of two different officers whom the policy names")
    fields = entry.model_dump(include=_SAME)
    proposal = Proposal(root=root.hex(), **fields)
    for officer, signature in entry.signatures.items():
        verify(key_bytes(officer), bytes.fromhex(signature), proposal.signed_bytes, "override")


def _refused(problem: str) -> RefusedError:
    remedy = "Propose it anew with 'wardround site override propose', and have two officers sign that."
    return RefusedError("override.refused", f"the override cannot stand: {problem}", remedy=remedy)
