"""The codec: exact bounds, exact rounding, exact words."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import RefusedError, VerificationError
from common.secagg import codec
from common.secagg.codec import CHUNK_BYTES, Layout
from tests.common.secagg.federation import Counter

positive = st.floats(1e-6, 1e6, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(st.integers(3, 1000), st.sampled_from([16, 32]), st.integers(0, 10**13))
def test_overflow_is_exact(cohort: int, bits: int, variance: int) -> None:
    def holds(steps: int) -> bool:
        # u (steps + 1) + 12 s sqrt(u) < 2^(bits-1) in real numbers, by squaring.
        left = Fraction((1 << bits - 1) - cohort * (steps + 1))
        return left > 0 and Fraction(144 * variance * cohort) < left * left

    low, high = 0, 1 << bits
    if not holds(1):
        assert not codec.fits(cohort, bits, 1.0, 1.0, variance)
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    assert codec.fits(cohort, bits, 1.0, float(low), variance)
    assert codec.fits(cohort, bits, 0.25, low / 4, variance)
    assert not codec.fits(cohort, bits, 1.0, float(low + 1), variance)
    assert not codec.fits(cohort, bits, 1.0, math.nextafter(low, math.inf), variance)


def test_one_step_of_room_is_enough() -> None:
    # 2^15 - 7 x 4681 = 1.
    assert codec.fits(7, 16, 1.0, 4680.0)
    assert not codec.fits(7, 16, 1.0, 4681.0)
    assert not codec.fits(7, 16, 1.0, 4680.0, noise_variance=1)


def test_the_bound_is_reached_and_does_not_wrap() -> None:
    largest = (1 << 15) // 3 - 2
    assert codec.fits(3, 16, 1.0, float(largest))
    total = np.zeros(1, dtype="<u2")
    for _ in range(3):
        total += codec.to_words(np.array([-largest - 1], dtype=np.int64), 16, 1, largest + 1, "parameters")
    assert codec.from_words(total).tolist() == [-3 * (largest + 1)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=8), positive, st.integers(1, 2**30)
)
def test_quantising_is_bounded(values: list[float], step: float, steps: int) -> None:
    limit = step * steps
    array = np.array(values, dtype=np.float64)
    bound = codec.largest(step, limit) + 1
    for rounding in ("nearest", "dither"):
        q = codec.quantise(array, step, limit, rounding, Counter("dither"))
        assert q.dtype == np.int64
        assert all(abs(value) <= bound for value in q.tolist())
        for value, x in zip(q.tolist(), values, strict=True):
            assert abs(value - min(max(x, -limit), limit) / step) <= (0.5 if rounding == "nearest" else 1) * (
                1 + 1e-6
            )


def test_nearest_rounds_halves_up_and_keeps_the_grid() -> None:
    values = np.array([-2.0, -0.75, -0.25, 0.0, 0.25, 0.75, 99.0, -99.0, -0.0])
    assert codec.quantise(values, 0.5, 2.0).tolist() == [-4, -1, 0, 0, 1, 2, 4, -4, 0]
    assert codec.dequantise(np.array([-4, 3], dtype=np.int64), 0.5).tolist() == [-2.0, 1.5]


def test_dither_is_unbiased() -> None:
    n = 40_000
    q = codec.quantise(np.full(n, 0.3), 1.0, 1.0, "dither", Counter("unbiased"))
    # A mean of n bits with p = 0.3: six standard deviations, a false alarm in 5e8 runs; the seed is fixed.
    assert abs(q.mean() - 0.3) < 6 * math.sqrt(0.21 / n)
    assert set(q.tolist()) == {0, 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(RefusedError, match="not finite"):
        codec.quantise(np.array([0.0, bad]), 1.0, 1.0)


def test_dither_without_entropy_is_refused() -> None:
    with pytest.raises(RefusedError, match="randomness"):
        codec.quantise(np.zeros(1), 1.0, 1.0, "dither")


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([16, 32, 64]), st.data())
def test_words_are_twos_complement(bits: int, data: st.DataObject) -> None:
    half = 1 << bits - 1
    values = data.draw(st.lists(st.integers(-half, half - 1), max_size=6))
    words = codec.to_words(np.array(values, dtype=np.int64), bits, len(values), half, "vector")
    assert words.tobytes() == b"".join((v % (1 << bits)).to_bytes(bits // 8, "little") for v in values)
    assert codec.from_words(words).tolist() == values
    one = codec.with_one(words)
    assert one.dtype == words.dtype
    assert one.tolist() == [*words.tolist(), 1]


@pytest.mark.parametrize(
    ("vector", "size"),
    [
        (np.zeros(3), 3),
        (np.zeros(3, dtype=np.int32), 3),
        (np.zeros(3, dtype=np.int64), 4),
        (np.zeros((3, 1), dtype=np.int64), 3),
        (np.array([11], dtype=np.int64), 1),
        (np.array([-11], dtype=np.int64), 1),
        (np.array([-(2**63)], dtype=np.int64), 1),
    ],
)
def test_another_dtype_shape_or_size_is_refused(vector: NDArray[Any], size: int) -> None:
    with pytest.raises(RefusedError):
        codec.to_words(vector, 32, size, 10, "parameters")


def test_words_of_another_dtype_are_refused() -> None:
    for dtype in ("<i4", "<f8", "u1"):
        with pytest.raises(VerificationError):
            codec.from_words(np.zeros(2, dtype=dtype))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("words", [1, 2**17 - 1, 2**17, 2**18 - 1, 2**18, 2**19 + 3])
@pytest.mark.parametrize("scalars", [0, 1, 2**17 - 1, 2**17])
def test_chunks_cover_each_vector_once_and_start_anew(bits: int, words: int, scalars: int) -> None:
    layout = Layout(words, scalars, bits)
    spans = layout.spans
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == layout.payload_bytes == (words + 1) * bits // 8 + (scalars + 1) * 8
    assert all(0 < span.stop - span.start <= CHUNK_BYTES for span in spans)
    for vector, start, stop, word in (
        ("params", 0, layout.params_bytes, bits // 8),
        ("scalars", layout.params_bytes, layout.payload_bytes, 8),
    ):
        own = [span for span in spans if span.vector == vector]
        assert (own[0].start, own[-1].stop) == (start, stop)
        assert all(span.stop - span.start == CHUNK_BYTES for span in own[:-1])
        assert [span.first_word * word for span in own] == [span.start - start for span in own]
