"""What training scripts of others save, and what else is taken for a checkpoint: each is read, or named with a way on."""

from __future__ import annotations

import argparse
import collections
import datetime
import gzip
import io
import json
import pathlib
import pickle
import re
import shlex
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from foreign import CIFAR_MEAN, OTHER_MEAN, OTHER_STD, RESNET8, Constants, bring, network, spec
from foreign import same_predictions as same
from rscli.cli.app import app
from rscli.errors import InputError, PluginError, RscliError
from rscli.models.importing.convert import field_archs
from rscli.models.importing.foreign import read_checkpoint
from rscli.models.importing.harmless import HARMLESS, Ignored
from rscli.models.modelfile import load_model
from rscli.registry import installed
from rscli_core.architectures.timm import TimmModel
from runs import Listening


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    return network(RESNET8, seed=seed).state_dict()


def under(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def imported(path: Path, **options) -> nn.Module:
    return load_model(bring(path, normalization="none", force=True, **options).model)


def refused(path: Path, **options) -> RscliError:
    with pytest.raises(RscliError) as caught:
        bring(path, force=True, **options)
    assert not path.with_name("model.safetensors").exists()
    assert caught.value.hint
    return caught.value


# --- moving averages ---------------------------------------------------------------------------------------------------------

BOTH = {
    "timm": lambda plain, ema: {"state_dict": plain, "state_dict_ema": ema, "arch": "x"},
    "model_ema": lambda plain, ema: {"model_ema": ema, "model": plain},
    "ema_state_dict": lambda plain, ema: {"ema_state_dict": ema, "state_dict": plain},
    "ema": lambda plain, ema: {"ema": ema, "net": plain},
    "inside ema": lambda plain, ema: {"model": plain, "ema": {"module": ema, "decay": 0.9}},
    "prefix": lambda plain, ema: {"state_dict": under("model.", plain) | under("ema_model.", ema)},
    "prefix of prefixes": lambda plain, ema: {"state_dict": under("ema.module.", ema) | under("model.", plain)},
    "at the top": lambda plain, ema: under("net.", plain) | under("net_ema.", ema),
}


@pytest.mark.parametrize("form", BOTH)
def test_of_plain_weights_and_a_moving_average_the_plain_are_taken_and_both_named(form, tmp_path):
    torch.save(BOTH[form](state(0), state(1)), tmp_path / "c.pth")
    said = Listening()
    plain = load_model(bring(tmp_path / "c.pth", said, normalization="none").model)
    assert same(plain, network(RESNET8, seed=0))
    (line,) = said.warnings
    assert "also has EMA weights" in line
    assert "--ema" in line
    assert same(imported(tmp_path / "c.pth", ema=True), network(RESNET8, seed=1))


def test_a_moving_average_alone_is_taken_and_its_absence_is_named(tmp_path):
    torch.save({"model_ema": state(1)}, tmp_path / "c.pth")
    said = Listening()
    assert same(load_model(bring(tmp_path / "c.pth", said, normalization="none").model), network(RESNET8, seed=1))
    assert "the only weights in it" in said.warnings[0]
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": state(0)}, tmp_path / "c.pth")
    assert "no EMA weights" in refused(tmp_path / "c.pth", ema=True).message
    assert same(imported(tmp_path / "c.pth"), network(RESNET8, seed=0))  # as the hint says: without --ema


# --- names of tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "layer1._orig_mod.", "a._orig_mod.b."]
)
def test_what_compilation_puts_into_names_is_left_out(prefix, tmp_path):
    if prefix == "layer1._orig_mod.":
        tensors = {re.sub(r"^layer1\.", prefix, name): tensor for name, tensor in state().items()}
    else:
        tensors = under(prefix, state())
    torch.save({"state_dict": tensors}, tmp_path / "c.pth")
    assert same(imported(tmp_path / "c.pth"), network(RESNET8))


def followed(path: Path, hint: str, seed: int = 0) -> None:
    """Imports with the options that a hint names, the first of several networks."""
    words = shlex.split(re.split(r" or (?=--)", hint[hint.index("--") :].rstrip("."))[0])
    options = {"ignore": tuple(words[i + 1] for i, word in enumerate(words) if word == "--ignore")}
    if "--prefix" in words:
        options["prefix"] = words[words.index("--prefix") + 1]
    assert same(imported(path, **options), network(RESNET8, seed=seed))


