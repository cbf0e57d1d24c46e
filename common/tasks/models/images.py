"""Models of images: a plain convolutional network, and ResNet-18 with GroupNorm.

Source: LeCun et al., Proc. IEEE 86 (1998); He et al., arXiv 1512.03385; Wu and He, arXiv 1803.08494;
torchvision's ``resnet18`` for names. Rules: as ``modules``; GroupNorm, because BatchNorm mixes patients.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from common.contract import Contract, Image
from common.methods import Cnn, ResNet18
from common.tasks.fit import Reads, reads

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def split(x: torch.Tensor, own: Reads) -> tuple[torch.Tensor, torch.Tensor]:
    """The coordinates of the model's own feature, and the plain ones [n, rest]."""
    rest = [x[:, start:stop] for start, stop in own.rest]
    return x[:, own.start : own.stop], torch.cat(rest, 1) if rest else x[:, :0]


def _pixels(x: torch.Tensor, own: Reads) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, rest = split(x, own)
    image = own.main
    height, width = (image.height, image.width_px) if isinstance(image, Image) else (0, 0)
    return pixels.reshape(len(x), 1, height, width), rest


class Cnn2d(nn.Module):
    """``features``: convolution, activation, mean over 2 by 2, for each of the channels; ``head``."""

    def __init__(self, model: Cnn, contract: Contract) -> None:
        super().__init__()
        self._reads = reads(model, contract)
        image = self._reads.main
        height, width = (image.height, image.width_px) if isinstance(image, Image) else (0, 0)
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise((1, *model.channels)):
            convolution = nn.Conv2d(inputs, outputs, model.kernel, padding=model.kernel // 2)
            parts += [convolution, _ACTIVATIONS[model.activation](), nn.AvgPool2d(2)]
            height, width = height // 2, width // 2
        self.features = nn.Sequential(*parts)
        flat = model.channels[-1] * height * width
        self.head = nn.Linear(flat + self._reads.rest_width, contract.label.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, width] to [n, outputs]."""
        pixels, rest = _pixels(x, self._reads)
        found: torch.Tensor = self.head(torch.cat([self.features(pixels).flatten(1), rest], 1))
        return found


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.GroupNorm(groups, outputs)
        self.downsample: nn.Sequential | None = None
        if inputs != outputs:
            narrow = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(narrow, nn.GroupNorm(groups, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = functional.relu(self.bn1(self.conv1(x)))
        around = x if self.downsample is None else self.downsample(x)
        return functional.relu(self.bn2(self.conv2(found)) + around)


class ResNet(nn.Module):
    """torchvision's ResNet-18 for one channel, its norms GroupNorm."""

    def __init__(self, model: ResNet18, contract: Contract) -> None:
        super().__init__()
        self._reads = reads(model, contract)
        width = model.width
        self.conv1 = nn.Conv2d(1, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.GroupNorm(model.groups, width)
        inputs, stages = width, []
        for stage in range(4):
            outputs = width << stage
            stages.append(
                nn.Sequential(_Block(inputs, outputs, model.groups), _Block(outputs, outputs, model.groups))
            )
            inputs = outputs
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(inputs + self._reads.rest_width, contract.label.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, width] to [n, outputs]."""
        pixels, rest = _pixels(x, self._reads)
        found: Any = functional.relu(self.bn1(self.conv1(pixels)))
        found = functional.max_pool2d(found, 3, 2, padding=1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            found = layer(found)
        result: torch.Tensor = self.fc(torch.cat([found.mean((2, 3)), rest], 1))
        return result
