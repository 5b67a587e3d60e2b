"""Model files: what they hold, that they read back to the same bits, and what is said of files that are none."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rscli.config.layers import resolve
from rscli.errors import PluginError, RscliError
from rscli.models import modelfile
from rscli.models.card import ModelCard
from rscli.models.modelfile import load_model, save_model
from rscli.models.network import Classifier
from rscli.training.model_card import model_card
from rscli.training.trainer import initial_classifier

SETS = ["data.name=digits", "arch.name=cifar-resnet", "arch.depth=8", "noise.sigma=0.25", "loss.name=gaussian"]


def made(*sets: str) -> tuple[Classifier, ModelCard]:
    """A classifier with its initial weights, and its card."""
    resolved = resolve(sets=[*SETS, "optimizer.lr=0.1", "seed=3", *sets])
    spec = resolved.dataset.spec(Path())
    spec = spec.model_copy(update={"mean": (0.25,), "std": (0.5,)})
    return initial_classifier(resolved, spec), model_card(resolved, spec, {})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, *made())
    return path


def header(path: Path) -> dict:
    """The JSON at the beginning of a safetensors file, read by hand."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def with_header(path: Path, target: Path, change) -> Path:
    """A copy of the file with another header, lengths mended: only its content is wrong."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    new = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    new += b" " * (-len(new) % 8)
    target.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])
    return target


def with_card(path: Path, target: Path, change) -> Path:
    """A copy of the file whose card was changed."""

    def inner(head: dict) -> dict:
        head["__metadata__"]["rscli"] = json.dumps(change(json.loads(head["__metadata__"]["rscli"])))
        return head

    return with_header(path, target, inner)


# --- what is in it ---


def test_a_model_reads_back_as_it_was(written):
    classifier, card = made()
    loaded = load_model(written)
    assert loaded.source.card.model_copy(update={"sha256": ""}) == card
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor), name
    images = torch.rand(5, 1, 28, 28)
    with torch.inference_mode():
        assert torch.equal(loaded.network(images), classifier.eval()(images))
    assert not loaded.network.training
    assert loaded.noise.sigma == 0.25


def test_the_normalisation_of_the_card_is_in_front_of_the_network(written):
    classifier = load_model(written).network
    images = torch.rand(2, 1, 28, 28)
    with torch.inference_mode():
        assert torch.equal(classifier(images), classifier.network((images - 0.25) / 0.5))


def test_the_same_content_gives_the_same_bytes(written, tmp_path):
    for name in ("a", "b"):
        save_model(tmp_path / name, *made())
        assert (tmp_path / name).read_bytes() == written.read_bytes()
    again = load_model(written)
    save_model(tmp_path / "c", again.network, again.source.card)
    assert (tmp_path / "c").read_bytes() == written.read_bytes()


def test_other_content_gives_other_bytes(written, tmp_path):
    save_model(tmp_path / "seed", *made("seed=4"))
    assert (tmp_path / "seed").read_bytes() != written.read_bytes()


def test_the_fields_of_the_card_are_those_that_files_on_disk_have(written):
    """Format 2, frozen: another set of fields is another format, and old files must still be read."""
    fields = "format rscli arch noise data spec plugins config epochs origin preset overrides loss_state sha256"
    card = json.loads(header(written)["__metadata__"]["rscli"])
    assert set(card) == set(ModelCard.model_fields) == set(fields.split())
    assert set(card["spec"]) == {"class_names", "shape", "mean", "std", "test_transform", "augmentation", "sizes"}
    assert header(written)["__metadata__"].keys() == {"rscli"}
    assert card["format"] == modelfile.FORMAT == 2


def test_a_file_of_format_1_is_read(written, tmp_path):
    """As versions before contract 2 wrote them: no preset, no departures from it, nothing that a loss kept."""
    card = json.loads(header(written)["__metadata__"]["rscli"])
    old = {key: value for key, value in card.items() if key not in ("preset", "overrides", "loss_state")} | {"format": 1}
    network = load_model(written).network.network
    old["sha256"] = modelfile.content_digest(network.state_dict(), old)
    with_card(written, tmp_path / "m", lambda card: old)
    loaded = load_model(tmp_path / "m")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.network.network.state_dict().items())
    assert (loaded.source.card.format, loaded.source.card.preset, loaded.source.card.loss_state) == (1, None, {})
    assert old["config"] is not None


def test_the_card_says_where_every_plugin_came_from(written):
    card = load_model(written).source.card
    assert {(p["kind"], p["name"]) for p in card.plugins} == {
        ("datasets", "digits"),
        ("architectures", "cifar-resnet"),
        ("noises", "gaussian"),
        ("losses", "gaussian"),
        ("optimizers", "sgd"),
        ("schedules", "step"),
        ("loggers", "jsonl"),
        ("callbacks", "checkpoint"),
        ("callbacks", "collapse"),
    }
    assert {p["package"] for p in card.plugins} == {"rscli"}
    assert all(p["version"] for p in card.plugins)


def test_tensors_have_the_names_of_the_field(written):
    names = set(header(written)) - {"__metadata__"}
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.bias"} <= names
    assert not any(name.startswith(("network.", "normalize.", "module.")) for name in names)


# --- what is none ---


def answers(path: Path, *said: str) -> None:
    """Loading is refused in words that name the file, and with exit code 2."""
    with pytest.raises(RscliError) as error:
        load_model(path)
    assert error.value.exit_code == 2
    for text in (str(path), *said):
        assert text in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.01, 0.5, 0.9999], ids=str)
def test_a_truncated_file_is_refused(written, tmp_path, share):
    data = written.read_bytes()
    (tmp_path / "m").write_bytes(data[: int(len(data) * share)])
    answers(tmp_path / "m", "is not a complete safetensors file", "truncated")


def test_a_file_with_something_behind_its_end_is_refused(written, tmp_path):
    (tmp_path / "m").write_bytes(written.read_bytes() + b"\0")
    answers(tmp_path / "m", "is not a complete safetensors file")


def test_a_text_file_and_a_checkpoint_of_torch_are_refused(tmp_path):
    (tmp_path / "text").write_text("idx\tlabel\n" * 50)
    answers(tmp_path / "text", "another kind of file")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, tmp_path / "model.pt")
    answers(tmp_path / "model.pt", "torch.save")


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    answers(tmp_path, "there is no model file")
    answers(tmp_path / "nothing", "there is no model file")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "of-another-tool"])
def test_a_safetensors_file_of_another_tool_is_refused(tmp_path, metadata):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "m", metadata=metadata)
    answers(tmp_path / "m", "not a model file of rscli")


def test_one_changed_bit_of_the_weights_is_noticed(written, tmp_path):
    data = bytearray(written.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "m").write_bytes(data)
    answers(tmp_path / "m", "changed or damaged")


def test_weights_under_other_names_are_noticed(written, tmp_path):
    def renamed(head: dict) -> dict:
        head["fc.bias"], head["bn1.bias"] = head["bn1.bias"], head["fc.bias"]
        return head

    with_header(written, tmp_path / "m", renamed)
    answers(tmp_path / "m", "changed or damaged")


@pytest.mark.parametrize(
    "change",
    [{"noise": {"name": "gaussian", "sigma": 0.5}}, {"epochs": 1}, {"config": None}],
    ids=["sigma", "epochs", "no-configuration"],
)
def test_a_changed_description_is_noticed(written, tmp_path, change):
    """A model file with another sigma would certify other radii than its own."""
    with_card(written, tmp_path / "m", lambda card: {**card, **change})
    answers(tmp_path / "m", "changed or damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda card: {**card, "more": 1},
        lambda card: {key: value for key, value in card.items() if key != "spec"},
        lambda card: {**card, "plugins": "none"},
        lambda card: [card],
        lambda card: None,
    ],
    ids=["a-field-too-many", "a-field-missing", "of-another-type", "a-list", "null"],
)
def test_a_description_of_another_form_is_refused(written, tmp_path, change):
    with_card(written, tmp_path / "m", change)
    answers(tmp_path / "m", "broken")


def test_a_description_that_is_no_json_is_refused(written, tmp_path):
    def broken(head: dict) -> dict:
        head["__metadata__"]["rscli"] = head["__metadata__"]["rscli"][:-1]
        return head

    with_header(written, tmp_path / "m", broken)
    answers(tmp_path / "m", "broken")


def test_a_newer_format_asks_for_an_update(written, tmp_path):
    with_card(written, tmp_path / "m", lambda card: {**card, "format": 3, "something_new": True})
    answers(tmp_path / "m", "has format 3", "reads formats up to 2", "Update rscli.")


def test_a_plugin_that_is_missing_is_named_with_its_package(tmp_path):
    classifier, card = made()
    plugins = [{**p, "package": "away", "version": "1.2.3"} if p["kind"] == "architectures" else p for p in card.plugins]
    save_model(tmp_path / "m", classifier, card.model_copy(update={"plugins": plugins}))
    answers(tmp_path / "m", "architectures plugin 'cifar-resnet'", "away 1.2.3", "pip install away")
    with pytest.raises(PluginError):
        load_model(tmp_path / "m")


def test_fields_that_a_plugin_no_longer_takes_are_named(tmp_path):
    classifier, card = made()
    save_model(tmp_path / "m", classifier, card.model_copy(update={"arch": {**card.arch, "width": 3}}))
    answers(tmp_path / "m", "width")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    classifier, card = made()
    save_model(tmp_path / "m", classifier, card.model_copy(update={"arch": {**card.arch, "depth": 14}}))
    answers(tmp_path / "m", "do not fit its architecture 'cifar-resnet'")


# --- writing ---


@pytest.mark.parametrize("broken", ["write_bytes", "replace"])
def test_nothing_half_written_is_left_when_saving_fails(written, tmp_path, monkeypatch, broken):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"what was there before")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, broken, full)
    with pytest.raises(RscliError):
        save_model(path, *made())
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"what was there before"


def test_tensors_that_share_memory_are_written(tmp_path):
    """Tied weights: safetensors refuses views of one storage."""
    classifier, card = made()
    first = classifier.network.layer1[0].conv1
    classifier.network.layer1[0].conv2.weight = first.weight
    save_model(tmp_path / "m", classifier, card)
    loaded = load_model(tmp_path / "m").network.network
    assert torch.equal(loaded.layer1[0].conv1.weight, loaded.layer1[0].conv2.weight)
    assert torch.equal(loaded.layer1[0].conv1.weight, first.weight)
