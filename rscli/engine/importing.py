"""Checkpoints as this field publishes them, turned into a self-describing model file.

The code of Cohen et al. 2019, and all that builds on it, saves a dict with `arch`, `state_dict`, `epoch` and `optimizer`. The
tensors have prefixes (`1.`: behind a normalisation layer, whose constants are not in the file; `module.`: in a DataParallel).
MACER's code saves `net` and `epoch`, and normalises nothing. Plain state dicts, of timm or torchvision say, are read as well.
Files are loaded with `weights_only`: tensors and plain values, never code.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rscli import __version__
from rscli.api import Architecture, Dataset, DataSpec, Plugin
from rscli.config.layers import DEFAULTS, build_section, full_section
from rscli.config.problems import Problems
from rscli.config.schema import SECTIONS
from rscli.config.settings import Setting, Settings, dotted, flatten, nest, parse_sets, stack
from rscli.engine.modelfile import ModelCard, file_digest, save_model
from rscli.engine.network import Classifier, build_classifier, parameter_count
from rscli.engine.progress import Progress
from rscli.errors import InputError
from rscli.registry import installed

FIELD_ARCHS: dict[str, dict[str, Any]] = {
    "lenet": {"name": "lenet"},
    "resnet50": {"name": "timm/resnet50"},
    "cifar_resnet20": {"name": "cifar-resnet", "depth": 20},
    "cifar_resnet110": {"name": "cifar-resnet", "depth": 110},
    "cifar_densenet40": {"name": "cifar-densenet", "depth": 40, "growth": 12},
}
"""What the field's codes call an architecture, and what it is here."""

STATE_KEYS = ("state_dict", "net", "model", "model_state_dict")
"""Where a checkpoint keeps its tensors; MACER's is `net`."""

MEANS = frozenset({"mean", "means", "mu"})
STDS = frozenset({"std", "stds", "sds", "sigma"})
"""What a normalisation layer calls its constants, where it saves them."""

NORMALIZATIONS = ("auto", "dataset", "none")
IMPORTED = ("arch", "data", "noise")
"""The sections of a configuration that an import needs."""

COPY = "Copy or download it again."

SHOWN = 20
"""Tensors that do not fit are listed up to this many of a sort: the wrong depth misses hundreds."""


@dataclass(frozen=True)
class ImportOptions:
    """What to import, and what the file does not say of itself. `arch` None: as the file says; `sigma` in [0, 1] pixels."""

    checkpoint: Path
    out: Path
    dataset: str
    sigma: float
    data_dir: Path
    arch: str | None = None
    noise: str = "gaussian"
    normalization: str = "auto"
    sets: tuple[str, ...] = ()
    force: bool = False


