"""What is kept of an opened round, so that anyone can check afterwards that all of its cohort opened it.

Source: PROTOCOL.md C6. Rules: signed records only, no payload; a transcript is checked against the run's
parameters alone; what it does not show - that the sum is that of the payloads - needs the payloads too.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from common.encoding import enc, labelled, split_labelled
from common.errors import VerificationError
from common.secagg import keys, records
from common.secagg.params import RunParams
from common.secagg.records import Cohort, Open, Record, Result, RoundStart, Upload

_LABEL: Final = "transcript/1"
_LIST_LABEL: Final = "transcripts/1"


@dataclass(frozen=True, slots=True)
class Transcript:
    """R0, R2, the headers of R3, R5 and R6 of one opened round; headers and openings by ascending id."""

    start: RoundStart
    cohort: Cohort
    uploads: tuple[Upload, ...]
    openings: tuple[Open, ...]
    result: Result

    @property
    def ctx(self) -> bytes:
        """The context that the records add up to, 32 bytes."""
        start = self.start
        return records.context(start.man, start.dirh, start.model_digest, self.cohort)

    def to_bytes(self) -> bytes:
        """The bytes of the records; how many there are follows from the cohort."""
        parts: tuple[Record, ...] = (self.start, self.cohort, self.result, *self.uploads, *self.openings)
        return labelled(_LABEL, *map(records.encode, parts))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Transcript":
        """Read to_bytes strictly; nothing is verified yet. Raises VerificationError."""
        parts = split_labelled(_LABEL, data, "transcript")
        if len(parts) < 3:
            raise _wrong("it is incomplete")
        cohort = records.decode(Cohort, parts[1])
        size = len(cohort.members)
        if len(parts) != 3 + 2 * size:
            raise _wrong("each hospital of the cohort must have one header and one opening")
        return cls(
            records.decode(RoundStart, parts[0]),
            cohort,
            tuple(records.decode(Upload, part) for part in parts[3 : 3 + size]),
            tuple(records.decode(Open, part) for part in parts[3 + size :]),
            records.decode(Result, parts[2]),
        )

    def check(self, params: RunParams) -> None:
        """Check that every hospital of an allowed cohort uploaded to this context and opened it.

        Guarantee: a_transcript_needs_every_signature - of the hub for start and result, of each hospital of
        the cohort for its header and its opening, which must fit its commitment.
        Raises: VerificationError naming the hospital or the record.
        """
        start, cohort, ctx = self.start, self.cohort, self.ctx
        records.check_signature(start, params.man, params.hub_key, "the hub")
        records.check_signature(self.result, params.man, params.hub_key, "the hub")
        same = start.man == params.man and start.round == cohort.round and self.result.ctx == ctx
        if not same or not 1 <= start.round <= params.rounds_max or not cohort.attempt <= params.attempts:
            raise _wrong("its records are not of one round and attempt of this run")
        ids = cohort.ids
        if list(ids) != sorted(set(ids)) or not set(ids) <= set(params.members) or len(ids) < params.m:
            raise _wrong("its cohort is not one that the run allows")
        if not len(self.uploads) == len(self.openings) == len(ids):
            raise _wrong("each hospital of the cohort must have one header and one opening")
        for member, header, opening in zip(ids, self.uploads, self.openings, strict=True):
            if {header.id, opening.id} != {member} or not header.ctx == opening.ctx == ctx:
                raise _wrong(f"hospital {member} uploaded or opened another context")
            for record in (header, opening):
                records.check_signature(record, params.man, params.keys[member], f"hospital {member}")
            if records.payload_digest(header.chunk_digests) != header.payload_digest:
                raise _wrong(f"the digests of the payload of hospital {member} do not fit each other")
            if not hmac.compare_digest(keys.commitment(opening.b, ctx, member), header.commit):
                raise _wrong(f"hospital {member} opened another seed than it committed to")


def write_transcripts(transcripts: Sequence[bytes]) -> bytes:
    """The transcripts of a study in one file, in their order."""
    return labelled(_LIST_LABEL) + enc(*transcripts)


def read_transcripts(data: bytes) -> tuple[Transcript, ...]:
    """Read write_transcripts strictly. Raises VerificationError."""
    return tuple(map(Transcript.from_bytes, split_labelled(_LIST_LABEL, data, "file of transcripts")))


def _wrong(problem: str) -> VerificationError:
    return VerificationError("secagg.transcript", f"the transcript of a round is wrong: {problem}")
