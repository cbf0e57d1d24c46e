"""What events cost: Renyi divergences for the filter, privacy loss distributions for reports.

Source: PRIVACY.md "Registers, budget, filter" (rho), "What is reported" (PLD); Mironov, Talwar, Zhang,
arXiv 1908.10530, sections 3.2-3.3 (sampled Gaussian at integer orders); Balle, Wang, arXiv 1805.06530,
theorem 8 (Gaussian closed form); dp-accounting (PLD). Rules: rho is an integer count of 2^-64, rounded up,
so a total does not depend on the order of addition or the machine; epsilon rounds up; full batches
compose as one Gaussian, in closed form; dp-accounting is imported only when Poisson sampling asks for it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache, partial
from typing import Final, Literal, NamedTuple, TypeAlias

from common.errors import UsageError
from common.privacy.decimals import exact, float_up, fraction_of
from common.privacy.events import BETA, Event

View: TypeAlias = Literal["t", "w"]

UNITS: Final = 2**64
# Recorded in reports: the discretisation of the privacy loss, the logarithm of the mass truncated from one
# step, and the mass truncated in each composition. Truncated mass counts as delta.
PLD_INTERVAL: Final = 1e-4
PLD_TAIL_LOG: Final = -50.0
PLD_COMPOSE_TAIL: Final = 1e-15
PLD_MARGIN: Final = 1 + 1e-8
NOISE_LIMIT: Final = 100_000
EXACT: Final = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)
_SAFETY: Final = Fraction(1, 10**40)
_SMALLEST_SAMPLED_Z: Final = Fraction(1, 20)


class Term(NamedTuple):
    """``steps`` releases of a Gaussian with noise multiplier ``z``, each patient sampled at rate ``q``."""

    q: Fraction
    z: Fraction
    steps: int


@lru_cache(maxsize=1 << 16)
def _step_rho(q: Fraction, z: Fraction, order: int) -> Fraction:
    """Renyi divergence of one step at an integer order, an upper bound within 10^-39."""
    full = order / (2 * z * z)
    # Sampling never costs more than the full batch; below this z the exact sum has terms of 10^5 digits.
    if q == 1 or z < _SMALLEST_SAMPLED_Z:
        return full
    with localcontext(EXACT):
        rate = Decimal(q.numerator) / Decimal(q.denominator)
        half = Decimal(z.denominator**2) / Decimal(2 * z.numerator**2)
        moment = Decimal(0)
        for k in range(order + 1):
            moment += math.comb(order, k) * (1 - rate) ** (order - k) * rate**k * (half * (k * k - k)).exp()
        rho = Fraction(moment.ln()) / (order - 1)
    return min(full, max(rho, Fraction(0)) + _SAFETY)


def rho_units(term: Term, order: int) -> int:
    """Renyi divergence of ``term`` at integer ``order`` >= 2, in units of 2^-64, rounded up.

    Full batch: steps * order / (2 z^2). Poisson: steps * SGM(q, z, order), the larger of both directions,
    which for a Gaussian is that of the mixture against the noise alone (arXiv 1908.10530, theorem 5).

    Guarantee: rho_agrees_with_dp_accounting - for full and Poisson sampling, at every order of the filter.
    """
    return math.ceil(term.steps * _step_rho(term.q, term.z, order) * UNITS)


def term_of(event: Event, view: View) -> Term:
    """The Gaussian term of an event of kind ``sum`` in one view."""
    mechanism = event.mechanism
    return Term(mechanism.q, mechanism.z(view), mechanism.steps)


def sampler_slack(dim: int, steps_total: int, members: int) -> Fraction:
    """d T |U| beta of a planned study."""
    return dim * steps_total * members * fraction_of(BETA)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """delta(epsilon) of a Gaussian with sensitivity / standard deviation = ``mu`` > 0, rounded up.

    Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu), written with Mills' ratio so that nothing
    overflows. Guarantee: gaussian_closed_form - agrees with dp-accounting and with numerical integration.
    """
    y = epsilon / mu - mu / 2
    first = math.erfc(y / math.sqrt(2)) / 2
    density = math.exp(-y * y / 2) / math.sqrt(2 * math.pi)
    # Errors: y by mu 2^-52 (cancellation), the tails by y^2 2^-52 of themselves.
    return max(0.0, first - density * _mills_down(y + mu)) + 1e-13 * (1 + mu) * first


def _mills_down(x: float) -> float:
    """Phi(-x) / phi(x) for x > 0, from below: exact to rounding up to 25, then the bound x / (x^2 + 1)."""
    if x > 25:
        return x / (x * x + 1)
    return math.erfc(x / math.sqrt(2)) / 2 * math.exp(x * x / 2) * math.sqrt(2 * math.pi)


def gaussian_epsilon(mu_squared: Fraction, delta: float) -> float:
    """Smallest epsilon of a Gaussian with (sensitivity / sd)^2 = ``mu_squared`` at ``delta``, rounded up."""
    if mu_squared == 0:
        return 0.0
    mu = math.nextafter(math.sqrt(float_up(mu_squared)), math.inf)
    if not math.isfinite(mu * mu):
        return math.inf
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(middle, mu) <= delta else (middle, high)
    return high


def compose_epsilon(terms: Iterable[Term], delta: float, slack: Fraction = Fraction(0)) -> float:
    """Epsilon at ``delta`` of a fixed composition of terms, add/remove neighbours, pessimistic, rounded up.

    ``slack`` is the sampler's total variation; delta loses (1 + e^epsilon) slack.

    Raises: UsageError unless 0 < delta < 1.
    """
    check_delta(delta)
    mu_squared = Fraction(0)
    sampled: defaultdict[tuple[Fraction, Fraction], int] = defaultdict(int)
    for term in terms:
        if term.q == 1:
            mu_squared += term.steps / term.z**2
        else:
            sampled[term.q, term.z] += term.steps
    found = _sampled_epsilon(mu_squared, sampled) if sampled else partial(gaussian_epsilon, mu_squared)

    def epsilon_at(left: float) -> float:
        # Not below dp-accounting's own figure either, which lies up to 5e-9 above the closed form.
        return found(left) * PLD_MARGIN

    # delta' depends on epsilon: fix it at a value slightly above, then check that epsilon stayed below.
    ceiling = epsilon_at(delta) * 1.001 + 0.01
    if slack == 0 or ceiling > 600:
        return epsilon_at(delta) if slack == 0 else math.inf
    left = delta - float_up(slack) * (1 + math.exp(ceiling)) * (1 + 1e-12)
    epsilon = epsilon_at(math.nextafter(left, 0.0)) if left > 0 else math.inf
    return epsilon if epsilon <= ceiling else math.inf


def _sampled_epsilon(
    mu_squared: Fraction, sampled: dict[tuple[Fraction, Fraction], int]
) -> Callable[[float], float]:
    from dp_accounting.pld import privacy_loss_distribution as pld

    def gaussian(z: float, q: float) -> pld.PrivacyLossDistribution:
        return pld.from_gaussian_mechanism(
            math.nextafter(z, 0.0),
            pessimistic_estimate=True,
            value_discretization_interval=PLD_INTERVAL,
            log_mass_truncation_bound=PLD_TAIL_LOG,
            sampling_prob=min(q, 1.0),
        )

    parts = [
        gaussian(float(z), float_up(q)).self_compose(steps, PLD_COMPOSE_TAIL)
        for (q, z), steps in sorted(sampled.items())
    ]
    if mu_squared:
        parts.append(gaussian(1 / math.sqrt(float_up(mu_squared)), 1.0))
    composed = parts[0]
    for part in parts[1:]:
        composed = composed.compose(part, PLD_COMPOSE_TAIL)
    return lambda delta: float(composed.get_epsilon_for_delta(delta)) + 1e-9


def pld_epsilon(events: Iterable[Event], delta: float, view: View) -> float:
    """Epsilon at ``delta`` of events as if fixed in advance, by their privacy loss distributions, rounded up.

    ``declared`` events count as 0 (they are printed as not covered); any ``no_dp`` makes it infinite. Not a
    guarantee for adaptively chosen studies: that is the filter's.

    Guarantee: pld_agrees_with_dp_accounting - never below it, and within 1 percent.
    """
    listed = tuple(events)
    if any(event.kind == "no_dp" for event in listed):
        return math.inf
    sums = [event for event in listed if event.kind == "sum"]
    slack = sum((event.mechanism.slack for event in sums), Fraction(0))
    return compose_epsilon((term_of(event, view) for event in sums), delta, slack)


def noise_for_epsilon(
    epsilon: float, delta: float, steps_total: int, *, dim: int, sampling_rate: float = 1.0, members: int = 1
) -> float:
    """Smallest noise multiplier, to 3 decimals upwards, with which the PLD of the plan is within ``epsilon``.

    For reports; a study that has to pass a register's cap asks ``filter.noise_for_filter``. Raises UsageError
    when 100000 is not enough.
    """
    q, slack = exact(sampling_rate), sampler_slack(dim, steps_total, members)
    return smallest_noise(lambda z: compose_epsilon([Term(q, z, steps_total)], delta, slack) <= epsilon)


def smallest_noise(fits: Callable[[Fraction], bool]) -> float:
    """Smallest multiple of 0.001 in [0.05, 100000] that ``fits``, a monotone condition.

    Raises: UsageError when none does.
    """
    low, high = 49, 1000
    while not fits(Fraction(high, 1000)):
        low, high = high, high * 4
        if high > NOISE_LIMIT * 1000:
            remedy = "Raise epsilon or delta."
            raise UsageError("privacy.noise-for-epsilon", "no noise is enough", remedy=remedy)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(Fraction(middle, 1000)) else (middle, high)
    return high / 1000


def check_delta(delta: float) -> None:
    """Raises UsageError unless 0 < delta < 1."""
    if not 0 < delta < 1:
        raise UsageError("privacy.delta", "delta must lie strictly between 0 and 1")
