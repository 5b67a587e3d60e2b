"""What the model file of a run says of itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rscli import __version__
from rscli.api import DataSpec
from rscli.config.layers import Resolved
from rscli.models.card import ModelCard
from rscli.models.modelfile import tensor_digest


def model_card(resolved: Resolved, spec: DataSpec, loss_state: Mapping[str, Tensor], epochs: int | None = None) -> ModelCard:
    """What a model file says of itself after `epochs` (None: all); of what the loss kept (any shape), the digests."""
    sections = resolved.as_dict()
    return ModelCard(
        rscli=__version__,
        arch=sections["arch"],
        noise=sections["noise"],
        data=sections["data"],
        spec=spec,
        plugins=[{"kind": p.kind, "name": p.name, "package": p.package, "version": p.version} for p in resolved.provenance],
        config=sections,
        epochs=resolved.config.epochs if epochs is None else epochs,
        preset=resolved.preset,
        overrides=resolved.overrides if resolved.preset else None,
        loss_state={name: tensor_digest({name: tensor}) for name, tensor in loss_state.items()},
    )
