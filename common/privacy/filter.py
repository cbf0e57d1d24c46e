"""The privacy filter of one register: may this event still be charged, and how much is spent so far.

Source: PRIVACY.md "Registers, budget, filter"; Feldman, Zrnic, arXiv 2008.11193 (adaptive composition with
a fixed order); Canonne, Kamath, Steinke, arXiv 2004.00010, proposition 12 (Renyi to epsilon, delta).
Rules: admission by the six orders in both views, in integers of 2^-64 with every bound rounded against the
study; a cap, a register or an event that is unclear is refused; the caller holds one lock around the
decision and the charge.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Final, Literal, NamedTuple, TypeAlias

from common.errors import RefusedError, UsageError
from common.privacy import accountant
from common.privacy.accountant import EXACT, UNITS, View, check_delta
from common.privacy.decimals import exact, fraction_of
from common.privacy.events import Event

ORDERS: Final = (3, 4, 6, 10, 20, 40)
ROUNDS_LIMIT: Final = 1_000_000
VIEWS: Final[tuple[View, View]] = ("t", "w")
_ODOMETER_PLACES: Final = 6
_LARGEST_EPSILON: Final = 10_000
_SAFETY: Final = Decimal("1e-40")


@dataclass(frozen=True, slots=True)
class Cap:
    """A register's caps: ``epsilon_t`` while at most t members collude, ``epsilon_w`` when all others do.

    Without ``epsilon_w`` only ``local`` studies run. Raises: UsageError unless 0 < epsilon <= 10000 and
    0 < delta < 1.
    """

    epsilon_t: float
    epsilon_w: float | None
    delta: float

    def __post_init__(self) -> None:
        for epsilon in (self.epsilon_t, self.epsilon_w):
            if epsilon is not None and not 0 < epsilon <= _LARGEST_EPSILON:
                raise UsageError("privacy.cap", "a cap's epsilon must be positive and at most 10000")
        check_delta(self.delta)

    def epsilon(self, view: View) -> float | None:
        """The cap of one view."""
        return self.epsilon_t if view == "t" else self.epsilon_w


Reason: TypeAlias = Literal[
    "", "epsilon_t", "epsilon_w", "no_dp", "no_epsilon_w", "charged_already", "declared_already"
]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The filter's answer. Odometers are those of everything charged, reserved, and the candidate."""

    admitted: bool
    odometer_t: float
    odometer_w: float
    reason: Reason


class _Totals(NamedTuple):
    """Spent Renyi divergence per order, in units of 2^-64, and the sampler's slack."""

    units: dict[int, int]
    slack: Fraction

    @classmethod
    def of(cls, events: Sequence[Event], view: View) -> "_Totals":
        # Rounds of one study are alike: count them by their texts, do the arithmetic once for each kind.
        kinds = Counter(
            (e.q or "", (e.z_t if view == "t" else e.z_w) or "", e.steps or 0, e.dim, e.u_size, e.beta or "")
            for e in events
            if e.kind != "declared"
        )
        costs = [(n, _kind_units(q, z, steps)) for (q, z, steps, _, _, _), n in kinds.items()]
        units = {a: sum(n * cost[at] for n, cost in costs) for at, a in enumerate(ORDERS)}
        coordinates: Counter[str] = Counter()
        for (_, _, steps, dim, u_size, beta), n in kinds.items():
            coordinates[beta] += n * steps * (dim or 0) * (u_size or 0)
        return cls(units, sum((n * fraction_of(beta) for beta, n in coordinates.items()), Fraction(0)))

    def plus(self, other: "_Totals", times: int = 1) -> "_Totals":
        units = {order: self.units[order] + times * other.units[order] for order in ORDERS}
        return _Totals(units, self.slack + times * other.slack)

    def fit(self, epsilon: Fraction, delta: Fraction) -> bool:
        """Whether for some order the total is within B(a)."""
        bounds = {order: bound_units(epsilon, delta, self.slack, order) for order in ORDERS}
        return any(bound is not None and self.units[order] <= bound for order, bound in bounds.items())


