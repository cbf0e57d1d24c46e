"""How one ledger entry may follow another.

Source: PRIVACY "Registers, budget, filter"; DESIGN "Ledger". Rules: leaves are numbered from 0 and time
never goes backwards; a ledger is a hospital's or the hub's from its first entry; the same rules hold for
whoever writes and whoever audits.
"""

from collections.abc import Iterator
from typing import Final, get_args

from common.errors import RefusedError
from common.ledger.entries import (
    Charge,
    Completed,
    Ended,
    Entry,
    HubEntry,
    Membership,
    Opened,
    Outcome,
    Override,
    Pause,
    PolicyChange,
    Restored,
    Rules,
    Submission,
)

_HUB: Final = get_args(HubEntry)

Rule = tuple[bool, str, str]
"""Whether a rule holds, its code and what is wrong otherwise."""


class History:
    """What the entries so far allow to come next. One instance follows one ledger from its beginning."""

    __slots__ = (
        "_ended",
        "_events",
        "_members",
        "_paused",
        "_policy",
        "_registers",
        "_restored",
        "_steps",
        "last",
    )

    def __init__(self) -> None:
        self.last: Entry | None = None
        self._paused = self._restored = False
        self._policy: Rules | None = None
        self._registers: set[str] = set()
        self._events: set[str] = set()
        self._steps: dict[str, int] = {}
        self._ended: set[str] = set()
        self._members: dict[int, str] = {}

    def check(self, entry: Entry) -> None:
        """Check that ``entry`` may come next; nothing is remembered.

        Guarantee: time_never_goes_backwards - an entry older than the one before it is refused.
        Guarantee: nothing_is_charged_while_paused - by whomever, for whatever study.
        Guarantee: nothing_is_charged_after_a_restore - what a backup lacks may have been spent - until
        officers reopen the register.
        Guarantee: history_is_checked - numbers follow each other; a register is opened once; an event is
        charged once, to an opened register; an outcome names a charged event; a pause ends before another; a
        policy changes from what it was; at a hub, a hospital is admitted once and revoked once, a study is
        submitted once, its rounds are counted without a gap, and nothing follows its end.

        Raises: RefusedError naming the rule.
        """
        expected = 0 if self.last is None else self.last.seq + 1
        if entry.seq != expected:
            raise RefusedError("ledger.sequence", f"entry {entry.seq} stands where entry {expected} belongs")
        if self.last is not None and entry.time < self.last.time:
            raise RefusedError(
                "ledger.clock",
                f"the clock says {entry.time}, but entry {expected - 1} was written at {self.last.time}",
                remedy="Synchronise this machine's clock, then try again; nothing was written.",
            )
        for holds, code, problem in self._rules(entry):
            if not holds:
                raise RefusedError(f"ledger.{code}", problem)

    def _rules(self, entry: Entry) -> Iterator[Rule]:
        same_owner = self.last is None or isinstance(self.last, _HUB) == isinstance(entry, _HUB)
        yield same_owner, "owner", "an entry of a hub stands in a hospital's ledger, or the reverse"
        if isinstance(entry, Opened):
            once = entry.register_id not in self._registers
            yield once, "opened-twice", "this register is open already in this ledger"
        elif isinstance(entry, Charge):
            yield not self._restored, "restored", "this site was restored from a backup: it is closed"
            yield not self._paused, "paused", "this site is paused: nothing is charged"
            known = entry.register_id in self._registers
            yield known, "register", "the event charges a register that was never opened here"
            once = entry.event_id not in self._events
            yield once, "charged-twice", "an event with this id is charged already"
        elif isinstance(entry, Outcome):
            known = entry.event_id in self._events
            yield known, "outcome", "the outcome names an event that was never charged"
        elif isinstance(entry, Pause):
            changes = (entry.decision == "paused") != self._paused
            yield changes, "pause", f"this site is {'paused already' if self._paused else 'not paused'}"
        elif isinstance(entry, PolicyChange):
            changes = entry.before == self._policy != entry.after
            yield changes, "policy", "the policy was not what this entry says, or has not changed"
        elif isinstance(entry, Membership):
            before = None if entry.decision == "admitted" else "admitted"
            right = self._members.get(entry.id) == before
            yield right, "membership", f"this hospital cannot be {entry.decision} now"
        elif isinstance(entry, Submission):
            yield entry.manifest not in self._steps, "submitted-twice", "this study was submitted already"
        elif isinstance(entry, Completed | Ended):
            yield entry.manifest in self._steps, "unsubmitted", "this study was never submitted here"
            yield entry.manifest not in self._ended, "ended", "this study has ended already"
            if isinstance(entry, Completed):
                follows = entry.step == self._steps[entry.manifest] + 1
                yield follows, "step", "a completed round of this study is missing or stands twice"

    def add(self, entry: Entry) -> None:
        """Take a checked entry as the newest."""
        self.last = entry
        if isinstance(entry, Opened):
            self._registers.add(entry.register_id)
        elif isinstance(entry, Charge):
            self._events.add(entry.event_id)
        elif isinstance(entry, Pause):
            self._paused = entry.decision == "paused"
        elif isinstance(entry, PolicyChange):
            self._policy = entry.after
        elif isinstance(entry, Restored):
            self._restored = True
        elif isinstance(entry, Override) and entry.action == "reopen":
            self._restored = False
        elif isinstance(entry, Membership):
            self._members[entry.id] = entry.decision
        elif isinstance(entry, Submission):
            self._steps[entry.manifest] = 0
        elif isinstance(entry, Completed):
            self._steps[entry.manifest] = entry.step
        elif isinstance(entry, Ended):
            self._ended.add(entry.manifest)
