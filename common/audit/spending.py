"""What a hospital's ledger says was spent, and what events cost.

Source: PRIVACY "Registers, budget, filter" (odometer), "What is reported" (PLD, two hospitals).
Rules: events are stored, every epsilon is derived anew and rounds up; an event that cannot be read costs
without bound; a hospital has one register, whose first entry states its caps; events that cost the same are
computed once, for all hospitals.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from common.admissible import Admitted
from common.audit.party import E, Party, Study, studied
from common.errors import UsageError
from common.ledger import entries as leaves
from common.ledger.entries import Charge, Opened, Outcome, Rules
from common.ledger.overrides import Standing, standing
from common.privacy.accountant import Term, View, compose_epsilon
from common.privacy.clipping import z_threshold, z_worst
from common.privacy.events import Event, settled
from common.privacy.filter import Cap, odometer
from common.witness import HUB

LARGEST_SAMPLED: Final = 32.0
"""A Poisson-sampled composition above this epsilon is shown as infinite: it would take too long."""

OWN: Final = frozenset({"event_id", "register_id", "round"})
"""The fields in which the events of one study differ."""

_NO_ID: Final = "0" * 32


@dataclass(frozen=True, slots=True)
class Epsilons:
    """Epsilon when at most t hospitals collude with the hub, and when all others do."""

    t: float
    w: float


INFINITE: Final = Epsilons(math.inf, math.inf)


class Costs:
    """Epsilons of events, each computed once."""

    def __init__(self) -> None:
        self._kinds: dict[frozenset[tuple[str, str | int]], Event | None] = {}
        self._known: dict[object, Epsilons] = {}

    def kind(self, fields: Mapping[str, str | int]) -> Event | None:
        """One event for all that differ in OWN alone; None for what is no event."""
        same = frozenset(item for item in fields.items() if item[0] not in OWN)
        if same not in self._kinds:
            self._kinds[same] = None
            with suppress(UsageError):
                self._kinds[same] = Event.from_fields({**fields, "register_id": _NO_ID})
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
            kinds = {id(event): event.mechanism for event in sums}
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
        self.id, self.name, self.costs = party.id, party.name, costs
        self.entries, self.charges = party.entries, party.of(Charge)
        self.opened = next(iter(party.of(Opened)), None)
        self.changes, self.pauses = party.of(leaves.PolicyChange), party.of(leaves.Pause)
        self.restores, self.overrides = party.of(leaves.Restored), party.of(leaves.Override)
        self.standing = standing(party.entries) if self.opened else None
        self.consents = by_key(party.of(leaves.Consent), studied)
        self.by_study = by_key(self.charges, studied)
        self.decisions = by_key(party.of(leaves.Approval), studied)
        self.outcomes = by_key(party.of(Outcome), lambda outcome: outcome.event_id)
        self.events = [self._settled(charge, self._shares(charge)) for charge in self.charges]

    @property
    def closed(self) -> bool:
        """Whether a restore has closed the register, and no officers have reopened it."""
        return self.standing is not None and self.standing.closed

    @property
    def cap(self) -> Cap | None:
        """The highest caps that the register has had, None when there are none to speak of."""
        return None if self.standing is None else _sound_cap(self.standing)

    def _shares(self, charge: Charge) -> list[tuple[int, int]]:
        """Cohort's size and own share's variance of each upload with shared noise."""
        found = self.outcomes.get(charge.event_id, ())
        return [(o.u_size, o.s_g_squared) for o in found if o.u_size and o.s_g_squared]

    def _settled(self, charge: Charge, uploads: Sequence[tuple[int, int]]) -> Event | None:
        event = self.costs.kind(charge.event)
        with suppress(UsageError):
            return self.costs.kind(settled(event, uploads).to_fields()) if event and uploads else event
        return None

    @property
    def unmasked(self) -> list[Event | None]:
        """What was done if no mask had held: a charge, or with shared noise each of its uploads by itself."""
        found: list[Event | None] = []
        for charge, event in zip(self.charges, self.events, strict=True):
            found += [self._settled(charge, [upload]) for upload in self._shares(charge)] or [event]
        return found

    @property
    def cap_in_force(self) -> Cap | None:
        """The caps that the ledger last says of the policy, and never above the register's highest."""
        first = self.cap
        now = _sound_cap(self.changes[-1].after) if self.changes else first
        if first is None or now is None:
            return None
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
        return any(outcome.reason == "completed" for outcome in self.outcomes.get(charge.event_id, ()))

    def approves(self, digest: str) -> bool:
        """Whether the last decision on a study was to approve it."""
        return digest in self.decisions and self.decisions[digest][-1].decision == "approved"


class Hub:
    """What the hub's ledger says of studies, by digest; nothing where its evidence is not there."""

    def __init__(self, parties: Sequence[Party]) -> None:
        hub = next((party for party in parties if party.id == HUB and party.entries), None)
        self.shown = hub is not None
        self.submitted = {entry.manifest: entry for entry in (hub.of(leaves.Submission) if hub else ())}
        self.ended = {entry.manifest: entry for entry in (hub.of(leaves.Ended) if hub else ())}
        self.completed = by_key(hub.of(leaves.Completed) if hub else (), studied)


def by_key(entries: Iterable[E], key: Callable[[E], str]) -> dict[str, list[E]]:
    """Entries by what ``key`` says of each, in order."""
    found: defaultdict[str, list[E]] = defaultdict(list)
    for entry in entries:
        found[key(entry)].append(entry)
    return dict(found)


def cap_of(said: Opened | Rules | Standing) -> Cap:
    """The caps that an entry states. Raises UsageError for such as no register can have."""
    epsilon_w = None if said.epsilon_w is None else float(said.epsilon_w)
    return Cap(float(said.epsilon_t), epsilon_w, float(said.delta))


def _sound_cap(said: Opened | Rules | Standing) -> Cap | None:
    with suppress(UsageError):
        return cap_of(said)
    return None


def round_of(charge: Charge) -> int:
    """The number of the charged round, 0 for what has none."""
    number = charge.event.get("round", 0)
    return number if isinstance(number, int) else 0


def studies_in_order(parties: Sequence[Party]) -> dict[str, Study]:
    """Every study that a party shows, by digest, in the order of the ledgers, the hub's first."""
    shown = {digest: study for party in parties for digest, study in sorted(party.studies.items())}
    mentioned = (
        entry.manifest
        for party in sorted(parties, key=lambda party: party.id)
        for entry in party.entries
        if isinstance(entry, leaves.Submission | leaves.Approval)
    )
    return {digest: shown[digest] for digest in (*mentioned, *sorted(shown)) if digest in shown}
