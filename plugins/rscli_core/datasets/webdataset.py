"""Images in tar shards, as the library webdataset writes them. It is not needed to read them."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rscli.api import DataSpec, EncodedImages, Finding, is_image_name, skipped_text
from rscli.errors import InputError
from rscli_core.datasets._folders import count, name_some
from rscli_core.datasets._images import ImageSet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
"""What the splits may be called, the preferred name first."""
CLASS_FILES = ("classes.txt", "classnames.txt")
LARGEST_LABEL = 2**20
"""Bytes of a member with a label, at most."""


class WebDataset(ImageSet):
    """Tar shards of images and labels, webdataset/FOLDER: train*.tar and test*.tar (or val*.tar), or folders called so.

    A sample is the members of a shard that share the name before the first dot: one image, and the label. Every image can be
    read by itself, so shards are shuffled, resumed and certified like folders; a shard must not be compressed.
    """

    variant: ClassVar[str | None] = "path"

    path: str = Field("", description="the folder of the shards: below the data folder, or absolute; empty: the data folder")
    label: str = Field(
        "cls",
        min_length=1,
        description="the member with the label, a whole number from 0: its suffix (cls), or json.KEY for a value in JSON",
    )

    def spec(self, root: Path) -> DataSpec:
        """Class names are the lines of classes.txt beside the shards, or numbers. Raises `InputError` without shards."""
        home = root / Path(self.path).expanduser()
        found = {split: self._samples(split, home) for split in SPLITS if _shards(home, split)}
        if not found:
            raise InputError(f"there are no shards in {home}", _expected(home))
        largest = max(int(each.labels.max()) for each in found.values())
        return self.described(
            _class_names(home) or [str(label) for label in range(max(2, largest + 1))],
            {split: len(each.labels) for split, each in found.items()},
        )

    def load(self, split: str, root: Path, *, download: bool = False) -> EncodedImages:
        """The images of a split, by shard, in the order of the shard. Raises `InputError` for what is missing or broken."""
        home = root / Path(self.path).expanduser()
        if not _shards(home, split):
            raise InputError(f"there are no shards of the split {split!r} in {home}", _expected(home))
        samples = self._samples(split, home)
        names = _class_names(home)
        if names and samples.labels.max() >= len(names):
            listed = count(len(names), "class", "classes")
            text = f"{home} has {listed} in its list, and an image with label {samples.labels.max()}"
            raise InputError(text, "Add the missing names, in the order of the labels from 0.")
        return EncodedImages(
            Members(samples.shards, samples.shard, samples.offset, samples.size),
            Names(samples.shards, samples.shard, samples.keys),
            samples.labels,
            cache=self.in_memory(len(samples.labels)),
            note=f"{home}: {text}" if (text := skipped_text(samples.skipped)) else "",
        )

    def check(self, root: Path) -> list[Finding]:
        """How many shards each split has, where there are any; opens none."""
        home = root / Path(self.path).expanduser()
        found = {split: len(_shards(home, split)) for split in SPLITS}
        if not self.path or not any(found.values()):
            return []
        return [Finding(True, f"webdataset: {count(n, 'shard')} of {split} in {home}") for split, n in found.items() if n]

    def _samples(self, split: str, home: Path) -> Samples:
        shards = _shards(home, split)
        indexes = [index_of(shard, self.label, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
        samples = joined(shards, indexes)
        if not len(samples.labels):
            what = skipped_text(samples.skipped) or "nothing is in them"
            raise InputError(f"the shards of {split!r} in {home} hold no image with a label {self.label!r}: {what}", HINT)
        return samples


HINT = "`--set data.label=SUFFIX` (or json.KEY) says where the label is."


# --- an index of shards ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """The samples of one shard: keys, labels, and where each image is, in bytes; and what was skipped."""

    keys: list[str]
    labels: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    skipped: Counter[str]


@dataclass(frozen=True)
class Samples:
    """The samples of several shards; `shard` (n,) says in which one each image is."""

    shards: tuple[Path, ...]
    keys: list[str]
    labels: NDArray[np.int64]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    skipped: Counter[str]


def joined(shards: Sequence[Path], indexes: Sequence[Index]) -> Samples:
    """The samples of all `shards`, in their order."""
    import numpy as np

    return Samples(
        tuple(shards),
        [key for each in indexes for key in each.keys],
        np.concatenate([each.labels for each in indexes]),
        np.repeat(np.arange(len(shards), dtype=np.int32), [len(each.keys) for each in indexes]),
        np.concatenate([each.offset for each in indexes]),
        np.concatenate([each.size for each in indexes]),
        sum((each.skipped for each in indexes), Counter[str]()),
    )


@lru_cache(maxsize=65_536)
def index_of(shard: Path, label: str, size: int, changed: int) -> Index:  # noqa: ARG001
    """The samples of a `shard`, whose headers are read once for its `size` and time of change.

    Raises `InputError` if it is broken. The content of images is not read; members are found by name, and nothing is unpickled.
    """
    import numpy as np

    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    suffix, _, inside = label.partition(".") if label.startswith("json.") else (label, "", "")
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in _files(archive):
                key, kind = _parts(member.name)
                if is_image_name(f"x.{kind}") and key not in images:
                    images[key] = (member.offset_data, member.size)
                elif kind == suffix:
                    labels[key] = _label(archive, member, inside, shard)
    except (tarfile.TarError, OSError, EOFError) as cause:
        hint = "Replace it; shards are plain .tar files, not compressed."
        raise InputError(f"the shard {shard} cannot be read: {cause}", hint) from cause
    if lacking := len(images.keys() - labels.keys()):
        skipped["images without a label"] = lacking
    keys = [key for key in images if key in labels]
    places = np.array([images[key] for key in keys], np.int64).reshape(-1, 2)
    return Index(keys, np.array([labels[key] for key in keys], np.int64), places[:, 0], places[:, 1], skipped)


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive; those before are forgotten, where `tarfile` would keep them all."""
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]
        if member.isreg() and not member.issparse():
            yield member
    # `tarfile` takes the end of a file that was cut, or what is no header, for the end of the archive.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it ends, or is damaged, before the mark of its end")


