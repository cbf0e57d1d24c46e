"""The hub's ledger: who was admitted, what was submitted, which sums were opened, how each study ended.

Source: DESIGN "Ledger". Rules: the tables come first, and what they say is then appended here, so that a hub
killed in between writes it at its next start; the hub key signs; several threads may append at once.
"""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Final

from common import identity
from common.errors import RefusedError
from common.identity import key_text, party_fingerprint, public_key
from common.ledger.entries import Completed, Ended, Entry, HubEntry, Membership, Submission
from common.ledger.store import Ledger
from common.study import SignedManifest
from server.home import HubHome
from server.store import ENDED, SiteRow, Store

log = logging.getLogger("wardround.hub")

_CLOCK: Final = ("ledger.clock", "ledger.future")


class HubLedger:
    """``ledger`` may be read by anyone; it is written by catch_up alone. ``sign`` is the hub key's."""

    def __init__(self, home: HubHome, store: Store) -> None:
        key = identity.load_signing_key(home.hub_key)
        self._actor = key_text(public_key(key))
        self.store, self.sign = store, key.sign
        self.ledger = Ledger.open(home.ledger, key)
        self._read = 0
        self._members: set[tuple[int, str]] = set()
        self._steps: dict[str, int] = {}
        self._ended: set[str] = set()

    def close(self) -> None:
        """Close the file."""
        self.ledger.close()

    def catch_up(self, over: Callable[[str], bool] = lambda _: False) -> None:
        """Append what the tables say and the ledger does not say yet.

        ``over`` tells of an ended study, by its digest, that nobody runs any more: its end is written last,
        for its thread may still complete a round that was opened when it was aborted.

        Guarantee: an_opened_round_is_never_left_out - also of a study that is aborted meanwhile.
        Guarantee: the_hubs_ledger_catches_up - also after a kill between a table's row and its entry.
        Raises: RefusedError when the clock was set back.
        """
        self._look()
        for entry in self._missing(over):
            try:
                self.ledger.append(entry)
            except RefusedError as error:
                # Another thread has just appended it.
                if error.code in _CLOCK:
                    raise
        self._look()

    def _look(self) -> None:
        entries = self.ledger.entries()
        for entry in entries[self._read :]:
            self._take(entry)
        self._read = len(entries)

    def _take(self, entry: Entry) -> None:
        if isinstance(entry, Membership):
            self._members.add((entry.id, entry.decision))
        elif isinstance(entry, Submission):
            self._steps[entry.manifest] = 0
        elif isinstance(entry, Completed):
            self._steps[entry.manifest] = entry.step
        elif isinstance(entry, Ended):
            self._ended.add(entry.manifest)

    def _missing(self, over: Callable[[str], bool]) -> Iterator[HubEntry]:
        for row in (*self.store.sites(), *self.store.sites(revoked=True)):
            if (row.id, "admitted") not in self._members:
                yield self._membership(row, "admitted")
            if row.revoked and (row.id, "revoked") not in self._members:
                yield self._membership(row, "revoked")
        for study in self.store.studies():
            digest = study.digest
            if digest in self._ended:
                continue
            if digest not in self._steps:
                whole = self.store.study(digest)
                coordinator = SignedManifest(whole.manifest, whole.signature).verify().coordinator
                yield Submission(actor=self._actor, manifest=digest, coordinator=coordinator)
            for done in self.store.rounds(digest, after=self._steps.get(digest, 0)):
                yield Completed(
                    actor=self._actor,
                    manifest=digest,
                    round=done.number,
                    step=done.step or 0,
                    attempt=done.attempt,
                    cohort=tuple(json.loads(done.cohort)),
                    ctx=done.context.hex(),
                    sum_digest=done.sum_digest.hex(),
                    model_digest=done.model_digest.hex(),
                )
            if study.status in ENDED and over(digest):
                yield Ended.model_validate({"actor": self._actor, "manifest": digest, "status": study.status})

    def _membership(self, row: SiteRow, decision: str) -> Membership:
        mark = party_fingerprint(row.name, row.protocol_key, row.ledger_key)
        fields = {"id": row.id, "name": row.name, "fingerprint": mark, "decision": decision}
        return Membership.model_validate({"actor": self._actor, **fields})
