"""The layers of the CIFAR residual networks; the parameters have the names of Cohen et al.'s code."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from rscli_core.architectures._weights import he_fan_out


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with batch normalisation, and a shortcut around them.

    (batch, inputs, height, width) to (batch, outputs, ceil(height / stride), ceil(width / stride)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride), rounded up."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu_(self.bn1(self.conv1(x)))
        # In place, because the gradient of batch normalisation needs its input, never its output.
        return F.relu_(self.bn2(self.conv2(x)).add_(shortcut))


class Network(nn.Module):
    """Images (batch, channels, height, width) to logits (batch, classes); three stages of `blocks` blocks each."""

    def __init__(self, classes: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.fc = nn.Linear(64, classes)
        he_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        """The logits (batch, classes) of images `x` (batch, channels, height, width)."""
        x = F.relu_(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    """`blocks` blocks, of which the first changes the number of channels and the size."""
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
