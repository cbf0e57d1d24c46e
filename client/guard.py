"""The last word before any computation: policy, approval, expiry, pins, budget, and the charge itself.

Source: DESIGN "A round, end to end", step 4; PRIVACY "Registers, budget, filter". Rules: deny by default;
the policy is read anew each time, so lowering a cap acts at once; a decision on the budget and the charge
that follows from it are one step under the ledger's lock; nothing here depends on rows.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar

from client import rules
from client.charges import Charges
from client.identity import SiteIdentity, load_policy
from client.pins import Pins
from client.reservations import Reservations
from client.settings import Policy, Register
from client.sources.opt_out import read_opt_outs
from client.sources.source import DataSource
from client.state import SiteHome, write_durable
from client.studies import StudyFolder
from common.admissible import Admitted, check
from common.encoding import canonical_json, derive, parse_canonical_json
from common.errors import BudgetExhaustedError, RefusedError, VerificationError
from common.identity import key_text, public_key
from common.ledger import entries as leaves
from common.ledger.entries import (
    Approval,
    Charge,
    Closed,
    Consent,
    Entry,
    Opened,
    OptOuts,
    Outcome,
    OutcomeReason,
    Pause,
    PolicyChange,
    Rules,
)
from common.ledger.overrides import standing
from common.ledger.store import Ledger
from common.privacy.decimals import text_of
from common.privacy.events import Event
from common.privacy.filter import Cap, admits, odometer, rounds_left
from common.roster import Roster, SignedRoster
from common.study import Manifest, NoDifferentialPrivacy

E = TypeVar("E", bound=Entry)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a register has spent, by the filter, against its caps in force.

    ``reserved`` are the rounds that approved studies have reserved, by their names, first come first;
    ``more_rounds`` how many more like those of ``like``, the study charged last or approved last, the filter
    would admit after them.
    """

    epsilon_t: float
    epsilon_w: float
    cap: Cap
    charges: int
    reserved: tuple[tuple[str, int], ...]
    like: str
    more_rounds: int
    closed: bool
    reopened: bool


class _Recorded(Exception):  # noqa: N818 - nothing is wrong: the ledger says so already
    pass


