"""The package as others get it: wheel and sdist hold everything, and the wheel works where the checkout is out of sight."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import rscli
from support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = {"rscli": ROOT / "rscli", "rscli_core": ROOT / "plugins" / "rscli_core", "rscli_presets": ROOT / "presets"}
POINTS: dict[str, dict[str, str]] = PROJECT["project"]["entry-points"]
HEAVY = {"torch", "torchvision", "timm", "sklearn", "matplotlib"}
"""What takes a second or more to import. (Certifiers may take scipy.special, which is quick enough for a listing.)"""

building = [pytest.mark.slow, pytest.mark.install]


def python(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run([*map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, **options)


# --- pyproject ---


def test_every_package_is_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    there = {
        ".".join([name, *file.parent.relative_to(folder).parts])
        for name, folder in SOURCES.items()
        for file in folder.rglob("__init__.py")
    }
    assert listed == there


def test_every_folder_with_code_is_a_package():
    for folder in SOURCES.values():
        assert {f.parent for f in folder.rglob("*.py")} == {f.parent for f in folder.rglob("__init__.py")}


def test_every_core_plugin_has_an_entry_point():
    """A public module of a kind's folder that nobody announces cannot be found."""
    announced = {
        target.partition(":")[0] for points in PROJECT["project"]["entry-points"].values() for target in points.values()
    }
    core = SOURCES["rscli_core"]
    modules = {
        ".".join(["rscli_core", *file.relative_to(core).with_suffix("").parts])
        for file in core.glob("*/*.py")
        if not file.name.startswith("_")
    }
    assert modules <= announced
    assert {target for target in announced if target.startswith("rscli_core")} <= modules


# --- fast answers ---


