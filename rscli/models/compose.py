"""Models put together by a composite architecture: an ensemble of model files, a denoiser in front of a classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import nn

from rscli import __version__
from rscli.api import Architecture, Composite, DataSpec, Noise, Normalization, Plugin, fields_of, parts_of
from rscli.config.decode import BoundError, check_value
from rscli.config.layers import build_section, full_section
from rscli.config.problems import Problems
from rscli.config.settings import flatten
from rscli.errors import InputError
from rscli.models.card import ModelCard
from rscli.models.modelfile import card_of, recorded_plugin
from rscli.models.network import Classifier, HostParts, build_classifier
from rscli.models.smoothed import Smoothed
from rscli.registry import installed
from rscli.runtime.guard import broken

ENSEMBLES = "ensembles"
"""The word, in the entry-point group of the defaults, for the architecture that makes an ensemble of its field `members`."""


@dataclass(frozen=True)
class _Given:
    """What is given for one part: its section, the network with its weights, and the model that it came from, if any."""

    section: dict[str, Any]
    network: nn.Module
    model: Smoothed | None = None
    constants: Normalization | None = None
    """The normalisation in front of the network; None: no layer, or the network's own affair."""


def compose(arch: str, fields: Mapping[str, Any], *, sigma: float | None = None) -> Smoothed:
    """A classifier of the composite architecture `arch`, on the CPU, in eval mode, of which a model file can be written.

    `fields` are its hyper-parameters. A field that holds architectures takes models that came from model files (or were
    composed of such), or pairs (network, section): a network in memory, and the architecture plugin, by name or as a section,
    that has its tensors. The weights are copied. Class names, shape, transform, noise and data are those of the models, which
    must agree; `sigma`, in [0, 1] pixels, may be left out if they agree in it, too.

    Raises `InputError` if they do not agree, come from no model file, or do not fit; `ConfigError` for fields that do not hold.
    """
    given = {key: _given(value) for key, value in fields.items()}
    found = list(_leaves(list(given.values())))
    models = [one.model for one in found if one.model is not None]
    if not models:
        raise InputError("no model says which classes and images this is for", "Give one model of rscli.load(FILE) or more.")
    sigma = _agreed(models, sigma)
    spec, own = _normalization(found, card_of(models[0]).spec)
    plugin = _composite({"name": arch, **{key: _sections(value, own) for key, value in given.items()}})
    ordered = [one for key in type(plugin).model_fields for one in _leaves(given.get(key))]
    classifier = _with_weights(plugin, spec, ordered)
    noise = _noise(models[0], sigma)
    card = _card(arch, plugin, spec, sigma, found)
    return Smoothed(classifier.eval(), noise, spec.class_names, shape=spec.shape, transform=spec.test_transform, card=card)


def ensemble(models: Sequence[Smoothed], fields: Mapping[str, Any], *, sigma: float | None = None) -> Smoothed:
    """The ensemble of `models`, with further `fields` of the architecture that makes it. Raises as `compose` does."""
    return compose(installed().default(ENSEMBLES), {"members": list(models), **fields}, sigma=sigma)


