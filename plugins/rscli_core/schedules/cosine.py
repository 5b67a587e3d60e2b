"""Half a cosine: Loshchilov & Hutter, SGDR, ICLR 2017 (arXiv 1608.03983), equation 5, without restarts."""

from __future__ import annotations

import math

from rscli_core.schedules._decay import Decay


class Cosine(Decay):
    """Linear warm-up, then half a cosine down to a floor.

    After the warm-up (and `hold`), at the share t of the epochs that are left, the learning rate is multiplied by

        floor + (1 - floor) * (1 + cos(pi t)) / 2

    A run that is no longer than its warm-up only warms up.
    """

    def _shape(self, share: float) -> float:
        return (1 + math.cos(math.pi * share)) / 2
