"""The types that training scripts put beside the weights, read without running anything: by name, as stand-ins of our own.

torch's reader of untrusted pickles lets a file call what is on a list. What is added to the list here is never the type that
the file names, but a stand-in that takes whatever it is given and does nothing with it; of numpy, numbers and arrays of numbers
are made from their bytes. So a file can neither run code nor reach numpy's own reconstruction with numbers of its choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMBERS = re.compile(r"[<>|=]?(\?|[biufc]\d{1,2})")
_TEXT = re.compile(r"[<>|=]?[US]\d{1,5}")


class Ignored:
    """Stands for a value that an import has no use for: an argument of a script, a path, a date."""

    def __new__(cls, *_args: Any) -> Ignored:
        """An empty object, whatever is given."""
        return object.__new__(cls)

    def __init__(self, *_args: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class NumpyType:
    """Stands for a `numpy.dtype`: its code, such as `<f8`."""

    def __init__(self, code: str, *_flags: Any) -> None:
        self.code = str(code)

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
        self.code = (order if order in ("<", ">") else "") + self.code.lstrip("<>|=")

    def read(self, data: Any, *, text: bool = False) -> np.ndarray | None:
        """The numbers (or, with `text`, the strings) in `data` as a flat array (n,); None if it holds something else."""
        known = _NUMBERS.fullmatch(self.code) or (text and _TEXT.fullmatch(self.code))
        return np.frombuffer(data, self.code) if known and isinstance(data, bytes) else None


class NumpyArray:
    """Stands for a `numpy.ndarray`; `tensor` if it holds numbers."""

    tensor: Tensor | None = None

    def __init__(self, *_args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _version, shape, kind, fortran, data = state
        if isinstance(kind, NumpyType) and (flat := kind.read(data)) is not None:
            array = flat.reshape(shape, order="F" if fortran else "C")
            self.tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _number(kind: NumpyType, data: Any = b"") -> Any:
    found = kind.read(data, text=True)
    return Ignored() if found is None or len(found) != 1 else found[0].item()


def _empty_dict(*_factory: Any) -> dict[Any, Any]:
    """A defaultdict becomes a dict: what makes its values is not called."""
    return {}


_IGNORED = (
    *("argparse.Namespace", "types.SimpleNamespace", "copyreg._reconstructor", "builtins.object", "decimal.Decimal"),
    *(
        f"pathlib{part}.{name}"
        for part in ("", "._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    ),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in ("list", "dict", "tuple", "int", "float", "str", "bool", "bytes", "frozenset")),
    *(f"builtins.{name}" for name in ("slice", "range")),
    *(f"uuid.{name}" for name in ("UUID", "SafeUUID")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *("typing.Any", "collections.deque", "fractions.Fraction"),
)

HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((Ignored, name) for name in _IGNORED),
    (_empty_dict, "collections.defaultdict"),
    (NumpyType, "numpy.dtype"),
    (NumpyArray, "numpy.ndarray"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((NumpyArray, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
"""For `torch.serialization.safe_globals`: the stand-in, and the name in the file that it stands for."""
