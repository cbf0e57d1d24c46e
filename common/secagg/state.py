"""All that one hospital must remember of one run, as one immutable value with one strict byte form.

Source: PROTOCOL.md I5, I10, I11, I13. Rules: a transition is a new value, made durable before anything
that depends on it leaves; q is never part of it; s is part of it only from an upload to its opening;
nothing here is printed or pickled.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, NamedTuple, NoReturn, TypeAlias

from common.encoding import annotations_of, enc, labelled, split_labelled, u8, u16
from common.errors import VerificationError
from common.secagg import records
from common.secagg.pairing import MLKEM_SEED_BYTES, SetupKeys
from common.secagg.records import DIGEST_BYTES, KEY_BYTES, Confirm, KeyAnnounce, Open, PairSeed, Upload

_LABEL: Final = "runstate/1"
_PAIR_BYTES: Final = 2 + KEY_BYTES


class _Part(NamedTuple):
    """How a field becomes one part of the bytes, and how it is read back."""

    write: Callable[[Any], bytes]
    read: Callable[[bytes], Any]


def _number(size_bytes: int) -> _Part:
    return _Part(lambda n: n.to_bytes(size_bytes, "little"), lambda data: int.from_bytes(data, "little"))


def _record(record_type: type[records.Record]) -> _Part:
    return _Part(
        lambda record: b"" if record is None else records.encode(record),
        lambda data: records.decode(record_type, data) if data else None,
    )


def _read_ids(data: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(data[at : at + 2], "little") for at in range(0, len(data), 2))


def _read_pairs(data: bytes) -> tuple[tuple[int, bytes], ...]:
    if len(data) % _PAIR_BYTES:
        raise _malformed("a key has another length")
    entries = (data[at : at + _PAIR_BYTES] for at in range(0, len(data), _PAIR_BYTES))
    return tuple((int.from_bytes(entry[:2], "little"), entry[2:]) for entry in entries)


def _read_setup(data: bytes) -> SetupKeys | None:
    if len(data) not in (0, MLKEM_SEED_BYTES + KEY_BYTES):
        raise _malformed("a key has another length")
    return SetupKeys(data[:MLKEM_SEED_BYTES], data[MLKEM_SEED_BYTES:]) if data else None


def _read_seeds(data: bytes) -> tuple[PairSeed, ...]:
    # The same parts behind a label, so that one strict reader serves both.
    parts = split_labelled("", labelled("") + data, "list of sealed seeds")
    return tuple(records.decode(PairSeed, seed) for seed in parts)


_IDS: Final = _Part(lambda ids: b"".join(u16(member) for member in ids), _read_ids)
_PAIRS: Final = _Part(lambda keys: b"".join(u16(peer) + key for peer, key in keys), _read_pairs)
_SETUP: Final = _Part(lambda own: own.mlkem_seed + own.x25519_key if own else b"", _read_setup)
_SEEDS: Final = _Part(lambda seeds: enc(*(records.encode(seed) for seed in seeds)), _read_seeds)

_Bytes: TypeAlias = Annotated[bytes, _Part(bytes, bytes)]
_U16: TypeAlias = Annotated[int, _number(2)]
_U32: TypeAlias = Annotated[int, _number(4)]
_Ids: TypeAlias = Annotated[tuple[int, ...], _IDS]


@dataclass(frozen=True, slots=True, repr=False)
class RunState:
    """One hospital's state of one run. Empty bytes and None mean: not yet, or erased.

    ``setup`` private setup keys; ``dirh`` and ``listed`` the one Directory; ``sent`` own sealed seeds;
    ``keys`` (peer, K of ``index``), ascending; ``accepted`` peers whose tag verified; ``round`` the last
    accepted, 0 before the first; ``attempt`` the last uploaded, with its ``cohort``, ``header`` and
    ``payload``; ``s`` the round seed, from the upload to the opening; ``opened`` the one opening.
    """

    man: _Bytes
    me: _U16
    closed: Annotated[bool, _Part(u8, lambda data: data != b"\x00")] = False
    setup: Annotated[SetupKeys | None, _SETUP] = None
    announce: Annotated[KeyAnnounce | None, _record(KeyAnnounce)] = None
    dirh: _Bytes = b""
    listed: _Ids = ()
    sent: Annotated[tuple[PairSeed, ...], _SEEDS] = ()
    confirm: Annotated[Confirm | None, _record(Confirm)] = None
    index: _U32 = 0
    keys: Annotated[tuple[tuple[int, bytes], ...], _PAIRS] = ()
    accepted: _Ids = ()
    round: _U32 = 0
    model_digest: _Bytes = b""
    attempt: Annotated[int, _number(1)] = 0
    cohort: _Ids = ()
    s: _Bytes = b""
    header: Annotated[Upload | None, _record(Upload)] = None
    payload: _Bytes = b""
    opened: Annotated[Open | None, _record(Open)] = None

    def __repr__(self) -> str:
        return f"RunState(me={self.me}, round={self.round}, attempt={self.attempt}, closed={self.closed})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the state of a run is not pickled")

    def ended(self) -> "RunState":
        """What is kept of this state when the run is closed: no secret."""
        return RunState(self.man, self.me, closed=True, round=self.round, model_digest=self.model_digest)

    def to_bytes(self) -> bytes:
        """The state as bytes: secret, for the run file only."""
        return labelled(_LABEL, *(part.write(getattr(self, name)) for name, part in _PARTS))

    @classmethod
    def from_bytes(cls, data: bytes) -> "RunState":
        """Read a state strictly. Raises VerificationError.

        Guarantee: run_state_is_read_strictly - only bytes that to_bytes makes, of a state that the
        protocol can be in.
        """
        found = split_labelled(_LABEL, data, "run state")
        if len(found) != len(_PARTS):
            raise _malformed(f"it must have {len(_PARTS)} parts")
        state = cls(*(part.read(value) for (_, part), value in zip(_PARTS, found, strict=True)))
        for holds, problem in state._rules():
            if not holds:
                raise _malformed(problem)
        try:
            same = state.to_bytes() == data
        except OverflowError:
            same = False
        if not same:
            raise _malformed("it is not in canonical form")
        return state

    def _rules(self) -> Iterator[tuple[bool, str]]:
        peers = tuple(peer for peer, _ in self.keys)
        uploaded = self.header is not None
        yield len(self.man) == DIGEST_BYTES, "the manifest digest has another length"
        yield len(self.dirh) in (0, DIGEST_BYTES), "the directory digest has another length"
        yield bool(self.dirh) == bool(self.listed), "a directory lists its members"
        yield _ascends(peers) and set(peers) <= set(self.listed) - {self.me}, "a pair is not in the directory"
        yield _ascends(self.accepted) and set(self.accepted) <= set(peers), "an accepted pair has no key"
        yield len(self.model_digest) == (DIGEST_BYTES if self.round else 0), "a round has one model digest"
        whole = uploaded == bool(self.payload) == bool(self.cohort) == bool(self.attempt)
        yield whole, "an upload is incomplete"
        yield not uploaded or self.round > 0, "an upload belongs to a round"
        seed_bytes = KEY_BYTES if uploaded and not self.opened else 0
        yield len(self.s) == seed_bytes, "a round seed is out of place"
        yield self.opened is None or uploaded, "an opening belongs to an upload"
        yield not (self.opened and self.header) or self.opened.ctx == self.header.ctx, "contexts differ"
        due = self.round + (self.opened is not None)
        yield self.index == due or self.closed, "the ratchet is out of step"
        yield not self.closed or self == self.ended(), "a closed run holds no secrets"


_PARTS: Final[tuple[tuple[str, _Part], ...]] = annotations_of(RunState)


def _malformed(problem: str) -> VerificationError:
    remedy = "Close the run at this hospital; its charges stay."
    return VerificationError("secagg.state", f"the run state is damaged: {problem}", remedy=remedy)


def _ascends(ids: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(ids))
