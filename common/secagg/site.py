"""The hospital's side of the secure sum, as a machine without I/O: the rounds.

Source: PROTOCOL.md R0-R6 and the hospital invariants I1-I7, I9, I11, I13. Rules: everything is checked
before anything changes; a new state is durable before what follows from it is returned; of one round at
most one context is opened, the latest uploaded. Not covered here, but by the guard that calls it:
approval, budget and charge, cosigned heads, the one cohort of a run without DP (I12), the check of the
state's tensors.
"""

import hmac
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from common.errors import RefusedError
from common.secagg import keys, records
from common.secagg.codec import SCALAR_BITS, Words, largest, to_words
from common.secagg.joining import Joining
from common.secagg.masks import chunk_digests, mask_payload, plain_payload
from common.secagg.noise import with_noise
from common.secagg.pairing import SEED_BYTES, fresh
from common.secagg.records import Cohort, Open, OpenPlease, Ready, Result, RoundStart, Upload


class Site(Joining):
    """One hospital in one run.

    ``persist`` makes a state durable before it returns; ``entropy`` is the OS source in the product;
    ``sign`` signs with the protocol key of ``params.me``. With ``state`` None the hospital joins for the
    first time, which it may do once for a manifest: one that has a stored state uses ``restore``.
    One caller at a time.

    Guarantee: one_opening_per_round - no schedule of messages, crashes and failing writes makes a site
    open two contexts of one round.
    Guarantee: one_payload_per_context - nor upload two payloads for one context.
    Assumes: one live machine a state, but for the rho hospitals that the manifest allows.
    Raises: RefusedError, VerificationError; after either the machine is as it was.
    """

    @property
    def round(self) -> int:
        """The last accepted round, 0 before the first."""
        return self._state.round

    @property
    def attempt(self) -> int:
        """The last uploaded attempt of the round, 0 before the first upload."""
        return self._state.attempt

    @property
    def cohort(self) -> tuple[int, ...]:
        """The cohort of the last upload of this round, ascending; empty before it."""
        return self._state.cohort

    @property
    def opened(self) -> bool:
        """Whether the upload of this round has been opened."""
        return self._state.opened is not None

    def on_round_start(self, start: RoundStart) -> None:
        """R0: accept a round, once; advance every K to it and erase all that belongs to earlier rounds.

        To be called before the round is charged and before rows are touched.

        Guarantee: rounds_strictly_increase - also after a restart.
        Guarantee: earlier_rounds_are_erased - no s, b, payload or K of an earlier round stays in the state.
        """
        state, params = self._running(), self._params
        self._require(
            bool(state.dirh) and start.man == state.man and start.dirh == state.dirh,
            "round.run",
            "the round belongs to another run or directory",
        )
        records.check_signature(start, state.man, params.hub_key, "the hub")
        self._require(start.round > state.round, "round.repeated", "a round is computed once")
        self._require(start.round <= params.rounds_max, "round.last", "the run has no such round")
        self._require(state.index <= start.round, "round.ratchet", "the keys of this round are erased")
        self._require(
            len(state.accepted) >= params.m - 1,
            "round.pairs",
            f"this hospital shares keys with {len(state.accepted)} others, and a cohort needs {params.m - 1}",
        )
        accepted = set(state.accepted)
        steps = start.round - state.index
        self._commit(
            replace(
                state,
                setup=None,
                index=start.round,
                keys=tuple((peer, keys.ratchet(key, steps)) for peer, key in state.keys if peer in accepted),
                round=start.round,
                model_digest=start.model_digest,
                attempt=0,
                cohort=(),
                s=b"",
                header=None,
                payload=b"",
                opened=None,
            )
        )
        self._forget()
        self._accepted_here = True

    def ready(self, q_params: NDArray[np.int64], q_scalars: NDArray[np.int64], model_digest: bytes) -> Ready:
        """R1: take the vectors, int64[parameters] and int64[scalars] in grid steps, and commit to them.

        ``model_digest`` is that of the tensors on which they were computed. The vectors stay in memory only.

        Guarantee: a_round_is_computed_once - a second call in a round, or one after a restart, is refused.
        """
        state, params = self._running(), self._params
        self._require(
            self._accepted_here and self._vectors is None,
            "ready.repeated",
            "this hospital has no open round to be ready for; a restart is a dropout of its round",
        )
        self._require(
            hmac.compare_digest(model_digest, state.model_digest),
            "ready.model",
            "the vectors were computed on another model than the round's",
        )
        bound = largest(params.step, params.range) + 1
        scalar_bound = ((1 << 63) - 1) // len(params.members)
        vectors = (
            to_words(q_params, params.bits, params.parameters, bound, "parameters"),
            to_words(q_scalars, SCALAR_BITS, params.scalars, scalar_bound, "scalars"),
        )
        seed = fresh(self._entropy, SEED_BYTES)
        nu = self._nu_of(seed, vectors)
        record = self._signed(Ready(state.man, state.me, state.round, state.model_digest, nu))
        self._vectors, self._seed = vectors, seed
        return record

    def on_cohort(self, cohort: Cohort) -> Upload:
        """R2 to R3: check the cohort, add the noise for it, mask and keep the payload. Returns the header.

        The cohort of the kept upload again gives the kept header again; payload() gives its bytes.

        Guarantee: attempts_strictly_increase - and end at the manifest's number.
        Guarantee: a_bad_cohort_is_refused - too small, unsorted, repeated, without this hospital, with a
        stranger or an unaccepted pair, or with another nu of this hospital.
        Guarantee: nothing_uploads_after_opening - but the bytes that were opened.
        """
        state, params = self._running(), self._params
        self._require(
            state.round > 0 and cohort.round == state.round, "cohort.round", "there is no such round here"
        )
        ctx = records.context(state.man, state.dirh, state.model_digest, cohort)
        if state.header is not None and state.header.ctx == ctx:
            return state.header
        self._require(state.opened is None, "cohort.opened", "this round has been opened")
        self._require(
            state.attempt < cohort.attempt <= params.attempts,
            "cohort.attempt",
            "attempts increase, up to the limit",
        )
        if self._vectors is None:
            raise RefusedError(
                "secagg.cohort.restarted",
                "this hospital no longer holds the vectors of the round: it dropped out",
            )
        ids = cohort.ids
        self._require(list(ids) == sorted(set(ids)), "cohort.order", "a cohort is in ascending order of id")
        self._require(len(ids) >= params.m, "cohort.small", f"a cohort has at least {params.m} members")
        self._require(state.me in ids, "cohort.self", "this hospital is not in the cohort")
        self._require(
            set(ids) <= {state.me, *state.accepted},
            "cohort.stranger",
            "the cohort holds one without an accepted pair",
        )
        nu = self._nu_of(self._seed, self._vectors)
        self._require(
            hmac.compare_digest(nu, dict(cohort.members)[state.me]),
            "cohort.nu",
            "the cohort names another vector of this hospital than the one it holds",
        )
        self._require(state.index == state.round, "cohort.ratchet", "the keys are not those of the round")
        b = keys.self_seed(self._seed, ctx)
        accepted = set(state.accepted)
        pair_keys = {peer: key for peer, key in state.keys if peer in accepted}
        words, scalars = self._vectors
        if params.noise and self._sampler is not None:
            words = with_noise(words, params.noise_of(len(ids)), self._seed, ctx, self._sampler)
        if params.masked:
            payload = mask_payload(words, scalars, pair_keys=pair_keys, ids=ids, me=state.me, b=b, ctx=ctx)
        else:
            payload = plain_payload(words, scalars)
        digests = chunk_digests(payload, params.layout)
        commit = keys.commitment(b, ctx, state.me)
        header = self._signed(Upload(state.me, ctx, commit, records.payload_digest(digests), digests))
        self._commit(
            replace(state, attempt=cohort.attempt, cohort=ids, s=self._seed, header=header, payload=payload)
        )
        return header

    def payload(self) -> bytes:
        """The masked payload of the kept upload; it may be sent until the next round is accepted."""
        state = self._running()
        self._require(state.header is not None, "payload.none", "there is no upload in this round")
        return state.payload

    def on_open_please(self, request: OpenPlease) -> Open:
        """R4 to R5: open the latest uploaded context, once, and close the round's keys behind it.

        Guarantee: only_the_latest_upload_opens - an abandoned attempt is refused.
        Guarantee: opening_erases_the_round - the stored state then holds no s and no K of the round.
        """
        state = self._running()
        header = state.header
        if header is None or not hmac.compare_digest(header.ctx, request.ctx):
            raise RefusedError("secagg.open.context", "only the latest upload of this round can be opened")
        if state.opened is not None:
            return state.opened
        record = self._signed(Open(state.me, header.ctx, keys.self_seed(state.s, header.ctx)))
        steps = state.round + 1 - state.index
        self._commit(
            replace(
                state,
                s=b"",
                opened=record,
                index=state.round + 1,
                keys=tuple((peer, keys.ratchet(key, steps)) for peer, key in state.keys),
            )
        )
        self._forget()
        return record

    def on_result(self, result: Result) -> None:
        """R6: check the hub's signature on what the opened round became; the last round closes the run."""
        state = self._running()
        self._require(
            state.opened is not None and result.ctx == state.opened.ctx,
            "result.context",
            "the result is of another context than the one opened",
        )
        records.check_signature(result, state.man, self._params.hub_key, "the hub")
        if state.round == self._params.rounds_max:
            self.close()

    def _nu_of(self, seed: bytes, vectors: tuple[Words, Words]) -> bytes:
        q_digest = keys.vectors_digest("q", *vectors)
        return keys.ready_tag(seed, self._state.man, self._state.round, self._state.me, q_digest)
