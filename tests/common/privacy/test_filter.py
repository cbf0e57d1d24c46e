import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RefusedError, UsageError
from common.privacy import clipping
from common.privacy.accountant import UNITS
from common.privacy.events import Event
from common.privacy.filter import (
    ORDERS,
    Cap,
    admits,
    bound_units,
    noise_for_filter,
    odometer,
    rounds_left,
)
from common.privacy.gate import GateParams, PlainParams, plan_event

MakeEvent = Callable[..., Event]
CAP = Cap(3.0, 3.0, 1e-6)


def event(z: float, steps: int, name: int, rate: float = 1.0) -> Event:
    sampling = "full" if rate == 1.0 else "poisson"
    params = GateParams(1.0, 0.0005, 31, z, sampling, rate, steps, 1000, "f64_bounded")  # type: ignore[arg-type]
    return plan_event(params, "ab" * 16, b"\x07" * 32, "training", 1, 1, 4, 1, f"{name:032x}")


def other_kind(kind: str, name: int, **changes: object) -> Event:
    plain = plan_event(PlainParams(5, 2), "ab" * 16, "cd" * 32, "training", 1, 1, 4, 1, f"{name:032x}")
    return Event.from_fields({**plain.to_fields(), "kind": kind, **changes})


def shared(z: float, cohort: int, t: int, name: int) -> Event:
    fields = event(z, 1, name).to_fields()
    delta_g = int(fields["Delta_g"])
    variance = clipping.noise_variance(Fraction(str(z)), delta_g, cohort - t)
    return Event.from_fields(
        {
            **fields,
            "mode": "shared-noise",
            "s_g_squared": variance,
            "members": cohort,
            "U_size": cohort,
            "t": t,
            "z_t": clipping.z_threshold(variance, delta_g, cohort - t),
            "z_w": clipping.z_worst(variance, delta_g),
        }
    )


def naive_bound(epsilon: Decimal, delta: Decimal, slack: Decimal, a: int) -> Decimal | None:
    left = delta - slack * (1 + epsilon.exp())
    if left <= 0:
        return None
    return epsilon + ((left / 6).ln() + Decimal(a).ln()) / (a - 1) - (Decimal(a - 1) / a).ln()


def naive_admits(events: list[Event], cap: Cap, view: str) -> bool:
    """The formula of the specification, 110 digits, full batches only."""
    with localcontext(prec=110):
        epsilon = Decimal(str(cap.epsilon_t if view == "t" else cap.epsilon_w))
        slack = Decimal(0)
        for e in events:
            slack += Decimal(e.dim or 0) * (e.steps or 0) * (e.u_size or 0) * Decimal(e.beta or 0)
        for a in ORDERS:
            spent = sum(
                (Decimal(e.steps or 0) * a / (2 * Decimal(getattr(e, f"z_{view}")) ** 2)) for e in events
            )
            bound = naive_bound(epsilon, Decimal(str(cap.delta)), slack, a)
            if bound is not None and spent <= bound:
                return True
        return False


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1.0, 3.7, 8.0, 20.0]), st.integers(1, 12)), max_size=12),
    st.sampled_from([0.5, 1.0, 3.0, 10.0]),
    st.sampled_from([0.3, 3.0, 20.0]),
    st.sampled_from([1e-5, 1e-6, 1e-9]),
    st.integers(0, 4),
    st.booleans(),
)
def test_filter_agrees_with_the_naive_oracle(
    asked: list[tuple[float, int]], epsilon_t: float, epsilon_w: float, delta: float, held: int, mixed: bool
) -> None:
    """Events of all sizes and modes arrive; whatever fits is charged; every answer agrees."""
    cap = Cap(epsilon_t, epsilon_w, delta)
    reserved = [event(15.0, 1, 900 + index) for index in range(held)]
    charged: list[Event] = []
    for name, (z, steps) in enumerate(asked):
        candidate = shared(z, 5, 1, name) if mixed and name % 2 else event(z, steps, name)
        verdict = admits(charged, candidate, cap, reserved)
        everything = [*charged, *reserved, candidate]
        expected = naive_admits(everything, cap, "t") and naive_admits(everything, cap, "w")
        assert verdict.admitted == expected
        assert verdict.admitted == (verdict.reason == "")
        if verdict.admitted:
            assert verdict.odometer_t <= epsilon_t + 1e-6
            assert verdict.odometer_w <= epsilon_w + 1e-6
            charged.append(candidate)
        else:
            assert verdict.odometer_t > epsilon_t - 1e-9 or verdict.odometer_w > epsilon_w - 1e-9


