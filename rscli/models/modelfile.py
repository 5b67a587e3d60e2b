"""Self-describing model files: safetensors whose metadata holds all that is needed to rebuild and certify the model.

The tensors are the network's state dict, under the names that the field uses, without the normalisation layer. The metadata
has one key, `rscli`, with the `ModelCard` as JSON; the card holds a digest of both, so that a changed file is noticed.
A file depends on its content alone: the same weights and the same card give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rscli.api import Architecture, Noise, Plugin
from rscli.config.decode import decode_json
from rscli.config.problems import faults
from rscli.config.settings import shortened
from rscli.errors import InputError, PluginError
from rscli.models.card import FORMAT, ModelCard
from rscli.models.network import Classifier, build_classifier, no_larger_than
from rscli.models.smoothed import Smoothed, Source
from rscli.plugin_files import from_file
from rscli.registry import PartReader, Registry, installed
from rscli.runtime.files import explained, open_regular, replacing


def save_model(path: Path, classifier: Classifier, card: ModelCard) -> None:
    """Writes the model file atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.network.state_dict().items()}
    card = card.model_copy(update={"sha256": content_digest(tensors, card.model_dump(mode="json"))})
    # one key: safetensors writes several in an order that changes from run to run
    metadata = {"rscli": _canonical(card.model_dump(mode="json"))}
    data = save(unshared(tensors), metadata=metadata)
    with replacing(path) as beside:
        beside.write_bytes(data)


def load_model(path: Path) -> Smoothed:
    """Reads a model file, checks it, and rebuilds the classifier: on the CPU, in eval mode.

    Raises `InputError` if the file is missing, foreign, truncated, of a newer format, or its tensors are not those it was
    written with; `PluginError` if a plugin it needs is not installed.
    """
    tensors, card = read_model(path)
    architecture = cast(Architecture, recorded_plugin("architectures", card.arch, card, str(path))[1])
    noise = cast(Noise, recorded_plugin("noises", card.noise, card, str(path))[1])
    classifier = _rebuilt(architecture, card, tensors, path)
    return Smoothed(
        classifier.eval(),
        noise,
        card.spec.class_names,
        shape=card.spec.shape,
        transform=card.spec.test_transform,
        source=Source(path, card, file_digest(path)),
    )


def read_model(path: Path) -> tuple[dict[str, Tensor], ModelCard]:
    """The tensors of a model file, of any shape, and what it says of itself; checked against each other, but nothing is built.

    Raises `InputError` as `load_model` does.
    """
    if not path.is_file():
        raise _missing(path)
    tensors, text = _read(path)
    card = _card(path, text)
    if content_digest(tensors, decode_json(text)) != card.sha256:
        raise InputError(
            f"{path} was changed or damaged after it was written: its weights and description do not match its digest",
            "Copy it again, or train again.",
        )
    return tensors, card


def is_model_file(path: Path) -> bool:
    """Whether `path` is one of rscli's model files, whole or not."""
    try:
        with open_regular(path) as opened, safe_open(opened, framework="pt") as file:
            return "rscli" in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError, InputError):
        return False


def card_of(model: Smoothed) -> ModelCard:
    """What a model file of `model` says of itself. Raises `InputError` if it came from none, and is not composed of such."""
    if model.card is None:
        raise InputError("this classifier was not loaded from a model file, so nothing describes it")
    return model.card


def read_card(path: Path) -> ModelCard:
    """The description inside a model file, without its weights: neither is checked against the other.

    Raises `InputError` as `load_model` does for a file that is missing, foreign, truncated or broken.
    """
    if not path.is_file():
        raise _missing(path)
    return _card(path, _read(path, weights=False)[1])


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """SHA-256 over the card (except the digest in it) and the names, types, shapes and bytes of `tensors` (of any shape),
    sorted by name.

    A changed sigma would make false certificates as surely as changed weights.
    """
    return tensor_digest(tensors, _canonical({**card, "sha256": ""}).encode())


def tensor_digest(tensors: Mapping[str, Tensor], begin: bytes = b"") -> str:
    """SHA-256 over `begin` and the names, types, shapes and bytes of `tensors` (of any shape), sorted by name."""
    digest = hashlib.sha256(begin)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _canonical(card: Mapping[str, Any]) -> str:
    return json.dumps(card, sort_keys=True, separators=(",", ":"))


def _rebuilt(architecture: Architecture, card: ModelCard, tensors: dict[str, Tensor], path: Path) -> Classifier:
    """The classifier with the weights of the file. Raises `InputError` if they are of another network, or of a smaller one."""
    name = card.arch["name"]
    try:
        with no_larger_than(tensors):
            classifier = build_classifier(architecture, card.spec, weights=False)
        classifier.network.load_state_dict(tensors)
    except (RuntimeError, InputError) as cause:
        text = shortened(cause.message if isinstance(cause, InputError) else str(cause), 2000)
        raise InputError(f"the weights in {path} do not fit its architecture {name!r}: {text}") from cause
    return classifier


