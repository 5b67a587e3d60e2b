"""`data.split`: a folder of classes without a test split holds out a share of its images, and each stays on its side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from rscli.errors import InputError
from rscli_core.datasets.imagefolder import ImageFolder

COUNT = 60


def fill(folder: Path, names=("cat", "dog"), numbers=range(COUNT)) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            Image.new("L", (2, 2), number).save(folder / name / f"{number:03}.png")
    return folder


def sides(data: ImageFolder, root: Path) -> tuple[set[str], set[str]]:
    home = root / "train" if (root / "train").is_dir() else root
    train, test = ({path.relative_to(home).as_posix() for path in data.load(split, root).paths} for split in ("train", "test"))
    return train, test


@pytest.fixture
def pets(tmp_path):
    return fill(tmp_path / "pets")


def test_every_image_is_on_one_side_and_the_share_is_about_met(pets):
    for share in (0.1, 0.3, 0.8):
        data = ImageFolder(split=share)
        train, test = sides(data, pets)
        assert not train & test
        assert len(train | test) == 2 * COUNT
        assert abs(len(test) - 2 * COUNT * share) < 4 * (2 * COUNT * share * (1 - share)) ** 0.5
        spec = data.spec(pets)
        assert spec.sizes == {"train": len(train), "test": len(test)}
        assert spec.class_names == ("cat", "dog")
    found = ImageFolder(split=0.3).load("test", pets)
    assert [int(path.parent.name == "dog") for path in found.paths] == found.labels.tolist()
    assert list(found.paths) == sorted(found.paths)


def test_images_stay_on_their_sides_when_others_come_and_go_and_the_folder_moves(pets, tmp_path):
    data = ImageFolder(split=0.3)
    train, test = sides(data, pets)
    fill(pets, ["cat", "ant"], range(COUNT, 2 * COUNT))
    (pets / "dog" / "007.png").unlink()
    moved = tmp_path / "elsewhere"
    shutil.move(pets, moved)
    later, later_test = sides(data, moved)
    assert train - {"dog/007.png"} <= later
    assert test - {"dog/007.png"} <= later_test
    assert len(later | later_test) == 4 * COUNT - 1


def test_a_larger_share_holds_out_the_same_images_and_more(pets):
    assert sides(ImageFolder(split=0.2), pets)[1] < sides(ImageFolder(split=0.5), pets)[1]


def test_the_seed_holds_out_others(pets):
    first, other = (sides(ImageFolder(split=0.5, split_seed=seed), pets)[1] for seed in (0, 1))
    assert abs(len(first & other) - COUNT / 2) < 4 * (2 * COUNT * 0.25 * 0.75) ** 0.5  # independent


def test_a_train_folder_alone_is_split_alike(pets, tmp_path):
    expected = sides(ImageFolder(split=0.3), pets)
    shutil.copytree(pets, tmp_path / "home" / "train")
    assert sides(ImageFolder(split=0.3), tmp_path / "home") == expected


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_test_split_that_is_there_is_not_made_again(name, pets, tmp_path):
    shutil.copytree(pets, tmp_path / "home" / "train")
    fill(tmp_path / "home" / name, numbers=range(2))
    for use in (ImageFolder(split=0.3).spec, lambda root: ImageFolder(split=0.3).load("train", root)):
        with pytest.raises(InputError, match=rf"home/{name} is one") as caught:
            use(tmp_path / "home")
        assert "Leave data.split out" in caught.value.hint


def test_classes_without_splits_are_told_of_the_setting(pets):
    with pytest.raises(InputError, match="neither train/, test/ nor val/") as caught:
        ImageFolder().spec(pets)
    assert "--set data.split=0.1" in caught.value.hint
    assert "`imagefolder: 11" not in ImageFolder(split=0.1).check(pets)[0].text
    assert all(found.ok for found in ImageFolder(split=0.1).check(pets))


def test_a_class_without_training_images_and_a_split_without_images_are_refused(tmp_path):
    fill(tmp_path / "few", numbers=range(1))
    with pytest.raises(InputError, match=r"leaves no training image of: cat, dog"):
        ImageFolder(split=0.999999).load("train", tmp_path / "few")
    with pytest.raises(InputError, match="holds out none of the 2 images"):
        ImageFolder(split=0.000001).load("train", tmp_path / "few")
    with pytest.raises(InputError, match="has no split 'validation'"):
        ImageFolder(split=0.5).load("validation", tmp_path / "few")


@pytest.mark.parametrize("share", [1, -0.1, 1.5])
def test_the_share_is_below_one(share):
    with pytest.raises(ValidationError, match="split"):
        ImageFolder(split=share)
