"""What this hospital does with each request of the hub: check, decide, compute, mask, open.

Source: DESIGN "A round, end to end", steps 2-7; PROTOCOL I1-I14. Rules: a request is answered with records
of the secure sum, with a person's decision, or with ``unavailable``, one word whatever the cause; the cause
goes to this site's own log; the charge is in the ledger before any row is touched; what leaves is made by
the release gate and then masked; what a person decides acts within a second, in the middle of a round too.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from client import heads, snapshot
from client.computation import Computation
from client.guard import Guard
from client.identity import SiteIdentity
from client.running import Running, label, only
from client.sources.source import DataSource
from client.state import RunFile, SiteHome
from client.studies import StudyFolder
from common import messages
from common.admissible import Admitted
from common.errors import BudgetExhaustedError, RefusedError, VerificationError, WardroundError
from common.identity import key_bytes
from common.ledger.entries import OutcomeReason
from common.messages import Reply, Request
from common.privacy.noise import discrete_gaussian
from common.run import read_study_document, run_params
from common.secagg import records
from common.secagg.site import Site
from common.secagg.state import RunState
from common.witness import HUB

log = logging.getLogger("wardround.site")

LOCKS: Final = 64
SETUP_STEPS: Final = 4


class Participation:
    """The hospital behind its ClientApp. Thread-safe: a study is locked but while its worker computes.

    ``entropy`` is the OS generator in the product; ``clock`` seconds since 1970 UTC; ``computation`` makes
    the handle on a study's worker from the manifest's bytes, the source, the split key and the folder for
    copies.
    """

    def __init__(
        self,
        home: SiteHome,
        *,
        entropy: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.time,
        computation: Callable[[bytes, DataSource, bytes, Path], Computation] = Computation,
    ) -> None:
        self.identity = SiteIdentity.load(home)
        self.exhausted = False
        self.closed = 0
        self._entropy = entropy
        self._clock = clock
        self._computation = computation
        self._guard = Guard(home, self.identity, self._now)
        self._heads = heads.Heads(home, self.identity, self._guard, entropy)
        self._studies = StudyFolder(home)
        self._run_file = RunFile(home.runs)
        self._copies = home.copies
        snapshot.sweep(self._copies)
        self._runs: dict[bytes, Running] = {}
        # Shared by digest: requests for studies that are none must cost no memory.
        self._locks = tuple(threading.RLock() for _ in range(LOCKS))
        self._stopping = self._paused = False
        self._said: dict[bytes, str] = {}
        # The runs in the run file that are not closed, and when each expires.
        self._open = {man: self._expiry(man) for man in self._run_file.runs() if not self._stored(man).closed}
        self._end_what_is_over()

    def close(self) -> None:
        """End the workers and close the files; secrets of running studies stay in the run file."""
        self.interrupt()
        for man, run in list(self._runs.items()):
            self._suspend(man, run)
        self._run_file.close()
        self._guard.close()

    def interrupt(self) -> None:
        """The agent is stopping: end every computation and wait; from here on all but CLOSE is refused."""
        self._stopping = True
        for run in list(self._runs.values()):
            run.retire()

    def watch(self) -> None:
        """Once a second: act on what a person or the clock has decided since, without any request.

        Guarantee: a_computation_and_a_wait_end_at_once - when the site is paused, or the study withdrawn or
        forbidden by the policy.
        Guarantee: a_withdrawn_run_is_erased_without_any_request - and one that has expired.
        Guarantee: setup_keys_are_erased_in_time - of a study whose setup is not over in four times quorum_s.
        """
        problem = ""
        try:
            paused = self._guard.paused
            if paused != self._paused:
                meaning = "every request is answered 'unavailable' until 'wardround site resume'"
                log.info("this site is %s", f"paused: {meaning}" if paused else "resumed")
            self._paused = paused
            self._end_what_is_over()
        except Exception as error:
            # What cannot be read may say that nothing must be computed.
            paused, problem = True, _said_of(error)
        if self._is_news(b"watch", problem):
            log.error("every computation is ended: %s", problem)
        for man, run in list(self._runs.items()):
            if not run.retired and (paused or self._forbidden(run)):
                self._suspend(man, run)

    def _forbidden(self, run: Running) -> bool:
        """Whether the policy has come to forbid a study that runs here."""
        try:
            self._guard.check_runnable(run.manifest)
        except Exception as error:
            log.warning("%s: it is not allowed here any more: %s", run.label, _said_of(error))
            return True
        return False

    def may_send(self, group: str) -> bool:
        """Whether what was made in a round of a study may still leave; ``group`` is its digest in hex."""
        run = self._runs.get(bytes.fromhex(group)) if len(group) == 64 else None
        return run is not None and not run.retired and not self._paused and not self._stopping

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
        man, problem = b"", ""
        try:
            request = messages.decode_request(message_type, body)
            man = request.man
            reply, payload = self._handle(request, b"".join(attachment))
        except Exception as error:
            self.exhausted |= isinstance(error, BudgetExhaustedError)
            problem = _said_of(error)
            reply, payload = Reply(kind, available=False), ()
        # The hub asks for consent several times a second.
        if self._is_news(man, problem) if kind is messages.STUDY else problem:
            log.warning("%s: %s: unavailable: %s", label(man), message_type, problem)
        return messages.encode_reply(reply), payload

    def _is_news(self, man: bytes, problem: str) -> bool:
        """Whether there is a problem, and another than the last time."""
        if len(self._said) >= LOCKS:
            self._said.clear()
        last, self._said[man] = self._said.get(man), problem
        return bool(problem) and problem != last

    def _handle(self, request: Request, attachment: bytes) -> tuple[Reply, tuple[bytes, ...]]:
        kind, man, found = request.kind, request.man, request.records
        if kind is messages.CLOSE:
            self._end(man, "study_aborted")
            return Reply(kind), ()
        if kind is messages.STUDY:
            return self._study(request), ()
        if kind is messages.CONSENT:
            decision = self._decision(man) or "received"
            return Reply(kind, True, (), "consented" if self._guard.consented(man) else decision), ()
        if kind is messages.READY:
            return Reply(kind, True, (self._ready(man, only(found, records.RoundStart), attachment),)), ()
        with self._lock(man):
            self._check_approved(man)
            if kind is messages.RESULT:
                self._result(man, only(found, records.Result))
                return Reply(kind), ()
            run = self._run(man)
            if kind is messages.UPLOAD:
                return self._upload(run, only(found, records.Cohort))
            answer = self._heads.answer if kind in heads.KINDS else Running.answer
            return Reply(kind, True, answer(run, kind, found)), ()

    # -- studies -------------------------------------------------------------------------------------------

    def _decision(self, man: bytes) -> str:
        """What a person has decided. Raises RefusedError when nothing is answered now, whatever it was.

        Guarantee: a_decision_acts_at_once - a study denied while it runs is answered no more.
        """
        if self._stopping or self._guard.paused:
            why = "the agent is being stopped" if self._stopping else "this site is paused"
            raise RefusedError("participation.paused", why)
        decision = self._guard.decision(man)
        if decision == "denied" and man in self._open:
            self._end(man, "site_stopped")
        return decision

    def _check_approved(self, man: bytes) -> None:
        if self._decision(man) != "approved":
            raise RefusedError("participation.approval", "the study is not approved here")

    def _study(self, request: Request) -> Reply:
        """Keep a study that was offered, once it verifies, and say what a person has decided of it.

        One that is approved, but could not be computed or paid now, is unavailable.
        """
        man = request.man
        decision = self._decision(man)
        signed, signed_roster = read_study_document(request.document)
        manifest = signed.verify()
        if manifest.digest != man:
            problem = "the offered study has another digest than was named"
            raise VerificationError("participation.digest", problem)
        roster = self._guard.check_offer(manifest, signed_roster)
        self._guard.check_coordinator(manifest)
        if self._studies.add(man, request.document):
            log.info("%s %r received; read it and decide with 'wardround site approve'",
                     label(man), manifest.study.name)  # fmt: skip
        if decision == "approved":
            self._guard.check_window()
            self._guard.check_pins(manifest, roster)
            self._guard.check_budget(manifest, self._guard.check_runnable(manifest), 1)
            with self._lock(man):
                self._run(man).computation.warm()
        return Reply(request.kind, True, (), decision or "received")

    def _run(self, man: bytes) -> Running:
        """The running study of a manifest digest, begun or restored.

        Guarantee: an_expired_run_is_erased - at start, while the agent runs, and at any request.
        """
        run = self._runs.get(man)
        if run is None or run.retired:
            if run is not None:
                run.site.drop_out()
            run = self._begin(man)
        if run.site.expire(self._minute()):
            run.computation.end()
            raise RefusedError("participation.closed", "this run is closed at this hospital")
        self._runs[man], self._open[man] = run, run.manifest.study.expires
        if self._stopping:
            # The agent was stopped before this run was there to be retired.
            run.retire()
        return run

    def _begin(self, man: bytes) -> Running:
        manifest, signed_roster = self._studies.read(man)
        roster = self._guard.check_offer(manifest, signed_roster)
        self._guard.check_pins(manifest, roster)
        admitted = self._guard.check_runnable(manifest)
        params = run_params(manifest, admitted, roster, self.identity.id)
        stored = self._run_file.load(man)
        state = None if stored is None else RunState.from_bytes(stored)
        arguments: dict[str, Any] = {
            "persist": lambda state: self._run_file.save(man, state.to_bytes()),
            "entropy": self._entropy,
            "sign": self.identity.protocol_key.sign,
            "outsiders_only": self._guard.policy.rules.outsiders_only,
            "sampler": discrete_gaussian,
        }
        charged_round = self._guard.last_charged_round(man)
        if state is not None:
            released = self._guard.last_released(man)
            arguments |= {"now": self._minute(), "charged_round": charged_round, "released": released}
            site = Site.restore(params, state, **arguments)
        elif charged_round:
            problem = "this run's state is gone; it was charged and stays closed"
            raise RefusedError("participation.lost", problem)
        else:
            site = Site(params, **arguments)
        split_key = self._guard.split_key(self.identity.split_secret, man)
        source = self._guard.source(manifest)
        computation = self._computation(manifest.to_bytes(), source, split_key, self._copies)
        own = next(party.name for party in manifest.members if party.id == self.identity.id)
        computation.member = manifest.study.members.index(own)
        ledger_keys = {party.id: roster.member(party.id).ledger_key for party in manifest.members}
        ledger_keys[HUB] = self.identity.hub_key
        digest = state.model_digest if state else b""
        # The hub may wait for a quorum at each step of the setup.
        setup_ends = self._clock() + SETUP_STEPS * manifest.study.aggregation.quorum_s
        return Running(manifest, params, site, computation, digest, ledger_keys, setup_ends)

    # -- rounds --------------------------------------------------------------------------------------------

    def _ready(self, man: bytes, start: records.RoundStart, state_file: bytes) -> records.Ready:
        """R0 to R1: check, charge, compute, commit."""
        began = self._clock()
        with self._lock(man):
            self._check_approved(man)
            run = self._run(man)
            # No worker is started, nor waited for, for a round that would be refused.
            new = start.round > run.site.round
            if new and not run.computation.running:
                self._guard.check_budget(run.manifest, self._guard.check_runnable(run.manifest), start.round)
        if new:
            timeout_s = min(start.deadline - began, run.manifest.study.aggregation.deadline_s)
            run.await_worker(start, timeout_s)
        with self._lock(man):
            self._check_approved(man)
            run = self._run(man)
            cut, admitted, digest = self._accept(run, start, state_file, self._clock())
        timing = run.manifest.study.aggregation
        left_s = min(start.deadline - self._clock(), timing.deadline_s)
        if timing.ready_s:
            left_s = min(left_s, began + timing.ready_s - self._clock())
        try:
            q = self._compute(run, state_file, admitted, left_s, cut)
            with self._lock(man):
                record = run.ready(q, digest, cut)
        finally:
            # The fixed time hides how long the computation took and whether it failed early; with
            # ready_s = 0 reports say that timing is not covered.
            cut.wait(max(0.0, began + timing.ready_s - self._clock()))
        with self._lock(man):
            run.leaves(cut)
        return record

    def _compute(
        self, run: Running, state_file: bytes, admitted: Admitted, left_s: float, cut: threading.Event
    ) -> NDArray[np.int64]:
        """The vector of a charged round, int64 [dim].

        Guarantee: a_failure_after_the_charge_is_a_zero_with_noise - with shared noise, where a hospital that
        dropped out would tell that its rows made the computation fail (I14); a round that was cut gives none.
        """
        try:
            return run.computation.compute(state_file, admitted.dim, left_s, cut)
        except WardroundError as error:
            if not admitted.shared or cut.is_set():
                raise
            log.warning("%s: its rows contribute nothing to this round: %s", run.label, error)
            return np.zeros(admitted.dim, dtype=np.int64)

    def _accept(
        self, run: Running, start: records.RoundStart, state_file: bytes, now: float
    ) -> tuple[threading.Event, Admitted, bytes]:
        """Check and charge a round; what cuts it short, what follows from the manifest, the model's digest.

        Guarantee: a_newer_round_ends_the_older - at once, unless its worker computes for the first time, and
        only a round that the machine accepts.
        """
        manifest = run.manifest
        admitted = self._guard.check_runnable(manifest)
        digest = run.check_model(start, state_file, admitted)
        if start.deadline <= now:
            raise RefusedError("participation.deadline", "the round's deadline has passed")
        self._guard.check_window()
        opted_out = self._guard.opt_outs(manifest)
        self._guard.check_budget(manifest, admitted, start.round)
        became = run.became(start.model_digest)
        self._heads.spend(run, start.round)
        # Accepted before charged, so that a run file behind the ledger is known to be rolled back.
        run.site.on_round_start(start)
        cut = run.accepted(start.model_digest)
        run.computation.opted_out = opted_out
        self._settle(run.params.man, became)
        self._guard.charge(manifest, admitted, start.round)
        log.info("%s: round %d charged", run.label, start.round)
        return cut, admitted, digest

    def _upload(self, run: Running, cohort: records.Cohort) -> tuple[Reply, tuple[bytes, ...]]:
        """R2 to R3: mask for the cohort, record that it leaves, hand over the payload."""
        run.asked()
        # What the policy forbids since the charge does not leave any more.
        self._guard.check_runnable(run.manifest)
        site = run.site
        header = site.on_cohort(cohort)
        size = len(site.cohort)
        self._guard.released(
            run.params.man, site.round, site.attempt, header.ctx, size, run.params.noise_of(size)
        )
        log.info("%s: round %d uploaded, attempt %d", run.label, site.round, site.attempt)
        payload = memoryview(site.payload())
        chunks = tuple(bytes(payload[span.start : span.stop]) for span in run.params.layout.spans)
        return Reply(messages.UPLOAD, True, (header,)), chunks

    def _result(self, man: bytes, result: records.Result) -> None:
        """R6: the opened round is over. The hub's last result may be overtaken by its closing of the run."""
        if man in self._open:
            self._run(man).site.on_result(result)
        else:
            manifest, _ = self._studies.read(man)
            records.check_signature(result, man, key_bytes(manifest.hub), "the hub")
        self._settle(man, "completed", result.ctx)

    def _settle(self, man: bytes, reason: OutcomeReason, ctx: bytes = b"") -> None:
        """Write into the ledger what became of the last charged round, unless it stands there already."""
        try:
            if round_number := self._guard.settle(man, reason, ctx):
                log.info("%s: round %d: %s", label(man), round_number, reason.replace("_", " "))
        except WardroundError as error:
            # It changes nothing about what was spent, and must not stand in the way of erasing.
            log.warning("%s: the outcome was not recorded: %s", label(man), error)

    # -- the end -------------------------------------------------------------------------------------------

    def _suspend(self, man: bytes, run: Running) -> None:
        """Give a run up as a restart does: only an upload that was made can still be opened."""
        run.retire()
        with self._lock(man):
            run.site.drop_out()
            if not run.site.attempt:
                self._settle(man, "site_stopped")

    def _end_what_is_over(self) -> None:
        for man, expires in list(self._open.items()):
            if self._minute() >= expires or self._guard.decision(man) == "denied":
                self._end(man, "site_stopped")
        for man, run in list(self._runs.items()):
            if run.site.setting_up and self._clock() >= run.setup_ends:
                with self._lock(man):
                    run.site.end_setup()
                log.info("%s: the time for its setup is over: its setup keys are erased", run.label)

    def _end(self, man: bytes, reason: OutcomeReason) -> None:
        """Kill the worker, erase the secrets, say what became of the last round; again changes nothing.

        Guarantee: closing_erases_the_run - also one that this process has not touched since it started.
        """
        run = self._runs.get(man)
        if run is not None:
            # Not under the lock: at once.
            run.retire()
        with self._lock(man):
            run, state = self._runs.pop(man, None), self._stored(man)
            if run is not None:
                run.retire()
                run.site.close()
            elif not state.closed:
                self._run_file.save(man, state.ended().to_bytes())
            self._open.pop(man, None)
            if run is None and state.closed:
                return
            self.closed += 1
            self._guard.closed(man)
            log.info("%s: closed, its secrets are erased", label(man))
            if state.opened is None:
                # What was opened may have ended well: the result says so, if it comes.
                self._settle(man, reason)

    def _lock(self, man: bytes) -> threading.RLock:
        return self._locks[man[0] % LOCKS]

    def _stored(self, man: bytes) -> RunState:
        """The state in the run file: none is a closed one, and one that cannot be read is open."""
        stored, me = self._run_file.load(man), self.identity.id
        try:
            return RunState(man, me, closed=True) if stored is None else RunState.from_bytes(stored)
        except VerificationError:
            return RunState(man, me)

    def _expiry(self, man: bytes) -> str:
        try:
            return self._studies.read(man)[0].study.expires
        except WardroundError:
            return "never"


def _said_of(error: Exception) -> str:
    # The type alone: the text of an unforeseen exception might quote a row.
    return str(error) if isinstance(error, WardroundError) else f"internal {type(error).__name__}"
