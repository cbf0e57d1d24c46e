"""A server step is Flower's own strategy on one synthetic reply; killed and restored it is the same step."""

import logging
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common import flower, study
from common.errors import FailureError, VerificationError
from common.identity import key_text
from common.study import Manifest, Party, Study
from common.tasks.models import initial_state
from common.tasks.models.layout import flatten, layout, size
from common.tasks.state import State, load_state, state_bytes
from server import strategy
from server.strategy import ServerStep
from tests.federation import small_study

STEP, COHORT = 1e-3, 3
SERVERS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavgm": {"learning_rate": 0.7, "momentum": 0.9},
    "fedavgm without momentum": {"learning_rate": 0.7},
    "fedavgm as fedavg": {},
    "fedadagrad": {"learning_rate": 0.05, "tau": 0.01},
    "fedadam": {"learning_rate": 0.02, "tau": 0.003, "beta_1": 0.8, "beta_2": 0.95},
    "fedyogi": {"learning_rate": 0.03, "tau": 0.002, "beta_1": 0.7, "beta_2": 0.9},
}
every_server = pytest.mark.parametrize("name", SERVERS)


def manifest_of(name: str = "fedavg", hidden: tuple[int, ...] = (4,), **changes: Any) -> Manifest:
    """A study with that server; the model has 2 x 4 + 4 + 4 x 2 + 2 = 22 parameters."""
    members = ["A", "B", "C"]
    given: dict[str, Any] = {
        "model": {"kind": "mlp", "hidden": list(hidden)},
        "privacy": {"kind": "without_differential_privacy"},
        "training__server": {"strategy": name.split()[0]} | SERVERS[name],
    }
    parsed = Study.model_validate(small_study(members, **given | changes))
    return Manifest(
        schema=1,
        run="ab" * 16,
        roster="cd" * 32,
        hub=key_text(b"\x09" + bytes(31)),
        coordinator=key_text(b"\x0a" + bytes(31)),
        members=tuple(Party(id=i, name=member) for i, member in enumerate(members, 1)),
        study=parsed,
    )


def totals(d: int, rounds: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Sums of some rounds; a third of the coordinates never moves, some move far."""
    random = np.random.default_rng(seed)
    moving = random.integers(0, 3, d) > 0
    return [random.integers(-2000, 2001, d) * moving * random.choice([1, 50], d) for _ in range(rounds)]


def same(a: State, b: State) -> bool:
    return list(a) == list(b) and all(a[n].tobytes() == b[n].tobytes() for n in a)


def whole_strategy(name: str, manifest: Manifest, sums: list[NDArray[np.int64]]) -> list[State]:
    """Flower's strategy on the whole model in float64, given its own cast result each time."""
    make, names, _ = strategy.STRATEGIES[name.split()[0]]
    options = {names.get(key, key): value for key, value in SERVERS[name].items()}
    flowers: Any = make(min_train_nodes=1, min_available_nodes=1, **options)
    grid = strategy.MemoryGrid({1: lambda message: message})
    state, states = initial_state(manifest), []
    for number, total in enumerate(sums, start=1):
        arrays = ArrayRecord({n: Array(value.astype(np.float64)) for n, value in state.items()})
        mean = total.astype(np.float64) * STEP / COHORT
        moved, start = {}, 0
        for n, value in state.items():
            part = mean[start : start + value.size].reshape(value.shape)
            moved[n], start = Array(value.astype(np.float64) + part), start + value.size
        if hasattr(flowers, "momentum_vector"):
            flowers.current_arrays = arrays  # it would go on with its own float64 result
        (request,) = flowers.configure_train(number, arrays, ConfigRecord({}), grid)
        content = RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 1})})
        result, _ = flowers.aggregate_train(number, [flower.Message(content, reply_to=request)])
        state = {n: result[n].numpy().astype(np.float32) + np.float32(0) for n in state}
        states.append(state)
    return states


@every_server
@pytest.mark.parametrize("block", [1, 5, 1 << 16])
def test_blocks_are_flowers_own_step(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "BLOCK", block)
    manifest = manifest_of(name)
    sums = totals(22, 4)
    step, state = ServerStep(manifest), initial_state(manifest)
    for total, expected in zip(sums, whole_strategy(name, manifest, sums), strict=True):
        state = step.advance(state, total, STEP, COHORT)
        assert same(state, expected)


