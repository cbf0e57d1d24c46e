"""What is kept of an opened round: every signature in it counts."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from common.encoding import labelled
from common.errors import RefusedError, VerificationError
from common.secagg import records
from common.secagg.params import RunParams
from common.secagg.transcript import Transcript, read_transcripts, write_transcripts
from tests.common.secagg.federation import Federation, public, signing_key


@lru_cache
def opened(number: int = 1, attempt: int = 1) -> tuple[RunParams, Transcript]:
    federation = Federation(4)
    federation.pair()
    hub = federation.round(number)
    federation.ready(hub)
    for _ in range(attempt):
        cohort = hub.cohort()
    federation.upload(hub, cohort)
    federation.open(hub)
    return federation.params, hub.transcript(hub.result(bytes(32)))


def test_a_transcript_is_read_as_written() -> None:
    params, transcript = opened()
    transcript.check(params)
    assert transcript.cohort.ids == (1, 2, 3, 4)
    assert Transcript.from_bytes(transcript.to_bytes()) == transcript
    assert read_transcripts(write_transcripts([transcript.to_bytes()] * 2)) == (transcript, transcript)
    assert read_transcripts(write_transcripts([])) == ()


@pytest.mark.parametrize(("number", "attempt"), [(2, 1), (5, 2), (5, 3)])
def test_every_round_and_attempt_of_the_run_is_accepted(number: int, attempt: int) -> None:
    params, transcript = opened(number, attempt)
    transcript.check(params)
    assert (transcript.start.round, transcript.cohort.attempt) == (number, attempt)


def test_other_bytes_are_refused() -> None:
    data = opened()[1].to_bytes()
    for wrong in (b"", data[:-1], data + b"\0", data[: len(data) // 2], data[:40]):
        with pytest.raises(VerificationError):
            Transcript.from_bytes(wrong)
        with pytest.raises(VerificationError):
            read_transcripts(wrong)
    with pytest.raises(VerificationError, match="incomplete"):
        Transcript.from_bytes(labelled("transcript/1", b"", b""))
    uploads, openings = opened()[1].uploads, opened()[1].openings
    for other in ((uploads[:3], openings), (uploads[:3], openings[:3]), (uploads, openings * 2)):
        wrong = dataclasses.replace(opened()[1], uploads=other[0], openings=other[1]).to_bytes()
        with pytest.raises(VerificationError, match="one header and one opening"):
            Transcript.from_bytes(wrong)


def signed(record: Any, name: str) -> Any:
    return records.signed(record, opened()[0].man, signing_key(name).sign)


def replaced(items: tuple[Any, ...], at: int, item: Any) -> tuple[Any, ...]:
    return (*items[:at], item, *items[at + 1 :])


def changed(record: Any, name: str, **changes: Any) -> Any:
    """The record with other fields, signed anew by whose it is."""
    return signed(dataclasses.replace(record, **changes), name)


Change = Callable[[Transcript], Transcript]
put = dataclasses.replace

TABLE: list[tuple[str, Change, str]] = [
    ("a start by another", lambda t: put(t, start=signed(t.start, "site 1")), "not signed by the hub"),
    ("a result by another", lambda t: put(t, result=signed(t.result, "site 1")), "not signed by the hub"),
    ("another run", lambda t: put(t, start=changed(t.start, "hub", man=bytes(32))), "one round"),
    ("another round", lambda t: put(t, start=changed(t.start, "hub", round=2)), "one round"),
    ("a result of another context", lambda t: put(t, result=changed(t.result, "hub", ctx=bytes(32))), "one round"),
    ("too many attempts", lambda t: put(t, cohort=put(t.cohort, attempt=4)), "one round"),
    ("a commitment to another seed", lambda t: put(t, uploads=replaced(t.uploads, 1, changed(t.uploads[1], "site 2", commit=bytes(32)))), "another seed"),
    ("another seed", lambda t: put(t, openings=replaced(t.openings, 1, changed(t.openings[1], "site 2", b=bytes(32)))), "another seed"),
    ("an unsigned opening", lambda t: put(t, openings=replaced(t.openings, 1, put(t.openings[1], sig=bytes(64)))), "hospital 2"),
    ("an unsigned header", lambda t: put(t, uploads=replaced(t.uploads, 3, put(t.uploads[3], sig=bytes(64)))), "hospital 4"),
    ("one opened twice", lambda t: put(t, openings=replaced(t.openings, 1, t.openings[0])), "another context"),
    ("one uploaded twice", lambda t: put(t, uploads=replaced(t.uploads, 1, t.uploads[0])), "another context"),
    ("an upload to another context", lambda t: put(t, uploads=replaced(t.uploads, 1, changed(t.uploads[1], "site 2", ctx=bytes(32)))), "another context"),
    ("an opening missing", lambda t: put(t, openings=t.openings[:-1]), "one header and one opening"),
    ("other chunks", lambda t: put(t, uploads=replaced(t.uploads, 0, changed(t.uploads[0], "site 1", payload_digest=bytes(32)))), "do not fit"),
]  # fmt: skip


def claimed(transcript: Transcript, **changes: Any) -> Transcript:
    """With other records, and a result that the hub signed for the context that they make."""
    other = put(transcript, **changes)
    return put(other, result=changed(other.result, "hub", ctx=other.ctx))


def moved(transcript: Transcript, header: bytes | None, opening: bytes | None) -> Transcript:
    """With another context in the header and the opening of hospital 2."""
    uploads, openings = transcript.uploads, transcript.openings
    if header is not None:
        uploads = replaced(uploads, 1, changed(uploads[1], "site 2", ctx=header))
    if opening is not None:
        openings = replaced(openings, 1, changed(openings[1], "site 2", ctx=opening))
    return put(transcript, uploads=uploads, openings=openings)


LOWEST, HIGHEST = bytes(32), b"\xff" * 32
TABLE += [
    ("another run, lower", lambda t: claimed(t, start=changed(t.start, "hub", man=LOWEST)), "one round"),
    ("another run, higher", lambda t: claimed(t, start=changed(t.start, "hub", man=HIGHEST)), "one round"),
    ("a later cohort", lambda t: claimed(t, cohort=put(t.cohort, round=2)), "one round"),
    ("a higher context", lambda t: put(t, result=changed(t.result, "hub", ctx=HIGHEST)), "one round"),
    ("round 0", lambda t: claimed(t, start=changed(t.start, "hub", round=0), cohort=put(t.cohort, round=0)), "one round"),
    ("round 6 of 5", lambda t: claimed(t, start=changed(t.start, "hub", round=6), cohort=put(t.cohort, round=6)), "one round"),
    ("attempt 4 of 3", lambda t: claimed(t, cohort=put(t.cohort, attempt=4)), "one round"),
    ("a header missing", lambda t: put(t, uploads=t.uploads[:-1]), "one header and one opening"),
    ("one header more", lambda t: put(t, uploads=t.uploads + t.uploads[3:]), "one header and one opening"),
    ("one opening more", lambda t: put(t, openings=t.openings + t.openings[3:]), "one header and one opening"),
    ("one twice for another", lambda t: put(t, uploads=replaced(t.uploads, 1, t.uploads[0]), openings=replaced(t.openings, 1, t.openings[0])), "another context"),
    ("both missing", lambda t: put(t, uploads=t.uploads[:-1], openings=t.openings[:-1]), "one header and one opening"),
    ("both twice", lambda t: put(t, uploads=t.uploads + t.uploads[3:], openings=t.openings + t.openings[3:]), "one header and one opening"),
    *((f"another context, {n}", lambda t, h=h, o=o: moved(t, h, o), "another context") for n, (h, o) in enumerate(
        [(LOWEST, None), (HIGHEST, None), (None, LOWEST), (None, HIGHEST), (LOWEST, LOWEST), (HIGHEST, HIGHEST)]
    )),
    *((f"other chunks, {d[0]}", lambda t, d=d: put(t, uploads=replaced(t.uploads, 0, changed(t.uploads[0], "site 1", payload_digest=d))), "do not fit") for d in (LOWEST, HIGHEST)),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_transcript_needs_every_signature(change: Change, match: str) -> None:
    params, transcript = opened()
    with pytest.raises(VerificationError, match=match):
        change(transcript).check(params)


def small(transcript: Transcript, members: tuple[tuple[int, bytes], ...]) -> Transcript:
    """All signed anew over other members: what a hub and its colluders could make."""
    cohort = put(transcript.cohort, members=members)
    ctx = put(transcript, cohort=cohort).ctx
    kept = [i for i, _ in members]
    return Transcript(
        transcript.start,
        cohort,
        tuple(changed(u, f"site {u.id}", ctx=ctx) for u in transcript.uploads if u.id in kept),
        tuple(changed(o, f"site {o.id}", ctx=ctx) for o in transcript.openings if o.id in kept),
        changed(transcript.result, "hub", ctx=ctx),
    )


def test_a_cohort_that_the_run_does_not_allow_is_refused() -> None:
    params, transcript = opened()
    members = transcript.cohort.members
    # Read, but not taken.
    nobody = small(transcript, ())
    assert Transcript.from_bytes(nobody.to_bytes()) == nobody
    for wrong in (
        (),
        members[:2],
        (members[0], *members),
        (members[1], members[0], *members[2:]),
        (*members[:3], (9, bytes(32))),
    ):
        with pytest.raises(VerificationError, match="not one that the run allows"):
            small(transcript, wrong).check(params)
    with pytest.raises(VerificationError, match="another seed"):
        # Three of four are allowed; only their seeds do not fit the context that is claimed.
        small(transcript, members[:3]).check(params)


def test_there_is_no_transcript_before_a_sum() -> None:
    federation = Federation(4)
    federation.pair()
    with pytest.raises(RefusedError, match="no cohort yet"):
        federation.round().transcript(opened()[1].result)


def test_another_roster_does_not_verify() -> None:
    params, transcript = opened()
    keys = {**params.keys, 3: public("site 4"), 4: public("site 3")}
    with pytest.raises(VerificationError, match="hospital 3"):
        transcript.check(dataclasses.replace(params, keys=keys))
