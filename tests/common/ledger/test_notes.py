"""Checkpoints and signed notes: a published note, round trips, and everything that must not open."""

import base64

import pytest

from common.errors import VerificationError
from common.identity import new_signing_key, public_key
from common.ledger import notes
from common.ledger.notes import Checkpoint

# The example of golang.org/x/mod/sumdb/note.
GO_NAME = "PeterNeumann"
GO_KEY = base64.b64decode("ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")[1:]
GO_BODY = (
    "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
)
GO_SIGNATURE = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
GO_NOTE = f"{GO_BODY}\n— PeterNeumann {GO_SIGNATURE}\n"

KEY = new_signing_key()
PUBLIC = public_key(KEY)
ORIGIN = notes.origin_of(PUBLIC)
POINT = Checkpoint(ORIGIN, 5, bytes(range(32)))
NOTE = notes.sign_note(POINT.body(), ORIGIN, PUBLIC, KEY.sign)


def test_published_note() -> None:
    assert notes.key_id(GO_NAME, GO_KEY).hex() == "c74f20a3"
    assert notes.open_note(GO_NOTE, GO_NAME, GO_KEY) == GO_BODY


def test_round_trip() -> None:
    assert NOTE.startswith(f"{ORIGIN}\n5\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n\n— {ORIGIN} ")
    assert notes.read_checkpoint(notes.open_note(NOTE, ORIGIN, PUBLIC)) == POINT


def test_lines_of_other_signers_are_ignored() -> None:
    body, line = NOTE.split("\n\n")
    other = new_signing_key()
    foreign = notes.sign_note(body + "\n", "witness.example", public_key(other), other.sign).split("\n\n")[1]
    junk = f"— {ORIGIN} !!!\n— {ORIGIN} {base64.b64encode(bytes(68)).decode()}\n"
    assert notes.open_note(f"{body}\n\n{foreign}{junk}{line}", ORIGIN, PUBLIC) == POINT.body()


def test_forged_notes_are_refused() -> None:
    other = new_signing_key()
    body, line = NOTE.split("\n\n")
    wrong = [
        NOTE.replace("\n5\n", "\n6\n"),
        NOTE.replace(f"{ORIGIN}\n", f"{ORIGIN}x\n", 1),
        NOTE[:-1],
        body + "\n",
        body + "\n\n",
        "",
        "\n\n",
        f"{body}\n{line}",
        notes.sign_note(POINT.body(), ORIGIN, public_key(other), other.sign),
        notes.sign_note(POINT.body(), ORIGIN, PUBLIC, other.sign),
        notes.sign_note(POINT.body(), "another name", PUBLIC, KEY.sign),
        notes.note_of(POINT.body(), ORIGIN, PUBLIC, bytes(63)),
        NOTE + "x" * notes.MAX_NOTE_CHARACTERS,
    ]
    for note in wrong:
        with pytest.raises(VerificationError):
            notes.open_note(note, ORIGIN, PUBLIC)
    with pytest.raises(VerificationError):
        notes.open_note(NOTE, ORIGIN, public_key(other))


@pytest.mark.parametrize(
    "body",
    [
        "",
        "o\n5\n",
        f"o\n05\n{'A' * 43}=\n",
        f"o\n-1\n{'A' * 43}=\n",
        f"o\n{10**17}\n{'A' * 43}=\n",
        f"\n5\n{'A' * 43}=\n",
        f"o\n5\n{'A' * 43}\n",
        f"o\n5\n{'A' * 42}B=\n",
        "o\n5\nAAAA\n",
        f"o\n5\n{'A' * 43}=",
        f"o\n5\n{'A' * 43}=\nextension\n",
        f"o\n5\n{'é' * 44}\n",
    ],
)
def test_only_checkpoints_are_read(body: str) -> None:
    with pytest.raises(VerificationError):
        notes.read_checkpoint(body)
