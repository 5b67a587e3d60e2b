"""Whole runs on the digits in one or several processes, with small plugins of their own; imports nothing of the tests.

A process that is done leaves its weights and buffers in `state-RANK.pt` beside the run folder; one that fails leaves what it
would say in `said-RANK.txt`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from rscli import registry
from rscli.api import Architecture, DataSpec, Loss, TrainContext, TrainStep
from trainees import PRELOAD, free_port

BASE = ("data.name=digits", "arch.name=tiny", "noise.sigma=0.25", "loss.name=gaussian", "optimizer.lr=0.1", "epochs=1")


class Tiny(Architecture):
    """A few hundred parameters."""

    norm: bool = False
    dropout: float = 0.0
    idle: bool = False

    def build(self, spec: DataSpec, *, weights: bool = True) -> nn.Module:
        """A convolution, perhaps normalised, and a linear layer; if `idle`, with two parameters that nothing uses."""
        between: list[nn.Module] = [nn.Dropout(self.dropout)] if self.dropout else []
        between += [nn.BatchNorm2d(4)] if self.norm else []
        made = nn.Sequential(nn.Conv2d(1, 4, 5, 4), *between, nn.Softplus(), nn.Flatten(), nn.LazyLinear(10))
        import torch

        made(torch.zeros(2, *spec.shape))
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        if self.idle:
            made[0].idle = nn.Linear(2, 2)
        return made


class Counting(Loss):
    """Keeps the last loss of every image, and counts steps; each process on its own, unless it is `honest`."""

    honest: bool = True

    def setup(self, context: TrainContext) -> Mapping[str, Tensor]:
        import torch

        return {"last": torch.zeros(context.images), "seen": torch.zeros(context.images, dtype=torch.int64)}

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        losses = functional.cross_entropy(step.noisy_logits[0], step.labels, reduction="none")
        indices, found = step.indices, losses.detach()
        if self.honest:
            indices, found = step.gathered(indices), step.gathered(found)
        step.state["last"][indices] = found
        step.state["seen"][indices] += 1
        return {"ce": losses.mean()}


def announce() -> None:
    """Makes the plugins known to this process."""
    registry.announce(registry.Entry("architectures", "tiny", "tests", "1.0", "together:Tiny"), Tiny)
    registry.announce(registry.Entry("losses", "counting", "tests", "1.0", "together:Counting"), Counting)


def forget() -> None:
    """Makes them unknown again."""
    for entry in [entry for entry in registry._announced if entry.target.startswith("together:")]:
        registry._announced.pop(entry)
    registry.load_entry.cache_clear()
    registry.installed.cache_clear()


def run(sets: list[str], out: Path, world: int = 1, seconds: float = 200, **options: Any) -> list[int]:
    """Trains with `BASE` and `sets` in `world` processes; their exit codes (None: it hung, and was killed)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "together"])
    port = free_port()
    processes = [
        context.Process(target=_train, args=(sets, out, options, rank, world, port), daemon=True) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    return [None if process in hung else process.exitcode for process in processes]


def _train(sets: list[str], out: Path, options: Any, rank: int, world: int, port: int) -> None:
    import torch

    from rscli.config.layers import resolve
    from rscli.errors import RscliError
    from rscli.runtime.progress import Silent
    from rscli.training import train as training

    if world > 1:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in where.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    announce()
    made = []

    class Kept(training.Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    training.Trainer = Kept
    how = training.TrainOptions(out=out, data_dir=out.parent, device="cpu", workers=0, **options)
    try:
        training.train(resolve(sets=[*BASE, *sets]), how, Silent())
    except RscliError as error:
        (out.parent / f"said-{rank}.txt").write_text(str(error))
        raise SystemExit(error.exit_code) from None
    state = {**made[0].classifier.state_dict(), **{f"loss {name}": each for name, each in made[0].loss_state.items()}}
    torch.save(state, out.parent / f"state-{rank}.pt")