def _given(value: Any) -> Any:
    """`value` with a `_Given` in the place of every model and every pair."""
    if isinstance(value, Smoothed):
        return _of_model(value)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], nn.Module):
        return _Given({"name": value[1]} if isinstance(value[1], str) else dict(value[1]), value[0])
    if isinstance(value, nn.Module):
        raise _unknown_network()
    if isinstance(value, list | tuple):
        return [_given(item) for item in value]
    return {key: _given(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _of_model(model: Smoothed) -> _Given:
    """A model's architecture, every name in it with the package that it was taken from, and its normalisation."""
    if model.card is None or not isinstance(model.network, Classifier):
        raise _unknown_network()
    name, plugin = recorded_plugin("architectures", model.card.arch, model.card, _named(model))
    spec, constants = model.card.spec, None
    inside = cast(Architecture, plugin).normalizes and not isinstance(plugin, Composite)
    if spec.mean is not None and spec.std is not None and not inside:
        constants = Normalization(mean=spec.mean, std=spec.std)
    return _Given(full_section("arch", name, plugin), model.network.network, model, constants)


def _unknown_network() -> InputError:
    return InputError(
        "a network in memory does not say how it is built, so it cannot be a part of a model file",
        "Give a model of rscli.load(FILE), or a pair (network, section) that names the architecture plugin.",
    )


def _leaves(value: Any) -> Iterator[_Given]:
    if isinstance(value, _Given):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Mapping):
        yield from _leaves(list(value.values()))


def _sections(value: Any, own: bool) -> Any:
    """`value` with sections in the place of what is given; with `own`, each says its normalisation itself."""
    if isinstance(value, _Given):
        said = {} if value.constants is None or not own else {"normalization": value.constants.model_dump(mode="json")}
        return {**value.section, **said}
    if isinstance(value, list):
        return [_sections(item, own) for item in value]
    return {key: _sections(item, own) for key, item in value.items()} if isinstance(value, Mapping) else value


def _normalization(found: Sequence[_Given], spec: DataSpec) -> tuple[DataSpec, bool]:
    """What the composed network knows of its data, and whether each part says its normalisation itself, as they differ."""
    constants = {one.constants for one in found if one.model is not None}
    if len(constants) == 1:
        only = constants.pop()
        return spec.model_copy(update={"mean": only and only.mean, "std": only and only.std}), False
    return spec.model_copy(update={"mean": None, "std": None}), True


def _agreed(models: Sequence[Smoothed], sigma: float | None) -> float:
    """The sigma of the models, or `sigma`. Raises `InputError`, saying what differs, unless they can be put together."""
    first = models[0]
    here = card_of(first).spec
    for model in models[1:]:
        there = card_of(model).spec
        for what, name in (("class names", "class_names"), ("input shape", "shape"), ("test transform", "test_transform")):
            if getattr(here, name) != getattr(there, name):
                hint = "Only models of the same classes and images can be put together."
                raise _different(what, first, getattr(here, name), model, getattr(there, name), hint)
        if sigma is None and first.sigma != model.sigma:
            hint = "Say which noise the composed model is for: sigma=..., or --sigma."
            raise _different("sigma", first, first.sigma, model, model.sigma, hint)
        noises = [(type(one.noise), {**fields_of(one.noise), "sigma": None}) for one in (first, model)]
        if noises[0] != noises[1]:
            hint = "Only models for the same noise can be put together."
            raise _different("noise", first, first.noise, model, model.noise, hint)
    return first.sigma if sigma is None else sigma


def _different(what: str, first: Smoothed, here: Any, other: Smoothed, there: Any, hint: str) -> InputError:
    return InputError(f"{what} of {_named(first)}: {here!r:.200}; of {_named(other)}: {there!r:.200}", hint)


def _named(model: Smoothed) -> str:
    return "a model in memory" if model.source is None else str(model.source.path)


def _composite(section: dict[str, Any]) -> Composite:
    """The architecture of a section. Raises `ConfigError` for fields that do not hold, `InputError` if it has no parts."""
    plugin = _plugin("arch", section)
    if not isinstance(plugin, Composite):
        raise InputError(f"the architecture {section['name']!r} has no parts", "Name one that is made of other architectures.")
    return plugin


def _noise(model: Smoothed, sigma: float) -> Noise:
    """The noise of a model at `sigma`. Raises `ConfigError` for a sigma that it does not take."""
    card = card_of(model)
    name, _ = recorded_plugin("noises", card.noise, card, _named(model))
    return cast(Noise, _plugin("noise", {**card.noise, "name": name, "sigma": sigma}))


def _plugin(section: str, fields: dict[str, Any]) -> Plugin:
    problems = Problems(flatten({section: fields}, "as given"))
    plugin = build_section(section, fields, problems)
    problems.check()
    return cast(Plugin, plugin)


def _with_weights(plugin: Composite, spec: DataSpec, given: Sequence[_Given]) -> Classifier:
    """The network with the weights of what is given for its parts, in their order."""
    parts = list(parts_of(plugin))
    if len(parts) != len(given):
        hint = "Give a model, or a pair (network, section), for each of them."
        raise InputError(f"there are {len(parts)} architectures, and weights for {len(given)} of them", hint)
    weights = {id(part): one.network for part, one in zip(parts, given, strict=True)}
    host = HostParts(weights=False)
    classifier = build_classifier(plugin, spec, weights=False, parts=host)
    if {id(part) for part, _ in host.built} != weights.keys():
        raise broken(plugin, "compose", "did not build exactly the parts that it holds")
    for part, network in host.built:
        try:
            network.load_state_dict(weights[id(part)].state_dict())
        except RuntimeError as cause:
            text = " ".join(str(cause).split())[:1000]
            raise InputError(f"the network given for {part.name!r} does not have its tensors: {text}") from cause
    return classifier


def _card(arch: str, plugin: Composite, spec: DataSpec, sigma: float, found: Sequence[_Given]) -> ModelCard:
    """What a model file says of the composed model; data and noise as the first model says.

    Raises `InputError` if it could not be read again, because parts are inside of parts too often.
    """
    first, registry = next(card_of(one.model) for one in found if one.model is not None), installed()
    origins = [registry.provenance("architectures", arch), *registry.part_provenance(plugin)]
    card = ModelCard(
        rscli=__version__,
        arch=full_section("arch", arch, plugin),
        noise={**first.noise, "sigma": sigma},
        data=first.data,
        spec=spec,
        plugins=[*map(asdict, dict.fromkeys(origins)), *(p for p in first.plugins if p["kind"] in ("datasets", "noises"))],
        origin=f"composed of {', '.join(map(_origin, found))}",
    )
    try:
        check_value(card.model_dump(mode="json"))
    except BoundError as cause:
        raise InputError(f"the description of the composed model could not be read again: {cause}", "Nest less.") from cause
    return card


def _origin(one: _Given) -> str:
    if one.model is None:
        return f"{one.section['name']} in memory"
    if (source := one.model.source) is None:
        return f"({card_of(one.model).origin})"
    return f"{source.path.name} (sha256 {source.sha256})"
