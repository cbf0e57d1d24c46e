"""One round at the hub: ready, cohort, uploads, openings, with another attempt after each dropout.

Source: PROTOCOL R0-R6, C1-C7. Rules: the cohort of an attempt is everybody who is ready and still there; a
hospital that says it is unavailable, or whose upload is not whole in its time, is left out of the next
attempt; an opening missing at the deadline loses the round; a lost round's number is never used again.
"""

import ctypes
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from common import flower, messages
from common.errors import FailureError, WardroundError
from common.secagg import records
from common.secagg.hub import HubRound
from common.study import Aggregation
from server.exchange import Exchange, only
from server.payloads import Attempt, Payloads

log = logging.getLogger("wardround.hub.rounds")

REPLY_MARGIN_S: Final = 5.0
ASK_AGAIN_S: Final = 0.5
SETTLE_S: Final = 0.3
SAY_AFTER_S: Final = 5.0
LARGE_MODEL_BYTES: Final = 4 << 20


def give_back(model_bytes: int) -> None:
    """Return freed memory to the system: the chunks of a large model leave holes in every thread's heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if model_bytes > LARGE_MODEL_BYTES and trim is not None:
        trim(0)


class RoundLost(FailureError):  # noqa: N818 - an outcome of the protocol, not a fault
    """This round gives no sum; the next one has another number."""


class _Uploads:
    """The sink of one attempt: checks headers, adds chunks as they arrive, keeps them where that is due."""

    def __init__(self, round_: HubRound, kept: Attempt | None) -> None:
        self._sum = round_.accumulator
        self._kept = kept

    def header(self, node_id: int, body: bytes) -> Sequence[int]:
        """Take the header in front of a payload; the chunks that are still missing."""
        reply = messages.decode_reply(messages.UPLOAD.message_type, body)
        if not reply.available:
            raise FailureError("rounds.upload", "a payload came without an upload header")
        self._sum.add_header(node_id, only(reply.records, records.Upload))
        return self._sum.missing_chunks(node_id)

    def chunk(self, node_id: int, index: int, data: bytes) -> None:
        """Add one chunk."""
        if self._kept is None:
            self._sum.add_chunk(node_id, index, data)
            return
        with self._kept.taking():
            self._sum.add_chunk(node_id, index, data)
            self._kept.write(node_id, index, data)

    def add(self, node_id: int, header: records.Upload, chunks: Sequence[bytes]) -> None:
        """Take a payload that came inside its reply, as other Grids bring it."""
        self._sum.add_header(node_id, header)
        for index, chunk in enumerate(chunks):
            self.chunk(node_id, index, chunk)


class Round:
    """Carries the messages of one HubRound.

    ``timing`` is the study's; ``say`` is told what is waited for, when that takes long; ``payloads`` keeps
    those of the opened attempt; ``unavailable`` holds who said so when asked for R1 or R3.
    """

    def __init__(
        self,
        exchange: Exchange,
        round_: HubRound,
        timing: Aggregation,
        say: Callable[[str], None],
        payloads: Payloads | None = None,
    ) -> None:
        self.attempts = 0
        self.unavailable: set[int] = set()
        self._exchange, self._round, self._timing = exchange, round_, timing
        self._say, self._payloads = say, payloads
        self._kept: Attempt | None = None
        self._deadline = time.monotonic() + timing.deadline_s

    def run(self, sites: Collection[int], state: bytes) -> None:
        """R0 to R5 with ``sites``; ``state`` is the model's file. Raises RoundLost."""
        try:
            self._ready(sites, state)
            give_back(len(state))
            without: set[int] = set()
            while without := self._attempt(without):
                log.info("%s left out; another attempt", ", ".join(map(self._exchange.name, sorted(without))))
            give_back(len(state))
            self._open()
            self._round.finish()
            if self._kept is not None:
                self._kept.seal(self._round.accumulator.ids)
        except RoundLost:
            raise
        except WardroundError as error:
            if error.code.startswith("secagg."):
                raise RoundLost("rounds.lost", error.problem) from error
            raise
        finally:
            if self._kept is not None:
                self._kept.drop()

    def _ready(self, sites: Collection[int], state: bytes) -> None:
        """R0 and R1. When a cohort is possible, the others have ``straggler_s`` more."""
        exchange, round_, asked = self._exchange, self._round, time.monotonic()

        def enough() -> bool:
            missing = set(sites) - set(round_.ready_ids()) - self.unavailable
            if missing and time.monotonic() - asked > SAY_AFTER_S:
                self._say("waiting for the update of " + self._names(missing))
            return len(round_.possible()) >= self._timing.minimum_hospitals

        exchange.collect(
            messages.READY,
            {site: exchange.request(messages.READY, round_.start) for site in sites},
            self._timing.deadline_s + REPLY_MARGIN_S,
            lambda site, found: round_.on_ready(site, only(found, records.Ready)),
            attachment=flower.chunks(state),
            enough=enough,
            least=self._timing.minimum_hospitals,
            late_s=self._timing.straggler_s,
            unavailable=self.unavailable,
        )

    def _names(self, sites: Collection[int]) -> str:
        return ", ".join(self._exchange.names[site] for site in sorted(sites))

    def _attempt(self, without: Collection[int]) -> set[int]:
        """R2 and R3 of one attempt. Returns who has to be left out, or nothing when all have uploaded."""
        exchange, round_ = self._exchange, self._round
        cohort = round_.cohort(without)
        self.attempts = cohort.attempt
        requests = {site: exchange.request(messages.UPLOAD, cohort) for site in cohort.ids}
        gone: set[int] = set()
        patience, given_up = self._patience(round_.missing_uploads), [float("inf")]
        if self._kept is not None:
            self._kept.drop()
        if self._payloads is not None:
            self._kept = self._payloads.attempt(cohort.round, cohort.attempt)
        uploads, kept = _Uploads(round_, self._kept), self._kept

        def until() -> float:
            return 0.0 if kept is not None and kept.failed else min(patience(), given_up[0])

        with self._streaming(uploads):
            for site, reply, chunks in exchange.ask(
                messages.UPLOAD, requests, self._timing.upload_s, until=until
            ):
                if not reply.available:
                    log.info("%s: unavailable for %s", exchange.name(site), messages.UPLOAD.message_type)
                    gone.add(site)
                    self.unavailable.add(site)
                    # This sum can't be opened any more: the others mask again, without all who say so now.
                    given_up[0] = min(given_up[0], time.monotonic() + SETTLE_S)
                elif chunks:
                    header = only(reply.records, records.Upload)
                    try:
                        uploads.add(site, header, chunks)
                    except WardroundError as error:
                        log.warning("%s: refused: %s", exchange.name(site), error)
        if self._kept is not None:
            self._kept.check()
        missing = set(round_.missing_uploads())
        return set(without) | (gone or missing) if missing else set()

    @contextmanager
    def _streaming(self, uploads: _Uploads) -> Iterator[None]:
        """Let payloads go to the accumulator as they arrive, where the Grid can do that."""
        grid: Any = self._exchange.grid
        if not hasattr(grid, "sink"):
            yield
            return
        grid.sink = uploads
        try:
            yield
        finally:
            grid.sink = None  # it would keep the sum of this round alive into the next

    def _open(self) -> None:
        """R4 and R5. Asked again until the deadline: without one opening the round is lost for all."""
        exchange, round_ = self._exchange, self._round
        please = round_.open_please()
        deadline = max(self._deadline, time.monotonic() + self._timing.upload_s)
        while missing := round_.missing_openings():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise RoundLost("rounds.openings", f"{self._names(missing)} did not open")
            exchange.collect(
                messages.OPEN,
                {site: exchange.request(messages.OPEN, please) for site in missing},
                left_s,
                lambda site, found: round_.on_open(site, only(found, records.Open)),
            )
            if missing := round_.missing_openings():
                self._say("waiting for the opening of " + self._names(missing))
                exchange.pause(ASK_AGAIN_S)

    def _patience(self, missing: Callable[[], Collection[int]]) -> Callable[[], float]:
        """Until when to wait for ``missing``: when all of them are offline, ``straggler_s``."""
        since: list[float] = []

        def until() -> float:
            if set(missing()) & set(self._exchange.online()):
                since.clear()
                return float("inf")
            since[:] = since or [time.monotonic()]
            return since[0] + self._timing.straggler_s

        return until
