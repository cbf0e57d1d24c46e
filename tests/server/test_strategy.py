"""One server step is Flower's own FedAvg on one synthetic reply: the state plus the mean update."""

import logging

import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from common import flower
from common.errors import FailureError
from common.study import Server
from server import strategy
from server.strategy import ServerStep, _OneNode

SHAPES = {"weight": (2, 3), "bias": (2,)}
floats = st.floats(-1e6, 1e6, width=32)
vectors = st.lists(floats, min_size=8, max_size=8)


def tensors(values: list[float], dtype: type[np.floating]) -> dict[str, np.ndarray]:
    flat = np.array(values, dtype=dtype)
    return {"weight": flat[:6].reshape(2, 3), "bias": flat[6:]}


@given(vectors, st.lists(vectors, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_fedavg_on_one_reply_is_the_state_plus_the_mean(
    start: list[float], updates: list[list[float]]
) -> None:
    step = ServerStep(Server())
    state = tensors(start, np.float32)
    expected = state
    for number, update in enumerate(updates, start=1):
        mean = tensors(update, np.float64)
        state = step.advance(state, mean)
        expected = {
            name: (value.astype(np.float64) + mean[name]).astype(np.float32)
            for name, value in expected.items()
        }
        assert step.advances == number
        assert list(state) == ["weight", "bias"]
        for name, value in state.items():
            assert value.dtype == np.float32
            assert value.shape == SHAPES[name]
            assert np.array_equal(value, expected[name])


def test_the_state_that_is_given_stays_as_it_was() -> None:
    state = tensors([1.0] * 8, np.float32)
    ServerStep(Server()).advance(state, tensors([0.5] * 8, np.float64))
    assert all((value == 1).all() for value in state.values())


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e300])
def test_a_model_that_is_not_finite_is_refused(value: float) -> None:
    update = tensors([value, *[0.0] * 7], np.float64)
    with (
        pytest.raises(FailureError, match="not finite"),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        ServerStep(Server()).advance(tensors([0.0] * 8, np.float32), update)


def test_a_strategy_without_a_result_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FedAvg):
        def aggregate_train(self, *_: object) -> tuple[ArrayRecord | None, MetricRecord | None]:
            return None, None

    monkeypatch.setitem(
        strategy.STRATEGIES, "fedavg", lambda: Silent(min_train_nodes=1, min_available_nodes=1)
    )
    with pytest.raises(FailureError, match="gave no model"):
        ServerStep(Server()).advance(tensors([0.0] * 8, np.float32), tensors([0.0] * 8, np.float64))


def test_a_wide_float64_update_is_rounded_once() -> None:
    # 1 + 2^-25 rounds to 1 in float32; adding in float32 twice would lose it twice.
    state = tensors([1.0] * 8, np.float32)
    result = ServerStep(Server()).advance(state, tensors([2.0**-24 + 2.0**-40] * 8, np.float64))
    assert (result["bias"] == np.float32(1.0 + 2.0**-23)).all()


def test_every_strategy_of_the_manifest_exists() -> None:
    choices = Server.model_json_schema()["properties"]["strategy"]
    named = choices.get("enum", [choices.get("const")])
    assert set(strategy.STRATEGIES) == set(named)


def test_the_stub_grid_sends_nothing() -> None:
    grid = _OneNode()
    grid.set_run(flower.empty_run())
    assert list(grid.get_node_ids()) == [strategy.STUB_NODE_ID]
    assert grid.run == flower.empty_run()
    flower.assume_identity(flower.HUB_NODE_ID)
    message = flower.Message(RecordDict(), 1, "train")
    for call in (
        lambda: grid.push_messages([message]),
        lambda: grid.pull_messages(["x"]),
        lambda: grid.send_and_receive([message]),
        lambda: grid.create_message(),
    ):
        with pytest.raises(FailureError, match="sends no messages"):
            call()


def test_flower_does_not_narrate(caplog: pytest.LogCaptureFixture) -> None:
    assert logging.getLogger("flwr").level == logging.WARNING
