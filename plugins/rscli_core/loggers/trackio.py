"""Curves for trackio."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from rscli.api import LogWriter, Run
from rscli.errors import InputError
from rscli_core.loggers._dashboard import Dashboard, begins, identity, name_of


class Trackio(Dashboard):
    """Curves for trackio, on this machine or in a Space of the Hugging Face hub (extra: trackio).

    `trackio show` shows them. The run is called after its folder, with eight digits that are its own; a run that is resumed
    goes on under the same name, and what is trained again after a kill is drawn again in the same place.
    """

    library: ClassVar[str] = "trackio"

    project: str = Field("rscli", min_length=1, max_length=100, description="where the run is listed")
    space_id: str | None = Field(None, max_length=200, description="a Space of the hub to send it to; left out: this machine")

    def open(self, run: Run) -> LogWriter:
        """Begins the run, or goes on with it. Raises `InputError` if trackio does not load, or refuses the run."""
        trackio = self.imported()
        new = begins(run)
        try:
            there = trackio.init(
                project=self.project,
                name=f"{name_of(run)}-{identity(run, self.library)}",
                space_id=self.space_id,
                config=dict(run.config),
                resume="never" if new else "allow",
                embed=False,
            )
        except Exception as cause:  # no network, no such Space, no room
            hint = "Leave loggers.trackio.space_id out to keep the figures on this machine."
            raise InputError(f"trackio cannot begin the run: {cause}", hint) from cause
        return self.curves(run, lambda points, done: there.log(points, step=done), trackio.finish)
