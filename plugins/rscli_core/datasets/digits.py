"""scikit-learn's handwritten digits: small, and always there."""

from __future__ import annotations

from pathlib import Path

from rscli.api import Dataset, DataSpec, Finding, MemoryImages, Transform
from rscli_core.datasets._folders import unknown_split

SIDE = 28


class Digits(Dataset):
    """Digits of scikit-learn: 8x8 greys enlarged to 28x28, ten classes; needs no data folder.

    Every fifth image (index divisible by 5) is a test image, the others are for training.
    """

    def spec(self, root: Path) -> DataSpec:
        """Ten classes of 28x28 grey images, without normalisation or augmentation."""
        return DataSpec(
            class_names=tuple("0123456789"),
            shape=(1, SIDE, SIDE),
            test_transform=Transform(channels=1, resize=SIDE, crop=(SIDE, SIDE)),
            sizes={"train": 1437, "test": 360},
        )

    def load(self, split: str, root: Path, *, download: bool = False) -> MemoryImages:
        """The images of `train` or `test`. Raises `InputError` for any other split."""
        import numpy as np
        from PIL import Image
        from sklearn.datasets import load_digits

        if split not in ("train", "test"):
            raise unknown_split("digits", split)
        data = load_digits()
        wanted = (np.arange(len(data.target)) % 5 == 0) == (split == "test")
        small = np.rint(data.images[wanted] * (255 / 16)).astype(np.uint8)  # scikit-learn has 0 to 16
        large = [np.asarray(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for each in small]
        return MemoryImages(np.stack(large)[:, None], data.target[wanted].astype(np.int64))

    def check(self, root: Path) -> list[Finding]:
        """Always there."""
        return [Finding(True, "digits comes with scikit-learn")]
