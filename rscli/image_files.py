"""What an image of a folder is: one rule for every data set of folders, and for prediction.

Part of the plugin contract (`rscli.api` hands it on), and below it, since both the plugins and the engine need it. The rule
is a fixed list of suffixes, and not what the Pillow of this machine can read, so that a folder holds the same images, with
the same fingerprint, everywhere.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rscli.errors import InputError

IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for names in (
        "png apng jpg jpeg jpe jfif gif webp avif avifs bmp dib tif tiff",
        "jp2 j2k jpc jpf jpx j2c ppm pgm pbm pnm",
        "qoi tga pcx ico sgi bw rgb rgba ras dds xbm xpm psd",
    )
    for name in names.split(" ")
)
"""The suffixes of images, in lower case: formats whose 8- or 16-bit pixels Pillow itself decodes.

Left out is what Pillow only identifies, or draws with the help of other programs: .mpg, .h5, .hdf, .grib, .bufr, .eps, .wmf."""

COMMON_SUFFIXES = "png, jpg, bmp, gif, webp, tif, jp2, avif or ppm"
"""Some of them, for messages."""

NO_IMAGES_FOLDERS = frozenset({"__MACOSX"})
"""Folders that hold copies, as an archive made on a Mac does; hidden ones (`.ipynb_checkpoints`) are left out as well."""


@dataclass(frozen=True)
class ImageListing:
    """The image files of a folder and of those in it: `paths` in torchvision's order, and what was `skipped`, by reason."""

    paths: tuple[Path, ...]
    skipped: Counter[str] = field(default_factory=Counter)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image: by its suffix, in any case of letters, unless it is hidden (`._a.png`)."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - a million names


def list_images(folder: Path) -> ImageListing:
    """The images in `folder` and, to the bottom, in its subfolders: by the path of the folder, then by name.

    That is the order of torchvision's `ImageFolder`. Only regular files count. A folder behind links is read once. Hidden
    files and folders and `__MACOSX` are left out. Raises `InputError` for a folder that cannot be read.
    """
    skipped: Counter[str] = Counter()
    found = sorted(_walk(folder, skipped), key=lambda item: str(item[0]))
    return ImageListing(tuple(where / name for where, names in found for name in names), skipped)


def has_images(folder: Path) -> bool:
    """Whether `list_images` would find any; stops at the first. Raises as it does."""
    return any(names for _, names in _walk(folder, Counter()))


def loose_images(folder: Path) -> list[str]:
    """The names of the images directly in `folder`, sorted. Raises `InputError` if it cannot be read."""
    return sorted(entry.name for entry in _entries(folder) if is_image_name(entry.name) and _ask(entry.is_file))


def skipped_text(skipped: Counter[str]) -> str:
    """`3 files skipped (2 .txt, 1 hidden)`; empty if there were none but hidden ones, which nobody misses."""
    total = skipped.total()
    if total == skipped["hidden"]:
        return ""
    reasons = [f"{number:,} {reason}" for reason, number in skipped.most_common()]
    shown = ", ".join(reasons[:6]) + (", ..." if len(reasons) > 6 else "")
    return f"{total:,} {'file' if total == 1 else 'files'} skipped ({shown})"


def find_images(paths: Iterable[Path]) -> ImageListing:
    """The images that `paths` name: files whatever their suffix, and folders as `list_images` reads them; each file once.

    Raises `InputError` for a path that does not exist, or is neither a file nor a folder.
    """
    found: dict[str, Path] = {}
    skipped: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            listing = list_images(path)
            files: Sequence[Path] = listing.paths
            skipped += listing.skipped
        elif path.is_file():
            files = [path]
        elif path.exists():
            raise InputError(f"{path} is neither a file nor a folder")
        else:
            raise InputError(f"there is no image or folder {path}")
        for file in files:
            found.setdefault(os.path.abspath(file), file)  # noqa: PTH100 - Path.absolute keeps `..`
    return ImageListing(tuple(found.values()), skipped)


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in `folder` (NFC), sorted, without hidden ones and `__MACOSX`; none if it is no folder.

    File systems keep an accent in one character or in two (NFC, NFD): a class is the same either way. Raises `InputError` if
    the folder cannot be read, or if a class has two folders.
    """
    return sorted(_by_class(folder))


def class_folder(folder: Path, name: str) -> Path:
    """The folder of the class `name` in `folder`, however its accents are kept; it need not be there."""
    return folder / _by_class(folder).get(_composed(name), name)


def _by_class(folder: Path) -> dict[str, str]:
    """The folders in `folder`: class names in NFC, and the names on the disk."""
    found: dict[str, str] = {}
    names = [entry.name for entry in _entries(folder) if _ask(entry.is_dir)] if folder.is_dir() else []
    for name in sorted(names):
        if found.setdefault(_composed(name), name) != name:
            text = f"{folder} has two folders for the class {_composed(name)}: {found[_composed(name)]!a} and {name!a}"
            raise InputError(text, "They differ only in how an accent is encoded (NFC or NFD): put their images together.")
    return found


def _composed(name: str) -> str:
    """`name` with each accent in one character (NFC)."""
    return unicodedata.normalize("NFC", name)


def _walk(top: Path, skipped: Counter[str]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder from `top` down with the names of its images, sorted; counts by reason what is no image.

    Folders themselves come before links to them, so that it is the link that is skipped, not the folder.
    """
    seen: set[str] = set()
    folders, links = [top] if top.is_dir() else [], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(folder)) in seen:
            skipped["linked folders that were already read"] += 1
            continue
        seen.add(real)
        names = []
        for entry in sorted(_entries(folder, skipped), key=lambda entry: entry.name):
            if _ask(entry.is_dir):
                (links if entry.is_symlink() else folders).append(folder / entry.name)
            elif not is_image_name(entry.name):
                skipped[os.path.splitext(entry.name)[1].lower()[:12] or "without a suffix"] += 1  # noqa: PTH122
            elif _ask(entry.is_file):
                names.append(entry.name)
            else:
                skipped["broken links" if entry.is_symlink() else "pipes or devices"] += 1
        yield folder, names


def _entries(folder: Path, skipped: Counter[str] | None = None) -> list[os.DirEntry[str]]:
    """What is in `folder`, without what is hidden or holds copies."""
    try:
        with os.scandir(folder) as entries:
            everything = list(entries)
    except OSError as cause:
        hint = "Make it readable, or move it out of the way."
        raise InputError(f"cannot read the folder {folder}: {cause.strerror}", hint) from cause
    shown = [entry for entry in everything if not entry.name.startswith(".") and entry.name not in NO_IMAGES_FOLDERS]
    if skipped is not None and len(shown) < len(everything):
        skipped["hidden"] += len(everything) - len(shown)
    return shown


def _ask(question: Callable[[], bool]) -> bool:
    """The answer of a folder entry; no, where its links lead in a circle or nowhere."""
    try:
        return question()
    except OSError:
        return False
