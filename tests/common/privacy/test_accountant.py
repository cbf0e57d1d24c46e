import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from common.errors import UsageError
from common.privacy import accountant
from common.privacy.accountant import Term
from common.privacy.events import Event
from common.privacy.filter import ORDERS
from common.privacy.gate import PlainParams, plan_event

MakeEvent = Callable[..., Event]


def no_dp() -> Event:
    return plan_event(PlainParams(5, 2), "ab" * 16, "cd" * 32, "training", 1, 1, 4, 1, "ef" * 16)


def test_rho_agrees_with_dp_accounting() -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    for q in (1.0, 0.5, 0.1, 0.01, 1e-4):
        for z in (0.3, 0.7, 1.0, 2.5, 8.0, 40.0):
            oracle = RdpAccountant(ORDERS)
            event = GaussianDpEvent(z)
            oracle.compose(event if q == 1.0 else PoissonSampledDpEvent(q, event), 7)
            for order, expected in zip(ORDERS, oracle._rdp, strict=True):
                units = accountant.rho_units(Term(Fraction(q), Fraction(z), 7), order)
                ours = units / accountant.UNITS
                assert ours == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("z", [Fraction(1, 3), Fraction(7, 2), Fraction(4000000494053, 10**12)])
def test_full_batches_are_exact_and_round_up(z: Fraction) -> None:
    for order in ORDERS:
        exact = Fraction(9 * order) / (2 * z * z) * 2**64
        assert exact <= accountant.rho_units(Term(Fraction(1), z, 9), order) < exact + 1


def test_sampled_rho_is_an_upper_bound_of_the_rational_sum() -> None:
    """The moment with e replaced from below by rationals is a lower bound, exact otherwise."""
    q, z = Fraction(1, 10), Fraction(2)
    for order in ORDERS:
        below = sum(
            math.comb(order, k)
            * (1 - q) ** (order - k)
            * q**k
            * sum((Fraction(k * k - k) / (2 * z * z)) ** i / math.factorial(i) for i in range(4 * k * k + 40))
            for k in range(min(order, 8) + 1)
        )
        units = accountant.rho_units(Term(q, z, 1), order)
        assert math.exp(units / 2**64 * (order - 1)) >= float(below) * (1 - 1e-13)


def test_sampling_never_costs_more_and_grows_with_the_rate() -> None:
    for z in (Fraction(1, 1000), Fraction(1, 25), Fraction(1, 2), Fraction(3)):
        for order in ORDERS:
            costs = [
                accountant.rho_units(Term(q, z, 5), order)
                for q in (
                    Fraction(1, 10**9),
                    Fraction(1, 100),
                    Fraction(1, 2),
                    Fraction(999, 1000),
                    Fraction(1),
                )
            ]
            assert costs == sorted(costs)
            assert costs[0] > 0


def integrated_delta(epsilon: float, mu: float) -> float:
    """Hockey stick of N(mu, 1) against N(0, 1) by the trapezium rule."""
    x = np.linspace(-12 + mu, mu + 14, 400_001)
    p = np.exp(-((x - mu) ** 2) / 2) / math.sqrt(2 * math.pi)
    p_other = np.exp(epsilon - x**2 / 2) / math.sqrt(2 * math.pi)
    return float(np.maximum(0.0, p - p_other).sum() * (x[1] - x[0]))


def test_gaussian_closed_form() -> None:
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    for mu in (0.01, 0.1, 0.7, 1.0, 3.0, 10.0):
        mechanism = GaussianPrivacyLoss(1 / mu)
        for epsilon in (0.0, 0.05, 0.3, 1.0, 3.0, 8.0, 30.0):
            ours = accountant.gaussian_delta(epsilon, mu)
            oracle = mechanism.get_delta_for_epsilon(epsilon)
            if oracle > 1e-14:
                assert ours == pytest.approx(oracle, rel=1e-7)
            assert ours == pytest.approx(integrated_delta(epsilon, mu), rel=1e-6, abs=1e-9)
        for delta in (1e-3, 1e-6, 1e-10):
            ours = accountant.gaussian_epsilon(Fraction(mu) ** 2, delta)
            assert accountant.gaussian_delta(ours, mu) <= delta * (1 + 1e-10)
            assert accountant.gaussian_delta(ours * (1 - 1e-9) - 1e-9, mu) > delta or ours == 0
            assert mechanism.get_delta_for_epsilon(ours) == pytest.approx(delta, rel=1e-5)


