"""`rscli import`: checkpoints in the field's format, written by plain torch, predict as the network that they came from."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from foreign import (
    CIFAR_MEAN,
    CIFAR_STD,
    OTHER_MEAN,
    OTHER_STD,
    RESNET8,
    Constants,
    Named,
    Saved,
    bring,
    network,
    published,
    same_predictions,
)
from rscli.cli.boundary import boundary
from rscli.cli.import_ import import_
from rscli.errors import ConfigError, InputError, RscliError
from rscli.models.importing.keys import fit_tensors
from rscli.models.modelfile import load_model
from rscli.registry import installed
from runs import Listening


def refusal(path: Path, **changes) -> RscliError:
    with pytest.raises(RscliError) as caught:
        bring(path, **changes)
    assert not path.with_name("model.safetensors").exists()
    return caught.value


# --- each prefix, each format ------------------------------------------------------------------------------------------------

NORMALIZED = {
    "1.": lambda net: nn.Sequential(Constants(CIFAR_MEAN, CIFAR_STD), net),
    "1.module.": lambda net: nn.Sequential(Constants(CIFAR_MEAN, CIFAR_STD), nn.DataParallel(net)),
    "module.1.": lambda net: nn.DataParallel(nn.Sequential(Constants(CIFAR_MEAN, CIFAR_STD), net)),
    "module.1.module.": lambda net: nn.DataParallel(NORMALIZED["1.module."](net)),
}
BARE = {"": lambda net: net, "module.": nn.DataParallel, "module.module.": lambda net: nn.DataParallel(nn.DataParallel(net))}


@pytest.mark.parametrize("prefix", NORMALIZED)
def test_a_network_behind_a_normalisation_layer_predicts_identically(prefix, tmp_path):
    source = NORMALIZED[prefix](network(RESNET8))
    said = Listening()
    found = bring(published(tmp_path / "checkpoint.pth.tar", source), said)
    model = load_model(found.model)
    assert found.prefix == prefix
    assert same_predictions(model, source)
    assert (model.source.card.spec.mean, model.source.card.spec.std) == (CIFAR_MEAN, CIFAR_STD)
    assert said.notes == [str(found.normalization)]
    assert "0.4914, 0.4822, 0.4465" in said.notes[0]
    assert "assumed" in said.notes[0]


@pytest.mark.parametrize("prefix", BARE)
def test_a_network_without_normalisation_predicts_identically(prefix, tmp_path):
    source = BARE[prefix](network(RESNET8))
    found = bring(published(tmp_path / "c.pth", source), normalization="none")
    assert (found.prefix, found.normalization.mean) == (prefix, None)
    assert same_predictions(load_model(found.model), source)


@pytest.mark.parametrize("prefix", BARE)
def test_nothing_in_front_means_the_normalisation_of_the_data_set_with_a_warning(prefix, tmp_path):
    net = BARE[prefix](network(RESNET8))
    said = Listening()
    found = bring(published(tmp_path / "c.pth", net), said)
    assert same_predictions(load_model(found.model), nn.Sequential(Constants(CIFAR_MEAN, CIFAR_STD), net))
    assert "--normalization none" in said.warnings[0]


def test_the_format_of_macer_has_no_normalisation(tmp_path):
    source = network(RESNET8)
    torch.save({"net": source.state_dict(), "epoch": 440}, tmp_path / "440.pth")
    said = Listening()
    found = bring(tmp_path / "440.pth", said)
    assert same_predictions(load_model(found.model), source)
    assert found.epochs == 440
    assert said.warnings[0].startswith("normalisation: none (assumed")


@pytest.mark.parametrize("form", ["zip", "legacy", "bare dict", "safetensors", "half"])
def test_every_form_of_file(form, tmp_path):
    source = network(RESNET8)
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "half":
        source.half()
    tensors = source.state_dict()
    if form == "safetensors":
        save_file(tensors, path)
    else:
        content = tensors if form == "bare dict" else {"state_dict": tensors}
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    model = load_model(bring(path, normalization="none").model)
    assert same_predictions(model, source.float())
    assert model.source.card.epochs is None


def test_lenet_of_the_field_needs_no_option(tmp_path):
    source = nn.Sequential(nn.Identity(), network({"name": "lenet"}, (1, 28, 28)))
    said = Listening()
    found = bring(published(tmp_path / "c.pth", source, arch="lenet"), said, arch=None, sets=(), dataset="digits", sigma=0.25)
    model = load_model(found.model)
    assert same_predictions(model, source, (1, 28, 28))
    assert (model.source.card.arch, model.noise.sigma) == ({"name": "lenet"}, 0.25)
    assert said.notes == ["normalisation: none (the data set has none)"]


def test_old_checkpoints_lack_the_counters_of_batches(tmp_path):
    source = nn.Sequential(Constants(CIFAR_MEAN, CIFAR_STD), network(RESNET8))
    kept = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    model = load_model(bring(published(tmp_path / "c.pth", source, state_dict=kept)).model)
    assert same_predictions(model, source)
    assert model.network.network.bn1.num_batches_tracked == 0


# --- architectures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [20, pytest.param(110, marks=pytest.mark.slow)])
def test_the_field_s_residual_networks_are_recognised(depth, tmp_path):
    source = nn.Sequential(Constants(CIFAR_MEAN, CIFAR_STD), network({"name": "cifar-resnet", "depth": depth}))
    found = bring(published(tmp_path / "c.pth", source, arch=f"cifar_resnet{depth}"), arch=None, sets=())
    assert found.arch == {"name": "cifar-resnet", "depth": depth}
    assert same_predictions(load_model(found.model), source)


class PublishedDenseNet(nn.Module):
    """DenseNet-40 computed from a state dict with the names of Jeong & Shin's code, written down independently of ours."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.tensors: dict[str, Tensor] = {}

        def conv(name: str, inputs: int, outputs: int, size: int) -> None:
            self.tensors[f"{name}.weight"] = torch.randn(outputs, inputs, size, size, generator=random) / (inputs**0.5 * size)

        def norm(name: str, channels: int) -> None:
            for part in ("weight", "bias", "running_mean", "running_var"):
                self.tensors[f"{name}.{part}"] = torch.rand(channels, generator=random) + 0.5
            self.tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)

        conv("features.conv0", 3, 24, 3)
        for block in (1, 2, 3):
            for layer in (1, 2, 3, 4, 5, 6):
                inputs = 24 + 12 * (6 * (block - 1) + layer - 1)
                norm(f"features.block{block}.layer{layer}.brc_1.norm", inputs)
                conv(f"features.block{block}.layer{layer}.brc_1.conv", inputs, 48, 1)
                norm(f"features.block{block}.layer{layer}.brc_2.norm", 48)
                conv(f"features.block{block}.layer{layer}.brc_2.conv", 48, 12, 3)
        norm("features.norm_last", 240)
        self.tensors["classifier.weight"] = torch.randn(10, 240, generator=random)
        self.tensors["classifier.bias"] = torch.randn(10, generator=random)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (self.tensors[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.tensors["features.conv0.weight"], padding=1)
        for block in (1, 2, 3):
            for layer in (1, 2, 3, 4, 5, 6):
                name = f"features.block{block}.layer{layer}"
                y = F.conv2d(self._norm(x, f"{name}.brc_1.norm"), self.tensors[f"{name}.brc_1.conv.weight"])
                y = F.conv2d(self._norm(y, f"{name}.brc_2.norm"), self.tensors[f"{name}.brc_2.conv.weight"], padding=1)
                x = torch.cat((x, y), 1)
            x = F.avg_pool2d(x, 2) if block < 3 else x
        x = F.avg_pool2d(self._norm(x, "features.norm_last"), 8).flatten(1)
        return F.linear(x, self.tensors["classifier.weight"], self.tensors["classifier.bias"])


def test_the_field_s_densenet_is_renamed(tmp_path):
    source = PublishedDenseNet()
    tensors = {f"1.{name}": tensor for name, tensor in source.tensors.items()}
    torch.save({"arch": "cifar_densenet40", "state_dict": tensors, "epoch": 150}, tmp_path / "c.pth")
    found = bring(tmp_path / "c.pth", arch=None, sets=())
    assert found.arch == {"name": "cifar-densenet", "depth": 40, "growth": 12}
    images = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    with torch.inference_mode():
        ours, theirs = load_model(found.model).network(images), source((images - mean) / std)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # the global mean is computed another way


@pytest.fixture
def folder(tmp_path) -> Path:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog", "fox"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / split / name / "0.png")
    return tmp_path


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_plain_state_dicts_of_libraries(library, folder, monkeypatch):
    import torchvision

    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: asked.append(pretrained) or create(name, **more))
    torch.manual_seed(0)
    source = create("resnet18", num_classes=3) if library == "timm" else torchvision.models.resnet18(num_classes=3)
    torch.save(source.state_dict(), folder / "w.pth")
    sets = ("arch.pretrained=true", "data.size=64")
    found = bring(folder / "w.pth", arch="timm/resnet18", dataset="imagefolder", sets=sets)
    model = load_model(found.model)
    assert same_predictions(model, source, (3, 64, 64))
    unset = {"input_size": None, "drop_rate": None, "drop_path_rate": None, "grad_checkpointing": False, "kwargs": {}}
    assert model.source.card.arch == {"name": "timm/resnet18", "pretrained": False, **unset}
    assert model.source.card.spec.class_names == ("cat", "dog", "fox")
    assert asked == [False, False]  # neither the import nor the model file downloads weights


