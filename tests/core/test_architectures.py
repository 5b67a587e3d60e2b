"""The core architectures: their published sizes and names, and what they compute, against numpy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from foreign import spec
from rscli.errors import InputError
from rscli.registry import installed
from rscli_core.architectures._densenet import Bottleneck
from rscli_core.architectures._resnet import BasicBlock
from rscli_core.architectures.cifar_densenet import CifarDenseNet
from rscli_core.architectures.cifar_resnet import CifarResNet
from rscli_core.architectures.lenet import LeNet
from rscli_core.architectures.timm import TimmModel

MNIST, CIFAR, IMAGENET = (1, 28, 28), (3, 32, 32), (3, 224, 224)
NETS = {
    "lenet": (LeNet(), MNIST),
    "resnet8": (CifarResNet(depth=8), CIFAR),
    "densenet22": (CifarDenseNet(depth=22), CIFAR),
}
TIMM = {
    "resnet18": (TimmModel(model="resnet18"), (1, 32, 32)),
    "vit_tiny": (TimmModel(model="vit_tiny_patch16_224"), (1, 32, 32)),
}


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(before)


def table(nets):
    return pytest.mark.parametrize(("plugin", "shape"), list(nets.values()), ids=list(nets))


def randomize_batch_norm(module):
    """Gives scales, shifts and running statistics values that no forgotten term survives."""
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.5, 2.0)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.normal_()
    return module


# --- numpy, written out ------------------------------------------------------------------------------------------------------


def conv(x, layer):
    """The cross-correlation of (batch, channel, height, width) with the layer's weights, from its definition."""
    weight = layer.weight.detach().numpy()
    (pad, _), (stride, _) = layer.padding, layer.stride
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    out = np.einsum("bchwij,ocij->bohw", windows, weight)
    return out if layer.bias is None else out + layer.bias.detach().numpy()[:, None, None]


def norm(x, layer):
    if layer.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    else:
        mean, var = layer.running_mean.numpy(), layer.running_var.numpy()
    scale = layer.weight.detach().numpy() / np.sqrt(var + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + layer.bias.detach().numpy()[:, None, None]


def relu(x):
    return np.maximum(x, 0)


def max_pool(x):
    batch, channel, height, width = x.shape
    x = x[:, :, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, channel, height // 2, 2, width // 2, 2).max((3, 5))


def linear(x, layer):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


# --- published facts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plugin", "classes", "shape", "parameters"),
    [
        pytest.param(LeNet(), 10, MNIST, 431_080, id="lenet"),
        pytest.param(CifarResNet(), 10, CIFAR, 1_730_714, id="resnet110"),
        pytest.param(CifarResNet(depth=20), 10, CIFAR, 272_474, id="resnet20"),
        pytest.param(CifarDenseNet(), 10, CIFAR, 211_978, id="densenet40"),
        pytest.param(TimmModel(model="resnet50"), 1000, IMAGENET, 25_557_032, id="timm/resnet50"),
    ],
)
def test_parameter_count(plugin, classes, shape, parameters):
    assert sum(p.numel() for p in plugin.build(spec(classes, shape)).parameters()) == parameters


def test_every_lenet_parameter_name():
    layers = ("conv1", "conv2", "fc1", "fc2")
    assert list(LeNet().build(spec(10, MNIST)).state_dict()) == [
        f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("plugin", "shapes"),
    [
        pytest.param(
            CifarResNet(),
            {
                "conv1.weight": (16, 3, 3, 3),
                "bn1.running_var": (16,),
                "layer1.0.conv1.weight": (16, 16, 3, 3),
                "layer1.17.bn2.bias": (16,),
                "layer2.0.downsample.0.weight": (32, 16, 1, 1),
                "layer2.0.downsample.1.running_mean": (32,),
                "layer3.0.conv1.weight": (64, 32, 3, 3),
                "layer3.17.conv2.weight": (64, 64, 3, 3),
                "fc.weight": (10, 64),
                "fc.bias": (10,),
            },
            id="resnet110",
        ),
        pytest.param(
            CifarDenseNet(),
            {
                "conv1.weight": (24, 3, 3, 3),
                "dense1.0.bn1.weight": (24,),
                "dense1.0.conv1.weight": (48, 24, 1, 1),
                "dense1.5.bn2.weight": (48,),
                "dense2.0.conv1.weight": (48, 96, 1, 1),
                "dense3.5.conv2.weight": (12, 48, 3, 3),
                "bn.running_mean": (240,),
                "fc.weight": (10, 240),
            },
            id="densenet40",
        ),
    ],
)
def test_parameter_names(plugin, shapes):
    state = plugin.build(spec(10, CIFAR)).state_dict()
    assert {name: tuple(state[name].shape) for name in shapes if name in state} == shapes


def test_resnet_has_no_projection_where_the_shape_stays():
    names = CifarResNet(depth=20).build(spec(10, CIFAR)).state_dict()
    assert {name.split(".downsample")[0] for name in names if "downsample" in name} == {"layer2.0", "layer3.0"}


# --- what they compute -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [MNIST, (3, 17, 22)], ids=["28x28", "17x22"])
def test_lenet_against_numpy(shape):
    net = LeNet().build(spec(10, shape)).double()
    images = torch.rand(3, *shape, dtype=torch.float64)
    x = max_pool(relu(conv(images.numpy(), net.conv1)))
    x = max_pool(relu(conv(x, net.conv2)))
    x = linear(relu(linear(x.reshape(3, -1), net.fc1)), net.fc2)
    np.testing.assert_allclose(net(images).detach().numpy(), x, rtol=1e-10, atol=1e-12)


def test_lenet_gradient_is_that_of_relu_before_pooling():
    net = LeNet().build(spec(10, MNIST)).double()
    a = torch.rand(3, *MNIST, dtype=torch.float64, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    x = F.max_pool2d(F.relu(net.conv2(F.max_pool2d(F.relu(net.conv1(b)), 2))), 2)
    net.fc2(F.relu(net.fc1(x.flatten(1)))).square().sum().backward()
    net(a).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 6, 2)], ids=["identity", "projection"])
