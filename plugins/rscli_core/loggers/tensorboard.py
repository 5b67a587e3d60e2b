"""Curves for TensorBoard."""

from __future__ import annotations

import json
from typing import ClassVar

from rscli.api import LogWriter, Run
from rscli_core.loggers._dashboard import Dashboard, begins


class TensorBoard(Dashboard):
    """Curves for TensorBoard, in the folder `tensorboard` of the run folder (extra: tensorboard).

    `tensorboard --logdir runs` shows those of every run. Points are at the number of batches trained; those of a killed run
    after its last checkpoint are hidden when it is resumed.
    """

    library: ClassVar[str] = "tensorboard"

    def open(self, run: Run) -> LogWriter:
        """Begins an event file, or another one of a run that goes on. Raises `InputError` if TensorBoard does not load."""
        folder = run.folder / "tensorboard"
        fresh = begins(run) and not folder.exists()
        writer = self.imported("torch.utils.tensorboard").SummaryWriter(
            str(folder), purge_step=None if fresh else run.epoch * run.batches + run.batch + 1
        )
        if fresh:
            writer.add_text("config", f"```json\n{json.dumps(run.config, indent=2)}\n```", 0)

        def put(points: dict[str, float], done: int) -> None:
            for name, value in points.items():
                writer.add_scalar(name, value, done)

        return self.curves(run, put, writer.close, writer.flush)
