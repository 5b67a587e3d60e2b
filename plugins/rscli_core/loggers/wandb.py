"""Curves for Weights & Biases."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rscli.api import LogWriter, Run
from rscli.errors import InputError
from rscli_core.loggers._dashboard import Dashboard, identity, name_of


class Wandb(Dashboard):
    """Curves for Weights & Biases, through its own library (extra: wandb).

    Who you are, and which server, it knows from `wandb login` and its environment variables. A run that is resumed goes on
    under the same id; what is trained again after a kill is drawn again in the same place. Without a network, `mode = offline`
    keeps the figures in the run folder for `wandb sync`.
    """

    library: ClassVar[str] = "wandb"

    project: str = Field("rscli", min_length=1, max_length=100, description="where the run is listed")
    entity: str | None = Field(None, max_length=100, description="whose project it is; left out: your usual one")
    run_name: str | None = Field(None, max_length=100, description="what the run is called; left out: after its folder")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="left out: as WANDB_MODE says, otherwise online"
    )

    def open(self, run: Run) -> LogWriter:
        """Begins the run at W&B, or goes on with it. Raises `InputError` if it does not load, or refuses the run."""
        wandb = self.imported()
        try:
            there = wandb.init(
                project=self.project,
                entity=self.entity,
                name=self.run_name or name_of(run),
                id=identity(run, self.library),
                resume="allow",
                mode=self.mode,
                dir=str(run.folder),
                config=dict(run.config),
                settings=wandb.Settings(console="off", silent=True),
            )
            there.define_metric("*", step_metric="batches")
        except Exception as cause:  # no network, no key, no such entity: wandb's own kinds
            hint = "Log in with `wandb login`, or keep the figures here with --set loggers.wandb.mode=offline."
            raise InputError(f"W&B cannot begin the run: {cause}", hint) from cause
        if not there.offline:
            run.note(f"W&B: {there.url}")
        return self.curves(run, lambda points, done: there.log({**points, "batches": done}), there.finish)
