"""Activation checkpointing, with which batch normalisation still counts a batch once.

A checkpointed layer runs twice in a step: in the forward, and again in the backward. The second time a layer of batch
normalisation would move its running statistics again, by the same batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def count_once(network: nn.Module) -> None:
    """Makes the batch normalisation in `network` leave its running statistics alone when it runs in a backward."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_hold)
            module.register_forward_hook(_let_go, always_call=True)


def _hold(module: Any, _inputs: Any) -> None:
    import torch

    if module.training and module.track_running_stats and torch._C._current_graph_task_id() != -1:  # in a backward
        module.held = module.momentum
        module.momentum = 0.0


def _let_go(module: Any, _inputs: Any, _output: Any) -> None:
    if "held" in module.__dict__:
        module.momentum = module.__dict__.pop("held")
        module.num_batches_tracked.sub_(1)
