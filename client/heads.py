"""This hospital as a witness: it shows its ledger's head each round, and cosigns the others' and the hub's.

Source: PROTOCOL L1, L2; PRIVACY "Rollback". Rules: a head says how long the ledger is and nothing of rows;
what was cosigned is on disk before the cosignature leaves; nothing is charged for a round without fresh
cosignatures of t + 1 other hospitals.
"""

import logging
import threading
from collections.abc import Callable

from client.guard import Guard
from client.identity import SiteIdentity
from client.running import Running, every, only
from client.state import SiteHome, write_durable
from common import messages
from common.messages import Kind
from common.secagg import records
from common.secagg.records import Record
from common.witness import Witness

log = logging.getLogger("wardround.site")

KINDS = (messages.HEAD, messages.COSIGN, messages.COSIGNED)


class Heads:
    """The heads of one site, for all of its studies. Thread-safe. ``entropy`` is the OS generator."""

    def __init__(
        self, home: SiteHome, identity: SiteIdentity, guard: Guard, entropy: Callable[[int], bytes]
    ) -> None:
        self._guard, self._entropy = guard, entropy
        self._sign = identity.ledger_key.sign
        self._lock = threading.Lock()
        state = home.heads.read_bytes() if home.heads.exists() else b""
        self._witness = Witness(identity.id, lambda data: write_durable(home.heads, data), state)

    def answer(self, run: Running, kind: Kind, found: tuple[Record, ...]) -> tuple[Record, ...]:
        """L1 of this ledger, L2 of the others', or their L2 of this one taken. Raises VerificationError."""
        man, keys = run.params.man, run.ledger_keys
        with self._lock:
            if kind is messages.HEAD:
                please, hashes = only(found, records.HeadPlease), self._guard.leaf_hashes()
                return (self._witness.offer(man, please, self._entropy(32), hashes, self._sign),)
            if kind is messages.COSIGN:
                cosigned = self._witness.cosign(man, every(found, records.Head), keys, self._sign)
                for party in sorted(self._witness.contradicted):
                    log.warning(
                        "%s: a head of party %d is older than the last seen here, or another's: not cosigned",
                        run.label, party,
                    )  # fmt: skip
                return (cosigned,)
            self._witness.take(man, every(found, records.Cosign), keys)
            return ()

    def spend(self, run: Running, round_number: int) -> None:
        """Use up the cosigned head of a round. Raises RefusedError when t + 1 others have not cosigned it."""
        with self._lock:
            self._witness.spend(run.params.man, round_number, run.params.t + 1)
