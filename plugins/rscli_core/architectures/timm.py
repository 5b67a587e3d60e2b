"""Every model of timm."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from rscli.api import Architecture, DataSpec, unit
from rscli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

RESERVED = frozenset({"model_name", "pretrained", "num_classes", "in_chans", "checkpoint_path"})
"""Arguments of `timm.create_model` that are not for `kwargs`: rscli sets them itself, or has another way."""

LARGEST = 1_000_000
"""A number among the keyword arguments, at most: some models make a list of that length."""

RESERVED_HINT = "classes and channels are the data set's, pretrained is a field, and `rscli import` reads checkpoints"

RATES = ("drop_rate", "drop_path_rate")
"""Fields that are keyword arguments of the model, where they are given."""

SIZES = (16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
"""Sizes that are tried on paper for a model that does not take that of the images."""


class TimmModel(Architecture):
    """Any model of timm, with its keyword arguments: timm/resnet50, timm/vit_tiny_patch16_224, ...

    A model that is built for one image size (a vision transformer, say) is built for the size of the images, or for
    `input_size`. Channels and classes are those of the data.
    """

    variant: ClassVar[str | None] = "model"
    field_names: ClassVar = {"resnet50": {"model": "resnet50"}}

    model: str = Field(min_length=1, description="a name from timm.list_models(), with or without a tag of weights")
    pretrained: bool = Field(False, description="start from timm's weights, downloaded if they are not there")
    input_size: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="height and width to which the network itself resizes noisy images; none: as they are",
        json_schema_extra=unit("pixels"),
    )
    drop_rate: float | None = Field(None, ge=0, lt=1, description="dropout before the last layer; none: the model's own")
    drop_path_rate: float | None = Field(None, ge=0, lt=1, description="stochastic depth; none: the model's own")
    grad_checkpointing: bool = Field(
        False, description="run layers again in the backward instead of keeping what they computed: less memory, more time"
    )
    kwargs: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict, description="more keyword arguments for the model, such as img_size or global_pool"
    )

    @field_validator("kwargs")
    @classmethod
    def _not_reserved(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED & kwargs.keys()):
            raise ValueError(f"kwargs must not set {', '.join(taken)}; rscli does: {RESERVED_HINT}")
        if large := [name for name, value in kwargs.items() if isinstance(value, int | float) and abs(value) > LARGEST]:
            raise ValueError(f"kwargs must be numbers of at most {LARGEST:,}: {', '.join(large)}")
        return kwargs

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if twice := [name for name in RATES if getattr(self, name) is not None and name in self.kwargs]:
            raise ValueError(f"{' and '.join(twice)} is given as a field and in kwargs; leave one out")
        return self

    @classmethod
    def offers(cls, name: str) -> bool:
        """Whether timm has a model called `name`; imports timm."""
        import timm

        return bool(timm.is_model(name))

    def normalization(self, spec: DataSpec) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The mean and std that timm's weights were trained with; for grey images their means over the colours, as in timm."""
        import timm

        found = timm.get_pretrained_cfg(self.model) if self.pretrained else None
        if found is None:
            return None
        values: list[tuple[float, ...]] = [tuple(found.mean), tuple(found.std)]
        mean, std = ((sum(each) / len(each),) if spec.shape[0] == 1 else each for each in values)
        return mean, std

    def build(self, spec: DataSpec, *, weights: bool = True) -> nn.Module:
        """A network for images `spec.shape` (channel, height, width), which has taken one such image on trial.

        Raises `InputError` if timm does not know the model, if its weights are unavailable, or if the model refuses its keyword
        arguments or the images.
        """
        import timm

        if not timm.is_model(self.model):
            raise _unknown(self.model, timm.list_models())
        pretrained = self.pretrained and weights
        if pretrained:
            self._check_weights(spec)
        try:
            return self._create(pretrained, spec)
        except InputError:
            raise
        except Exception as cause:  # timm's models refuse arguments and images with exceptions of any type
            if pretrained and self._builds_without_weights(spec):
                raise _no_weights(self.model, cause) from cause
            raise self._refused(spec, cause) from cause

    def _check_weights(self, spec: DataSpec) -> None:
        """Raises `InputError`, at once, if the weights cannot be fetched; what else is wrong with the model is said first."""
        import timm

        from rscli_core.architectures._hub import no_network

        if timm.is_model_pretrained(self.model) and (why := no_network(self.model)) is not None:
            self.build(spec, weights=False)
            raise _unreachable(self.model, why)

    def _create(self, pretrained: bool, spec: DataSpec) -> nn.Module:
        import timm

        from rscli_core.architectures._checkpointing import count_once
        from rscli_core.architectures._resize import Resized

        classes, channels = len(spec.class_names), spec.shape[0]
        network: nn.Module = timm.create_model(
            self.model, pretrained, num_classes=classes, in_chans=channels, **self._arguments(spec)
        )
        if self.input_size is not None:
            network.register_forward_pre_hook(Resized(self.input_size))
        if self.grad_checkpointing:
            _checkpointed(network, self.model)
            count_once(network)
        _try_forward(network, classes, spec.shape)
        return network

    def _builds_without_weights(self, spec: DataSpec) -> bool:
        try:
            self._create(False, spec)
        except Exception:
            return False
        return True

    def _arguments(self, spec: DataSpec) -> dict[str, Any]:
        """The keyword arguments, with the image size for a model that is built for one; a size given by the user stays."""
        import timm

        fixed = timm.get_pretrained_cfg_value(self.model, "fixed_input_size")
        size = spec.shape[1:] if self.input_size is None else (self.input_size, self.input_size)
        rates = {name: value for name in RATES if (value := getattr(self, name)) is not None}
        return {**({"img_size": size} if fixed else {}), **rates, **self.kwargs}

    def _refused(self, spec: DataSpec, cause: Exception) -> InputError:
        """What the model refuses: a rate that it does not know, the size of the images, or something else."""
        said = f"{type(cause).__name__}: {cause}".strip().removesuffix(":")
        for name in RATES:
            if getattr(self, name) is not None and f"unexpected keyword argument '{name}'" in str(cause):
                return InputError(f"timm's {self.model!r} has no {name}", f"Leave out arch.{name}.")
        channels, height, width = spec.shape
        side = self.input_size or max(height, width)
        if (takes := self._size_that_fits(spec, side)) is not None:
            own = self._own_size()
            published = "" if own == takes else f", and was published for {own}x{own}"
            size = f"{height}x{width}" if self.input_size is None else f"{side}x{side}"
            return InputError(
                f"timm's {self.model!r} does not take images of {size} pixels ({said}); it takes {takes}x{takes}{published}",
                f"Write --set arch.input_size={takes}: the network then resizes the noisy images itself. Or take images of "
                f"that size, where the data set lets you choose (--set data.size={takes}).",
            )
        given = f" and kwargs = {self.kwargs}" if self.kwargs else ""
        return InputError(
            f"timm's {self.model!r} refuses images of {channels}x{height}x{width} (channel x height x width), "
            f"{len(spec.class_names)} classes{given}: {said}",
            "Change what it complains about, or choose another model: `timm.list_models()` names them.",
        )

    def _own_size(self) -> int | None:
        """The size that the model was published for, as far as timm knows it by this name."""
        import timm

        try:
            found = timm.get_pretrained_cfg(self.model)
        except RuntimeError:  # a tag that it does not know
            return None
        return None if found is None else int(found.input_size[-1])

    def _size_that_fits(self, spec: DataSpec, side: int) -> int | None:
        """The smallest of `SIZES` from `side` on, or else the model's own, that it takes; None if the size is not the reason.

        Tried on torch's meta device, where tensors have shapes and no values.
        """
        if (own := self._own_size()) is None:
            return None
        sizes = [size for size in SIZES if side < size < own] + [own]
        return next((size for size in sizes if size != side and self._takes(spec, size)), None)

    def _takes(self, spec: DataSpec, size: int) -> bool:
        import torch

        sized = self.model_copy(update={"input_size": size})
        try:
            with torch.device("meta"):
                sized._create(False, spec)
        except Exception:
            return False
        return True


