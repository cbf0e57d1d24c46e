"""The messages of the secure sum as frozen records, with one strict byte form each.

Source: PROTOCOL.md, tables S1-S4, L1-L2, R0-R6. Rules: a record declares its columns in table order, each as
the annotation of its field; a list is a u16 count followed by the columns of every entry; decode accepts
exactly the bytes that encode makes; a signature covers ``sig/<name>``, the manifest digest and every column
but ``sig``. The state of a round travels beside RoundStart, which carries its digest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Final, TypeAlias, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.encoding import annotations_of, digest, labelled, split_labelled, u8, u16, u32
from common.errors import VerificationError

DIGEST_BYTES: Final = 32
KEY_BYTES: Final = 32
MLKEM_KEY_BYTES: Final = 1184
SEALED_SEED_BYTES: Final = 1168
SIGNATURE_BYTES: Final = 64
UNSIGNED: Final = bytes(SIGNATURE_BYTES)

R = TypeVar("R", bound="Record")


@dataclass(frozen=True, slots=True)
class Integer:
    """Column of an unsigned integer of ``size_bytes`` bytes, little-endian."""

    size_bytes: int

    def write(self, value: Any, name: str) -> Iterator[bytes]:
        """The one part of ``value``. Raises VerificationError naming the column."""
        if type(value) is not int or not 0 <= value < 1 << 8 * self.size_bytes:
            raise VerificationError("secagg.record.value", f"{name} must be a u{8 * self.size_bytes}")
        yield value.to_bytes(self.size_bytes, "little")

    def read(self, parts: Iterator[bytes], name: str) -> int:
        """The value of the next part. Raises VerificationError naming the column."""
        return int.from_bytes(_exact(parts, self.size_bytes, name), "little")


@dataclass(frozen=True, slots=True)
class Fixed:
    """Column of exactly ``size_bytes`` bytes."""

    size_bytes: int

    def write(self, value: Any, name: str) -> Iterator[bytes]:
        """The one part of ``value``. Raises VerificationError naming the column."""
        if type(value) is not bytes or len(value) != self.size_bytes:
            raise VerificationError("secagg.record.value", f"{name} must have {self.size_bytes} bytes")
        yield value

    def read(self, parts: Iterator[bytes], name: str) -> bytes:
        """The value of the next part. Raises VerificationError naming the column."""
        return _exact(parts, self.size_bytes, name)


@dataclass(frozen=True, slots=True)
class ListOf:
    """Column of a u16 count and that many entries: a value, a tuple of values or a record each."""

    entry: "tuple[Integer | Fixed, ...] | type[Record]"

    def write(self, value: Any, name: str) -> Iterator[bytes]:
        """The count, then the parts of each entry. Raises VerificationError naming the column."""
        problem = f"{name} must be a tuple of fewer than 65536 entries"
        if type(value) is not tuple or len(value) >= 1 << 16:
            raise VerificationError("secagg.record.value", problem)
        yield u16(len(value))
        for entry in value:
            if isinstance(self.entry, tuple):
                values = (entry,) if len(self.entry) == 1 else entry
                if type(values) is not tuple or len(values) != len(self.entry):
                    raise VerificationError("secagg.record.value", f"{name} holds an entry of another shape")
                for column, item in zip(self.entry, values, strict=True):
                    yield from column.write(item, name)
            elif type(entry) is self.entry:
                yield from _parts(entry)
            else:
                raise VerificationError("secagg.record.value", f"{name} holds an entry of another type")

    def read(self, parts: Iterator[bytes], name: str) -> tuple[Any, ...]:
        """The entries. Raises VerificationError naming the column."""
        count = int.from_bytes(_exact(parts, 2, name), "little")
        if not isinstance(self.entry, tuple):
            return tuple(_read(self.entry, parts) for _ in range(count))
        if len(self.entry) == 1:
            return tuple(self.entry[0].read(parts, name) for _ in range(count))
        return tuple(tuple(column.read(parts, name) for column in self.entry) for _ in range(count))


U16: Final = Integer(2)
U64: Final = Integer(8)
DIGEST: Final = Fixed(DIGEST_BYTES)

Id: TypeAlias = Annotated[int, U16]
Round: TypeAlias = Annotated[int, Integer(4)]
Size: TypeAlias = Annotated[int, U64]
Digest: TypeAlias = Annotated[bytes, DIGEST]
Key: TypeAlias = Annotated[bytes, Fixed(KEY_BYTES)]
Sealed: TypeAlias = Annotated[bytes, Fixed(SEALED_SEED_BYTES)]
Signature: TypeAlias = Annotated[bytes, Fixed(SIGNATURE_BYTES)]
DigestById: TypeAlias = Annotated[tuple[tuple[int, bytes], ...], ListOf((U16, DIGEST))]


class Record:
    """Base of all records: values are checked against the columns when one is made.

    Guarantee: records_are_strict - a value of another type, width or length never becomes a record.
    Raises: VerificationError naming the record and the column.
    """

    __slots__ = ()
    COLUMNS: ClassVar[tuple[tuple[str, Integer | Fixed | ListOf], ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.COLUMNS = annotations_of(cls)

    def __post_init__(self) -> None:
        for _ in _parts(self):
            pass


@dataclass(frozen=True, slots=True)
class KeyAnnounce(Record):
    """S1: the setup keys of one hospital for one manifest, made once ever."""

    id: Id
    man: Digest
    mlkem: Annotated[bytes, Fixed(MLKEM_KEY_BYTES)] = field(repr=False)
    x25519: Key = field(repr=False)
    sig: Signature = field(default=UNSIGNED, repr=False)


@dataclass(frozen=True, slots=True)
class Directory(Record):
    """S2: every announcement that the hub holds, ascending id."""

    entries: Annotated[tuple[KeyAnnounce, ...], ListOf(KeyAnnounce)] = field(repr=False)


@dataclass(frozen=True, slots=True)
class PairSeed(Record):
    """S3: a seed sealed by one of the pair (i < j) for the other."""

    man: Digest
    dirh: Digest
    i: Id
    j: Id
    ct: Sealed = field(repr=False)
    sig: Signature = field(default=UNSIGNED, repr=False)


@dataclass(frozen=True, slots=True)
class Confirm(Record):
    """S4 to the hub: proof for every peer that the pair key is known; ``tags`` are (peer, tag), ascending."""

    id: Id
    dirh: Digest
    tags: DigestById = field(repr=False)
    sig: Signature = field(default=UNSIGNED, repr=False)


@dataclass(frozen=True, slots=True)
class Tag(Record):
    """S4 to a peer: the one tag that hospital ``id`` made for it, which verifies under their K_0 alone."""

    id: Id
    tag: Digest = field(repr=False)


@dataclass(frozen=True, slots=True)
class HeadPlease(Record):
    """L0: asks for L1 of a round; ``since`` are the sizes at which others saw this ledger."""

    round: Round
    since: Annotated[tuple[int, ...], ListOf((U64,))]


@dataclass(frozen=True, slots=True)
class Extension(Record):
    """Inside L1: the RFC 6962 consistency proof from the tree of ``since`` leaves."""

    since: Size
    path: Annotated[tuple[bytes, ...], ListOf((DIGEST,))]


@dataclass(frozen=True, slots=True)
class Head(Record):
    """L1: size and root of the ledger of ``id`` (0: the hub), signed by its ledger key."""

    id: Id
    man: Digest
    round: Round
    nonce: Digest
    size: Size
    root: Digest
    extensions: Annotated[tuple[Extension, ...], ListOf(Extension)] = field(repr=False)
    sig: Signature = field(default=UNSIGNED, repr=False)


@dataclass(frozen=True, slots=True)
class Cosign(Record):
    """L2: ``id`` has seen this head (head_digest), and that it only adds to those it saw before."""

    id: Id
    head: Digest
    sig: Signature = field(default=UNSIGNED, repr=False)


@dataclass(frozen=True, slots=True)
class Cosigned(Record):
    """The cosignatures of one hospital, and (id, size) of heads it refused, as it remembers them."""

    cosigns: Annotated[tuple[Cosign, ...], ListOf(Cosign)] = field(repr=False)
    remembered: Annotated[tuple[tuple[int, int], ...], ListOf((U16, U64))]


@dataclass(frozen=True, slots=True)
class RoundStart(Record):
    """R0: a round begins. ``deadline`` in seconds since 1970 UTC; ``state`` is state_digest(bytes)."""

    man: Digest
    dirh: Digest
    round: Round
    state: Digest
    model_digest: Digest
    deadline: Size
    sig: Signature = field(default=UNSIGNED, repr=False)


@dataclass(frozen=True, slots=True)
class Ready(Record):
    """R1: a hospital has its vector; ``nu`` commits to it."""

    man: Digest
    id: Id
    round: Round
    model_digest: Digest
    nu: Digest
    sig: Signature = field(default=UNSIGNED, repr=False)


@dataclass(frozen=True, slots=True)
class Cohort(Record):
    """R2: whose vectors are summed in this attempt; ``members`` are (id, nu), ascending."""

    round: Round
    attempt: Annotated[int, Integer(1)]
    members: DigestById

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the cohort, in the order given."""
        return tuple(member for member, _ in self.members)


