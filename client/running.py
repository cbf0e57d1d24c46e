"""One approved study while it runs here: its machine, its worker, and the round in flight.

Source: DESIGN "The agent is two processes"; PROTOCOL I13. Rules: whoever touches the machine holds the
study's lock, which nobody holds while the worker computes; a round that was cut gives nothing, whatever
it was doing when it was cut.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from client.computation import Computation
from common import messages
from common.admissible import Admitted
from common.errors import RefusedError, VerificationError
from common.ledger.entries import OutcomeReason
from common.messages import Kind
from common.secagg import records
from common.secagg.params import RunParams
from common.secagg.records import Record
from common.secagg.site import Site
from common.study import Manifest
from common.tasks.state import load_state, model_digest

log = logging.getLogger("wardround.site")

R = TypeVar("R", bound=Record)


def label(man: bytes) -> str:
    """A study as the log names it."""
    return f"study {man.hex()[:12] or '?'}"


def every(found: tuple[Record, ...], kind: type[R]) -> tuple[R, ...]:
    """The records of a request, all of one kind. Raises VerificationError."""
    if not all(isinstance(record, kind) for record in found):
        raise VerificationError("participation.record", f"the request must hold {kind.__name__} records")
    return found  # type: ignore[return-value]


def only(found: tuple[Record, ...], kind: type[R]) -> R:
    """The one record of a request."""
    return every(found, kind)[0]


@dataclass(eq=False)
class Running:
    """``model_digest`` is that of the last accepted round, empty before the first.

    ``ledger_keys`` are those of the members, raw, by id; the hub's is under 0. ``setup_ends`` is when the
    setup keys are erased, in seconds since 1970 UTC.
    """

    manifest: Manifest
    params: RunParams
    site: Site
    computation: Computation
    model_digest: bytes
    ledger_keys: Mapping[int, bytes]
    setup_ends: float
    _cut: threading.Event = field(default_factory=threading.Event)
    _waiting: bool = False
    _newest: int = 0

    @property
    def label(self) -> str:
        """The study as the log names it."""
        return label(self.params.man)

    @property
    def retired(self) -> bool:
        """Whether this was given up: what is kept of the run is in the run file."""
        return self.computation.ended

    def retire(self) -> None:
        """Kill the worker and the round in flight for good. Without the lock, from any thread."""
        self.computation.end()
        self._cut.set()

    def answer(self, kind: Kind, found: tuple[Record, ...]) -> tuple[Record, ...]:
        """What the machine answers by itself."""
        site = self.site
        if kind is messages.KEYS:
            return (site.announce(),)
        if kind is messages.DIRECTORY:
            return site.on_directory(only(found, records.Directory))
        if kind is messages.SEEDS:
            return (site.on_pair_seeds(every(found, records.PairSeed)),)
        if kind is messages.CONFIRMS:
            accepted = site.on_confirms(every(found, records.Tag))
            log.info("%s: keys shared with %d hospitals", self.label, len(accepted))
            for peer in sorted(site.disputed):
                log.warning("%s: no keys shared with hospital %d: somebody is at fault", self.label, peer)
            return ()
        if kind is messages.OPEN:
            return (site.on_open_please(only(found, records.OpenPlease)),)
        raise VerificationError("participation.kind", f"{kind.message_type} is not handled here")

    def check_model(self, start: records.RoundStart, state_file: bytes, admitted: Admitted) -> bytes:
        """Check that a state is the one of a RoundStart; its model digest. Raises VerificationError."""
        if records.state_digest(state_file) != start.state:
            raise VerificationError("participation.state", "the state is not the one that the hub signed")
        bound = self.manifest.study.aggregation.state_norm_bound
        digest = model_digest(load_state(state_file, admitted.layout, bound), admitted.layout)
        if digest != start.model_digest:
            problem = "the state has another digest than the round names"
            raise VerificationError("participation.model", problem)
        return digest

    def await_worker(self, start: records.RoundStart, timeout_s: float) -> None:
        """Wait, without the lock, until the worker can compute: no round is charged for one that cannot.

        Raises: RefusedError when it takes longer, or when a newer round came meanwhile.
        """
        records.check_signature(start, self.params.man, self.params.hub_key, "the hub")
        self._newest = max(self._newest, start.round)
        if not self.computation.started(timeout_s):
            raise RefusedError("participation.worker", "the worker process is not ready to compute")
        if start.round < self._newest:
            raise RefusedError("participation.older", "a newer round came while the worker was starting")

    def accepted(self, model_digest: bytes) -> threading.Event:
        """A round was accepted: the one in flight ends at once. What cuts the new one short."""
        self.computation.stop(self._cut)
        self._cut, self._waiting, self.model_digest = threading.Event(), False, model_digest
        # Retired between these lines, the new round would not have been cut.
        if self.retired:
            self._cut.set()
        return self._cut

    def ready(self, q: NDArray[np.int64], model_digest: bytes, cut: threading.Event) -> records.Ready:
        """R1 from the vector computed on a model, int64 [dim], unless the round was cut meanwhile.

        Guarantee: a_cut_round_gives_nothing - nor does its vector go into the round after it.
        Raises: RefusedError.
        """
        self._check_uncut(cut)
        return self.site.ready(q, np.zeros(0, dtype=np.int64), model_digest)

    def leaves(self, cut: threading.Event) -> None:
        """R1 is sent now, unless the round was cut meanwhile. Raises RefusedError."""
        self._check_uncut(cut)
        self._waiting = True

    def _check_uncut(self, cut: threading.Event) -> None:
        if cut.is_set() or cut is not self._cut:
            raise RefusedError("participation.cut", "the round was ended here before it was ready")

    def asked(self) -> None:
        """An upload is asked for."""
        self._waiting = False

    def became(self, model_digest: bytes) -> OutcomeReason:
        """What the last round came to, as the next one's model tells: after a lost one it is the same."""
        site, advanced = self.site, model_digest != self.model_digest
        if not site.attempt:
            return "left_out_of_cohort" if self._waiting else "upload_not_made"
        if not advanced:
            return "round_lost"
        return "completed" if site.opened else "left_out_of_cohort"