@every_server
@given(seed=st.integers(0, 10**6), killed_after=st.integers(0, 5))
@settings(max_examples=8, deadline=None)
def test_killed_equals_uninterrupted(name: str, seed: int, killed_after: int) -> None:
    """The model and the step both come back from bytes after any advance, also before the first."""
    manifest = manifest_of(name)
    tensors = layout(manifest.study.model, manifest.study.contract)
    sums = totals(22, 6, seed)
    straight, resumed = ServerStep(manifest), ServerStep(manifest)
    state = other = initial_state(manifest)
    for number, total in enumerate(sums):
        if number == killed_after:
            saved = resumed.to_bytes()
            resumed = ServerStep(manifest)
            resumed.restore(saved)
            assert resumed.to_bytes() == saved
            other = load_state(state_bytes(other, tensors), tensors, 1e9)
        state = straight.advance(state, total.copy(), STEP, COHORT)
        other = resumed.advance(other, total.copy(), STEP, COHORT)
        assert same(state, other)
        assert straight.to_bytes() == resumed.to_bytes()
        assert straight.advances == resumed.advances == number + 1


def papers(name: str, x: NDArray[np.float64], changes: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Hsu et al. 2019 and algorithm 2 of Reddi et al. 2021, with Flower's bias correction for Adam."""
    given = manifest_of(name).study.training.server.model_dump()
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, delta in enumerate(changes, start=1):
        match given["strategy"]:
            case "fedavg":
                x = x + delta
            case "fedavgm":
                v = given["momentum"] * v + delta
                x = x + given["learning_rate"] * v
            case other:
                beta_1 = given.get("beta_1", 0.0)
                m = beta_1 * m + (1 - beta_1) * delta
                rate = given["learning_rate"]
                if other == "fedadagrad":
                    v = v + delta**2
                elif other == "fedadam":
                    v = given["beta_2"] * v + (1 - given["beta_2"]) * delta**2
                    # Kingma and Ba have t, Flower t + 1.
                    rate *= np.sqrt(1 - given["beta_2"] ** (t + 1)) / (1 - beta_1 ** (t + 1))
                else:
                    v = v - (1 - given["beta_2"]) * delta**2 * np.sign(v - delta**2)
                x = x + rate * m / (np.sqrt(v) + given["tau"])
        x = x.astype(np.float32).astype(np.float64)
    return x


@every_server
def test_steps_are_those_of_the_papers(name: str) -> None:
    manifest = manifest_of(name)
    tensors = layout(manifest.study.model, manifest.study.contract)
    step, state = ServerStep(manifest), initial_state(manifest)
    start = flatten(state, tensors)
    sums = totals(22, 5, seed=3)
    for total in sums:
        state = step.advance(state, total, STEP, COHORT)
    expected = papers(name, start, [total * STEP / COHORT for total in sums])
    found = flatten(state, tensors)
    # A rounding to float32 may fall to either side.
    assert np.abs(found - expected).max() <= 1e-6 * max(1, np.abs(expected).max())
    assert np.abs(found - start).max() > 1e-2


def test_every_strategy_of_the_manifest_exists() -> None:
    servers = study.Server.__args__  # type: ignore[attr-defined]
    assert set(strategy.STRATEGIES) == {
        server.model_fields["strategy"].annotation.__args__[0] for server in servers
    }


@every_server
def test_every_parameter_reaches_the_strategy(name: str) -> None:
    """Contract with Flower: its attributes for ours, and for what is remembered."""
    step = ServerStep(manifest_of(name))
    made: Any = step._make(**step._options)
    given = step._options.keys() - {"min_train_nodes", "min_available_nodes"}
    assert len(given) == len(manifest_of(name).study.training.server.model_dump()) - 1
    assert all(getattr(made, key) == step._options[key] for key in given)
    assert all(hasattr(made, slot) for slot in step._slots)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@pytest.mark.parametrize("writable", [True, False])
def test_the_sum_makes_way_for_the_model_only_where_it_fits(dtype: Any, writable: bool) -> None:
    manifest = manifest_of()
    state = initial_state(manifest)
    before = {name: value.copy() for name, value in state.items()}
    (total,) = totals(22, 1)
    words = (total % 1000).astype(dtype)
    words.setflags(write=writable)
    kept = words.copy()
    found = ServerStep(manifest).advance(state, words, STEP, COHORT)
    assert same(found, ServerStep(manifest).advance(state, kept.astype(np.int64), STEP, COHORT))
    reused = any(np.shares_memory(value, words) for value in found.values())
    assert reused == (writable and dtype is np.int32)
    assert reused or (words == kept).all()
    assert same(state, before)
    assert all(value.dtype == np.float32 for value in found.values())


def test_zeros_are_positive_as_in_a_stored_state() -> None:
    manifest = manifest_of()
    state = initial_state(manifest)
    state["0.bias"][:] = [-1e-45, 1e-45, 0, 1]
    found = ServerStep(manifest).advance(state, np.zeros(22, np.int64), STEP, COHORT)
    state["0.bias"][:] = [-0.0, 0.0, 0, 1]
    again = ServerStep(manifest).advance(state, np.zeros(22, np.int64), STEP, COHORT)
    for value in (found["0.bias"], again["0.bias"]):
        assert not np.signbit(value[value == 0]).any()


def test_an_update_is_rounded_once() -> None:
    # 1 + 2^-24 rounds to 1 in float32; a little more to 1 + 2^-23.
    manifest = manifest_of()
    state = {name: np.ones_like(value) for name, value in initial_state(manifest).items()}
    found = ServerStep(manifest).advance(state, np.full(22, 2**16 + 1), 2.0**-40, 1)
    assert all((value == np.float32(1 + 2.0**-23)).all() for value in found.values())


def test_a_model_that_is_not_finite_is_refused() -> None:
    manifest = manifest_of()
    total = np.zeros(22, dtype=np.int64)
    total[21] = 2**40
    with pytest.raises(FailureError, match="not finite"):
        ServerStep(manifest).advance(initial_state(manifest), total, 1e30, 1)


@pytest.mark.parametrize("length", [0, 21, 23])
def test_sums_of_another_length_are_refused(length: int) -> None:
    step = ServerStep(manifest_of())
    with pytest.raises(FailureError, match="length"):
        step.advance(initial_state(manifest_of()), np.zeros(length, dtype=np.int64), STEP, COHORT)
    assert step.advances == 0


def test_a_strategy_without_a_result_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FedAvg):
        def aggregate_train(self, *_: object) -> tuple[ArrayRecord | None, MetricRecord | None]:
            return None, None

    monkeypatch.setitem(strategy.STRATEGIES, "fedavg", (Silent, {}, ()))
    with pytest.raises(FailureError, match="gave no model"):
        ServerStep(manifest_of()).advance(initial_state(manifest_of()), np.zeros(22, np.int64), STEP, 1)


