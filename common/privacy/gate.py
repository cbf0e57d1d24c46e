"""The release gate: the only way out for anything computed from rows.

Source: PRIVACY.md "The release gate". Rules: a sum of clipped contributions becomes integers on a public
grid, gets discrete Gaussian noise, and is a release; every optimiser step is one; only a ``Release``, which
nothing else can make, may be sent; what is charged is planned from public constants before any row is read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.errors import FailureError, RefusedError, UsageError
from common.privacy import clipping
from common.privacy.decimals import exact, fraction_of, text_of, text_up
from common.privacy.events import BETA, Event
from common.privacy.noise import coins, discrete_gaussian

Vector: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Entropy: TypeAlias = Callable[[int], bytes]
Quantise: TypeAlias = Callable[[Vector], Integers]

_EXACT_INTEGERS: Final = 2**51
_TOKEN: Final = object()


@dataclass(frozen=True, slots=True)
class GateParams:
    """Public constants of one round's release with differential privacy, all from the manifest.

    ``clip_norm`` C and ``grid_step`` in units of the sum; ``dim`` coordinates; ``rate`` in (0, 1], 1 for
    ``full``; ``steps`` optimiser steps in a round; ``max_patients`` B; ``terms_per_patient`` as in
    ``clipping.eta`` (rows of one patient, where a contraction adds them); ``clamp`` R, B C where it is not
    given. With ``shared-noise`` a cohort has ``minimum`` hospitals at least, and a round one step.

    Raises: UsageError when any bound of PRIVACY.md does not hold.
    """

    clip_norm: float
    grid_step: float
    dim: int
    noise_multiplier: float
    sampling: Literal["full", "poisson"]
    rate: float
    steps: int
    max_patients: int
    arithmetic: clipping.Arithmetic
    mode: Literal["local", "shared-noise"] = "local"
    terms_per_patient: int = 1
    minimum: int = 1
    clamp: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("local", "shared-noise") or (self.mode != "local" and self.steps != 1):
            raise UsageError("privacy.mode", "the mode is unknown, or a round of shared noise has steps")
        if self.sampling not in ("full", "poisson") or self.arithmetic not in ("f64_bounded", "f32_assumed"):
            raise UsageError("privacy.gate", "sampling or arithmetic is unknown")
        rate = exact(self.rate)
        if not 0 < rate <= 1 or (self.sampling == "full") != (rate == 1):
            problem = "the sampling rate must be 1 for full and inside (0, 1) for poisson sampling"
            raise UsageError("privacy.rate", problem)
        if self.steps < 1:
            raise UsageError("privacy.steps", "a round needs at least one step")
        clip, step = exact(self.clip_norm), exact(self.grid_step)
        clipping.check_grid(clip, step, self.dim)
        if self.max_patients * clip / step > _EXACT_INTEGERS:
            raise UsageError("privacy.grid-step", "sums leave the exact integers", remedy="Raise grid_step.")
        _ = self.eta
        if self.mode == "local":
            _ = self.variance()

    @property
    def q(self) -> Fraction:
        """Probability that a patient takes part in one step, exact."""
        return exact(self.rate)

    @property
    def eta(self) -> str:
        """Relative excess of one contribution over C, decimal text rounded up."""
        return text_up(clipping.eta(self.arithmetic, self.max_patients, self.terms_per_patient), 40)

    @property
    def delta_g(self) -> int:
        """Sensitivity in grid units."""
        clip, step = exact(self.clip_norm), exact(self.grid_step)
        return clipping.grid_sensitivity(clip, step, self.dim, fraction_of(self.eta))

    def variance(self, sharers: int = 1) -> int:
        """s_g^2: variance of one hospital's integer noise on each coordinate, in squared grid units.

        ``sharers`` is |U| - t with ``shared-noise``, 1 in ``local``. Raises: UsageError out of bounds.
        """
        return clipping.noise_variance(exact(self.noise_multiplier), self.delta_g, sharers)

    @property
    def limit(self) -> float:
        """R: clamp of the coordinates of a sum."""
        return self.max_patients * self.clip_norm if self.clamp is None else self.clamp


@dataclass(frozen=True, slots=True)
class PlainParams:
    """Public constants of one round's release without differential privacy."""

    dim: int
    steps: int

    def __post_init__(self) -> None:
        if self.dim < 1 or self.steps < 1:
            raise UsageError("privacy.gate", "a release needs at least one coordinate and one step")


