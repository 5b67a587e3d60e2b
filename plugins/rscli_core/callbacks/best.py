"""The best model so far, beside the last."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from rscli.api import Run
from rscli_core.callbacks._watching import Watching


class Best(Watching):
    """Keeps the model with the best figure so far in a model file of its own.

    `model-best.safetensors` is a model file like any other; it is replaced whenever an epoch is better: there is one at most.
    `best_epoch` in the log says which epoch it is from.
    """

    looks_on: ClassVar[bool] = True

    file: str = Field(
        "best", pattern=r"^[\w-]+$", max_length=100, description="NAME of the file model-NAME.safetensors in the run folder"
    )

    def after_figures(self, run: Run, state: dict[str, Any]) -> None:
        """Replaces the file, if this epoch is better."""
        if self.better(run, state):
            run.save_model(self.file)
        if "epoch" in state:
            run.log({"best_epoch": state["epoch"]})

    def end(self, run: Run, state: dict[str, Any]) -> None:
        """Says which epoch was best."""
        if "best" in state:
            run.note(
                f"best: {run.folder}/model-{self.file}.safetensors, of epoch {state['epoch']}: {self.figure} {state['best']:g}"
            )
