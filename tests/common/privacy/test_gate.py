import ast
import copy
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import common.privacy
from common.errors import FailureError, RefusedError, UsageError
from common.privacy.decimals import fraction_of
from common.privacy.gate import (
    GateParams,
    LocalGate,
    PlainGate,
    PlainParams,
    Release,
    SharedGate,
    plan_event,
    to_grid,
)
from common.privacy.noise import coins, discrete_gaussian

Sources = Callable[[int], Callable[[int], bytes]]
PARAMS = GateParams(1.0, 0.0005, 5, 4.0, "full", 1.0, 3, 1000, "f64_bounded")
SAMPLED = replace(PARAMS, sampling="poisson", rate=0.3)
ZEROS = np.zeros(5)


def to_int(delta: np.ndarray) -> np.ndarray:
    return np.floor(delta / 0.01 + 0.5).astype(np.int64)


def test_every_step_is_noised(entropy: Sources) -> None:
    gate = LocalGate(PARAMS, entropy(1))
    again = entropy(1)
    for total in (ZEROS, np.array([1.0, -2.0, 0.00026, 1e300, -1e300])):
        noise = discrete_gaussian(PARAMS.variance(), 5, again)
        rounded = np.rint(np.clip(total, -1000.0, 1000.0) / 0.0005)
        before = total.copy()
        assert np.array_equal(gate.step(total), (rounded + noise) * 0.0005)
        assert np.array_equal(total, before)
        assert noise.any()


def test_the_noise_is_as_wide_as_the_event_says() -> None:
    params = replace(PARAMS, dim=31, steps=2000)
    gate = LocalGate(params, np.random.Generator(np.random.PCG64(4)).bytes)
    opened = np.stack([gate.step(np.zeros(31)) for _ in range(2000)]) / params.grid_step
    event = plan_event(params, "ab" * 16, b"\x07" * 32, "training", 1, 1, 4, 1, "ef" * 16)
    deviation = opened.std() / params.delta_g
    assert deviation == pytest.approx(float(event.mechanism.z_t), rel=4 / math.sqrt(2 * opened.size))
    assert event.mechanism.z_t >= Fraction(4)


def test_two_hospitals_and_two_steps_have_independent_noise() -> None:
    gates = [LocalGate(PARAMS, os.urandom) for _ in range(2)]
    seen = [tuple(gate.step(ZEROS)) for gate in gates for _ in range(3)]
    assert len(set(seen)) == 6


def test_steps_are_counted(entropy: Sources) -> None:
    for done in range(5):
        gate = LocalGate(PARAMS, entropy(done))
        for _ in range(min(done, 3)):
            gate.step(ZEROS)
        if done > 3:
            with pytest.raises(RefusedError, match="only 3 steps"):
                gate.step(ZEROS)
        if done < 3:
            with pytest.raises(RefusedError, match="of 3 charged steps"):
                gate.finish(ZEROS, to_int)
        else:
            assert gate.finish(ZEROS, to_int).q.tolist() == [0] * 5
            with pytest.raises(RefusedError):
                gate.finish(ZEROS, to_int)
            with pytest.raises(RefusedError):
                gate.step(ZEROS)


def finished(entropy: Sources) -> Release:
    gate = LocalGate(PARAMS, entropy(0))
    for _ in range(3):
        gate.step(ZEROS)
    return gate.finish(np.array([0.1, -0.1, 0.0, 1.0, 2.0]), to_int)


def test_only_the_gate_releases(entropy: Sources) -> None:
    release = finished(entropy)
    assert release.q.tolist() == [10, -10, 0, 100, 200]
    q = np.zeros(5, dtype=np.int64)
    for attempt in (
        lambda: Release(q),
        lambda: Release(q, token=object()),
        lambda: Release(q, token=None),
        lambda: pickle.loads(pickle.dumps(release)),  # noqa: S301
        lambda: copy.copy(release),
        lambda: copy.deepcopy(release),
    ):
        with pytest.raises((RefusedError, TypeError)):
            attempt()
    with pytest.raises(ValueError, match="read-only"):
        release.q[0] = 1
    with pytest.raises(AttributeError):
        release.q = q  # type: ignore[misc]


