"""What a register has been charged, as its ledger tells: each event settled by what has left so far.

Source: PRIVACY "Registers, budget, filter" (a round is settled at the least noise over its uploads). Rules:
the ledger has checked that what was read before stands unchanged, so only new entries are parsed.
"""

import threading
from collections.abc import Sequence

from common.errors import VerificationError
from common.ledger import entries as leaves
from common.ledger.entries import Entry, Outcome
from common.privacy.events import Event, settled


class Charges:
    """The events of one register. Thread-safe; ``entries`` is always the whole ledger."""

    def __init__(self, register_id: str) -> None:
        self._register_id = register_id
        self._events: dict[str, Event] = {}
        self._uploads: dict[str, list[tuple[int, int]]] = {}
        self._parsed = 0
        self._parsing = threading.Lock()

    def settled(self, entries: Sequence[Entry]) -> tuple[Event, ...]:
        """The events in order, each settled at the least noise of what has left.

        Raises: VerificationError for an event that was charged twice.
        """
        with self._parsing:
            if len(entries) > self._parsed:
                new = entries[self._parsed :]
                found = [Event.from_fields(fields) for fields in leaves.events(new, self._register_id)]
                for event in found:
                    if event.event_id in self._events:
                        raise VerificationError("guard.event", "the ledger charges one event twice")
                    self._events[event.event_id] = event
                for said in new:
                    if isinstance(said, Outcome) and said.u_size and said.s_g_squared:
                        self._uploads.setdefault(said.event_id, []).append((said.u_size, said.s_g_squared))
                        # Each attempt anew from the charge: what is charged holds for every cohort.
                        event, uploads = self._events[said.event_id], self._uploads[said.event_id]
                        self._events[said.event_id] = settled(event, uploads)
                self._parsed = len(entries)
            return tuple(self._events.values())

    def last(self, entries: Sequence[Entry], man: bytes) -> tuple[Event, list[Outcome]] | None:
        """The newest charge of a study and what the ledger says of it, in order."""
        for event in reversed(self.settled(entries)):
            if event.manifest_digest == man.hex():
                return event, [e for e in entries if isinstance(e, Outcome) and e.event_id == event.event_id]
        return None
