"""The tensors of a file under the network's names: what the file puts in front of them is found, and left away.

`1.` is a network behind a normalisation layer, `module.` one in a DataParallel; files have these alone, together, or others.
Names that other code gives the tensors of an architecture are translated by its plugin (`Architecture.rename`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types that weights come in; others would be weights only after a scale that is kept elsewhere."""


@dataclass(frozen=True)
class Fit:
    """How a file's tensors go into a network: those that do, under the network's names, and everything that is wrong.

    `extra` has the file's own names; `expected` is the network's state dict, and `prefix` what the file puts in front. `copies`
    are the prefixes of all the whole networks that the file holds.
    """

    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]
    expected: Mapping[str, Tensor]
    prefix: str
    copies: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Expected names that the file does not have."""
        return [name for name in self.expected if name not in self.tensors]

    @property
    def wrong_shape(self) -> list[str]:
        """Expected names whose tensors have another shape in the file."""
        return [name for name, tensor in self.tensors.items() if tensor.shape != self.expected[name].shape]

    @property
    def wrong_type(self) -> list[str]:
        """Expected names whose tensors are not plain numbers, or are integers (perhaps quantised) in place of weights."""
        return [
            name
            for name, tensor in self.tensors.items()
            if tensor.layout is not torch.strided
            or tensor.is_meta
            or tensor.is_quantized
            or (self.expected[name].is_floating_point() and tensor.dtype not in WEIGHTS)
        ]


def fit_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], rename: Callable[[str], str] = str) -> Fit:
    """Finds the network's names (the keys of `expected`) behind whatever the file puts in front of them.

    Tensors may have any shape: shapes are compared later (`Fit.wrong_shape`). `rename` translates a name of the file to the
    network's, with whatever is in front of it. Counters of batches, which old versions of torch did not save and evaluation
    does not need, are 0 where they are missing.
    """
    names = {rename(name): name for name in tensors}
    counts = _prefixes(names, expected)
    prefix = max(counts, key=lambda p: counts[p] * sum(name.startswith(p) for name in names), default="")
    whole = sum(not name.endswith("num_batches_tracked") for name in expected)
    known = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix) and name[len(prefix) :] in expected}
    found = {ours: tensors[names[name]] for name, ours in known.items()}
    for name, fresh in expected.items():
        if name not in found and name.endswith("num_batches_tracked"):
            found[name] = fresh
    return Fit(
        found,
        {names[name]: tensors[names[name]] for name in names if name not in known},
        expected,
        prefix,
        tuple(p for p in counts if counts[p] >= whole),
    )


def _prefixes(names: Collection[str], expected: Mapping[str, Tensor]) -> Counter[str]:
    """What the file puts in front of the `expected` names, `1.module.` say, and before how many of them.

    The best is before most of them, and before most of the file's own.
    """
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in expected:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    return counts