@lru_cache(maxsize=1 << 16)
def _kind_units(q: str, z: str, steps: int) -> tuple[int, ...]:
    """``rho_units`` of the events with these texts, for each of ORDERS."""
    term = accountant.Term(fraction_of(q), fraction_of(z), steps)
    return tuple(accountant.rho_units(term, order) for order in ORDERS)


@lru_cache(maxsize=4096)
def bound_units(epsilon: Fraction, delta: Fraction, slack: Fraction, order: int) -> int | None:
    """B(a) in units of 2^-64, rounded down; None when delta' is not positive.

    B(a) = epsilon + (ln(delta'/6) + ln a)/(a-1) - ln((a-1)/a), delta' = delta - (1 + e^epsilon) slack.
    Guarantee: bounds_round_down - never above a 100-digit evaluation, less than two units below it.
    """
    with localcontext(EXACT):
        left = _decimal(delta) - (1 + _decimal(epsilon).exp()) * _decimal(slack)
        if left <= 0:
            return None
        value = _decimal(epsilon) + _conversion(left, order) - _SAFETY
        return math.floor(Fraction(value) * UNITS)


def _conversion(delta_left: Decimal, order: int) -> Decimal:
    """(ln(delta'/6) + ln a)/(a-1) - ln((a-1)/a), the part of B(a) that delta' fixes."""
    a = Decimal(order)
    return ((delta_left / len(ORDERS)).ln() + a.ln()) / (a - 1) - ((a - 1) / a).ln()


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def _check_register(candidate: Event, history: Sequence[Event]) -> None:
    if any(event.register_id != candidate.register_id for event in history):
        problem = "events of different registers have no common budget"
        remedy = "Charge a study to the register that its data source names."
        raise RefusedError("privacy.register", problem, remedy=remedy)


def admits(charged: Sequence[Event], candidate: Event, cap: Cap, reserved: Sequence[Event] = ()) -> Verdict:
    """Whether ``candidate`` may be charged to the register that ``charged`` is the whole history of.

    ``reserved`` holds other studies' reservations (the candidate's own reservation is left out by the
    caller). Admitted iff for some order charged + reserved + candidate <= B, in both views. ``declared``
    costs nothing and is admitted once per manifest and reason. ``no_dp`` is never admitted: a policy that
    names such studies decides without the filter, and closes the register to every later study with DP.

    Guarantee: filter_agrees_with_the_naive_oracle - on random and adversarial interleavings.
    Guarantee: spending_never_frees_budget - more history never turns a refusal into an admission.
    Raises: RefusedError when the events belong to different registers.
    """
    history = (*charged, *reserved)
    _check_register(candidate, history)
    everything = (*history, candidate)
    if any(event.kind == "no_dp" for event in everything):
        return Verdict(False, math.inf, math.inf, "no_dp")
    reason = _refusal(history, candidate, cap)
    odometer_t, odometer_w = (odometer(everything, cap.delta, view) for view in VIEWS)
    return Verdict(reason == "", odometer_t, odometer_w, reason)


def _refusal(history: Sequence[Event], candidate: Event, cap: Cap) -> Reason:
    if any(event.event_id == candidate.event_id for event in history):
        return "charged_already"
    if candidate.kind == "declared":
        past = {(event.manifest_digest, event.reason) for event in history if event.kind == "declared"}
        return "declared_already" if (candidate.manifest_digest, candidate.reason) in past else ""
    everything = (*history, candidate)
    if _lacks_epsilon_w(everything, cap):
        return "no_epsilon_w"
    for view in VIEWS:
        if not _fits_cap(_Totals.of(everything, view), cap, view):
            return "epsilon_t" if view == "t" else "epsilon_w"
    return ""


def _lacks_epsilon_w(events: Sequence[Event], cap: Cap) -> bool:
    return cap.epsilon_w is None and any(e.kind == "sum" and e.mode != "local" for e in events)


def _fits_cap(totals: _Totals, cap: Cap, view: View) -> bool:
    epsilon = cap.epsilon(view)
    return epsilon is None or totals.fit(exact(epsilon), exact(cap.delta))


