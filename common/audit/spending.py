"""What a hospital's ledger says was spent, and what events cost.

Source: PRIVACY "Registers, budget, filter" (odometer), "What is reported" (PLD, two hospitals).
Rules: events are stored, every epsilon is derived anew and rounds up; an event that cannot be read costs
without bound; a hospital has one register, whose first entry states its caps; events that cost the same are
computed once, for all hospitals.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Final

from common.admissible import Admitted
from common.audit.conduct import studied
from common.audit.party import Party, Study
from common.errors import UsageError
from common.ledger.entries import (
    Approval,
    Charge,
    Completed,
    Ended,
    Opened,
    Outcome,
    PolicyChange,
    Restored,
    Rules,
    Submission,
)
from common.privacy.accountant import Term, View, compose_epsilon
from common.privacy.clipping import z_threshold, z_worst
from common.privacy.events import Event
from common.privacy.filter import Cap, odometer
from common.witness import HUB

LARGEST_SAMPLED: Final = 32.0
"""A Poisson-sampled composition above this epsilon is shown as infinite: it would take too long."""

_NO_ID: Final = "0" * 32
_SINGLE: Final = frozenset({"event_id", "register_id", "round", "attempt", "state", "reason"})


@dataclass(frozen=True, slots=True)
class Epsilons:
    """Epsilon when at most t hospitals collude with the hub, and when all others do."""

    t: float
    w: float


INFINITE: Final = Epsilons(math.inf, math.inf)


class Costs:
    """Epsilons of events, each computed once."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[tuple[str, str | int], ...], Event | None] = {}
        self._known: dict[object, Epsilons] = {}

    def kind(self, fields: Mapping[str, str | int]) -> Event | None:
        """One event for all that differ in id, register and round alone; None for what is no event."""
        same = tuple(sorted(item for item in fields.items() if item[0] not in _SINGLE))
        if same not in self._kinds:
            try:
                self._kinds[same] = Event.from_fields({**fields, "register_id": _NO_ID})
            except UsageError:
                self._kinds[same] = None
        return self._kinds[same]

    def planned(self, admitted: Admitted) -> Event:
        """A round of a study, whichever."""
        event = self.kind(admitted.event(_NO_ID, 1, 1, _NO_ID).to_fields())
        if event is None:
            raise UsageError("audit.event", "an admitted study has no event")
        return event

    def present_twice(self, event: Event) -> Event | None:
        """The event for a patient present in two hospitals: z is halved, by a quarter of the variance."""
        if event.kind != "sum":
            return event
        mechanism = event.mechanism
        variance, delta_g = mechanism.s_g_squared // 4, mechanism.delta_g
        fields = event.to_fields() | {"s_g_squared": variance, "z_w": z_worst(variance, delta_g)}
        return self.kind(fields | {"z_t": z_threshold(variance, delta_g, mechanism.sharers)})

    def spent(self, events: Sequence[Event | None], delta: float) -> Epsilons:
        """The filter's odometer."""
        return self._once("odometer", events, delta, lambda found, view: odometer(found, delta, view))

    def fixed(self, events: Sequence[Event | None], delta: float) -> Epsilons:
        """As if fixed in advance, by privacy loss distributions."""

        def composed(found: Sequence[Event], view: View) -> float:
            if any(event.kind == "no_dp" for event in found):
                return math.inf
            sums = [event for event in found if event.kind == "sum"]
            each = {id(event): event for event in sums}
            kinds = {at: event.mechanism for at, event in each.items()}
            times = Counter(map(id, sums))
            sampled = any(mechanism.q < 1 for mechanism in kinds.values())
            if sampled and odometer(sums, delta, view) > LARGEST_SAMPLED:
                return math.inf
            terms = [Term(m.q, m.z(view), m.steps * times[at]) for at, m in kinds.items()]
            slack = sum((m.slack * times[at] for at, m in kinds.items()), Fraction(0))
            return compose_epsilon(terms, delta, slack)

        return self._once("fixed", events, delta, composed)

    def _once(
        self,
        what: object,
        events: Sequence[Event | None],
        delta: float,
        compute: Callable[[Sequence[Event], View], float],
    ) -> Epsilons:
        key = what, delta, frozenset(Counter(map(id, events)).items())
        if key not in self._known:
            found = [event for event in events if event is not None]
            if len(found) < len(events) or not 0 < delta < 1:
                return INFINITE
            t = compute(found, "t")
            alike = all(event.z_t == event.z_w for event in found)
            self._known[key] = Epsilons(t, t if alike else compute(found, "w"))
        return self._known[key]


