"""Every message that a study can make leave this hospital: when, how often, its fields and its size.

Source: DESIGN.md "One idea" (all that leaves is a reply of ``common.messages``); PROTOCOL S1-S4, L1-L2,
R0-R6; PRIVACY "What else may cross the wire". Rules: derived from the closed table of messages and from the
records' own columns, so that a message which is not here cannot be encoded; sizes are those of the study.
"""

from dataclasses import dataclass
from typing import Any, Final

from common import messages
from common.messages import KINDS, Kind, Reply
from common.secagg.params import RunParams
from common.secagg.records import Fixed, Integer, ListOf, Record
from common.witness import MAX_SINCE

LEDGER_LEVELS: Final = 33
"""Hashes in a proof about a ledger of fewer than 2^32 entries, at the most."""

_ONCE: Final = (messages.KEYS, messages.DIRECTORY, messages.SEEDS, messages.CONFIRMS)
_PEOPLE: Final = (messages.STUDY, messages.CONSENT)
_LINK: Final = (
    "Each message is the body of one frame of the link, which adds the hub's own message id, the type, the",
    "digest of the study and lengths. Beside them the link carries its version once and an empty heartbeat",
    "every 2 s. Any message may be the word 'unavailable' instead, whatever the cause. By hand only:",
    "request.json at joining, and the evidence file for an auditor, which says what was charged.",
)


@dataclass(frozen=True, slots=True)
class Leaving:
    """One kind of message.

    ``when`` it leaves; ``times`` at most, None for each time that the hub asks; ``size_bytes`` of one, the
    largest that it can be; ``payload_bytes`` beside it; ``fields`` are its columns with their widths.
    """

    message: str
    when: str
    times: int | None
    size_bytes: int
    payload_bytes: int
    fields: tuple[str, ...]


def leaving(params: RunParams) -> tuple[Leaving, ...]:
    """The messages of one study, in the order of the table of messages.

    Guarantee: every_message_is_listed - each reply of a real study has the fields given here, and no more
    bytes than said.
    """
    return tuple(_leaving(kind, params) for kind in KINDS.values())


def text(found: tuple[Leaving, ...]) -> str:
    """The list for people."""
    lines = [f"{'message':<16} {'leaves':<24} {'bytes, at most':>15}  fields"]
    for one in found:
        times = one.when if one.times is None else f"{one.when}, {one.times} times"
        times = times.replace(", 1 times", ", once")
        size = f"{one.size_bytes + one.payload_bytes:,}"
        first, *more = one.fields
        lines.append(f"{one.message:<16} {times:<24} {size:>15}  {first}")
        lines += [f"{'':<57}  {field}" for field in more]
    return "\n".join([*lines, "", *_LINK])


def _leaving(kind: Kind, params: RunParams) -> Leaving:
    per_round = kind.message_type.startswith("train.") or kind in (
        *(messages.HEAD, messages.COSIGN, messages.COSIGNED, messages.RESULT),
    )
    if kind is messages.UPLOAD:
        when, times = "each attempt", params.rounds_max * params.attempts
    elif per_round:
        when, times = "each round", params.rounds_max
    elif kind in _ONCE:
        when, times = "at the start", 1
    else:
        when, times = "when asked" if kind in _PEOPLE else "at the end", None
    decision = max(messages.DECISIONS, key=len) if kind in _PEOPLE else ""
    made: tuple[Record, ...] = ()
    if kind.reply is not None:
        made = (_sample(kind.reply, params),) * (len(params.members) - 1 if kind.many_replies else 1)
    reply = messages.encode_reply(Reply(kind, True, made, decision))
    payload = params.layout.payload_bytes if kind is messages.UPLOAD else 0
    return Leaving(kind.message_type, when, times, len(reply), payload, tuple(_fields(kind, params)))


def _fields(kind: Kind, params: RunParams) -> list[str]:
    if kind in _PEOPLE:
        return [f"decision: one of {', '.join(messages.DECISIONS)}"]
    if kind.reply is None:
        return ["none: that it was received"]
    name = f"{kind.reply.__name__}, one for each pair" if kind.many_replies else kind.reply.__name__
    found = [f"{name}:", *(f"  {column}: {_width(width)}" for column, width in kind.reply.COLUMNS)]
    if kind is messages.UPLOAD:
        words = f"{params.parameters + 1} words of {params.bits} bits, {params.scalars + 1} of 64 bits"
        found.append(f"  and the payload: {words}{', masked' if params.masked else ', NOT MASKED'}")
    return found


def _width(column: Integer | Fixed | ListOf) -> str:
    if isinstance(column, Integer):
        return f"whole number of {8 * column.size_bytes} bits"
    if isinstance(column, Fixed):
        return f"{column.size_bytes} bytes"
    if isinstance(column.entry, tuple):
        return f"list of ({', '.join(map(_width, column.entry))})"
    return (
        f"list of {column.entry.__name__} ({', '.join(f'{n}: {_width(c)}' for n, c in column.entry.COLUMNS)})"
    )


def _sample(record: type[Record], params: RunParams) -> Record:
    """The largest record of its type in this study; its values mean nothing."""
    counts = {
        "tags": len(params.members) - 1,
        "extensions": MAX_SINCE,
        "path": LEDGER_LEVELS,
        # The other hospitals and the hub.
        "cosigns": len(params.members),
        "remembered": len(params.members),
        "chunk_digests": len(params.layout.spans),
    }

    def value(name: str, column: Integer | Fixed | ListOf) -> Any:
        if isinstance(column, Integer):
            return 0
        if isinstance(column, Fixed):
            return bytes(column.size_bytes)
        if isinstance(column.entry, tuple):
            items = [value(name, part) for part in column.entry]
            return (tuple(items) if len(items) > 1 else items[0],) * counts[name]
        return (_sample(column.entry, params),) * counts[name]

    return record(*(value(name, column) for name, column in record.COLUMNS))
