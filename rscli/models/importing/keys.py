"""The tensors of a file under the network's names: what the file puts in front of them is found, and left away.

`1.` is a network behind a normalisation layer, `module.` one in a DataParallel; files have these alone, together, or others.
One of the field's networks has other names altogether, which are translated: the DenseNet of Jeong & Shin's code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types that weights come in; others would be weights only after a scale that is kept elsewhere."""

_DENSE_LAYER = re.compile(r"features\.block(\d+)\.layer(\d+)\.brc_(\d)\.(norm|conv)\.")
_DENSE_REST = (("features.conv0.", "conv1."), ("features.norm_last.", "bn."), ("classifier.", "fc."))


@dataclass(frozen=True)
class Fit:
    """How a file's tensors go into a network: those that do, under the network's names, and everything that is wrong.

    `extra` has the file's own names; `expected` is the network's state dict, and `prefix` what the file puts in front.
    """

    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]
    expected: Mapping[str, Tensor]
    prefix: str

    @property
    def missing(self) -> list[str]:
        """Expected names that the file does not have."""
        return [name for name in self.expected if name not in self.tensors]

    @property
    def misshapen(self) -> list[str]:
        """Expected names whose tensors have another shape in the file."""
        return [name for name, tensor in self.tensors.items() if tensor.shape != self.expected[name].shape]

    @property
    def mistyped(self) -> list[str]:
        """Expected names whose tensors are no plain numbers, or whole ones (perhaps quantised) in the place of weights."""
        return [
            name
            for name, tensor in self.tensors.items()
            if tensor.layout is not torch.strided
            or tensor.is_meta
            or tensor.is_quantized
            or (self.expected[name].is_floating_point() and tensor.dtype not in WEIGHTS)
        ]


def fit_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Fit:
    """Finds the network's names (the keys of `expected`) behind whatever the file puts in front of them.

    Counters of batches, which old versions of torch did not save and evaluation does not need, are 0 where they are missing.
    """
    rename = _dense_name if any(_DENSE_LAYER.search(name) for name in tensors) else str
    names = {rename(name): name for name in tensors}
    prefix = _common_prefix(names, expected)
    known = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix) and name[len(prefix) :] in expected}
    found = {ours: tensors[names[name]] for name, ours in known.items()}
    for name, fresh in expected.items():
        if name not in found and name.endswith("num_batches_tracked"):
            found[name] = fresh
    return Fit(found, {names[name]: tensors[names[name]] for name in names if name not in known}, expected, prefix)


def _common_prefix(names: Collection[str], expected: Mapping[str, Tensor]) -> str:
    """What the file puts in front of the `expected` names, `1.module.` say: before most of them, and before most of its own."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in expected:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    return max(counts, key=lambda prefix: counts[prefix] * sum(name.startswith(prefix) for name in names), default="")


def _dense_name(name: str) -> str:
    """Our name of a tensor of `cifar_densenet40` in Jeong & Shin's code, which counts its layers from 1."""
    for theirs, ours in _DENSE_REST:
        name = name.replace(theirs, ours)
    kinds = {"norm": "bn", "conv": "conv"}
    return _DENSE_LAYER.sub(lambda m: f"dense{m[1]}.{int(m[2]) - 1}.{kinds[m[4]]}{m[3]}.", name)