@pytest.mark.slow
def test_resnet50_of_the_field_is_torchvision_s(tmp_path):
    import torchvision

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    source = nn.Sequential(Constants(mean, std), nn.DataParallel(torchvision.models.resnet50()))
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 90, "arch": "resnet50", "state_dict": source.state_dict()}, path)
    found = bring(path, arch=None, sets=(), dataset="imagenet")
    assert found.arch["name"] == "timm/resnet50"
    assert same_predictions(load_model(found.model), source, (3, 224, 224))


def test_the_field_s_names_work_as_an_option_and_their_fields_can_be_set(tmp_path):
    path = published(tmp_path / "c.pth", network(RESNET8), arch="cifar_resnet110")
    assert bring(path, arch=None).arch == RESNET8
    assert bring(path, arch="cifar_resnet20", force=True).arch == RESNET8


@pytest.mark.parametrize("arch", [None, "wide_resnet28"])
def test_an_unknown_architecture_is_asked_for(arch, tmp_path):
    error = refusal(published(tmp_path / "c.pth", network(RESNET8), arch=arch), arch=None, sets=())
    assert "--arch" in error.hint
    assert (arch or "does not say") in error.message


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20x"])
def test_an_unknown_name_as_an_option_leads_to_a_known_one(name, tmp_path):
    error = refusal(published(tmp_path / "c.pth", network(RESNET8)), arch=name, sets=())
    assert f"'{name}'" in error.message
    assert "cifar_resnet110" in error.message
    near = "timm/resnet18" if name == "resnet18" else "cifar_resnet20"
    assert (error.hint or "").startswith(f"Did you mean '{near}'? ")