def test_resnet_block_against_numpy(inputs, outputs, stride, training):
    block = randomize_batch_norm(BasicBlock(inputs, outputs, stride)).double().train(training)
    images = torch.randn(5, inputs, 9, 8, dtype=torch.float64)
    given = images.numpy().copy()
    shortcut = given if stride == 1 else norm(conv(given, block.downsample[0]), block.downsample[1])
    x = relu(norm(conv(given, block.conv1), block.bn1))
    expected = relu(norm(conv(x, block.conv2), block.bn2) + shortcut)
    np.testing.assert_allclose(block(images).detach().numpy(), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_array_equal(images.numpy(), given, err_msg="the block changed its input")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_densenet_layer_against_numpy(training):
    layer = randomize_batch_norm(Bottleneck(5, 3)).double().train(training)
    images = torch.randn(4, 5, 7, 6, dtype=torch.float64)
    given = images.numpy().copy()
    x = conv(relu(norm(given, layer.bn1)), layer.conv1)
    x = conv(relu(norm(x, layer.bn2)), layer.conv2)
    expected = np.concatenate([given, x], axis=1)
    np.testing.assert_allclose(layer(images).detach().numpy(), expected, rtol=1e-9, atol=1e-10)


def test_resnet_stages_against_their_written_out_chain():
    net = randomize_batch_norm(CifarResNet(depth=8).build(spec(10, CIFAR))).double().eval()
    images = torch.rand(2, *CIFAR, dtype=torch.float64)
    stem = torch.from_numpy(relu(norm(conv(images.numpy(), net.conv1), net.bn1)))
    features = net.layer3[0](net.layer2[0](net.layer1[0](stem)))
    assert features.shape == (2, 64, 8, 8)
    expected = linear(features.detach().numpy().mean((2, 3)), net.fc)
    np.testing.assert_allclose(net(images).detach().numpy(), expected, rtol=1e-9)


def test_densenet_halves_twice_and_ends_in_norm_relu_mean():
    net = randomize_batch_norm(CifarDenseNet(depth=10).build(spec(10, CIFAR))).double().eval()
    images = torch.rand(2, *CIFAR, dtype=torch.float64)

    def halve(x):
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    features = net.dense3(halve(net.dense2(halve(net.dense1(torch.from_numpy(conv(images.numpy(), net.conv1)))))))
    assert features.shape == (2, 60, 8, 8)
    expected = linear(relu(norm(features.detach().numpy(), net.bn)).mean((2, 3)), net.fc)
    np.testing.assert_allclose(net(images).detach().numpy(), expected, rtol=1e-9)


# --- initial weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [CifarResNet(), CifarDenseNet(growth=24)], ids=["resnet110", "densenet40"])
def test_he_initialisation(plugin):
    """Every weight divided by its own standard deviation sqrt(2 / fan-out) is a standard normal one."""
    net = plugin.build(spec(10, CIFAR))
    convs = [m.weight.detach() for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    scaled = torch.cat([(w / (2 / (w.shape[0] * w.shape[2] * w.shape[3])) ** 0.5).flatten() for w in convs]).double()
    assert abs(scaled.mean()) < 5 / scaled.numel() ** 0.5
    assert abs(scaled.square().mean() - 1) < 5 * (2 / scaled.numel()) ** 0.5
    assert 2.5 < scaled.pow(4).mean() < 3.5, "a normal distribution has the fourth moment 3, a uniform one 1.8"
    for bn in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        assert torch.all(bn.weight == 1)
        assert torch.all(bn.bias == 0)


@table(NETS | TIMM)
def test_same_seed_same_weights(plugin, shape):
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in plugin.build(spec(10, shape)).parameters()])

    first = weights(3)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


