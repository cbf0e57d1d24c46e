"""What approved studies have reserved of the register: which rounds, of which event.

Source: PRIVACY "Registers, budget, filter" (a study's reservation is scheduling only). Rules: which rounds is
said by the ledger (common.ledger.reservations) and what one costs by the study's own document; a study that
has expired, is not here or cannot be run reserves nothing, and neither does one without differential privacy,
which no budget pays.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final, NamedTuple

from client.studies import StudyFolder
from common.admissible import Admitted, check
from common.errors import WardroundError
from common.ledger.entries import Entry
from common.ledger.reservations import reserved_rounds
from common.privacy.events import Event


class Plan(NamedTuple):
    """What a study asks of the register; no event for one that cannot reserve any."""

    name: str
    expires: str
    rounds: int
    rounds_max: int
    event: Event | None


NO_PLAN: Final = Plan("", "", 0, 0, None)


class Reservations:
    """The reservations of one register. ``event_of`` plans a round; ``now`` gives the aware time."""

    def __init__(
        self,
        studies: StudyFolder,
        event_of: Callable[[Admitted, int], Event],
        now: Callable[[], datetime],
    ) -> None:
        self._studies, self._event_of, self._now = studies, event_of, now
        self._plans: dict[str, Plan] = {}

    def plan(self, digest: str) -> Plan:
        """The plan of a study, by its digest in hex; it is read once."""
        if digest not in self._plans:
            with suppress(WardroundError, ValueError):
                study = (found := self._studies.read(bytes.fromhex(digest))[0]).study
                event = self._event_of(check(found, None), 1)
                limits = study.rounds, study.aggregation.rounds_max
                kept = event if event.kind == "sum" else None
                self._plans[digest] = Plan(study.name, study.expires, *limits, kept)
        return self._plans.get(digest, NO_PLAN)

    def rounds(self, entries: Sequence[Entry], before: str = "") -> dict[str, int]:
        """Reserved rounds by digest, first come first, as common.ledger.reservations counts them."""
        minute = self._now().strftime("%Y-%m-%dT%H:%MZ")

        def planned(digest: str) -> tuple[int, int] | None:
            plan = self.plan(digest)
            return (plan.rounds, plan.rounds_max) if plan.event and minute < plan.expires else None

        return reserved_rounds(entries, planned, before)

    def events(self, entries: Sequence[Entry], before: str = "") -> tuple[Event, ...]:
        """The same as events, for the filter: those of a study are one and the same."""
        found = ((self.plan(digest).event, rounds) for digest, rounds in self.rounds(entries, before).items())
        return tuple(event for event, rounds in found if event is not None for _ in range(rounds))
