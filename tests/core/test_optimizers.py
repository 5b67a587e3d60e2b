"""The optimisers: timm's by name, their groups of parameters, what a resumed one repeats, and SGD as it was."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn

from rscli.api import DataSpec, Transform
from rscli.config.layers import resolve
from rscli.errors import ConfigError, InputError, PluginError
from rscli.models.modelfile import load_model
from rscli.models.network import Classifier
from rscli.registry import installed
from rscli.runtime.progress import Silent
from rscli.training.checkpoint import check_seal, seal
from rscli.training.train import TrainOptions, train
from rscli_core.optimizers.sgd import Sgd
from rscli_core.optimizers.timm import TimmOptimizer

SPEC = DataSpec(
    class_names=("a", "b", "c"), shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3,
    test_transform=Transform(channels=3, crop=(32, 32)),
)  # fmt: skip


def on_cpu(name: str) -> bool:
    """Whether an optimiser of timm's needs neither CUDA and another package nor second derivatives."""
    info = get_optimizer_info(name)
    return not isinstance(info.opt_class, str) and not info.second_order


USUAL = [
    "adafactorbv",
    "adamw",
    "adan",
    "lamb",
    "lion",
    "momentum",
    "muon",
    "rmsproptf",
    "sgd",
    "lookahead_adamw",
    "lookahead_momentum",
]
NAMES = [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in filter(on_cpu, list_optimizers())]
NAMES += [name for name in USUAL if name.startswith("lookahead_")]


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def classifier(name: str, **kwargs) -> Classifier:
    torch.manual_seed(0)
    return Classifier(timm.create_model(name, num_classes=3, **kwargs), SPEC)