# --- shapes, layouts, gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [MNIST, (3, 32, 32), (1, 16, 16), (2, 19, 40)], ids=str)
def test_lenet_output_shape(shape):
    assert LeNet().build(spec(7, shape))(torch.rand(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize("plugin", [CifarResNet(depth=8), CifarDenseNet(depth=10, growth=4)], ids=["resnet", "densenet"])
@pytest.mark.parametrize("shape", [CIFAR, (1, 8, 8), (1, 28, 28), (4, 4, 4), (3, 33, 50)], ids=str)
def test_cifar_output_shape(plugin, shape):
    assert plugin.build(spec(7, shape))(torch.rand(3, *shape)).shape == (3, 7)


@table(TIMM)
def test_timm_output_shape(plugin, shape):
    net = plugin.build(spec(7, shape))
    assert net.training
    assert net(torch.rand(3, *shape)).shape == (3, 7)


@table(NETS)
def test_channels_last_gives_the_same_logits(plugin, shape):
    net = plugin.build(spec(10, shape)).double()
    images = torch.rand(4, *shape, dtype=torch.float64)
    expected = net(images)
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(images.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-9, atol=1e-10)


@table(NETS)
def test_compiles_into_one_graph(plugin, shape):
    net = plugin.build(spec(10, shape)).double()
    images = torch.rand(4, *shape, dtype=torch.float64)
    whole = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(images), net(images), rtol=1e-9, atol=1e-10)


@table(NETS | {"vit_tiny": TIMM["vit_tiny"]})
def test_gradient_reaches_every_parameter(plugin, shape):
    net = plugin.build(spec(10, shape))
    F.cross_entropy(net(torch.rand(8, *shape)), torch.arange(8)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == []


@table(NETS)
def test_gradient_of_the_image_with_frozen_parameters(plugin, shape):
    """What an attack asks for: eval mode, parameters frozen, the derivative along a direction as by finite differences."""
    net = plugin.build(spec(10, shape)).double().eval().requires_grad_(False)
    images = torch.rand(2, *shape, dtype=torch.float64, requires_grad=True)
    net(images).square().sum().backward()
    step = 1e-6 * torch.randn_like(images)
    with torch.no_grad():
        difference = net(images + step).square().sum() - net(images - step).square().sum()
    torch.testing.assert_close(2 * (images.grad * step).sum(), difference, rtol=1e-4, atol=1e-10)


# --- timm --------------------------------------------------------------------------------------------------------------------


def test_timm_transformer_is_built_for_the_size_of_the_images():
    net = TimmModel(model="vit_tiny_patch16_224").build(spec(10, (3, 32, 48)))
    assert net.pos_embed.shape[1] == 1 + 2 * 3


@pytest.mark.parametrize("pretrained", [False, True])
def test_timm_is_asked_for_weights_only_if_wanted(pretrained, monkeypatch):
    create, asked = timm.create_model, []

    def spy(name, wanted, **kwargs):
        asked.append((name, wanted, kwargs))
        return create(name, False, **kwargs)

    monkeypatch.setattr(timm, "create_model", spy)
    monkeypatch.setattr("rscli_core.architectures._hub.no_network", lambda model: None)
    plugin = TimmModel(model="resnet18", pretrained=pretrained, kwargs={"drop_rate": 0.25})
    assert plugin.build(spec(5, (1, 32, 32))).drop_rate == 0.25
    assert asked == [("resnet18", pretrained, {"num_classes": 5, "in_chans": 1, "drop_rate": 0.25})]
    plugin.build(spec(5, (1, 32, 32)), weights=False)
    assert asked[1:] == [("resnet18", False, {"num_classes": 5, "in_chans": 1, "drop_rate": 0.25})]


def test_timm_name_with_a_tag():
    assert TimmModel(model="resnet18.a1_in1k").build(spec(3, CIFAR)).num_classes == 3


def test_timm_trial_leaves_the_batch_statistics_alone():
    state = TimmModel(model="resnet18").build(spec(10, CIFAR)).state_dict()
    assert state["bn1.num_batches_tracked"] == 0
    assert torch.all(state["bn1.running_mean"] == 0)


def test_kwargs_keep_their_types():
    kwargs = {"a": True, "b": 1, "c": 1.5, "d": "x", "e": None}
    kept = TimmModel.model_validate_json(TimmModel(model="m", kwargs=kwargs).model_dump_json()).kwargs
    assert kept == kwargs
    assert [type(value) for value in kept.values()] == [bool, int, float, str, type(None)]


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        pytest.param({"model": "resnet51"}, CIFAR, r"no model called 'resnet51'[\s\S]*resnet5\d", id="unknown-name"),
        pytest.param({"model": "hf-hub:someone/model"}, CIFAR, "no model called", id="hub-name"),
        pytest.param({"model": "resnet18.nowhere"}, CIFAR, "resnet18.nowhere.*nowhere", id="unknown-tag"),
        pytest.param({"model": "resnet18", "kwargs": {"flavour": 1}}, CIFAR, "'resnet18'.*'flavour'", id="unknown-kwarg"),
        pytest.param({"model": "resnet18", "kwargs": {"act_layer": "nope"}}, CIFAR, "'resnet18'.*nope", id="bad-kwarg"),
        pytest.param({"model": "resnet18", "kwargs": {"features_only": True}}, CIFAR, "returned a list", id="not-logits"),
        pytest.param({"model": "resnet18", "kwargs": {"global_pool": ""}}, CIFAR, "refuses", id="no-pooling"),
        pytest.param(
            {"model": "vit_tiny_patch16_224"}, (1, 8, 8), "does not take images of 8x8 pixels", id="smaller-than-a-patch"
        ),
        pytest.param({"model": "vit_tiny_patch16_224", "kwargs": {"img_size": 64}}, CIFAR, "64", id="the-users-size-stays"),
    ],
)
def test_timm_refusal(fields, shape, message):
    with pytest.raises(InputError, match=message):
        TimmModel(**fields).build(spec(10, shape))