EXTRA = {
    "criterion": {"criterion.weight": torch.ones(10)},
    "several": {"criterion.weight": torch.ones(10), "metrics.a.total": torch.ones(1), "temperature": torch.ones(1)},
    "inside": {"model.helper.a": torch.ones(3), "model.helper.b": torch.ones(3)},
    "teacher": under("teacher.", state(1)),
}


@pytest.mark.parametrize("kind", EXTRA)
def test_extra_tensors_are_left_out_as_the_hint_says(kind, tmp_path):
    torch.save({"state_dict": under("model.", state()) | EXTRA[kind]}, tmp_path / "c.ckpt")
    followed(tmp_path / "c.ckpt", refused(tmp_path / "c.ckpt").hint)


def test_a_prefix_chooses_between_networks_and_finds_the_normaliser_beside_it(tmp_path):
    def normalizer(name: str, mean: tuple[float, ...]) -> dict:
        return {f"{name}.new_mean": torch.tensor(mean).view(3, 1, 1), f"{name}.new_std": torch.tensor(OTHER_STD).view(3, 1, 1)}

    tensors = under("module.model.", state(0)) | under("module.attacker.model.", state(1))
    tensors |= normalizer("module.normalizer", OTHER_MEAN) | normalizer("module.attacker.normalize", CIFAR_MEAN)
    torch.save({"model": tensors}, tmp_path / "robustness.pt")
    hint = refused(tmp_path / "robustness.pt").hint
    assert "--prefix module.model. or --prefix module.attacker.model." in hint
    for prefix, seed, mean in (("module.model.", 0, OTHER_MEAN), ("module.attacker.model", 1, CIFAR_MEAN)):
        found = bring(tmp_path / "robustness.pt", prefix=prefix, force=True)
        assert found.normalization.mean == pytest.approx(mean)
        assert same(load_model(found.model), nn.Sequential(Constants(mean, OTHER_STD), network(RESNET8, seed=seed)))


@pytest.mark.parametrize("options", [{"prefix": "nothing."}, {"ignore": ("nothing.*",)}, {"ignore": ("*",)}], ids=str)
def test_a_prefix_or_pattern_of_nothing_is_refused_and_what_is_there_is_named(options, tmp_path):
    torch.save({"state_dict": under("model.", state())}, tmp_path / "c.pth")
    assert "model.*" in refused(tmp_path / "c.pth", **options).hint


def test_the_command_takes_the_options(tmp_path):
    torch.save({"state_dict_ema": under("a.", state()) | {"b.c": torch.ones(1)}, "net": state(1)}, tmp_path / "c.pth")
    words = [tmp_path / "c.pth", "--arch", "cifar-resnet", "--set", "arch.depth=8", "--dataset", "cifar10", "--sigma", "0.5"]
    words += ["--ema", "--prefix", "a", "--ignore", "a.x*", "--out", tmp_path / "m.safetensors", "--normalization", "none"]
    assert "matches no tensor" in CliRunner().invoke(app, ["import", *map(str, words)]).stderr
    words[words.index("a.x*")] = "b.*"
    result = CliRunner().invoke(app, ["import", *map(str, words)])
    assert result.exit_code == 0, result.output
    assert same(load_model(tmp_path / "m.safetensors"), network(RESNET8))


# --- harmless types ----------------------------------------------------------------------------------------------------------

HELD = {
    "namespace": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
    "paths": [pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("c"), pathlib.Path("d")],
    "dates": [datetime.datetime(2024, 1, 5, tzinfo=datetime.UTC), datetime.date(2024, 1, 5), datetime.timedelta(1)],
    "numbers": [np.float64(0.5), np.int64(3), np.float32(1), np.bool_(True), np.str_("abc"), np.complex64(1j)],
    "types": [np.dtype("f4"), np.dtype(">i8")],
    "arrays": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.array(["a"]), np.array([{}], object)],
    "collections": [collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]), collections.Counter("aab")],
    "random state": np.random.RandomState(0).get_state(),
    "sizes": [torch.Size((1, 2)), torch.float32, torch.device("cpu"), slice(1, 2), frozenset({1}), range(3)],
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("kind", HELD)
def test_harmless_types_beside_the_weights_do_not_matter(kind, form, tmp_path):
    content = {"state_dict": state(), "arch": "cifar_resnet8", "epoch": np.int64(7), "held": HELD[kind]}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=form == "zip")
    found = bring(tmp_path / "c.pth", normalization="none")
    assert found.epochs == 7
    assert same(load_model(found.model), network(RESNET8))