@settings(max_examples=200, deadline=None)
@given(
    st.fractions(Fraction(1, 100), 50, max_denominator=1000),
    st.sampled_from([Fraction(1, 10**5), Fraction(1, 10**6), Fraction(1, 10**12)]),
    st.fractions(0, Fraction(1, 10**14)),
    st.sampled_from(ORDERS),
)
def test_bounds_round_down(epsilon: Fraction, delta: Fraction, slack: Fraction, order: int) -> None:
    with localcontext(prec=110):
        values = [Decimal(x.numerator) / Decimal(x.denominator) for x in (epsilon, delta, slack)]
        exact = naive_bound(values[0], values[1], values[2], order)
    bound = bound_units(epsilon, delta, slack, order)
    assert (bound is None) == (exact is None)
    if bound is not None and exact is not None:
        assert bound <= Fraction(exact) * UNITS < bound + 2


def test_an_admitted_total_is_a_true_epsilon() -> None:
    """The filter never admits what the closed form of the same composition puts above the cap."""
    from common.privacy.accountant import pld_epsilon

    for z, rate in ((4.0, 1.0), (12.0, 1.0), (1.5, 0.05)):
        count = rounds_left([], event(z, 1, 0, rate), CAP)
        history = [event(z, max(count, 1), 1, rate)]
        if count:
            assert pld_epsilon(history, 1e-6, "t") <= 3.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=10), st.integers(1, 40))
def test_spending_never_frees_budget(steps: list[int], last: int) -> None:
    history = [event(8.0, count, name) for name, count in enumerate(steps)]
    candidate = event(8.0, last, 99)
    answers = [admits(history[:size], candidate, CAP).admitted for size in range(len(history) + 1)]
    assert answers == sorted(answers, reverse=True)
    assert admits(history[::-1], candidate, CAP) == admits(history, candidate, CAP)
    odometers = [odometer(history[:size], 1e-6, "t") for size in range(len(history) + 1)]
    assert odometers == sorted(odometers)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1.0, 2.0, 8.0, 50.0]), st.integers(1, 9)), min_size=1, max_size=5),
    st.sampled_from([1e-5, 1e-6, 1e-10]),
)
def test_odometer_is_what_the_filter_needs(asked: list[tuple[float, int]], delta: float) -> None:
    events = [event(z, steps, name) for name, (z, steps) in enumerate(asked)]
    value = odometer(events, delta, "w")
    if value == math.inf:
        caps = [Cap(float(epsilon), float(epsilon), delta) for epsilon in (10, 20, 25, 30, 40, 80, 10_000)]
        assert not any(admits(events[:-1], events[-1], cap).admitted for cap in caps)
        return
    assert admits(events[:-1], events[-1], Cap(value, value, delta)).admitted
    assert not admits(events[:-1], events[-1], Cap(value - 1e-5, value - 1e-5, delta)).admitted


def test_odometers_at_the_ends() -> None:
    assert odometer([], 1e-6, "t") == 0.0
    assert odometer([other_kind("declared", 1)], 1e-6, "t") == 0.0
    assert odometer([event(8.0, 1, 1), other_kind("no_dp", 2)], 1e-6, "t") == math.inf
    assert odometer([event(0.03, 100, 1)], 1e-6, "t") == math.inf
    with pytest.raises(UsageError):
        odometer([], 0.0, "t")


def test_rounds_left_is_what_is_admitted() -> None:
    one = event(8.0, 1, 0)
    history = [event(20.0, 9, 1000)]
    reserved = [event(30.0, 2, 2000)]
    left = rounds_left(history, one, CAP, reserved)
    assert left > 5
    for name in range(left):
        candidate = event(8.0, 1, name + 1)
        assert admits(history, candidate, CAP, reserved).admitted
        history.append(candidate)
    refused = admits(history, event(8.0, 1, 999), CAP, reserved)
    assert (refused.admitted, refused.reason) == (False, "epsilon_t")
    assert rounds_left(history, one, CAP, reserved) == 0


def test_rounds_left_has_an_end() -> None:
    assert rounds_left([], event(33000.0, 1, 0), CAP) == 1_000_000
    assert rounds_left([other_kind("no_dp", 1)], event(8.0, 1, 0), CAP) == 0
    assert rounds_left([], shared(8.0, 5, 1, 0), Cap(3.0, None, 1e-6)) == 0
    with pytest.raises(UsageError):
        rounds_left([], other_kind("declared", 1), CAP)


def test_both_views_must_admit() -> None:
    candidate = shared(8.0, 5, 1, 0)
    assert admits([], candidate, Cap(3.0, 3.0, 1e-6)).admitted
    worst = odometer([candidate], 1e-6, "w")
    threshold = odometer([candidate], 1e-6, "t")
    assert worst > threshold * 1.5
    assert admits([], candidate, Cap(threshold, worst, 1e-6)).admitted
    assert admits([], candidate, Cap(threshold - 1e-4, worst, 1e-6)).reason == "epsilon_t"
    assert admits([], candidate, Cap(threshold, worst - 1e-4, 1e-6)).reason == "epsilon_w"


def test_without_a_worst_case_cap_only_local_runs() -> None:
    cap = Cap(3.0, None, 1e-6)
    assert admits([], event(8.0, 1, 0), cap).admitted
    assert admits([], shared(8.0, 5, 1, 0), cap).reason == "no_epsilon_w"
    assert admits([shared(8.0, 5, 1, 0)], event(8.0, 1, 1), cap).reason == "no_epsilon_w"


