"""Anybody's images, sorted into one folder per class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rscli.api import (
    COMMON_SUFFIXES,
    Augmentation,
    Dataset,
    DataSpec,
    FileImages,
    Finding,
    Transform,
    class_folder,
    class_folders,
    has_images,
    list_images,
    loose_images,
    unit,
)
from rscli.errors import InputError
from rscli_core.datasets._folders import count, labelled_images, name_some

MEMORY_LIMIT = 2**30
"""With `cache = "auto"`, the decoded images of a split are held in memory up to this many bytes."""

AUGMENTATIONS = {
    "none": Augmentation(),
    "crop-flip": Augmentation(padding=4, flip=True),
    "resized-crop": Augmentation(flip=True, resized_crop=True),
}


class ImageFolder(Dataset):
    """A folder of images: SPLIT/CLASS/IMAGE, with the splits train and test (or val), in any common format.

    Images in folders below a class folder belong to the class. Hidden files, and what is no image, are skipped and counted.
    """

    path: str = Field("", description="folder of the splits, relative to the data folder or absolute; empty: the data folder")
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
        description="augmentation of training images: padding by 4, crop and flip; or a random resized crop and flip",
    )
    cache: Literal["auto", "memory", "files"] = Field(
        "auto", description="decoded images in memory, or read again each time; auto: in memory up to 1 GiB per split"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values, and there are {self.channels} channels")
        if self.std is not None and min(self.std) < 1e-6:
            raise ValueError(f"every std must be above 0 (1e-6 or more), got {self.std}")
        if self.cache == "memory" and self.augment == "resized-crop":
            raise ValueError("augment = resized-crop reads the original files each time: cache = memory cannot serve it")
        return self

    def spec(self, root: Path) -> DataSpec:
        """Class names are those of the folders in train/, or in the first split there is. Raises `InputError` without any."""
        home = self._home(root)
        splits = [name for name in ("train", "test") if self._find(name, home).is_dir()]
        if not splits:
            raise InputError(f"neither train/, test/ nor val/ is in the folder {home}", _expected(home))
        classes = self._classes(self._find(splits[0], home))
        return DataSpec(
            class_names=tuple(classes),
            shape=(self.channels, self.size, self.size),
            mean=self.mean,
            std=self.std,
            test_transform=Transform(channels=self.channels, resize=self.size, crop=(self.size, self.size)),
            augmentation=AUGMENTATIONS[self.augment],
            sizes={
                name: sum(len(list_images(class_folder(self._find(name, home), each)).paths) for each in classes)
                for name in splits
            },
        )

    def load(self, split: str, root: Path, *, download: bool = False) -> FileImages:
        """The files of a split, by class, then by name; marked to be cached in memory, as `cache` says.

        Raises `InputError` if the split is not there, has images outside the class folders, no images, or unknown classes.
        """
        home = self._home(root)
        folder = self._find(split, home)
        if not folder.is_dir():
            there = name_some(class_folders(home)) or "nothing"
            raise InputError(f"there is no folder {folder} for the split {split!r} (in {home}: {there})", _expected(home))
        _refuse_loose(folder)
        train = self._find("train", home)
        classes = self._classes(train if train.is_dir() else folder)
        if unknown := sorted(set(class_folders(folder)) - set(classes)):
            hint = f"Remove them from {folder}, or add them to {train}."
            raise InputError(f"{folder} has classes that train/ does not have: {name_some(unknown)}", hint)
        files = labelled_images(folder, classes)
        if not files.paths:
            raise InputError(f"no class folder of {folder} holds an image", _expected(home))
        return replace(files, cache=self._in_memory(len(files.paths)))

    def check(self, root: Path) -> list[Finding]:
        """What each split holds, or what is wrong with it; lists the folders, but opens no file."""
        home = self._home(root)
        try:
            splits = {name: self.load(name, root) for name in self.spec(root).sizes}
        except InputError as error:
            return [Finding(False, f"imagefolder: {error.message}", error.hint)]
        return [
            Finding(True, f"imagefolder: {count(len(files.paths), 'image')} in {files.note or self._find(name, home)}")
            for name, files in splits.items()
        ]

    def _home(self, root: Path) -> Path:
        return root / Path(self.path).expanduser()

    def _find(self, split: str, home: Path) -> Path:
        """The folder of a split; val/ serves as the test split where there is no test/."""
        folder = home / split
        return home / "val" if split == "test" and not folder.is_dir() and (home / "val").is_dir() else folder

    def _classes(self, folder: Path) -> list[str]:
        """The class folders, two at least, each with images and no image beside them, or an `InputError`."""
        _refuse_loose(folder)
        classes = class_folders(folder)
        if len(classes) < 2:
            raise InputError(
                f"{folder} has {count(len(classes), 'class folder')}; a classifier needs two", _expected(folder.parent)
            )
        if empty := [name for name in classes if not has_images(class_folder(folder, name))]:
            hint = f"Put files there (any of {COMMON_SUFFIXES}, ...), or remove the folder."
            raise InputError(f"class folders of {folder} without images: {name_some(empty)}", hint)
        return classes

    def _in_memory(self, images: int) -> bool:
        fits = images * self.channels * self.size**2 <= MEMORY_LIMIT
        return self.cache == "memory" or (self.cache == "auto" and fits and self.augment != "resized-crop")


def _refuse_loose(folder: Path) -> None:
    if loose := loose_images(folder):
        text = f"{folder} has {count(len(loose), 'image')} outside any class folder ({name_some(loose, 2)})"
        raise InputError(text, f"Move each into {folder / 'CLASS'}.")


def _expected(home: Path) -> str:
    return f"Expected: {home}/train/CLASS/IMAGE and {home}/test/CLASS/IMAGE. `--set data.path=FOLDER` names another folder."
