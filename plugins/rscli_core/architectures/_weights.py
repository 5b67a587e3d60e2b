"""Initial weights of the CIFAR networks."""

from __future__ import annotations

from torch import nn


def he_fan_out(network: nn.Module) -> None:
    """Draws every convolution's weights from N(0, 2 / (height * width * out_channels)), with torch's global generator.

    He et al. 2015, "Delving Deep into Rectifiers", section 2.2, the backward form (equation 14). The other layers keep what
    torch gave them; batch normalisation starts at scale 1 and shift 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
