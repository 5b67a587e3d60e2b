"""CIFAR-10 (Krizhevsky 2009)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rscli.api import DataSpec, Finding, MemoryImages, Transform
from rscli.errors import InputError
from rscli_core.datasets._folders import fetching, name_some, unknown_split
from rscli_core.datasets._images import AUGMENTATIONS, AugmentedSet

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
ARCHIVE = "cifar-10-python.tar.gz"
HINT = f"`--download` fetches them; it unpacks {ARCHIVE} without a network if that is in the data folder."


class Cifar10(AugmentedSet):
    """CIFAR-10: 32x32 RGB photographs, ten classes; 50,000 for training, 10,000 for testing."""

    def spec(self, root: Path) -> DataSpec:
        """Ten classes of 32x32 RGB images; training images are padded by 4, cropped at random, and flipped."""
        return DataSpec(
            class_names=CLASSES,
            shape=(3, 32, 32),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
            test_transform=Transform(channels=3, resize=32, crop=(32, 32)),
            augmentation=self.augmentation(AUGMENTATIONS["crop-flip"]),
            sizes={"train": 50_000, "test": 10_000},
        )

    def load(self, split: str, root: Path, *, download: bool = False) -> MemoryImages:
        """The images of `train` or `test` from `root`/cifar-10-batches-py.

        Raises `InputError` for other splits, and for files that are missing or not the published ones.
        """
        import numpy as np

        if split not in ("train", "test"):
            raise unknown_split("cifar10", split)
        if download and _missing(root):
            self._download(root)
        if missing := _missing(root):
            raise InputError(f"CIFAR-10 is not complete: {_folder(root)} lacks {name_some(missing)}", HINT)
        data = self._read(root, train=split == "train")
        return MemoryImages(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), np.array(data.targets, np.int64))

    def check(self, root: Path) -> list[Finding]:
        """Whether the seven files are there."""
        if missing := _missing(root):
            return [Finding(False, f"cifar10: {_folder(root)} lacks {name_some(missing)}", HINT)]
        return [Finding(True, f"cifar10 is in {_folder(root)}")]

    def _download(self, root: Path) -> None:
        from torchvision.datasets import CIFAR10

        hint = f"Put {ARCHIVE} into {root}; `--download` then needs no network."
        fetching("CIFAR-10", root, lambda: CIFAR10(str(root), download=True), hint)

    def _read(self, root: Path, *, train: bool) -> CIFAR10:
        from torchvision.datasets import CIFAR10

        # The files are pickles, and a pickle can run any code. torchvision compares the MD5 of every batch file, and of
        # batches.meta, with the published one before it unpickles it, and raises RuntimeError if they differ.
        try:
            return CIFAR10(str(root), train=train)
        except (OSError, RuntimeError) as cause:
            hint = f"Delete {_folder(root)}, and run again with --download."
            raise InputError(f"the files in {_folder(root)} are not those of CIFAR-10 (their MD5 differs)", hint) from cause


def _folder(root: Path) -> Path:
    return root / "cifar-10-batches-py"


def _missing(root: Path) -> list[str]:
    return [name for name in FILES if not (_folder(root) / name).is_file()]
