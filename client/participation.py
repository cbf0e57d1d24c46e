"""What this hospital does with each request of the hub: check, decide, compute, mask, open.

Source: DESIGN "A round, end to end", steps 2-7; PROTOCOL I1-I14. Rules: a request is answered with records
of the secure sum, with a person's decision, or with ``unavailable``, one word whatever the cause; the cause
goes to this site's own log; the charge is in the ledger before any row is touched; what leaves is made by
the release gate and then masked.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np

from client.computation import Computation
from client.guard import Guard
from client.identity import SiteIdentity
from client.state import RunFile, SiteHome
from client.studies import StudyFolder
from common import messages
from common.errors import BudgetExhaustedError, RefusedError, VerificationError, WardroundError
from common.messages import Reply, Request
from common.roster import Roster
from common.run import read_study_document, run_params
from common.secagg import records
from common.secagg.params import RunParams
from common.secagg.records import Record
from common.secagg.site import Site
from common.secagg.state import RunState
from common.study import Manifest
from common.tasks.state import load_state, model_digest

log = logging.getLogger("wardround.site")

R = TypeVar("R", bound=Record)


@dataclass
class _Run:
    """One approved study while it runs here."""

    manifest: Manifest
    params: RunParams
    site: Site
    computation: Computation


class Participation:
    """The hospital behind its ClientApp. One request at a time.

    ``entropy`` is the OS generator in the product; ``clock`` seconds since 1970 UTC.
    """

    def __init__(
        self,
        home: SiteHome,
        *,
        entropy: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.identity = SiteIdentity.load(home)
        self.exhausted = False
        self.closed = 0
        self._home = home
        self._entropy = entropy
        self._clock = clock
        self._guard = Guard(home, self.identity, self._now)
        self._studies = StudyFolder(home)
        self._run_file = RunFile(home.runs)
        self._runs: dict[bytes, _Run] = {}
        for man in self._run_file.runs():
            if self._expired(man):
                self._erase(man)

    def close(self) -> None:
        """End the workers and close the files; secrets of running studies stay in the run file."""
        for run in self._runs.values():
            run.computation.end()
        self._run_file.close()
        self._guard.close()

    @property
    def open_runs(self) -> int:
        """Studies that run here now."""
        return len(self._runs)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    def _minute(self) -> str:
        return self._now().strftime("%Y-%m-%dT%H:%MZ")

    def answer(
        self, message_type: str, body: bytes, attachment: Sequence[bytes]
    ) -> tuple[bytes, tuple[bytes, ...]]:
        """The reply to one request, and the payload's chunks for an upload.

        Guarantee: every_cause_is_unavailable - whatever goes wrong here, the reply is the same bytes.
        """
        kind = messages.kind_of(message_type)
        try:
            request = messages.decode_request(message_type, body)
            reply, payload = self._handle(request, b"".join(attachment))
        except BudgetExhaustedError as error:
            self.exhausted = True
            log.error("refused before computing: %s", error)
            reply, payload = Reply(kind, available=False), ()
        except WardroundError as error:
            log.warning("%s: unavailable: %s", message_type, error)
            reply, payload = Reply(kind, available=False), ()
        except Exception as error:
            # The type alone: the text of an unforeseen exception might quote a row.
            log.error("%s: unavailable: internal %s", message_type, type(error).__name__)
            reply, payload = Reply(kind, available=False), ()
        return messages.encode_reply(reply), payload

    def _handle(self, request: Request, attachment: bytes) -> tuple[Reply, tuple[bytes, ...]]:
        kind = request.kind
        if kind is messages.STUDY:
            return self._study(request), ()
        if kind is messages.CLOSE:
            return self._end(request), ()
        run = self._run(request.man)
        site, found = run.site, request.records
        if kind is messages.UPLOAD:
            return self._upload(run, found)
        answers: tuple[Record, ...] = ()
        if kind is messages.KEYS:
            answers = (site.announce(),)
        elif kind is messages.DIRECTORY:
            answers = site.on_directory(_first(found, records.Directory))
        elif kind is messages.SEEDS:
            answers = (site.on_pair_seeds(_all(found, records.PairSeed)),)
        elif kind is messages.CONFIRMS:
            accepted = site.on_confirms(_all(found, records.Confirm))
            log.info("study %s: keys shared with %d hospitals", request.man.hex()[:12], len(accepted))
        elif kind is messages.READY:
            answers = (self._ready(run, _first(found, records.RoundStart), attachment),)
        elif kind is messages.OPEN:
            answers = (site.on_open_please(_first(found, records.OpenPlease)),)
        elif kind is messages.RESULT:
            self._result(run, _first(found, records.Result))
        else:
            raise VerificationError("participation.kind", f"{kind.message_type} is not handled here")
        return Reply(kind, True, answers), ()

    # -- studies -------------------------------------------------------------------------------------------

    def _study(self, request: Request) -> Reply:
        """Keep a study that was offered, once it verifies, and say what a person has decided of it."""
        signed, signed_roster = read_study_document(request.document)
        manifest = signed.verify()
        if manifest.digest != request.man:
            raise VerificationError(
                "participation.digest", "the offered study has another digest than was named"
            )
        roster = self._guard.check_offer(manifest, signed_roster)
        self._guard.check_coordinator(manifest)
        if self._studies.add(request.man, request.document):
            log.info("study %s %r received; read it and decide with 'wardround site approve'",
                     request.man.hex()[:12], manifest.study.name)  # fmt: skip
        decision = self._guard.decision(request.man)
        if decision == "approved":
            self._guard.check_pins(manifest, roster)
            self._run(request.man).computation.warm()
        return Reply(request.kind, True, (), decision or "received")

    def _run(self, man: bytes) -> _Run:
        """The running study of a manifest digest, begun or restored.

        Guarantee: a_decision_acts_at_once - a study denied while it runs is answered no more.
        Guarantee: an_expired_run_is_erased - at start, and at the first request after the expiry.
        Raises: RefusedError unless it is approved now.
        """
        if self._guard.decision(man) != "approved":
            raise RefusedError("participation.approval", "the study is not approved here")
        run = self._runs.get(man) or self._begin(man)
        if run.site.expire(self._minute()):
            run.computation.end()
            raise RefusedError("participation.closed", "this run is closed at this hospital")
        self._runs[man] = run
        return run

    def _begin(self, man: bytes) -> _Run:
        manifest, roster = self._approved(man)
        admitted = self._guard.check_runnable(manifest)
        params = run_params(manifest, admitted, roster, self.identity.id)
        stored = self._run_file.load(man)
        arguments = {
            "persist": lambda state: self._run_file.save(man, state.to_bytes()),
            "entropy": self._entropy,
            "sign": self.identity.protocol_key.sign,
        }
        charged_round = self._guard.last_charged_round(man)
        if stored is None:
            if charged_round:
                raise RefusedError(
                    "participation.lost", "this run's state is gone; it was charged and stays closed"
                )
            site = Site(params, **arguments)  # type: ignore[arg-type]
        else:
            site = Site.restore(
                params,
                RunState.from_bytes(stored),
                now=self._minute(),
                charged_round=charged_round,
                **arguments,  # type: ignore[arg-type]
            )
        return _Run(
            manifest,
            params,
            site,
            Computation(
                manifest.to_bytes(),
                self._guard.source(manifest),
                self._guard.split_key(self.identity.split_secret, man),
            ),
        )

    def _approved(self, man: bytes) -> tuple[Manifest, Roster]:
        manifest, signed_roster = self._studies.read(man)
        roster = self._guard.check_offer(manifest, signed_roster)
        self._guard.check_pins(manifest, roster)
        return manifest, roster

    # -- rounds --------------------------------------------------------------------------------------------

    def _ready(self, run: _Run, start: records.RoundStart, state_file: bytes) -> records.Ready:
        """R0 to R1: check, charge, compute, commit."""
        began = self._clock()
        manifest, site = run.manifest, run.site
        admitted = self._guard.check_runnable(manifest)
        if records.state_digest(state_file) != start.state:
            raise VerificationError("participation.state", "the state is not the one that the hub signed")
        state = load_state(state_file, admitted.layout, manifest.study.aggregation.state_norm_bound)
        digest = model_digest(state, admitted.layout)
        if digest != start.model_digest:
            raise VerificationError(
                "participation.model", "the state has another digest than the round names"
            )
        if start.deadline <= began:
            raise RefusedError("participation.deadline", "the round's deadline has passed")
        self._guard.check_budget(manifest, admitted, start.round)
        # Accepted before charged, so that a run file behind the ledger is known to be rolled back.
        site.on_round_start(start)
        self._guard.charge(manifest, admitted, start.round)
        log.info("study %s: round %d charged", manifest.digest.hex()[:12], start.round)
        ready_s = manifest.study.aggregation.ready_s
        left_s = min(start.deadline - self._clock(), manifest.study.aggregation.deadline_s)
        if ready_s:
            left_s = min(left_s, began + ready_s - self._clock())
        try:
            q = run.computation.compute(state_file, admitted.dim, left_s)
            return site.ready(q, np.zeros(0, dtype=np.int64), digest)
        finally:
            # The fixed time hides how long the computation took and whether it failed early; with
            # ready_s = 0 reports say that timing is not covered.
            time.sleep(max(0.0, began + ready_s - self._clock()))

    def _upload(self, run: _Run, found: tuple[Record, ...]) -> tuple[Reply, tuple[bytes, ...]]:
        """R2 to R3: mask for the cohort, record that it leaves, hand over the payload."""
        site = run.site
        header = site.on_cohort(_first(found, records.Cohort))
        self._guard.released(run.params.man, site.round, site.attempt, header.ctx)
        payload = memoryview(site.payload())
        chunks = tuple(bytes(payload[span.start : span.stop]) for span in run.params.layout.spans)
        return Reply(messages.UPLOAD, True, (header,)), chunks

    def _result(self, run: _Run, result: records.Result) -> None:
        run.site.on_result(result)
        log.info("study %s: round %d ended", run.manifest.digest.hex()[:12], run.site.round)

    def _end(self, request: Request) -> Reply:
        """Close the run: end its worker, erase its secrets.

        Guarantee: closing_erases_the_run - also one that this process has not touched since it started.
        """
        run = self._runs.pop(request.man, None)
        if run is not None:
            run.computation.end()
            run.site.close()
        if run is not None or self._erase(request.man):
            self.closed += 1
            log.info("study %s: closed, its secrets are erased", request.man.hex()[:12])
        return Reply(request.kind)

    def _expired(self, man: bytes) -> bool:
        try:
            manifest, _ = self._studies.read(man)
        except WardroundError:
            return False
        return self._minute() >= manifest.study.expires

    def _erase(self, man: bytes) -> bool:
        """Overwrite a stored run by a closed one, readable or not; false when there is nothing to erase."""
        closed = RunState(man, self.identity.id, closed=True).to_bytes()
        if self._run_file.load(man) in (None, closed):
            return False
        self._run_file.save(man, closed)
        return True


def _first(found: tuple[Record, ...], kind: type[R]) -> R:
    return _all(found, kind)[0]


def _all(found: tuple[Record, ...], kind: type[R]) -> tuple[R, ...]:
    if not all(isinstance(record, kind) for record in found):
        raise VerificationError("participation.record", f"the request must hold {kind.__name__} records")
    return found  # type: ignore[return-value]
