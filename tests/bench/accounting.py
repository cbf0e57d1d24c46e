"""What the accounting and the noise cost and give away: PLD, filter, admission, sampler."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, get_epsilon_gaussian
from dp_accounting.pld import PLDAccountant

from common.privacy import accountant, filter, noise
from common.privacy.accountant import pld_epsilon
from common.privacy.events import Event
from common.privacy.gate import GateParams, plan_event
from tests.bench.masking import one_core
from tests.bench.result import Result

DELTA = 1e-6
PAST = 1000
DRAWN = 1_000_000
SIGMAS = (16, 100, 1000, 10_000, 100_000, 1_000_000)
# Noise multipliers with which the PLD of the schedule is just within epsilon: what
# accountant.noise_for_epsilon gave for these q, T, delta = 1e-6 and 31 coordinates; a search of minutes.
EPSILONS = (1, 2, 3, 4, 5, 6, 7, 8, 20)
TIGHT = 8


@dataclass(frozen=True)
class Schedule:
    """``steps`` releases at rate ``q``; ``multipliers`` for each of EPSILONS."""

    name: str
    q: float
    steps: int
    multipliers: tuple[float, ...]


SCHEDULES = (
    Schedule(
        "full batch, T = 100", 1.0, 100, (42.247, 22.305, 15.439, 11.936, 9.801, 8.36, 7.318, 6.53, 3.091)
    ),
    Schedule(
        "q = .02, T = 1000", 0.02, 1000, (2.822, 1.628, 1.242, 1.056, 0.945, 0.871, 0.816, 0.773, 0.556)
    ),
    Schedule("q = .1, T = 100", 0.1, 100, (4.453, 2.498, 1.841, 1.511, 1.312, 1.178, 1.08, 1.004, 0.643)),
    Schedule("q = .3, T = 40", 0.3, 40, (8.254, 4.484, 3.191, 2.532, 2.132, 1.861, 1.665, 1.516, 0.848)),
)


@dataclass(frozen=True)
class Accounted:
    """Epsilon of one schedule: by our PLD, by dp-accounting's, exactly where known, and by the filter."""

    epsilon: int
    ours: float
    theirs: float
    exact: float | None
    filtered: float


def event(z: float, rate: float = 1.0, steps: int = 1, number: int = 0) -> Event:
    params = GateParams(
        clip_norm=1.0,
        grid_step=0.0005,
        dim=31,
        noise_multiplier=z,
        sampling="full" if rate == 1.0 else "poisson",
        rate=rate,
        steps=steps,
        max_patients=1000,
        arithmetic="f64_bounded",
    )
    return plan_event(params, "ab" * 16, "07" * 32, "training", 1, 1, 4, 1, f"{number:032x}")


@cache
def accounted(schedule: Schedule) -> tuple[Accounted, ...]:
    return tuple(_accounted(schedule, *pair) for pair in zip(EPSILONS, schedule.multipliers, strict=True))


def _accounted(schedule: Schedule, epsilon: int, z: float) -> Accounted:
    events = [event(z, schedule.q, schedule.steps)]
    z_t = float(events[0].mechanism.z_t)
    gaussian, full = GaussianDpEvent(z_t), schedule.q == 1
    theirs = PLDAccountant()
    theirs.compose(
        SelfComposedDpEvent(gaussian if full else PoissonSampledDpEvent(schedule.q, gaussian), schedule.steps)
    )
    return Accounted(
        epsilon,
        ours=pld_epsilon(events, DELTA, "t"),
        theirs=float(theirs.get_epsilon(DELTA)),
        exact=float(get_epsilon_gaussian(z_t / schedule.steps**0.5, DELTA)) if full else None,
        filtered=filter.odometer(events, DELTA, "t"),
    )


