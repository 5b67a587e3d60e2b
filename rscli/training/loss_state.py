"""What a loss keeps, in a file of its own beside the checkpoint: soft labels are gigabytes, and most losses never change them.

The checkpoint has the file's name and the digest of its tensors. The name is made of the digest, so that the file of the last
checkpoint is still there, whole, whenever the run is cut off; what no checkpoint names any more is removed after the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rscli.errors import InputError, PluginError
from rscli.models.modelfile import tensor_digest, unshared
from rscli.runtime.files import explained, open_regular, replacing
from rscli.training.checkpoint import remedy

KEY = "loss_file"
"""Where a checkpoint has the name and the digest. One of an older version has the tensors themselves, under `loss`."""

PATTERN = "loss-*.safetensors"


class LossStateFile:
    """The file in the run folder `folder` that has what the loss keeps; written again only when that changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[Tensor, int | None]] = {}
        """The tensors as they were when they were last seen, each with its version: in-place operations count it up."""
        self._entry: dict[str, str] = {}

    def put(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """`state`, for a checkpoint, with the entry of the file in place of the tensors of the loss; those are written first.

        Raises `RscliError` if there is no room, and `PluginError` for tensors that no file holds.
        """
        tensors: Mapping[str, Tensor] = state.get("loss", {})
        rest = {key: value for key, value in state.items() if key != "loss"}
        if not tensors:
            return rest
        if not self._unchanged(tensors):
            self._entry = self._written(tensors)
            self._known = {name: (tensor, _version(tensor)) for name, tensor in tensors.items()}
        return {**rest, KEY: self._entry}

    def take(self, state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
        """The `state` of a checkpoint with the loss's tensors. Raises `InputError` if their file is not what was written."""
        entry = state.get(KEY)
        if entry is None:
            return state
        path = self.folder / Path(entry["name"]).name
        try:
            with open_regular(path) as opened:
                tensors: dict[str, Tensor] = load_file(opened)
        except FileNotFoundError as cause:
            text = f"the file {path}, with what the loss keeps, is gone, and the checkpoint {checkpoint} needs it"
            raise InputError(text, f"Put it back. {remedy(checkpoint)}") from cause
        except OSError as cause:
            raise explained(cause, f"the file {path}, with what the loss keeps, cannot be read") from cause
        except SafetensorError as cause:
            raise _damaged(path, checkpoint, str(cause)) from cause
        if tensor_digest(tensors) != entry["digest"]:
            raise _damaged(path, checkpoint, "its content does not match the digest in the checkpoint")
        self._entry = dict(entry)
        return {**{key: value for key, value in state.items() if key != KEY}, "loss": tensors}

    def tidy(self) -> None:
        """Removes the files that the present checkpoint does not name."""
        for path in self.folder.glob(PATTERN):
            if path.name != self._entry.get("name"):
                path.unlink(missing_ok=True)

    def _unchanged(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are the tensors that were last seen, and no operation has changed one since; without reading them."""
        if self._known.keys() != tensors.keys() or not (self.folder / self._entry["name"]).exists():
            return False
        return all(
            kept is tensors[name] and version is not None and version == _version(kept)
            for name, (kept, version) in self._known.items()
        )

    def _written(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The entry of the file with these tensors, which is written unless it is the one that is there."""
        digest = tensor_digest(tensors)
        path = self.folder / f"loss-{digest[:16]}.safetensors"
        entry = {"name": path.name, "digest": digest}
        if entry == self._entry and path.exists():  # a run that goes on: these are the file's
            return entry
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            content = save(unshared(whole))
        except (KeyError, SafetensorError, ValueError) as cause:
            kinds = ", ".join(sorted({str(tensor.dtype) for tensor in whole.values()}))
            hint = "Keep dense tensors of real numbers."
            raise PluginError(f"what the loss keeps cannot be saved ({kinds}): {cause}", hint) from cause
        with replacing(path) as beside:
            beside.write_bytes(content)
        return entry


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None for one that does not count, as those of inference mode."""
    return None if tensor.is_inference() else tensor._version


def _damaged(path: Path, checkpoint: Path, reason: str) -> InputError:
    text = f"the file {path}, with what the loss keeps, is damaged: {' '.join(reason.split())}"
    return InputError(text, f"Copy it again. {remedy(checkpoint)}")
