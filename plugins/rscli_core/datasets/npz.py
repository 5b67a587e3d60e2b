"""Images in a numpy archive: MedMNIST's files, those of Keras, or your own from `numpy.savez`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rscli.api import DataSpec, MemoryImages, Transform
from rscli.errors import InputError
from rscli_core.datasets._folders import name_some
from rscli_core.datasets._images import AUGMENTATIONS, AugmentedSet, check_normalisation

if TYPE_CHECKING:
    import numpy as np
    from numpy.lib.npyio import NpzFile
    from numpy.typing import NDArray

KEYS = (("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("images_{}", "labels_{}"), ("X_{}", "Y_{}"))
"""What the arrays of a split may be called: MedMNIST's names, those of Keras, ..."""
ALONE = (("images", "labels"), ("x", "y"))
"""The same in an archive that holds one split."""
SPLITS = {"train": ("train",), "test": ("test", "val", "valid")}
"""What the splits may be called, the preferred name first."""
NAMES = ("class_names", "classes")

HINT = "Save what it needs with numpy.savez(FILE, train_images=..., train_labels=..., test_images=..., test_labels=...)."


class Npz(AugmentedSet):
    """A numpy archive, npz/FILE: train_images, train_labels, test_images, test_labels (or x_train, y_train, ...).

    Images are uint8, (n, height, width), (n, height, width, channel) or (n, channel, height, width); labels are whole numbers
    from 0. A folder of train.npz and test.npz with `images` and `labels` does as well. `class_names` may be one more array.
    """

    variant: ClassVar[str | None] = "path"

    path: str = Field(min_length=1, description="the .npz file, or a folder with train.npz and test.npz; below the data folder")
    mean: tuple[float, ...] | None = Field(None, description="mean of each channel, for normalisation; none: no normalisation")
    std: tuple[float, ...] | None = Field(None, description="standard deviation of each channel, given together with mean")
    augment: Literal["none", "crop-flip"] = Field(
        "none", description="what training images undergo: nothing, or padding by 4, crop and flip"
    )

    def spec(self, root: Path) -> DataSpec:
        """From the labels and the shape of the images. Raises `InputError` for an archive that does not hold what it should."""
        shapes: dict[str, tuple[int, int, int, int]] = {}
        labels: dict[str, NDArray[np.int64]] = {}
        names: tuple[str, ...] = ()
        for split in SPLITS:
            if (file := self._file(split, root)) is None:
                continue
            with _archive(file) as archive:
                if (keys := _keys(archive, split, alone=self._alone(root))) is None:
                    continue
                shapes[split] = _shape(_header(archive, keys[0], file), file, keys[0])
                labels[split] = _labels(archive, keys[1], file)
                names = names or _class_names(archive)
        if not shapes:
            raise InputError(f"there are no images and labels in {root / self.path}", HINT)
        shape = next(iter(shapes.values()))[1:]
        largest = max(int(each.max(initial=0)) for each in labels.values())
        try:
            check_normalisation(self.mean, self.std, shape[0])
        except ValueError as cause:
            raise InputError(f"{root / self.path}: {cause}", "Change data.mean and data.std.") from cause
        return DataSpec(
            class_names=names or tuple(str(label) for label in range(max(2, largest + 1))),
            shape=shape,
            mean=self.mean,
            std=self.std,
            test_transform=Transform(channels=3 if shape[0] == 3 else 1, crop=shape[1:]),
            augmentation=self.augmentation(AUGMENTATIONS[self.augment]),
            sizes={split: each[0] for split, each in shapes.items()},
        )

    def load(self, split: str, root: Path, *, download: bool = False) -> MemoryImages:
        """The images of a split; `val` serves as the test split where there is no `test`. Raises `InputError` without them."""
        import numpy as np

        file = self._file(split, root)
        if file is None:
            raise InputError(f"there is no {root / self.path / f'{split}.npz'}", HINT)
        with _archive(file) as archive:
            keys = _keys(archive, split, alone=self._alone(root))
            if keys is None:
                there = name_some(archive.files, 8) or "nothing"
                raise InputError(f"{file} has no images and labels of the split {split!r}; it holds {there}", HINT)
            shape = _shape(_header(archive, keys[0], file), file, keys[0])
            images: NDArray[np.uint8] = _read(archive, keys[0], file)
            labels = _labels(archive, keys[1], file)
        if images.ndim == 4 and images.shape[1:] != shape[1:]:
            images = images.transpose(0, 3, 1, 2)
        if len(labels) != len(images):
            raise InputError(f"{file} has {len(images)} images and {len(labels)} labels of the split {split!r}", HINT)
        return MemoryImages(np.ascontiguousarray(images.reshape(shape)), labels)

    def _alone(self, root: Path) -> bool:
        return (root / Path(self.path).expanduser()).is_dir()

    def _file(self, split: str, root: Path) -> Path | None:
        """The archive of a split; None if a folder has none for it. Raises `InputError` if nothing is there at all."""
        home = root / Path(self.path).expanduser()
        if not home.exists():
            raise InputError(
                f"there is no file or folder {home}", "npz/FILE is below the data folder (--data-dir), or absolute."
            )
        if not home.is_dir():
            return home
        found = (home / f"{name}.npz" for name in SPLITS.get(split, (split,)))
        return next((file for file in found if file.is_file()), None)


