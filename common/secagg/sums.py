"""The sum of one context: uploads are added as they arrive, chunk by chunk, then opened.

Source: PROTOCOL.md C1, C2, C6, C7. Rules: a chunk counts once, and only when its digest is the one in the
signed header; a commitment is checked before its self-mask is subtracted; the trailing 1s must sum to the
size of the cohort. Several connections may add at once: digests are computed outside the lock, and are ten
times the work of the addition under it.
"""

import hmac
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from common.errors import FailureError, RefusedError, VerificationError
from common.secagg import keys, records
from common.secagg.codec import Integers, Layout, Words, from_words
from common.secagg.masks import chunk_digest, empty_sums, remove_self_masks
from common.secagg.params import RunParams
from common.secagg.records import Cohort, Open, Upload


@dataclass(frozen=True, slots=True)
class Sums:
    """What a round reveals over ``cohort``, in grid steps: signed words of the codec's width, scalars of 64.

    The arrays are the accumulator's own memory, not copies.
    """

    parameters: Integers = field(repr=False)
    scalars: Integers = field(repr=False)
    cohort: tuple[int, ...]
    digest: bytes


class Accumulator:
    """The one sum of one context, in memory that does not grow with the cohort.

    ``cohort`` is the attempt that is summed, ``ctx`` its context (32 bytes).

    Guarantee: each_chunk_counts_once - in any order, repeated or from several threads.
    Guarantee: a_tampered_chunk_is_refused - another byte, length or index changes nothing.
    """

    def __init__(self, params: RunParams, cohort: Cohort, ctx: bytes) -> None:
        self.ctx = ctx
        self.ids = cohort.ids
        self._params = params
        self._layout: Layout = params.layout
        self._spans = self._layout.spans
        self._lock = threading.Lock()
        self._params_sum, self._scalars_sum = empty_sums(self._layout)
        self._headers: dict[int, Upload] = {}
        self._missing: dict[int, set[int]] = {}
        self._openings: dict[int, Open] = {}
        self._unmasked: bool | None = None

    @property
    def headers(self) -> Mapping[int, Upload]:
        """The accepted headers by id, for the evidence."""
        return dict(self._headers)

    @property
    def openings(self) -> Mapping[int, Open]:
        """The accepted openings by id, for the evidence."""
        return dict(self._openings)

    def missing_chunks(self, member: int) -> tuple[int, ...]:
        """Indices of the chunks of ``member`` that are still to come, ascending: where to resume.

        Raises: RefusedError before its header.
        """
        with self._lock:
            if member not in self._missing:
                raise RefusedError("secagg.upload.header", f"hospital {member} has sent no header")
            return tuple(sorted(self._missing[member]))

    def missing_uploads(self) -> tuple[int, ...]:
        """Ids of the cohort whose payload is not complete, ascending."""
        with self._lock:
            return tuple(i for i in self.ids if i not in self._missing or self._missing[i])

    def missing_openings(self) -> tuple[int, ...]:
        """Ids of the cohort that have not opened, ascending."""
        with self._lock:
            return tuple(i for i in self.ids if i not in self._openings)

    def add_header(self, sender: int, header: Upload) -> None:
        """R3: check and keep the header of ``sender``; the same one again changes nothing.

        Raises: VerificationError, RefusedError.
        """
        if header.id != sender or sender not in self.ids or header.ctx != self.ctx:
            raise RefusedError(
                "secagg.upload.context", f"hospital {sender} uploads to another context or name"
            )
        records.check_signature(header, self._params.man, self._params.keys[sender], f"hospital {sender}")
        if len(header.chunk_digests) != len(self._spans):
            raise VerificationError("secagg.upload.chunks", f"an upload has {len(self._spans)} chunks")
        if records.payload_digest(header.chunk_digests) != header.payload_digest:
            raise VerificationError(
                "secagg.upload.digest", "the payload digest is not that of the chunk digests"
            )
        with self._lock:
            if self._headers.setdefault(sender, header) != header:
                raise RefusedError(
                    "secagg.upload.second", f"hospital {sender} uploaded two payloads for one context"
                )
            self._missing.setdefault(sender, set(range(len(self._spans))))

    def add_chunk(self, sender: int, index: int, chunk: bytes) -> None:
        """Check one chunk against its header and add it, once; a repeated one changes nothing.

        Raises: VerificationError for a wrong index, length or digest; RefusedError before the header.
        """
        header = self._headers.get(sender)
        if header is None:
            raise RefusedError("secagg.upload.header", f"hospital {sender} has sent no header")
        if type(index) is not int or not 0 <= index < len(self._spans):
            raise VerificationError("secagg.chunk.index", f"an upload has chunks 0 to {len(self._spans) - 1}")
        span = self._spans[index]
        if len(chunk) != span.stop - span.start:
            raise VerificationError(
                "secagg.chunk.length", f"chunk {index} has {span.stop - span.start} bytes"
            )
        if not hmac.compare_digest(chunk_digest(chunk), header.chunk_digests[index]):
            raise VerificationError("secagg.chunk.digest", f"chunk {index} of hospital {sender} was altered")
        sums: Words = self._params_sum if span.vector == "params" else self._scalars_sum
        words: Words = np.frombuffer(chunk, dtype=sums.dtype)
        part = sums[span.first_word : span.first_word + words.size]
        with self._lock:
            if index in self._missing[sender]:
                np.add(part, words, out=part)
                self._missing[sender].remove(index)

    def open(self, sender: int, record: Open) -> None:
        """R5: check the opening against its commitment and keep it for ``finish``; again changes nothing.

        Guarantee: a_wrong_opening_is_refused - before anything is subtracted.
        Raises: VerificationError, RefusedError.
        """
        header = self._headers.get(sender)
        if header is None or self.missing_uploads():
            raise RefusedError(
                "secagg.open.early", "a context is opened when all of its cohort have uploaded"
            )
        if record.id != sender or record.ctx != self.ctx:
            raise RefusedError("secagg.open.context", f"hospital {sender} opens another context or name")
        records.check_signature(record, self._params.man, self._params.keys[sender], f"hospital {sender}")
        if not hmac.compare_digest(keys.commitment(record.b, self.ctx, sender), header.commit):
            raise VerificationError(
                "secagg.open.commit", f"hospital {sender} opens another seed than it committed to"
            )
        with self._lock:
            self._openings.setdefault(sender, record)

    def finish(self) -> Sums:
        """The sums, when all have opened: at the first call all self-masks come off in one pass.

        Guarantee: a_void_sum_is_refused - unless both trailing words equal the size of the cohort.
        Raises: RefusedError while an opening is missing; FailureError for a void result, naming nobody.
        """
        missing = self.missing_openings()
        if missing:
            raise RefusedError("secagg.finish.early", f"hospitals {list(missing)} have not opened")
        with self._lock:
            if self._unmasked is None:
                # A pass that fails halfway leaves neither the one sum nor the other: void for good.
                self._unmasked = False
                if self._params.masked:
                    seeds = [opening.b for opening in self._openings.values()]
                    remove_self_masks(self._params_sum, self._scalars_sum, seeds, self.ctx)
                self._unmasked = True
        last_words = {int(self._params_sum[-1]), int(self._scalars_sum[-1])}
        if not self._unmasked or last_words != {len(self.ids)}:
            raise FailureError(
                "secagg.result.void",
                "the sum of this round is void: the hospitals' masks do not cancel",
                remedy="Compute the round again under a new number; it does not tell who is at fault.",
            )
        params, scalars = self._params_sum[:-1], self._scalars_sum[:-1]
        digest = keys.vectors_digest("sum", params, scalars)
        return Sums(from_words(params), from_words(scalars), self.ids, digest)


def recompute(
    params: RunParams,
    cohort: Cohort,
    ctx: bytes,
    headers: Mapping[int, Upload],
    openings: Mapping[int, Open],
    payload: Callable[[int], bytes],
) -> Sums:
    """The sum again, from the signed header, the kept payload and the opening of every hospital.

    ``payload`` gives that of one hospital; they are asked for one after the other, and one is held at a time.

    Guarantee: an_auditor_recomputes_the_sum - and refuses evidence that is altered or incomplete.
    Raises: VerificationError, RefusedError, FailureError.
    """
    accumulator = Accumulator(params, cohort, ctx)
    for member, header in headers.items():
        accumulator.add_header(member, header)
        _add_payload(accumulator, params.layout, member, payload(member))
    for member, opening in openings.items():
        accumulator.open(member, opening)
    return accumulator.finish()


def _add_payload(accumulator: Accumulator, layout: Layout, member: int, payload: bytes) -> None:
    if len(payload) != layout.payload_bytes:
        raise VerificationError(
            "secagg.payload.length", f"the payload of hospital {member} has another length"
        )
    for index, span in enumerate(layout.spans):
        accumulator.add_chunk(member, index, payload[span.start : span.stop])