def _parts(name: str) -> tuple[str, str]:
    """`a/b.c.d` as webdataset divides it: the key `a/b` and, in lower case, the suffix `c.d`."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return f"{folder}{slash}{key}", suffix.lower()


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, inside: str, shard: Path) -> int:
    """The label in a member. Raises `InputError` if it is no whole number from 0."""
    stream = archive.extractfile(member)
    text = stream.read(LARGEST_LABEL) if stream is not None else b""
    try:
        found: Any = json.loads(text)[inside] if inside else int(text)
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 2**31:
        shown = text[:40].decode("utf-8", "replace")
        where = f"the value {inside!r} of {member.name}" if inside else member.name
        raise InputError(f"{where} in {shard} is no label, a whole number from 0: {shown!r}", HINT)
    return found


class Members(Sequence[bytes]):
    """The content of images in shards. Each is read through a file of its own, as several processes read at once."""

    def __init__(
        self, shards: Sequence[Path], shard: NDArray[np.int32], offset: NDArray[np.int64], size: NDArray[np.int64]
    ) -> None:
        self._shards, self._shard, self._offset, self._size = shards, shard, offset, size

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index: Any) -> Any:
        size = int(self._size[index])
        with self._shards[self._shard[index]].open("rb") as file:
            file.seek(int(self._offset[index]))
            content = file.read(size)
        if len(content) < size:
            raise InputError(f"the shard {file.name} became shorter while it was in use", "Restore it.")
        return content


class Names(Sequence[str]):
    """What messages call images: the shard and the key."""

    def __init__(self, shards: Sequence[Path], shard: NDArray[np.int32], keys: Sequence[str]) -> None:
        self._shards, self._shard, self._keys = shards, shard, keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: Any) -> Any:
        return f"{self._shards[self._shard[index]].name}: {self._keys[index]}"


# --- a folder of shards ------------------------------------------------------------------------------------------------------


def _shards(home: Path, split: str) -> list[Path]:
    """The shards of a split, by name: SPLIT/*.tar, or those with the word in their names."""
    for name in SPLITS.get(split, (split,)):
        found = sorted((home / name).glob("*.tar")) or sorted(file for file in home.glob("*.tar") if name in _words(file.stem))
        if found:
            return found
    return []


def _words(text: str) -> list[str]:
    """`imagenet-train-000012` in its words."""
    return "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()


def _class_names(home: Path) -> list[str]:
    """The lines of classes.txt, without empty ones; none if there is no such file."""
    for name in CLASS_FILES:
        if (home / name).is_file():
            lines = (home / name).read_text(encoding="utf-8-sig").splitlines()
            return [line.strip() for line in lines if line.strip()]
    return []


def _expected(home: Path) -> str:
    there = name_some(sorted(file.name for file in home.glob("*.tar"))) if home.is_dir() else ""
    seen = f" There are: {there}." if there else ""
    return f"Expected: {home}/train*.tar and test*.tar (or val*.tar), or {home}/train/*.tar.{seen} `--set data.path=FOLDER`."