def _missing(path: Path) -> InputError:
    return InputError(f"there is no model file {path}", "A training run writes model.safetensors into its run folder.")


def _read(path: Path, weights: bool = True) -> tuple[dict[str, Tensor], str]:
    try:
        with open_regular(path) as opened, safe_open(opened, framework="pt") as file:
            metadata = file.metadata() or {}
            if "rscli" not in metadata:
                raise InputError(
                    f"{path} is a safetensors file, but not a model file of rscli: it has no description",
                    "`rscli train` writes model files that certify and predict can read.",
                )
            names = file.keys() if weights else ()
            return {name: file.get_tensor(name) for name in names}, metadata["rscli"]
    except (SafetensorError, OSError, ValueError) as cause:
        if isinstance(cause, OSError) and cause.errno is not None:
            raise explained(cause, f"the model file {path} cannot be read") from cause
        raise InputError(
            f"{path} is not a complete safetensors file: {cause}",
            "It may be truncated, or another kind of file (a torch.save checkpoint, say). Copy it again, or train again.",
        ) from cause


def _card(path: Path, text: str) -> ModelCard:
    try:
        raw = decode_json(text)
        if isinstance(raw, dict) and isinstance(raw.get("format"), int) and raw["format"] > FORMAT:
            raise InputError(f"{path} has format {raw['format']}, this rscli reads formats up to {FORMAT}", "Update rscli.")
        return ModelCard.model_validate(raw)
    except (ValidationError, ValueError) as cause:
        first = "; ".join(faults(cause)[:10]) if isinstance(cause, ValidationError) else str(cause)
        raise InputError(
            f"the description inside {path} is broken ({first})", "The file was changed; copy it again."
        ) from cause


class _RecordedParts(PartReader):
    """Reads the architectures inside another one from the packages that a model file's card names."""

    def __init__(self, registry: Registry, card: ModelCard, where: str) -> None:
        super().__init__(registry)
        self.card, self.where = card, where

    def build(self, section: Mapping[str, Any]) -> tuple[str, Plugin]:
        return _plugin(self, "architectures", section)


def recorded_plugin(kind: str, section: Mapping[str, Any], card: ModelCard, where: str) -> tuple[str, Plugin]:
    """The plugin of a `section` of a card, taken from the package that the card names, and its name with that package.

    Raises `PluginError` if it is not installed, another file, or takes other fields; `where` is what was read.
    """
    return _plugin(_RecordedParts(installed(), card, where), kind, section)


def _plugin(reader: _RecordedParts, kind: str, section: Mapping[str, Any]) -> tuple[str, Plugin]:
    registry, name = reader.registry, str(section["name"])
    maker = _maker(reader.card, kind, name)
    qualified = f"{maker['package']}:{name}" if maker and ":" not in name else name
    try:
        plugin = registry.build(kind, {**section, "name": qualified}, reader)
        here = registry.provenance(kind, qualified).version
        if maker and from_file(maker["version"]) and here != maker["version"]:
            raise PluginError(f"the file {maker['package']} that was given is a different one ({here})")
        return qualified, plugin
    except _PartError:
        raise
    except PluginError as cause:
        hint = cause.hint
        if maker and from_file(maker["version"]):
            hint = f"It comes from the file {maker['package']} with {maker['version']}: pass that file with --plugin."
        elif maker:
            hint = f"It was written with {maker['package']} {maker['version']}: pip install {maker['package']}."
        raise _PartError(f"{reader.where} needs the {kind} plugin {name!r}: {cause.message}", hint) from cause
    except ValidationError as cause:
        fields = "; ".join(faults(cause)[:10])
        text = f"the {kind} plugin {name!r} does not accept the fields that {reader.where} records: {fields}"
        raise _PartError(text) from cause


class _PartError(PluginError):
    """What is wrong with one plugin of a card, said in full: the plugin around it has nothing to add."""


def _maker(card: ModelCard, kind: str, name: str) -> Mapping[str, str] | None:
    """Where the card says that a plugin came from: the package that is named, or else the first with one of that name."""
    package, _, rest = name.rpartition(":")
    names = (rest, rest.partition("/")[0])
    found = [maker for maker in card.plugins if maker["kind"] == kind and maker["name"] in names]
    return next((maker for maker in found if package in ("", maker["package"])), None)


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, of any shape, that share their memory with another, which safetensors does not write."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return out