# --- wrong input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plugin", "shape", "message"),
    [
        pytest.param(LeNet(), (1, 15, 28), "at least 16x16 pixels, not 15x28", id="lenet-height"),
        pytest.param(LeNet(), (1, 28, 15), "at least 16x16 pixels, not 28x15", id="lenet-width"),
        pytest.param(CifarResNet(depth=8), (3, 3, 8), "at least 4x4 pixels, not 3x8", id="resnet"),
        pytest.param(CifarDenseNet(), (3, 8, 2), "at least 4x4 pixels, not 8x2", id="densenet"),
    ],
)
def test_too_small_images(plugin, shape, message):
    with pytest.raises(InputError, match=message):
        plugin.build(spec(10, shape))


@pytest.mark.parametrize(
    ("plugin", "fields", "message"),
    [
        pytest.param(CifarResNet, {"depth": 21}, "nearest to 21 are 20 and 26", id="resnet-21"),
        pytest.param(CifarResNet, {"depth": 2}, "greater than or equal to 8", id="resnet-2"),
        pytest.param(CifarDenseNet, {"depth": 39}, "nearest to 39 are 34 and 40", id="densenet-39"),
        pytest.param(CifarDenseNet, {"growth": 0}, "greater than or equal to 1", id="densenet-growth-0"),
        pytest.param(TimmModel, {}, "Field required", id="timm-without-model"),
        pytest.param(TimmModel, {"model": "m", "kwargs": {"num_classes": 3}}, "must not set num_classes", id="timm-classes"),
        pytest.param(TimmModel, {"model": "m", "kwargs": {"widths": [1, 2]}}, "valid", id="timm-list"),
        pytest.param(LeNet, {"depth": 5}, "Extra inputs", id="lenet-depth"),
    ],
)
def test_wrong_fields(plugin, fields, message):
    with pytest.raises(ValidationError, match=message):
        plugin(**fields)


# --- as plugins --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plugin"),
    [
        ("lenet", LeNet()),
        ("cifar-resnet", CifarResNet()),
        ("cifar-densenet", CifarDenseNet()),
        ("timm/resnet18", TimmModel(model="resnet18")),
    ],
)
def test_found_by_name(name, plugin):
    assert installed().build("architectures", {"name": name}) == plugin


def test_listing_imports_neither_torch_nor_timm():
    modules = ", ".join(f"rscli_core.architectures.{name}" for name in ("lenet", "cifar_resnet", "cifar_densenet", "timm"))
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'timm'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