# --- normalisation -----------------------------------------------------------------------------------------------------------

IN_FILE = {
    "0.mean": lambda net, m, s: nn.Sequential(Saved(m, s), net),
    "module.0.mean": lambda net, m, s: nn.DataParallel(nn.Sequential(Saved(m, s), net)),
    "normalize.mean": lambda net, m, s: Named(Saved(m, s), net),
    "normalize.mu": lambda net, m, s: Named(Saved(m, s, ("mu", "sigma"), (-1,)), nn.DataParallel(net)),
    "0.means": lambda net, m, s: nn.Sequential(Saved(m, s, ("means", "sds"), (-1, 1, 1)), net),
}


@pytest.mark.parametrize("form", IN_FILE)
def test_constants_in_the_file_are_used(form, tmp_path):
    source = IN_FILE[form](network(RESNET8), OTHER_MEAN, OTHER_STD)
    assert form in source.state_dict()
    said = Listening()
    found = bring(published(tmp_path / "c.pth", source), said)
    assert same_predictions(load_model(found.model), source)
    assert found.normalization.mean == OTHER_MEAN
    assert "the data set's would be mean 0.4914" in said.warnings[0]


@pytest.mark.parametrize("form", IN_FILE)
@pytest.mark.parametrize("wanted", ["auto", "dataset"])
def test_constants_in_the_file_may_be_those_of_the_data_set(form, wanted, tmp_path):
    source = IN_FILE[form](network(RESNET8), CIFAR_MEAN, CIFAR_STD)
    said = Listening()
    found = bring(published(tmp_path / "c.pth", source), said, normalization=wanted)
    assert same_predictions(load_model(found.model), source)
    assert (found.normalization.mean, said.warnings) == (CIFAR_MEAN, [])