@every_server
def test_foreign_bytes_are_not_restored(name: str) -> None:
    step = ServerStep(manifest_of(name))
    step.advance(initial_state(manifest_of(name)), totals(22, 1)[0], STEP, COHORT)
    good = step.to_bytes()
    wider = ServerStep(manifest_of(name, hidden=(5,))).to_bytes()
    others = [ServerStep(manifest_of(other)).to_bytes() for other in SERVERS]
    layouts = step._remembered
    values = {t.name: np.zeros(t.shape) for t in layouts}
    counts = [state_bytes(values | {"advances": np.array([n])}, layouts) for n in (-1.0, 0.5)]
    foreign = [b"", good[:-1], good + b"\0", good.replace(b"advances", b"advanced"), *counts]
    foreign += [data for data in (wider, *others) if len(data) != len(good)]
    for data in foreign:
        with pytest.raises(VerificationError):
            ServerStep(manifest_of(name)).restore(data)
    bad = bytearray(good)
    bad[-8:] = np.array([np.nan]).tobytes()
    with pytest.raises(VerificationError):
        step.restore(bytes(bad))
    assert step.to_bytes() == good
    assert size(layouts) == 1 + 22 * len(step._slots)


def test_flower_does_not_narrate() -> None:
    assert logging.getLogger("flwr").level == logging.WARNING


SHARED: dict[str, Any] = {
    "privacy": {
        "kind": "dp",
        "clip_norm": 1.0,
        "grid_step": STEP,
        "noise_multiplier": 8.0,
        "max_patients": 1000,
        "arithmetic": "f32_assumed",
    },
    "training__mode": "shared-noise",
    "training__engine": "bookkeeping",
    "training__learning_rate": 3.0,
    "training__sampling": "poisson",
    "training__sampling_rate": 0.5,
    "aggregation__codec": {"bits": 32, "step": STEP, "range": 100.0},
}


def test_with_shared_noise_the_hub_descends() -> None:
    manifest = manifest_of(**SHARED)
    (total,) = totals(22, 1)
    state = initial_state(manifest)
    tensors = layout(manifest.study.model, manifest.study.contract)
    found = flatten(ServerStep(manifest).advance(state, total, STEP, COHORT), tensors)
    # The rate over q n_pub = 0.5 * 20, times the mean of three hospitals' sums.
    naive = flatten(state, tensors) + 3.0 / 10.0 * total * STEP / 3
    assert np.allclose(found, naive, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rounds", "last"), [(5, 1), (5, 2), (5, 5), (1, 1)])
@every_server
def test_the_last_model_is_the_mean_of_the_last_iterates(name: str, rounds: int, last: int) -> None:
    manifest = manifest_of(name, training__rounds=rounds, training__average_last=last)
    tensors = layout(manifest.study.model, manifest.study.contract)
    sums = totals(22, rounds)
    iterates = [flatten(state, tensors) for state in whole_strategy(name, manifest, sums)]
    step, state = ServerStep(manifest), initial_state(manifest)
    for number, total in enumerate(sums, start=1):
        state = step.advance(state, total, STEP, COHORT)
        if number < rounds:
            assert (flatten(state, tensors) == iterates[number - 1]).all()
            saved = step.to_bytes()
            step = ServerStep(manifest)
            step.restore(saved)
    assert np.allclose(flatten(state, tensors), np.mean(iterates[-last:], axis=0), rtol=1e-6, atol=1e-9)
