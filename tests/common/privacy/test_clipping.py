import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.errors import UsageError
from common.privacy import clipping
from common.privacy.decimals import fraction_of
from common.privacy.gate import GateParams, to_grid

ANY = st.floats(width=64, allow_nan=True, allow_infinity=True, allow_subnormal=True)
FINITE = st.floats(-1e6, 1e6) | st.floats(allow_nan=False, allow_infinity=False)


def squared_norm(row: np.ndarray) -> Fraction:
    return sum((Fraction(float(value)) ** 2 for value in row), Fraction(0))


@settings(max_examples=300, deadline=None)
@given(
    arrays.arrays(np.float64, st.tuples(st.integers(0, 4), st.integers(1, 6)), elements=ANY),
    st.floats(1e-9, 1e9),
)
def test_clipped_norm_is_exact(vectors: np.ndarray, clip_norm: float) -> None:
    before = vectors.copy()
    clipped = clipping.clip(vectors, clip_norm)
    assert vectors.tobytes() == before.tobytes()
    for row, original in zip(clipped, vectors, strict=True):
        assert squared_norm(row) <= Fraction(clip_norm) ** 2
        if np.isfinite(original).all() and squared_norm(original) < Fraction(clip_norm * (1 - 1e-12)) ** 2:
            assert row.tobytes() == original.tobytes()


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.float64, (5,), elements=st.floats(-1e9, 1e9)), st.floats(1e-3, 1e3))
def test_clipping_keeps_the_direction_and_uses_the_norm(vector: np.ndarray, clip_norm: float) -> None:
    norm = np.linalg.norm(vector)
    if norm > clip_norm:
        clipped = clipping.clip(vector[None], clip_norm)[0]
        np.testing.assert_allclose(clipped, vector * (clip_norm / norm), rtol=1e-12, atol=1e-300)


