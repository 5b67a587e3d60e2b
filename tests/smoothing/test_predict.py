"""Prediction of single images: any format, one broken file, abstentions, and certificates that certify gives, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import beta, binomtest, norm
from typer.testing import CliRunner

from rscli.cli.app import app
from rscli.models.modelfile import load_model, save_model
from runs import SIGMA, trained
from support import ROOT

EXAMPLES = ROOT / "examples" / "digits"
TORN = EXAMPLES / "0-index305.png"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs: good enough for the examples."""
    return trained(tmp_path_factory.mktemp("model") / "run", "epochs=3")


def noisy(image: Path, count: int) -> torch.Tensor:
    """An image under noise of our own: another draw from the distribution that the program draws from."""
    pixels = torch.from_numpy(np.array(Image.open(image).convert("L"), dtype=np.float32))[None, None] / 255
    return pixels + SIGMA * torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(123))


@pytest.fixture(scope="module")
def torn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is torn between two classes for one of the examples: noise moves it to either side of the border."""
    loaded = load_model(model)
    last = [layer for layer in loaded.network.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        logits = loaded.network(noisy(TORN, 999))
        last.bias[2] -= (logits[:, 2] - logits[:, 4]).median()
        last.bias[[c for c in range(10) if c not in (2, 4)]] = -1e6
    path = tmp_path_factory.mktemp("torn") / "model.safetensors"
    save_model(path, loaded.network, loaded.source.card)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def answers(*arguments: object, code: int = 0) -> dict[str, dict]:
    """The JSON lines, by the name of the image."""
    result = run(*arguments, "--json", "--quiet")
    assert result.exit_code == code, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {Path(line["path"]).name: line for line in lines}


def own_votes(model: Path, image: Path, count: int) -> np.ndarray:
    """How often the classifier names each class."""
    with torch.inference_mode():
        return load_model(model).network(noisy(image, count)).argmax(-1).bincount(minlength=10).numpy()


def test_the_examples_are_what_their_names_say(model):
    found = answers(model, EXAMPLES)
    assert len(found) == 4
    assert {name: line["class"] for name, line in found.items()} == {name: name[0] for name in found}


def test_the_share_is_that_of_the_vote(model):
    for name, line in answers(model, EXAMPLES, "--n", 500).items():
        assert line["n"] == 500
        own = own_votes(model, EXAMPLES / name, 500)[int(line["class"])] / 500
        assert line["share"] == pytest.approx(own, abs=5 * (0.25 / 500) ** 0.5)
        assert line["share"] * 500 == pytest.approx(round(line["share"] * 500))


def test_the_radius_is_that_of_the_counts(model):
    """Clopper-Pearson by scipy's quantiles, from the share that the answer gives."""
    for line in answers(model, EXAMPLES, "--certify", "--n", 400, "--alpha", 0.01).values():
        hits = round(line["share"] * 400)
        bound = beta.ppf(0.01, hits, 400 - hits + 1)
        assert line["radius"] == pytest.approx(SIGMA * norm.ppf(bound) if bound >= 0.5 else 0, rel=1e-9)


def test_without_certify_nothing_is_said_of_a_radius(model):
    assert all("radius" not in line for line in answers(model, EXAMPLES, "--n", 50).values())


def test_an_image_is_answered_alike_in_any_company(model, tmp_path):
    """Its noise is keyed by its pixels: name, place and neighbours mean nothing."""
    together = answers(model, EXAMPLES, "--n", 300, "--certify")
    for name, line in together.items():
        shutil.copy(EXAMPLES / name, tmp_path / "renamed.png")
        (alone,) = answers(model, tmp_path / "renamed.png", "--n", 300, "--certify").values()
        assert {**alone, "path": None} == {**line, "path": None}
    other = answers(model, EXAMPLES, "--n", 300, "--certify", "--seed", 1)
    assert {name: line["share"] for name, line in other.items()} != {name: line["share"] for name, line in together.items()}


@pytest.fixture
def album(tmp_path) -> Path:
    """One image in many formats and modes, one folder deeper, and one broken."""
    digit = Image.open(EXAMPLES / "0-index305.png").convert("L")
    large = digit.resize((56, 56), Image.Resampling.NEAREST)
    deeper = tmp_path / "album" / "more"
    deeper.mkdir(parents=True)
    digit.save(deeper / "a.png")
    large.convert("RGB").save(deeper / "b.jpg", quality=95)
    large.convert("RGBA").save(deeper / "c.webp", lossless=True)
    large.convert("P").save(deeper / "d.gif")
    large.save(deeper / "e.BMP")
    large.save(deeper / "f.tif")
    (deeper / "notes.txt").write_text("no image")
    (tmp_path / "album" / "broken.png").write_bytes((deeper / "a.png").read_bytes()[:60])
    return tmp_path / "album"


