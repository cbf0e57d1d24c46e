"""One server step: the sum of a round becomes one synthetic reply to a Flower strategy.

Source: Flower's ``flwr.serverapp.strategy``; the papers are named in ``common.study``. Rules: the strategy
sees exactly one reply with ``num-examples`` 1, because no single hospital's update exists here; all of them
work on each coordinate alone, so the model goes through them in blocks; a strategy lives for one block, and
what it must remember is kept here, so that a restored step has nothing else to go on than this one has; the
round given to it is the number of advances.
"""

import logging
import math
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flowers
from numpy.typing import NDArray

from common import flower
from common.errors import FailureError, VerificationError
from common.secagg.codec import Integers, dequantise
from common.study import Manifest
from common.tasks.evaluation import scale
from common.tasks.models.layout import Tensor, layout, size, state_layout
from common.tasks.state import State, load_state, state_bytes
from server.memory import MemoryGrid

# Flower narrates every call at INFO; what happened in a round is said by server/rounds.py, once.
logging.getLogger("flwr").setLevel(logging.WARNING)

STUB_NODE_ID: Final = 1
BLOCK: Final = 1 << 16
ONE_NODE: Final = {"min_train_nodes": 1, "min_available_nodes": 1}
_MOMENTUM: Final = {"learning_rate": "server_learning_rate", "momentum": "server_momentum"}
STRATEGIES: Final[dict[str, tuple[type[flowers.FedAvg], dict[str, str], tuple[str, ...]]]] = {
    "fedavg": (flowers.FedAvg, {}, ()),
    "fedavgm": (flowers.FedAvgM, _MOMENTUM, ("momentum_vector",)),
    "fedadagrad": (flowers.FedAdagrad, {"learning_rate": "eta"}, ("m_t", "v_t")),
    "fedadam": (flowers.FedAdam, {"learning_rate": "eta"}, ("m_t", "v_t")),
    "fedyogi": (flowers.FedYogi, {"learning_rate": "eta"}, ("m_t", "v_t")),
}
"""Flower's class, its names for our parameters where they differ, and what it remembers."""

_KEY: Final = "block"
_ADVANCES: Final = "advances"
_ITERATES: Final = "iterates"


