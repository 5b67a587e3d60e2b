"""Data sets in the Hugging Face format: tables of images, as parquet or Arrow files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rscli.api import DataSpec, EncodedImages
from rscli.errors import InputError
from rscli_core.datasets._folders import name_some
from rscli_core.datasets._images import ImageSet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
"""What the splits may be called, the preferred name first."""
IMAGES = ("image", "img", "images", "pixel_values")
LABELS = ("label", "labels", "fine_label", "class", "target")
"""What the columns are usually called."""


class HuggingFace(ImageSet):
    """A table of images in the Hugging Face format, hf/FOLDER or hf/USER/NAME: parquet files, or what `save_to_disk` wrote.

    A folder is read where it is; USER/NAME from the cache of huggingface_hub, to which `hf download --repo-type dataset
    USER/NAME` brings it. Only tables are read: no script, and no pickle. Needs the extra `hf` (the library datasets).
    """

    variant: ClassVar[str | None] = "path"

    path: str = Field(
        min_length=1, description="a folder, below the data folder or absolute; or USER/NAME of the hub, downloaded"
    )
    config: str = Field("", description="the folder in it that is meant, where there are several (a configuration)")
    image_column: str = Field("", description="the column of the images; empty: the only one, or image, img, ...")
    label_column: str = Field("", description="the column of the labels; empty: the only one of classes, or label, ...")

    def spec(self, root: Path) -> DataSpec:
        """Class names are those of the column, its texts, or numbers. Raises `InputError` if nothing is there."""
        tables = {split: table for split in SPLITS if (table := self._table(split, root)) is not None}
        if not tables:
            raise InputError(f"there are no splits train or test in {self._home(root)}", _EXPECTED)
        names = self._class_names(next(iter(tables.values())))
        return self.described(names, {split: len(table) for split, table in tables.items()})

    def load(self, split: str, root: Path, *, download: bool = False) -> EncodedImages:
        """The images of a split, in the order of its rows. Raises `InputError` if there is none, or an image has no label."""
        table = self._table(split, root)
        if table is None:
            raise InputError(f"there is no split {split!r} in {self._home(root)}", _EXPECTED)
        first = self._table("train", root)
        names = self._class_names(table if first is None else first)
        column = self._image_column(table)
        images = table.select_columns([column])
        if "Image" in type(images.features[column]).__name__:
            images = images.cast_column(column, _not_decoded())
        return EncodedImages(
            Rows(images, column),
            Names(split, len(table)),
            self._labels(table, names, split),
            cache=self.in_memory(len(table)),
        )

    def _home(self, root: Path) -> Path:
        """The folder of the tables. Raises `InputError` if there is none."""
        local = root / Path(self.path).expanduser()
        home = local if local.is_dir() else _downloaded(self.path, local)
        if self.config and not (home / self.config).is_dir():
            raise InputError(
                f"there is no folder {home / self.config}", "Leave out data.config, or name a folder that is there."
            )
        return home / self.config if self.config else home

    def _table(self, split: str, root: Path) -> Any:
        """The rows of a split, a `datasets.Dataset`; None if there is no such split."""
        _library()
        home = self._home(root)
        for name in SPLITS.get(split, (split,)):
            if (home / name / "state.json").is_file():
                return _read(("arrow", str(home / name)))
            if files := _parquet(home, name):
                return _read(("parquet", *map(str, files)))
        if split == "train" and (home / "state.json").is_file():
            return _read(("arrow", str(home)))
        return None

    def _image_column(self, table: Any) -> str:
        found = [name for name, kind in table.features.items() if type(kind).__name__ == "Image" or _holds_bytes(kind)]
        return _column(self.image_column, found, IMAGES, table, "image")

    def _label_column(self, table: Any) -> str:
        classes = [name for name, kind in table.features.items() if type(kind).__name__ == "ClassLabel"]
        if len(classes) != 1:  # several, or none that says it
            classes = [name for name, kind in table.features.items() if name in LABELS or name in classes]
        return _column(self.label_column, classes, LABELS, table, "label")

    def _class_names(self, table: Any) -> list[str]:
        column = self._label_column(table)
        if names := getattr(table.features[column], "names", None):
            return list(names)
        values = _values(table, column)
        if values and all(isinstance(value, str) for value in values):
            return sorted(set(values))
        return [str(label) for label in range(max([1, *(v for v in values if isinstance(v, int))]) + 1)]

    def _labels(self, table: Any, names: Sequence[str], split: str) -> NDArray[np.int64]:
        """The label of each row. Raises `InputError` if one is missing, or no class."""
        import numpy as np

        column = self._label_column(table)
        place = {name: label for label, name in enumerate(names)}
        labels = [place.get(value, -1) if isinstance(value, str) else value for value in _values(table, column)]
        wrong = [row for row, label in enumerate(labels) if not isinstance(label, int) or not 0 <= label < len(names)]
        if wrong:
            value = _values(table, column)[wrong[0]]
            text = f"{split}[{wrong[0]}] of {self.path} has {column} = {value!r}, which is none of its classes"
            hint = "A test split without labels cannot be certified: remove it, and the split validation is taken."
            raise InputError(text, hint)
        return np.array(labels, np.int64)


_EXPECTED = (
    "Expected: parquet files named train-*.parquet and test-*.parquet (or in folders called so), or what "
    "DatasetDict.save_to_disk writes. `--set data.config=FOLDER` chooses a folder in it."
)


class Rows(Sequence[bytes]):
    """The encoded images of a column."""

    def __init__(self, table: Any, column: str) -> None:
        self._table, self._column = table, column

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        value = self._table[int(index)][self._column]
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            text = (
                f"row {index} names a file ({value['path']!r}) instead of holding the image"
                if value
                else f"row {index} is empty"
            )
            raise InputError(text, "Write the table with the files in it: save_to_disk and push_to_hub do so.")
        return content


class Names(Sequence[str]):
    """What messages call images: `train[17]`."""

    def __init__(self, split: str, count: int) -> None:
        self._split, self._count = split, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return f"{self._split}[{index}]"


def _library() -> Any:
    """The library, quiet. Raises `InputError` if it is not installed."""
    try:
        import datasets
    except ImportError as cause:
        hint = "pip install 'rscli[hf]'"
        raise InputError("data sets in the Hugging Face format need the library datasets", hint) from cause
    datasets.disable_progress_bars()
    return datasets


def _not_decoded() -> Any:
    return _library().Image(decode=False)


def _downloaded(name: str, local: Path) -> Path:
    """The folder of a data set of the hub, in the cache of its library. Raises `InputError` if it is not there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except Exception as cause:  # no such folder in the cache, or a name that can be none of the hub's
        hint = f"If it is a data set of the hub, download it once: hf download --repo-type dataset {name}"
        raise InputError(
            f"there is no folder {local}, and no data set {name!r} in the cache of huggingface_hub", hint
        ) from cause


