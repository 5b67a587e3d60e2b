"""The data of a comparison: filled by `summary`, `groups` and `published`, shown by `tables`, `export` and `plot`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rscli.config.published import PublishedRow
from rscli.results.reader import Results
from rscli.stats import paired

LEVEL = 0.95
"""Confidence of every interval."""

RHO = 0.001
"""The statement about false certificates in a whole table holds with probability 1 - RHO."""


@dataclass(frozen=True)
class Point:
    """Certified accuracy at one radius: `count` images are right with at least this radius; its share, and an interval.

    All of these are of a `lower_bound` if the certifier decided given radii, and not this one.
    """

    radius: float
    count: int
    accuracy: float
    low: float
    high: float
    lower_bound: bool


@dataclass(frozen=True)
class Summary:
    """The figures of one run. What its file does not tell is None.

    `norm` is that of its radii: L2 where the file does not tell, as in all that was written before rscli recorded it. `acr`
    is a `lower_bound` if the certifier decided given radii only. If 0 is none of them, `abstained` counts the images
    without a certificate at the smallest, which is an upper bound (`abstained_upper_bound`). `largest` is the largest radius
    certified for a right answer, `seconds` the sum of the times of all images (None if the file does not say all), and
    `may_be_wrong` how many of all certificates may be wrong, at confidence 1 - RHO.
    """

    name: str
    path: str
    images: int
    sigma: float | None
    n0: int | None
    n: int | None
    alpha: float | None
    certifier: str | None
    norm: str
    acr: float
    lower_bound: bool
    largest: float
    points: tuple[Point, ...]
    abstained: int
    abstained_upper_bound: bool
    saturated: int | None
    samples: int | None
    seconds: float | None
    may_be_wrong: int | None


@dataclass(frozen=True)
class Difference:
    """A run minus the `baseline`, image by image: ACR (of lower bounds, where they are), and one test for each radius that both
    decided (its "first" is the run, "second" the baseline).

    p-values are adjusted over the radii of this pair; several runs against one baseline are not adjusted for each other.
    """

    name: str
    baseline: str
    acr: paired.AcrDifference
    tests: tuple[paired.RadiusTest, ...]


@dataclass(frozen=True)
class GroupPoint:
    """Certified accuracy at one radius: mean and sample standard deviation over the seeds; a `lower_bound` as in a `Point`."""

    radius: float
    accuracy: float
    accuracy_sd: float
    lower_bound: bool


@dataclass(frozen=True)
class Group:
    """Runs, called `members`, that differ in the training seed alone.

    Figures are means over the seeds; `_sd` is the sample standard deviation (divided by one less than there are seeds). All
    members are on the same images, so the choice of the images is not in it. `acr` is a `lower_bound` as in a `Summary`.
    """

    name: str
    members: tuple[str, ...]
    seeds: tuple[int, ...]
    acr: float
    acr_sd: float
    lower_bound: bool
    points: tuple[GroupPoint, ...]


@dataclass(frozen=True)
class PublishedPoint:
    """At one radius: the certified accuracy that was published, and ours minus it. Both are on the images of their own.

    The difference is a `lower_bound` if ours is, as in a `Point`.
    """

    radius: float
    accuracy: float
    difference: float
    lower_bound: bool


@dataclass(frozen=True)
class Beside:
    """A result, or the mean of a group, beside the published `row` that is nearest to it.

    `settings` and `protocol` say where ours and theirs differ. Of our `images`, `shared` are among those of the row.
    `acr` is ours, a `lower_bound` as in a `Summary`; `difference` is ours minus theirs (which the tables cut off after four
    digits), then a lower bound too. Two errors are in it, each as a standard deviation:

    - `spread`, over training seeds: the variance of one run, pooled from the seeds on both sides, times 1/(our seeds) +
      1/(their seeds); None where neither side has two seeds.
    - `sampling`, of the images: with variance v of an image's radius (0 where it is wrong), a images of ours and b of theirs,
      c of them shared, its square is v (1/a + 1/b - 2c/ab), as if images were drawn at random; 0 on the same images. None for
      a single image.

    `margin` = 2 sqrt(spread^2 + sampling^2), of what is known. `within` says whether the difference is at most that; it is
    None where that cannot be told: under another protocol, or beyond a margin from which an error is missing.
    """

    name: str
    row: PublishedRow
    settings: tuple[str, ...]
    protocol: tuple[str, ...]
    images: int
    shared: int
    acr: float
    lower_bound: bool
    difference: float
    spread: float | None
    sampling: float | None
    margin: float
    within: bool | None
    points: tuple[PublishedPoint, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything that a table or a plot shows. `runs` are aligned; `notes` must reach the reader.

    `groups` and `published` are filled by `rscli.report.groups.grouped` and `rscli.report.published.with_published`.
    """

    radii: tuple[float, ...]
    runs: tuple[Results, ...]
    summaries: tuple[Summary, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    groups: tuple[Group, ...] = ()
    published: tuple[Beside, ...] = ()
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What differs in training between the runs that record it: settings by run and dotted key."""

    @property
    def norm(self) -> str:
        """The norm of the radii, such as L2; several where the results differ in it."""
        return "/".join(dict.fromkeys(summary.norm for summary in self.summaries))
