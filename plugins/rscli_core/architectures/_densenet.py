"""The layers of the CIFAR densely connected networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rscli_core.architectures._weights import he_fan_out


class Bottleneck(nn.Module):
    """Adds `growth` channels to its `inputs`, by a 1x1 and a 3x3 convolution behind batch normalisation and ReLU each."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` (batch, inputs, height, width), and `growth` further channels behind them."""
        added = self.conv1(F.relu_(self.bn1(x)))
        added = self.conv2(F.relu_(self.bn2(added)))
        return torch.cat((x, added), 1)


class Network(nn.Module):
    """Images (batch, channels, height, width) to logits (batch, classes); three blocks of `layers` bottleneck layers each."""

    def __init__(self, classes: int, channels: int, layers: int, growth: int) -> None:
        super().__init__()
        widths = [growth * (2 + block * layers) for block in range(4)]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.dense1 = _block(widths[0], layers, growth)
        self.dense2 = _block(widths[1], layers, growth)
        self.dense3 = _block(widths[2], layers, growth)
        self.bn = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        he_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The logits (batch, classes) of images `x` (batch, channels, height, width)."""
        x = F.avg_pool2d(self.dense1(self.conv1(x)), 2)
        x = F.avg_pool2d(self.dense2(x), 2)
        x = F.relu_(self.bn(self.dense3(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _block(inputs: int, layers: int, growth: int) -> nn.Sequential:
    return nn.Sequential(*(Bottleneck(inputs + layer * growth, growth) for layer in range(layers)))