@pytest.mark.parametrize(
    ("mean", "std", "wanted", "says"),
    [
        (OTHER_MEAN, OTHER_STD, "dataset", "--normalization is dataset"),
        (CIFAR_MEAN, CIFAR_STD, "none", "--normalization is none"),
        ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), "auto", "125.3"),
        (OTHER_MEAN, (0.0, 1.0, 1.0), "auto", "std"),
        ((0.5, 0.5), (0.5, 0.5), "auto", "2 channels"),
    ],
    ids=["not the data set's", "not none", "units of 255", "std 0", "channels"],
)
def test_constants_in_the_file_that_cannot_be_right(mean, std, wanted, says, tmp_path):
    tensors = {f"1.{name}": tensor for name, tensor in network(RESNET8).state_dict().items()}
    tensors |= {"0.mean": torch.tensor(mean), "0.std": torch.tensor(std)}
    torch.save({"state_dict": tensors}, tmp_path / "c.pth")
    assert says in str(refusal(tmp_path / "c.pth", normalization=wanted))


# --- tensors that do not fit -------------------------------------------------------------------------------------------------


def lines(error: RscliError, sort: str) -> list[str]:
    return [line.strip() for line in error.message.splitlines() if line.startswith(f"  {sort}: ")]


def test_missing_extra_and_misshapen_tensors_are_all_listed(tmp_path):
    tensors = {f"1.{name}": tensor for name, tensor in network(RESNET8).state_dict().items()}
    tensors["1.linear.a"] = tensors.pop("1.fc.weight")
    tensors["1.linear.b"] = tensors.pop("1.fc.bias")
    tensors["1.layer1.0.conv1.weight"] = torch.zeros(16, 16, 5, 5)
    tensors["1.bn1.running_var"] = torch.full((16,), torch.nan)
    torch.save({"state_dict": tensors}, tmp_path / "c.pth")
    error = refusal(tmp_path / "c.pth")
    assert isinstance(error, InputError)
    assert lines(error, "missing") == ["missing: fc.weight 10x64", "missing: fc.bias 10"]
    assert lines(error, "extra") == [
        "extra: 1.linear.a 10x64; the nearest expected name is fc.weight",
        "extra: 1.linear.b 10; the nearest expected name is fc.bias",
    ]
    assert lines(error, "of the wrong shape") == [
        "of the wrong shape: layer1.0.conv1.weight is 16x16x5x5, but must be 16x16x3x3"
    ]
    assert lines(error, "not finite") == ["not finite: bn1.running_var holds NaN or infinite values"]
    assert "cifar-resnet (depth = 8): 2 missing, 2 extra, 1 of the wrong shape, 1 not finite" in error.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: weight.long(), "int64"),
        (lambda weight: weight > 0, "bool"),
        (lambda weight: weight.to(torch.complex64), "complex64"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda weight: weight.to_sparse(), "sparse_coo float32"),
        (lambda weight: weight.to("meta"), "without values float32"),
    ],
    ids=["int", "bool", "complex", "float8", "sparse", "meta"],
)
def test_weights_of_another_type_are_refused(tmp_path, change, said):
    """Converted in silence, they would make another network."""
    tensors = network(RESNET8).state_dict()
    torch.save({"state_dict": {**tensors, "fc.weight": change(tensors["fc.weight"])}}, tmp_path / "c.pth")
    error = refusal(tmp_path / "c.pth")
    wanted = f"of the wrong type: fc.weight is {said}, but must be plain floating-point numbers"
    assert lines(error, "of the wrong type") == [wanted]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_precision_are_read(tmp_path, kind):
    tensors = {name: t.to(kind) if t.is_floating_point() else t for name, t in network(RESNET8).state_dict().items()}
    torch.save({"arch": "cifar_resnet8", "state_dict": tensors}, tmp_path / "c.pth")
    assert bring(tmp_path / "c.pth").model.exists()


def test_a_wrong_depth_lists_some_and_counts_the_others(tmp_path):
    error = refusal(published(tmp_path / "c.pth", network({"name": "cifar-resnet", "depth": 20})))
    assert "(depth = 8): 72 extra" in error.message  # 20 has six blocks more, of two convolutions (1) and norms (5) each
    assert len(lines(error, "extra")) == 21
    assert lines(error, "extra")[-1] == "extra: and 52 more"
    assert all("nearest expected name is layer" in line for line in lines(error, "extra")[:-1])
    assert "arch.KEY" in error.hint