def test_long_vectors_are_clipped_exactly_too() -> None:
    vectors = np.random.default_rng(0).normal(size=(2, 100_000)) * np.array([[1e-2], [1e200]])
    for row in clipping.clip(vectors, 0.7):
        assert squared_norm(row) <= Fraction(0.7) ** 2
        assert np.linalg.norm(row) > 0.7 * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(
    arrays.arrays(np.float64, (4, 3), elements=FINITE),
    st.integers(0, 3),
    st.integers(0, 2),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_a_nan_row_changes_nothing_but_its_patient(
    vectors: np.ndarray, patient: int, place: int, bad: float
) -> None:
    broken = vectors.copy()
    broken[patient, place] = bad
    clean, kept = clipping.clip(broken, 1.0), clipping.clip(vectors, 1.0)
    assert not clean[patient].any()
    others = np.arange(4) != patient
    assert clean[others].tobytes() == kept[others].tobytes()
    without = np.where(others[:, None], vectors, 0.0)
    assert np.array_equal(clipping.clipped_sum(broken, 1.0), clipping.clipped_sum(without, 1.0))


def test_no_patients_sum_to_zeros() -> None:
    assert clipping.clipped_sum(np.zeros((0, 7)), 1.0).tolist() == [0.0] * 7


@settings(max_examples=300, deadline=None)
@given(st.fractions(0, 10**6, max_denominator=10**6), st.integers(1, 10**8), st.integers(0, 10**6))
def test_grid_sensitivity_is_exact(ratio: Fraction, dim: int, millionths: int) -> None:
    eta = Fraction(millionths, 10**9)
    base = (1 + eta) * ratio
    bound = clipping.grid_sensitivity(ratio, Fraction(1), dim, eta)

    def covers(value: int) -> bool:
        return value >= base and (value - base) ** 2 >= dim

    assert covers(bound)
    assert not covers(bound - 1)


@pytest.mark.parametrize("dim", [1, 31, 100, 12345])
def test_grid_rule_is_exact(dim: int) -> None:
    root = math.isqrt(dim)
    if root * root == dim:
        clipping.check_grid(Fraction(100 * root), Fraction(1), dim)
    nudge = Fraction(10**12 + 1, 10**12)
    clip = Fraction(math.isqrt(dim * 10**40) + 1, 10**20) * 100
    clipping.check_grid(clip, Fraction(1), dim)
    with pytest.raises(UsageError, match=r"0\.01"):
        clipping.check_grid(clip, nudge, dim)


@pytest.mark.parametrize(("clip", "step", "dim"), [(0, 1, 1), (1, 0, 1), (-1, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_an_empty_grid_is_refused(clip: int, step: int, dim: int) -> None:
    with pytest.raises(UsageError):
        clipping.check_grid(Fraction(clip), Fraction(step), dim)


def test_eta_follows_its_formula_and_its_limit() -> None:
    assert clipping.eta("f64_bounded", 1000, 4) == Fraction(2 * 1024 * 4000 * 1000, 2**53)
    assert clipping.eta("f32_assumed", 10**7) == Fraction(1, 1000)
    largest = math.isqrt(2**53 // 2048 // 1000)
    assert clipping.eta("f64_bounded", largest) <= Fraction(1, 1000)
    for patients, terms in ((largest + 1, 1), (largest, 2), (0, 1), (1, 0)):
        with pytest.raises(UsageError):
            clipping.eta("f64_bounded", patients, terms)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**5), st.integers(1, 5000), st.integers(1, 30))
def test_noise_is_at_least_what_was_asked(z_thousandths: int, delta_g: int, sharers: int) -> None:
    z = Fraction(z_thousandths, 1000)
    if z * z * delta_g**2 / sharers < 256:
        return
    variance = clipping.noise_variance(z, delta_g, sharers)
    assert sharers * (variance - 4) >= z**2 * delta_g**2 + 4
    assert sharers * (variance - 5) < z**2 * delta_g**2 + 4
    assert fraction_of(clipping.z_threshold(variance, delta_g, sharers)) >= z
    if sharers == 1:
        assert clipping.z_threshold(variance, delta_g) == clipping.z_worst(variance, delta_g)
    else:
        assert fraction_of(clipping.z_worst(variance, delta_g)) < z


def test_noise_outside_the_samplers_range_is_refused() -> None:
    for z, delta_g in ((Fraction(15), 1), (Fraction(1, 100), 1000), (Fraction(2**26), 2), (Fraction(0), 100)):
        with pytest.raises(UsageError):
            clipping.noise_variance(z, delta_g)
    assert clipping.noise_variance(Fraction(16), 1) == 264


def params(dim: int, patients: int, clip_norm: float = 1.0) -> GateParams:
    step = clip_norm * 0.01 / math.sqrt(dim) * 0.999
    return GateParams(clip_norm, step, dim, 4.0, "full", 1.0, 1, patients, "f64_bounded")


def squared_distance(a: np.ndarray, b: np.ndarray) -> int:
    return sum(int(x - y) ** 2 for x, y in zip(a, b, strict=True))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_neighbours_differ_by_at_most_delta(data: st.DataObject) -> None:
    """Through sanitise, clip, sum, clamp and grid, for cancelling, huge, tiny and broken rows."""
    dim = data.draw(st.integers(1, 8))
    patients = data.draw(st.integers(1, 12))
    rows = data.draw(arrays.arrays(np.float64, (patients, dim), elements=FINITE | ANY))
    if data.draw(st.booleans()):
        rows[1::2] = -rows[0::2][: len(rows[1::2])]
    gate = params(dim, patients, data.draw(st.sampled_from([1.0, 0.37, 1000.0])))
    full = to_grid(gate, clipping.clipped_sum(rows, gate.clip_norm))
    for gone in range(patients):
        fewer = to_grid(gate, clipping.clipped_sum(np.delete(rows, gone, axis=0), gate.clip_norm))
        assert squared_distance(full, fewer) <= gate.delta_g**2


@pytest.mark.parametrize("dim", [1, 4, 31, 1000])
def test_neighbours_reach_beyond_the_clip_norm_by_rounding_alone(dim: int) -> None:
    """Every coordinate half a step below a rounding edge: one patient moves all of them one step further."""
    gate = params(dim, 2)
    step = gate.grid_step
    rounds = math.floor(1.0 / math.sqrt(dim) / step)
    one = np.full(dim, step * (rounds + 0.02))
    one *= min(1.0, 0.999999999 / np.linalg.norm(one))
    rest = np.full(dim, 0.5 * step - (one[0] / step - math.floor(one[0] / step)) * step * 0.5)
    q_with = to_grid(gate, clipping.clipped_sum(np.stack([one, rest]), 1.0))
    q_rest = to_grid(gate, clipping.clipped_sum(rest[None], 1.0))
    assert squared_distance(q_with, q_rest) <= gate.delta_g**2
    tiny = np.full(dim, 1e-6 * step)
    edge = np.full(dim, (0.5 - 5e-7) * step)
    moved = squared_distance(
        to_grid(gate, clipping.clipped_sum(np.stack([edge, tiny]), 1.0)),
        to_grid(gate, clipping.clipped_sum(edge[None], 1.0)),
    )
    assert moved == dim
