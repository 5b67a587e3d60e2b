"""Processes that take the same two optimiser steps together, in float64; they import nothing of the tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "plugins" / name) for name in ("rscli-smoothmix", "rscli-catrs")]

from rscli.api import Attack, Draws, Loss, TrainStep  # noqa: E402
from rscli.runtime.torchrun import Launch  # noqa: E402
from rscli.training.draws import StepDraws  # noqa: E402
from rscli.training.objective import Objective, attacked  # noqa: E402
from rscli.training.processes import Processes, Several  # noqa: E402
from rscli_catrs.loss import CatRs  # noqa: E402
from rscli_core.attacks.ddn import Ddn  # noqa: E402
from rscli_core.attacks.gradient_free import GradientFree  # noqa: E402
from rscli_core.attacks.pgd import Pgd  # noqa: E402
from rscli_core.losses.consistency import Consistency  # noqa: E402
from rscli_core.losses.gaussian import GaussianLoss  # noqa: E402
from rscli_core.losses.macer import Macer  # noqa: E402
from rscli_core.losses.stability import Stability  # noqa: E402
from rscli_core.noises.gaussian import Gaussian  # noqa: E402
from rscli_smoothmix.loss import SmoothMix  # noqa: E402

CLASSES, SHAPE, CPU = 3, (2, 6, 6), torch.device("cpu")
LOSSES: dict[str, Loss] = {
    "gaussian": GaussianLoss(m=2),
    "consistency": Consistency(lbd=5),
    "consistency, mse": Consistency(lbd=5, form="mse"),
    "stability": Stability(m=2),
    "macer": Macer(lbd=6, m=4, gamma=30),
    "smoothmix": SmoothMix(m=2, steps=2),
    "smoothmix, one step": SmoothMix(m=2, steps=2, one_step=True),
    "cat-rs": CatRs(lbd=1, m=2, steps=2, soft_labels=Path("unread")),
}
REACH: dict[str, Any] = {"epsilon": 0.5, "steps": 3, "warmup": 0}
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "pgd": Pgd(**REACH),
    "ddn": Ddn(**REACH),
    "gradient-free": GradientFree(**REACH),
}
CASES = [(loss, attack, norm) for loss in LOSSES for attack in ATTACKS for norm in (False, True)]


class Double(Draws):
    """The engine's random numbers, in float64."""

    def __init__(self, draws: StepDraws) -> None:
        self._draws = draws

    def noise(self, m: int) -> Tensor:
        return self._draws.noise(m).double()

    def uniform(self, *shape: int) -> Tensor:
        return self._draws.uniform(*shape).double()


def network(norm: bool) -> nn.Module:
    """A small network in float64 with the same weights in every process."""
    torch.manual_seed(3)
    between = nn.BatchNorm2d(4) if norm else nn.Identity()
    made = nn.Sequential(nn.Conv2d(2, 4, 3), between, nn.Softplus(), nn.Flatten(), nn.Linear(64, CLASSES))
    made[-1].weight.data.mul_(4)  # so that MACER has something to push
    return made.double()


def two_steps(processes: Processes, case: tuple[str, str, bool], images: int, parts: int = 1) -> dict[str, Tensor]:
    """Weights and buffers after two steps of gradient descent on `images` images, each process on its own."""
    loss, attack = LOSSES[case[0]], ATTACKS[case[1]]
    model = network(case[2])
    objective = processes.average(Objective(model), CPU, shared_statistics=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(2):
        optimizer.zero_grad()
        alike = images < processes.world
        rank, world = (0, 1) if alike else (processes.rank, processes.world)
        low, high = rank * images // world, (rank + 1) * images // world
        edges = [low + (high - low) * place // parts for place in range(parts + 1)]
        for place in range(parts):
            step = a_step(model, images, edges[place], edges[place + 1], number, loss.m)
            if attack is not None:
                step = attacked(attack, step)
            with processes.gathering(objective, last=place == parts - 1):
                with processes.together(shared_statistics=not alike):
                    terms = objective(loss, step)
                (torch.stack(list(terms.values())).sum() * len(step.labels) / images * world).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def a_step(model: nn.Module, images: int, first: int, end: int, number: int, m: int) -> TrainStep:
    """Step `number` on the images from place `first` to `end` of `images`."""
    random = torch.Generator().manual_seed(100 + number)
    pixels = torch.rand(images, *SHAPE, generator=random, dtype=torch.float64)
    labels = torch.randint(CLASSES, (images,), generator=random)
    soft = torch.rand(images, CLASSES, generator=random, dtype=torch.float64).softmax(-1)
    smoothing = Gaussian(sigma=0.3)
    draws = Double(StepDraws(smoothing, SHAPE, first=first, end=end, size=images, seed=7, key=("step", number), device=CPU))
    return TrainStep(
        model=model,
        images=pixels[first:end],
        clean=pixels[first:end],
        labels=labels[first:end],
        indices=torch.arange(first, end),
        noise=draws.noise(m),
        smoothing=smoothing,
        generator=torch.Generator().manual_seed(1),
        state={"soft_labels": soft},
        draws=draws,
    )


def peer(rank: int, world: int, port: int, images: int, out: str) -> None:
    """One of `world` processes: takes the steps of every case, and the first one writes what came out to `out`."""
    import sys

    from torch import distributed

    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, world, rank == 0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    several = Several(Launch(rank, world, "127.0.0.1", port), store)
    found = [two_steps(several, case, images) for case in CASES]
    if rank == world - 1:  # the last one: the first would hide that others differ
        torch.save(found, out)
    several.wait()
    several.leave()
    sys.exit(0)
