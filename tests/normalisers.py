"""Layers of batch normalisation in two processes that share their statistics; imports nothing of the tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rscli.training.batch_norm import SharedStatistics


@dataclass(frozen=True)
class Case:
    """A layer, and how many values each of the two processes has: `images` of `shape` (channels, ...)."""

    name: str
    kind: str = "BatchNorm2d"
    shape: tuple[int, ...] = (3, 4, 5)
    sizes: tuple[int, int] = (4, 4)
    options: dict[str, Any] = field(default_factory=dict)
    forwards: int = 1
    training: bool = True
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    tolerance: float = 1e-9


CASES = [
    Case("2d"),
    Case("1d", "BatchNorm1d", (3,)),
    Case("1d, sequences", "BatchNorm1d", (3, 7)),
    Case("3d", "BatchNorm3d", (2, 3, 4, 2)),
    Case("uneven", sizes=(1, 6)),
    Case("one value in one process", "BatchNorm1d", (3,), sizes=(1, 4)),
    Case("one value in each process", "BatchNorm1d", (3,), sizes=(1, 1)),
    Case("momentum none", options={"momentum": None}, forwards=3),
    Case("momentum 0.7", options={"momentum": 0.7}, forwards=2),
    Case("no affine", options={"affine": False}),
    Case("no running statistics", options={"track_running_stats": False}),
    Case("two forwards", forwards=2, sizes=(3, 5)),
    Case("eval", training=False, sizes=(3, 5)),
    Case("eval without running statistics", training=False, options={"track_running_stats": False}),
    Case("timm's", "BatchNormAct2d"),
    Case("fp32", dtype=torch.float32, tolerance=1e-5),
    Case("bf16 autocast", dtype=torch.float32, autocast=True, tolerance=0.1),
]


def a_case(case: Case) -> nn.Module:
    """The layer, with weights and statistics that are not those of a new one."""
    if case.kind == "BatchNormAct2d":
        from timm.layers import BatchNormAct2d

        layer: nn.Module = BatchNormAct2d(case.shape[0], act_layer=nn.Softplus)
    else:
        layer = getattr(nn, case.kind)(case.shape[0], **case.options)
    random = torch.Generator().manual_seed(1)
    for tensor in [*layer.parameters(), *layer.buffers()]:
        if tensor.dtype.is_floating_point:
            tensor.data.copy_(torch.rand(tensor.shape, generator=random) + 0.5)
    return layer.to(case.dtype).train(case.training)


def joined_values(case: Case) -> Tensor:
    """The input of all images (forwards, images, channels, ...): far from zero mean, and another in each forward."""
    random = torch.Generator().manual_seed(2)
    shape = (case.forwards, sum(case.sizes), *case.shape)
    values = 3 * torch.rand(shape, generator=random, dtype=torch.float64) ** 2 + 5
    values *= torch.linspace(1, 2, shape[1], dtype=torch.float64).view(1, -1, *[1] * len(case.shape))  # images differ
    return (values + torch.arange(case.forwards).view(-1, *[1] * (values.ndim - 1))).to(case.dtype)


def whole(case: Case) -> dict[str, Tensor]:
    """What torch's own layer gives for all images."""
    return _run(case, slice(None), nullcontext)


def _run(case: Case, part: slice, sharing: Callable[[], Any]) -> dict[str, Tensor]:
    layer = a_case(case)
    inputs = joined_values(case)[:, part].clone().requires_grad_()
    random = torch.Generator().manual_seed(3)
    slopes = torch.randn(joined_values(case).shape, generator=random, dtype=torch.float64)[:, part]
    with sharing(), torch.autocast("cpu", torch.bfloat16) if case.autocast else nullcontext():
        fed = inputs.bfloat16() if case.autocast else inputs
        output = torch.stack([layer(each) for each in fed])
    (output.double().sin() * slopes).sum().backward()
    found = {"output": output.detach(), "input_grad": inputs.grad}
    found |= {f"{name}_grad": each.grad for name, each in layer.named_parameters()}
    return found | {f"buffer {name}": each.clone() for name, each in layer.named_buffers()}


def norm_peer(rank: int, world: int, port: int, folder: str) -> None:
    """One of two processes: runs every case on its images, and writes what it found."""
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, world, rank == 0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = []
    for case in CASES:
        first = case.sizes[0]
        found.append(_run(case, slice(None, first) if rank == 0 else slice(first, None), SharedStatistics))
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
