"""Models: which tensors each has, how each is built, where each starts.

Source: He et al., arXiv 1502.01852 (start of rectified layers); Glorot and Bengio, AISTATS 2010 (of others).
Rules: torch is imported only when a module is built, so that the hub, the command line and an auditor can
size, start and check a study without it; a start is a public function of the manifest alone.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.contract import Contract
from common.encoding import digest
from common.methods import Model
from common.secagg.masks import apply_keystreams
from common.study import Manifest
from common.tasks.models.layout import layout, state_layout

if TYPE_CHECKING:
    from torch import nn

_BLOCK_WORDS = 1 << 16


def build(model: Model, contract: Contract) -> "nn.Module":
    """A new float64 module for ``model`` on inputs of ``contract``, its parameters those of ``layout``.

    Guarantee: modules_match_their_layout - names, order and shapes are those of ``layout``.
    """
    from common.tasks.models import modules

    return modules.build(model, contract)


def initial_state(manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """The public state before round 1, a function of the manifest alone.

    Zeros for a linear model: its loss is convex, so that a random start would only add a seed. Elsewhere
    weights are uniform in [-a, a]: with w the 32-bit little-endian words of the AES-256-CTR keystream (zero
    initial block) of the key H("initial", man, tensor name), each is a (2 floor(w / 2^8) + 1 - 2^24) / 2^24.
    a, or the constant of a bias or a norm, is the ``Tensor``'s: in an MLP sqrt(6 / inputs) in front of a relu
    or gelu, otherwise sqrt(6 / (inputs + outputs)).

    Guarantee: starts_are_reproducible - the same manifest gives the same bits, another manifest others.
    Guarantee: starts_are_within_their_norm - at most ``initial_norm``.
    """
    study = manifest.study
    state: dict[str, NDArray[np.float32]] = {}
    for tensor in state_layout(study):
        half_width = tensor.half
        words = np.zeros(tensor.size, dtype="<u4")
        if half_width:
            apply_keystreams(words, [digest("initial", manifest.digest, tensor.name.encode())])
        # Each word makes way for its number, in its own memory.
        values = words.view("<f4")
        for at in range(0, tensor.size if half_width else 0, _BLOCK_WORDS):
            odd = 2.0 * (words[at : at + _BLOCK_WORDS] >> 8) + (1 - 2**24)
            values[at : at + _BLOCK_WORDS] = half_width * 2.0**-24 * odd
        if tensor.constant:
            values[:] = tensor.constant
        state[tensor.name] = values.reshape(tensor.shape)
    return state


def initial_norm(model: Model, contract: Contract) -> float:
    """An upper bound of the L2 norm of ``initial_state``, from the shapes alone."""
    tensors = layout(model, contract)
    return math.sqrt(sum(tensor.size * max(tensor.half, abs(tensor.constant)) ** 2 for tensor in tensors))
