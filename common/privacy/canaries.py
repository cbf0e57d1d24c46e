"""What one run with canaries shows: a lower bound on epsilon, and whether noise has its variance.

Source: Steinke, Nasr, Jagielski, arXiv 2305.08846, theorem 5.2, corollary 5.4 (one run, add/remove). Rules:
each canary is in by an independent fair coin; the guesses see what was released and never the coins; how many
are guessed is fixed before the scores are seen, the error shared out over all that is tried.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import UsageError

CONFIDENCE: Final = 0.95
FALSE_ALARM: Final = 1e-6
GUESSED: Final = (1, 3, 10)
"""All canaries are guessed, a third and a tenth of them."""

_LARGEST: Final = 64.0


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest probability of at least ``correct`` right guesses under (epsilon, delta)-DP, at most 1.

    ``guesses`` of ``canaries`` are guessed, half of them in and half of them out.

    Guarantee: one_run_bound_is_the_papers - its printed values, and no mechanism beats it more often.
    Raises: UsageError unless 0 <= correct <= guesses <= canaries and 0 <= delta < 1.
    """
    if not (0 <= correct <= guesses <= canaries and 0 <= delta < 1 and epsilon >= 0):
        raise UsageError("privacy.canaries", "guesses, epsilon or delta are out of range")
    # The right guesses are dominated by a binomial with the accuracy of randomised response.
    right, wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    ways = (
        math.lgamma(guesses + 1) - math.lgamma(k + 1) - math.lgamma(guesses - k + 1)
        for k in range(guesses + 1)
    )
    mass = np.array([math.exp(way + k * right + (guesses - k) * wrong) for k, way in enumerate(ways)])
    below = np.cumsum(mass[:correct][::-1])
    worst = float((below / np.arange(1, correct + 1)).max(initial=0.0))
    return min(1.0, float(mass[correct:].sum()) + 2 * canaries * delta * worst)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """The epsilon that so many right guesses exclude at ``delta``, but for a chance of ``error``; at least 0.

    Guarantee: more_right_guesses_show_more - and more canaries, a larger delta or less error show less.
    """
    low, high = 0.0, _LARGEST
    for _ in range(50):
        middle = (low + high) / 2
        excluded = p_value(canaries, guesses, correct, middle, delta) < error
        low, high = (middle, high) if excluded else (low, middle)
    return low


def shown_epsilon(scores: NDArray[np.float64], included: NDArray[np.bool_], delta: float) -> float:
    """The lower bound on epsilon at 95 percent: the highest scores guessed in, the lowest out, the rest not.

    ``scores`` [ways, m], high for canaries that seem to be in; ``included`` bool [m]; m >= 1.
    """
    size = included.size
    tried = {max(1, size // part) for part in GUESSED}
    error = (1 - CONFIDENCE) / (len(tried) * len(scores))
    shown = 0.0
    for score in scores - scores.mean(axis=1, keepdims=True):
        surest = np.argsort(-np.abs(score), kind="stable")
        right = np.cumsum((score > 0)[surest] == included[surest])
        shown = max(shown, *(lower_bound(size, n, int(right[n - 1]), delta, error) for n in tried))
    return shown


def largest_shown(ways: int, canaries: int, delta: float) -> float:
    """What ``shown_epsilon`` is where every guess is right: no claim above it can be contradicted."""
    right = np.tile(np.arange(canaries, dtype=np.float64), (ways, 1))
    return shown_epsilon(right, right[0] >= canaries / 2, delta)


def variance_p_value(ratio: float, count: int) -> float:
    """Upper bound on the chance that noise of the right variance gives a mean square so far from it.

    ``ratio``: mean square of ``count`` numbers over their variance. Chernoff's bound for chi-squared, on
    both sides.

    Guarantee: wrong_variances_are_told - a false alarm at most as often as its p-value says.
    """
    if ratio <= 0 or not math.isfinite(ratio):
        return 0.0
    return min(1.0, 2 * math.exp(min(0.0, count / 2 * (math.log(ratio) + 1 - ratio))))
