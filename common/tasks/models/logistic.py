"""Multinomial logistic regression: one linear layer whose outputs go into a softmax.

Source: McCullagh and Nelder, "Generalized Linear Models", ch. 5; ``torch.nn.Linear`` for the parameter names.
Rules: the module is a plain ``nn.Linear``, not a subclass: Opacus finds its per-sample gradient by the exact
type, and its fallback for other types fails on an empty batch; float64, because clipping promises float64;
one row of weights for each class, also for two classes, so that one loss serves all labels; no torch
generator is touched, so no seed reaches training.
"""

import torch
from torch import nn

from common.contract import Contract


def build(contract: Contract) -> nn.Module:
    """A new module from inputs [n, width] to logits [n, classes], float64, all parameters zero.

    Parameters ``weight`` [classes, width] and ``bias`` [classes]: those of ``layout`` in that order.

    Guarantee: building_draws_no_random_numbers - torch's global generator is left as it was.
    """
    # On the meta device the usual random start costs nothing and touches no generator.
    empty = nn.Linear(contract.width, len(contract.label.classes), device="meta", dtype=torch.float64)
    module = empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module
