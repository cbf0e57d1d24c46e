"""Integer noise and coins from random bytes, exact in distribution up to 2^-80.

Source: PRIVACY.md "The release gate" (sampler); Karney, "Sampling exactly from the normal distribution",
ACM TOMS 42 (2016), arXiv 1303.6257 (blocks and rejection); Shewchuk 1997 (decide in floating point,
recompute exactly when in doubt). Rules: only IEEE 754 addition, multiplication and division are trusted,
never a library's exp; entropy is an argument.

The sampler. To draw x in Z with probability proportional to exp(-x^2 / 2V), V = s^2: let t = isqrt(V) + 1.
Draw a block k >= 0 with probability proportional to exp(-k^2 t^2 / 2V), an offset j uniform on [0, t) and a
sign; accept x = sign (k t + j) with probability exp(-j (2 k t + j) / 2V); drop "minus zero". Multiplying the
three gives exp(-x^2 / 2V) / t, so accepted draws have exactly the wanted distribution.

Total variation of a coordinate is below 2^-80: j and the sign are exact; k and the acceptance compare
a uniform number with a real one that is known to 2^-190, the uniform number read to 256 bits, so a proposal
is wrong with probability under 2^-180; blocks past the last are left out, which have a mass under 2^-100;
at least 0.3 of the proposals are accepted.
"""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.errors import UsageError

Entropy: TypeAlias = Callable[[int], bytes]
Integers: TypeAlias = NDArray[np.int64]
_Words: TypeAlias = NDArray[np.uint64]

LARGEST_VARIANCE: Final = 2**52
_LARGEST_BLOCK: Final = 14
_BITS: Final = 256
_EXTRA_BITS: Final = _BITS - 64
_LARGEST_BATCH: Final = 2**20
_SLICES: Final = 32
_DEGREE: Final = 7
# The float path is off by less than 2^-46: gamma by 2^-52 of itself (and exp(-gamma) gamma < 1/2), the series
# by 2^-55, two dozen roundings by 2^-48; the slices reach to 32, gamma stays below 29.
_DOUBT: Final = 2.0**-44


