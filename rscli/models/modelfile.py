"""Self-describing model files: safetensors whose metadata holds all that is needed to rebuild and certify the model.

The tensors are the network's state dict, under the names that the field uses, without the normalisation layer. The metadata
has one key, `rscli`, with the `ModelCard` as JSON; the card holds a digest of both, so that a changed file is noticed.
A file depends on its content alone: the same weights and the same card give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rscli.api import Architecture, Dataset, DataSpec, Noise, Plugin
from rscli.errors import InputError, PluginError
from rscli.models.network import Classifier, build_classifier
from rscli.registry import Registry, installed
from rscli.runtime.files import open_regular, replacing
from rscli.system import utf8_name

FORMAT: Literal[1] = 1


class ModelCard(BaseModel):
    """What a model file says of itself. Sections hold a plugin's `name` and fields; `plugins` says where each came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = FORMAT
    rscli: str
    arch: dict[str, Any]
    noise: dict[str, Any]
    data: dict[str, Any]
    spec: DataSpec
    plugins: list[dict[str, str]]
    config: dict[str, Any] | None = None
    epochs: int | None = None
    origin: str | None = None
    sha256: str = ""


@dataclass(frozen=True)
class Model:
    """A loaded model: its card, the classifier (on the CPU, in eval mode), its plugins, and the digest of the file."""

    card: ModelCard
    classifier: Classifier
    noise: Noise
    sha256: str
    path: Path

    def dataset(self) -> Dataset:
        """The data set that the model was trained on. Raises `PluginError` if its plugin is not installed."""
        return cast(Dataset, _plugin(installed(), "datasets", self.card.data, self.card, self.path))


def save_model(path: Path, classifier: Classifier, card: ModelCard) -> None:
    """Writes the model file atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.network.state_dict().items()}
    card = card.model_copy(update={"sha256": content_digest(tensors, card.model_dump(mode="json"))})
    # one key: safetensors writes several in an order that changes from run to run
    metadata = {"rscli": _canonical(card.model_dump(mode="json"))}
    data = save(_unshared(tensors), metadata=metadata)
    with replacing(path) as beside:
        beside.write_bytes(data)


def load_model(path: Path) -> Model:
    """Reads a model file, checks it, and rebuilds the classifier.

    Raises `InputError` if the file is missing, foreign, truncated, of a newer format, or its tensors are not those it was
    written with; `PluginError` if a plugin it needs is not installed.
    """
    open_regular(path, "model file", "A training run writes model.safetensors into its run folder.").close()
    tensors, text = _read(path)
    card = _card(path, text)
    if content_digest(tensors, json.loads(text)) != card.sha256:
        raise InputError(
            f"{path} does not hold what it was written with: its weights or its description were changed or damaged",
            "Copy it again, or train anew.",
        )
    registry = installed()
    skeleton = {**card.arch, "pretrained": False} if "pretrained" in card.arch else card.arch  # the weights are in the file
    architecture = cast(Architecture, _plugin(registry, "architectures", skeleton, card, path))
    noise = cast(Noise, _plugin(registry, "noises", card.noise, card, path))
    classifier = build_classifier(architecture, card.spec)
    try:
        classifier.network.load_state_dict(tensors)
    except RuntimeError as cause:
        raise InputError(f"the weights in {path} do not fit its architecture {card.arch['name']!r}: {cause}") from cause
    return Model(card, classifier.eval(), noise, file_digest(path), path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """SHA-256 over the card (but for the digest in it) and the names, types, shapes and bytes of `tensors`, sorted by name.

    A changed sigma would make wrong certificates as surely as changed weights.
    """
    digest = hashlib.sha256(_canonical({**card, "sha256": ""}).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _canonical(card: Mapping[str, Any]) -> str:
    return json.dumps(card, sort_keys=True, separators=(",", ":"))


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            if "rscli" not in metadata:
                raise InputError(
                    f"{path} is a safetensors file, but not one of rscli's: it does not say what it holds",
                    "`rscli train` writes model files that certify and predict can read.",
                )
            return {key: file.get_tensor(key) for key in file.keys()}, metadata["rscli"]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as cause:
        raise InputError(
            f"{path} is not a whole safetensors file: {cause}",
            "It may be truncated, or of another kind (a checkpoint of torch.save, say). Copy it again, or train anew.",
        ) from cause


def _card(path: Path, text: str) -> ModelCard:
    try:
        raw = json.loads(text)
        if isinstance(raw, dict) and isinstance(raw.get("format"), int) and raw["format"] > FORMAT:
            raise InputError(f"{path} has format {raw['format']}, this rscli reads up to {FORMAT}", "Update rscli.")
        return ModelCard.model_validate(raw)
    except (ValidationError, ValueError) as cause:
        first = str(cause)
        if isinstance(cause, ValidationError):
            first = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in cause.errors())
        raise InputError(
            f"the description inside {path} is broken ({first})", "The file was changed; copy it again."
        ) from cause


def _plugin(registry: Registry, kind: str, section: Mapping[str, Any], card: ModelCard, path: Path) -> Plugin:
    """The plugin of `section`, taken from the package that the card names."""
    name = str(section["name"])
    maker = next((p for p in card.plugins if p["kind"] == kind), None)
    qualified = f"{maker['package']}:{name}" if maker and ":" not in name else name
    try:
        return registry.build(kind, {**section, "name": qualified})
    except PluginError as cause:
        hint = (
            f"It was written with {maker['package']} {maker['version']}: pip install {maker['package']}."
            if maker
            else cause.hint
        )
        raise PluginError(f"{path} needs the {kind} plugin {name!r}: {cause.message}", hint) from cause
    except ValidationError as cause:
        fields = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in cause.errors())
        raise PluginError(f"the {kind} plugin {name!r} does not take the fields that {path} records: {fields}") from cause


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share their memory with another, which safetensors does not write."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        out[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return out