@contextmanager
def _archive(file: Path) -> Iterator[NpzFile]:
    """The open archive; nothing in it is unpickled. Raises `InputError` if it is none."""
    import numpy as np

    try:
        opened: Any = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as cause:
        raise InputError(f"{file} is no numpy archive (.npz): {cause}", HINT) from cause
    if not hasattr(opened, "files"):
        raise InputError(f"{file} holds one array, and not the archive that numpy.savez writes", HINT)
    with opened as archive:
        yield archive


def _keys(archive: NpzFile, split: str, *, alone: bool) -> tuple[str, str] | None:
    """The names of the images and labels of a split, if the archive has them."""
    pairs = [(a.format(name), b.format(name)) for name in SPLITS.get(split, (split,)) for a, b in KEYS]
    pairs += ALONE if alone else ()
    return next((pair for pair in pairs if all(key in archive.files for key in pair)), None)


@contextmanager
def _reading(file: Path, key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as cause:  # an array of objects is a pickle
        raise InputError(f"the array {key!r} of {file} cannot be read: {cause}", HINT) from cause


def _read(archive: NpzFile, key: str, file: Path) -> Any:
    with _reading(file, key):
        return archive[key]


def _header(archive: NpzFile, key: str, file: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array, which is not read."""
    from numpy.lib import format as npy

    with _reading(file, key), archive.zip.open(f"{key}.npy") as stream:  # type: ignore[union-attr]
        read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
        shape, _, kind = read(stream)
    return shape, kind


def _shape(header: tuple[tuple[int, ...], np.dtype[Any]], file: Path, key: str) -> tuple[int, int, int, int]:
    """Images, channels, height and width. Raises `InputError` for what are no images of 8 bits."""
    shape, kind = header
    if kind != "uint8":
        raise InputError(
            f"{key!r} of {file} is {kind}, and must be uint8", "Save pixels from 0 to 255: images.astype('uint8')."
        )
    if len(shape) == 3:
        return shape[0], 1, *shape[1:]
    if len(shape) == 4 and shape[3] in (1, 3):
        return shape[0], shape[3], shape[1], shape[2]
    if len(shape) == 4 and shape[1] in (1, 3):
        return shape[0], shape[1], shape[2], shape[3]
    wanted = "(n, height, width), with 1 or 3 channels at the end or after n"
    raise InputError(f"{key!r} of {file} has shape {shape}, and must be {wanted}", HINT)


def _labels(archive: NpzFile, key: str, file: Path) -> NDArray[np.int64]:
    import numpy as np

    found = _read(archive, key, file)
    if found.ndim == 2 and found.shape[1] == 1:  # as MedMNIST has them
        found = found[:, 0]
    if found.ndim != 1 or found.dtype.kind not in "iu" or found.min(initial=0) < 0:
        what = f"{found.dtype}, {found.shape}, from {found.min()}" if found.size and found.dtype.kind in "iuf" else found.dtype
        raise InputError(f"{key!r} of {file} must be whole numbers from 0, one an image; it is {what}", HINT)
    labels: NDArray[np.int64] = found.astype(np.int64)
    return labels


def _class_names(archive: NpzFile) -> tuple[str, ...]:
    """The names that the archive gives its classes, if it does."""
    for key in NAMES:
        if key in archive.files and (names := archive[key]).dtype.kind == "U" and names.ndim == 1:
            return tuple(map(str, names))
    return ()
