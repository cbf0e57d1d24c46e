"""The torch modules of the models, all parameters zero: their values come from the state, never from here.

Source: McCullagh and Nelder, "Generalized Linear Models", ch. 5; Crammer and Singer, JMLR 2 (2001); Prentice
and Gloeckler, Biometrics 34 (1978); ``torch.nn`` for parameter names. Rules: plain torch layers, not
subclasses: Opacus finds its per-sample gradient by the exact type, and its fallback for other types fails on
an empty batch; float64, because clipping promises float64; no torch generator is touched; each row alone.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from common.contract import Contract
from common.contract.labels import AMOUNT_STEPS
from common.methods import Autoencoder, Cox, KernelSvm, Mlp, Model, SequenceToSequence, SkipGram
from common.tasks.models.images import Cnn2d, ResNet
from common.tasks.models.projection import projection
from common.tasks.models.sequences import (
    Encoder,
    Recurrence,
    SkipGrams,
    Translator,
    skip_gram_losses,
    translation_losses,
)
from common.tasks.models.shapes import target_places

Losses: TypeAlias = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""The loss of each row, [n], of a module on inputs [n, width] and labels [n]."""

ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}

# torch writes the weights of its own cells and attention without a dot, as no layer of theirs has them.
_NATIVE: Final = (
    (re.compile(r"\.(ih|hh)\.(weight|bias)$"), r".\2_\1_l0"),
    (re.compile(r"\.in_proj\.(weight|bias)$"), r".in_proj_\1"),
)


def build(model: Model, contract: Contract) -> nn.Module:
    """A new module from inputs [n, width] to outputs, float64; ``named`` gives its parameters by layout.

    Guarantee: building_draws_no_random_numbers - torch's global generator is left as it was.
    """
    with torch.device("meta"):
        # On the meta device the usual random start costs nothing and touches no generator.
        empty = _built(model, contract)
    module = empty.to_empty(device="cpu").double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters by the names that torch's own modules give them, in order."""
    return {native(name): parameter for name, parameter in module.named_parameters()}


def native(name: str) -> str:
    """The name that torch gives a parameter of ours."""
    for pattern, form in _NATIVE:
        name = pattern.sub(form, name)
    return name


def load(module: nn.Module, state: Mapping[str, NDArray[np.floating[Any]]]) -> nn.Module:
    """The module at a state of its layout."""
    with torch.no_grad():
        for name, parameter in named(module).items():
            parameter.copy_(torch.tensor(state[name]))
    return module


def losses(model: Model, contract: Contract) -> Losses:
    """What a model of this kind is trained by.

    Classes: cross-entropy, or the hinge of an SVM. An amount: half the squared error. Time to event: minus
    the logarithm of the likelihood of a discrete hazard. Autoencoder: half the squared error of what comes
    back. Sequences: the mean cross-entropy of their tokens.
    """
    if isinstance(model, Autoencoder):
        return _reconstruction
    if isinstance(model, SkipGram):
        return partial(skip_gram_losses, window=model.window)
    if isinstance(model, SequenceToSequence):
        return partial(translation_losses, target_at=target_places(model, contract)[1])
    if contract.label.kind == "number":
        return _squared
    if contract.label.kind == "time_to_event":
        return _hazards
    return _hinge if model.kind.endswith("svm") else _cross_entropy


class Kernel(nn.Module):
    """Random Fourier features, public and fixed, then one linear layer."""

    def __init__(self, model: KernelSvm, contract: Contract) -> None:
        super().__init__()
        directions, phases = projection(model, contract)
        # No buffers: what is public and fixed is not part of the state.
        self._directions, self._phases = directions, phases
        self.linear = nn.Linear(model.random_features, contract.label.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, width] to [n, classes]."""
        directions = torch.from_numpy(self._directions).to(x.dtype)
        angles = x @ directions + torch.from_numpy(self._phases).to(x.dtype)
        scores: torch.Tensor = self.linear(torch.cos(angles) * (2 / len(self._phases)) ** 0.5)
        return scores


class Autocoder(nn.Module):
    """``encoder`` to the code, ``decoder`` back to the row."""

    def __init__(self, model: Autoencoder, contract: Contract) -> None:
        super().__init__()
        widths = contract.width, *model.hidden, model.code
        self.encoder = _layers(widths, model.activation)
        self.decoder = _layers(widths[::-1], model.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, width] to [n, width]."""
        back: torch.Tensor = self.decoder(self.encoder(x))
        return back


class Hazards(nn.Module):
    """The complementary log-log hazard of each interval: a risk a row plus a baseline an interval."""

    def __init__(self, contract: Contract) -> None:
        super().__init__()
        self.risk = nn.Linear(contract.width, 1, bias=False)
        self.baseline = nn.Linear(1, contract.label.outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, width] to [n, intervals]."""
        # A baseline by a layer of its own, on ones: its clipping rule is that of any layer.
        hazards: torch.Tensor = self.risk(x) + self.baseline(torch.ones_like(x[:, :1]))
        return hazards


def _built(model: Model, contract: Contract) -> nn.Module:
    outputs = contract.label.outputs
    if isinstance(model, Mlp):
        return _layers((contract.width, *model.hidden, outputs), model.activation)
    if isinstance(model, KernelSvm):
        return Kernel(model, contract)
    if isinstance(model, Autoencoder):
        return Autocoder(model, contract)
    if isinstance(model, Cox):
        return Hazards(contract)
    others: dict[str, Callable[[Any, Contract], nn.Module]] = {
        "cnn": Cnn2d,
        "resnet18": ResNet,
        "recurrent": Recurrence,
        "transformer": Encoder,
        "skip_gram": SkipGrams,
        "sequence_to_sequence": Translator,
    }
    if model.kind in others:
        return others[model.kind](model, contract)
    return nn.Linear(contract.width, outputs)


def _layers(widths: tuple[int, ...], activation: str) -> nn.Sequential:
    layers = [(nn.Linear(*ends), ACTIVATIONS[activation]()) for ends in pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in layer][:-1])


def _cross_entropy(module: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(module(x), y, reduction="none")


def _hinge(module: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    scores: torch.Tensor = module(x)
    own = scores.gather(1, y[:, None])
    others = scores.scatter(1, y[:, None], -torch.inf)
    return functional.relu(1 + others.amax(1) - own[:, 0])


def _squared(module: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    given: torch.Tensor = module(x)
    return 0.5 * (given[:, 0] - amounts(y, x.dtype)).square()


def amounts(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Labels of an amount as scaled values in [-1, 1]."""
    return (2 * y.double() / AMOUNT_STEPS - 1).to(dtype)


def _hazards(module: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logs: torch.Tensor = module(x)
    interval, event = y // 2, (y % 2).to(logs.dtype)
    at = torch.arange(logs.shape[1])
    # log(1 - h) = -exp(eta), and log(h) = log(1 - exp(-exp(eta))); the cap keeps both finite.
    rates = logs.clamp(-30.0, 5.0).exp()
    survived = (at < interval[:, None]) | ((at == interval[:, None]) & (event == 0)[:, None])
    here = rates.gather(1, interval[:, None])[:, 0]
    return (rates * survived).sum(1) - event * torch.log(-torch.expm1(-here))


def _reconstruction(module: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    back: torch.Tensor = module(x)
    return 0.5 * (back - x).square().sum(1)