def test_weights_may_be_numpy_arrays(tmp_path):
    torch.save({"state_dict": {name: tensor.numpy() for name, tensor in state().items()}}, tmp_path / "c.pth")
    assert same(imported(tmp_path / "c.pth"), network(RESNET8))


def test_nothing_on_the_list_is_anything_but_a_stand_in_of_ours():
    """Neither construction nor state of what a file names reaches the type itself."""
    assert {stand_in.__module__ for stand_in, _ in HARMLESS} == {"rscli.models.importing.harmless"}
    assert isinstance(Ignored("rm", 1), Ignored)
    before = torch.serialization.get_safe_globals()
    assert not [each for each in before if each in HARMLESS]


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "builtins eval",
        "builtins exec",
        "builtins getattr",
        "subprocess Popen",
        "pathlib Path.unlink",
        "shutil rmtree",
        "numpy.core.multiarray fromfile",
        "numpy load",
        "functools partial",
        "operator attrgetter",
        "codecs decode",
        "runpy run_path",
    ],
)
def test_what_is_not_on_the_list_is_refused(name, tmp_path):
    module, _, function = name.partition(" ")
    raw = b"\x80\x02c" + module.encode() + b"\n" + function.encode() + b"\nX\x01\x00\x00\x00x\x85R."
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/data.pkl", raw)
        archive.writestr("c/version", "3")
        archive.writestr("c/byteorder", "little")
    assert refused(path).message.startswith("refused")


# --- the way out of a refused pickle -----------------------------------------------------------------------------------------


class Mine:
    """A class of somebody's training script."""

    def __init__(self) -> None:
        self.value = 3


WAYS = {
    "module": lambda net: net,
    "module in a dict": lambda net: {"model": net, "epoch": 3},
    "parallel module in a dict": lambda net: {"model": nn.DataParallel(net), "epoch": np.int64(3)},
    "module deeper": lambda net: {"model": {"net": net}, "epoch": 3},
    "class beside": lambda net: {"state_dict": net.state_dict(), "optimizer": Mine(), "epoch": np.int64(3), "a": [Mine()]},
    "array of objects": lambda net: {
        "net": net.state_dict(),
        "a": np.array([Mine()]),
        "b": np.float64(2),
        "c": torch.optim.SGD,
    },
    "average": lambda net: {"model": nn.Identity(), "ema": net, "opt": torch.optim.SGD(net.parameters(), 0.1)},
}


@pytest.mark.parametrize("name", ["weights.pth", "last.pt", "checkpoint.pth.tar", "c.safetensors"])
@pytest.mark.parametrize("way", WAYS)
def test_the_way_out_works_and_overwrites_nothing(way, name, tmp_path):
    source, path = network(RESNET8), tmp_path / "a folder" / name
    path.parent.mkdir()
    torch.save(WAYS[way](source), path)
    taken = path.with_name(f"{name.split('.')[0]}-weights.pth")
    taken.write_text("mine")
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    hint = refused(path).hint
    exec("\n".join(line[2:] for line in hint.splitlines() if line.startswith("  ")), {})  # what the hint tells the user to run
    assert {file: file.read_bytes() for file in before} == before
    (new,) = set(path.parent.iterdir()) - set(before)
    assert same(imported(new), source)


# --- what is no checkpoint ---------------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def archived(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("c.pth"), io.BytesIO())
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("weights/c.pth", b"x")
    else:
        file.write(gzip.compress(b"x"))
    return file.getvalue()


