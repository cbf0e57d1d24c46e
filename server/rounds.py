"""One study from submission to its last round: consent, setup, rounds, one checkpoint a round.

Source: DESIGN "A round, end to end"; PROTOCOL S1-S4, C4, C5. Rules: the protocol machines decide
(common/secagg/hub.py), this module stores what they gave before and after each phase, so that a hub killed at
any point goes on from the last checkpoint; a lost round is computed again under a new number; what a study
waits for is in its status.
"""

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Final

from flwr.serverapp import Grid

from common import identity, messages
from common.admissible import check
from common.errors import FailureError, RefusedError, UnreachableError, WardroundError
from common.ledger.entries import utc_minute
from common.messages import Kind, Request
from common.roster import SignedRoster
from common.run import run_params, study_document
from common.secagg import records
from common.secagg.hub import HubRound, HubSetup, Setup
from common.secagg.records import Record
from common.study import SignedManifest
from common.tasks.models import initial_state
from common.tasks.state import check_state, load_state, model_digest, state_bytes
from server.exchange import Exchange, Take, every, only
from server.heads import Heads
from server.home import HubHome
from server.ledger import HubLedger
from server.payloads import Payloads
from server.round import Round, RoundLost, give_back
from server.store import ENDED, Checkpoint, Store, StudyRow
from server.strategy import ServerStep

log = logging.getLogger("wardround.hub.rounds")

CONSENT_PERIOD_S: Final = 0.3
CONSENT_TIMEOUT_S: Final = 10.0
SETUP_TIMEOUT_S: Final = 60.0
CLOSE_TIMEOUT_S: Final = 5.0
LOST_IN_A_ROW: Final = 3
LOST_REMEDY: Final = "Look into the causes in the log, then submit it again."


class Ended(RefusedError):  # noqa: N818 - it ends a loop, it is not a fault
    """The study was aborted or denied while it ran; its status says so already."""