def test_a_release_keeps_its_own_copy(entropy: Sources) -> None:
    kept: list[np.ndarray] = []

    def remember(delta: np.ndarray) -> np.ndarray:
        kept.append(to_int(delta))
        return kept[0]

    gate = PlainGate(PlainParams(5, 1))
    gate.step(ZEROS)
    release = gate.finish(ZEROS, remember)
    kept[0][0] = 7
    assert release.q.tolist() == [0] * 5


def test_a_gate_whose_quantiser_fails_releases_nothing(entropy: Sources) -> None:
    for bad in (lambda d: d, lambda d: to_int(d)[:4], lambda d: to_int(d).astype(np.int32), lambda d: None):
        gate = PlainGate(PlainParams(5, 1))
        gate.step(ZEROS)
        with pytest.raises(FailureError):
            gate.finish(ZEROS, bad)
        with pytest.raises(RefusedError):
            gate.finish(ZEROS, to_int)


@pytest.mark.parametrize(
    "total",
    [
        np.zeros(4),
        np.zeros((5, 1)),
        np.zeros(5, dtype=np.float32),
        np.zeros(5, dtype=np.int64),
        [0.0] * 5,
        np.array([0.0, math.nan, 0.0, 0.0, 0.0]),
        np.array([0.0, math.inf, 0.0, 0.0, 0.0]),
    ],
)
def test_other_sums_are_refused(total: np.ndarray, entropy: Sources) -> None:
    for gate in (LocalGate(PARAMS, entropy(0)), PlainGate(PlainParams(5, 3))):
        with pytest.raises(RefusedError):
            gate.step(total)
        for _ in range(3):
            gate.step(ZEROS)
        with pytest.raises(RefusedError):
            gate.finish(total, to_int)


def test_coins_fall_once_before_each_poisson_step(entropy: Sources) -> None:
    gate = LocalGate(SAMPLED, entropy(3))
    again = entropy(3)
    for _ in range(3):
        with pytest.raises(RefusedError, match="coins first"):
            gate.step(ZEROS)
        mask = gate.coins(40)
        assert np.array_equal(mask, coins(Fraction(3, 10), 40, again))
        assert 0 < mask.sum() < 40
        with pytest.raises(RefusedError, match="have been tossed"):
            gate.coins(40)
        gate.step(ZEROS)
        discrete_gaussian(SAMPLED.variance(), 5, again)


def test_full_batches_take_everyone_without_entropy() -> None:
    def none(count: int) -> bytes:
        raise AssertionError

    gate = LocalGate(PARAMS, none)
    assert gate.coins(7).tolist() == [True] * 7
    assert gate.coins(0).shape == (0,)
    assert PlainGate(PlainParams(5, 3)).coins(2).tolist() == [True, True]


def test_more_patients_than_the_public_bound_are_refused(entropy: Sources) -> None:
    for params in (PARAMS, SAMPLED):
        LocalGate(params, entropy(0)).coins(1000)
        with pytest.raises(RefusedError, match="max_patients"):
            LocalGate(params, entropy(0)).coins(1001)
        with pytest.raises(RefusedError):
            LocalGate(params, entropy(0)).coins(-1)


def test_a_plain_gate_adds_nothing() -> None:
    gate = PlainGate(PlainParams(5, 1))
    total = np.array([0.1, -0.2, 0.3, 1e9, 0.0])
    result = gate.step(total)
    assert np.array_equal(result, total)
    assert result is not total
    with pytest.raises(RefusedError):
        gate.step(total)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
        {"clip_norm": math.nan},
        {"grid_step": 0.0},
        {"grid_step": math.inf},
        {"grid_step": 0.01},
        {"grid_step": 1e-15},
        {"dim": 0},
        {"dim": 500},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 0.001},
        {"noise_multiplier": 1e6},
        {"sampling": "shuffle"},
        {"sampling": "poisson"},
        {"rate": 0.5},
        {"rate": 0.0},
        {"rate": 1.5},
        {"steps": 0},
        {"max_patients": 0},
        {"max_patients": 10**6},
        {"arithmetic": "bf16"},
        {"mode": "shared-noise"},
        {"terms_per_patient": 0},
    ],
)
def test_unsafe_parameters_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        replace(PARAMS, **changes)  # type: ignore[arg-type]