@pytest.mark.parametrize("arch", ["cifar-resnet", "timm/vit_tiny_patch16_224"])
def test_another_number_of_classes_is_said_plainly(arch, tmp_path):
    section = RESNET8 if arch == "cifar-resnet" else {"name": arch}
    path = published(tmp_path / "c.pth", network(section, classes=100))
    error = refusal(path, arch=arch, sets=("arch.depth=8",) if arch == "cifar-resnet" else ())
    assert "was trained on 100 classes" in error.message
    assert "'cifar10' has 10" in error.message


def test_another_number_of_channels_is_said_plainly(tmp_path):
    error = refusal(published(tmp_path / "c.pth", network(RESNET8)), dataset="mnist")
    assert "trained on images of 3 channels (the second dimension of conv1.weight), but 'mnist' has 1" in error.message
    assert "--dataset" in error.hint


@pytest.mark.parametrize(
    ("says", "options", "leads"),
    [
        ("cifar_resnet20", {"arch": "cifar_resnet110", "sets": ()}, "The file says arch = 'cifar_resnet20'"),
        ("cifar_resnet20", {"arch": None, "sets": ("arch.depth=8",)}, "The file says arch = 'cifar_resnet20'"),
        ("cifar_resnet110", {"arch": None, "sets": ()}, "Is it another architecture"),
        ("mine", {"arch": "cifar_resnet110", "sets": ()}, "Is it another architecture"),
    ],
    ids=["option-against-file", "field-against-file", "file-is-wrong", "unknown-in-file"],
)
def test_an_option_against_what_the_file_says(says, options, leads, tmp_path):
    path = published(tmp_path / "c.pth", network({"name": "cifar-resnet", "depth": 20}), arch=says)
    assert refusal(path, **options).hint.startswith(leads)


def test_a_tensor_of_another_shape_and_the_same_size_is_the_nearest(tmp_path):
    """torchvision's VGG has matrices where timm's has convolutions of the same weights."""
    tensors = {f"1.{name}": tensor for name, tensor in network(RESNET8).state_dict().items()}
    tensors["1.classifier"] = tensors.pop("1.fc.weight").view(10, 64, 1, 1)
    del tensors["1.bn1.weight"]
    torch.save({"state_dict": tensors}, tmp_path / "c.pth")
    assert lines(refusal(tmp_path / "c.pth"), "extra") == [
        "extra: 1.classifier 10x64x1x1; the nearest expected name is fc.weight"
    ]


def test_the_prefix_is_that_of_most_names():
    expected = {"a.weight": torch.zeros(1), "b.a.weight": torch.zeros(2), "c": torch.zeros(3)}
    fit = fit_tensors({f"x.1.{name}": tensor for name, tensor in expected.items()}, expected)
    assert (fit.prefix, fit.missing, fit.extra) == ("x.1.", [], {})
    assert {name: len(tensor) for name, tensor in fit.tensors.items()} == {"a.weight": 1, "b.a.weight": 2, "c": 3}


def test_a_block_inside_another_network_is_not_taken_for_a_prefix(tmp_path):
    error = refusal(published(tmp_path / "c.pth", network(RESNET8)), arch="lenet", sets=())
    assert "of the wrong shape: conv1.weight is 16x3x3x3, but must be 20x3x5x5" in lines(error, "of the wrong shape")


# --- files that are refused --------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled by anything that trusts it, this creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "raw pickle"])
def test_a_pickle_with_code_is_refused_and_nothing_executed(form, tmp_path):
    path, trace = tmp_path / "c.pth", tmp_path / "executed"
    content = {"state_dict": network(RESNET8).state_dict(), "optimizer": Bomb(trace)}
    if form == "raw pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    error = refusal(path)
    assert not trace.exists()
    assert error.exit_code == 2
    assert "refused" in error.message
    assert "contains code or objects beyond tensors" in error.message
    if form != "raw pickle":
        torch.load(path, weights_only=False)  # the bomb is a real one
        assert trace.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<html>Not found</html>", "a web page"),
        (b"PK\x03\x04 cut off", "not a complete torch.save checkpoint"),
        ([torch.zeros(1)], "holds a list"),
        ({"epoch": 3}, "has no tensors"),
        ({"state_dict": {"a": 1}}, "under 'state_dict'"),
    ],
    ids=["empty", "web page", "truncated", "list", "no tensors", "empty state dict"],
)
def test_files_that_are_no_checkpoint(content, says, tmp_path):
    path = tmp_path / "c.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert says in refusal(path).message


