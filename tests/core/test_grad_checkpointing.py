"""Activation checkpointing of timm's models: the same gradients and statistics, in one process and in two."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import together
from rscli.api import DataSpec, Transform
from rscli.errors import InputError
from rscli.registry import installed

SPEC = DataSpec(class_names=("a", "b", "c"), shape=(3, 64, 64), test_transform=Transform(channels=3, crop=(64, 64)))


@pytest.fixture(autouse=True)
def _plugins() -> Iterator[None]:
    together.announce()
    yield
    together.forget()


def built(model: str, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    return installed().build("architectures", {"name": "timm", "model": model, **fields}).build(SPEC).train()


def trained(network: nn.Module, forwards: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and buffers after a step with several forwards, in float64."""
    network = network.double()
    images = torch.rand(forwards, 3, *SPEC.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(2)
    sum(network(each).square().mean() for each in images).backward()
    return {name: each.grad for name, each in network.named_parameters()}, dict(network.named_buffers())


@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet", "test_vit", "mobilenetv3_small_050"])
def test_gradients_and_statistics_are_those_without(model):
    plain, saving = built(model), built(model, grad_checkpointing=True)
    for ours, theirs in zip(trained(saving), trained(plain), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name].double(), theirs[name].double(), rtol=1e-9, atol=1e-12) for name in ours)


def test_memory_is_saved():
    """What a forward keeps for the backward: less than half with checkpointing."""

    def kept(network: nn.Module) -> int:
        sizes = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        own = {each.data_ptr() for each in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.rand(4, *SPEC.shape))
        return sum(size for place, size in sizes.items() if place not in own)

    assert kept(built("test_vit", grad_checkpointing=True)) < kept(built("test_vit")) / 2


def test_momentum_none_and_a_copy_count_once():
    plain, saving = built("test_resnet"), copy.deepcopy(built("test_resnet", grad_checkpointing=True))
    for network in (plain, saving):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
    ours, theirs = trained(saving, 3)[1], trained(plain, 3)[1]
    assert all(torch.allclose(ours[name].double(), theirs[name].double(), rtol=1e-9) for name in theirs)
    assert all(module.momentum is None for module in saving.modules() if isinstance(module, nn.BatchNorm2d))


def test_attacks_certification_and_names_are_unaffected():
    plain, saving = built("test_resnet").eval(), built("test_resnet", grad_checkpointing=True).eval()
    assert plain.state_dict().keys() == saving.state_dict().keys()
    images = torch.rand(2, *SPEC.shape)
    with torch.inference_mode():
        assert torch.equal(plain(images), saving(images))
    slopes = []
    for network in (plain, saving):
        moved = images.clone().requires_grad_()
        slopes.append(torch.autograd.grad(network.requires_grad_(False)(moved).square().sum(), moved)[0])
    assert torch.equal(*slopes)


def test_a_model_without_it_is_refused():
    with pytest.raises(InputError, match="timm's 'vgg11_bn' has no checkpointing") as error:
        built("vgg11_bn", grad_checkpointing=True)
    assert error.value.hint == "Leave out arch.grad_checkpointing."


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [True, False])
def test_two_processes_that_share_statistics(tmp_path, sharing):
    """The second forward of a layer, in the backward, must share them as the first did."""
    sets = ["arch.name=timm", "arch.model=test_resnet", "limit=21", "batch=21", "epochs=2", "optimizer.lr=0.01"]
    sets += [f"sync_batch_norm={str(sharing).lower()}"]
    found = {}
    for name, world, more in (("one", 1, []), ("two", 2, []), ("saving", 2, ["arch.grad_checkpointing=true"])):
        (tmp_path / name).mkdir()
        assert together.run([*sets, *more], tmp_path / name / "run", world) == [0] * world
        found[name] = torch.load(tmp_path / name / "state-0.pt", weights_only=True)
    far = {name: max((found[name][key] - found["two"][key]).abs().max().item() for key in found["two"]) for name in found}
    assert far["saving"] < 1e-5
    assert (far["one"] < 1e-3) == sharing