KINDS = {
    "lfs": (LFS, "Git LFS", "git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html>404", "a web page", "Download"),
    "xml": (b"<?xml version='1.0'?><Error/>", "a web page", "Download"),
    "empty": (b"", "empty", "again"),
    "tar": (archived("tar"), "a tar archive", "Unpack"),
    "zip": (archived("zip"), "a zip archive of weights/c.pth", "Unpack"),
    "gzip": (archived("gzip"), "compressed (gzip)", "Unpack"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file", "torch.save"),
    "numpy": (b"\x93NUMPY\1\0", "a numpy array", "torch.save"),
    "index": (
        json.dumps({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}).encode(),
        "the index of 2",
        "x-1.safe",
    ),
    "json": (b'{"a": 1}', "JSON", "torch.save"),
    "text": (b"hello there", "first bytes are b'hello th'", "again"),
}


@pytest.mark.parametrize("name", ["c.pth", "c.safetensors", "c"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_called_what_it_is(kind, name, tmp_path):
    content, says, leads = KINDS[kind]
    if (kind, name) == ("text", "c.safetensors"):
        says, leads = "not a complete safetensors file", "again"
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert says in error.message
    assert leads in error.hint


def test_content_decides_and_not_the_suffix(tmp_path):
    save_file(state(), tmp_path / "st.bin")
    torch.save(state(), tmp_path / "torch.safetensors")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    for name in ("st.bin", "torch.safetensors"):
        assert same(imported(tmp_path / name), network(RESNET8))
    with pytest.raises(InputError):
        read_checkpoint(tmp_path / "raw.pth")


def test_the_index_of_one_file_leads_to_it(tmp_path):
    save_file(state(), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "w.safetensors"}}))
    hint = refused(tmp_path / "w.safetensors.index.json").hint
    assert same(imported(Path(hint.removeprefix("Import the file that it names: ").removesuffix("."))), network(RESNET8))


# --- architectures -----------------------------------------------------------------------------------------------------------


def test_the_plugins_say_what_the_field_calls_them():
    assert field_archs() == {
        "lenet": {"name": "lenet"},
        "resnet50": {"name": "timm/resnet50"},
        "cifar_resnet20": {"name": "cifar-resnet", "depth": 20},
        "cifar_resnet110": {"name": "cifar-resnet", "depth": 110},
        "cifar_densenet40": {"name": "cifar-densenet", "depth": 40, "growth": 12},
    }


TORCHVISION = ("resnet18", "resnet34", "resnet101", "resnext50_32x4d", "wide_resnet50_2", "densenet121")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_s_names_that_timm_has_are_guessed(name):
    """The tensors are the same by name and shape: no file of these names leads to a mismatch."""
    import torchvision

    assert installed().offering("architectures", name) == [f"timm/{name}"]
    with torch.device("meta"):
        theirs, ours = torchvision.models.get_model(name).state_dict(), timm.create_model(name).state_dict()
    assert {key: t.shape for key, t in theirs.items()} == {key: t.shape for key, t in ours.items()}


def test_a_file_that_says_resnet18_needs_no_option(tmp_path):
    source = timm.create_model("resnet18", num_classes=10).eval()
    torch.save({"arch": "resnet18", "state_dict": source.state_dict()}, tmp_path / "c.pth")
    found = bring(tmp_path / "c.pth", arch=None, sets=(), normalization="none")
    assert found.arch["name"] == "timm/resnet18"
    assert same(load_model(found.model), source)


def test_an_unknown_architecture_is_suggested_with_its_slash_first():
    with pytest.raises(PluginError) as caught:
        installed().load("architectures", "resnet18")
    assert "Did you mean 'timm/resnet18'?" in (caught.value.hint or "")
    assert installed().load("architectures", "timm/resnet18") is TimmModel


def test_offline_it_is_the_weights_that_are_unavailable(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **more):
        if pretrained:
            raise OSError("We couldn't connect to the hub\nand more")
        return create(name, pretrained, **more)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr("rscli_core.architectures._hub.no_network", lambda model: None)
    with pytest.raises(
        InputError, match="weights of timm's 'resnet18' could not be downloaded: OSError: We couldn't connect"
    ) as found:
        TimmModel(model="resnet18", pretrained=True).build(spec(10, (3, 32, 32)))
    assert "timm.create_model('resnet18', pretrained=True)" in found.value.hint
    unknown = next(m for m in timm.list_models() if not timm.is_model_pretrained(m))
    with pytest.raises(InputError, match="timm has no pretrained weights for"):
        TimmModel(model=unknown, pretrained=True).build(spec(10, (3, 224, 224)))
    with pytest.raises(InputError, match="does not take images of 8x8 pixels"):
        TimmModel(model="vit_tiny_patch16_224", pretrained=True).build(spec(10, (1, 8, 8)))
