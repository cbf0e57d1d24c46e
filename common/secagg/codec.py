"""Numbers to words and back: fixed point in two's complement modulo 2^16, 2^32 and 2^64.

Source: PROTOCOL.md "Codec" and R3 (payload). Rules: x is clamped to [-range, range] and becomes
floor(x / step + u); u is 1/2, or the hospital's own dither where no noise is added; a sum over a cohort
never wraps; NaN and infinity never get here; a payload is the parameters, then the scalars, each
ending with a constant 1 in plain units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.errors import RefusedError, VerificationError

CHUNK_BYTES: Final = 1 << 20
SCALAR_BITS: Final = 64

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]
Integers: TypeAlias = NDArray[np.signedinteger[Any]]
Vector: TypeAlias = Literal["params", "scalars"]


class Span(NamedTuple):
    """One chunk of a payload: its vector, its bytes in the payload, its first word in the vector."""

    vector: Vector
    start: int
    stop: int
    first_word: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of one payload: ``parameters`` words of ``bits`` bits and ``scalars`` of 64, plus a 1 each."""

    parameters: int
    scalars: int
    bits: int

    @property
    def params_bytes(self) -> int:
        """Bytes of the parameter vector with its trailing 1."""
        return (self.parameters + 1) * self.bits // 8

    @property
    def payload_bytes(self) -> int:
        """Bytes of a payload: both vectors, each with its trailing 1."""
        return self.params_bytes + (self.scalars + 1) * SCALAR_BITS // 8

    @property
    def spans(self) -> tuple[Span, ...]:
        """The chunks in order: 1 MiB each, starting anew at the scalars, the last of each vector shorter."""
        vectors: tuple[tuple[Vector, int, int, int], ...] = (
            ("params", 0, self.params_bytes, self.bits // 8),
            ("scalars", self.params_bytes, self.payload_bytes, SCALAR_BITS // 8),
        )
        return tuple(
            Span(vector, at, min(at + CHUNK_BYTES, stop), (at - start) // word_bytes)
            for vector, start, stop, word_bytes in vectors
            for at in range(start, stop, CHUNK_BYTES)
        )


def fits(cohort: int, bits: int, step: float, limit: float, noise_variance: int = 0) -> bool:
    """Whether the sum over ``cohort`` hospitals stays inside the two's complement of ``bits`` bits.

    The rule is u (ceil(limit/step) + 1) + 12 s sqrt(u) < 2^(bits-1), decided exactly; ``noise_variance``
    is s^2, the integer variance of the noise that each hospital adds after quantising, 0 without.

    Guarantee: overflow_is_exact - true at the bound, false one past it.
    """
    room = (1 << (bits - 1)) - cohort * (largest(step, limit) + 1)
    return room > 0 and 144 * noise_variance * cohort < room * room


def largest(step: float, limit: float) -> int:
    """ceil(limit / step), exactly, for the doubles given; rounding gives |q| of at most one more."""
    return math.ceil(Fraction(limit) / Fraction(step))


def quantise(
    values: NDArray[np.float64],
    step: float,
    limit: float,
    rounding: Literal["nearest", "dither"] = "nearest",
    entropy: Callable[[int], bytes] | None = None,
) -> NDArray[np.int64]:
    """float64[n] in units of a parameter to int64[n] in grid steps, |q| <= ceil(limit/step) + 1.

    ``dither`` draws u from ``entropy``, uniform on multiples of 2^-53, so the mean of q step is x.

    Guarantee: quantising_is_bounded - for every finite double.
    Raises: RefusedError for a non-finite value, or dither without entropy.
    """
    if not np.isfinite(values).all():
        raise RefusedError("codec.not-finite", "a value that is not finite must not reach the codec")
    scaled: NDArray[np.float64] = np.clip(values.astype(np.float64), -limit, limit)
    scaled /= step
    if rounding == "nearest":
        scaled += 0.5
    elif entropy is not None:
        raw = np.frombuffer(entropy(8 * scaled.size), dtype="<u8").reshape(scaled.shape)
        scaled += (raw >> np.uint64(11)) * 2.0**-53
    else:
        raise RefusedError("codec.entropy", "dither needs a source of randomness")
    np.floor(scaled, out=scaled)
    return scaled.astype(np.int64)


def dequantise(total: Integers, step: float) -> NDArray[np.float64]:
    """Integers [n] in grid steps to float64[n] in units of a parameter."""
    return total.astype(np.float64) * step


def to_words(q: NDArray[np.int64], bits: int, size: int, bound: int, what: str) -> Words:
    """int64[size] with |q| <= bound as little-endian two's complement words, in a buffer of their own.

    Raises: RefusedError naming ``what`` for another dtype or shape, or a value past the bound.
    """
    if q.dtype != np.int64 or q.shape != (size,):
        raise RefusedError("codec.shape", f"the {what} must be a vector of {size} 64-bit integers")
    if size and not (-bound <= int(q.min()) and int(q.max()) <= bound):
        raise RefusedError("codec.bound", f"the {what} hold a value past the bound of the codec")
    return q.astype(f"<u{bits // 8}")


def with_one(words: Words) -> Words:
    """A copy of the words with the constant 1 behind them."""
    return np.concatenate([words, np.ones(1, dtype=words.dtype)])


def from_words(words: Words) -> Integers:
    """The words' own memory as signed integers of 16, 32 or 64 bits. Raises VerificationError otherwise."""
    if words.dtype.kind != "u" or words.dtype.itemsize not in (2, 4, 8):
        raise VerificationError("codec.dtype", "words have 16, 32 or 64 bits")
    return words.view(f"<i{words.dtype.itemsize}")
