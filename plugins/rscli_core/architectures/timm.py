"""Every model of timm."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from rscli.api import Architecture, DataSpec
from rscli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

RESERVED = frozenset({"model_name", "pretrained", "num_classes", "in_chans", "checkpoint_path"})
"""Arguments of `timm.create_model` that are not for `kwargs`: rscli sets them itself, or has another way."""

LARGEST = 1_000_000
"""A number among the keyword arguments, at most: some models make a list of that length."""

RESERVED_HINT = "classes and channels are the data set's, pretrained is a field, and `rscli import` reads checkpoints"


class TimmModel(Architecture):
    """Any model of timm, with its keyword arguments: timm/resnet50, timm/vit_tiny_patch16_224, ...

    A model that is built for one image size (a vision transformer, say) is built for the size of the images.
    """

    variant: ClassVar[str | None] = "model"
    field_names: ClassVar = {"resnet50": {"model": "resnet50"}}

    model: str = Field(min_length=1, description="a name from timm.list_models(), with or without a tag of weights")
    pretrained: bool = Field(False, description="start from timm's weights, downloaded if they are not there")
    kwargs: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict, description="keyword arguments for the model, such as drop_path_rate"
    )

    @field_validator("kwargs")
    @classmethod
    def _not_reserved(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED & kwargs.keys()):
            raise ValueError(f"kwargs must not set {', '.join(taken)}; rscli does: {RESERVED_HINT}")
        if large := [name for name, value in kwargs.items() if isinstance(value, int | float) and abs(value) > LARGEST]:
            raise ValueError(f"kwargs must be numbers of at most {LARGEST:,}: {', '.join(large)}")
        return kwargs

    @classmethod
    def offers(cls, name: str) -> bool:
        """Whether timm has a model called `name`; imports timm."""
        import timm

        return bool(timm.is_model(name))

    def build(self, spec: DataSpec, *, weights: bool = True) -> nn.Module:
        """A network for images `spec.shape` (channel, height, width), which has taken one such image on trial.

        Raises `InputError` if timm does not know the model, if its weights are unavailable, or if the model refuses its keyword
        arguments or the images.
        """
        import timm

        classes, input_shape = len(spec.class_names), spec.shape
        if not timm.is_model(self.model):
            raise _unknown(self.model, timm.list_models())
        try:
            return self._create(self.pretrained and weights, classes, input_shape)
        except Exception as cause:  # timm's models refuse arguments and images with exceptions of any type
            if self.pretrained and self._builds_without_weights(classes, input_shape):
                raise _no_weights(self.model, cause) from cause
            shape = "x".join(map(str, input_shape))
            given = f" and kwargs = {self.kwargs}" if self.kwargs else ""
            raise InputError(
                f"timm's {self.model!r} refuses images of {shape} (channel x height x width), {classes} classes{given}: "
                f"{type(cause).__name__}: {cause}",
                "Change what it complains about, or choose another model: `timm.list_models()` names them.",
            ) from cause

    def _create(self, pretrained: bool, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        import timm

        network: nn.Module = timm.create_model(
            self.model, pretrained, num_classes=classes, in_chans=input_shape[0], **self._arguments(input_shape)
        )
        _try_forward(network, classes, input_shape)
        return network

    def _builds_without_weights(self, classes: int, input_shape: tuple[int, int, int]) -> bool:
        try:
            self._create(False, classes, input_shape)
        except Exception:
            return False
        return True

    def _arguments(self, input_shape: tuple[int, int, int]) -> dict[str, Any]:
        """The keyword arguments, with the image size for a model that is built for one; a size given by the user stays."""
        import timm

        fixed = timm.get_pretrained_cfg_value(self.model, "fixed_input_size")
        return {"img_size": input_shape[1:], **self.kwargs} if fixed else dict(self.kwargs)


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
    from huggingface_hub.constants import HF_HUB_CACHE

    return InputError(
        f"the pretrained weights of timm's {model!r} could not be downloaded: {type(cause).__name__}: {reason}",
        f"Run this once on a machine with a network: python -c \"import timm; timm.create_model('{model}', pretrained=True)\"; "
        f"it keeps the weights in {HF_HUB_CACHE}: copy that folder here (HF_HOME moves it). Or set arch.pretrained=false.",
    )


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
