"""The exponential moving average of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rscli.api import Callback, Run, unit

if TYPE_CHECKING:
    from torch import Tensor


class Ema(Callback):
    """Averages the weights over the optimiser steps, and puts the average into the model file.

    After step k (from 1), average <- d_k average + (1 - d_k) weights, of every parameter and of the running statistics of
    batch normalisation; d_1 = 0. With the warm-up, d_k = min(decay, 1 - k ** -power): it forgets the initial weights in short
    runs too (as timm's ModelEmaV3). What the model file does not hold, the average or the last weights, is written beside it
    as model-average.safetensors or model-last.safetensors, and can be certified just as well.
    """

    decay: float = Field(
        0.999, ge=0, lt=1, description="weight of the average so far, at each step", json_schema_extra=unit("1")
    )
    warmup: bool = Field(True, description="let the decay grow with the steps until it is reached")
    power: float = Field(2 / 3, gt=0, le=1, description="how fast it grows; 1: the plain mean of all steps so far")
    use: Literal["average", "last"] = Field("average", description="which weights the model file holds")

    def begin(self, run: Run, state: dict[str, Any]) -> None:
        """Goes on with the average of a checkpoint, on the model's device; a new one begins as the initial weights."""
        state.setdefault("steps", 0)
        before = state.get("average", {})
        state["average"] = {
            name: before[name].to(value.device) if name in before else value.clone() for name, value in _tensors(run).items()
        }

    def after_step(self, run: Run, state: dict[str, Any]) -> None:
        """Moves the average by one step."""
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        state["steps"] += 1
        now, average = _tensors(run), state["average"]
        means = [name for name, value in now.items() if value.is_floating_point()]
        move = get_ema_multi_avg_fn(self.decay_at(state["steps"]))  # type: ignore[no-untyped-call]
        move([average[name] for name in means], [now[name] for name in means], state["steps"])
        for name in now.keys() - set(means):  # counters
            average[name].copy_(now[name])

    def decay_at(self, step: int) -> float:
        """The weight of the average so far at optimiser step `step` (from 1), in [0, decay]."""
        if step <= 1:
            return 0.0
        return float(min(self.decay, 1 - step**-self.power)) if self.warmup else self.decay

    def end(self, run: Run, state: dict[str, Any]) -> None:
        """Writes the weights that are not chosen beside the model file, and leaves the chosen ones in the model."""
        last = {name: value.clone() for name, value in _tensors(run).items()}
        if self.use == "average":
            run.save_model("last")
            run.model.load_state_dict(state["average"])
        else:
            run.model.load_state_dict(state["average"])
            run.save_model("average")
            run.model.load_state_dict(last)


def _tensors(run: Run) -> dict[str, Tensor]:
    """The weights and statistics of the model, which share their memory with it."""
    return {name: value.detach() for name, value in run.model.state_dict().items()}