def test_a_broken_image_is_named_and_the_others_are_predicted(model, album):
    result = run(model, album, "--n", 50)
    assert result.exit_code == 1
    assert str(album / "broken.png") in " ".join(result.stderr.split("\n"))
    assert "Traceback" not in result.output
    for name in ("a.png", "b.jpg", "c.webp", "d.gif", "e.BMP", "f.tif"):
        (line,) = [line for line in result.stdout.splitlines() if name in line]
        assert line.split()[1] == "0", line
    assert "broken.png" not in result.stdout
    assert "notes.txt" not in result.output


def test_json_lines_hold_the_broken_image_too(model, album):
    found = answers(model, album, "--n", 50, code=1)
    assert len(found) == 7
    assert set(found["broken.png"]) == {"path", "error"}
    assert {line["class"] for name, line in found.items() if name != "broken.png"} == {"0"}


def test_a_folder_of_broken_images_only_answers_1(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    result = run(model, tmp_path)
    assert result.exit_code == 1
    assert "a.png" in result.stderr


@pytest.mark.parametrize("name", ["[red]a.png", "[/red]a.png", "a[bold].png", f"{'long' * 60}.png", "ünï 日本.png"])
def test_a_name_is_shown_as_it_is(model, tmp_path, name):
    """No part of it is markup, and no answer is cut to the width of a terminal that is not there."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(TORN, tmp_path / name)
    result = run(model, tmp_path / name, "--n", 50, "--quiet")
    assert result.exit_code == 0, repr(result.exception)
    assert str(tmp_path / name) in result.stdout
    assert len(result.stdout.splitlines()) == 2


def test_a_near_tie_abstains(torn):
    result = run(torn, EXAMPLES, "--n", 200)
    assert result.exit_code == 0
    said = {Path(line.split()[0]).name: line.split()[1] for line in result.stdout.splitlines()[1:]}
    assert said[TORN.name] == "ABSTAIN"
    assert set(said.values()) <= {"2", "4", "ABSTAIN"}


def test_an_abstention_is_what_the_binomial_test_says(torn):
    """PREDICT: the top two counts, tested against one half; here every vote goes to one of two classes."""
    decided = set()
    for n in (20, 200):
        for line in answers(torn, EXAMPLES, "--n", n).values():
            undecided = binomtest(round(line["share"] * n), n, 0.5).pvalue > 0.001
            assert (line["class"] == "ABSTAIN") == (line["label"] == -1) == undecided
            decided.add(undecided)
    assert decided == {True, False}


def test_an_abstention_has_radius_zero(torn):
    line = answers(torn, EXAMPLES, "--n", 200, "--certify")[TORN.name]
    assert (line["class"], line["label"], line["radius"]) == ("ABSTAIN", -1, 0)


@pytest.mark.parametrize(("n", "alpha", "code"), [(10, "0.001", 2), (11, "0.001", 0), (7, "0.01", 2), (8, "0.01", 0)])
def test_a_vote_that_could_never_decide_is_refused(model, n, alpha, code):
    """2 * 2^-n <= alpha needs n >= 11 at 0.001, and n >= 8 at 0.01."""
    result = run(model, EXAMPLES / "0-index305.png", "--n", n, "--alpha", alpha)
    assert result.exit_code == code
    if code:
        assert f"n is {n}" in result.stderr
        assert f"at least {n + 1} samples" in result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.png"], "there is no image or folder nowhere.png"),
        (["EMPTY"], "no images in"),
        ([EXAMPLES, "--alpha", "2"], "alpha is 2.0"),
        ([EXAMPLES, "--certify", "--alpha", "0"], "alpha = 0.0"),
        ([EXAMPLES, "--precision", "fp8"], "fp8"),
        ([EXAMPLES, "--device", "abacus"], "abacus"),
    ],
    ids=["no-image", "no-images", "alpha", "alpha-of-a-certificate", "precision", "device"],
)
def test_wrong_input_answers_2_in_words(model, tmp_path, arguments, said):
    result = run(model, *(tmp_path if argument == "EMPTY" else argument for argument in arguments))
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_run_folder_stands_for_its_model(model):
    assert answers(model.parent, EXAMPLES, "--n", 50) == answers(model, EXAMPLES, "--n", 50)
