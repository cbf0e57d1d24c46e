"""What every step of a hospital's machine shares: its state, its store, its signature and its end.

Source: PROTOCOL.md I9-I11. Rules: a state is durable before it is the machine's; when ``persist`` raises,
nothing has changed; a closed run answers nothing; nothing here is printed or pickled.
"""

from collections.abc import Callable
from typing import NoReturn, Self, TypeVar

from common.errors import RefusedError, VerificationError
from common.secagg import records
from common.secagg.codec import Words
from common.secagg.masks import chunk_digests
from common.secagg.noise import Sampler
from common.secagg.params import RunParams, check_params, valid_minute
from common.secagg.records import Record
from common.secagg.state import RunState

R = TypeVar("R", bound=Record)


class Machine:
    """The state of one hospital in one run, and how it changes; the arguments are told at ``Site``.

    ``outsiders_only`` is the hospital's own policy and alone admits t = 0; ``sampler`` draws shared noise.
    """

    def __init__(
        self,
        params: RunParams,
        *,
        persist: Callable[[RunState], None],
        entropy: Callable[[int], bytes],
        sign: Callable[[bytes], bytes],
        state: RunState | None = None,
        outsiders_only: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        check_params(params, outsiders_only=outsiders_only)
        if params.noise and sampler is None:
            raise RefusedError("secagg.params.sampler", "this run shares noise, and there is no sampler")
        if params.me not in params.members:
            raise RefusedError("secagg.params.me", "this hospital is not a member of the run")
        self._params = params
        self._persist = persist
        self._entropy = entropy
        self._sign = sign
        self._sampler = sampler
        self._state = state if state is not None else RunState(params.man, params.me)
        self._check_state()
        # In memory only, from Ready to Open (I13): lost with the process, and the round with them.
        self._accepted_here = False
        self._vectors: tuple[Words, Words] | None = None
        self._seed = b""
        self._disputed: set[int] = set()

    @classmethod
    def restore(
        cls,
        params: RunParams,
        state: RunState,
        *,
        now: str,
        charged_round: int,
        released: tuple[int, bytes],
        persist: Callable[[RunState], None],
        entropy: Callable[[int], bytes],
        sign: Callable[[bytes], bytes],
        outsiders_only: bool = False,
        sampler: Sampler | None = None,
    ) -> Self:
        """The machine again from its stored state, at ``now`` ("YYYY-MM-DDTHH:MMZ", local clock).

        ``charged_round`` is the last round that the ledger has charged for this manifest, 0 for none;
        ``released`` attempt and context of the last upload of that round that the ledger has, (0, b"") for
        none. A round is accepted here before it is charged there, and an upload is stored here before it is
        recorded there, so a state behind either was rolled back.

        Guarantee: a_rolled_back_run_file_is_closed - a state behind the ledger is closed for good.
        Guarantee: an_expired_run_is_closed - at start as later.
        """
        site = cls(
            params,
            persist=persist,
            entropy=entropy,
            sign=sign,
            state=state,
            outsiders_only=outsiders_only,
            sampler=sampler,
        )
        attempt, ctx = released
        known = state.header.ctx if state.header is not None else b""
        behind = state.attempt < attempt or (state.attempt == attempt and known != ctx)
        if not state.closed and (
            state.round < charged_round or (state.round == charged_round and attempt and behind)
        ):
            site.close()
        site.expire(now)
        return site

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._state!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a site of the secure sum is not pickled")

    @property
    def closed(self) -> bool:
        """Whether the run is over here, with all secrets erased."""
        return self._state.closed

    def expire(self, now: str) -> bool:
        """Close the run when ``now`` ("YYYY-MM-DDTHH:MMZ") has reached the expiry; whether it is closed."""
        self._require(valid_minute(now), "expiry", "the time must be YYYY-MM-DDTHH:MMZ")
        if now >= self._params.expiry:
            self.close()
        return self.closed

    def close(self) -> None:
        """End the run here and erase every secret, in memory even when the write fails.

        Guarantee: a_closed_run_holds_no_secret - neither stored nor in memory, and answers nothing.
        """
        self._state = self._state.ended()
        self._forget()
        self._persist(self._state)

    def _check_state(self) -> None:
        state, params = self._state, self._params
        same = state.man == params.man and state.me == params.me
        self._require(same, "state.run", "the stored state is of another run")
        header = state.header
        if header is not None:
            digests = chunk_digests(state.payload, params.layout)
            if digests != header.chunk_digests or records.payload_digest(digests) != header.payload_digest:
                raise VerificationError("secagg.state.payload", "the stored payload is damaged")

    def _running(self) -> RunState:
        if self._state.closed:
            raise RefusedError("secagg.closed", "this run is closed at this hospital")
        return self._state

    def _require(self, holds: bool, code: str, problem: str) -> None:
        if not holds:
            raise RefusedError("secagg." + code, problem)

    def _signed(self, record: R) -> R:
        signed = records.signed(record, self._params.man, self._sign)
        # A key that is not the one pinned by the others would be noticed by all of them, too late.
        self._check_signature(signed, self._params.me)
        return signed

    def _check_signature(self, record: Record, signer: int) -> None:
        records.check_signature(record, self._params.man, self._params.keys[signer], f"hospital {signer}")

    def _commit(self, state: RunState) -> None:
        self._persist(state)
        self._state = state

    def drop_out(self) -> None:
        """Forget the vectors and the seed of the round, as a restart does.

        Guarantee: a_dropped_round_leaves_no_vectors - what was uploaded can still be opened, nothing masked.
        """
        self._forget()

    def _forget(self) -> None:
        for words in self._vectors or ():
            words.fill(0)
        self._accepted_here = False
        self._vectors = None
        self._seed = b""
