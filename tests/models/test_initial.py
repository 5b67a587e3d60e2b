"""Initial weights from a file: what is taken, what is not, the classes that are matched by name, and the normalisation."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from rscli.api import DataSpec, Transform
from rscli.cli.app import app
from rscli.config.layers import Resolved, resolve
from rscli.errors import InputError
from rscli.models.card import ModelCard
from rscli.models.modelfile import load_model, read_card, read_model, save_model
from rscli.models.network import Classifier, build_classifier, head_of
from rscli.registry import installed
from rscli.runtime.progress import Silent
from rscli.training.train import TrainOptions, outlook, train
from rscli.training.trainer import initial_classifier

RESNET8 = {"name": "cifar-resnet", "depth": 8}


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    warn = note


def spec(names: tuple[str, ...], shape=(3, 32, 32), **more) -> DataSpec:
    return DataSpec(class_names=names, shape=shape, test_transform=Transform(channels=shape[0], crop=shape[1:]), **more)


def pets(folder: Path, names: tuple[str, ...]) -> Path:
    """Two training images and a test image of each class, 32x32."""
    source = np.random.default_rng(0)
    for split, name, number in [(s, n, k) for s in ("train", "test") for n in names for k in range(2)]:
        path = folder / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return folder


def model_file(path: Path, names: tuple[str, ...], arch=RESNET8, **more) -> dict[str, torch.Tensor]:
    """Writes a model file of random weights, every tensor of it; returns these."""
    torch.manual_seed(7)
    wanted = spec(names, **more)
    classifier = Classifier(installed().build("architectures", arch).build(wanted), wanted)
    for tensor in classifier.network.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5)
    noise, data = {"name": "gaussian", "sigma": 0.25}, {"name": "imagefolder", "path": "elsewhere"}
    save_model(path, classifier, ModelCard(rscli="1", arch=arch, noise=noise, data=data, spec=wanted, plugins=[]))
    return {name: tensor.clone() for name, tensor in classifier.network.state_dict().items()}


def settings(data: Path, init: Path | None = None, *more: str) -> Resolved:
    values = ["data.name=imagefolder", f"data.path={data}", "data.size=32", "arch.name=cifar-resnet", "arch.depth=8"]
    values += ["noise.sigma=0.5", "loss.name=gaussian", "optimizer.lr=0.01", "epochs=1", "batch=4", *more]
    return resolve(sets=values, flags={"init": init and str(init)})


def started(resolved: Resolved) -> Classifier:
    return initial_classifier(resolved, resolved.dataset.spec(Path("nowhere")))


def options(out: Path, **changes) -> TrainOptions:
    return TrainOptions(out=out, data_dir=out, device="cpu", workers=0, **changes)


# --- model files of ours -----------------------------------------------------------------------------------------------------


def test_the_same_classes_take_everything(tmp_path):
    data = pets(tmp_path / "pets", ("cat", "dog"))
    weights = model_file(tmp_path / "m.safetensors", ("cat", "dog"))
    classifier = started(settings(data, tmp_path / "m.safetensors"))
    state = classifier.network.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in state)
    digest = hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()
    assert classifier.start.sha256 == digest
    assert classifier.start.notes == (
        f"took {len(state)} of {len(state)} tensors from {tmp_path / 'm.safetensors'} (sha256 {digest[:12]})",
    )


def test_classes_are_matched_by_name(tmp_path):
    """dog and the accented name (composed here, decomposed there) keep their rows; axolotl is new, zebra is left behind."""
    data = pets(tmp_path / "pets", ("axolotl", "dog", "pâté"))
    weights = model_file(tmp_path / "m.safetensors", ("zebra", "pa\u0302te\u0301", "cat", "dog"))
    classifier = started(settings(data, tmp_path / "m.safetensors"))
    fresh = started(settings(data)).network.state_dict()
    state = classifier.network.state_dict()
    for name in ("fc.weight", "fc.bias"):
        assert torch.equal(state[name][1], weights[name][3])
        assert torch.equal(state[name][2], weights[name][1])
        assert torch.equal(state[name][0], fresh[name][0])
    assert all(torch.equal(state[name], weights[name]) for name in state if not name.startswith("fc."))
    assert "the rows of 2 of 4 classes, matched by name: dog, pâté; new are axolotl" in classifier.start.notes[1]


def test_as_many_other_classes_are_not_taken_for_the_same(tmp_path):
    """The shapes fit, but the rows mean other classes; where the same are in another order, they are reordered."""
    model_file(tmp_path / "m.safetensors", ("lion", "tiger"))
    data = pets(tmp_path / "pets", ("cat", "dog"))
    classifier = started(settings(data, tmp_path / "m.safetensors"))
    assert torch.equal(classifier.network.fc.weight, started(settings(data)).network.fc.weight)
    assert "the head is new: fc.bias, fc.weight" in classifier.start.notes
    weights = model_file(tmp_path / "n.safetensors", ("dog", "cat"))
    assert torch.equal(started(settings(data, tmp_path / "n.safetensors")).network.fc.bias, weights["fc.bias"].flip(0))


def test_the_normalisation_comes_with_the_weights(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.5, 0.75)
    model_file(tmp_path / "m.safetensors", ("cat", "dog"), mean=mean, std=std)
    data = pets(tmp_path / "pets", ("cat", "dog"))
    resolved = settings(data, tmp_path / "m.safetensors")
    listener = Listener()
    model = train(resolved, options(tmp_path / "run"), listener)
    assert any("mean 0.5, 0.4, 0.3, std 0.25, 0.5, 0.75 (that of the model file), in place" in note for note in listener.notes)
    card = read_card(model)
    assert (card.spec.mean, card.spec.std) == (mean, std)
    network = load_model(model).network
    images = torch.rand(2, 3, 32, 32)
    by_hand = network.network((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.testing.assert_close(network(images), by_hand)
    digest = hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()
    assert card.origin == f"trained from the weights in m.safetensors (sha256 {digest})"
    chosen = started(settings(data, tmp_path / "m.safetensors", "data.mean=[0.1,0.1,0.1]", "data.std=[0.2,0.2,0.2]"))
    assert chosen.normalize.mean.flatten().tolist() == pytest.approx([0.1] * 3)
    assert "data.mean and data.std are used" in chosen.start.notes[-1]


def test_a_run_folder_is_as_good_as_its_model(tmp_path):
    data = pets(tmp_path / "pets", ("cat", "dog"))
    model = train(settings(data), options(tmp_path / "first"), Silent())
    classifier = started(settings(data, tmp_path / "first"))
    weights, _ = read_model(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in classifier.network.state_dict().items())


# --- files of others ---------------------------------------------------------------------------------------------------------


def foreign(path: Path, classes: int, depth: int = 8, prefix: str = "", **more: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    net = installed().build("architectures", {**RESNET8, "depth": depth}).build(spec(tuple(map(str, range(classes)))))
    state = net.state_dict()
    content = {**{prefix + name: tensor for name, tensor in state.items()}, **more}
    save_file(content, path) if path.suffix == ".safetensors" else torch.save({"state_dict": content, "epoch": 3}, path)
    return state


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth.tar"])
@pytest.mark.parametrize(("classes", "new"), [(2, False), (1000, True)])
def test_a_checkpoint_of_other_code(tmp_path, name, classes, new):
    """It does not name its classes: as many are taken for the same, more or fewer make a new head."""
    data = pets(tmp_path / "pets", ("cat", "dog"))
    weights = foreign(tmp_path / name, classes, prefix="module.", **{"module.aux.weight": torch.zeros(3)})
    classifier = started(settings(data, tmp_path / name))
    state = classifier.network.state_dict()
    assert {key for key in state if not torch.equal(state[key], weights[key])} == ({"fc.weight", "fc.bias"} if new else set())
    text = "\n".join(classifier.start.notes)
    assert ("the head is new: fc.bias, fc.weight" in text) == new
    assert "left in the file: module.aux.weight" in text
    assert "the normalisation is a guess" in text


def test_constants_in_the_file_are_the_normalisation(tmp_path):
    data = pets(tmp_path / "pets", ("cat", "dog"))
    constants = {"0.mean": torch.full((3,), 0.5), "0.std": torch.full((3,), 0.25)}
    foreign(tmp_path / "w.pth", 2, prefix="1.", **constants)
    classifier = started(settings(data, tmp_path / "w.pth"))
    assert (classifier.spec.mean, classifier.spec.std) == ((0.5,) * 3, (0.25,) * 3)
    assert not any("guess" in note for note in classifier.start.notes)


@pytest.mark.parametrize("depth", [14, 20])
def test_what_does_not_fit_is_refused(tmp_path, depth):
    """A deeper network's weights, and a shallower one's: all the tensors are named that are too many, or missing."""
    data = pets(tmp_path / "pets", ("cat", "dog"))
    foreign(tmp_path / "w.pth", 2, depth=depth)
    with pytest.raises(InputError, match=r"extra: layer1\.1\.conv1\.weight") as error:
        started(settings(data, tmp_path / "w.pth"))
    assert "All but the head must fit" in error.value.hint
    model_file(tmp_path / "m.safetensors", ("cat", "dog"))
    with pytest.raises(InputError, match=r"missing: layer1\.1\.conv1\.weight"):
        started(settings(data, tmp_path / "m.safetensors", f"arch.depth={depth}"))


def test_nothing_fits(tmp_path):
    data = pets(tmp_path / "pets", ("cat", "dog"))
    save_file({"head": torch.zeros(3), "tail": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"none of the 2 tensors in .* goes into cifar-resnet"):
        started(settings(data, tmp_path / "w.safetensors"))


def test_other_channels_and_broken_numbers_are_refused(tmp_path):
    data = pets(tmp_path / "pets", ("cat", "dog"))
    model_file(tmp_path / "grey.safetensors", ("cat", "dog"), shape=(1, 32, 32))
    with pytest.raises(InputError, match="trained on images of 1 channels"):
        started(settings(data, tmp_path / "grey.safetensors"))
    foreign(tmp_path / "w.pth", 2, **{"bn1.weight": torch.full((16,), torch.nan)})
    with pytest.raises(InputError, match=r"not finite: bn1\.weight"):
        started(settings(data, tmp_path / "w.pth"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": {"x": Evil()}}))
    data = pets(tmp_path / "pets", ("cat", "dog"))
    with pytest.raises(InputError):
        started(settings(data, tmp_path / "evil.pth"))
    assert not (tmp_path / "it-ran").exists()


def test_a_file_that_is_not_there(tmp_path):
    data = pets(tmp_path / "pets", ("cat", "dog"))
    with pytest.raises(InputError, match=r"no file .*gone\.safetensors to take initial weights from"):
        started(settings(data, tmp_path / "gone.safetensors"))


def test_a_damaged_model_file_is_refused(tmp_path):
    model_file(tmp_path / "m.safetensors", ("cat", "dog"))
    content = bytearray((tmp_path / "m.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="was changed or damaged after it was written"):
        started(settings(pets(tmp_path / "pets", ("cat", "dog")), tmp_path / "m.safetensors"))


# --- the head ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "head"),
    [
        ({"name": "lenet"}, {"fc2.weight", "fc2.bias"}),
        ({"name": "timm/resnet18"}, {"fc.weight", "fc.bias"}),
        ({"name": "timm/test_convnext"}, {"head.fc.weight", "head.fc.bias"}),
        (
            {"name": "timm/deit_tiny_distilled_patch16_224", "kwargs": {"depth": 1}},
            {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"},
        ),
    ],
)
def test_the_head_is_what_depends_on_the_classes(arch, head):
    before = torch.get_rng_state()
    assert head_of(installed().build("architectures", arch), spec(("a", "b"))) == head
    assert torch.equal(torch.get_rng_state(), before)


# --- runs --------------------------------------------------------------------------------------------------------------------


def test_resuming_asks_for_the_same_file_by_its_content(tmp_path):
    data = pets(tmp_path / "pets", ("cat", "dog"))
    model_file(tmp_path / "m.safetensors", ("cat", "dog"))
    train(settings(data, tmp_path / "m.safetensors"), options(tmp_path / "run"), Silent())
    (tmp_path / "m.safetensors").rename(tmp_path / "moved.safetensors")
    train(settings(data, tmp_path / "moved.safetensors"), options(tmp_path / "run", resume=True), Silent())
    model_file(tmp_path / "m.safetensors", ("dog", "cat"))
    for other in (tmp_path / "m.safetensors", None):
        with pytest.raises(InputError, match=r"init_sha256: '[0-9a-f]{64}' in .*, .* now"):
            train(settings(data, other), options(tmp_path / "run", resume=True), Silent())


def test_the_weights_survive_a_learning_rate_of_nearly_nothing(tmp_path):
    """A whole run: what is certified at the end is what it started from."""
    data = pets(tmp_path / "pets", ("cat", "dog"))
    weights = model_file(tmp_path / "m.safetensors", ("cat", "dog"))
    model = train(settings(data, tmp_path / "m.safetensors", "optimizer.lr=1e-12"), options(tmp_path / "run"), Silent())
    tensors, _ = read_model(model)
    for name in ("conv1.weight", "fc.weight", "layer3.0.bn2.bias"):
        torch.testing.assert_close(tensors[name], weights[name], rtol=1e-6, atol=1e-6)


def test_the_command_says_what_it_takes_in_the_dry_run(tmp_path):
    data = pets(tmp_path / "pets", ("cat", "dog"))
    model_file(tmp_path / "m.safetensors", ("cat", "dog"))
    words = ["train", "--dry-run", "--init", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "run")]
    sets = ["data.name=imagefolder", f"data.path={data}", "data.size=32", "arch.name=cifar-resnet", "arch.depth=8"]
    sets += ["noise.sigma=0.5", "loss.name=gaussian", "optimizer.lr=0.01", "freeze=all but the head"]
    done = CliRunner().invoke(app, [*words, *(word for one in sets for word in ("--set", one))], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "m.safetensors --init" in text
    assert "tensors from" in text
    assert "frozen: 27 of 29 tensors" in text
    assert "parameters 130" in text


def test_the_classifier_of_a_run_without_init_is_as_before(tmp_path):
    data = pets(tmp_path / "pets", ("cat", "dog"))
    resolved = settings(data)
    classifier = started(resolved)
    assert classifier.start.notes == ()
    assert outlook(resolved, options(tmp_path)).notes == ()
    fresh = build_classifier(resolved.architecture, resolved.dataset.spec(tmp_path))
    assert isinstance(classifier.normalize, nn.Identity)
    assert classifier.state_dict().keys() == fresh.state_dict().keys()