def plan_event(
    params: GateParams | PlainParams,
    register_id: str,
    manifest_digest: bytes | str,
    task: str,
    round: int,
    attempt: int,
    members: int,
    t: int,
    event_id: str,
) -> Event:
    """The event to charge before round ``round`` (from 1) is computed, state ``charged``.

    ``register_id`` and ``event_id`` are 32 hex digits; ``manifest_digest`` 32 bytes or 64 hex digits;
    U_size = members. With shared noise the cohort is not known yet: it is charged at the least noise of all.

    Guarantee: a_charge_covers_every_cohort - neither z is above that of any cohort the round may have.
    Raises: UsageError through ``Event``.
    """
    fields: dict[str, str | int] = {
        "event_id": event_id,
        "register_id": register_id,
        "manifest_digest": manifest_digest if isinstance(manifest_digest, str) else manifest_digest.hex(),
        "task": task,
        "round": round,
        "attempt": attempt,
        "kind": "no_dp",
        "state": "charged",
    }
    if isinstance(params, GateParams):
        sharers, variance = 1, params.variance() if params.mode == "local" else 0
        if params.mode == "shared-noise":
            sharers = members - t
            shares = {u: params.variance(u - t) for u in range(params.minimum, members + 1)}
            # One less, because settling rounds down again, for a smaller cohort.
            whole = min((u - t) * share for u, share in shares.items())
            variance = min(shares[members], whole // sharers - 1)
        fields |= {
            "kind": "sum",
            "mode": params.mode,
            "sampling": params.sampling,
            "q": text_of(params.rate),
            "steps": params.steps,
            "dim": params.dim,
            "C": text_of(params.clip_norm),
            "step": text_of(params.grid_step),
            "eta": params.eta,
            "arith": params.arithmetic,
            "noise": "integer",
            "Delta_g": params.delta_g,
            "s_g_squared": variance,
            "members": members,
            "U_size": members,
            "t": t,
            "z_t": clipping.z_threshold(variance, params.delta_g, sharers),
            "z_w": clipping.z_worst(variance, params.delta_g),
            "beta": BETA,
        }
    return Event.from_fields(fields)


def to_grid(params: GateParams, clipped_sum: Vector) -> Integers:
    """Q = nearest(clamp(sum, -R, R) / grid_step), int64 [dim]; the rounding that Delta_g answers for."""
    clamped = np.clip(clipped_sum, -params.limit, params.limit)
    return np.rint(clamped / params.grid_step).astype(np.int64)


class Release:
    """Integers that may leave the hospital. Only a gate can make one; ``q`` is int64 [dim], read-only.

    Guarantee: only_the_gate_releases - no other construction succeeds, neither copying nor pickling.
    """

    __slots__ = ("_q",)
    _q: Integers

    def __init__(self, q: Integers, *, token: object = None) -> None:
        if token is not _TOKEN:
            raise RefusedError("privacy.egress", "a release is made by the gate only")
        kept = q.copy()
        kept.setflags(write=False)
        self._q = kept

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise RefusedError("privacy.egress", "a release is neither copied nor pickled")

    @property
    def q(self) -> Integers:
        """The quantised vector, int64 [dim], read-only."""
        return self._q


class Gate(ABC):
    """What training sees: coins, then a sum of clipped contributions, and at the end one release."""

    __slots__ = ("_dim", "_done", "_finished", "_steps")

    def __init__(self, params: GateParams | PlainParams) -> None:
        self._dim = params.dim
        self._steps = params.steps
        self._done = 0
        self._finished = False

    @abstractmethod
    def coins(self, n_patients: int) -> NDArray[np.bool_]:
        """Which of this hospital's patients take part in the next step, bool [n_patients]."""

    def _check(self, vector: Vector, what: str) -> Vector:
        if self._finished:
            raise RefusedError("privacy.gate-finished", "this gate has made its release")
        if not isinstance(vector, np.ndarray) or vector.dtype != np.float64 or vector.shape != (self._dim,):
            raise RefusedError("privacy.gate-shape", f"the {what} must be float64 of shape ({self._dim},)")
        if not np.isfinite(vector).all():
            raise RefusedError("privacy.gate-not-finite", f"the {what} is not finite")
        return vector

    def _check_step(self, vector: Vector) -> Vector:
        if self._done >= self._steps:
            raise RefusedError("privacy.gate-steps", f"the charged event has only {self._steps} steps")
        return self._check(vector, "sum")


class _Tossing(Gate):
    """A gate with differential privacy tosses one coin for each patient and step."""

    __slots__ = ("_entropy", "_params", "_tossed")

    def __init__(self, params: GateParams, entropy: Entropy) -> None:
        super().__init__(params)
        self._params = params
        self._entropy = entropy
        self._tossed = False

    def coins(self, n_patients: int) -> NDArray[np.bool_]:
        """One fresh coin per patient for the next step, bool [n_patients]; all True for full batches.

        Raises: RefusedError for more patients than the public bound, or a second toss for one step.
        """
        if not 0 <= n_patients <= self._params.max_patients:
            problem = "this hospital has more patients than the manifest's max_patients"
            remedy = "Ask the coordinator for a study with a higher max_patients."
            raise RefusedError("privacy.max-patients", problem, remedy=remedy)
        if self._params.sampling == "full":
            return np.ones(n_patients, dtype=np.bool_)
        if self._tossed:
            raise RefusedError("privacy.gate-coins", "the coins of this step have been tossed")
        self._tossed = True
        return coins(self._params.q, n_patients, self._entropy)

    def _take(self, clipped_sum: Vector) -> Integers:
        """Q of the next step. Raises RefusedError as ``step``."""
        self._check_step(clipped_sum)
        if self._params.sampling == "poisson" and not self._tossed:
            raise RefusedError("privacy.gate-coins", "a Poisson step needs its coins first")
        self._done += 1
        self._tossed = False
        return to_grid(self._params, clipped_sum)


class SteppingGate(Gate):
    """A gate whose steps come back to the optimiser, which the one release at the end is computed from."""

    __slots__ = ()

    @abstractmethod
    def step(self, clipped_sum: Vector) -> Vector:
        """Release one sum of clipped contributions, float64 [dim], to the optimiser."""

    def finish(self, delta: Vector, quantise: Quantise) -> Release:
        """Quantise ``delta`` (float64 [dim], computed from what ``step`` returned) and release it, once.

        Assumes: ``delta`` is a function of the results of ``step`` and of public values alone.
        Raises: RefusedError unless exactly the charged number of steps was done; FailureError when the
        quantiser does not give int64 [dim].
        """
        if self._done != self._steps:
            problem = f"{self._done} of {self._steps} charged steps were done before the release"
            raise RefusedError("privacy.gate-steps", problem)
        self._check(delta, "change of the model")
        self._finished = True
        q = quantise(delta)
        if not isinstance(q, np.ndarray) or q.dtype != np.int64 or q.shape != (self._dim,):
            problem = f"the quantiser must give int64 of shape ({self._dim},)"
            raise FailureError("privacy.gate-quantiser", problem)
        return Release(q, token=_TOKEN)


class LocalGate(_Tossing, SteppingGate):
    """The gate of ``local``: full noise on every step, from one entropy source, for one round.

    ``entropy(n)`` gives n uniformly random bytes; product code passes os.urandom.

    Guarantee: every_step_is_noised - each result is (nearest(sum / grid_step) + noise) * grid_step.
    Guarantee: steps_are_counted - a step more or less than charged gives no release.
    Assumes: the sum given to ``step`` has one contribution of norm at most C for each patient whose
    coin fell, and no other (``clipping.clipped_sum`` makes such sums).
    """

    __slots__ = ("_variance",)

    def __init__(self, params: GateParams, entropy: Entropy) -> None:
        if params.mode != "local":
            raise RefusedError("privacy.gate-mode", "this gate adds the noise of local alone")
        super().__init__(params, entropy)
        self._variance = params.variance()

    def step(self, clipped_sum: Vector) -> Vector:
        """Clamp, round to the grid, add noise; returns float64 [dim] in the units of the sum.

        Raises: RefusedError past the charged steps, before the coins of a Poisson step, for another
        shape or dtype, or a sum that is not finite (clipping makes finite sums whatever the rows).
        """
        params = self._params
        noisy = self._take(clipped_sum) + discrete_gaussian(self._variance, params.dim, self._entropy)
        released: Vector = noisy.astype(np.float64) * params.grid_step
        return released


class SharedGate(_Tossing):
    """The gate of ``shared-noise``: one sum a round. The hospital's share of the noise comes under the masks,
    in ``common.secagg.site``, when the cohort that shares it is known.

    Assumes: as ``LocalGate``; the release goes nowhere but to the secure sum, with its noise.
    """

    __slots__ = ()

    def __init__(self, params: GateParams, entropy: Entropy) -> None:
        if params.mode != "shared-noise":
            raise RefusedError("privacy.gate-mode", "this gate is for shared noise alone")
        super().__init__(params, entropy)

    def contribute(self, clipped_sum: Vector) -> Release:
        """Clamp, round to the grid, release, once. Raises: RefusedError as ``LocalGate.step``."""
        q = self._take(clipped_sum)
        self._finished = True
        return Release(q, token=_TOKEN)


class PlainGate(SteppingGate):
    """The gate of a study without differential privacy: counts steps, adds nothing."""

    __slots__ = ()

    def __init__(self, params: PlainParams) -> None:
        super().__init__(params)

    def coins(self, n_patients: int) -> NDArray[np.bool_]:
        """All True, bool [n_patients]."""
        return np.ones(n_patients, dtype=np.bool_)

    def step(self, clipped_sum: Vector) -> Vector:
        """A copy of the sum, float64 [dim]."""
        self._check_step(clipped_sum)
        self._done += 1
        return clipped_sum.copy()