def test_the_plan_is_the_gate(entropy: Sources) -> None:
    event = plan_event(SAMPLED, "ab" * 16, b"\x07" * 32, "training", 4, 2, 9, 2, "ef" * 16)
    mechanism = event.mechanism
    assert (event.state, event.kind, event.round, event.attempt) == ("charged", "sum", 4, 2)
    assert event.manifest_digest == "07" * 32
    assert (mechanism.q, mechanism.steps, mechanism.dim) == (Fraction(3, 10), 3, 5)
    assert (mechanism.u_size, mechanism.members, mechanism.t) == (9, 9, 2)
    assert mechanism.s_g_squared == SAMPLED.variance()
    assert mechanism.delta_g == SAMPLED.delta_g
    assert mechanism.z_t == mechanism.z_w >= 4
    assert fraction_of(SAMPLED.eta) >= Fraction(2048 * 1000 * 1000, 2**53)
    hexadecimal = plan_event(SAMPLED, "ab" * 16, "07" * 32, "training", 4, 2, 9, 2, "ef" * 16)
    assert hexadecimal == event


def test_the_grid_takes_the_nearest_point_and_clamps() -> None:
    total = np.array([0.00024, 0.00026, -0.00076, 1e9, -1e9])
    assert to_grid(PARAMS, total).tolist() == [0, 1, -2, 2_000_000, -2_000_000]


def test_no_seed_path_and_no_clock() -> None:
    """No name of a seed in the gate's interface, and no module of chance, time or files below it."""
    assert not [field.name for field in fields(GateParams) if "seed" in field.name]
    folder = Path(common.privacy.__file__).parent
    paths = sorted(folder.glob("*.py"))
    assert len(paths) >= 8
    banned = {"random", "secrets", "os", "time", "datetime", "socket", "subprocess", "pathlib", "io", "torch"}
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not banned & {alias.name.partition(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in banned, path
            elif isinstance(node, ast.Attribute):
                assert node.attr not in {"random", "default_rng"}, path
            elif isinstance(node, ast.Name):
                assert node.id != "open", path


SHARED = replace(PARAMS, mode="shared-noise", steps=1, minimum=3, clamp=2.0)


def test_a_shared_gate_releases_one_sum_without_noise(entropy: Sources) -> None:
    gate = SharedGate(SHARED, entropy(1))
    assert gate.coins(3).tolist() == [True] * 3
    release = gate.contribute(np.array([1.0, -0.00026, 0.0, 5.0, -5.0]))
    # The share comes under the masks; the clamp R is the codec's.
    assert release.q.tolist() == [2000, -1, 0, 4000, -4000]
    with pytest.raises(RefusedError, match="only 1 steps"):
        gate.contribute(ZEROS)


def test_a_shared_gate_takes_what_every_gate_takes(entropy: Sources) -> None:
    for wrong in (np.zeros(4), np.zeros(5, dtype=np.float32), np.full(5, np.nan), [0.0] * 5):
        with pytest.raises(RefusedError):
            SharedGate(SHARED, entropy(0)).contribute(wrong)  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="coins first"):
        SharedGate(replace(SHARED, sampling="poisson", rate=0.3), entropy(0)).contribute(ZEROS)
    with pytest.raises(RefusedError, match="max_patients"):
        SharedGate(SHARED, entropy(0)).coins(1001)


def test_a_gate_serves_its_own_mode_alone(entropy: Sources) -> None:
    with pytest.raises(RefusedError, match="local alone"):
        LocalGate(SHARED, entropy(0))
    with pytest.raises(RefusedError, match="shared noise alone"):
        SharedGate(PARAMS, entropy(0))
    for wrong in ({"mode": "central"}, {"mode": "shared-noise", "steps": 2}):
        with pytest.raises(UsageError, match="mode"):
            replace(PARAMS, **wrong)  # type: ignore[arg-type]


def test_a_share_is_the_noise_divided_among_the_honest() -> None:
    z, delta_g = Fraction(4), SHARED.delta_g
    for sharers in range(2, 9):
        assert SHARED.variance(sharers) == math.ceil((z**2 * delta_g**2 + 4) / sharers) + 4
