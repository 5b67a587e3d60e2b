"""The one way in which the host calls plugins: what they raise becomes one message, and what they return is checked.

    with calling(certifier, "decide"):
        decision = certifier.decide(counts, n, plan)

The checks of what comes back are beside the calls, where their meaning is known; they say `broken(plugin, method, what)`.
"""

from __future__ import annotations

import math
import os
from types import TracebackType
from typing import Any, SupportsFloat

import torch

from rscli.api import Certifier, Noise, Plugin
from rscli.errors import PluginError, RscliError, reason
from rscli.registry import origin_of
from rscli.runtime.files import explained
from rscli.runtime.memory import out_of_memory


def described(plugin: Plugin) -> str:
    """The plugin in a message: its kind and name, its package and version; its class where no package announces it."""
    entry = origin_of(type(plugin))
    kind = {"losses": "loss", "noises": "noise"}.get(plugin.kind, plugin.kind.removesuffix("s"))
    return (
        f"the {kind} {type(plugin).__name__}"
        if entry is None
        else f"the {kind} {entry.name} of {entry.package} {entry.version[:19]}"
    )


def broken(plugin: Plugin, method: str, what: str) -> PluginError:
    """The error for a plugin whose `method` returned something wrong."""
    return PluginError(
        f"{described(plugin)} breaks its contract: {method} {what}", "Report this to its author; --debug shows more."
    )


class calling:  # noqa: N801  # reads as a phrase
    """While the body calls `method` of `plugin`: an exception that no user can act on becomes a `PluginError` that names it.

    Our own errors, a lack of memory, and requests to stop pass through. What the system refuses is said in words.
    """

    __slots__ = ("method", "plugin")

    def __init__(self, plugin: Plugin, method: str) -> None:
        self.plugin, self.method = plugin, method

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, RscliError | MemoryError | KeyboardInterrupt):
            return
        if not isinstance(error, Exception) and type(error).__module__.startswith("rscli."):  # what a signal raises
            return
        if isinstance(error, RuntimeError) and out_of_memory(error):
            return
        if isinstance(error, OSError) and error.errno is not None and isinstance(error.filename, str | bytes):
            where = os.fsdecode(error.filename)
            raise explained(error, f"{described(self.plugin)} cannot access {where}") from error
        raise PluginError(
            f"{described(self.plugin)} failed in {self.method}: {reason(error)}",
            "Report this to its author; --debug shows where it happened.",
        ) from error


def draw_noise(smoothing: Noise, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Float32 noise of `shape` (any shape) on `device`, drawn by the plugin `smoothing`; all but its values is checked."""
    with calling(smoothing, "sample"):
        noise = smoothing.sample(shape, generator=generator, device=device)
    if not isinstance(noise, torch.Tensor):
        raise broken(smoothing, "sample", f"returned {noise!r:.80}, which is not a tensor")
    if tuple(noise.shape) != tuple(shape) or noise.device.type != device.type or noise.dtype != torch.float32:
        found = f"{tuple(noise.shape)}, {noise.dtype}, on {noise.device}"
        raise broken(smoothing, "sample", f"returned noise of {found}, where {tuple(shape)}, float32, on {device} is expected")
    return noise


def number(plugin: Plugin, method: str, what: str, value: Any) -> float:
    """`value` as a float. Raises `PluginError` unless it is a finite number; `what` names it."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat) or not math.isfinite(float(value)):
        raise broken(plugin, method, f"gave {what} = {_shown(value)}, which is not a finite number")
    return float(value)


def largest_p_a(certifier: Certifier, n: int) -> float:
    """The largest lower bound that `n` samples can give, as the certifier says: below 1, and 0 where they can prove nothing."""
    with calling(certifier, "largest_p_a"):
        largest = certifier.largest_p_a(n)
    found = number(certifier, "largest_p_a", "a bound", largest)
    if found >= 1:
        raise broken(certifier, "largest_p_a", f"gave {found} for {n} samples, which must be below 1")
    return max(found, 0.0)


def whole(plugin: Plugin, method: str, what: str, value: Any, least: int, most: int) -> int:
    """`value` as an int. Raises `PluginError` unless it is a whole number from `least` to `most`; `what` names it."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value.__index__() <= most:
        raise broken(plugin, method, f"gave {what} = {_shown(value)}, which must be a whole number from {least:,} to {most:,}")
    return int(value.__index__())


def _shown(value: Any) -> str:
    return repr(value)[:80]
