"""What a noisy sum of counts says, and how sure: an estimate with the interval that the noise leaves.

Source: Efron, Ann. Statist. 7 (1979) (parametric bootstrap). Rules: numpy only; the noise added by the
hospitals is known exactly, so that it can be drawn again; the draws are fixed, so that one sum has one
answer; an interval is about the pooled data's own value, not about the population they come from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]

DRAWS: Final = 200
TWO_SIDED_95: Final = 1.959964
_SEED: Final = 20_260


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, and the 95 % interval in which the pooled data's own one lies; NaN where none is known."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "unknown"
        if self.low == self.high:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"

    def to_json(self) -> dict[str, float | None]:
        """Value, low and high; null where nothing is known."""
        found = {"value": self.value, "low": self.low, "high": self.high}
        return {name: x if np.isfinite(x) else None for name, x in found.items()}


def estimates(
    read: Callable[[Counts], dict[str, float]],
    counts: Counts,
    noise_sd: float,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> dict[str, Estimate]:
    """What ``read`` makes of noisy ``counts``, with intervals; ``noise_sd`` is of each count, 0 for none.

    ``limits`` are what values can be, known beforehand.

    Guarantee: intervals_cover_the_pooled_value - in about 95 of 100 sums, where counts exceed their noise.
    """
    found = read(counts)
    if not noise_sd:
        return {name: Estimate(value, value, value) for name, value in found.items()}
    generator = np.random.default_rng(_SEED)
    drawn: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(DRAWS):
        again = read(counts + generator.normal(0.0, noise_sd, counts.shape))
        for name, values in drawn.items():
            values.append(again[name])
    return {name: _interval(value, np.array(drawn[name]), limits) for name, value in found.items()}


def _interval(value: float, drawn: Counts, limits: tuple[float, float]) -> Estimate:
    known = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or len(known) < DRAWS // 2:
        return Estimate(np.nan, *limits)
    half = TWO_SIDED_95 * float(known.std())
    # By how much noise moves the draws off the value it has moved the value off the truth.
    value -= float(known.mean()) - value
    low, high = (min(max(x, limits[0]), limits[1]) for x in (value - half, value + half))
    return Estimate(min(max(value, limits[0]), limits[1]), low, high)
