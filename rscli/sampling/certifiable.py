"""Whether a network can be certified at all: a trial of a few forwards, before any certificate.

A certificate is a statement about one function of an image, whose votes are counted over independent noise. In eval mode, a
network must therefore answer for each image from that image alone, and always the same. What does not: batch normalisation
without running statistics, dropout that ignores eval mode, dynamic quantisation (its scale is that of the whole batch).

A trial shows that something is wrong, and never proves that nothing is: it sees two images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from rscli.errors import InputError
from rscli.runtime.devices import precision_scope

HINT = (
    "In eval mode a network must compute each image's logits from that image alone, always the same. Usual causes: batch "
    "normalisation without running statistics, dropout that ignores eval mode, dynamic quantisation."
)


def check_certifiable(network: nn.Module, shape: tuple[int, int, int], device: torch.device) -> None:
    """Raises `InputError` if `why_not_certifiable` finds a reason."""
    if (why := why_not_certifiable(network, shape, device)) is not None:
        raise InputError(f"this network cannot be certified: {why}", HINT)


def why_not_certifiable(network: nn.Module, shape: tuple[int, int, int], device: torch.device) -> str | None:
    """Why no certificate of `network`, on `device`, would hold; None if a trial finds no reason.

    Two images of uniform noise, `shape` (channel, height, width), are classified together, twice; each beside itself; and each
    alone, where the network takes a single image. All must give the same logits, up to rounding: up to the square root of the
    type's machine epsilon (3e-4 in float32), relative to the largest logit. Sums in another order differ by a few
    epsilons a layer, far below it; what depends on random numbers or on other images differs by far more than it.

    Modes are restored. A network that fails here is not judged: who uses it will see its own error.
    """
    random = torch.Generator().manual_seed(0)
    pair = torch.rand(2, *shape, generator=random).to(device)
    with suppress(Exception), torch.inference_mode(), precision_scope("fp32", device), _in_eval_mode(network):
        first, again = network(pair), network(pair)
        if not torch.isfinite(first).all():
            return None
        limit = _epsilon(network, first) ** 0.5 * float(first.abs().max())
        if (apart := _apart(first, again)) > limit:
            return f"it answers the same images differently from one time to the next ({_said(apart, first)})"
        apart = max(_without_the_other(network, pair[place], first[place]) for place in range(2))
        if apart > limit:
            return f"its answer for an image depends on the other images in the batch ({_said(apart, first)})"
    return None


def _without_the_other(network: nn.Module, image: Tensor, logits: Tensor) -> float:
    """How far the `logits` of an image beside another are from those beside itself, and alone.

    Alone only where the network takes a single image: some have one batch size.
    """
    apart = _apart(network(torch.stack((image, image))), torch.stack((logits, logits)))
    with suppress(Exception):
        apart = max(apart, _apart(network(image[None]), logits[None]))
    return apart


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of two logits; infinite if one is no number."""
    return float((one.cpu().double() - other.cpu().double()).abs().nan_to_num(torch.inf).max())


def _said(apart: float, logits: Tensor) -> str:
    return f"logits differ by {apart:.2g}, where the largest is {float(logits.abs().max()):.2g}"


def _epsilon(network: nn.Module, logits: Tensor) -> float:
    """The machine epsilon of the coarsest type in which the network holds or gives numbers."""
    types = {tensor.dtype for tensor in (logits, *network.parameters()) if tensor.is_floating_point()}
    return max(torch.finfo(each).eps for each in types)


@contextmanager
def _in_eval_mode(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
