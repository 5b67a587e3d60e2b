"""The loss, the attack and the noise of an optimiser step: the configured ones, or as `[ramps]` moves their numbers."""

from __future__ import annotations

from typing import cast

from pydantic import ValidationError

from rscli.api import Attack, Loss, Noise, Plugin
from rscli.config.layers import Resolved
from rscli.config.problems import faults
from rscli.config.ramps import moved, value_at
from rscli.errors import InputError


def ramped(resolved: Resolved, epoch: float) -> tuple[Loss, Attack | None, Noise]:
    """Loss, attack and noise after `epoch` epochs, with a fraction inside one: the very same plugins if nothing moves them.

    Raises `InputError` if a plugin does not take what is between the start and the end of its ramps.
    """
    loss, attack, noise = (_at(resolved, section, epoch) for section in ("loss", "attack", "noise"))
    return cast(Loss, loss), cast("Attack | None", attack), cast(Noise, noise)


def ramp_values(resolved: Resolved, epoch: float) -> dict[str, float]:
    """The ramped numbers after `epoch` epochs, by dotted key: `loss.lbd`."""
    return {
        f"{section}.{field}": value
        for section in resolved.config.ramps
        for field, value in _values(resolved, section, epoch).items()
    }


def _values(resolved: Resolved, section: str, epoch: float) -> dict[str, float]:
    plugin, epochs = resolved.plugins[section], resolved.config.epochs
    ramps = resolved.config.ramps.get(section, {})
    return {f: value_at(ramp, getattr(plugin, f), epoch, epochs) for f, ramp in ramps.items() if ramp is not None}


def _at(resolved: Resolved, section: str, epoch: float) -> Plugin | None:
    plugin = resolved.plugins.get(section)
    if plugin is None or section not in resolved.config.ramps:
        return plugin
    values = _values(resolved, section, epoch)
    if all(value == getattr(plugin, field) for field, value in values.items()):
        return plugin
    try:
        return moved(plugin, values)
    except ValidationError as cause:
        text = f"after {epoch:.3g} epochs the ramps of {section} do not fit it: {'; '.join(faults(cause))}"
        raise InputError(text, f"Change or leave out [ramps.{section}].") from cause