@dataclass(frozen=True)
class Normalization:
    """The constants per channel (None: no normalisation), and how they became known; `sure` unless they were guessed."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    reason: str
    sure: bool = True

    def __str__(self) -> str:
        shown = "none" if self.mean is None else f"mean {_numbers(self.mean)}, std {_numbers(self.std or ())}"
        return f"normalisation: {shown} ({self.reason})"


@dataclass(frozen=True)
class Imported:
    """What was imported, and where the model file is."""

    model: Path
    arch: dict[str, Any]
    data: dict[str, Any]
    noise: dict[str, Any]
    normalization: Normalization
    classes: int
    parameters: int
    epochs: int | None
    prefix: str
    origin: str


@dataclass(frozen=True)
class Checkpoint:
    """A foreign file, read: its tensors, the key they were under (None: at the top), and what else it says."""

    path: Path
    tensors: dict[str, Tensor]
    key: str | None = None
    arch: str | None = None
    epochs: int | None = None


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


def import_checkpoint(options: ImportOptions, progress: Progress) -> Imported:
    """Reads a checkpoint, finds its network, and writes the model file; nothing is executed, and nothing downloaded.

    Raises `InputError` for a file that is no checkpoint or holds more than tensors, for tensors that do not fit the
    architecture or the data set, and for an `out` that exists (unless `force`); `ConfigError` for settings that do not hold.
    """
    _check_options(options)
    checkpoint = read_checkpoint(options.checkpoint)
    plugins, sections = _plugins(options, checkpoint)
    spec = cast(Dataset, plugins["data"]).spec(options.data_dir)
    network = build_classifier(cast(Architecture, plugins["arch"]), spec).network
    fit, constants = take_constants(fit_tensors(checkpoint.tensors, network.state_dict()))
    _check_fit(fit, checkpoint, sections, len(spec.class_names))
    normalization = choose_normalization(options.normalization, constants, spec, checkpoint, fit.prefix)
    network.load_state_dict(fit.tensors)
    card = ModelCard(
        rscli=__version__,
        **sections,
        spec=spec.model_copy(update={"mean": normalization.mean, "std": normalization.std}),
        plugins=[asdict(installed().provenance(SECTIONS[name], sections[name]["name"])) for name in IMPORTED],
        epochs=checkpoint.epochs,
        origin=f"imported from {options.checkpoint.name} (sha256 {file_digest(options.checkpoint)})",
    )
    save_model(options.out, Classifier(network, card.spec), card)
    (progress.note if normalization.sure else progress.warn)(str(normalization))
    return Imported(
        model=options.out,
        **sections,
        normalization=normalization,
        classes=len(spec.class_names),
        parameters=parameter_count(network),
        epochs=checkpoint.epochs,
        prefix=fit.prefix,
        origin=card.origin or "",
    )


# --- reading -----------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors in a file of `torch.save`, or in a safetensors file, on the CPU, and what the file says of them.

    Raises `InputError` if the file is missing or broken, if its pickle wants more than tensors and plain values (nothing of
    it is then executed), or if it holds no state dict.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        return Checkpoint(path, _read_safetensors(path))
    content = _read_torch(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint: a dict of tensors, or with a state_dict")
    key = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    state = content if key is None else content[key]
    tensors = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if not tensors:
        where = f"under {key!r}" if key else f"in it or under {', '.join(STATE_KEYS)}"
        raise InputError(f"{path} has no tensors {where}; its keys are: {', '.join(map(str, content)) or 'none'}")
    if key is None:
        return Checkpoint(path, tensors)
    arch, epochs = content.get("arch"), content.get("epoch")
    return Checkpoint(
        path, tensors, key, arch if isinstance(arch, str) else None, epochs if type(epochs) is int and epochs >= 0 else None
    )


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(1) not in (b"P", b"\x80"):  # a zip archive, and before torch 1.6 a pickle
            raise InputError(f"{path} is not a whole checkpoint of torch.save: it begins otherwise", COPY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to whoever wrote the file
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:  # a damaged pickle trips the reader with exceptions of any type
        if isinstance(cause, UnpicklingError) or "TorchScript" in str(cause):
            raise _refused(path, str(cause)) from cause
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise InputError(f"{path} is not a whole checkpoint of torch.save: {reason}", COPY) from cause


def _refused(path: Path, reason: str) -> InputError:
    """What to do about a pickle that torch's restricted reader does not read."""
    found = re.search(r"GLOBAL (\S+)", reason)
    what = f" ({found[1]})" if found else ", or is a pickle that torch's safe reader does not know"
    return InputError(
        f"refused: {path} contains code or objects beyond tensors{what}; nothing of it was executed",
        "Often these are harmless: numpy numbers in the state of the optimiser, or a whole module instead of its state dict. "
        "If you trust whoever made the file, write what is needed to a new one, and import that. This runs the file's code:\n"
        f"  import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False)\n"
        "  torch.save({k: c[k] for k in ('arch', 'epoch', 'state_dict', 'net') if k in c}, 'weights.pth')",
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if "rscli" in (file.metadata() or {}):
                raise InputError(f"{path} is one of rscli's model files already", "certify and predict read it as it is.")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as cause:
        raise InputError(f"{path} is not a whole safetensors file: {cause}", COPY) from cause


# --- settings ----------------------------------------------------------------------------------------------------------------


def _check_options(options: ImportOptions) -> None:
    if options.normalization not in NORMALIZATIONS:
        raise InputError(f"--normalization is {options.normalization!r}, but must be one of {', '.join(NORMALIZATIONS)}")
    if not options.out.exists():
        return
    if options.checkpoint.exists() and options.out.samefile(options.checkpoint):
        raise InputError(f"{options.out} is the checkpoint itself", "Write the model file elsewhere: --out FILE.")
    if not options.force:
        raise InputError(f"{options.out} exists already", "--force overwrites it; --out FILE writes elsewhere.")


def _plugins(options: ImportOptions, checkpoint: Checkpoint) -> tuple[dict[str, Plugin], dict[str, dict[str, Any]]]:
    """The plugins, and what the model file says of each, by section. Raises `ConfigError` naming every wrong setting."""
    chosen, problems_of_sets = parse_sets(options.sets)
    for key in list(chosen):
        if len(key) < 2 or key[0] not in IMPORTED:
            takes = ", ".join(f"{section}.KEY=VALUE" for section in IMPORTED)
            problems_of_sets.append(f"--set {dotted(key)} is not a setting of import: it takes {takes}")
            del chosen[key]
    named = checkpoint.arch if options.arch is None else options.arch
    arch = FIELD_ARCHS.get(named or "", {} if options.arch is None else {"name": named})
    settings = stack(DEFAULTS, flatten({"arch": arch}, checkpoint.path.name if options.arch is None else "--arch"))
    flags: Settings = {
        ("data", "name"): Setting(options.dataset, "--dataset"),
        ("noise", "name"): Setting(options.noise, "--noise"),
        ("noise", "sigma"): Setting(options.sigma, "--sigma"),
    }
    settings = stack(stack(settings, flags), chosen)
    if ("arch", "name") not in settings:
        raise _unknown_arch(checkpoint)
    problems, nested = Problems(settings, problems_of_sets), nest(settings)
    plugins = {name: plugin for name in IMPORTED if (plugin := build_section(name, nested[name], problems)) is not None}
    problems.check()
    if "pretrained" in type(plugins["arch"]).model_fields:
        plugins["arch"] = plugins["arch"].model_copy(update={"pretrained": False})  # the weights are in the file
    return plugins, {name: full_section(name, str(nested[name]["name"]), plugins[name]) for name in IMPORTED}


def _unknown_arch(checkpoint: Checkpoint) -> InputError:
    says = (
        "does not say which architecture it is of"
        if checkpoint.arch is None
        else f"says arch = {checkpoint.arch!r}, which is none of the field's names ({', '.join(FIELD_ARCHS)})"
    )
    hint = (
        "Name it: --arch NAME, with its fields as --set arch.KEY=VALUE; timm's models are timm/NAME. `rscli plugins` lists all."
    )
    return InputError(f"{checkpoint.path} {says}", hint)


# --- tensors -----------------------------------------------------------------------------------------------------------------


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


_DENSE_LAYER = re.compile(r"features\.block(\d+)\.layer(\d+)\.brc_(\d)\.(norm|conv)\.")
_DENSE_REST = (("features.conv0.", "conv1."), ("features.norm_last.", "bn."), ("classifier.", "fc."))


def _dense_name(name: str) -> str:
    """Our name of a tensor of `cifar_densenet40` in Jeong & Shin's code, which counts its layers from 1."""
    for theirs, ours in _DENSE_REST:
        name = name.replace(theirs, ours)
    kinds = {"norm": "bn", "conv": "conv"}
    return _DENSE_LAYER.sub(lambda m: f"dense{m[1]}.{int(m[2]) - 1}.{kinds[m[4]]}{m[3]}.", name)


def _check_fit(fit: Fit, checkpoint: Checkpoint, sections: Mapping[str, Mapping[str, Any]], classes: int) -> None:
    """Raises `InputError` with a line for every tensor that is missing, extra, of another shape, or not finite."""
    arch, data = sections["arch"], sections["data"]["name"]
    if (theirs := _other_classes(fit, classes)) is not None:
        name, count = theirs
        raise InputError(
            f"{checkpoint.path} was trained on {count} classes (the first dimension of {name}), and {data!r} has {classes}",
            "Name the data set that it was trained on: --dataset NAME, with its fields as --set data.KEY=VALUE.",
        )
    sorts = {
        "missing": [f"{name} {_shape(fit.expected[name])}" for name in fit.missing],
        "extra": [f"{name} {_shape(tensor)}" for name, tensor in fit.extra.items()],
        "misshapen": [f"{n} is {_shape(fit.tensors[n])}, and must be {_shape(fit.expected[n])}" for n in fit.misshapen],
        "not finite": [f"{n} holds NaN or infinite values" for n, t in fit.tensors.items() if not t.isfinite().all()],
    }
    if not any(sorts.values()):
        return
    for place, name in enumerate(list(fit.extra)[:SHOWN]):
        sorts["extra"][place] += f"; the nearest expected name is {_nearest(name, fit)}"
    fields = ", ".join(f"{key} = {value}" for key, value in arch.items() if key != "name" and value not in ({}, False))
    counts = ", ".join(f"{len(lines)} {sort}" for sort, lines in sorts.items() if lines)
    lines = [f"the tensors in {checkpoint.path} do not fit {arch['name']}{f' ({fields})' if fields else ''}: {counts}"]
    for sort, found in sorts.items():
        lines += [f"  {sort}: {line}" for line in found[:SHOWN]]
        lines += [f"  {sort}: and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    hint = "Is it of another architecture (--arch NAME), or of other fields (--set arch.KEY=VALUE)?"
    raise InputError("\n".join(lines), hint)


def _other_classes(fit: Fit, classes: int) -> tuple[str, int] | None:
    """A tensor of the last layer and its number of classes, if that number is all that does not fit."""
    if fit.missing or fit.extra or not fit.misshapen:
        return None
    shapes = [(fit.tensors[name].shape, fit.expected[name].shape) for name in fit.misshapen]
    counts = {there[0] if here[:1] == (classes,) and there[1:] == here[1:] else None for there, here in shapes}
    count = counts.pop()
    return (fit.misshapen[0], count) if count is not None and not counts else None


def _nearest(name: str, fit: Fit) -> str:
    """The expected name that an extra tensor most likely means: one that is missing, and of its shape, if there is any."""
    pool = fit.missing or list(fit.expected)
    alike = [other for other in pool if fit.expected[other].shape == fit.extra[name].shape]
    return get_close_matches(name.removeprefix(fit.prefix), alike or pool, n=1, cutoff=0)[0]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


# --- normalisation -----------------------------------------------------------------------------------------------------------

Constants = tuple[tuple[float, ...], tuple[float, ...]]


def take_constants(fit: Fit) -> tuple[Fit, Constants | None]:
    """The mean and std of a normalisation layer among the extra tensors, and what is left without them.

    Raises `InputError` if they cannot be those of images in [0, 1].
    """
    found = {kind: [n for n in fit.extra if n.rpartition(".")[2] in kind] for kind in (MEANS, STDS)}
    if any(len(names) != 1 for names in found.values()):
        return fit, None
    (mean,), (std,) = found[MEANS], found[STDS]
    values = tuple(fit.extra[mean].flatten().tolist()), tuple(fit.extra[std].flatten().tolist())
    if not (all(0 <= m <= 1 for m in values[0]) and all(0 < s < float("inf") for s in values[1])):
        raise InputError(
            f"the file normalises with {mean} = {_numbers(values[0])} and {std} = {_numbers(values[1])}",
            "Here pixels are in [0, 1] before any normalisation, so a mean must be in [0, 1] and a std above 0.",
        )
    extra = {name: tensor for name, tensor in fit.extra.items() if name not in (mean, std)}
    return Fit(fit.tensors, extra, fit.expected, fit.prefix), values


def choose_normalization(
    wanted: str, constants: Constants | None, spec: DataSpec, checkpoint: Checkpoint, prefix: str
) -> Normalization:
    """The normalisation in front of the network: what the file holds, or else what is `wanted` (`auto`, `dataset`, `none`).

    Raises `InputError` if the file's `constants` have the wrong number of channels, or are not what is wanted.
    """
    if constants is not None:
        return _from_file(wanted, constants, spec, checkpoint.path)
    if wanted == "none":
        return Normalization(None, None, "as --normalization none says")
    if spec.mean is None:
        return Normalization(None, None, "the data set has none")
    if wanted == "dataset":
        return Normalization(spec.mean, spec.std, "the data set's, as --normalization dataset says")
    if "1" in prefix.split("."):
        reason = f"assumed to be the data set's: in the file the network is behind another layer, under {prefix!r}"
        return Normalization(spec.mean, spec.std, reason)
    if checkpoint.key == "net" and not prefix:
        reason = "assumed, since the file is in the format of MACER's code; --normalization dataset otherwise"
        return Normalization(None, None, reason, sure=False)
    reason = "the data set's, assumed: nothing in the file tells; --normalization none if it was trained without"
    return Normalization(spec.mean, spec.std, reason, sure=False)


def _from_file(wanted: str, constants: Constants, spec: DataSpec, path: Path) -> Normalization:
    channels = spec.shape[0]
    mean, std = (values * channels if len(values) == 1 else values for values in constants)
    if not len(mean) == len(std) == channels:
        raise InputError(f"{path} normalises {len(mean)} channels, and the images of the data set have {channels}")
    same = spec.mean is not None and spec.std is not None and _close(mean, spec.mean) and _close(std, spec.std)
    if wanted == "none" or (wanted == "dataset" and not same):
        raise InputError(
            f"--normalization is {wanted}, but {path} holds another: mean {_numbers(mean)}, std {_numbers(std)}",
            "Leave the option out to use what the file holds.",
        )
    if same:
        return Normalization(spec.mean, spec.std, "in the file, and the data set's")
    theirs = "none" if spec.mean is None else f"mean {_numbers(spec.mean)}, std {_numbers(spec.std or ())}"
    return Normalization(mean, std, f"in the file; the data set's would be {theirs}", sure=False)


def _close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether the numbers are the same ones in float32, as files hold them."""
    return torch.equal(torch.tensor(a), torch.tensor(b))


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