@pytest.mark.parametrize(
    ("arguments", "slow"),
    [
        (["--help"], HEAVY | {"scipy"}),
        (["--version"], HEAVY | {"scipy"}),
        (["train", "--help"], HEAVY | {"scipy"}),
        (["certify", "--help"], HEAVY | {"scipy"}),
        (["predict", "--help"], HEAVY | {"scipy"}),
        (["compare", "--help"], HEAVY | {"scipy"}),
        (["presets"], HEAVY),
        (["presets", "show", "mnist-cons-0.5"], HEAVY),
        (["plugins"], HEAVY),
        (["plugins", "info", "losses", "consistency"], HEAVY),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_answers_at_once_imports_nothing_slow(arguments, slow):
    code = f"""
import sys
from rscli.cli.app import main
sys.argv = ["rscli", *{arguments!r}]
try:
    main()
finally:
    print("imported:", *sys.modules, file=sys.stderr)
"""
    done = python(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    imported = done.stderr.partition("imported: ")[2].split()
    assert "rscli.cli.app" in imported
    assert slow & set(imported) == set()


def test_the_module_runs_and_says_its_version(tmp_path):
    done = python(sys.executable, "-m", "rscli", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"rscli {rscli.__version__}\n")


# --- wheel and sdist ---


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is in the repository: building leaves files behind."""
    copy = tmp_path_factory.mktemp("source") / "rscli-source"
    copy.mkdir()
    for name in ("rscli", "plugins", "presets"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    done = python(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    how = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--wheel-dir", out]
    done = python(sys.executable, "-m", "pip", "wheel", *how, source)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    return made


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


class TestWheel:
    pytestmark = building

    def test_it_holds_every_file_and_no_other(self, wheel):
        wanted = {
            f"{name}/{file.relative_to(folder).as_posix()}"
            for name, folder in SOURCES.items()
            for file in folder.rglob("*")
            if file.suffix in (".py", ".toml", ".csv", ".typed")
        }
        assert {"rscli/py.typed", "rscli_core/py.typed", "rscli_presets/published.csv"} <= wanted
        assert {name for name in contents(wheel) if ".dist-info/" not in name} == wanted

    def test_it_announces_every_entry_point(self, wheel):
        (name,) = [name for name in contents(wheel) if name.endswith("entry_points.txt")]
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(name).decode()
        for group, points in POINTS.items():
            section = text.partition(f"[{group}]\n")[2].partition("\n\n")[0].splitlines()
            assert {f"{key} = {target}" for key, target in points.items()} == {line for line in section if line}
        assert "rscli = rscli.cli.app:main" in text

    def test_its_metadata_say_licence_and_version(self, wheel):
        (name,) = [name for name in contents(wheel) if name.endswith(".dist-info/METADATA")]
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(name).decode()
        assert f"\nVersion: {rscli.__version__}\n" in text
        assert "\nLicense-Expression: MIT\n" in text
        assert any(name.endswith("licenses/LICENSE") for name in contents(wheel))

    def test_the_sdist_makes_the_same_wheel(self, wheel, built):
        (second,) = built.glob("*.whl")
        assert contents(second) == contents(wheel)
        (archive,) = built.glob("*.tar.gz")
        with tarfile.open(archive) as files:
            names = {name.partition("/")[2] for name in files.getnames()}
        assert {"pyproject.toml", "README.md", "LICENSE", "presets/published.csv", "plugins/rscli_core/py.typed"} <= names


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An environment of its own (scripts, libraries) with the wheel; its dependencies are those of this environment.

    They come by way of a .pth file, whose folders are searched, but whose own .pth files, an editable install's among
    them, are not read: the checkout is out of sight.
    """
    folder = tmp_path_factory.mktemp("environment")
    builder = venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt")
    context = builder.ensure_directories(folder)
    builder.create(folder)
    ask = [context.env_exe, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    libraries = Path(python(*ask).stdout.strip())
    how = ["install", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    done = python(sys.executable, "-m", "pip", "--python", context.env_exe, *how, wheel)
    assert done.returncode == 0, done.stderr
    ours = dict.fromkeys(sysconfig.get_path(which) for which in ("purelib", "platlib"))
    (libraries / "dependencies.pth").write_text("".join(f"{path}\n" for path in ours))
    return Path(context.bin_path), libraries


class TestInstalledWheel:
    pytestmark = building

    def script(self, installed: tuple[Path, Path], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return python(shutil.which("rscli", path=installed[0]), *arguments, cwd=cwd, env={"PYTHONPATH": ""})

    def test_the_checkout_is_out_of_sight(self, installed, tmp_path):
        for name in SOURCES:
            code = f"import {name}; print({name}.__file__)"
            done = python(shutil.which("python", path=installed[0]), "-I", "-c", code, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert Path(done.stdout.strip()).is_relative_to(installed[1])

    def test_it_lists_plugins_and_presets(self, installed, tmp_path):
        done = self.script(installed, "plugins", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)
        assert {(row["kind"], row["name"]) for row in rows if row["package"] == "rscli"} == {
            (group.removeprefix("rscli."), name)
            for group, found in POINTS.items()
            for name in found
            if group not in ("rscli.presets", "rscli.defaults")
        }
        assert [row for row in rows if row["package"] == "rscli" and row["error"]] == []

        done = self.script(installed, "presets", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        names = {row["name"] for row in json.loads(done.stdout) if row["package"] == "rscli"}
        assert names == {file.stem for file in SOURCES["rscli_presets"].glob("*.toml")}

    def test_it_trains(self, installed, tmp_path):
        sets = ["--set", "epochs=1", "--set", "batch=512", "--set", "arch.name=lenet"]
        done = self.script(installed, "train", "--preset", "digits-gaussian-0.25", *sets, "--out", "run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / "model.safetensors").is_file()

    def test_it_knows_published_figures(self, installed, tmp_path):
        done = self.script(installed, "presets", "show", "mnist-cons-0.5", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "published ACR" in done.stdout


METHODS = {"smoothmix": "rscli-smoothmix", "catrs": "rscli-catrs"}


class TestMethodsBesideTheWheel:
    """SmoothMix and CAT-RS, installed from their folders: all that a distribution of somebody else can do, on the contract."""

    pytestmark = building

    def pip(self, installed: tuple[Path, Path], *arguments: object) -> None:
        interpreter = shutil.which("python", path=installed[0])
        how = ["--disable-pip-version-check", "--quiet"]
        done = python(sys.executable, "-m", "pip", "--python", interpreter, *arguments, *how)
        assert done.returncode == 0, done.stderr

    def script(self, installed: tuple[Path, Path], *arguments: object, cwd: Path) -> str:
        done = python(
            shutil.which("rscli", path=installed[0]), *arguments, cwd=cwd, env={"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_they_install_pass_their_tests_train_and_leave_nothing_behind(self, installed, source, tmp_path):
        folders = [source / "plugins" / name for name in METHODS.values()]
        self.pip(installed, "install", "--no-deps", "--no-build-isolation", "--no-index", *folders)
        interpreter = shutil.which("python", path=installed[0])
        for folder in folders:
            tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, folder / "tests"]
            done = python(interpreter, *tests, cwd=tmp_path, env={"PYTHONPATH": "", "OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stdout + done.stderr
            assert " passed" in done.stdout

        names = {row["name"] for row in json.loads(self.script(installed, "presets", "--json", cwd=tmp_path))}
        assert {
            f"{data}-{name}-{sigma}" for data in ("mnist", "cifar10") for name in METHODS for sigma in (0.25, 0.5, 1.0)
        } <= names
        small = ["--set", "data.name=digits", "--set", "epochs=1", "--set", "batch=512", "-q"]
        self.script(installed, "train", "--preset", "mnist-gaussian-0.25", *small, "--out", "teacher", cwd=tmp_path)
        self.script(installed, "train", "--preset", "mnist-smoothmix-0.5", *small, "--out", "smoothmix", cwd=tmp_path)
        taught = ["--set", "loss.teacher=teacher", "--set", "loss.soft_labels=soft", "--set", "loss.votes=4"]
        self.script(installed, "train", "--preset", "mnist-catrs-0.5", *small, *taught, "--out", "catrs", cwd=tmp_path)
        assert (tmp_path / "soft").is_file()

        self.pip(installed, "uninstall", "--yes", *METHODS.values())
        left = {row["name"] for row in json.loads(self.script(installed, "plugins", "--json", cwd=tmp_path))}
        assert not left & set(METHODS)
        assert {"consistency", "gaussian", "cohen"} <= left
        for name in METHODS:  # what they trained is certified without them
            self.script(installed, "certify", name, "--n", "100", "--max", "2", "-q", cwd=tmp_path)
            assert len((tmp_path / name / "results.tsv").read_text().splitlines()) == 3