class StudyRun:
    """Runs one stored study over a Grid. ``clock`` gives seconds since 1970 UTC.

    Guarantee: killed_and_resumed_equals_uninterrupted - without DP, to the last bit, for each strategy.
    """

    def __init__(
        self, home: HubHome, store: Store, grid: Grid, digest: str, clock: Callable[[], float] = time.time
    ) -> None:
        row = store.study(digest)
        self._digest, self._store, self._clock = digest, store, clock
        self._signed = SignedManifest(row.manifest, row.signature)
        self._manifest = self._signed.verify()
        self._roster = SignedRoster(row.roster, row.roster_signature)
        hub_key = identity.load_signing_key(home.hub_key)
        self._sign = hub_key.sign
        self._verified_roster = roster = self._roster.verify(identity.public_key(hub_key))
        self._admitted = check(self._manifest, None if row.status in ENDED else self._minute())
        self._params = run_params(self._manifest, self._admitted, roster, 0)
        self._home = home
        self._names = {party.id: party.name for party in self._manifest.members}
        self._model = self._model_digest = b""
        self._exchange = Exchange(grid, self._params.man, self._names, self._continue)
        self._label = f"study {digest[:12]}"
        keeps = self._manifest.study.aggregation.audit == "payloads"
        self._payloads = Payloads(home.payloads / digest, self._params.layout) if keeps else None

    def run(self) -> None:
        """From where it is to the last round. Raises WardroundError when the study cannot go on.

        Raises: UnreachableError when the hub stops; the study then stays as it is.
        """
        with closing(HubLedger(self._home, self._store)) as ledger:
            try:
                if self._store.study(self._digest).status not in ENDED:
                    self._run(ledger)
            except UnreachableError:
                raise
            except WardroundError as error:
                self._store.set_status(self._digest, "failed", error.problem)
                self._close(ledger)
                raise
            self._close(ledger)

    def _run(self, ledger: HubLedger) -> None:
        try:
            if not self._continue().directory:
                self._consent()
            self._rounds(self._setup(), ledger)
            self._status("done")
        except Ended as ended:
            log.info("%s: %s", self._label, ended.problem)

    def _close(self, ledger: HubLedger) -> None:
        """Tell every member that is attached that the run is over, so that its secrets are erased."""
        exchange = Exchange(self._exchange.grid, self._params.man, self._names, lambda: None)
        closed = json.loads(self._store.study(self._digest).closed)
        requests = {i: exchange.request(messages.CLOSE) for i in exchange.online() if i not in closed}
        for site, reply, _ in exchange.ask(messages.CLOSE, requests, CLOSE_TIMEOUT_S):
            if reply.available:
                self._store.closed_at(self._digest, site)
        ledger.catch_up(over=self._digest.__eq__)
        self._keep_payloads()

    def _keep_payloads(self) -> None:
        """Of the completed rounds alone: what a hub that was killed left behind goes."""
        if self._payloads is not None:
            self._payloads.keep_only([row.number for row in self._store.rounds(self._digest)])

    def _minute(self) -> str:
        return utc_minute(datetime.fromtimestamp(self._clock(), UTC))

    def _status(self, status: str, detail: str = "") -> None:
        row = self._continue()
        if (row.status, row.detail) != (status, detail):
            self._store.set_status(self._digest, status, detail)
            log.info("%s: %s%s", self._label, status, f": {detail}" if detail else "")

    def _continue(self) -> StudyRow:
        row = self._store.study(self._digest)
        if row.status in ENDED:
            raise Ended("rounds.ended", f"the study is {row.status}")
        return row

    def _unexpired(self) -> None:
        expires = self._manifest.study.expires
        if self._minute() >= expires:
            raise RefusedError("rounds.expired", f"the study expired at {expires}")

    # -- consent and setup ---------------------------------------------------------------------------------

    def _consult(self, sites: Collection[int], decisions: dict[int, str]) -> set[int]:
        """Offer the study; the sites that approve it now, and ``decisions`` brought up to date."""
        exchange, approving = self._exchange, set()
        offer = exchange.request(messages.STUDY, document=study_document(self._signed, self._roster))
        before = dict(decisions)
        for site, reply, _ in exchange.ask(messages.STUDY, dict.fromkeys(sites, offer), CONSENT_TIMEOUT_S):
            if reply.available:
                decisions[site] = reply.decision
                if reply.decision == "approved":
                    approving.add(site)
        if decisions != before:
            self._store.set_decisions(self._digest, decisions)
            for site in sorted(site for site in decisions if decisions[site] != before.get(site)):
                log.info("%s: %s", exchange.name(site), decisions[site])
        return approving

    def _decisions(self) -> dict[int, str]:
        decisions = json.loads(self._store.study(self._digest).decisions)
        return {int(site): said for site, said in decisions.items()}

    def _denied(self, decisions: Mapping[int, str]) -> None:
        names = ", ".join(self._names[i] for i, decision in decisions.items() if decision == "denied")
        self._store.set_status(self._digest, "denied", f"denied by {names}")

    def _consent(self) -> None:
        """Offer the study until every member has approved it; one denial ends it."""
        self._status("waiting for approval")
        decisions = self._decisions()
        while [decisions.get(i) for i in self._names] != ["approved"] * len(self._names):
            self._unexpired()
            self._consult([i for i in self._exchange.online() if decisions.get(i) != "approved"], decisions)
            if "denied" in decisions.values():
                self._denied(decisions)
            self._exchange.pause(CONSENT_PERIOD_S)

    def _setup(self) -> Setup:
        """S1 to S4, or what is left of them. Raises RefusedError when fewer than m hospitals share keys."""
        row, exchange = self._store.study(self._digest), self._exchange
        known = records.decode(records.Directory, row.directory) if row.directory else None
        setup = HubSetup(self._params, known)
        if known is None:
            self._each(
                self._names,
                messages.KEYS,
                lambda _: exchange.request(messages.KEYS),
                lambda site, found: setup.on_announce(site, only(found, records.KeyAnnounce)),
            )
        directory = setup.directory()
        if row.pairs:
            pairs = frozenset((i, j) for i, j in json.loads(row.pairs))
            return Setup(directory, records.directory_digest(self._params.man, directory.entries), pairs)
        # Before it leaves: a run has one Directory, also after a restart.
        self._store.keep_setup(self._digest, records.encode(directory), None)
        self._each(
            setup.listed,
            messages.DIRECTORY,
            lambda _: exchange.request(messages.DIRECTORY, directory),
            lambda site, found: setup.on_pair_seeds(site, every(found, records.PairSeed)),
        )
        self._each(
            setup.listed,
            messages.SEEDS,
            lambda site: exchange.request(messages.SEEDS, *setup.seeds_for(site)),
            lambda site, found: setup.on_confirm(site, only(found, records.Confirm)),
        )
        joined = self._each(
            setup.listed,
            messages.CONFIRMS,
            lambda site: exchange.request(messages.CONFIRMS, *setup.confirms_for(site)),
            lambda _site, _found: None,
        )
        # Who never got the others' confirmations has accepted no pair.
        outcome = setup.outcome()
        outcome = replace(outcome, pairs=frozenset(pair for pair in outcome.pairs if set(pair) <= joined))
        paired = outcome.cohort_among(setup.listed)
        if len(paired) < self._params.m:
            problem = f"{len(paired)} hospitals share keys, and the study needs {self._params.m}"
            remedy = "Submit it again, with a new token, when the others are back."
            raise RefusedError("rounds.pairs", problem, remedy=remedy)
        self._store.keep_setup(self._digest, records.encode(directory), list(outcome.pairs))
        log.info("%s: %d hospitals share keys", self._label, len(paired))
        return outcome

    def _each(
        self, sites: Collection[int], kind: Kind, request: Callable[[int], Request], take: Take
    ) -> set[int]:
        """One step of the setup with each of ``sites``; who has answered.

        Asked again while some are missing: for the setup's time, or ``quorum_s`` while fewer than m have
        answered: there is no Directory then.
        """
        answered: set[int] = set()
        began, quorum_s = time.monotonic(), self._manifest.study.aggregation.quorum_s

        def taken(site: int, found: tuple[Record, ...]) -> None:
            take(site, found)
            answered.add(site)

        while missing := set(sites) - answered:
            waited_s, few = time.monotonic() - began, len(answered) < self._params.m
            if waited_s >= (quorum_s if few else SETUP_TIMEOUT_S):
                break
            self._status("setting up", self._waits_for(missing) if waited_s > CONSENT_TIMEOUT_S else "")
            self._unexpired()
            requests = {site: request(site) for site in self._exchange.online() if site in missing}
            self._exchange.collect(kind, requests, CONSENT_TIMEOUT_S, taken)
            if set(sites) - answered:
                self._exchange.pause(CONSENT_PERIOD_S)
        return answered

    def _waits_for(self, missing: Collection[int]) -> str:
        return f"{self._params.m} hospitals are needed; waiting for {self._named(missing)}"

    def _named(self, sites: Collection[int]) -> str:
        return ", ".join(self._names[site] for site in sorted(sites))

    # -- rounds --------------------------------------------------------------------------------------------

    def _gather(self, setup: Setup, consult: bool) -> list[int]:
        """Wait until at least m hospitals that share keys can take part; those that are there now.

        With ``consult`` each is asked whether it still takes part, so that no hospital is charged for a round
        that others would not join. Raises RefusedError after ``quorum_s``.
        """
        listed = [entry.id for entry in setup.directory.entries]
        deadline = time.monotonic() + self._manifest.study.aggregation.quorum_s
        decisions = self._decisions()
        while True:
            self._unexpired()
            # Who has withdrawn stays out: its run is erased.
            here = [i for i in self._exchange.online() if i in listed and decisions.get(i) != "denied"]
            if consult:
                here = sorted(self._consult(here, decisions))
                if sum(decisions.get(i) != "denied" for i in listed) < self._params.m:
                    self._denied(decisions)
            if len(setup.cohort_among(here)) >= self._params.m:
                self._status("running")
                return here
            waits = self._waits_for(set(listed) - set(here))
            self._status("waiting for hospitals", waits)
            if time.monotonic() >= deadline:
                remedy = "Submit it again when they can take part."
                raise RefusedError("rounds.quorum", f"{waits} was in vain", remedy=remedy)
            self._exchange.pause(CONSENT_PERIOD_S)

    def _rounds(self, setup: Setup, ledger: HubLedger) -> None:
        study, row = self._manifest.study, self._store.study(self._digest)
        ledger.catch_up()
        heads = Heads(self._exchange, self._params, study.aggregation, self._verified_roster, ledger)
        step = ServerStep(self._manifest)
        if row.round:
            step.restore(self._store.strategy(self._digest))
            self._model = self._store.state(self._digest)
            log.info("%s: goes on after round %d", self._label, row.round)
        else:
            self._model = state_bytes(initial_state(self._manifest), self._admitted.layout)
        started = self._store.started(self._digest)
        for cut in started:
            if cut.step is None and not cut.lost:
                self._store.lose_round(self._digest, cut.number, "the hub was stopped")
        self._keep_payloads()
        lost, consult, number = 0, bool(started), len(started)
        while step.advances < study.rounds:
            if number == study.aggregation.rounds_max:
                problem = f"{number - step.advances} rounds were lost, and the study has no more"
                raise FailureError("rounds.used-up", problem, remedy=LOST_REMEDY)
            sites = self._gather(setup, consult)
            if self._payloads is not None:
                self._payloads.check_room(len(sites))
            number = self._store.start_round(self._digest)
            try:
                cosigned = heads.cosigned(number, sites)
                missing = set(sites) - cosigned
                if len(cosigned) < self._params.m:
                    raise RoundLost("rounds.heads", "the ledger was not cosigned of " + self._named(missing))
                everyone = self._round(setup, number, sorted(cosigned), step) and not missing
                ledger.catch_up()
                # A hospital that is paused, or has withdrawn, says so when it is asked for its decision.
                lost, consult = 0, not everyone or (consult and len(sites) < len(self._exchange.online()))
            except RoundLost as error:
                lost, consult = lost + 1, True
                self._store.lose_round(self._digest, number, error.problem)
                log.warning("%s: round %d lost: %s", self._label, number, error.problem)
                if lost == LOST_IN_A_ROW:
                    problem = f"{lost} rounds in a row were lost, the last because {error.problem}"
                    raise FailureError("rounds.lost", problem, remedy=LOST_REMEDY) from error
        # The last round's charges are seen by the others too: a backup from before them will be noticed.
        heads.cosigned(number + 1, self._exchange.online())

    def _round(self, setup: Setup, number: int, sites: list[int], step: ServerStep) -> bool:
        """One round and its checkpoint; whether nobody was unavailable. Raises RoundLost.

        The model is then as it was.

        A model is held as bytes, with views into them, and each copy is let go before the next is made.
        """
        layout, timing, started = self._admitted.layout, self._manifest.study.aggregation, time.monotonic()
        old = load_state(self._model, layout, timing.state_norm_bound)
        round_ = HubRound(
            self._params,
            setup,
            round=number,
            state=records.state_digest(self._model),
            model_digest=self._model_digest or model_digest(old, layout),
            deadline=int(self._clock() + timing.deadline_s) + 1,
            sign=self._sign,
        )
        say = partial(self._status, "running")
        carried = Round(self._exchange, round_, timing, say, self._payloads)
        carried.run(sites, self._model)
        sums, context = round_.finish(), round_.accumulator.ctx
        cohort = sums.cohort
        study = self._manifest.study
        names = {party.id: study.members.index(party.name) for party in self._manifest.members}
        weight = sum(study.weight(names[member]) for member in cohort)
        new = step.advance(old, sums.parameters, self._params.step, weight)
        self._model = b""
        del old
        check_state(new, layout, timing.state_norm_bound)
        self._model_digest = model_digest(new, layout)
        result = round_.result(self._model_digest)
        self._model = state_bytes(new, layout)
        transcript = round_.transcript(result).to_bytes()
        del new, sums, round_
        attempt, everyone = carried.attempts, not carried.unavailable
        del carried
        seconds = time.monotonic() - started
        checkpoint = Checkpoint(
            number=number, step=step.advances, attempt=attempt, cohort=cohort, context=context,
            sum_digest=result.sum_digest, model_digest=result.model_digest, state=self._model,
            strategy=step.to_bytes(), transcript=transcript, seconds=seconds,
        )  # fmt: skip
        self._store.complete_round(self._digest, checkpoint)
        del checkpoint
        give_back(len(self._model))
        log.info(
            "%s: round %d of %d done in %.3f s with %d hospitals%s",
            self._label, step.advances, self._manifest.study.rounds, seconds, len(cohort),
            "" if attempt == 1 else f", at attempt {attempt}",
        )  # fmt: skip
        # A hospital that is asked for its next round does not need the result first.
        self._exchange.tell(messages.RESULT, cohort, result)
        return everyone