def test_huge_losses_stay_finite_numbers() -> None:
    epsilon = accountant.gaussian_epsilon(Fraction(10**4), 1e-6)
    assert 5000 < epsilon < 5000 + 100 * math.sqrt(2 * math.log(1e6)) + 1
    assert accountant.gaussian_epsilon(Fraction(10**400), 1e-6) == math.inf
    assert accountant.gaussian_epsilon(Fraction(0), 1e-6) == 0.0


def test_full_batches_compose_as_one_gaussian(make_event: MakeEvent) -> None:
    events = [make_event(z=5.0, steps=4), make_event(z=9.5, steps=11)]
    mu_squared = sum((event.mechanism.steps / event.mechanism.z_t**2 for event in events), Fraction(0))
    expected = accountant.gaussian_epsilon(mu_squared, 1e-6) * accountant.PLD_MARGIN
    assert accountant.pld_epsilon(events, 1e-6, "t") == pytest.approx(expected, rel=1e-9)
    assert accountant.pld_epsilon(events, 1e-6, "t") >= expected


def test_pld_agrees_with_dp_accounting(make_event: MakeEvent) -> None:
    from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    events = [
        make_event(z=2.0, rate=0.2, steps=30),
        make_event(z=2.0, rate=0.2, steps=20),
        make_event(z=12.0),
    ]

    def theirs(event: Event) -> DpEvent:
        mechanism = event.mechanism
        base = GaussianDpEvent(float(mechanism.z_t))
        sampled = base if mechanism.q == 1 else PoissonSampledDpEvent(float(mechanism.q), base)
        return SelfComposedDpEvent(sampled, mechanism.steps)

    oracle = PLDAccountant()
    for event in events:
        oracle.compose(theirs(event))
    expected = oracle.get_epsilon(1e-6)
    ours = accountant.pld_epsilon(events, 1e-6, "t")
    assert expected <= ours * (1 + 1e-9)
    assert ours == pytest.approx(expected, rel=0.01)
    assert accountant.pld_epsilon(events[:2], 1e-6, "t") < ours


def test_a_release_without_noise_is_infinite_and_nothing_is_zero(make_event: MakeEvent) -> None:
    assert accountant.pld_epsilon([make_event(), no_dp()], 1e-6, "t") == math.inf
    assert accountant.pld_epsilon([], 1e-6, "t") == 0.0


def test_the_samplers_slack_is_taken_from_delta() -> None:
    term = Term(Fraction(1), Fraction(5), 4)
    free = accountant.compose_epsilon([term], 1e-6)
    exact_need = Fraction(1, 10**9)
    costed = accountant.compose_epsilon([term], 1e-6, exact_need)
    assert free < costed
    assert accountant.gaussian_delta(costed, 0.4) + (1 + math.exp(costed)) * 1e-9 <= 1e-6 * (1 + 1e-9)
    assert accountant.compose_epsilon([term], 1e-6, Fraction(1, 10**6)) == math.inf
    # Nearly all of delta used up: what is left needs an epsilon past the one that the slack was taken at.
    ceiling = free * 1.001 + 0.01
    nearly = Fraction((1e-6 - 1e-9) / (1 + math.exp(ceiling)))
    assert accountant.compose_epsilon([term], 1e-6, nearly) == math.inf
    assert accountant.compose_epsilon([Term(Fraction(1), Fraction(1, 100), 1)], 1e-6, exact_need) == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-6, math.nan])
def test_impossible_deltas_are_refused(delta: float) -> None:
    with pytest.raises(UsageError):
        accountant.compose_epsilon([], delta)


def test_planned_noise_is_the_smallest_for_the_pld() -> None:
    noise = accountant.noise_for_epsilon(3.0, 1e-6, 20, dim=31, members=4)
    assert accountant.gaussian_epsilon(20 / Fraction(str(noise)) ** 2, 1e-6) <= 3.0
    assert accountant.gaussian_epsilon(20 / (Fraction(str(noise)) - Fraction(1, 1000)) ** 2, 1e-6) > 3.0
    with pytest.raises(UsageError):
        accountant.noise_for_epsilon(3.0, 1e-30, 20, dim=31)


def test_the_accountant_loads_no_heavy_library_until_asked() -> None:
    code = (
        "import sys, common.privacy.filter, common.privacy.gate;"
        "from common.privacy.filter import noise_for_filter;"
        "noise_for_filter(3.0, 1e-6, 20, 20, dim=31, sampling_rate=0.1);"
        "print([name for name in ('dp_accounting', 'torch', 'scipy', 'flwr') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
