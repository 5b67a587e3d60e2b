"""A part of a split: which images a limit takes, and that they are those images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rscli.api import DataSpec, Transform
from rscli.data.splits import FileSplit, MemorySplit
from rscli.data.subset import first_of_every_class, limited

SPEC = DataSpec(class_names=("a", "b", "c"), shape=(1, 2, 2), test_transform=Transform(channels=1, crop=(2, 2)))


def by_turns(labels: list[int], images: int) -> list[int]:
    """The same, one turn after the other."""
    waiting = {label: [place for place, each in enumerate(labels) if each == label] for label in sorted(set(labels))}
    taken: list[int] = []
    while len(taken) < images:
        for places in waiting.values():
            if places and len(taken) < images:
                taken.append(places.pop(0))
    return sorted(taken)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_classes_take_turns(labels, data):
    images = data.draw(st.integers(1, len(labels)))
    found = first_of_every_class(np.array(labels, np.int64), images)
    assert found.tolist() == by_turns(labels, images)


def test_a_sorted_folder_gives_every_class_its_share():
    labels = np.repeat(np.arange(10), 500)
    counts = np.bincount(labels[first_of_every_class(labels, 1000)])
    assert counts.tolist() == [100] * 10


@pytest.fixture(params=["memory", "files"])
def split(request, tmp_path: Path):
    pixels = np.arange(7 * 4, dtype=np.uint8).reshape(7, 1, 2, 2)
    labels = np.array([2, 0, 0, 1, 1, 0, 2], np.int64)
    if request.param == "memory":
        return MemorySplit(pixels, labels, SPEC)
    paths = [tmp_path / f"{place}.png" for place in range(7)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image[0]).save(path)
    return FileSplit(paths, labels, SPEC)


def test_a_subset_has_those_images(split):
    part = split.part(np.array([5, 1, 6]))
    assert part.labels.tolist() == [0, 0, 2]
    assert all((part.image(here) == split.image(there)).all() for here, there in enumerate([5, 1, 6]))
    assert part.fingerprint() != split.fingerprint()
    assert part.content() != split.content()
    (batch,) = part.batches(seed=0, epoch=0, batch=3, device="cpu")
    assert sorted(batch.indices.tolist()) == [0, 1, 2]
    assert batch.labels.tolist() == part.labels[batch.indices].tolist()


def test_no_limit_and_one_that_is_large_enough_change_nothing(split):
    assert limited(split, None) is split
    assert limited(split, 7) is split
    assert len(limited(split, 3)) == 3
    assert sorted(limited(split, 3).labels.tolist()) == [0, 1, 2]
