"""The layers of LeNet; the parameters have the names of the published consistency code."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def _pooled(side: int) -> int:
    """Pixels left of `side` after two rounds of a 5x5 convolution without padding and 2x2 pooling."""
    return ((side - 4) // 2 - 4) // 2


class Network(nn.Module):
    """Images (batch, *input_shape) to logits (batch, classes)."""

    def __init__(self, classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * _pooled(height) * _pooled(width), 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits (batch, classes) of images `x` (batch, *input_shape)."""
        # ReLU commutes with max pooling, in value and in gradient; behind the pooling it has a quarter of the pixels.
        x = F.relu_(F.max_pool2d(self.conv1(x), 2))
        x = F.relu_(F.max_pool2d(self.conv2(x), 2))
        x = F.relu_(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits
