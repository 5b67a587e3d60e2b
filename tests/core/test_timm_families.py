"""timm, family by family: a step of training, a certificate, and what is said where a family takes no such images."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from rscli.api import DataSpec, Transform
from rscli.config.layers import resolve
from rscli.errors import ConfigError, InputError
from rscli.models.modelfile import load_model, read_card, read_model
from rscli.results.reader import read_results
from rscli.runtime.progress import Silent
from rscli.sampling.options import SamplingOptions
from rscli.smoothing.certify import CertifyOptions, certify
from rscli.training.train import TrainOptions, outlook, train
from rscli.training.trainer import initial_classifier
from rscli_core.architectures._hub import no_network
from rscli_core.architectures.timm import TimmModel

FAMILIES = {
    "resnet": "test_resnet",
    "resnext": "resnext26ts",
    "resnetv2": "resnetv2_18",
    "resnest": "resnest14d",
    "senet": "legacy_seresnet18",
    "regnet": "regnety_002",
    "convnext": "test_convnext",
    "convnextv2": "convnextv2_atto",
    "efficientnet": "efficientnet_b0",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv4": "mobilenetv4_conv_small",
    "densenet": "densenet121",
    "vgg_bn": ("vgg11_bn", {"kwargs.mlp_ratio": 0.02}),
    "vit": ("vit_tiny_patch16_224", {"drop_path_rate": 0.1, "drop_rate": 0.1}),
    "deit": "deit_tiny_distilled_patch16_224",
    "swin": ("swin_tiny_patch4_window7_224", {"drop_path_rate": 0.2}),
    "maxvit": "maxvit_rmlp_pico_rw_256",
    "coatnet": "test_coatnet",
    "mixer": "gmlp_ti16_224",
    "poolformer": "poolformer_s12",
    "repvgg": "repvgg_a0",
    "fastvit": "fastvit_t8",
    "mobileone": "mobileone_s0",
    "ghostnet": "ghostnet_050",
    "hrnet": "hrnet_w18_small",
    "dla": "dla46x_c",
    "nfnet": "test_nfnet",
    "edgenext": "edgenext_xx_small",
    "levit": "levit_128s",
    "xcit": "xcit_nano_12_p8_224",
    "cait": "cait_xxs24_224",
    "beit": ("beit_base_patch16_224", {"kwargs.depth": 2}),
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "inception": ("inception_v3", {"input_size": 80}),
    "pvt": "pvt_v2_b0",
    "mobilevit": "mobilevit_xxs",
    "rexnet": "rexnet_100",
    "vovnet": "ese_vovnet19b_slim_dw",
    "starnet": "starnet_s050",
}
"""A small model of each family, and the fields that keep it small, or that it cannot do without."""


def spec(classes: int, shape: tuple[int, int, int]) -> DataSpec:
    transform = Transform(channels=shape[0], crop=shape[1:])
    return DataSpec(class_names=tuple(map(str, range(classes))), shape=shape, test_transform=transform)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two test images of 32x32, in two classes."""
    folder, source = tmp_path_factory.mktemp("data") / "pets", np.random.default_rng(0)
    for split, name, number in [(s, n, k) for s in ("train", "test") for n in ("cat", "dog") for k in range(2)]:
        path = folder / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return folder


def options(out: Path, **changes) -> TrainOptions:
    return TrainOptions(out=out, data_dir=out, device="cpu", workers=0, **changes)