def test_a_release_without_noise_closes_the_register() -> None:
    plain, candidate = other_kind("no_dp", 1), event(8.0, 1, 0)
    for verdict in (
        admits([], plain, CAP),
        admits([plain], candidate, CAP),
        admits([], candidate, CAP, [plain]),
    ):
        assert (verdict.admitted, verdict.reason) == (False, "no_dp")
        assert verdict.odometer_t == verdict.odometer_w == math.inf


def test_an_event_is_charged_once_and_a_declaration_made_once() -> None:
    one = event(8.0, 1, 0)
    assert admits([one], one, CAP).reason == "charged_already"
    assert admits([], one, CAP, [one]).reason == "charged_already"
    first = other_kind("declared", 1, reason="approved")
    assert admits([], first, CAP).admitted
    assert admits([first], other_kind("declared", 2, reason="approved"), CAP).reason == "declared_already"
    assert admits([first], other_kind("declared", 2, reason="paused"), CAP).admitted
    full = [event(8.0, 20, 5)]
    assert not admits(full, event(8.0, 1, 6), CAP).admitted
    assert admits(full, first, CAP).admitted


@pytest.mark.parametrize("state", ["reserved", "charged", "released"])
def test_every_state_counts_in_full(state: str) -> None:
    past = event(8.0, 20, 1).with_state(state)  # type: ignore[arg-type]
    assert not admits([past], event(8.0, 1, 2), CAP).admitted
    assert odometer([past], 1e-6, "t") == odometer([event(8.0, 20, 3)], 1e-6, "t") > 0


def test_registers_are_never_mixed(make_event: MakeEvent) -> None:
    foreign = make_event(register="cd" * 16)
    for charged, reserved in (([foreign], []), ([], [foreign])):
        with pytest.raises(RefusedError):
            admits(charged, event(8.0, 1, 0), CAP, reserved)
        with pytest.raises(RefusedError):
            rounds_left(charged, event(8.0, 1, 0), CAP, reserved)


def test_lowering_a_cap_acts_at_once() -> None:
    history = [event(8.0, 10, 1)]
    assert admits(history, event(8.0, 1, 2), CAP).admitted
    assert not admits(history, event(8.0, 1, 2), Cap(1.0, 1.0, 1e-6)).admitted


@pytest.mark.parametrize(
    ("epsilon_t", "epsilon_w", "delta"),
    [
        (0.0, 1.0, 1e-6),
        (1.0, 0.0, 1e-6),
        (-1.0, 1.0, 1e-6),
        (math.nan, 1.0, 1e-6),
        (math.inf, 1.0, 1e-6),
        (1.0, math.nan, 1e-6),
        (1e5, 1.0, 1e-6),
        (1.0, 1.0, 0.0),
        (1.0, 1.0, 1.0),
        (1.0, 1.0, math.nan),
    ],
)
def test_impossible_caps_are_refused(epsilon_t: float, epsilon_w: float, delta: float) -> None:
    with pytest.raises(UsageError):
        Cap(epsilon_t, epsilon_w, delta)


@pytest.mark.parametrize(
    ("dim", "rounds", "steps", "rate"),
    [(31, 20, 1, 1.0), (62, 20, 1, 1.0), (62, 5, 4, 1.0), (31, 10, 3, 0.2)],
)
def test_calibrated_noise_fits(dim: int, rounds: int, steps: int, rate: float) -> None:
    z = noise_for_filter(3.0, 1e-6, rounds * steps, rounds, dim=dim, sampling_rate=rate, members=4)
    assert z == round(z, 3)

    def planned(noise: float) -> bool:
        sampling = "full" if rate == 1.0 else "poisson"
        params = GateParams(
            1.0,
            0.00025,
            dim,
            noise,
            sampling,  # type: ignore[arg-type]
            rate,
            steps,
            1000,
            "f64_bounded",
        )
        history: list[Event] = []
        for name in range(rounds):
            candidate = plan_event(params, "ab" * 16, b"\x07" * 32, "training", 1, 1, 4, 1, f"{name:032x}")
            if not admits(history, candidate, CAP).admitted:
                return False
            history.append(candidate)
        return True

    assert planned(z)
    assert not planned(round(z - 0.001, 3))


def test_impossible_calibrations_are_refused() -> None:
    for epsilon, delta, steps, rounds, rate in (
        (3.0, 1e-6, 20, 3, 1.0),
        (3.0, 1e-6, 0, 1, 1.0),
        (3.0, 1e-6, 20, 0, 1.0),
        (0.0, 1e-6, 20, 20, 1.0),
        (3.0, 1e-30, 20, 20, 1.0),
        (3.0, 1e-6, 20, 20, 0.0),
    ):
        with pytest.raises(UsageError):
            noise_for_filter(epsilon, delta, steps, rounds, dim=31, sampling_rate=rate)
