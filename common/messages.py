"""Requests and replies between hub and site: a closed table of kinds, each with its record types.

Source: PROTOCOL S1-S4, L1-L2, R0-R6; DESIGN "One idea". Rules: everything that leaves a hospital on its own
is one of the replies below; a site that cannot or will not answer says ``unavailable`` and nothing else,
whatever the cause; an unknown kind, outcome or record is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from common.encoding import DIGEST_SIZE_BYTES, labelled, split_labelled
from common.errors import VerificationError
from common.secagg import records
from common.secagg.records import Record

PROTOCOL_VERSION: Final = 1
MAX_RECORDS: Final = 2000

DECISIONS: Final = ("received", "approved", "denied", "consented")
"""What a person at the site has said of a manifest, or of its model's leaving: all that is declared."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table: the Flower message type, what the hub sends and what the site answers."""

    message_type: str
    request: type[Record] | None
    many_requests: bool
    reply: type[Record] | None
    many_replies: bool = False


STUDY: Final = Kind("query.study", None, False, None)
KEYS: Final = Kind("query.keys", None, False, records.KeyAnnounce)
DIRECTORY: Final = Kind("query.directory", records.Directory, False, records.PairSeed, many_replies=True)
SEEDS: Final = Kind("query.seeds", records.PairSeed, True, records.Confirm)
CONFIRMS: Final = Kind("query.confirms", records.Tag, True, None)
HEAD: Final = Kind("query.head", records.HeadPlease, False, records.Head)
COSIGN: Final = Kind("query.cosign", records.Head, True, records.Cosigned)
COSIGNED: Final = Kind("query.cosigned", records.Cosign, True, None)
READY: Final = Kind("train.ready", records.RoundStart, False, records.Ready)
UPLOAD: Final = Kind("train.upload", records.Cohort, False, records.Upload)
OPEN: Final = Kind("train.open", records.OpenPlease, False, records.Open)
RESULT: Final = Kind("query.result", records.Result, False, None)
CLOSE: Final = Kind("query.close", None, False, None)
CONSENT: Final = Kind("query.consent", None, False, None)

KINDS: Final = {
    kind.message_type: kind
    for kind in (
        *(STUDY, KEYS, DIRECTORY, SEEDS, CONFIRMS, HEAD, COSIGN, COSIGNED),
        *(READY, UPLOAD, OPEN, RESULT, CLOSE, CONSENT),
    )
}


@dataclass(frozen=True, slots=True)
class Request:
    """What the hub asks about the run of manifest digest ``man`` (32 bytes).

    ``document`` is used by STUDY alone: the signed manifest; all other kinds carry records.
    """

    kind: Kind
    man: bytes
    records: tuple[Record, ...] = ()
    document: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a site answers: records, a decision (STUDY and CONSENT), or unavailable."""

    kind: Kind
    available: bool = True
    records: tuple[Record, ...] = ()
    decision: str = ""


def kind_of(message_type: str) -> Kind:
    """The row for a message type. Raises VerificationError when it is not in the table."""
    try:
        return KINDS[message_type]
    except KeyError:
        raise VerificationError("messages.kind", f"{message_type!r} is not a kind of message") from None


def encode_request(request: Request) -> bytes:
    """Canonical bytes of a request."""
    return labelled(
        "request/" + request.kind.message_type,
        request.man,
        request.document,
        *(records.encode(record) for record in request.records),
    )


def decode_request(message_type: str, data: bytes) -> Request:
    """Read a request strictly.

    Guarantee: decoding_is_exact - only the bytes that encode_request makes are accepted.
    Raises: VerificationError.
    """
    kind = kind_of(message_type)
    parts = split_labelled("request/" + message_type, data, "request")
    if len(parts) < 2 or len(parts[0]) != DIGEST_SIZE_BYTES:
        raise VerificationError("messages.request", f"a {message_type} request begins with a manifest digest")
    if (kind is STUDY) != bool(parts[1]):
        raise VerificationError("messages.request", f"a document belongs to {STUDY.message_type} alone")
    return Request(
        kind, parts[0], _decode_records(kind.request, kind.many_requests, parts[2:], "request"), parts[1]
    )


def run_of(message_type: str, data: bytes) -> str:
    """The run that a request names, 64 hex digits; empty when it is none. Nothing else of it is read."""
    try:
        man = split_labelled("request/" + kind_of(message_type).message_type, data, "request")[0]
    except (VerificationError, IndexError):
        return ""
    return man.hex() if len(man) == DIGEST_SIZE_BYTES else ""


def encode_reply(reply: Reply) -> bytes:
    """Canonical bytes of a reply; an unavailable one holds nothing but that word."""
    label = "reply/" + reply.kind.message_type
    if not reply.available:
        return labelled(label, b"unavailable")
    return labelled(
        label, b"ok", reply.decision.encode("ascii"), *(records.encode(record) for record in reply.records)
    )


def decode_reply(message_type: str, data: bytes) -> Reply:
    """Read a reply strictly. Raises: VerificationError."""
    kind = kind_of(message_type)
    parts = split_labelled("reply/" + message_type, data, "reply")
    if parts == [b"unavailable"]:
        return Reply(kind, available=False)
    if len(parts) < 2 or parts[0] != b"ok":
        raise VerificationError("messages.reply", f"a {message_type} reply is 'ok' or 'unavailable'")
    decision = parts[1].decode("ascii", errors="replace")
    if decision not in (DECISIONS if kind in (STUDY, CONSENT) else ("",)):
        raise VerificationError("messages.decision", f"a {message_type} reply carries no such decision")
    return Reply(kind, True, _decode_records(kind.reply, kind.many_replies, parts[2:], "reply"), decision)


def _decode_records(
    record_type: type[Record] | None, many: bool, parts: Sequence[bytes], what: str
) -> tuple[Record, ...]:
    allowed = 0 if record_type is None else MAX_RECORDS if many else 1
    required = 1 if record_type is not None and not many else 0
    if not required <= len(parts) <= allowed:
        raise VerificationError(
            "messages.count", f"the {what} holds {len(parts)} records, which is not allowed"
        )
    return tuple(records.decode(record_type, part) for part in parts) if record_type else ()