def sets(pets: Path, arch: str, *more: str, channels: int = 3, size: int = 32) -> list[str]:
    data = ["data.name=imagefolder", f"data.path={pets}", f"data.size={size}", f"data.channels={channels}"]
    return [*data, f"arch.name=timm/{arch}", "noise.sigma=0.25", "optimizer.lr=0.001", "epochs=1", "batch=4", *more]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["gaussian", "consistency"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_takes_a_step_and_gives_a_certificate(family, loss, pets, tmp_path):
    """Gaussian on colour images, consistency on grey ones; one optimiser step on four images in two noisy copies."""
    found = FAMILIES[family]
    name, fields = (found, {}) if isinstance(found, str) else found
    more = [f"loss.name={loss}", "loss.m=2", "chunk=false", *(f"arch.{key}={value}" for key, value in fields.items())]
    more += ["loss.lbd=5"] if loss == "consistency" else []
    resolved = resolve(sets=sets(pets, name, *more, channels=3 if loss == "gaussian" else 1))
    model = train(resolved, options(tmp_path / "run"), Silent())
    (line,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert math.isfinite(line["loss"])
    before = initial_classifier(resolved, resolved.dataset.spec(tmp_path)).network.state_dict()
    after, card = read_model(model)
    assert card.spec.shape == (3 if loss == "gaussian" else 1, 32, 32)
    assert before.keys() == after.keys()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(
        not torch.equal(before[key], tensor) for key, tensor in after.items() if "running" not in key and "num" not in key
    )
    out = tmp_path / "results.tsv"
    rule = {"name": "cohen", "n0": 4, "n": 20, "alpha": 0.01}
    certify(CertifyOptions(model, out, tmp_path, rule, max=1, sampling=SamplingOptions("cpu", 4)), Silent())
    assert len(read_results(out).idx) == 1


def test_there_are_many_families():
    modules = {
        timm.create_model.__globals__["model_entrypoint"](f if isinstance(f, str) else f[0]).__module__
        for f in FAMILIES.values()
    }
    assert len(modules) >= 25


# --- fields ------------------------------------------------------------------------------------------------------------------


def test_rates_reach_the_model():
    plugin = TimmModel(model="vit_tiny_patch16_224", drop_rate=0.25, drop_path_rate=0.5, kwargs={"depth": 3})
    network = plugin.build(spec(3, (1, 32, 32)))
    assert network.head_drop.p == 0.25
    assert [block.drop_path1.drop_prob for block in network.blocks[1:]] == pytest.approx([0.25, 0.5])
    assert network.patch_embed.proj.in_channels == 1


def test_a_rate_is_said_once():
    with pytest.raises(ValueError, match="drop_rate is given as a field and in kwargs"):
        TimmModel(model="resnet18", drop_rate=0.1, kwargs={"drop_rate": 0.1})


def test_a_model_without_drop_path_says_so():
    with pytest.raises(InputError, match="'vgg11' has no drop_path_rate") as error:
        TimmModel(model="vgg11", drop_path_rate=0.1, kwargs={"mlp_ratio": 0.02}).build(spec(3, (3, 32, 32)))
    assert error.value.hint == "Leave out arch.drop_path_rate."


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
@pytest.mark.parametrize(("size", "antialias"), [(64, False), (16, True)])
def test_the_network_resizes_by_itself(model, size, antialias):
    torch.manual_seed(0)
    resized = TimmModel(model=model, input_size=size).build(spec(5, (3, 32, 32))).eval()
    plain = TimmModel(model=model).build(spec(5, (3, size, size))).eval()
    plain.load_state_dict(resized.state_dict())  # the tensors have the same names
    images = torch.rand(2, 3, 32, 32)
    wanted = F.interpolate(images, (size, size), mode="bilinear", antialias=antialias)
    torch.testing.assert_close(resized(images), plain(wanted))


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size", "takes"),
    [
        ("inception_v3", 32, "it takes 80x80, and was published for 299x299"),
        ("vit_tiny_patch16_224", 8, "it takes 16x16, and was published for 224x224"),
        ("efficientformer_l1", 64, "it takes 224x224"),
        ("halonet26t", 64, "it takes 256x256"),
    ],
)
def test_a_size_that_is_not_taken(model, size, takes):
    """The message names the size, what the model takes, and what to type; and that is true."""
    with pytest.raises(InputError, match=rf"does not take images of {size}x{size} pixels \(.*\); {takes}") as error:
        TimmModel(model=model).build(spec(3, (3, size, size)))
    fits = int(takes.split()[2].partition("x")[0])
    assert f"--set arch.input_size={fits}" in error.value.hint
    assert TimmModel(model=model, input_size=fits).build(spec(3, (3, size, size))).num_classes == 3


def test_the_size_is_not_blamed_for_something_else():
    with pytest.raises(InputError, match="refuses images of 3x32x32") as error:
        TimmModel(model="resnet18", kwargs={"flavour": 1}).build(spec(3, (3, 32, 32)))
    assert "input_size" not in str(error.value)


# --- pretrained --------------------------------------------------------------------------------------------------------------


def test_without_a_network_it_fails_at_once(pets, tmp_path, monkeypatch):
    """In the dry run, too; and the network is what is blamed."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    began = time.monotonic()
    with pytest.raises(InputError, match="'resnet18' are not on this machine, and there is no network") as error:
        outlook(resolve(sets=sets(pets, "resnet18", "arch.pretrained=true", "loss.name=gaussian")), options(tmp_path))
    assert time.monotonic() - began < 20  # it was 45 s of retries
    assert "--init FILE" in error.value.hint
    with pytest.raises(InputError, match="does not take images of 8x8"):
        TimmModel(model="vit_tiny_patch16_224", pretrained=True).build(spec(3, (3, 8, 8)))


def test_weights_that_are_here_need_no_network(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, **_: asked.append(url))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name, **_: f"/cache/{repository}/{name}")
    assert no_network("resnet18") is None
    assert asked == []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    assert no_network("resnet18") is None
    assert len(asked) == 1
    assert "timm/resnet18.a1_in1k" in asked[0]


def test_the_normalisation_of_pretrained_weights():
    colour, grey = spec(3, (3, 32, 32)), spec(3, (1, 32, 32))
    assert TimmModel(model="resnet18").normalization(colour) is None
    pretrained = TimmModel(model="vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=True)
    assert pretrained.normalization(colour) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    mean, std = TimmModel(model="resnet18", pretrained=True).normalization(grey)
    assert mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert std == pytest.approx([(0.229 + 0.224 + 0.225) / 3])


@pytest.fixture
def offline_weights(monkeypatch):
    """timm hands out fresh weights as pretrained ones."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name, False, **more))
    monkeypatch.setattr("rscli_core.architectures._hub.no_network", lambda model: None)


@pytest.mark.usefixtures("offline_weights")
def test_pretrained_weights_bring_their_normalisation(pets, tmp_path):
    arch = "test_vit.r160_in1k"
    wanted = timm.get_pretrained_cfg(arch)
    notes: list[str] = []
    listener = Silent()
    listener.note = notes.append
    model = train(
        resolve(sets=sets(pets, arch, "arch.pretrained=true", "loss.name=gaussian")), options(tmp_path / "run"), listener
    )
    card = read_card(model)
    assert (card.spec.mean, card.spec.std) == (tuple(wanted.mean), tuple(wanted.std))
    assert any("that of the pretrained weights" in note and "in place of the data set's" in note for note in notes)
    network = load_model(model).network
    assert network.normalize.mean.flatten().tolist() == pytest.approx(list(wanted.mean))
    own = ["data.mean=[0.5,0.5,0.5]", "data.std=[0.25,0.25,0.25]"]
    chosen = outlook(resolve(sets=sets(pets, arch, "arch.pretrained=true", "loss.name=gaussian", *own)), options(tmp_path))
    assert any("data.mean and data.std are used, as configured" in note for note in chosen.notes)


def test_two_sources_of_weights_are_refused(pets):
    with pytest.raises(ConfigError, match=r"init.*arch\.pretrained = true asks for others"):
        resolve(sets=sets(pets, "resnet18", "arch.pretrained=true", "loss.name=gaussian"), flags={"init": "x.safetensors"})