def _parquet(home: Path, split: str) -> list[Path]:
    """The parquet files of a split. Raises `InputError` if several folders have some: configurations, of which one is meant."""
    found = sorted(file for file in home.rglob("*.parquet") if _is_of(file.relative_to(home), split))
    folders = sorted({file.parent.relative_to(home).as_posix() for file in found})
    if len(folders) > 1:
        raise InputError(
            f"{home} has tables of {split!r} in several folders: {name_some(folders)}", "Choose: --set data.config=FOLDER"
        )
    return found


def _is_of(file: Path, split: str) -> bool:
    """Whether a parquet file is one of the split: `train-00000-of-00002.parquet`, `train/0000.parquet`, `train.parquet`."""
    return file.stem == split or file.stem.startswith((f"{split}-", f"{split}_")) or file.parent.name == split


@lru_cache(maxsize=8)
def _read(source: tuple[str, ...]) -> Any:
    """The table of an Arrow folder or of parquet files. Raises `InputError` if it is broken."""
    datasets, (kind, *files) = _library(), source
    try:
        return datasets.load_from_disk(files[0]) if kind == "arrow" else datasets.Dataset.from_parquet(files)
    except Exception as cause:  # pyarrow and datasets raise kinds of their own for what is broken
        reason = str(cause.__cause__ or cause).strip().splitlines() or [type(cause).__name__]
        raise InputError(f"the table {files[0]} cannot be read: {reason[0]}", "Replace it.") from cause


def _holds_bytes(kind: Any) -> bool:
    """Whether a column holds encoded images without saying so: bytes, or bytes beside a path."""
    if isinstance(kind, dict):
        return "bytes" in kind
    return getattr(kind, "dtype", "") in ("binary", "large_binary")


def _column(chosen: str, found: Sequence[str], usual: Sequence[str], table: Any, what: str) -> str:
    """The `chosen` column, the only one found, or the one with a usual name. Raises `InputError` if it is not clear which."""
    there = name_some(table.column_names, 12)
    if chosen:
        if chosen not in table.column_names:
            raise InputError(f"the table has no column {chosen!r}; it has {there}", f"Change data.{what}_column.")
        return chosen
    named = [name for name in usual if name in found]
    if len(found) == 1 or named:
        return (named or list(found))[0]
    problem = "no column" if not found else "several columns"
    raise InputError(f"the table has {problem} of {what}s; it has {there}", f"Say which: --set data.{what}_column=NAME")


def _values(table: Any, column: str) -> list[Any]:
    values: list[Any] = table.select_columns([column])[:][column]
    return values
