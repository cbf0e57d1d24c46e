"""The torch modules of the models, all parameters zero: their values come from the state, never from here.

Source: McCullagh and Nelder, "Generalized Linear Models", ch. 5 (multinomial logistic regression: one linear
layer whose outputs go into a softmax); ``torch.nn.Linear`` and ``nn.Sequential`` for the parameter names.
Rules: plain ``nn.Linear``, not a subclass: Opacus finds its per-sample gradient by the exact type, and its
fallback for other types fails on an empty batch; float64, because clipping promises float64; no torch
generator is touched, so no seed reaches training.
"""

from itertools import pairwise
from typing import Final

import torch
from torch import nn

from common.contract import Contract
from common.study import Model

ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def build(model: Model, contract: Contract) -> nn.Module:
    """A new module from inputs [n, width] to logits [n, classes], float64, parameters those of ``layout``.

    Guarantee: building_draws_no_random_numbers - torch's global generator is left as it was.
    """
    if model.kind == "mlp":
        widths = (contract.width, *model.hidden, len(contract.label.classes))
        layers = [(_linear(*ends), ACTIVATIONS[model.activation]()) for ends in pairwise(widths)]
        empty: nn.Module = nn.Sequential(*[part for layer in layers for part in layer][:-1])
    else:
        empty = _linear(contract.width, len(contract.label.classes))
    module = empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def _linear(inputs: int, outputs: int) -> nn.Linear:
    # On the meta device the usual random start costs nothing and touches no generator.
    return nn.Linear(inputs, outputs, device="meta", dtype=torch.float64)