class Hospital:
    """One hospital's ledger, read for what it spent. ``events`` stand in the order of ``charges``."""

    def __init__(self, party: Party, costs: Costs) -> None:
        self.id, self.name = party.id, party.name
        self.entries = party.entries
        self.charges = [entry for entry in party.entries if isinstance(entry, Charge)]
        self.events = [costs.kind(charge.event) for charge in self.charges]
        self.opened = next((entry for entry in party.entries if isinstance(entry, Opened)), None)
        changes = [entry for entry in party.entries if isinstance(entry, PolicyChange)]
        self.policy = changes[-1].after if changes else None
        self.restored = any(isinstance(entry, Restored) for entry in party.entries)
        self.decisions: defaultdict[str, list[Approval]] = defaultdict(list)
        self.outcomes: defaultdict[str, list[Outcome]] = defaultdict(list)
        for entry in party.entries:
            if isinstance(entry, Approval):
                self.decisions[entry.manifest].append(entry)
            elif isinstance(entry, Outcome):
                self.outcomes[entry.event_id].append(entry)

    @cached_property
    def by_study(self) -> dict[str, list[Charge]]:
        """The charges of each manifest digest, in order."""
        found: defaultdict[str, list[Charge]] = defaultdict(list)
        for charge in self.charges:
            found[studied(charge)].append(charge)
        return dict(found)

    @property
    def cap(self) -> Cap | None:
        """The caps with which the register was opened, None when there are none to speak of."""
        return None if self.opened is None else _cap(self.opened)

    @property
    def cap_in_force(self) -> Cap | None:
        """The caps that the ledger last says of the policy, and never above the first."""
        first = self.cap
        if first is None or self.policy is None or (now := _cap(self.policy)) is None:
            return first if self.policy is None else None
        epsilon_w = None
        if first.epsilon_w is not None and now.epsilon_w is not None:
            epsilon_w = min(first.epsilon_w, now.epsilon_w)
        return Cap(min(first.epsilon_t, now.epsilon_t), epsilon_w, first.delta)

    @property
    def uploads(self) -> int:
        """How many uploads were begun."""
        return sum(o.reason == "upload_started" for found in self.outcomes.values() for o in found)

    def completed(self, charge: Charge) -> bool:
        """Whether the result of a charged round came."""
        return any(outcome.reason == "completed" for outcome in self.outcomes[charge.event_id])

    def approves(self, digest: str) -> bool:
        """Whether the last decision on a study was to approve it."""
        return self.decisions[digest][-1].decision == "approved" if digest in self.decisions else False


def _cap(said: Opened | Rules) -> Cap | None:
    epsilon_w = None if said.epsilon_w is None else float(said.epsilon_w)
    try:
        return Cap(float(said.epsilon_t), epsilon_w, float(said.delta))
    except UsageError:
        return None


def round_of(charge: Charge) -> int:
    """The number of the charged round, 0 for what has none."""
    number = charge.event.get("round", 0)
    return number if isinstance(number, int) else 0


def studies_in_order(parties: Sequence[Party]) -> dict[str, Study]:
    """Every study that a party shows, by digest, in the order of the ledgers, the hub's first."""
    shown = {digest: study for party in parties for digest, study in sorted(party.studies.items())}
    mentioned: dict[str, None] = {}
    for party in sorted(parties, key=lambda party: party.id):
        for entry in party.entries:
            if isinstance(entry, Submission | Approval):
                mentioned.setdefault(entry.manifest)
    return {digest: shown[digest] for digest in (*mentioned, *sorted(shown)) if digest in shown}


def endings(parties: Sequence[Party]) -> dict[str, Ended]:
    """How each ended study ended, as far as the hub's evidence is there."""
    hub = [entry for party in parties if party.id == HUB for entry in party.entries]
    return {entry.manifest: entry for entry in hub if isinstance(entry, Ended)}


def completions(parties: Sequence[Party]) -> dict[str, list[Completed]]:
    """The completed rounds of each study by the hub's ledger."""
    found: defaultdict[str, list[Completed]] = defaultdict(list)
    for party in parties:
        for entry in party.entries:
            if isinstance(entry, Completed):
                found[entry.manifest].append(entry)
    return dict(found)
