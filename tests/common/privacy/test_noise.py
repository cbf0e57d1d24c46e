import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import UsageError
from common.privacy import noise
from common.privacy.accountant import gaussian_delta

Entropy = Callable[[int], bytes]
Sources = Callable[[int], Entropy]


def exact_exp(value: Fraction) -> Decimal:
    with localcontext(prec=110):
        return (-Decimal(value.numerator) / Decimal(value.denominator)).exp()


def exact_law(variance: int) -> dict[int, Decimal]:
    """Probabilities of the discrete Gaussian on [-15 s - 40, 15 s + 40], 110 digits."""
    reach = 15 * math.isqrt(variance) + 40
    with localcontext(prec=110):
        weights = {x: exact_exp(Fraction(x * x, 2 * variance)) for x in range(reach + 1)}
        total = 2 * sum(weights.values()) - 1
        return {x: weights[abs(x)] / total for x in range(-reach, reach + 1)}


class Script:
    """Entropy that hands out the given byte strings in order and refuses other sizes."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = list(parts)

    def __call__(self, count: int) -> bytes:
        part = self.parts.pop(0)
        assert len(part) == count
        return part


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**60), st.integers(1, 2**56))
def test_exponentials_are_exact(numerator: int, denominator: int) -> None:
    with localcontext(prec=110):
        value = exact_exp(Fraction(numerator, denominator)) * 2**256
        assert abs(value - noise.exp_of_minus(numerator, denominator)) < 2


def test_exponents_must_not_be_positive() -> None:
    for bad in ((-1, 1), (1, 0), (1, -1)):
        with pytest.raises(UsageError):
            noise.exp_of_minus(*bad)


def test_float_path_is_closer_than_the_doubt() -> None:
    gamma = np.concatenate([np.linspace(0, 29, 4001), np.arange(0, 29 * 32) / 32, [1e-300, 2.0**-53]])
    near = noise._near_exp(gamma)
    worst = max(abs(Fraction(b) - Fraction(exact_exp(Fraction(a)))) for a, b in zip(gamma, near, strict=True))
    assert worst < Fraction(1, 2**47)
    assert noise._DOUBT >= 2.0**-44


@pytest.mark.parametrize("variance", [1, 2, 3, 4, 7, 9, 50, 256, 300])
def test_sampler_law_is_within_two_to_minus_eighty(variance: int) -> None:
    """The three factors of the module's argument, as the code holds them, multiplied out exactly."""
    t = math.isqrt(variance) + 1
    cumulative, leading = noise._blocks(variance)
    assert [int(word) for word in leading] == [value >> 192 for value in cumulative]
    edges = [0, *cumulative, 2**255]
    proposal: dict[int, Fraction] = {}
    for k in range(len(edges) - 1):
        block = Fraction(edges[k + 1] - edges[k], 2**255)
        for j in range(t):
            accept = Fraction(noise.exp_of_minus(j * (2 * k * t + j), 2 * variance), 2**256)
            mass = block / t * min(accept, Fraction(1)) / 2
            for sign in (1, -1):
                if (sign, k, j) != (-1, 0, 0):
                    proposal[sign * (k * t + j)] = mass
    accepted = sum(proposal.values())
    assert accepted > Fraction(3, 10)
    law = exact_law(variance)
    gap = sum(abs(proposal.get(x, Fraction(0)) / accepted - Fraction(p)) for x, p in law.items())
    assert gap / 2 < Fraction(1, 2**80)


def naive(variance: int, words: np.ndarray) -> list[int]:
    """Rejection by 110-digit arithmetic, one word triple at a time; words read as their own midpoint."""
    t = math.isqrt(variance) + 1
    with localcontext(prec=110):
        weights = [exact_exp(Fraction(k * k * t * t, 2 * variance)) for k in range(15)]
        total = sum(weights)
        out = []
        for first, second, third in words.T.tolist():
            if second >= 2**64 - 2**64 % t:
                continue
            place = (Decimal(first >> 1) + Decimal("0.5")) / 2**63
            k = 0
            while place >= sum(weights[: k + 1]) / total:
                k += 1
            j = second % t
            x = -(k * t + j) if first & 1 else k * t + j
            wanted = exact_exp(Fraction(j * (2 * k * t + j), 2 * variance))
            if (Decimal(third) + Decimal("0.5")) / 2**64 < wanted and not (x == 0 and first & 1):
                out.append(x)
    return out


