"""Small data sets that torchvision downloads and reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from rscli.api import DataSpec, MemoryImages, Transform
from rscli.errors import InputError
from rscli_core.datasets._folders import fetching, unknown_split
from rscli_core.datasets._images import AUGMENTATIONS, AugmentedSet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DIGITS = tuple("0123456789")
CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish "
    "forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle "
    "mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine "
    "possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
    "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree "
    "wolf woman worm"
)
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

BY_TRAIN = {"train": {"train": True}, "test": {"train": False}}
BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}


@dataclass(frozen=True)
class Known:
    """A data set: shape, classes, sizes of train and test, torchvision's arguments for each split, and what is usual."""

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    sizes: tuple[int, int]
    arguments: dict[str, dict[str, Any]] = field(default_factory=lambda: BY_TRAIN)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Literal["none", "crop-flip"] = "none"


SETS = {
    "FashionMNIST": Known((1, 28, 28), FASHION, (60_000, 10_000)),
    "KMNIST": Known((1, 28, 28), ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"), (60_000, 10_000)),
    "USPS": Known((1, 16, 16), DIGITS, (7291, 2007)),
    "SVHN": Known((3, 32, 32), DIGITS, (73_257, 26_032), BY_SPLIT),
    "CIFAR100": Known(
        (3, 32, 32), tuple(CIFAR100.split(" ")), (50_000, 10_000),
        mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), augment="crop-flip",
    ),
    "STL10": Known((3, 96, 96), STL10, (5000, 8000), BY_SPLIT, augment="crop-flip"),
}  # fmt: skip
"""Those whose images all have one size and fit into memory. torchvision compares what it would unpickle (CIFAR100) with the
published MD5 first; the others hold bare numbers."""


class TorchvisionSet(AugmentedSet):
    """Small data sets of torchvision: torchvision/FashionMNIST, KMNIST, USPS, SVHN, CIFAR100, STL10; --download fetches."""

    variant: ClassVar[str | None] = "dataset"

    dataset: str = Field(description="FashionMNIST, KMNIST, USPS, SVHN, CIFAR100 or STL10")
    augment: Literal["usual", "none", "crop-flip"] = Field(
        "usual",
        description="what training images undergo; usual: padding by 4, crop and flip for CIFAR100 and STL10, else none",
    )

    @field_validator("dataset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SETS:
            raise ValueError(f"must be {', '.join(SETS)}; MNIST and CIFAR-10 are data sets of their own, mnist and cifar10")
        return name

    @classmethod
    def offers(cls, name: str) -> bool:
        """Whether `name` is one of them."""
        return name in SETS

    def spec(self, root: Path) -> DataSpec:
        """As published; CIFAR100 with its usual normalisation, the others without."""
        known = SETS[self.dataset]
        channels, *size = known.shape
        return DataSpec(
            class_names=known.classes,
            shape=known.shape,
            mean=known.mean,
            std=known.std,
            test_transform=Transform(channels=3 if channels == 3 else 1, resize=size[0], crop=(size[0], size[1])),
            augmentation=self.augmentation(AUGMENTATIONS[known.augment if self.augment == "usual" else self.augment]),
            sizes=dict(zip(("train", "test"), known.sizes, strict=True)),
        )

    def load(self, split: str, root: Path, *, download: bool = False) -> MemoryImages:
        """The images of `train` or `test`, where torchvision keeps them under `root`.

        Raises `InputError` for other splits, and for files that are missing or broken.
        """
        from torchvision import datasets

        if split not in ("train", "test"):
            raise unknown_split(f"torchvision/{self.dataset}", split)
        kind, arguments = getattr(datasets, self.dataset), SETS[self.dataset].arguments[split]
        if download:
            hint = f"Put the files there where torchvision's {self.dataset} expects them; `--download` then needs no network."
            fetching(self.dataset, root, lambda: kind(str(root), download=True, **arguments), hint)
        try:
            found = kind(str(root), **arguments)
        except Exception as cause:  # of many kinds, as a file is missing, truncated or another
            reason = str(cause).split("You can")[0].strip() or type(cause).__name__
            hint = "`--download` fetches it; delete broken files first."
            raise InputError(f"{self.dataset} is not complete in {root}: {reason}", hint) from cause
        return _in_memory(found, SETS[self.dataset].shape)


def _in_memory(found: Any, shape: tuple[int, int, int]) -> MemoryImages:
    """torchvision's arrays (n, height, width), (n, height, width, 3) or (n, 3, height, width) in our order."""
    import numpy as np

    images: NDArray[np.uint8] = np.asarray(found.data)
    if images.ndim == 4 and images.shape[1:] != shape:
        images = images.transpose(0, 3, 1, 2)
    labels = np.asarray(found.targets if hasattr(found, "targets") else found.labels)
    return MemoryImages(np.ascontiguousarray(images.reshape(-1, *shape)), labels.astype(np.int64))
