"""Networks as other people train and save them, and what imports their checkpoints with the settings of most tests."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rscli.api import DataSpec, Transform
from rscli.models.importing.convert import Imported, ImportOptions, import_checkpoint
from rscli.models.smoothed import Smoothed
from rscli.registry import installed
from rscli.runtime.progress import Silent

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
OTHER_MEAN, OTHER_STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
RESNET8 = {"name": "cifar-resnet", "depth": 8}


class Constants(nn.Module):
    """A normalisation layer as the field writes it: its constants are no part of the state dict."""

    def __init__(self, mean, std) -> None:
        super().__init__()
        self.means, self.sds = torch.tensor(mean), torch.tensor(std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.means[:, None, None]) / self.sds[:, None, None]


class Saved(nn.Module):
    """A normalisation layer that saves its constants, under names of its author's choice."""

    def __init__(self, mean, std, names=("mean", "std"), shape=(1, -1, 1, 1)) -> None:
        super().__init__()
        self.names = names
        for name, values in zip(names, (mean, std), strict=True):
            self.register_buffer(name, torch.tensor(values).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (getattr(self, name).view(-1, 1, 1) for name in self.names)
        return (x - mean) / std


class Named(nn.Module):
    """A normalisation layer and a network, by name."""

    def __init__(self, normalize: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.normalize, self.model = normalize, model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalize(x))


def spec(classes: int, shape: tuple[int, int, int]) -> DataSpec:
    """Of data with so many classes and images of this shape, also with channels that no image file has."""
    transform = Transform(channels=3 if shape[0] == 3 else 1, crop=shape[1:])
    return DataSpec.model_construct(class_names=tuple(map(str, range(classes))), shape=shape, test_transform=transform)


def network(section: dict, shape=(3, 32, 32), classes: int = 10, seed: int = 0) -> nn.Module:
    """A network in eval mode, every tensor of it random, statistics of batch normalisation included."""
    torch.manual_seed(seed)
    built = installed().build("architectures", section).build(spec(classes, shape)).eval()
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
                (module.num_batches_tracked, 1, 1000),
            ):
                tensor.copy_(torch.empty(tensor.shape).uniform_(low, high))
    return built


def published(path: Path, model: nn.Module, arch: str = "cifar_resnet8", **changes) -> Path:
    """Saves `model` as the field's training scripts do, with the state of a real optimiser."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()  # fills the state; a rate of 0 leaves the weights as they are
    content = {"epoch": 90, "arch": arch, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**content, **changes}, path)
    return path


def bring(path: Path, progress: Silent | None = None, **changes) -> Imported:
    """Imports with the settings of most tests: cifar10, ResNet-8."""
    values = {"arch": "cifar-resnet", "sets": ("arch.depth=8",), "dataset": "cifar10", "sigma": 0.5, **changes}
    out = path.with_name("model.safetensors")
    options = ImportOptions(checkpoint=path, out=out, data_dir=path.parent, **values)
    return import_checkpoint(options, progress or Silent())


def same_predictions(model: Smoothed, source: nn.Module, shape=(3, 32, 32)) -> bool:
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return torch.equal(model.network(images), source.eval()(images))
