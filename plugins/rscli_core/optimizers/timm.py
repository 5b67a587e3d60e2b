"""Every optimiser of timm, torch's own among them."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from rscli.api import Optimizer, unit
from rscli.errors import InputError
from rscli_core.optimizers._trainable import trainable

if TYPE_CHECKING:
    import torch
    from torch import nn

RESERVED = frozenset(
    {
        "model_or_params", "opt", "lr", "weight_decay", "momentum", "betas", "eps", "layer_decay", "filter_bias_and_bn",
        "param_group_fn",
    }
)  # fmt: skip
"""Arguments of `timm.optim.create_optimizer_v2` that are not for `kwargs`: they are fields, or rscli sets them."""

LOOKAHEAD = "lookahead_"
"""What timm takes in front of a name: the slow weights of Zhang et al., NeurIPS 2019, around that optimiser."""


class TimmOptimizer(Optimizer):
    """Any optimiser of timm, with its keyword arguments: timm/adamw, timm/lamb, timm/lion, timm/momentum, ...

    `timm.optim.list_optimizers()` names them; timm/sgd has Nesterov momentum, timm/momentum the classical one. A name with
    lookahead_ in front (timm/lookahead_adamw) has slow weights around it. Parameters that are frozen are left out. Weight decay
    spares biases, normalisation layers and what the network names in `no_weight_decay()`.
    """

    variant: ClassVar[str | None] = "algorithm"

    algorithm: str = Field(min_length=1, max_length=100, description="a name from timm.optim.list_optimizers()")
    weight_decay: float = Field(0.0, ge=0, description="weight decay, in the algorithm's own form", json_schema_extra=unit("1"))
    decay_all: bool = Field(False, description="weight decay on biases and normalisation layers, too")
    momentum: float | None = Field(
        None, ge=0, lt=1, description="momentum, if the algorithm has one; left out: 0.9", json_schema_extra=unit("1")
    )
    betas: tuple[float, ...] | None = Field(
        None,
        strict=False,
        description="decay rates of the running means; left out: the algorithm's own",
        json_schema_extra=unit("1"),
    )
    eps: float | None = Field(None, gt=0, description="what keeps a division finite; left out: the algorithm's own")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="what the learning rate is multiplied by from each layer to the one before it"
    )
    kwargs: dict[str, bool | int | float | str | list[str] | None] = Field(
        default_factory=dict, description="more keyword arguments, such as fused, foreach or fallback_list"
    )

    @field_validator("algorithm")
    @classmethod
    def _known(cls, algorithm: str) -> str:
        info = _info(algorithm)
        if info is None:
            raise ValueError(f"timm has no optimiser called {algorithm!r}; {_near(algorithm)}")
        if info.second_order:
            raise ValueError(
                f"{algorithm!r} needs second derivatives, which training does not compute; choose another optimiser"
            )
        return algorithm

    @field_validator("momentum", "betas", "eps")
    @classmethod
    def _taken(cls, value: Any, info: ValidationInfo) -> Any:
        found = _info(info.data["algorithm"]) if "algorithm" in info.data else None
        if value is None or found is None:
            return value
        if not getattr(found, f"has_{info.field_name}"):
            raise ValueError(f"is not for timm's {info.data['algorithm']!r}, which has no {info.field_name}; leave it out")
        if info.field_name == "betas":
            _check_betas(value, found)
        return value

    @field_validator("kwargs")
    @classmethod
    def _not_reserved(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED & kwargs.keys()):
            raise ValueError(f"kwargs must not set {', '.join(taken)}; those that a user sets are fields of their own")
        return kwargs

    @classmethod
    def offers(cls, name: str) -> bool:
        """Whether timm has an optimiser called `name`; imports timm."""
        found = _info(name)
        return found is not None and not found.second_order

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """timm's optimiser of the parameters of `model` that are trained.

        With `layer_decay`, the learning rate of layer l of L is lr * layer_decay ** (L - l), the head is layer L (Bao et al.,
        BEiT, ICLR 2022): each group carries it as `lr_scale`. Raises `InputError` if nothing is left to train, if the network
        does not say what its layers are, or if timm refuses the arguments.
        """
        network = getattr(model, "network", model)  # where no_weight_decay() and the layers are
        trainable(network)
        given = {name: value for name in ("momentum", "betas", "eps") if (value := getattr(self, name)) is not None}
        try:
            made: torch.optim.Optimizer = _timm().create_optimizer_v2(
                network,
                self.algorithm,
                lr=self.lr,
                weight_decay=self.weight_decay,
                filter_bias_and_bn=not self.decay_all,
                layer_decay=self.layer_decay,
                **self._repeatable(),
                **given,
                **self.kwargs,
            )
        except Exception as cause:  # timm and torch refuse arguments with exceptions of any type
            arguments = {**given, **self.kwargs}
            raise InputError(
                f"timm's optimiser {self.algorithm!r} cannot be made with {arguments}: {type(cause).__name__}: {cause}",
                "Change what it complains about, or choose another: `timm.optim.list_optimizers()` names them.",
            ) from cause
        if self.layer_decay not in (None, 1) and all(group.get("lr_scale", 1) == 1 for group in made.param_groups):
            raise InputError(
                f"layer_decay = {self.layer_decay} has no effect: the network does not say which layers it has",
                "Leave optimizer.layer_decay out, or choose a network of timm's.",
            )
        return made

    def _repeatable(self) -> dict[str, bool]:
        """What makes an algorithm draw its random numbers from a generator that it saves (Kron's, which has the choice)."""
        found = _info(self.algorithm)
        if found is None or isinstance(found.opt_class, str):  # a text: of another package, which may not be there
            return {}
        parameters = inspect.signature(_timm().get_optimizer_class(found.name, bind_defaults=False)).parameters
        return {"deterministic": True} if "deterministic" in parameters and "deterministic" not in self.kwargs else {}


def _timm() -> Any:
    """timm.optim, which does not tell a type checker what it exports."""
    import timm.optim

    return timm.optim


def _info(name: str) -> Any:
    """What timm says of the optimiser `name` (an OptimInfo); None if it has no such."""
    plain = name.removeprefix(LOOKAHEAD)
    return _timm().get_optimizer_info(plain) if plain in _timm().list_optimizers() else None


def _near(name: str) -> str:
    prefix = LOOKAHEAD if name.lower().startswith(LOOKAHEAD) else ""
    near = difflib.get_close_matches(name.lower().removeprefix(LOOKAHEAD), _timm().list_optimizers(), n=3)
    return (
        f"did you mean {' or '.join(f'timm/{prefix}{one}' for one in near)}?"
        if near
        else "`timm.optim.list_optimizers()` names them"
    )


def _check_betas(betas: tuple[float, ...], info: Any) -> None:
    if len(betas) != info.num_betas or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"must be {info.num_betas} numbers of at least 0 and less than 1, as in [0.9, 0.95]")