def vit() -> Classifier:
    return classifier("vit_tiny_patch16_224", img_size=32, depth=3)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, which: range, lr: float = 0.01) -> None:
    """Optimiser steps as the host takes them, each with its own images."""
    for k in which:
        random = torch.Generator().manual_seed(k)
        images, labels = torch.rand(8, 1, 6, 6, generator=random), torch.randint(3, (8,), generator=random)
        for group in optimizer.param_groups:
            group["lr"] = lr / (k + 1) * group.get("lr_scale", 1)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def saved_and_loaded(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """What a checkpoint gives back: sealed, on disk, tensors and plain values only."""
    file = io.BytesIO()
    state = {"epoch": 0, "batch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "meter": {}}
    torch.save(seal(state), file)
    file.seek(0)
    return check_seal(torch.load(file, weights_only=True), Path("checkpoint.pt"))


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


# --- timm's, by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_saved_and_three_more_are_six(name):
    made = TimmOptimizer(algorithm=name, lr=0.01, weight_decay=0.01)
    whole, first, second = small(), small(), small(1)
    steps(whole, made.build(whole), range(6))
    before = made.build(first)
    steps(first, before, range(3))
    state = saved_and_loaded(first, before)
    second.load_state_dict(state["model"])
    after = made.build(second)
    after.load_state_dict(state["optimizer"])
    torch.manual_seed(7)
    steps(second, after, range(3, 6))
    assert same(whole, second)
    assert not same(whole, first)


def test_a_step_of_adamw_is_that_of_its_paper():
    """Loshchilov & Hutter, ICLR 2019, algorithm 2, in float64; nothing decays the bias."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    made = TimmOptimizer(algorithm="adamw", lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3).build(model)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    means = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in model.named_parameters()}
    for t in range(1, 4):
        made.zero_grad()
        (model(torch.full((1, 5), float(t)).double()) ** 2).sum().backward()
        for name, value, decay in (("weight", weight, 0.3), ("bias", bias, 0.0)):
            gradient = getattr(model, name).grad
            m, v = means[name]
            m.mul_(0.8).add_(0.2 * gradient)
            v.mul_(0.9).add_(0.1 * gradient**2)
            value.mul_(1 - 0.1 * decay)
            value.sub_(0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3))
        made.step()
        torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(model.bias.detach(), bias, rtol=1e-12, atol=1e-14)


def test_what_is_left_out_is_timm_s_own():
    for name in ("momentum", "adamw", "lamb", "lion", "rmsproptf"):
        ours = TimmOptimizer(algorithm=name, lr=0.02, weight_decay=0.1).build(small())
        theirs = create_optimizer_v2(small(), name, lr=0.02, weight_decay=0.1)
        assert type(ours) is type(theirs)
        settings = [[{k: v for k, v in g.items() if k != "params"} for g in made.param_groups] for made in (ours, theirs)]
        assert settings[0] == settings[1]


def test_fields_and_kwargs_arrive():
    made = TimmOptimizer(algorithm="adamw", lr=0.02, betas=[0.7, 0.8], eps=1e-5, kwargs={"amsgrad": True, "foreach": False})
    group = made.build(small()).param_groups[0]
    assert (group["betas"], group["eps"], group["amsgrad"], group["foreach"]) == ((0.7, 0.8), 1e-5, True, False)
    assert TimmOptimizer(algorithm="momentum", lr=1, momentum=0.3).build(small()).param_groups[0]["momentum"] == 0.3
    assert TimmOptimizer(algorithm="adan", lr=1, betas=[0.9, 0.8, 0.7]).build(small()).param_groups[0]["betas"] == (
        0.9,
        0.8,
        0.7,
    )


# --- groups -------------------------------------------------------------------------------------------------------------------


def decayed(made: torch.optim.Optimizer, model: nn.Module) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in made.param_groups if group["weight_decay"] for p in group["params"]}


def held(made: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in made.param_groups)


def test_weight_decay_spares_biases_norms_and_what_the_network_names():
    model = small()
    made = TimmOptimizer(algorithm="adamw", lr=0.1, weight_decay=0.2).build(model)
    assert decayed(made, model) == {"0.weight", "4.weight"}
    assert held(made) == 6
    everywhere = TimmOptimizer(algorithm="adamw", lr=0.1, weight_decay=0.2, decay_all=True).build(model)
    assert decayed(everywhere, model) == {name for name, _ in model.named_parameters()}

    transformer = vit()
    made = TimmOptimizer(algorithm="adamw", lr=0.1, weight_decay=0.2).build(transformer)
    spared = {name for name, _ in transformer.named_parameters()} - decayed(made, transformer)
    assert {"network.pos_embed", "network.cls_token"} <= spared  # matrices, which the network names
    assert all(p.ndim <= 1 or name in ("network.pos_embed", "network.cls_token")
               for name, p in transformer.named_parameters() if name in spared)  # fmt: skip


def test_layer_decay_falls_by_its_factor_from_the_head_down():
    model = vit()
    made = TimmOptimizer(algorithm="adamw", lr=0.1, weight_decay=0.2, layer_decay=0.5).build(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in made.param_groups for p in group["params"]}
    assert len(scale) == len(names)
    top = scale["network.head.weight"]
    assert top == 1
    blocks = [scale[f"network.blocks.{k}.attn.qkv.weight"] for k in range(3)]
    assert [b / a for a, b in pairwise(blocks)] == [2, 2]
    assert scale["network.patch_embed.proj.weight"] == blocks[0] / 2
    assert blocks[-1] < top


def test_layer_decay_without_layers_is_refused():
    with pytest.raises(InputError, match=r"layer_decay = 0\.5 has no effect"):
        TimmOptimizer(algorithm="adamw", lr=0.1, layer_decay=0.5).build(small())
    TimmOptimizer(algorithm="adamw", lr=0.1, layer_decay=1).build(small())


@pytest.mark.parametrize("made", [Sgd(lr=0.1), TimmOptimizer(algorithm="adamw", lr=0.1)], ids=["sgd", "timm"])
def test_frozen_parameters_are_left_out(made):
    model = small()
    model[0].requires_grad_(False)
    optimizer = made.build(model)
    assert held(optimizer) == 4
    assert id(model[0].weight) not in {id(p) for group in optimizer.param_groups for p in group["params"]}
    model.requires_grad_(False)
    with pytest.raises(InputError, match="every parameter of the network is frozen"):
        made.build(model)


# --- what is refused ----------------------------------------------------------------------------------------------------------


def problem(*sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve("digits-gaussian-0.25", sets=["optimizer.lr=0.1", *sets])
    return str(caught.value)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["optimizer.name=timm/adamww"], "timm has no optimiser called 'adamww'; did you mean timm/adamw"),
        (["optimizer.name=timm/Lookahead_AdamW"], "did you mean timm/lookahead_adamw"),
        (["optimizer.name=adamw"], "Did you mean 'timm/adamw'?"),
        (["optimizer.name=timm/adahessian"], "'adahessian' needs second derivatives"),
        (["optimizer.name=timm/adamw", "optimizer.momentum=0.9"], "momentum = 0.9 (--set): is not for timm's 'adamw'"),
        (["optimizer.name=timm/momentum", "optimizer.betas=[0.9,0.99]"], "is not for timm's 'momentum', which has no betas"),
        (["optimizer.name=timm/adamw", "optimizer.betas=[0.9]"], "must be 2 numbers"),
        (["optimizer.name=timm/adan", "optimizer.betas=[0.9,0.99]"], "must be 3 numbers"),
        (["optimizer.name=timm/adamw", "optimizer.kwargs.lr=1"], "kwargs must not set lr"),
        (["optimizer.name=timm/adamw", "optimizer.weigth_decay=1"], "Did you mean 'optimizer.weight_decay'?"),
    ],
)  # fmt: skip
def test_bad_settings_are_said_before_anything_begins(sets, said):
    assert said in problem(*sets)


def test_arguments_that_timm_refuses_are_named():
    with pytest.raises(InputError, match=r"'adamw' cannot be made with .*nestrov"):
        TimmOptimizer(algorithm="adamw", lr=0.1, kwargs={"nestrov": True}).build(small())


@pytest.mark.skipif(torch.cuda.is_available(), reason="may work with CUDA")
def test_an_optimiser_that_needs_cuda_is_refused_here():
    with pytest.raises(InputError, match="CUDA required"):
        TimmOptimizer(algorithm="bnbadamw8bit", lr=0.1).build(small())


def test_what_is_called_like_an_optimiser_of_timm_s_is_suggested():
    assert TimmOptimizer.offers("lamb")
    assert not TimmOptimizer.offers("lamp")
    with pytest.raises(PluginError, match="no installed package provides") as caught:
        installed().load("optimizers", "lamb")
    assert "timm/lamb" in str(caught.value.hint)


# --- SGD ----------------------------------------------------------------------------------------------------------------------


def after(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    steps(model, optimizer, range(5))
    return [parameter.detach() for parameter in model.parameters()]


def test_sgd_as_it_is_by_default_is_torch_s_of_before_bit_for_bit():
    one, other = small(), small()
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=False)
    assert all(map(torch.equal, after(one, Sgd(lr=0.1).build(one)), after(other, plain)))


@pytest.mark.parametrize("way", ["loop", "foreach", "fused"])
def test_the_ways_to_compute_a_step_agree(way):
    one, other = small(), small()
    made = Sgd(lr=0.1, implementation=way).build(one)
    assert made.defaults["fused"] is (True if way == "fused" else None)
    assert (
        made.defaults["foreach"]
        is {"loop": False, "foreach": True, "fused": None if way != "fused" else made.defaults["foreach"]}[way]
    )
    for a, b in zip(after(one, made), after(other, Sgd(lr=0.1).build(other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# --- a run --------------------------------------------------------------------------------------------------------------------


def test_a_run_with_timm_s_lamb_learns_and_says_so(tmp_path):
    sets = ["optimizer.name=timm/lamb", "optimizer.lr=0.02", "optimizer.weight_decay=0.01", "schedule.name=cosine", "epochs=2"]
    resolved = resolve("digits-gaussian-0.25", sets=sets)
    train(resolved, TrainOptions(out=tmp_path / "run", data_dir=tmp_path, device="cpu", workers=0), Silent())
    recorded = load_model(tmp_path / "run/model.safetensors").source.card.config["optimizer"]
    assert recorded["name"] == "timm/lamb"
    assert recorded["weight_decay"] == 0.01
    assert "algorithm" not in recorded
