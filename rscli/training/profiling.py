"""A profile of a few optimiser steps: where their time goes, as a trace that Chrome and Perfetto draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from rscli.runtime.files import replacing
from rscli.runtime.progress import Progress

SKIPPED = 5
"""Steps before the profile: the first ones compile, tune and allocate."""
STEPS = 5
"""Steps in the profile."""


@contextmanager
def profiled(path: Path, after_step: Callable[[], None], progress: Progress) -> Iterator[Callable[[], None]]:
    """What to call after every step in place of `after_step`: it profiles a few of them, and writes the trace to `path`.

    If the body ends earlier, what there is is written; nothing, with a warning, if it has no more than the skipped steps.
    """
    steps = 0

    def write(profile: torch.profiler.profile) -> None:
        if steps <= SKIPPED:
            return
        with replacing(path) as beside:
            profile.export_chrome_trace(str(beside))
        progress.note(f"profile: {path}; open it in chrome://tracing or ui.perfetto.dev")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    plan = torch.profiler.schedule(skip_first=SKIPPED - 1, wait=0, warmup=1, active=STEPS, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=plan, on_trace_ready=write, acc_events=True) as profile:

        def follow() -> None:
            nonlocal steps
            after_step()
            steps += 1
            profile.step()

        yield follow
    if steps <= SKIPPED:
        progress.warn(f"no profile is written: this run has no more than {SKIPPED} steps")
