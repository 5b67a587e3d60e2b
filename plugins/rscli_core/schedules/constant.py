"""One learning rate."""

from __future__ import annotations

from rscli_core.schedules._decay import WarmUp


class Constant(WarmUp):
    """One learning rate for the whole run, after a linear warm-up if one is wanted."""
