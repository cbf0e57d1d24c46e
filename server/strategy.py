"""One server step: the decoded mean of a round becomes one synthetic reply to a Flower strategy.

Source: Flower's ``flwr.serverapp.strategy``; McMahan et al., arXiv 1602.05629 (FedAvg). Rules: the
strategy sees exactly one reply with ``num-examples`` 1, because no single hospital's update exists here;
its result is cast to the layout's dtype; the round given to it is the number of advances.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray

from common import flower
from common.errors import FailureError
from common.study import Server

# Flower narrates every call at INFO; what happened in a round is said by server/rounds.py, once.
logging.getLogger("flwr").setLevel(logging.WARNING)

State = Mapping[str, NDArray[np.float32]]
STUB_NODE_ID: Final = 1

STRATEGIES: Final[dict[str, Callable[[], Strategy]]] = {
    "fedavg": lambda: FedAvg(min_train_nodes=1, min_available_nodes=1),
}


class _OneNode(Grid):
    """The Grid that configure_train wants to sample from: one node, no messages."""

    def set_run(self, run: flower.Run) -> None:
        """Nothing to remember."""

    @property
    def run(self) -> flower.Run:
        """An empty run."""
        return flower.empty_run()

    def create_message(self, *args: Any, **kwargs: Any) -> flower.Message:
        """Not offered."""
        raise FailureError("strategy.grid", "this Grid sends no messages")

    def get_node_ids(self) -> Iterable[int]:
        """The one node."""
        return [STUB_NODE_ID]

    def push_messages(self, messages: Iterable[flower.Message]) -> Iterable[str]:
        """Not offered."""
        raise FailureError("strategy.grid", "this Grid sends no messages")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[flower.Message]:
        """Not offered."""
        raise FailureError("strategy.grid", "this Grid sends no messages")

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> Iterable[flower.Message]:
        """Not offered."""
        raise FailureError("strategy.grid", "this Grid sends no messages")


def _record(state: Mapping[str, NDArray[np.floating[Any]]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in state.items()})


class ServerStep:
    """Flower's strategy behind ``advance(mean, state) -> next state``."""

    def __init__(self, server: Server) -> None:
        flower.assume_identity(flower.HUB_NODE_ID)
        self._strategy = STRATEGIES[server.strategy]()
        self._grid = _OneNode()
        self.advances = 0

    def advance(
        self, state: State, mean_update: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, NDArray[np.float32]]:
        """The next model.

        ``state`` and ``mean_update`` hold the layout's tensors; the strategy is shown the model that the
        mean update leads to. Raises FailureError when the result is not finite.
        """
        self.advances += 1
        requests = list(
            self._strategy.configure_train(self.advances, _record(state), ConfigRecord({}), self._grid)
        )
        moved = {name: (value.astype(np.float64) + mean_update[name]) for name, value in state.items()}
        content = RecordDict({"arrays": _record(moved), "metrics": MetricRecord({"num-examples": 1})})
        arrays, _metrics = self._strategy.aggregate_train(
            self.advances, [flower.Message(content, reply_to=requests[0])]
        )
        if arrays is None:
            raise FailureError("strategy.result", "the server strategy gave no model")
        result = {name: arrays[name].numpy().astype(np.float32).reshape(state[name].shape) for name in state}
        if not all(np.isfinite(value).all() for value in result.values()):
            raise FailureError("strategy.not-finite", "the server step gave a model that is not finite")
        return result
