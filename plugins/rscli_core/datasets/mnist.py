"""MNIST (LeCun, Cortes & Burges 1998)."""

from __future__ import annotations

import gzip
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from rscli.api import Dataset, DataSpec, Finding, MemoryImages, Transform
from rscli.errors import InputError
from rscli_core.datasets._folders import fetching, name_some, unknown_split

if TYPE_CHECKING:
    from torchvision.datasets import MNIST

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
HINT = (
    "`--download` fetches them. Without a network, put the four files into that folder, unpacked or as .gz: "
    "`--download` unpacks what it finds there."
)


class Mnist(Dataset):
    """MNIST: 28x28 grey digits, ten classes; 60,000 for training, 10,000 for testing."""

    def spec(self, root: Path) -> DataSpec:
        """Ten classes of 28x28 grey images, without normalisation or augmentation."""
        return DataSpec(
            class_names=tuple("0123456789"),
            shape=(1, 28, 28),
            test_transform=Transform(channels=1, resize=28, crop=(28, 28)),
            sizes={"train": 60_000, "test": 10_000},
        )

    def load(self, split: str, root: Path, *, download: bool = False) -> MemoryImages:
        """The images of `train` or `test` from `root`/MNIST/raw. Raises `InputError` for other splits and missing files."""
        import numpy as np

        if split not in ("train", "test"):
            raise unknown_split("mnist", split)
        if download and _missing(root):
            self._download(root)
        if missing := _missing(root):
            raise InputError(f"MNIST is not complete: {_folder(root)} lacks {name_some(missing)}", HINT)
        data = self._read(root, train=split == "train")
        return MemoryImages(data.data.numpy()[:, None], data.targets.numpy().astype(np.int64))

    def check(self, root: Path) -> list[Finding]:
        """Whether the four files are there."""
        if missing := _missing(root):
            return [Finding(False, f"mnist: {_folder(root)} lacks {name_some(missing)}", HINT)]
        return [Finding(True, f"mnist is in {_folder(root)}")]

    def _download(self, root: Path) -> None:
        from torchvision.datasets import MNIST

        # Before torchvision, which takes only archives that are byte for byte the published ones.
        broken = [name for name in _missing(root) if not _unpack(_folder(root) / name)]
        if not _missing(root):
            return
        hint = f"Put the four files of MNIST into {_folder(root)}, as .gz; `--download` then needs no network."
        if broken:
            hint += f" There is no whole .gz of {name_some(broken)} yet."
        fetching("MNIST", _folder(root), lambda: MNIST(str(root), download=True), hint)

    def _read(self, root: Path, *, train: bool) -> MNIST:
        from torchvision.datasets import MNIST

        try:
            return MNIST(str(root), train=train)
        except (OSError, RuntimeError, ValueError, AssertionError, IndexError) as cause:  # what a truncated file trips
            hint = "Delete the four unpacked files there, and run again with --download."
            raise InputError(f"a file of MNIST in {_folder(root)} is broken: {cause or 'wrong length'}", hint) from cause


def _folder(root: Path) -> Path:
    return root / "MNIST" / "raw"


def _unpack(file: Path) -> bool:
    """Unpacks `file`.gz beside it; False if that is not there, or broken."""
    beside = file.with_name(f"{file.name}.part")
    try:
        with gzip.open(f"{file}.gz") as packed, beside.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        beside.replace(file)
    except (OSError, EOFError, zlib.error):
        beside.unlink(missing_ok=True)
        return False
    return True


def _missing(root: Path) -> list[str]:
    return [name for name in FILES if not (_folder(root) / name).is_file()]
