"""Models: which tensors each has, how each is built, where each starts.

Rules: torch is imported only when a module is built, so that the hub, the command line and an auditor can
size, start and check a study without it. A model's name in a manifest is looked up here and nowhere else.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.contract import Contract
from common.study import Manifest, Model
from common.tasks.models.layout import layout

if TYPE_CHECKING:
    from torch import nn


def build(model: Model, contract: Contract) -> "nn.Module":
    """A new float64 module for ``model`` on inputs of ``contract``, its parameters those of ``layout``.

    Guarantee: modules_match_their_layout - names, order and shapes are those of ``layout``.
    """
    match model.kind:
        case "logistic_regression":
            from common.tasks.models import logistic

            return logistic.build(contract)


def initial_state(manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """The public state before round 1, a function of the manifest alone.

    Zeros for logistic regression: its loss is convex, so that a random start would only add a seed.
    """
    study = manifest.study
    match study.model.kind:
        case "logistic_regression":
            tensors = layout(study.model, study.contract)
            return {tensor.name: np.zeros(tensor.shape, dtype=np.float32) for tensor in tensors}