class ServerStep:
    """The study's strategy behind ``advance(state, sum) -> next state``.

    Guarantee: killed_equals_uninterrupted - a new step restored from ``to_bytes`` goes on with the same bits.
    """

    def __init__(self, manifest: Manifest) -> None:
        study, training = manifest.study, manifest.study.training
        # With shared noise what was summed are gradients, and the hub descends.
        public = training.sampling_rate * training.patients_public
        shared = training.mode == "shared-noise" and not study.counts
        self._scale = training.learning_rate / public if shared else 1.0
        self._counts = study.counts
        self._averages_from = training.rounds - training.average_last + 1
        self._rounds = training.rounds
        self._layout = layout(study.model, study.contract)
        self._evaluation = state_layout(study)[len(self._layout) :]
        # What undoes the scale of held-out counts, and turns a share of a public number into a count.
        self._per_count = 1.0 / (scale(study) * training.sampling_rate)
        if training.mode == "local":
            self._per_count *= training.patients_public
        self._make, names, slots = STRATEGIES[training.server.strategy]
        given = training.server.model_dump(exclude={"strategy"})
        self._options: dict[str, Any] = ONE_NODE | {names.get(name, name): x for name, x in given.items()}
        self._grid = MemoryGrid({STUB_NODE_ID: _silent})
        self._slots = {name: np.zeros(size(self._layout)) for name in slots}
        self._iterates = np.zeros(size(self._layout) if training.average_last > 1 else 0)
        self.advances = 0

    def advance(self, state: State, total: Integers, step: float, cohort: float) -> State:
        """The next model: the strategy's answer to ``state`` plus the mean change.

        ``total`` [d] is the sum over hospitals in units of ``step``, ``cohort`` how many they are, or the sum
        of their weights. It is used up where it is writable and 32 bits wide: the next model is then made in
        its memory. Behind the model are the counts of held-out patients: those of the last round, and in the
        rounds after training, which leave the model as it is, their mean over these.

        Guarantee: blocks_are_flowers_own_step - the bits are those of one strategy that keeps float64 arrays
        of the whole model and is given each cast result.
        Raises: FailureError when the result is not finite; this step is then not to be used again.
        """
        d = size(self._layout)
        if total.shape != (d + size(self._evaluation),):
            raise FailureError("strategy.shape", "the sum does not have the length of the model")
        self.advances += 1
        counts = self._counted(state, total[d:], step)
        if self._evaluation and self.advances > self._rounds:
            return {tensor.name: state[tensor.name] for tensor in self._layout} | counts
        total = total[:d]
        reuse = total.dtype == np.int32 and total.flags.writeable and total.flags.c_contiguous
        result = total.view(np.float32) if reuse else np.empty(total.shape, np.float32)
        found: State = {}
        start = 0
        for tensor in self._layout:
            old = state[tensor.name].reshape(-1)
            for at in range(0, tensor.size, BLOCK):
                stop = min(at + BLOCK, tensor.size)
                here = slice(start + at, start + stop)
                current = old[at:stop].astype(np.float64)
                # A sum of counts stays a sum; of updates it is the mean that counts.
                mean_of = 1 if self._counts else cohort
                moved = current + dequantise(total[here], step) * self._scale / mean_of
                with np.errstate(over="ignore", invalid="ignore"):
                    block = self._averaged(self._block(current, moved, here), here).astype(np.float32)
                # Adding +0 makes zeros positive, as they are in a stored state.
                np.add(block, np.float32(0), out=result[here])
                if not np.isfinite(block).all():
                    problem = "the server step gave a model that is not finite"
                    raise FailureError("strategy.not-finite", problem)
            found[tensor.name] = result[start : start + tensor.size].reshape(tensor.shape)
            start += tensor.size
        return found | counts

    def _counted(self, state: State, total: Integers, step: float) -> State:
        """The counts of held-out patients after this round, by tensor; none without an evaluation."""
        if not self._evaluation:
            return {}
        (tensor,) = self._evaluation
        now = dequantise(total, step) * self._per_count
        done = self.advances - self._rounds
        if done > 1:
            # The rounds after training are of one model, and each has its own noise.
            now = state[tensor.name].astype(np.float64) * ((done - 1) / done) + now / done
        return {tensor.name: now.astype(np.float32) + np.float32(0)}

    def to_bytes(self) -> bytes:
        """All that is remembered between advances, as safetensors: for a checkpoint beside the model."""
        count = np.array([self.advances], dtype=np.float64)
        return state_bytes({_ADVANCES: count, **self._kept}, self._remembered)

    def restore(self, data: bytes) -> None:
        """Go on where ``to_bytes`` was made, for the same manifest.

        Guarantee: foreign_bytes_are_not_restored - other names, lengths, numbers or forms are refused.
        Raises: VerificationError.
        """
        values = load_state(data, self._remembered, math.inf)
        advances = float(values.pop(_ADVANCES)[0])
        if not (advances >= 0 and advances.is_integer()):
            raise VerificationError("strategy.advances", "the number of advances is not a count")
        self.advances = int(advances)
        found = {name: np.array(value, dtype=np.float64) for name, value in values.items()}
        self._iterates = found.pop(_ITERATES, self._iterates)
        self._slots = found

    def _averaged(self, block: NDArray[np.float64], here: slice) -> NDArray[np.float64]:
        """One block of the next model: the last one is the mean of the last iterates."""
        if not self._iterates.size or self.advances < self._averages_from:
            return block
        self._iterates[here] += block
        if self.advances < self._rounds:
            return block
        mean: NDArray[np.float64] = self._iterates[here] / (self._rounds - self._averages_from + 1)
        return mean

    @property
    def _remembered(self) -> list[Tensor]:
        slots = [Tensor(name, slot.shape, "float64") for name, slot in self._kept.items()]
        return [Tensor(_ADVANCES, (1,), "float64"), *slots]

    @property
    def _kept(self) -> dict[str, NDArray[np.float64]]:
        return self._slots | ({_ITERATES: self._iterates} if self._iterates.size else {})

    def _block(
        self, current: NDArray[np.float64], moved: NDArray[np.float64], here: slice
    ) -> NDArray[np.float64]:
        """One block through a strategy that is lent its memory of it."""
        strategy = self._make(**self._options)
        for name, slot in self._slots.items():
            setattr(strategy, name, [slot[here]] if name == "momentum_vector" else {_KEY: slot[here]})
        asked, config = _record(current), ConfigRecord({})
        request, *_ = strategy.configure_train(self.advances, asked, config, self._grid)
        content = RecordDict({"arrays": _record(moved), "metrics": MetricRecord({"num-examples": 1})})
        reply = flower.Message(content, reply_to=request)
        arrays, _metrics = strategy.aggregate_train(self.advances, [reply])
        if arrays is None:
            raise FailureError("strategy.result", "the server strategy gave no model")
        for name, slot in self._slots.items():
            kept = getattr(strategy, name)
            slot[here] = (kept[0] if name == "momentum_vector" else kept[_KEY]) + 0.0
        return arrays[_KEY].numpy()


def _record(values: NDArray[np.float64]) -> ArrayRecord:
    return ArrayRecord({_KEY: Array(values)})


def _silent(_message: flower.Message) -> flower.Message:
    raise FailureError("strategy.grid", "this Grid is only counted")
