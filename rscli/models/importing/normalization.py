"""The normalisation in front of an imported network: found in the file, chosen by the user, or assumed.

In the field's code it is a layer whose constants are not saved: all that tells of it is the prefix `1.` of the tensors.
MACER's code normalises nothing. Other code saves the constants, under names such as `mean` and `std`: then these hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rscli.api import DataSpec
from rscli.errors import InputError
from rscli.models.importing.foreign import Checkpoint
from rscli.models.importing.keys import Fit

NORMALIZATIONS = ("auto", "dataset", "none")
"""What a user can ask for."""

MEANS = frozenset({"mean", "means", "mu", "new_mean"})
STDS = frozenset({"std", "stds", "sds", "sigma", "new_std"})
"""What a normalisation layer calls its constants, where it saves them."""

Constants = tuple[tuple[float, ...], tuple[float, ...]]
"""The mean and the std, per channel, as a file holds them."""


@dataclass(frozen=True)
class Normalization:
    """The constants per channel (None: no normalisation), and how they became known; `sure` unless they were guessed."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    reason: str
    sure: bool = True

    def __str__(self) -> str:
        shown = "none" if self.mean is None else f"mean {_numbers(self.mean)}, std {_numbers(self.std or ())}"
        return f"normalisation: {shown} ({self.reason})"


def take_constants(fit: Fit, checkpoint: Checkpoint, prefix: str = "") -> tuple[Fit, Constants | None]:
    """The mean and std of a normalisation layer among the extra tensors, and what is left without them.

    They may also be `outside` of the wanted `prefix`, in a layer beside the network that this names. Several layers are as
    good as one if they hold the same numbers. Raises `InputError` if they cannot be those of images in [0, 1].
    """
    pool = {**_beside(checkpoint, prefix), **fit.extra}
    means, stds = ([n for n in pool if n.rpartition(".")[2] in kind] for kind in (MEANS, STDS))
    found = [{tuple(pool[name].flatten().tolist()) for name in names} for names in (means, stds)]
    if any(len(different) != 1 for different in found):
        return fit, None
    mean, std, values = means[0], stds[0], (found[0].pop(), found[1].pop())
    if not (all(0 <= m <= 1 for m in values[0]) and all(1e-6 <= s <= 1e6 for s in values[1])):
        raise InputError(
            f"the file normalises with {mean} = {_numbers(values[0])} and {std} = {_numbers(values[1])}",
            "Here pixels are in [0, 1] before any normalisation, so a mean must be in [0, 1] and a std above 0 (1e-6 or more).",
        )
    extra = {name: tensor for name, tensor in fit.extra.items() if name not in (*means, *stds)}
    return replace(fit, extra=extra), values


def _holder(name: str) -> str:
    """What holds the layer of a tensor: `module.` of `module.normalizer.mean`."""
    return ".".join([*name.split(".")[:-2], ""]) if name.count(".") > 1 else ""


def _beside(checkpoint: Checkpoint, prefix: str) -> dict[str, torch.Tensor]:
    """The constants outside of `prefix` that are nearest to the network it names: under the longest part of it."""
    around = {name: _holder(name) for name in checkpoint.outside if name.rpartition(".")[2] in MEANS | STDS}
    nearest = max((holder for holder in around.values() if prefix.startswith(holder)), key=len, default=None)
    return {name: checkpoint.outside[name] for name, holder in around.items() if holder == nearest}


def choose_normalization(
    wanted: str, constants: Constants | None, spec: DataSpec, checkpoint: Checkpoint, prefix: str
) -> Normalization:
    """The normalisation in front of the network: what the file holds, or else what is `wanted` (`auto`, `dataset`, `none`).

    Raises `InputError` if the file's `constants` have the wrong number of channels, or are not what is wanted.
    """
    if constants is not None:
        return _from_file(wanted, constants, spec, checkpoint.path)
    if wanted == "none":
        return Normalization(None, None, "as --normalization none says")
    if spec.mean is None:
        return Normalization(None, None, "the data set has none")
    if wanted == "dataset":
        return Normalization(spec.mean, spec.std, "the data set's, as --normalization dataset says")
    if "1" in prefix.split("."):
        reason = f"assumed to be the data set's: in the file the network is behind another layer, under {prefix!r}"
        return Normalization(spec.mean, spec.std, reason)
    if checkpoint.key == "net" and not prefix:
        reason = "assumed, since the file has the format of MACER's code; --normalization dataset otherwise"
        return Normalization(None, None, reason, sure=False)
    reason = "the data set's, assumed, since the file does not say; --normalization none if it was trained without"
    return Normalization(spec.mean, spec.std, reason, sure=False)


def _from_file(wanted: str, constants: Constants, spec: DataSpec, path: Path) -> Normalization:
    channels = spec.shape[0]
    mean, std = (values * channels if len(values) == 1 else values for values in constants)
    if not len(mean) == len(std) == channels:
        raise InputError(f"{path} normalises {len(mean)} channels, but the images of the data set have {channels}")
    same = spec.mean is not None and spec.std is not None and _close(mean, spec.mean) and _close(std, spec.std)
    if wanted == "none" or (wanted == "dataset" and not same):
        raise InputError(
            f"--normalization is {wanted}, but {path} holds another: mean {_numbers(mean)}, std {_numbers(std)}",
            "Leave the option out to use what the file holds.",
        )
    if same:
        return Normalization(spec.mean, spec.std, "in the file, and the data set's")
    theirs = "none" if spec.mean is None else f"mean {_numbers(spec.mean)}, std {_numbers(spec.std or ())}"
    return Normalization(mean, std, f"in the file; the data set's would be {theirs}", sure=False)


def _close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether the numbers are the same ones in float32, as files hold them."""
    return torch.equal(torch.tensor(a), torch.tensor(b))


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