@dataclass(frozen=True, slots=True)
class Upload(Record):
    """R3: the header of a masked payload."""

    id: Id
    ctx: Digest
    commit: Digest
    payload_digest: Digest
    chunk_digests: Annotated[tuple[bytes, ...], ListOf((DIGEST,))] = field(repr=False)
    sig: Signature = field(default=UNSIGNED, repr=False)


@dataclass(frozen=True, slots=True)
class OpenPlease(Record):
    """R4: all of the cohort have uploaded; liveness only."""

    ctx: Digest


@dataclass(frozen=True, slots=True)
class Open(Record):
    """R5: the self-mask seed ``b`` of one context. Never printed."""

    id: Id
    ctx: Digest
    b: Key = field(repr=False)
    sig: Signature = field(default=UNSIGNED, repr=False)


@dataclass(frozen=True, slots=True)
class Result(Record):
    """R6: what the round became, signed by the hub."""

    ctx: Digest
    sum_digest: Digest
    model_digest: Digest
    sig: Signature = field(default=UNSIGNED, repr=False)


def _exact(parts: Iterator[bytes], size_bytes: int, name: str) -> bytes:
    part = next(parts, None)
    if part is None or len(part) != size_bytes:
        raise VerificationError("secagg.record.length", f"{name} must have {size_bytes} bytes")
    return part


