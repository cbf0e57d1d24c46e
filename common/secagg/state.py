"""All that one hospital must remember of one run, as one immutable value with one strict byte form.

Source: PROTOCOL.md I5, I10, I11, I13. Rules: a transition is a new value, made durable before anything
that depends on it leaves; q is never part of it; s is part of it only from an upload to its opening;
nothing here is printed or pickled.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, TypeVar

from common.encoding import enc, labelled, split_labelled, u8, u16, u32
from common.errors import VerificationError
from common.secagg.pairing import MLKEM_SEED_BYTES, SetupKeys
from common.secagg.records import (
    DIGEST_BYTES,
    KEY_BYTES,
    Confirm,
    KeyAnnounce,
    Open,
    PairSeed,
    Record,
    Upload,
    decode,
    encode,
)

_LABEL: Final = "runstate/1"
_PARTS: Final = 20

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True, repr=False)
class RunState:
    """One hospital's state of one run. Empty bytes and None mean: not yet, or erased.

    ``setup`` private setup keys; ``dirh`` and ``listed`` the one Directory; ``sent`` own sealed seeds;
    ``keys`` (peer, K of ``index``), ascending; ``accepted`` peers whose tag verified; ``round`` the last
    accepted, 0 before the first; ``attempt`` the last uploaded, with its ``cohort``, ``header`` and
    ``payload``; ``s`` the round seed, from the upload to the opening; ``opened`` the one opening.
    """

    man: bytes
    me: int
    closed: bool = False
    setup: SetupKeys | None = None
    announce: KeyAnnounce | None = None
    dirh: bytes = b""
    listed: tuple[int, ...] = ()
    sent: tuple[PairSeed, ...] = ()
    confirm: Confirm | None = None
    index: int = 0
    keys: tuple[tuple[int, bytes], ...] = ()
    accepted: tuple[int, ...] = ()
    round: int = 0
    model_digest: bytes = b""
    attempt: int = 0
    cohort: tuple[int, ...] = ()
    s: bytes = b""
    header: Upload | None = None
    payload: bytes = b""
    opened: Open | None = None

    def __repr__(self) -> str:
        return f"RunState(me={self.me}, round={self.round}, attempt={self.attempt}, closed={self.closed})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the state of a run is not pickled")

    def to_bytes(self) -> bytes:
        """The state as bytes: secret, for the run file only."""
        return labelled(
            _LABEL,
            self.man,
            u16(self.me),
            u8(self.closed),
            self.setup.mlkem_seed + self.setup.x25519_key if self.setup else b"",
            _optional(self.announce),
            self.dirh,
            _ids(self.listed),
            enc(*(encode(seed) for seed in self.sent)),
            _optional(self.confirm),
            u32(self.index),
            b"".join(u16(peer) + key for peer, key in self.keys),
            _ids(self.accepted),
            u32(self.round),
            self.model_digest,
            u8(self.attempt),
            _ids(self.cohort),
            self.s,
            _optional(self.header),
            self.payload,
            _optional(self.opened),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "RunState":
        """Read a state strictly.

        Guarantee: run_state_is_read_strictly - only bytes that to_bytes makes, of a state that the
        protocol can be in.
        Raises: VerificationError.
        """
        parts = split_labelled(_LABEL, data, "run state")
        if len(parts) != _PARTS:
            raise _malformed(f"it must have {_PARTS} parts")
        man, me, closed, setup, announce, dirh, listed, sent, confirm, index, keys, accepted = parts[:12]
        number, model_digest, attempt, cohort, s, header, payload, opened = parts[12:]
        if len(setup) not in (0, MLKEM_SEED_BYTES + KEY_BYTES) or len(keys) % (2 + KEY_BYTES):
            raise _malformed("a key has another length")
        entries = [keys[at : at + 2 + KEY_BYTES] for at in range(0, len(keys), 2 + KEY_BYTES)]
        state = cls(
            man=man,
            me=int.from_bytes(me, "little"),
            closed=closed != b"\x00",
            setup=SetupKeys(setup[:MLKEM_SEED_BYTES], setup[MLKEM_SEED_BYTES:]) if setup else None,
            announce=_read_optional(KeyAnnounce, announce),
            dirh=dirh,
            listed=_read_ids(listed),
            sent=tuple(decode(PairSeed, seed) for seed in _split(sent)),
            confirm=_read_optional(Confirm, confirm),
            index=int.from_bytes(index, "little"),
            keys=tuple((int.from_bytes(entry[:2], "little"), entry[2:]) for entry in entries),
            accepted=_read_ids(accepted),
            round=int.from_bytes(number, "little"),
            model_digest=model_digest,
            attempt=int.from_bytes(attempt, "little"),
            cohort=_read_ids(cohort),
            s=s,
            header=_read_optional(Upload, header),
            payload=payload,
            opened=_read_optional(Open, opened),
        )
        state._check()
        try:
            same = state.to_bytes() == data
        except OverflowError:
            same = False
        if not same:
            raise _malformed("it is not in canonical form")
        return state

    def _check(self) -> None:
        peers = tuple(peer for peer, _ in self.keys)
        uploaded = self.header is not None
        rules = (
            (len(self.man) == DIGEST_BYTES, "the manifest digest has another length"),
            (len(self.dirh) in (0, DIGEST_BYTES), "the directory digest has another length"),
            (bool(self.dirh) == bool(self.listed), "a directory lists its members"),
            (
                _ascends(peers) and set(peers) <= set(self.listed) - {self.me},
                "a pair is not in the directory",
            ),
            (_ascends(self.accepted) and set(self.accepted) <= set(peers), "an accepted pair has no key"),
            (len(self.model_digest) == (DIGEST_BYTES if self.round else 0), "a round has one model digest"),
            (
                uploaded == bool(self.payload) == bool(self.cohort) == bool(self.attempt),
                "an upload is incomplete",
            ),
            (not uploaded or self.round > 0, "an upload belongs to a round"),
            (
                len(self.s) == (KEY_BYTES if uploaded and not self.opened else 0),
                "a round seed is out of place",
            ),
            (self.opened is None or uploaded, "an opening belongs to an upload"),
            (
                self.opened is None or self.header is None or self.opened.ctx == self.header.ctx,
                "contexts differ",
            ),
            (
                self.index == self.round + (self.opened is not None) or self.closed,
                "the ratchet is out of step",
            ),
        )
        for holds, problem in rules:
            if not holds:
                raise _malformed(problem)
        empty = RunState(self.man, self.me, closed=True, round=self.round, model_digest=self.model_digest)
        if self.closed and self != empty:
            raise _malformed("a closed run holds no secrets")


def _malformed(problem: str) -> VerificationError:
    return VerificationError(
        "secagg.state",
        f"the run state is damaged: {problem}",
        remedy="Close the run at this hospital; its charges stay.",
    )


def _ascends(ids: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(ids))


def _optional(record: Record | None) -> bytes:
    return b"" if record is None else encode(record)


def _read_optional(record_type: type[R], data: bytes) -> R | None:
    return decode(record_type, data) if data else None


def _ids(ids: tuple[int, ...]) -> bytes:
    return b"".join(u16(member) for member in ids)


def _read_ids(data: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(data[at : at + 2], "little") for at in range(0, len(data), 2))


def _split(data: bytes) -> list[bytes]:
    # The same parts behind a label, so that one strict reader serves both.
    return split_labelled("", labelled("") + data, "list of sealed seeds")
