"""ImageNet, ILSVRC 2012 (Russakovsky et al. 2015)."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rscli.api import (
    DataSpec,
    FileImages,
    Finding,
    Transform,
    class_folder,
    class_folders,
    has_images,
    loose_images,
)
from rscli.errors import InputError
from rscli_core.datasets._folders import count, labelled_images, name_some, unknown_split
from rscli_core.datasets._images import AUGMENTATIONS, AugmentedSet

FOLDERS = {"train": "train", "test": "val", "val": "val"}
"""The folder of each split: the held-out images of the field are those of val/."""


class ImageNet(AugmentedSet):
    """ImageNet (ILSVRC 2012): photographs cropped to 224x224, 1000 classes; read from imagenet/{train,val}/CLASS/*.JPEG.

    The split `test` is the folder val/. Files come by class, then by name, so that every hundredth test image is the field's
    subset of 500.
    """

    classes: int = Field(1000, ge=2, description="class folders in train/ and in val/ (fewer for a subset)")

    def spec(self, root: Path) -> DataSpec:
        """RGB 224x224 out of a shorter side of 256; class names are those of the folders, or numbers where there are none."""
        numbers = [str(label) for label in range(self.classes)]
        folders = [class_folders(_home(root) / name) for name in ("train", "val")]
        return DataSpec(
            class_names=tuple(next((names for names in folders if len(names) == self.classes), numbers)),
            shape=(3, 224, 224),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            test_transform=Transform(channels=3, resize=256, crop=(224, 224)),
            augmentation=self.augmentation(AUGMENTATIONS["resized-crop"]),
            sizes={"train": 1_281_167, "test": 50_000} if self.classes == 1000 else {},
        )

    def load(self, split: str, root: Path, *, download: bool = False) -> FileImages:
        """The files of `train` or `test` (`val` is another name for it).

        Raises `InputError` for other splits, and one that names every problem of the folders.
        """
        if split not in FOLDERS:
            raise unknown_split("imagenet", split)
        folder = _home(root) / FOLDERS[split]
        if not folder.is_dir():
            there = "ImageNet cannot be downloaded without an account: " if download else ""
            raise InputError(f"there is no folder {folder}", there + _expected(root))
        if problems := self._problems(_home(root)):
            lines = [f"the ImageNet folders in {_home(root)} are not as expected:"]
            lines += [f"  {found.text}. {found.hint}" for found in problems]
            raise InputError("\n".join(lines), "`rscli doctor` checks them again.")
        return labelled_images(folder, class_folders(folder))

    def check(self, root: Path) -> list[Finding]:
        """Every problem of the folders, or that there is none; lists them, but opens no file."""
        home = _home(root)
        there = [name for name in ("train", "val") if (home / name).is_dir()]
        if not there:
            return [Finding(False, f"imagenet: neither train/ nor val/ is in {home}", _expected(root))]
        problems = [Finding(False, f"imagenet: {each.text}", each.hint) for each in self._problems(home)]
        return problems or [Finding(True, f"imagenet: {' and '.join(f'{name}/' for name in there)} in {home}")]

    def _problems(self, home: Path) -> list[Finding]:
        """What is wrong with the folders that are there, all of it."""
        classes = {name: class_folders(home / name) for name in ("train", "val") if (home / name).is_dir()}
        found = [problem for name, folders in classes.items() for problem in self._split_problems(home / name, folders)]
        if len(classes) == 2 and all(classes.values()):
            found += _differences(classes)
        return found

    def _split_problems(self, folder: Path, classes: list[str]) -> list[Finding]:
        found = []
        if loose := loose_images(folder):
            text = f"{folder.name}/ has {count(len(loose), 'image')} outside any class folder ({name_some(loose, 2)})"
            found.append(Finding(False, text, f"Move each into {folder.name}/CLASS/, as the list of labels says."))
        elif not classes:
            hint = f"Unpack the images into {folder.name}/CLASS/, one folder per class."
            found.append(Finding(False, f"{folder.name}/ has no class folders", hint))
        if classes and len(classes) != self.classes:
            text = f"{folder.name}/ has {count(len(classes), 'class folder')}, and {self.classes:,} are expected"
            hint = f"Complete it; or, for a subset, say so: --set data.classes={len(classes)}."
            found.append(Finding(False, text, hint))
        if empty := [name for name in classes if not has_images(class_folder(folder, name))]:
            text = f"{count(len(empty), 'class folder')} of {folder.name}/ without images: {name_some(empty)}"
            found.append(Finding(False, text, "Unpack the images of each, or remove the folder from train/ and val/."))
        return found


def _differences(classes: dict[str, list[str]]) -> list[Finding]:
    """Classes that only one of train/ and val/ has: the labels would not agree."""
    found = []
    for name, other in (("val", "train"), ("train", "val")):
        if missing := sorted(set(classes[other]) - set(classes[name])):
            text = f"{name}/ lacks {count(len(missing), 'class', 'classes')} of {other}/: {name_some(missing)}"
            found.append(Finding(False, text, f"Add to {name}/ what is missing, or remove it from {other}/."))
    return found


def _home(root: Path) -> Path:
    """The folder with train/ and val/: `root`/imagenet, or `root` itself."""
    inside = root / "imagenet"
    if any((inside / name).is_dir() for name in ("train", "val")):
        return inside
    return root if any((root / name).is_dir() for name in ("train", "val")) else inside


def _expected(root: Path) -> str:
    return (
        f"Expected: {root / 'imagenet'}/train/CLASS/*.JPEG and val/CLASS/*.JPEG, a folder per class; --data-dir names another."
    )
