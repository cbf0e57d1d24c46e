"""Heads of a ledger as signed text: C2SP checkpoints inside C2SP signed notes.

Source: c2sp.org/tlog-checkpoint, c2sp.org/signed-note (signature type 0x01, Ed25519). Rules: the ledger
key signs checkpoints and nothing else without a label; the origin is derived from the key, so a head of
one ledger can never be shown as another's; a note is read only in the form that it is written in here.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from common.errors import VerificationError
from common.identity import SIGNATURE_SIZE_BYTES, fingerprint, verify

ORIGIN_PREFIX: Final = "wardround/ledger/"
MAX_NOTE_CHARACTERS: Final = 1 << 14

_ED25519: Final = b"\x01"
_BODY: Final = re.compile(r"(.+)\n(0|[1-9][0-9]{0,15})\n([A-Za-z0-9+/]{43}=)\n")
_DASH: Final = "\N{EM DASH} "


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The head of a ledger: how many leaves, and the root over them (32 bytes)."""

    origin: str
    size: int
    root: bytes

    def body(self) -> str:
        """The text that is signed: three lines, each with its newline."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode('ascii')}\n"


def origin_of(public: bytes) -> str:
    """The origin line of the ledger that this raw public key signs."""
    return ORIGIN_PREFIX + fingerprint(public)


def key_id(name: str, public: bytes) -> bytes:
    """The four bytes that name an Ed25519 key in a signature line."""
    return hashlib.sha256(name.encode("utf-8") + b"\n" + _ED25519 + public).digest()[:4]


def sign_note(body: str, name: str, public: bytes, sign: Callable[[bytes], bytes]) -> str:
    """A signed note: ``body`` (ending in a newline), an empty line, one signature line."""
    return note_of(body, name, public, sign(body.encode("utf-8")))


def note_of(body: str, name: str, public: bytes, signature: bytes) -> str:
    """The signed note around a signature (64 bytes) that exists already."""
    line = base64.b64encode(key_id(name, public) + signature).decode("ascii")
    return f"{body}\n{_DASH}{name} {line}\n"


def open_note(note: str, name: str, public: bytes) -> str:
    """The body of a note signed by ``name`` with ``public`` (raw); lines of other signers are ignored.

    Guarantee: forged_notes_are_refused - a changed body, name, key or signature does not open.
    Raises: VerificationError.
    """
    body, separator, lines = note.rpartition("\n\n")
    if len(note) > MAX_NOTE_CHARACTERS or not separator or not lines.endswith("\n"):
        raise VerificationError("ledger.note", "the head is not a signed note")
    body += "\n"
    prefix = f"{_DASH}{name} "
    for line in lines[:-1].split("\n"):
        if not line.startswith(prefix):
            continue
        try:
            blob = base64.b64decode(line[len(prefix) :], validate=True)
        except ValueError:
            continue
        if len(blob) == 4 + SIGNATURE_SIZE_BYTES and blob[:4] == key_id(name, public):
            verify(public, blob[4:], body.encode("utf-8"), "signed note")
            return body
    raise VerificationError("ledger.note-signer", f"the note carries no signature of {name!r}")


def read_checkpoint(body: str) -> Checkpoint:
    """Read Checkpoint.body strictly. Raises VerificationError."""
    match = _BODY.fullmatch(body)
    if match is None:
        raise VerificationError("ledger.checkpoint", "the head is not a checkpoint")
    checkpoint = Checkpoint(match[1], int(match[2]), base64.b64decode(match[3]))
    # The decoder ignores spare bits: only a round trip is exact.
    if checkpoint.body() != body:
        raise VerificationError("ledger.checkpoint", "the head is not a checkpoint in its only form")
    return checkpoint
