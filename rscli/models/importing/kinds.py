"""What a file is, by its first bytes: what is no checkpoint is called what it is, with the way to one."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Literal

from rscli.errors import InputError

PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
}
"""The first bytes of archives and of packed files."""

OTHERS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (from Keras or MATLAB, perhaps)",
    b"\x93NUMPY": "a numpy array",
    b"%PDF": "a PDF document",
    b"GGUF": "a GGUF file of a language model",
}
"""The first bytes of other files that are taken for checkpoints."""

COPY = "Copy or download it again."
UNPACK = "Unpack it, and import the checkpoint in it."


def kind_of(path: Path) -> Literal["torch", "safetensors"]:
    """Whether a file is one of `torch.save` or of safetensors, whatever its suffix says.

    A file that is neither, but ends in .safetensors or begins like a pickle, is left to the reader to complain about. Raises
    `InputError`, saying what it is instead, for anything else.
    """
    with path.open("rb") as file:
        head = file.read(512)
    size = path.stat().st_size
    if (what := _other(path, head)) is not None:
        raise InputError(f"{path} is not a checkpoint: it is {what[0]}", what[1])
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head[:1] == b"\x80" or head[:4] == b"PK\x03\x04":  # before torch 1.6 a pickle, since then a zip archive
        return "torch"
    if path.suffix == ".safetensors":
        return "safetensors"
    text = f"{path} is neither a torch.save checkpoint nor a safetensors file: its first bytes are {head[:8]!r}"
    raise InputError(text, COPY)


def _other(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file is that is no checkpoint, and what to do about it; None if it may be one."""
    text = head.lstrip().lower()
    if not head:
        return "empty (0 bytes)", COPY
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file", "Fetch the file: `git lfs pull`, in its repository."
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page (an error or a login page, perhaps)", "Download the file itself."
    if packed := next((name for magic, name in PACKED.items() if head.startswith(magic)), None):
        return f"compressed ({packed})", UNPACK
    if head[257:262] == b"ustar":
        return "a tar archive", UNPACK
    if other := next((name for magic, name in OTHERS.items() if head.startswith(magic)), None):
        return other, "Give a torch.save checkpoint, or a safetensors file."
    if head.startswith(b"PK") and (held := _held(path)) is not None:
        return f"a zip archive of {held}", UNPACK
    if text.startswith((b"{", b"[")):
        return _json(path)
    return None


def _held(path: Path) -> str | None:
    """What is in a zip archive, unless torch wrote it or it is broken."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    if any(name.endswith("data.pkl") for name in names):
        return None
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "nothing"


def _json(path: Path) -> tuple[str, str]:
    try:
        content = json.loads(path.read_bytes()[:10_000_000])
        files = sorted({str(name) for name in content["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "JSON or other text", "Give a torch.save checkpoint, or a safetensors file."
    if len(files) == 1:
        return "the index of a safetensors file", f"Import the file that it names: {path.parent / files[0]}."
    hint = (
        "Join them first: load each with safetensors.torch.load_file, and save all the tensors with save_file in one file. "
        f"They are: {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}."
    )
    return f"the index of {len(files)} safetensors files", hint
