"""A straight line down to a floor."""

from __future__ import annotations

from rscli_core.schedules._decay import Decay


class Linear(Decay):
    """Linear warm-up, then a straight line down to a floor.

    With `hold`, this is the trapezoid that is also known as warm-up, stable, decay. A run that is no longer than its warm-up
    only warms up.
    """

    def _shape(self, share: float) -> float:
        return 1 - share
