"""What a long certification will cost at most, said before it begins; how long it really takes, its progress tells soon."""

from __future__ import annotations

from datetime import timedelta

from rscli.smoothing.task import CertificationTask


def at_most(task: CertificationTask, first: int, count: int, speed: float, world: int) -> str:
    """A line: the most Monte Carlo samples that certifying `count` images takes, and how long that is.

    `first` is the index of one of them; `speed` is that of this process, in samples per second, and there are `world` of them.
    """
    samples = count * (task.certifier.selection(task.question(first)) + task.certifier.n)
    return (
        f"{count:,} images, at most {samples:,} samples: about {timedelta(seconds=int(samples / speed / world))} at this speed"
    )
