"""What a model says of encoded rows, as plain numbers.

Source: the losses in ``modules`` and the papers there. Rules: no gradient is kept; each row's numbers are its
own; the same for evaluation in a round, for ``site predict`` and for ``site benefit``.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.contract import Contract
from common.contract.sequences import PADDING
from common.methods import Autoencoder, Model, SkipGram
from common.tasks.models.sequences import Translator

TOP: int = 5


def predict(
    model: Model, contract: Contract, module: nn.Module, x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [n, p] of rows x [n, width].

    Classes: the probability of each (of an SVM, the softmax of its scores). An amount: its scaled value. Time
    to event: the probability to be past each interval. Autoencoder: half the squared error. Skip-gram: the
    share of neighbours among the 5 likeliest, and their mean probability. Sequence to sequence: the share of
    tokens that are right, and whether all are.
    """
    inputs = torch.tensor(x, dtype=torch.float64)
    with torch.no_grad():
        if isinstance(model, SkipGram):
            found = _neighbours(module, inputs, model.window)
        elif isinstance(module, Translator):
            found = _translated(module, inputs)
        elif isinstance(model, Autoencoder):
            found = 0.5 * (module(inputs) - inputs).square().sum(1, keepdim=True)
        else:
            found = module(inputs)
            if contract.label.kind == "classes":
                found = torch.softmax(found, dim=1)
            elif contract.label.kind == "time_to_event":
                found = torch.exp(-torch.cumsum(found.clamp(-30.0, 5.0).exp(), dim=1))
    result: NDArray[np.float64] = found.numpy()
    return result


def _neighbours(module: nn.Module, x: torch.Tensor, window: int) -> torch.Tensor:
    tokens = x.long()
    shares = torch.softmax(module(x), dim=2)
    top = shares.topk(min(TOP, shares.shape[2]), dim=2).indices
    sums = torch.zeros((len(x), 3), dtype=x.dtype)
    for apart in range(1, min(window, tokens.shape[1] - 1) + 1):
        for here, there in (
            (slice(None, -apart), slice(apart, None)),
            (slice(apart, None), slice(None, -apart)),
        ):
            wanted = tokens[:, there]
            both = ((tokens[:, here] != PADDING) & (wanted != PADDING)).to(x.dtype)
            hit = (top[:, here] == wanted[:, :, None]).any(2).to(x.dtype)
            probability = shares[:, here].gather(2, wanted[:, :, None])[:, :, 0]
            sums += torch.stack([(both).sum(1), (hit * both).sum(1), (probability * both).sum(1)], dim=1)
    return sums[:, 1:] / sums[:, :1].clamp(min=1)


def _translated(module: Translator, x: torch.Tensor) -> torch.Tensor:
    said, wanted = module.greedy(x), x[:, module.places[1]].long()
    there = ((said != PADDING) | (wanted != PADDING)).to(x.dtype)
    right = ((said == wanted).to(x.dtype) * there).sum(1) / there.sum(1).clamp(min=1)
    whole = (said == wanted).all(1)
    return torch.stack([torch.where(there.sum(1) > 0, right, 1.0), whole.to(x.dtype)], dim=1)