class Guard:
    """Every rule of this hospital that a study must meet, and the ledger that remembers. Thread-safe.

    ``now`` gives the aware local time.

    Guarantee: nothing_is_charged_over_the_cap - also by two guards on one ledger at once.
    """

    def __init__(self, home: SiteHome, identity: SiteIdentity, now: Callable[[], datetime]) -> None:
        self._home = home
        self._identity = identity
        self._now = now
        self._pins = Pins(home)
        self._reservations = Reservations(StudyFolder(home), self.plan, now)
        self._charging = threading.Lock()
        register = self.policy.privacy_register
        self.register_id = register.id
        self._charges = Charges(register.id)
        self._actor = key_text(public_key(identity.ledger_key))
        self._ledger = Ledger.open(home.ledger, identity.ledger_key, clock=now)
        try:
            self._open_register(register)
            self._record(self.policy)
            self._check_mark()
        except BaseException:
            self._ledger.close()
            raise

    def close(self) -> None:
        """Close the ledger's file."""
        self._ledger.close()

    @property
    def policy(self) -> Policy:
        """The policy as it stands on disk now."""
        return load_policy(self._home)

    def source(self, manifest: Manifest) -> DataSource:
        """The extract that the study names. Raises RefusedError when the policy offers none."""
        return self.policy.source(manifest.study.data)

    def split_key(self, split_secret: bytes, man: bytes) -> bytes:
        """The key of a study's row and split choices, 32 bytes: of this register and study alone."""
        return derive(split_secret, "split", bytes.fromhex(self.register_id), man)

    # -- what may run --------------------------------------------------------------------------------------

    def check_offer(self, manifest: Manifest, signed_roster: SignedRoster) -> Roster:
        """Check that an offered study is this hub's and names this hospital; the verified roster.

        Raises: VerificationError.
        """
        if manifest.hub != key_text(self._identity.hub_key):
            raise VerificationError("guard.hub", "the study names another hub than this site joined")
        roster = signed_roster.verify(self._identity.hub_key)
        if roster.digest.hex() != manifest.roster:
            raise VerificationError("guard.roster", "the study names another roster than came with it")
        own = roster.member(self._identity.id)
        keys = (public_key(self._identity.protocol_key), public_key(self._identity.ledger_key))
        if (own.protocol_key, own.ledger_key) != keys:
            raise VerificationError(
                "guard.own-keys", "the roster holds other keys for this hospital than its own",
                remedy="Call the coordinator on a known number: somebody may be impersonating this site.",
            )  # fmt: skip
        if all((party.id, party.name) != (self._identity.id, own.name) for party in manifest.members):
            raise VerificationError("guard.member", "this hospital is not a member of the study")
        return roster

    def check_coordinator(self, manifest: Manifest) -> None:
        """As ``client.rules.check_coordinator``, by the policy as it stands now."""
        rules.check_coordinator(self.policy, manifest)

    def check_runnable(self, manifest: Manifest) -> Admitted:
        """Check admissibility, expiry and every rule of the policy.

        Raises: UsageError for a manifest that cannot be run; RefusedError naming the policy's rule.
        """
        admitted = check(manifest, self._now().strftime("%Y-%m-%dT%H:%MZ"))
        rules.check_policy(self.policy, manifest, admitted)
        return admitted

    def opt_outs(self, manifest: Manifest) -> frozenset[str]:
        """The patients to leave out of the study's extract; a changed list stands in the ledger then.

        Guarantee: changed_opt_outs_are_recorded - by a digest under this site's secret, before any charge.
        Raises: RefusedError naming the file and the line.
        """
        name, source = manifest.study.data, self.source(manifest)
        found = read_opt_outs(Path(source.opt_out)) if source.opt_out else frozenset[str]()
        parts = (bytes.fromhex(self.register_id), name.encode(), *(p.encode() for p in sorted(found)))
        keyed = derive(self._identity.split_secret, "opt-outs", *parts).hex()

        def decide(entries: Sequence[Entry]) -> OptOuts:
            last = _last(entries, OptOuts, lambda said: said.source == name)
            if last.digest == keyed if last else not found:
                raise _Recorded
            return OptOuts(actor=self._actor, source=name, digest=keyed)

        with suppress(_Recorded):
            self._ledger.append_if(decide)
        return found

    def check_window(self) -> None:
        """Refuse a round that would begin outside the training window."""
        rules.check_window(self.policy, self._now())

    def check_pins(self, manifest: Manifest, roster: Roster) -> None:
        """Check every other member's keys against the fingerprints that a person accepted here."""
        self._pins.check(manifest, roster, self._identity.id)

    def unpinned(self, manifest: Manifest, roster: Roster) -> Mapping[str, str]:
        """Names and fingerprints of members that nobody here has accepted yet."""
        return self._pins.unpinned(manifest, roster, self._identity.id)

    # -- decisions -----------------------------------------------------------------------------------------

    def decision(self, man: bytes) -> str:
        """``approved``, ``denied`` or empty: the latest decision on a manifest digest."""
        return self._decision(self._ledger.entries(), man)

    @staticmethod
    def _decision(entries: Sequence[Entry], man: bytes) -> str:
        name = man.hex()
        last = _last(entries, Approval, lambda approval: approval.manifest == name)
        return "" if last is None else last.decision

    def decide(self, manifest: Manifest, roster: Roster, decision: str, reason: str) -> None:
        """Write a person's decision into the ledger; approving pins the members' fingerprints."""
        leaves.check_reason(reason)
        if decision == "approved":
            self._pins.accept(self.unpinned(manifest, roster))
        said: Literal["approved", "denied"] = "approved" if decision == "approved" else "denied"
        name = manifest.digest.hex()
        self._ledger.append(Approval(actor=self._actor, manifest=name, decision=said, reason=reason))

    @property
    def paused(self) -> bool:
        """Whether a person has paused this site."""
        last = _last(self._ledger.entries(), Pause)
        return last is not None and last.decision == "paused"

    def pause(self, decision: Literal["paused", "resumed"], reason: str) -> None:
        """Write a person's decision into the ledger. Raises RefusedError when it stands there already."""
        leaves.check_reason(reason)
        self._ledger.append(Pause(actor=self._actor, decision=decision, reason=reason))

    # -- the budget ----------------------------------------------------------------------------------------

    def plan(self, admitted: Admitted, round_number: int) -> Event:
        """The event that a round of the study charges. Its id is random, or none is ever charged twice."""
        return admitted.event(self.register_id, round_number, 1, os.urandom(16).hex())

    def check_budget(
        self, manifest: Manifest, admitted: Admitted, round_number: int, rounds: int = 1
    ) -> None:
        """Refuse what the register cannot pay, before anything changes.

        Raises: BudgetExhaustedError saying how many such rounds are left; RefusedError without DP for others
        than the members of the first such study, and for a site that was restored from a backup.
        """
        event = self.plan(admitted, round_number)
        entries = self._ledger.entries()
        if standing(entries).closed:
            problem = "this site was restored from a backup: its register is closed for every study"
            remedy = "Make a new site and have it admitted, or have two officers reopen it: 'site override'."
            raise RefusedError("guard.restored", problem, remedy=remedy)
        cap, history = self._cap(entries, self.policy), self._charges.settled(entries)
        reserved = self._reservations.events(entries, manifest.digest.hex())
        self._check_no_dp_members(manifest, history)
        if event.kind == "no_dp":
            return
        if rounds == 1:
            if not admits(history, event, cap, reserved).admitted:
                raise self._exhausted(0, 1)
            return
        left = rounds_left(history, event, cap, reserved)
        if left < rounds:
            raise self._exhausted(left, rounds)

    def charge(self, manifest: Manifest, admitted: Admitted, round_number: int) -> Event:
        """Decide and append the charge under one lock, durable when this returns.

        Up to ``rounds_max`` rounds of a study may be charged: one that was lost is computed again under
        another number, and both are paid.

        Raises: BudgetExhaustedError, RefusedError; nothing is appended then.
        """
        event, policy = self.plan(admitted, round_number), self.policy

        def decide(entries: Sequence[Entry]) -> Charge:
            # Between the checks before this one and the lock a person may have decided otherwise.
            if self._decision(entries, manifest.digest) == "denied" or _recorded(entries) != rules.recorded(
                policy
            ):
                raise RefusedError("guard.decided", "the study was denied, or the policy changed, just now")
            cap, history = self._cap(entries, policy), self._charges.settled(entries)
            rounds = [past.round for past in history if past.manifest_digest == event.manifest_digest]
            if event.round in rounds:
                raise RefusedError("guard.round-charged", "this round has been charged before")
            if len(rounds) >= manifest.study.aggregation.rounds_max:
                raise RefusedError("guard.rounds-spent", "all rounds that were approved have been charged")
            self._check_no_dp_members(manifest, history)
            reserved = self._reservations.events(entries, event.manifest_digest)
            if event.kind != "no_dp" and not admits(history, event, cap, reserved).admitted:
                raise self._exhausted(0, 1)
            return Charge(actor=self._actor, event=event.to_fields())

        with self._charging:
            self._record(policy)
            seq = self._ledger.append_if(decide)
            # Outside backups: a ledger that is behind this mark is an older copy of itself.
            write_durable(self._home.ledger_mark, canonical_json({"seq": seq, "event": event.event_id}))
        return event

    def _check_no_dp_members(self, manifest: Manifest, history: Sequence[Event]) -> None:
        """PROTOCOL I12: without DP, a register takes part with one set of hospitals, in all runs."""
        if not isinstance(manifest.study.privacy, NoDifferentialPrivacy):
            return
        here = {party.id for party in manifest.members}
        for digest in {event.manifest_digest for event in history if event.kind == "no_dp"}:
            earlier, _ = StudyFolder(self._home).read(bytes.fromhex(digest))
            differing = here ^ {party.id for party in earlier.members}
            if differing:
                names = {party.id: party.name for party in (*manifest.members, *earlier.members)}
                whose = ", ".join(names[member] for member in sorted(differing))
                problem = f"the difference of two sums may be the data of {whose}"
                remedy = "A study without differential privacy must have the members of the first one."
                raise RefusedError("guard.no-dp-members", problem, remedy=remedy)

    def _check_mark(self) -> None:
        """Refuse a ledger that lacks the last charge this folder remembers.

        Guarantee: a_restored_ledger_is_refused - an older copy beside the run folder it belongs to.
        Raises: RefusedError.
        """
        if not self._home.ledger_mark.exists():
            return
        mark = parse_canonical_json(self._home.ledger_mark.read_bytes(), "the ledger's mark")
        entries = self._ledger.entries()
        entry = entries[mark["seq"]] if mark["seq"] < len(entries) else None
        if not isinstance(entry, Charge) or entry.event_id != mark["event"]:
            problem = "the ledger lacks a charge that was made here: it is an older copy"
            remedy = "Put the newest ledger.db back; without it this register stays closed."
            raise RefusedError("guard.ledger-behind", problem, remedy=remedy)

    def released(
        self, man: bytes, round_number: int, attempt: int, ctx: bytes, size: int = 0, variance: int = 0
    ) -> None:
        """Record, before its first byte leaves, that an upload of a charged round leaves; once an attempt.

        With shared noise, ``size`` of the cohort and ``variance`` of the own share in squared grid units: the
        round is settled at the least of them.

        Raises: RefusedError when the ledger holds no charge for that round.
        """
        last = self._charges.last(self._ledger.entries(), man)
        if last is None or last[0].round != round_number:
            raise RefusedError("guard.not-charged", "nothing is charged for this round")
        event, outcomes = last
        if all((said.attempt, said.ctx) != (attempt, ctx.hex()) for said in outcomes):
            self._append_outcome(event, "upload_started", attempt, ctx.hex(), size, variance)

    def settle(self, man: bytes, reason: OutcomeReason, ctx: bytes = b"") -> int:
        """Record, once, what became of the last charged round of a study; its number, 0 if nothing was new.

        ``ctx`` names the upload that it must be about. Nothing is given back.
        """
        last = self._charges.last(self._ledger.entries(), man)
        if last is None or any(said.reason != "upload_started" for said in last[1]):
            return 0
        event, outcomes = last
        attempt, left = (outcomes[-1].attempt, outcomes[-1].ctx) if outcomes else (1, None)
        if ctx and left != ctx.hex():
            raise RefusedError("guard.context", "the result is of another upload than the last")
        self._append_outcome(event, reason, attempt, left)
        return event.round

    def closed(self, man: bytes) -> None:
        """Record, once, that a study that was approved here is over: nothing is reserved for it any more."""
        name = man.hex()

        def decide(entries: Sequence[Entry]) -> Closed:
            said = [e for e in entries if isinstance(e, Approval | Closed) and e.manifest == name]
            if not said or isinstance(said[-1], Closed):
                raise _Recorded
            return Closed(actor=self._actor, manifest=name)

        with suppress(_Recorded):
            self._ledger.append_if(decide)

    def leaf_hashes(self) -> Sequence[bytes]:
        """The hash of every leaf of the ledger, in order."""
        return self._ledger.leaf_hashes()

    def _append_outcome(
        self,
        event: Event,
        reason: OutcomeReason,
        attempt: int,
        ctx: str | None,
        size: int = 0,
        variance: int = 0,
    ) -> None:
        fields = {"actor": self._actor, "event_id": event.event_id, "attempt": attempt, "ctx": ctx}
        if variance:
            fields |= {"U_size": size, "s_g_squared": variance}
        state = "charged" if ctx is None else "released"
        self._ledger.append(Outcome.model_validate({**fields, "state": state, "reason": reason}))

    def last_charged_round(self, man: bytes) -> int:
        """The last round of a manifest that the ledger has charged, 0 for none."""
        history = self._charges.settled(self._ledger.entries())
        return max((event.round for event in history if event.manifest_digest == man.hex()), default=0)

    def last_released(self, man: bytes) -> tuple[int, bytes]:
        """Attempt and context of the last recorded upload of the last charged round, (0, b"") for none."""
        last = self._charges.last(self._ledger.entries(), man)
        left = [said for said in last[1] if said.reason == "upload_started"] if last else []
        return (left[-1].attempt, bytes.fromhex(left[-1].ctx or "")) if left else (0, b"")

    def budget(self) -> Budget:
        """What the register has spent so far, the caps in force, and what is spoken for."""
        entries = self._ledger.entries()
        history, cap, now = self._charges.settled(entries), self._cap(entries, self.policy), standing(entries)
        rounds = self._reservations.rounds(entries)
        last = history[-1].manifest_digest if history else next(reversed(rounds), "")
        like = self._reservations.plan(last)
        more = 0
        if like.event is not None and not now.closed:
            more = rounds_left(history, like.event, cap, self._reservations.events(entries))
        return Budget(
            odometer(history, cap.delta, "t"),
            odometer(history, cap.delta, "w"),
            cap,
            len(history),
            tuple((self._reservations.plan(digest).name, count) for digest, count in rounds.items()),
            like.name,
            more,
            now.closed,
            now.reopened,
        )

    def rounds_left(self, manifest: Manifest, admitted: Admitted) -> int:
        """How many more rounds of a study the register could pay, after those reserved by earlier ones."""
        entries = self._ledger.entries()
        reserved = self._reservations.events(entries, manifest.digest.hex())
        return rounds_left(self._charges.settled(entries), self.plan(admitted, 1), self.cap, reserved)

    # -- release consent -------------------------------------------------------------------------------------

    def consent(self, man: bytes, decision: Literal["given", "withdrawn"], reason: str) -> None:
        """Write a person's word on whether a study's model may leave, for a study that was approved here.

        Raises: RefusedError for another study, or where the ledger says so already.
        """
        leaves.check_reason(reason)
        name = man.hex()

        def decide(entries: Sequence[Entry]) -> Consent:
            said = (entry for entry in entries if isinstance(entry, Approval) and entry.manifest == name)
            if all(entry.decision == "denied" for entry in said):
                raise RefusedError("guard.consent", "the study was never approved here")
            if self._consented(entries, man) == (decision == "given"):
                raise RefusedError("guard.consent", "that is what the ledger says already")
            return Consent(actor=self._actor, manifest=name, decision=decision, reason=reason)

        self._ledger.append_if(decide)

    def consented(self, man: bytes) -> bool:
        """Whether the last word here is that the study's model may leave; a denied study has none."""
        entries = self._ledger.entries()
        return self._consented(entries, man) and self._decision(entries, man) == "approved"

    @staticmethod
    def _consented(entries: Sequence[Entry], man: bytes) -> bool:
        last = _last(entries, Consent, lambda consent: consent.manifest == man.hex())
        return last is not None and last.decision == "given"

    @property
    def cap(self) -> Cap:
        """The caps in force: the policy's, and never above the register's first or those of an override."""
        return self._cap(self._ledger.entries(), self.policy)

    def _cap(self, entries: Sequence[Entry], policy: Policy) -> Cap:
        opened = self._opened(entries)
        cap = policy.privacy_register.cap
        if opened is None or policy.privacy_register.id != self.register_id:
            raise RefusedError(
                "guard.register", "the policy names another register than this ledger's",
                remedy="Restore register.id in policy.toml.",
            )  # fmt: skip
        limit = standing(entries)
        most_t, most_w = float(limit.epsilon_t), float(limit.epsilon_w or 0)
        if cap.epsilon_t > most_t or (cap.epsilon_w or 0.0) > most_w or text_of(cap.delta) != limit.delta:
            problem = "the policy's caps are above those of the register, or delta differs"
            remedy = "Set them back in policy.toml; two officers may raise caps: 'wardround site override'."
            raise RefusedError("guard.cap-raised", problem, remedy=remedy)
        return cap

    def _exhausted(self, left: int, rounds: int) -> BudgetExhaustedError:
        problem = f"the register can pay {left} more such rounds, and {rounds} are asked for"
        remedy = "Deny the study, or ask for one with fewer rounds or more noise."
        return BudgetExhaustedError("budget.exhausted", problem, remedy=remedy, rounds_left=left)

    def _record(self, policy: Policy) -> None:
        """Write into the ledger what the policy allows, when that is not what stands there.

        Guarantee: policy_changes_are_recorded - before anything is charged under them.
        """
        after = rules.recorded(policy)

        def decide(entries: Sequence[Entry]) -> PolicyChange:
            before = _recorded(entries)
            if before == after:
                raise _Recorded
            return PolicyChange(actor=self._actor, before=before, after=after)

        with suppress(_Recorded):
            self._ledger.append_if(decide)

    def _opened(self, entries: Sequence[Entry]) -> Opened | None:
        return _last(entries, Opened, lambda opened: opened.register_id == self.register_id)

    def _open_register(self, register: Register) -> None:
        """Write the register's first entry, once, with the caps of the policy."""
        first = Opened(
            actor=self._actor,
            register_id=register.id,
            epsilon_t=text_of(register.epsilon_t),
            epsilon_w=text_of(register.epsilon_w),
            delta=text_of(register.delta),
        )

        def decide(entries: Sequence[Entry]) -> Opened:
            if self._opened(entries) is None and entries:
                raise RefusedError(
                    "guard.register", "the policy names a register that this ledger never opened",
                    remedy="Restore register.id in policy.toml; a new register needs a new site.",
                )  # fmt: skip
            return first

        if self._opened(self._ledger.entries()) is None:
            try:
                self._ledger.append_if(decide)
            except RefusedError:
                # Another process may have opened it between the look and the lock.
                if self._opened(self._ledger.entries()) is None:
                    raise


def _last(entries: Sequence[Entry], kind: type[E], fits: Callable[[E], bool] = lambda _: True) -> E | None:
    """The newest entry of a kind that fits."""
    return next((entry for entry in reversed(entries) if isinstance(entry, kind) and fits(entry)), None)


def _recorded(entries: Sequence[Entry]) -> Rules | None:
    """What the policy allowed when the ledger was told last."""
    last = _last(entries, PolicyChange)
    return None if last is None else last.after
