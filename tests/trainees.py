"""Training runs in processes that are forked in milliseconds, to be killed; they import nothing of the tests."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import time
from pathlib import Path
from typing import Any

PRELOAD = [
    "rscli.training.train",
    "rscli_core.architectures.cifar_resnet",
    "rscli_core.architectures.lenet",
    "rscli_core.attacks.pgd",
    "rscli_core.callbacks.checkpoint",
    "rscli_core.datasets.digits",
    "rscli_core.loggers.jsonl",
    "rscli_core.losses.consistency",
    "rscli_core.losses.gaussian",
    "rscli_core.noises.gaussian",
    "rscli_core.optimizers.sgd",
    "rscli_core.schedules.step",
    "sklearn.datasets",
]


def run(preset: str, sets: list[str], out: Path, world: int = 1, kill_after: float | None = None, **options: Any) -> list[int]:
    """Trains, or goes on, in `world` processes, and kills them all `kill_after` so many seconds; their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    processes = [
        context.Process(target=_train, args=(preset, sets, out, options, rank, world, port), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    if kill_after is not None:
        time.sleep(kill_after)
        for process in random.Random(kill_after).sample(processes, world):
            process.kill()
    for process in processes:
        process.join(300)
    return [process.exitcode or 0 for process in processes]


def _train(preset: str, sets: list[str], out: Path, options: Any, rank: int, world: int, port: int) -> None:
    import torch

    from rscli.config.layers import resolve
    from rscli.runtime.progress import Silent
    from rscli.training.train import TrainOptions, train

    if world > 1:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in where.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    how = TrainOptions(out=out, data_dir=out.parent, device="cpu", workers=0, resume=(out / "config.json").exists(), **options)
    train(resolve(preset, sets=sets), how, Silent())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