def odometer(events: Sequence[Event], delta: float, view: View) -> float:
    """The smallest epsilon at which the filter would admit all events, rounded up to 6 decimals.

    0 without a charged sum; infinite after ``no_dp``, or where the sampler's slack uses up delta.

    Guarantee: odometer_is_what_the_filter_needs - a cap there admits the history, one 10^-5 below does not.
    """
    if any(event.kind == "no_dp" for event in events):
        return math.inf
    check_delta(delta)
    totals = _Totals.of(events, view)
    if not any(totals.units.values()):
        return 0.0
    exact_delta = exact(delta)
    needed = min(_needed(totals, exact_delta, order) for order in ORDERS)
    if needed > _LARGEST_EPSILON:
        return math.inf
    scale = 10**_ODOMETER_PLACES
    ticks = max(0, math.ceil(needed * scale))
    # delta' was taken at a smaller epsilon than the rounded one, which can cost at most a tick.
    for ahead in range(3):
        if totals.fit(Fraction(ticks + ahead, scale), exact_delta):
            return (ticks + ahead) / scale
    return math.inf


def _needed(totals: _Totals, delta: Fraction, order: int) -> Decimal:
    """The epsilon at which ``order`` alone admits, by iterating upwards on delta'; infinite if none."""
    with localcontext(EXACT):
        spent = _decimal(Fraction(totals.units[order], UNITS))
        slack = _decimal(totals.slack)
        epsilon = Decimal(0)
        for _ in range(50):
            left = _decimal(delta) - (1 + epsilon.exp()) * slack
            if left <= 0:
                break
            following = max(spent - _conversion(left, order) + 2 * _SAFETY, Decimal(0))
            if following > _LARGEST_EPSILON:
                break
            if abs(following - epsilon) < Decimal("1e-9"):
                return following
            epsilon = following
    return Decimal("Infinity")


def rounds_left(charged: Sequence[Event], event: Event, cap: Cap, reserved: Sequence[Event] = ()) -> int:
    """How many more events like ``event`` the filter would admit one after another, at most 1000000.

    Guarantee: rounds_left_is_what_is_admitted - that many are admitted, the next is refused.
    Raises: UsageError unless the event is of kind ``sum``; RefusedError as ``admits``.
    """
    history = (*charged, *reserved)
    _check_register(event, history)
    if event.kind != "sum":
        raise UsageError("privacy.event-kind", "only rounds of kind sum can be counted")
    if any(past.kind == "no_dp" for past in history):
        return 0
    if _lacks_epsilon_w((*history, event), cap):
        return 0
    spent = {view: _Totals.of(history, view) for view in VIEWS}
    each = {view: _Totals.of((event,), view) for view in VIEWS}

    def fits(rounds: int) -> bool:
        return all(_fits_cap(spent[view].plus(each[view], rounds), cap, view) for view in VIEWS)

    low, high = 0, ROUNDS_LIMIT + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def noise_for_filter(
    epsilon: float,
    delta: float,
    steps_total: int,
    rounds: int,
    *,
    dim: int,
    sampling_rate: float = 1.0,
    members: int = 1,
) -> float:
    """Smallest noise multiplier, to 3 decimals upwards, with which a whole study fits under a fresh cap.

    ``steps_total`` optimiser steps in ``rounds`` equal rounds, one event each; ``dim`` coordinates and
    ``members`` hospitals enter only through the sampler's slack. For ``local``, where both views agree.

    Guarantee: calibrated_noise_fits - the planned events are all admitted, with 0.001 less they are not.
    Raises: UsageError when the rounds do not divide the steps, or no noise is enough.
    """
    if rounds < 1 or steps_total < 1 or steps_total % rounds:
        raise UsageError("privacy.rounds", "steps_total must be a positive multiple of rounds")
    cap = Cap(epsilon, epsilon, delta)
    q = exact(sampling_rate)
    if not 0 < q <= 1:
        raise UsageError("privacy.rate", "a sampling rate must be in (0, 1]")
    slack = accountant.sampler_slack(dim, steps_total, members)

    def fits(z: Fraction) -> bool:
        units = {
            order: rounds * accountant.rho_units(accountant.Term(q, z, steps_total // rounds), order)
            for order in ORDERS
        }
        return _fits_cap(_Totals(units, slack), cap, "t")

    return accountant.smallest_noise(fits)
