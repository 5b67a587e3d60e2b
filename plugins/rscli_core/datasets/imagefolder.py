"""Anybody's images, sorted into one folder per class."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from rscli.api import (
    COMMON_SUFFIXES,
    DataSpec,
    FileImages,
    Finding,
    class_folder,
    class_folders,
    has_images,
    list_images,
    loose_images,
)
from rscli.errors import InputError
from rscli_core.datasets._folders import count, labelled_images, name_some, unknown_split
from rscli_core.datasets._images import ImageSet


class ImageFolder(ImageSet):
    """A folder of images: SPLIT/CLASS/IMAGE, with the splits train and test (or val), or CLASS/IMAGE, in any common format.

    Images in folders below a class folder belong to the class. Hidden files, and what is no image, are skipped and counted.
    Without a test split, `split` holds out a share of the images. Each image is on its side by a hash of its path and
    `split_seed`: it stays there when others are added or removed, and the share is met about, not exactly.
    """

    path: str = Field("", description="folder of the splits, relative to the data folder or absolute; empty: the data folder")
    split: float = Field(
        0.0, ge=0, lt=1, description="share of the images that is held out as the test split, where there is none; 0: none is"
    )
    split_seed: int = Field(0, ge=0, description="another one holds out other images")

    def spec(self, root: Path) -> DataSpec:
        """Class names are those of the folders in train/, or in the first split there is. Raises `InputError` without any."""
        home = self._home(root)
        if self.split:
            classes, _, held = self._sides(home)
            return self.described(classes, {"train": held.count(False), "test": held.count(True)})
        splits = [name for name in ("train", "test") if self._find(name, home).is_dir()]
        if not splits:
            raise InputError(f"neither train/, test/ nor val/ is in the folder {home}", _expected(home))
        classes = self._classes(self._find(splits[0], home))
        sizes = {
            name: sum(len(list_images(class_folder(self._find(name, home), each)).paths) for each in classes) for name in splits
        }
        return self.described(classes, sizes)

    def load(self, split: str, root: Path, *, download: bool = False) -> FileImages:
        """The files of a split, by class, then by name; marked to be cached in memory, as `cache` says.

        Raises `InputError` if the split is not there, has images outside the class folders, no images, or unknown classes.
        """
        home = self._home(root)
        files = self._held_out(split, home) if self.split else self._found(split, home)
        return replace(files, cache=self.in_memory(len(files.paths)))

    def _found(self, split: str, home: Path) -> FileImages:
        """The files of a split that has its own folder."""
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
        return files

    def _held_out(self, split: str, home: Path) -> FileImages:
        """The files of a split that is made here."""
        if split not in ("train", "test"):
            raise unknown_split("imagefolder", split)
        _, files, held = self._sides(home)
        chosen = [place for place, test in enumerate(held) if test == (split == "test")]
        return replace(files, paths=[files.paths[place] for place in chosen], labels=files.labels[chosen])

    def _sides(self, home: Path) -> tuple[list[str], FileImages, list[bool]]:
        """The classes, all files, and which are held out. Raises `InputError` if none is, or all of a class are."""
        folder = self._whole(home)
        classes = self._classes(folder)
        files = labelled_images(folder, classes)
        held = [self._is_test(path.relative_to(folder)) for path in files.paths]
        trained = {int(label) for label, test in zip(files.labels, held, strict=True) if not test}
        if empty := [name for label, name in enumerate(classes) if label not in trained]:
            hint = "Choose a smaller data.split, or another data.split_seed."
            raise InputError(f"data.split = {self.split} leaves no training image of: {name_some(empty)}", hint)
        if not any(held):
            text = f"data.split = {self.split} holds out none of the {count(len(held), 'image')} in {folder}"
            raise InputError(text, "Choose a larger data.split, or another data.split_seed.")
        return classes, files, held

    def _is_test(self, path: Path) -> bool:
        """Whether the image `path`, below the folder of the classes, is held out: by a hash, uniform in [0, 1)."""
        text = f"{self.split_seed}\0{unicodedata.normalize('NFC', path.as_posix())}"
        digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.split * 2**64

    def _whole(self, home: Path) -> Path:
        """The folder of the classes that are to be split: train/, or the one with the class folders themselves."""
        if self._find("test", home).is_dir():
            there = self._find("test", home)
            raise InputError(f"data.split = {self.split} holds out a test split, but {there} is one", "Leave data.split out.")
        return home / "train" if (home / "train").is_dir() else home

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


def _refuse_loose(folder: Path) -> None:
    if loose := loose_images(folder):
        text = f"{folder} has {count(len(loose), 'image')} outside any class folder ({name_some(loose, 2)})"
        raise InputError(text, f"Move each into {folder / 'CLASS'}.")


def _expected(home: Path) -> str:
    return (
        f"Expected: {home}/train/CLASS/IMAGE and {home}/test/CLASS/IMAGE. `--set data.path=FOLDER` names another folder; "
        "`--set data.split=0.1` takes CLASS/IMAGE, and holds out a tenth as the test split."
    )