def _unknown(model: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(model.partition(".")[0], known, n=3)
    return InputError(f"timm has no model called {model!r}", did_you_mean(near, "`timm.list_models()` lists them."))


def _no_weights(model: str, cause: Exception) -> InputError:
    """The network can be built, so it was the weights that failed: there are none, or they could not be downloaded."""
    import timm

    reason = (str(cause) or type(cause).__name__).splitlines()[0]
    if not timm.is_model_pretrained(model):
        near = timm.list_pretrained(f"{model.partition('.')[0]}*")
        hint = f"Those with weights: {', '.join(near[:5])}." if near else "`timm.list_pretrained()` names those with weights."
        return InputError(f"timm has no pretrained weights for {model!r}", f"{hint} Or set arch.pretrained=false.")
    return InputError(
        f"the pretrained weights of timm's {model!r} could not be downloaded: {type(cause).__name__}: {reason}", _way_out(model)
    )


def _unreachable(model: str, why: str) -> InputError:
    return InputError(
        f"the pretrained weights of timm's {model!r} are not on this machine, and there is no network to download them: {why}",
        _way_out(model),
    )


def _way_out(model: str) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        "If you have the weights in a file, leave out arch.pretrained and start from it: --init FILE. Or run this once on a "
        f"machine with a network: python -c \"import timm; timm.create_model('{model}', pretrained=True)\"; "
        f"it keeps the weights in {HF_HUB_CACHE}: copy that folder here (HF_HOME moves it)."
    )


def _checkpointed(network: nn.Module, model: str) -> None:
    """Switches timm's checkpointing on. Raises `InputError` if the model has none."""
    try:
        getattr(network, "set_grad_checkpointing")(True)  # noqa: B009  # what timm adds to a module
    except (AssertionError, AttributeError, TypeError) as cause:
        raise InputError(f"timm's {model!r} has no checkpointing", "Leave out arch.grad_checkpointing.") from cause


def _try_forward(network: nn.Module, classes: int, input_shape: tuple[int, int, int]) -> None:
    """Raises what the network raises on a black image, and `ValueError` unless it returns one logit per class."""
    import torch

    network.eval()  # neither draws random numbers nor moves the batch statistics
    with torch.no_grad():
        logits = network(torch.zeros(1, *input_shape))
    network.train()
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, classes):
        answer = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"it returned {answer} instead of logits (1, {classes})")