def _parts(record: Record, *, signature: bool = True) -> Iterator[bytes]:
    for name, column in record.COLUMNS:
        if signature or name != "sig":
            yield from column.write(getattr(record, name), f"{type(record).__name__}.{name}")


def _read(record_type: type[R], parts: Iterator[bytes]) -> R:
    owner = record_type.__name__
    return record_type(*(column.read(parts, f"{owner}.{name}") for name, column in record_type.COLUMNS))


def encode(record: Record) -> bytes:
    """The bytes of a record.

    Guarantee: encoding_is_canonical - decode gives the record back, and reads no other bytes.
    """
    return labelled("record/" + type(record).__name__, *_parts(record))


def decode(record_type: type[R], data: bytes) -> R:
    """Read one record of ``record_type`` strictly. Raises: VerificationError."""
    name = record_type.__name__
    parts = iter(split_labelled("record/" + name, data, name))
    record = _read(record_type, parts)
    if next(parts, None) is not None:
        raise VerificationError("secagg.record.length", f"the {name} holds more than its columns")
    return record


def signed_bytes(record: Record, man: bytes) -> bytes:
    """What the signature of ``record`` covers: its name, the manifest digest (32) and its columns."""
    return labelled("sig/" + type(record).__name__, man, *_parts(record, signature=False))


def signed(record: R, man: bytes, sign: Callable[[bytes], bytes]) -> R:
    """The record with its signature. ``sign`` gives Ed25519 signatures, 64 bytes."""
    return replace(record, sig=sign(signed_bytes(record, man)))  # type: ignore[type-var]


def check_signature(record: Record, man: bytes, key: bytes, signer: str) -> None:
    """Verify the Ed25519 signature of a record under the raw public ``key`` (32 bytes).

    Raises: VerificationError naming the record and the signer.
    """
    signature: bytes = getattr(record, "sig", b"")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed_bytes(record, man))
    except (InvalidSignature, ValueError):
        problem = f"the {type(record).__name__} is not signed by {signer}"
        remedy = "Compare the fingerprints of the roster out of band."
        raise VerificationError("secagg.signature", problem, remedy=remedy) from None


def directory_digest(man: bytes, entries: Sequence[KeyAnnounce]) -> bytes:
    """dirh: the digest of ids and keys in the order given (ascending ids), without signatures."""
    keys = (part for entry in entries for part in (u16(entry.id), entry.mlkem, entry.x25519))
    return digest("dir", man, u16(len(entries)), *keys)


def context(man: bytes, dirh: bytes, model_digest: bytes, cohort: Cohort) -> bytes:
    """ctx: everything that makes one attempt of one round what it is, 32 bytes."""
    attempt = (u32(cohort.round), u8(cohort.attempt))
    members = (part for member, nu in cohort.members for part in (u16(member), nu))
    return digest("ctx", man, dirh, *attempt, model_digest, u16(len(cohort.members)), *members)


def head_digest(head: Head) -> bytes:
    """H(L1): what a cosignature is about, 32 bytes."""
    return digest("head", encode(head))


def payload_digest(chunk_digests: Sequence[bytes]) -> bytes:
    """Digest of a whole payload from the digests of its chunks, in order."""
    return digest("payload", *chunk_digests)


def state_digest(state: bytes) -> bytes:
    """Digest of the state bytes that travel beside RoundStart."""
    return digest("state", state)
