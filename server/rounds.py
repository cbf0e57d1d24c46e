"""One study from submission to its last round: consent, setup, rounds, one checkpoint a round.

Source: DESIGN "A round, end to end"; PROTOCOL S1-S4, R0-R6, C1-C7. Rules: the protocol machines decide
(common/secagg/hub.py), this module carries their messages through a Grid and stores what they gave; a
reply that does not verify counts as missing and is logged with the reason; status is written before and
after each phase.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, TypeVar

from flwr.serverapp import Grid

from common import flower, identity, messages
from common.admissible import check
from common.errors import FailureError, RefusedError, WardroundError
from common.messages import Kind, Reply, Request
from common.roster import SignedRoster
from common.run import run_params, study_document
from common.secagg import records
from common.secagg.codec import dequantise
from common.secagg.hub import HubRound, HubSetup, Setup
from common.secagg.records import Record
from common.study import SignedManifest
from common.tasks.models import initial_state
from common.tasks.models.layout import unflatten
from common.tasks.state import model_digest, state_bytes
from server.home import HubHome
from server.link import GrpcGrid
from server.store import ENDED, Checkpoint, Store
from server.strategy import ServerStep

log = logging.getLogger("wardround.hub.rounds")

R = TypeVar("R", bound=Record)

CONSENT_PERIOD_S: Final = 0.3
SETUP_TIMEOUT_S: Final = 60.0
REPLY_MARGIN_S: Final = 5.0


class Ended(RefusedError):  # noqa: N818 - it ends a loop, it is not a fault
    """The study was aborted or denied while it ran; its status says so already."""


class _Uploads:
    """The sink of a round: checks headers and adds chunks as they arrive."""

    def __init__(self, round_: HubRound) -> None:
        self._round = round_

    def header(self, node_id: int, body: bytes) -> None:
        """Take the header in front of a payload."""
        reply = messages.decode_reply(messages.UPLOAD.message_type, body)
        if not reply.available or not isinstance(reply.records[0], records.Upload):
            raise FailureError("rounds.upload", "a payload came without an upload header")
        self._round.on_upload(node_id, reply.records[0])

    def chunk(self, node_id: int, index: int, data: bytes) -> None:
        """Add one chunk."""
        self._round.on_chunk(node_id, index, data)


class StudyRun:
    """Runs one stored study over a Grid. ``clock`` gives seconds since 1970 UTC."""

    def __init__(
        self, home: HubHome, store: Store, grid: Grid, digest: str, clock: Callable[[], float] = time.time
    ) -> None:
        row = store.study(digest)
        self._digest = digest
        self._store = store
        self._grid = grid
        self._clock = clock
        self._signed = SignedManifest(row.manifest, row.signature)
        self._manifest = self._signed.verify()
        self._roster = SignedRoster(row.roster, row.roster_signature)
        hub_key = identity.load_signing_key(home.hub_key)
        self._sign = hub_key.sign
        roster = self._roster.verify(identity.public_key(hub_key))
        self._admitted = check(self._manifest, self._minute())
        self._params = run_params(self._manifest, self._admitted, roster, 0)
        self._names = {party.id: party.name for party in self._manifest.members}

    def run(self) -> None:
        """From consent to the last round. Raises WardroundError when the study cannot go on."""
        try:
            self._consent()
            self._status("setting up")
            setup = self._setup()
            self._status("running")
            self._rounds(setup)
            self._status("done")
            log.info("study %s done", self._digest[:12])
        except Ended as ended:
            log.info("study %s ended: %s", self._digest[:12], ended.problem)
        finally:
            self._close()

    def _minute(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%MZ")

    def _status(self, status: str, detail: str = "") -> None:
        self._continue()
        self._store.set_status(self._digest, status, detail)

    def _continue(self) -> None:
        status = self._store.study(self._digest).status
        if status in ENDED:
            raise Ended("rounds.ended", f"the study is {status}")

    def _unexpired(self) -> None:
        expires = self._manifest.study.expires
        if self._minute() >= expires:
            raise RefusedError("rounds.expired", f"the study expired at {expires}")

    def _ask(
        self,
        kind: Kind,
        requests: Sequence[tuple[int, Request]],
        timeout_s: float,
        state: Sequence[bytes] = (),
    ) -> list[tuple[int, Reply, list[bytes]]]:
        """Send one request to each id and return what verifies as a reply of that kind."""
        wanted = [
            flower.instruction(
                site, kind.message_type, messages.encode_request(request), attachment=state, ttl_s=timeout_s
            )
            for site, request in requests
        ]
        answers = []
        for message in self._grid.send_and_receive(wanted, timeout=timeout_s):
            site = message.metadata.src_node_id
            try:
                reply = messages.decode_reply(kind.message_type, flower.body_of(message))
                answers.append((site, reply, flower.attachment_of(message)))
            except WardroundError as error:
                log.warning("%s: a reply to %s was dropped: %s", self._name(site), kind.message_type, error)
        silent = {site for site, _ in requests} - {site for site, _, _ in answers}
        for site in sorted(silent):
            log.info("%s: no reply to %s in %.1f s", self._name(site), kind.message_type, timeout_s)
        return answers

    def _collect(
        self,
        kind: Kind,
        requests: Sequence[tuple[int, Request]],
        timeout_s: float,
        take: Callable[[int, tuple[Record, ...]], None],
        state: Sequence[bytes] = (),
    ) -> None:
        """Ask, and hand each available reply to ``take``; what it refuses counts as missing."""
        for site, reply, _ in self._ask(kind, requests, timeout_s, state):
            if not reply.available:
                log.info("%s: unavailable", self._name(site))
                continue
            try:
                take(site, reply.records)
            except WardroundError as error:
                log.warning("%s: refused: %s", self._name(site), error)

    def _name(self, site: int) -> str:
        return f"study {self._digest[:12]}, site {site} {self._names.get(site, '?')!r}"

    def _request(self, kind: Kind, *parts: Record) -> Request:
        return Request(kind, self._params.man, tuple(parts))

    # -- consent and setup ---------------------------------------------------------------------------------

    def _consent(self) -> None:
        """Offer the study until every member has approved it; one denial ends it."""
        self._status("waiting for approval")
        document = study_document(self._signed, self._roster)
        request = Request(messages.STUDY, self._params.man, (), document)
        decisions: dict[int, str] = {}
        while len(decisions) < len(self._names) or set(decisions.values()) != {"approved"}:
            self._continue()
            self._unexpired()
            online = [
                i for i in self._grid.get_node_ids() if i in self._names and decisions.get(i) != "approved"
            ]
            before = dict(decisions)
            for site, reply, _ in self._ask(messages.STUDY, [(i, request) for i in online], SETUP_TIMEOUT_S):
                decisions[site] = reply.decision
            if decisions != before:
                self._store.set_decisions(self._digest, decisions)
            denied = [self._names[i] for i, decision in decisions.items() if decision == "denied"]
            if denied:
                self._store.set_status(self._digest, "denied", f"denied by {', '.join(denied)}")
            time.sleep(CONSENT_PERIOD_S)

    def _setup(self) -> Setup:
        """S1 to S4. Raises RefusedError when fewer than m hospitals can be paired."""
        setup = HubSetup(self._params)
        everyone = list(self._params.members)
        self._collect(
            messages.KEYS,
            [(i, self._request(messages.KEYS)) for i in everyone],
            SETUP_TIMEOUT_S,
            lambda site, found: setup.on_announce(site, _only(found, records.KeyAnnounce)),
        )
        directory = setup.directory()
        self._collect(
            messages.DIRECTORY,
            [(i, self._request(messages.DIRECTORY, directory)) for i in setup.listed],
            SETUP_TIMEOUT_S,
            lambda site, found: setup.on_pair_seeds(site, _all(found, records.PairSeed)),
        )
        self._collect(
            messages.SEEDS,
            [(i, self._request(messages.SEEDS, *setup.seeds_for(i))) for i in setup.listed],
            SETUP_TIMEOUT_S,
            lambda site, found: setup.on_confirm(site, _only(found, records.Confirm)),
        )
        self._collect(
            messages.CONFIRMS,
            [(i, self._request(messages.CONFIRMS, *setup.confirms_for(i))) for i in setup.listed],
            SETUP_TIMEOUT_S,
            lambda _site, _found: None,
        )
        outcome = setup.outcome()
        log.info(
            "study %s: %d hospitals in the directory, %d pairs confirmed",
            self._digest[:12], len(setup.listed), len(outcome.pairs),
        )  # fmt: skip
        return outcome

    # -- rounds --------------------------------------------------------------------------------------------

    def _rounds(self, setup: Setup) -> None:
        layout = self._admitted.layout
        state = initial_state(self._manifest)
        step = ServerStep(self._manifest.study.training.server)
        for number in range(1, self._manifest.study.training.rounds + 1):
            self._continue()
            self._unexpired()
            started = time.monotonic()
            stored = state_bytes(state, layout)
            round_ = self._round(setup, number, stored, model_digest(state, layout))
            sums = round_.finish()
            mean = dequantise(sums.parameters, self._params.step) / len(sums.cohort)
            state = step.advance(state, unflatten(mean, layout))
            result = round_.result(model_digest(state, layout))
            seconds = time.monotonic() - started
            attempt = round_.accumulator
            self._store.add_round(
                self._digest,
                Checkpoint(
                    round=number,
                    attempt=1,
                    cohort=sums.cohort,
                    context=attempt.ctx,
                    sum_digest=result.sum_digest,
                    model_digest=result.model_digest,
                    state=state_bytes(state, layout),
                    seconds=seconds,
                ),
            )
            log.info(
                "study %s: round %d of %d done in %.3f s with %d hospitals",
                self._digest[:12], number, self._manifest.study.training.rounds, seconds, len(sums.cohort),
            )  # fmt: skip
            # A hospital that is asked for its next round does not need the result first.
            self._tell(messages.RESULT, sums.cohort, result)

    def _round(self, setup: Setup, number: int, stored: bytes, digest: bytes) -> HubRound:
        """R0 to R5 with one attempt. Raises RefusedError or FailureError when the round is lost."""
        timing = self._manifest.study.aggregation
        round_ = HubRound(
            self._params,
            setup,
            round=number,
            state=records.state_digest(stored),
            model_digest=digest,
            deadline=int(self._clock() + timing.deadline_s) + 1,
            sign=self._sign,
        )
        listed = [entry.id for entry in setup.directory.entries]
        self._collect(
            messages.READY,
            [(i, self._request(messages.READY, round_.start)) for i in listed],
            timing.deadline_s + REPLY_MARGIN_S,
            lambda site, found: round_.on_ready(site, _only(found, records.Ready)),
            flower.chunks(stored),
        )
        self._continue()
        cohort = round_.cohort()
        self._upload(round_, cohort, timing.upload_s)
        open_please = round_.open_please()
        self._collect(
            messages.OPEN,
            [(i, self._request(messages.OPEN, open_please)) for i in cohort.ids],
            timing.upload_s + REPLY_MARGIN_S,
            lambda site, found: round_.on_open(site, _only(found, records.Open)),
        )
        return round_

    def _upload(self, round_: HubRound, cohort: records.Cohort, upload_s: float) -> None:
        """R2 and R3: payloads go to the accumulator as they arrive, or from the reply on other Grids."""
        requests = [(i, self._request(messages.UPLOAD, cohort)) for i in cohort.ids]
        streaming = self._grid if isinstance(self._grid, GrpcGrid) else None
        if streaming is not None:
            streaming.sink = _Uploads(round_)
        try:
            answers = self._ask(messages.UPLOAD, requests, upload_s + REPLY_MARGIN_S)
        finally:
            if streaming is not None:
                streaming.sink = None
        for site, reply, chunks in answers:
            if not reply.available:
                log.info("%s: unavailable", self._name(site))
            elif streaming is None:
                try:
                    round_.on_upload(site, _only(reply.records, records.Upload))
                    for index, chunk in enumerate(chunks):
                        round_.on_chunk(site, index, chunk)
                except WardroundError as error:
                    log.warning("%s: refused: %s", self._name(site), error)

    def _tell(self, kind: Kind, sites: Iterable[int], *parts: Record) -> None:
        """Push a message whose reply nobody waits for."""
        body = messages.encode_request(self._request(kind, *parts))
        self._grid.push_messages([flower.instruction(i, kind.message_type, body, ttl_s=60.0) for i in sites])

    def _close(self) -> None:
        """Tell every member that the run is over, so that its secrets are erased."""
        online = [i for i in self._grid.get_node_ids() if i in self._names]
        self._ask(messages.CLOSE, [(i, self._request(messages.CLOSE)) for i in online], REPLY_MARGIN_S)


def _only(found: tuple[Record, ...], kind: type[R]) -> R:
    return _all(found, kind)[0]


def _all(found: tuple[Record, ...], kind: type[R]) -> tuple[R, ...]:
    if not all(isinstance(record, kind) for record in found):
        raise FailureError("rounds.record", f"a reply must hold {kind.__name__} records")
    return found  # type: ignore[return-value]