def test_safetensors_that_are_broken_or_rscli_s_own(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 20)
    assert "not a complete safetensors file" in refusal(tmp_path / "w.safetensors").message
    own = bring(published(tmp_path / "c.pth", network(RESNET8))).model
    (tmp_path / "own").mkdir()
    own.rename(tmp_path / "own" / "mine.safetensors")
    assert "already" in refusal(tmp_path / "own" / "mine.safetensors").message


# --- the model file, settings and the command --------------------------------------------------------------------------------


def test_the_card_says_where_the_model_came_from(tmp_path):
    path = published(tmp_path / "checkpoint.pth.tar", network(RESNET8))
    model = load_model(bring(path).model)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.source.card.origin == f"imported from checkpoint.pth.tar (sha256 {digest})"
    assert (model.source.card.epochs, model.source.card.config) == (90, None)
    assert (model.source.card.arch, model.source.card.noise) == (RESNET8, {"name": "gaussian", "sigma": 0.5})
    assert {(p["kind"], p["name"], p["package"]) for p in model.source.card.plugins} == {
        ("architectures", "cifar-resnet", "rscli"),
        ("noises", "gaussian", "rscli"),
        ("datasets", "cifar10", "rscli"),
    }
    assert type(installed().build("datasets", model.source.card.data)).__name__ == "Cifar10"


def test_importing_twice_gives_the_same_bytes(tmp_path):
    path = published(tmp_path / "c.pth", network(RESNET8))
    first = bring(path).model.read_bytes()
    assert bring(path, force=True).model.read_bytes() == first


def test_an_existing_file_is_kept_without_force(tmp_path):
    path = published(tmp_path / "c.pth", network(RESNET8))
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(InputError, match="already exists"):
        bring(path)
    assert (tmp_path / "model.safetensors").read_text() == "precious"
    assert load_model(bring(path, force=True).model).noise.sigma == 0.5


def test_the_checkpoint_itself_is_never_overwritten(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(network(RESNET8).state_dict(), path)
    with pytest.raises(InputError, match="the checkpoint itself"):
        bring(path, force=True)


def test_every_wrong_setting_is_named_at_once(tmp_path):
    path = published(tmp_path / "c.pth", network(RESNET8))
    error = refusal(path, sigma=-1.0, dataset="cifar11", sets=("arch.depth=9", "arch.dept=8", "loss.lbd=1", "huh"))
    assert isinstance(error, ConfigError)
    for key in (
        "noise.sigma = -1.0 (--sigma)",
        "cifar10",
        "arch.depth = 9 (--set)",
        "arch.dept",
        "loss.lbd",
        "huh",
    ):
        assert key in error.message
    assert len(error.problems) == 6


def test_a_section_is_no_setting(tmp_path):
    assert "--set arch is not a setting" in refusal(published(tmp_path / "c.pth", network(RESNET8)), sets=("arch=x",)).message


def test_the_option_normalization_takes_three_words(tmp_path):
    assert "auto, dataset, none" in refusal(published(tmp_path / "c.pth", network(RESNET8)), normalization="imagenet").message


@pytest.fixture
def run():
    app = typer.Typer()
    app.command("import")(boundary(import_))
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_writes_a_model_file_and_says_what_it_assumed(run, tmp_path):
    source = NORMALIZED["1.module."](network(RESNET8))
    path = published(tmp_path / "c.pth", source)
    words = (path, "--arch", "cifar-resnet", "--set", "arch.depth=8", "--dataset", "cifar10", "--sigma", 0.5)
    result = run(*words, "--out", tmp_path / "model.safetensors")
    assert result.exit_code == 0, result.output
    assert "normalisation: mean 0.4914" in result.stderr
    assert result.stdout == ""
    assert same_predictions(load_model(tmp_path / "model.safetensors"), source)
    again = run(*words, "--out", tmp_path / "model.safetensors", "--json", "--quiet")
    assert (again.exit_code, again.stdout) == (2, "")
    answer = json.loads(run(*words, "--out", tmp_path, "--force", "--json", "--quiet").stdout)
    assert answer["model"] == str(tmp_path / "model.safetensors")
    assert (answer["arch"], answer["epochs"], answer["normalization"]["mean"]) == (RESNET8, 90, list(CIFAR_MEAN))


def test_the_help_comes_without_torch():
    import subprocess
    import sys

    code = "import sys, rscli.cli.import_; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