def epsilons() -> list[Result]:
    found = []
    for schedule in SCHEDULES:
        ratios = [a.ours / a.theirs for a in accounted(schedule)]
        below = 1e9 * max(0.0, *(1 - ratio for ratio in ratios))
        found.append(Result(f"pld.{schedule.name}: most above dp-accounting", max(ratios), "x", 1.01))
        # Theirs lies on a grid above the exact value, and both have the rounding of long FFTs.
        found.append(Result(f"pld.{schedule.name}: most below dp-accounting", below, "10⁻⁹", 0.0))
        exact = [a.ours / a.exact - 1 for a in accounted(schedule) if a.exact is not None]
        if exact:
            name = f"pld.{schedule.name}: least above the closed form"
            found.append(Result(name, 1e9 * min(exact), "10⁻⁹", at_least=0.0))
    for schedule in SCHEDULES:
        spent = [a.filtered / a.theirs for a in accounted(schedule) if a.epsilon <= TIGHT]
        found.append(Result(f"filter.{schedule.name}: / PLD of 1-8, most", max(spent), "x", 1.3))
        caps = dict(capped(schedule))
        most = max(ratio for cap, ratio in caps.items() if cap <= TIGHT)
        found.append(Result(f"filter.{schedule.name}: caps 1-8 / PLD, most", most, "x", 1.3))
        found.append(Result(f"filter.{schedule.name}: cap 20 / PLD", caps[20], "x"))
    return found


@cache
def capped(schedule: Schedule) -> tuple[tuple[int, float], ...]:
    """Each cap, and that cap over the PLD of the schedule with the least noise that it admits."""
    found = []
    for cap in EPSILONS:
        z = filter.noise_for_filter(
            cap, DELTA, schedule.steps, 1, dim=31, sampling_rate=schedule.q, members=4
        )
        found.append((cap, cap / pld_epsilon([event(z, schedule.q, schedule.steps)], DELTA, "t")))
    return tuple(found)


def history(kinds: int) -> list[Event]:
    """PAST rounds of so many mechanisms, every other one with Poisson sampling; one kind: full batches."""
    return [event(100.0 + n % kinds, 1.0 if n % kinds % 2 == 0 else 0.1, number=n + 1) for n in range(PAST)]


def admissions() -> list[Result]:
    found = []
    for kinds, name in ((1, "all alike"), (20, "of 20 kinds"), (PAST, "no two alike")):
        past, candidate = history(kinds), event(100.0)
        warm = [_admission_ms(past, candidate) for _ in range(11)][1:]
        cold = [_admission_ms(past, candidate, cold=True) for _ in range(3)]
        found.append(Result(f"admission.{PAST} events, {name}", statistics.median(warm), "ms", 50.0))
        found.append(
            Result(f"admission.{PAST} events, {name}, empty caches", statistics.median(cold), "ms", 50.0)
        )
    return found


def _admission_ms(past: Sequence[Event], candidate: Event, *, cold: bool = False) -> float:
    if cold:
        accountant._step_rho.cache_clear()
        filter.bound_units.cache_clear()
        filter._kind_units.cache_clear()
    started = time.process_time()
    verdict = filter.admits(past, candidate, filter.Cap(20.0, 20.0, DELTA))
    took = time.process_time() - started
    if not verdict.admitted:
        raise RuntimeError("the history was to leave room")
    return 1000 * took


def sampling() -> list[Result]:
    rates = {}
    for sigma in SIGMAS:
        noise.discrete_gaussian(sigma**2, 1000, os.urandom)
        took = []
        for _ in range(5):
            started = time.process_time()
            noise.discrete_gaussian(sigma**2, DRAWN, os.urandom)
            took.append(time.process_time() - started)
        rates[sigma] = DRAWN / min(took) / 1e6
    return [Result(f"sampler.sigma = {s}", rate, "10⁶/s", at_least=2.0) for s, rate in rates.items()]


def run() -> list[Result]:
    with one_core():
        return [*epsilons(), *admissions(), *sampling()]