def exp_of_minus(numerator: int, denominator: int, bits: int = _BITS) -> int:
    """exp(-numerator / denominator) in units of 2^-bits, off by less than 2 units; integers only.

    Source: the Taylor series on [0, 2^-8), squared back; 64 guard bits.
    Guarantee: exponentials_are_exact - within 2 units of a 100-digit evaluation.
    """
    if numerator < 0 or denominator <= 0:
        raise UsageError("privacy.exponent", "the exponent must be a non-positive rational")
    guard = bits + 64
    if numerator >= denominator * guard:
        return 0
    halvings = (numerator // denominator).bit_length() + 8
    x = (numerator << guard) // (denominator << halvings)
    # Alternating terms: the sum of those below one unit is below one unit.
    term = total = 1 << guard
    index = 0
    while term:
        index += 1
        term = (term * x >> guard) // index
        total += -term if index % 2 else term
    for _ in range(halvings):
        total = total * total >> guard
    return total >> 64


@lru_cache(maxsize=16)
def _blocks(variance: int) -> tuple[tuple[int, ...], _Words]:
    """Cumulative probabilities of the blocks in units of 2^-255, and their leading 63 bits."""
    t = math.isqrt(variance) + 1
    weights = [exp_of_minus(k * k * t * t, 2 * variance, 2 * _BITS) for k in range(_LARGEST_BLOCK + 1)]
    total = sum(weights)
    cumulative = tuple((running << (_BITS - 1)) // total for running in itertools.accumulate(weights[:-1]))
    leading = np.array([value >> _EXTRA_BITS for value in cumulative], dtype=np.uint64)
    leading.setflags(write=False)
    return cumulative, leading


@lru_cache(maxsize=1)
def _slices() -> NDArray[np.float64]:
    """exp(-i / 32) for i in 0..1023, each within one unit in the last place."""
    return np.array([exp_of_minus(i, _SLICES, 80) / 2**80 for i in range(1024)], dtype=np.float64)


def _near_exp(gamma: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(-gamma) for gamma in [0, 29] within 2^-46, by IEEE 754 arithmetic alone."""
    index = np.floor(gamma * _SLICES)
    rest = gamma - index / _SLICES
    series = np.ones_like(gamma)
    for degree in range(_DEGREE, 0, -1):
        series *= rest
        series *= -1.0 / degree
        series += 1.0
    series *= _slices()[index.astype(np.intp)]
    return series


def _words(count: int, entropy: Entropy) -> _Words:
    raw = entropy(8 * count)
    if len(raw) != 8 * count:
        raise UsageError("privacy.entropy", "the source of randomness gave too few bytes")
    return np.frombuffer(raw, dtype="<u8")


def _extended(word: int, entropy: Entropy) -> int:
    """The word with 192 more uniform bits behind it."""
    return (word << _EXTRA_BITS) | int.from_bytes(entropy(_EXTRA_BITS // 8), "big")


def _draw_blocks(variance: int, words: _Words, entropy: Entropy) -> Integers:
    """k for each uniform 63-bit word; a word equal to a threshold's leading bits is read further."""
    exact, leading = _blocks(variance)
    k = np.searchsorted(leading, words, side="right").astype(np.int64)
    # side="right" puts a tie just past its threshold, so the one before k is the only candidate.
    for at in np.flatnonzero((k > 0) & (leading[k - 1] == words)):
        uniform = _extended(int(words[at]), entropy)
        k[at] = sum(uniform >= threshold for threshold in exact)
    return k


def _accept(
    numerators: Integers, denominator: int, words: _Words, entropy: Entropy, doubt: float
) -> NDArray[np.bool_]:
    """Bernoulli(exp(-numerator / denominator)) for each; within ``doubt`` of the edge decided exactly."""
    # The word's true value, read further, lies in [low, low + 2^-53).
    low = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    edge = _near_exp(numerators.astype(np.float64) / denominator)
    accepted = low < edge
    for at in np.flatnonzero(np.abs(low - edge) <= doubt):
        uniform = _extended(int(words[at]), entropy)
        accepted[at] = uniform < exp_of_minus(int(numerators[at]), denominator)
    return accepted


def discrete_gaussian(variance: int, size: int, entropy: Entropy, *, doubt: float = _DOUBT) -> Integers:
    """``size`` independent integers with probability proportional to exp(-x^2 / (2 variance)); int64 [size].

    ``variance`` in [1, 2^52]; ``entropy(n)`` gives n uniform bytes. ``doubt`` may only be raised: it is how
    close to the edge the exact comparison takes over.

    Guarantee: sampler_has_the_exact_probabilities - every comparison agrees with rational arithmetic, and
    counts agree with exp(-x^2 / (2 variance)).
    Raises: UsageError.
    """
    if not 1 <= variance <= LARGEST_VARIANCE or size < 0 or not doubt >= _DOUBT:
        raise UsageError("privacy.noise", "the variance must be in [1, 2^52], the size at least 0")
    t = math.isqrt(variance) + 1
    even = (2**64 // t) * t - 1
    drawn: list[Integers] = []
    missing = size
    while missing > 0:
        count = min(missing + missing // 2 + 16, _LARGEST_BATCH)
        words = _words(3 * count, entropy).reshape(3, count)
        minus = (words[0] & np.uint64(1)).astype(np.bool_)
        k = _draw_blocks(variance, words[0] >> np.uint64(1), entropy)
        j = (words[1] % np.uint64(t)).astype(np.int64)
        x = k * t + j
        accepted = _accept(j * (2 * k * t + j), 2 * variance, words[2], entropy, doubt)
        accepted &= words[1] <= np.uint64(even)
        accepted &= ~(minus & (x == 0))
        kept = np.where(minus, -x, x)[accepted][:missing]
        drawn.append(kept)
        missing -= kept.size
    return np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)


def coins(rate: Fraction | float, size: int, entropy: Entropy) -> NDArray[np.bool_]:
    """``size`` independent coins, True with probability floor(rate 2^64) / 2^64; bool [size].

    That is the rate itself or at most 2^-64 below it: a lower rate spends less. A rate of 1 is always True.

    Guarantee: coins_are_exact - True exactly for the words below floor(rate 2^64).
    Raises: UsageError unless 0 < rate <= 1.
    """
    exact = Fraction(rate) if math.isfinite(rate) else Fraction(0)
    if not 0 < exact <= 1 or size < 0:
        raise UsageError("privacy.rate", "a sampling rate must be in (0, 1], the size at least 0")
    words = _words(size, entropy)
    if exact == 1:
        return np.ones(size, dtype=np.bool_)
    return words < np.uint64(math.floor(exact * 2**64))
