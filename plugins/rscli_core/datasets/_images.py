"""Settings that data sets share: what training images undergo, and how images of any size become the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rscli.api import Augmentation, Dataset, DataSpec, Transform, unit

MEMORY_LIMIT = 2**30
"""With `cache = "auto"`, the decoded images of a split are held in memory up to this many bytes."""

AUGMENTATIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "crop-flip": {"padding": 4, "flip": True},
    "resized-crop": {"flip": True, "resized_crop": True},
}


class AugmentedSet(Dataset):
    """A data set whose training images may undergo RandAugment and random erasing."""

    rand_augment: int = Field(
        0, ge=0, le=16, description="operations of RandAugment (Cubuk et al. 2020) on each training image; 0: none, usual: 2"
    )
    rand_magnitude: int = Field(9, ge=0, le=30, description="their magnitude, of 30")
    erase: float = Field(
        0.0, ge=0, le=1, description="probability that a random rectangle of a training image is erased (Zhong et al. 2020)"
    )

    def augmentation(self, usual: Mapping[str, Any]) -> Augmentation:
        """What training images undergo: the `usual` moves, and what the settings add."""
        return Augmentation(**usual, rand_augment=self.rand_augment, rand_magnitude=self.rand_magnitude, erase=self.erase)


class SizedSet(Dataset):
    """A data set of images of any size, which become inputs of one size."""

    path: str = Field("", description="where it is: below the data folder, or absolute")
    size: int = Field(
        32,
        ge=1,
        le=8192,
        description="height and width of the input; the shorter side is resized to it, the middle cropped",
        json_schema_extra=unit("pixels"),
    )
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for RGB")
    mean: tuple[float, ...] | None = Field(None, description="mean of each channel, for normalisation; none: no normalisation")
    std: tuple[float, ...] | None = Field(None, description="standard deviation of each channel, given together with mean")
    augment: Literal["none", "crop-flip", "resized-crop"] = Field(
        "crop-flip",
        description="what training images undergo: padding by 4, crop and flip; or a random part, resized, and flip",
    )
    cache: Literal["auto", "memory", "files"] = Field(
        "auto", description="decoded images in memory, or read anew each time; auto: in memory up to 1 GiB a split"
    )


class ImageSet(AugmentedSet, SizedSet):
    """A data set of image files of any size."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_normalisation(self.mean, self.std, self.channels)
        if self.cache == "memory" and self.augment == "resized-crop":
            raise ValueError("augment = resized-crop reads the original files anew each time: cache = memory cannot serve it")
        return self

    def described(self, class_names: Sequence[str], sizes: dict[str, int]) -> DataSpec:
        """What a model must know, for these classes and sizes of splits."""
        return DataSpec(
            class_names=tuple(class_names),
            shape=(self.channels, self.size, self.size),
            mean=self.mean,
            std=self.std,
            test_transform=Transform(channels=self.channels, resize=self.size, crop=(self.size, self.size)),
            augmentation=self.augmentation(AUGMENTATIONS[self.augment]),
            sizes=sizes,
        )

    def in_memory(self, images: int) -> bool:
        """Whether a split of so many images is to be decoded once, and held in memory."""
        fits = images * self.channels * self.size**2 <= MEMORY_LIMIT
        return self.cache == "memory" or (self.cache == "auto" and fits and self.augment != "resized-crop")


def check_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
    """Raises `ValueError` unless `mean` and `std` are both given, for each channel, or neither."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: give both or neither")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values, and there are {channels} channels")
    if std is not None and min(std) < 1e-6:
        raise ValueError(f"every std must be above 0 (1e-6 or more), got {std}")
