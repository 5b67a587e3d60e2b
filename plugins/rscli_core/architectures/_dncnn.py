"""The network of DnCNN."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """x - R(x) for images x (batch, channel, height, width). The paper's initial weights: He et al. 2015."""

    def __init__(self, channels: int, depth: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.dncnn = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1, bias=False))
        for layer in self.dncnn:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """The denoised images (batch, channel, height, width), not clipped."""
        residual: Tensor = self.dncnn(images)
        return images - residual