@pytest.mark.parametrize("variance", [1, 2, 5, 256, 12345, 16_192_584, 2**40 + 1, 2**52])
def test_sampler_has_the_exact_probabilities(variance: int, entropy: Sources) -> None:
    for seed in range(3):
        words = np.frombuffer(entropy(seed)(8 * 3 * 166), dtype="<u8").reshape(3, 166)
        expected = naive(variance, words)
        for doubt in (noise._DOUBT, 2.0):
            drawn = noise.discrete_gaussian(variance, 100, entropy(seed), doubt=doubt)
            assert len(expected) > 60
            assert drawn[: len(expected)].tolist() == expected[:100]


@pytest.mark.parametrize("variance", [1, 3, 20, 256])
def test_counts_agree_with_the_probabilities(variance: int, entropy: Sources) -> None:
    size = 200_000
    drawn = noise.discrete_gaussian(variance, size, entropy(variance))
    assert drawn.dtype == np.int64
    assert drawn.shape == (size,)
    law = {x: float(p) * size for x, p in exact_law(variance).items() if float(p) * size > 10}
    observed = [int((drawn == x).sum()) for x in law]
    rest = size - sum(law.values())
    _, p_value = stats.chisquare([*observed, size - sum(observed)], [*law.values(), rest])
    assert p_value > 1e-3


def test_neighbouring_draws_are_uncorrelated_and_as_wide_as_asked(entropy: Sources) -> None:
    variance = 16_192_584
    drawn = noise.discrete_gaussian(variance, 400_000, entropy(5)).astype(np.float64)
    assert abs(drawn.mean()) < 4 * math.sqrt(variance / drawn.size)
    assert abs(drawn.var() / variance - 1) < 4 * math.sqrt(2 / drawn.size)
    for lag in (1, 2, 3, 16):
        assert abs((drawn[lag:] * drawn[:-lag]).mean() / variance) < 4 / math.sqrt(drawn.size)


def test_a_block_at_its_edge_reads_further(entropy: Sources) -> None:
    cumulative, leading = noise._blocks(300)
    for index in (0, 1, 2):
        below = (cumulative[index] & (2**192 - 1)) - 1
        words = leading[index : index + 1]
        assert noise._draw_blocks(300, words, Script(below.to_bytes(24, "big"))).tolist() == [index]
        assert noise._draw_blocks(300, words, Script((below + 1).to_bytes(24, "big"))).tolist() == [index + 1]
        sure = np.array([int(words[0]) - 1, int(words[0]) + 1], dtype=np.uint64)
        assert noise._draw_blocks(300, sure, Script()).tolist() == [index, index + 1]


def test_an_acceptance_at_its_edge_reads_further() -> None:
    exact = noise.exp_of_minus(7, 600)
    word = np.array([exact >> 192], dtype=np.uint64)
    rest = exact & (2**192 - 1)
    numerators = np.array([7], dtype=np.int64)
    for extra, accepted in ((rest - 1, True), (rest, False), (0, True), (2**192 - 1, False)):
        script = Script(extra.to_bytes(24, "big"))
        assert noise._accept(numerators, 600, word, script, noise._DOUBT).tolist() == [accepted]
        assert not script.parts


def test_offsets_beyond_the_last_whole_range_are_dropped() -> None:
    """With t = 17, words from 2^64 - 2^64 mod 17 on would favour small offsets."""
    top = 2**64 - 2**64 % 17
    words = np.zeros((3, 17), dtype="<u8")
    words[1, :] = 5
    words[1, 0] = top
    words[1, 1] = top - 1
    drawn = noise.discrete_gaussian(256, 1, Script(words.tobytes()))
    assert drawn.tolist() == [16]


def test_minus_zero_is_dropped() -> None:
    words = np.zeros((3, 17), dtype="<u8")
    words[0, 0] = 1
    words[1, 1] = 3
    assert noise.discrete_gaussian(256, 1, Script(words.tobytes())).tolist() == [3]


def test_large_draws_come_in_batches(entropy: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_LARGEST_BATCH", 100)
    asked: list[int] = []
    source = entropy(9)

    def counted(count: int) -> bytes:
        asked.append(count)
        return source(count)

    drawn = noise.discrete_gaussian(2500, 5000, counted)
    assert drawn.shape == (5000,)
    assert max(asked) <= 3 * 8 * 100
    assert drawn.std() == pytest.approx(50, rel=0.05)


def test_no_size_needs_no_entropy() -> None:
    assert noise.discrete_gaussian(256, 0, Script()).shape == (0,)


@pytest.mark.parametrize(("variance", "size"), [(0, 1), (-1, 1), (2**52 + 1, 1), (256, -1)])
def test_impossible_noise_is_refused(variance: int, size: int, entropy: Sources) -> None:
    with pytest.raises(UsageError):
        noise.discrete_gaussian(variance, size, entropy(0))


def test_the_exact_path_cannot_be_switched_off(entropy: Sources) -> None:
    for doubt in (0.0, 2.0**-50, math.nan):
        with pytest.raises(UsageError):
            noise.discrete_gaussian(256, 1, entropy(0), doubt=doubt)


def test_short_entropy_is_refused() -> None:
    with pytest.raises(UsageError, match="too few"):
        noise.discrete_gaussian(256, 4, lambda count: bytes(count - 1))
    with pytest.raises(UsageError, match="too few"):
        noise.coins(0.5, 4, lambda count: bytes(count - 8))


@pytest.mark.parametrize("rate", [Fraction(1, 3), 0.1, Fraction(1, 2**70), Fraction(2**70 - 1, 2**70)])
def test_coins_are_exact(rate: Fraction | float) -> None:
    edge = math.floor(Fraction(rate) * 2**64)
    assert Fraction(rate) - Fraction(1, 2**64) < Fraction(edge, 2**64) <= Fraction(rate)
    words = np.array([0, max(edge, 1) - 1, edge, 2**64 - 1], dtype="<u8")
    expected = [int(word) < edge for word in words]
    assert noise.coins(rate, 4, Script(words.tobytes())).tolist() == expected


def test_a_rate_of_one_always_falls() -> None:
    assert noise.coins(1.0, 3, lambda count: b"\xff" * count).tolist() == [True] * 3


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_impossible_rates_are_refused(rate: float, entropy: Sources) -> None:
    with pytest.raises(UsageError):
        noise.coins(rate, 1, entropy(0))


@pytest.mark.parametrize("variance", [256, 400, 1000])
def test_the_variance_less_four_rule_holds_in_one_dimension(variance: int) -> None:
    """delta of the discrete Gaussian is at most that of a continuous one of variance s^2 - 4.

    The exact hockey-stick sum; the rule is not vacuous: with the variance s^2 + 40 it fails somewhere.
    """
    law = np.array([float(p) for p in exact_law(variance).values()])
    flatter_fails = False
    for shift in (1, 2, 5, 16, 37, 64):
        padded, moved = np.pad(law, (0, shift)), np.pad(law, (shift, 0))
        for epsilon in (0.0, 0.01, 0.1, 0.3, 1.0, 2.0, 4.0, 7.0):
            exact = math.fsum(np.maximum(0.0, moved - math.exp(epsilon) * padded))
            slack = 1e-12 * math.exp(epsilon)
            assert exact <= gaussian_delta(epsilon, shift / math.sqrt(variance - 4)) * (1 + 1e-9) + slack
            flatter_fails |= exact > gaussian_delta(epsilon, shift / math.sqrt(variance + 40)) + slack
    assert flatter_fails
