"""The tensors of each kind of model: native torch names, shapes, and where each starts.

Source: names as ``torch.nn.LSTM``, ``GRU``, ``TransformerEncoder`` and torchvision's ResNet write them; He et
al., arXiv 1502.01852 (start of rectified layers); Glorot and Bengio, AISTATS 2010 (of others). Rules: numpy
only, no torch; from the model and the contract alone; the order is that of the module's parameters.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from common.contract import Contract, Events, Image, Series, Text
from common.contract.sequences import FIRST_CODE
from common.methods import (
    Autoencoder,
    Cnn,
    Cox,
    KernelSvm,
    LinearSvm,
    LogisticRegression,
    Mlp,
    Model,
    RandomForest,
    Recurrent,
    ResNet18,
    SequenceToSequence,
    SkipGram,
    Statistics,
    Transformer,
)
from common.tasks import forest, statistics
from common.tasks.fit import places, reads
from common.tasks.models.tensor import Tensor

GATES: Final = {"rnn": 1, "gru": 3, "lstm": 4}


def tensors_of(model: Model, contract: Contract) -> Iterator[Tensor]:
    """The tensors of a model for inputs of ``contract``, in the order of the flat vector."""
    outputs = contract.label.outputs
    if isinstance(model, LogisticRegression | LinearSvm):
        yield from _linear("", contract.width, outputs, start=0.0)
    elif isinstance(model, KernelSvm):
        yield from _linear("linear.", model.random_features, outputs, start=0.0)
    elif isinstance(model, Mlp):
        yield from _layers("", (contract.width, *model.hidden, outputs), model.activation)
    elif isinstance(model, Autoencoder):
        widths = contract.width, *model.hidden, model.code
        yield from _layers("encoder.", widths, model.activation)
        yield from _layers("decoder.", widths[::-1], model.activation)
    elif isinstance(model, Cox):
        yield Tensor("risk.weight", (1, contract.width))
        # The usual hazard of an interval is small; a start at 1/2 would cost the first rounds.
        yield Tensor("baseline.weight", (outputs, 1), constant=-2.0)
    elif isinstance(model, Cnn):
        yield from _cnn(model, contract, outputs)
    elif isinstance(model, ResNet18):
        yield from _resnet(model, contract, outputs)
    elif isinstance(model, Recurrent):
        own = reads(model, contract)
        inputs = 2 * len(own.main.channels) if isinstance(own.main, Series) else 0
        yield from _cell("rnn.", model.cell, inputs, model.hidden)
        yield from _linear("head.", model.hidden + own.rest_width, outputs)
    elif isinstance(model, SkipGram):
        terms = vocabulary(contract)
        yield Tensor("embedding.weight", (terms, model.width), half=1 / math.sqrt(model.width))
        yield from _linear("output.", model.width, terms)
    elif isinstance(model, SequenceToSequence):
        yield from _sequences(model, contract)
    elif isinstance(model, Transformer):
        yield from _transformer(model, contract, outputs)
    elif isinstance(model, RandomForest):
        yield Tensor("leaves", forest.shape(model, outputs), counts=True)
    elif isinstance(model, Statistics):
        yield Tensor("counts", (statistics.length(model, contract),), counts=True)


def vocabulary(contract: Contract, name: str = "") -> int:
    """How many tokens a feature can give (the first of tokens if none is named), padding included."""
    for feature in contract.features:
        if isinstance(feature, Events | Text) and feature.form == "tokens" and name in ("", feature.name):
            return FIRST_CODE + len(feature.vocabulary if isinstance(feature, Text) else feature.codes)
    raise KeyError(name)


def _linear(prefix: str, inputs: int, outputs: int, *, start: float | None = None) -> Iterator[Tensor]:
    half = math.sqrt(6 / (inputs + outputs)) if start is None else start
    yield Tensor(f"{prefix}weight", (outputs, inputs), half=half)
    yield Tensor(f"{prefix}bias", (outputs,))


def _layers(prefix: str, widths: tuple[int, ...], activation: str) -> Iterator[Tensor]:
    """An ``nn.Sequential`` of linear layers, activations between them: ``0.weight``, ``2.weight``..."""
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        rectified = activation != "tanh" and index < len(widths) - 2
        start = math.sqrt(6 / inputs) if rectified else None
        yield from _linear(f"{prefix}{2 * index}.", inputs, outputs, start=start)


def _conv(name: str, inputs: int, outputs: int, kernel: int, *, bias: bool) -> Iterator[Tensor]:
    half = math.sqrt(6 / (inputs * kernel**2))
    yield Tensor(f"{name}.weight", (outputs, inputs, kernel, kernel), half=half)
    if bias:
        yield Tensor(f"{name}.bias", (outputs,))


def _norm(name: str, width: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (width,), constant=1.0)
    yield Tensor(f"{name}.bias", (width,))


def _cnn(model: Cnn, contract: Contract, outputs: int) -> Iterator[Tensor]:
    own = reads(model, contract)
    image = own.main
    height, width = (image.height, image.width_px) if isinstance(image, Image) else (0, 0)
    for at, (inputs, channels) in enumerate(pairwise((1, *model.channels))):
        yield from _conv(f"features.{3 * at}", inputs, channels, model.kernel, bias=True)
        height, width = height // 2, width // 2
    yield from _linear("head.", model.channels[-1] * height * width + own.rest_width, outputs)


def _resnet(model: ResNet18, contract: Contract, outputs: int) -> Iterator[Tensor]:
    yield from _conv("conv1", 1, model.width, 7, bias=False)
    yield from _norm("bn1", model.width)
    inputs = model.width
    for stage in range(4):
        channels = model.width << stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            yield from _conv(f"{name}.conv1", inputs, channels, 3, bias=False)
            yield from _norm(f"{name}.bn1", channels)
            yield from _conv(f"{name}.conv2", channels, channels, 3, bias=False)
            yield from _norm(f"{name}.bn2", channels)
            if inputs != channels:
                yield from _conv(f"{name}.downsample.0", inputs, channels, 1, bias=False)
                yield from _norm(f"{name}.downsample.1", channels)
            inputs = channels
    yield from _linear("fc.", inputs + reads(model, contract).rest_width, outputs)


def _cell(prefix: str, cell: str, inputs: int, hidden: int) -> Iterator[Tensor]:
    half = 1 / math.sqrt(hidden)
    for name, width in (("ih", inputs), ("hh", hidden)):
        yield Tensor(f"{prefix}weight_{name}_l0", (GATES[cell] * hidden, width), half=half)
        yield Tensor(f"{prefix}bias_{name}_l0", (GATES[cell] * hidden,))


def _sequences(model: SequenceToSequence, contract: Contract) -> Iterator[Tensor]:
    width = model.hidden
    for side, name in (("source", model.source), ("target", model.target)):
        terms = vocabulary(contract, name)
        # A target begins with a token of its own and ends with padding.
        yield Tensor(f"{side}.weight", (terms + (side == "target"), width), half=1 / math.sqrt(width))
    yield from _cell("encoder.", "gru", width, width)
    yield from _cell("decoder.", "gru", width, width)
    yield from _linear("combine.", 2 * width, width)
    yield from _linear("output.", width, vocabulary(contract, model.target))


def _transformer(model: Transformer, contract: Contract, outputs: int) -> Iterator[Tensor]:
    d, own = model.width, reads(model, contract)
    yield Tensor("embedding.weight", (vocabulary(contract), d), half=1 / math.sqrt(d))
    if own.times:
        yield from _linear("time.", 1, d)
    for at in range(model.layers):
        name = f"encoder.layers.{at}."
        yield Tensor(f"{name}self_attn.in_proj_weight", (3 * d, d), half=math.sqrt(6 / (4 * d)))
        yield Tensor(f"{name}self_attn.in_proj_bias", (3 * d,))
        yield from _linear(f"{name}self_attn.out_proj.", d, d)
        yield from _linear(f"{name}linear1.", d, model.feedforward)
        yield from _linear(f"{name}linear2.", model.feedforward, d)
        yield from _norm(f"{name}norm1", d)
        yield from _norm(f"{name}norm2", d)
    yield from _norm("encoder.norm", d)
    yield from _linear("head.", d + own.rest_width, outputs)


def target_places(model: SequenceToSequence, contract: Contract) -> tuple[slice, slice]:
    """Where the source's and the target's tokens are in an encoded row."""
    where = places(contract)
    return slice(*where[model.source]), slice(*where[model.target])
