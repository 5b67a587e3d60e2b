"""Text from outside on its way out: hostile names through every command and format, and streams of every encoding."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rscli.cli.console import Console
from rscli.cli.streams import _Messages
from rscli.config.files import read_settings
from rscli.data.splits import FileSplit
from rscli.errors import InputError
from rscli.report.export import to_csv, to_json
from rscli.report.render import FORMATS, print_tables, render
from rscli.report.summary import compare
from rscli.results.protocol import claim, read_protocol
from rscli.results.reader import read_results
from rscli.text import encodable, json_text, one_line, same_name, visible
from rscli_core.datasets.imagefolder import ImageFolder
from rscli_core.datasets.imagenet import ImageNet

HOSTILE = {
    "latin-1": "caf\udce9",
    "escape": "a\x1b[2Jb",
    "title": "a\x1b]0;owned\x07b",
    "c1": "a\x9b2Jb",
    "bell": "a\x07\x08b",
    "return": "good\rbad",
    "bidi": "a\u202egnp.exe",
    "isolate": "a\u2066b\u2069",
    "emoji": "cam-00:1a:ab:cd:05",
    "emoji word": "a:x:b",
    "markup": "[red]a[/] [link=x]b",
    "line": "a\nb",
    "formula": "=1+1",
    "at": "@SUM(A1)",
    "dash": "-2+3",
    "plus": "+1",
    "latex": "$\\frac_%&#{}~^",
    "markdown": "*a*_b_|c|`d`<b>",
    "hidden": "_hidden",
    "accents": "Ünï±σ模",
}
BAD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
"""Every code point, lone surrogates too."""

ROWS = (
    "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t0\t0\t0.5\t1\t0:00:01\n1\t1\t0\t0.2\t0\t0:00:01\n2\t1\t1\t0.7\t1\t0:00:01\n"
)


# --- the functions, over all text ---


@given(TEXT)
def test_what_is_visible_can_be_printed_and_does_nothing(text):
    assert not BAD.search(visible(text))
    assert not re.search(r"[\n\t]", one_line(text))
    assert visible(visible(text)) == visible(text)
    visible(text).encode("utf-8")
    if text.isascii() and text.isprintable():
        assert visible(text) == text


@given(TEXT, st.sampled_from(["ascii", "cp1252", "cp932", "latin-1", "utf-8", "koi8-r"]))
def test_every_encoding_takes_every_text(text, encoding):
    encodable(text, encoding).encode(encoding)


@given(TEXT, st.booleans())
def test_json_is_valid_encodable_and_comes_back(text, ascii_only):
    written = json_text({text: [text]}, ascii_only=ascii_only)
    assert json.loads(written.encode("ascii" if ascii_only else "utf-8")) == json.loads(json.dumps({text: [text]}))


@given(TEXT, st.sampled_from(["ascii", "cp1252", "utf-8"]))
def test_a_stream_takes_any_text_and_passes_colour_alone(text, encoding):
    raw = io.BytesIO()
    stream = _Messages(io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n"))
    assert stream.write(f"\x1b[31m{text}\x1b[0m\n") == len(text) + 10
    stream.flush()
    written = raw.getvalue().decode(encoding)
    assert written.startswith("\x1b[31m")
    assert not BAD.search(re.sub(r"\x1b\[[0-9;]*m", "", written))


@given(TEXT)
def test_a_console_shows_strings_as_data(text):
    from rich.table import Table

    page = io.StringIO()
    console = Console(file=page, width=10_000, color_system="truecolor", force_terminal=True, highlight=False)
    table = Table("a", box=None)
    table.add_row(one_line(text))
    console.print(table)
    console.print(text)
    assert not BAD.search(re.sub(r"\x1b\[[0-9;]*m", "", page.getvalue()))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_console_knows_no_markup_and_no_emoji(text):
    page = io.StringIO()
    Console(file=page, width=1000, color_system=None).print(text)
    assert page.getvalue() == visible(text) + "\n"


# --- tables and files ---


@pytest.fixture(params=HOSTILE.values(), ids=HOSTILE)
def comparison(request, tmp_path):
    plain = tmp_path / "plain.tsv"
    plain.write_text(ROWS)
    return request.param, compare([read_results(plain), read_results(plain)], names=["base", request.param])


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_can_be_written_and_obeys_nothing(comparison, form):
    name, found = comparison
    text = render(found, form)
    text.encode("utf-8")
    assert not BAD.search(text)
    if form == "json":
        assert text.isascii()
        assert json.loads(text)["results"][1]["name"] == name


def test_a_table_on_a_terminal_shows_the_name(comparison):
    name, found = comparison
    page = io.StringIO()
    print_tables(found, Console(file=page, width=1000, color_system=None))
    assert one_line(name) in page.getvalue()


def test_no_cell_of_a_csv_is_a_formula(comparison):
    name, found = comparison
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    names = {row["name"] for row in rows}
    assert names == {"base", one_line(name) if name[0] not in "=+-@" else f"'{name}"}
    assert to_json(found).isascii()


def test_a_name_changes_no_structure_of_a_table(comparison, tmp_path):
    """Markdown and LaTeX have the same rows, cells and commands as with a harmless name."""
    _, found = comparison
    plain = read_results(tmp_path / "plain.tsv")
    harmless = compare([plain, plain], names=["base", "harmless"])
    bars, signs = re.compile(r"(?<!\\)\|"), re.compile(r"(?<!\\)&|(?<!\\)%|\\\\$|\\(?:begin|end|toprule)\b")
    for form, sign in (("markdown", bars), ("latex", signs)):
        ours, theirs = (render(each, form).splitlines() for each in (found, harmless))
        assert [len(sign.findall(line)) for line in ours] == [len(sign.findall(line)) for line in theirs]


# --- through the program ---


def rscli(arguments, cwd, **environment):
    """rscli in a strict stream of an encoding, as most locales have it."""
    command = [sys.executable, "-m", "rscli", *arguments]
    names = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8:strict", **environment}
    return subprocess.run(command, capture_output=True, cwd=cwd, env=names, timeout=120)


@pytest.mark.parametrize("encoding", ["utf-8:strict", "cp1252:strict", "ascii:strict"])
@pytest.mark.parametrize("name", ["caf\udce9.tsv", "σ±.tsv"])
def test_compare_answers_in_any_encoding(tmp_path, name, encoding):
    (tmp_path / name).write_text(ROWS)
    for options in ([], ["--json"], ["--format", "latex"], ["--out", name.replace("tsv", "md"), "--format", "markdown"]):
        done = rscli(["compare", name, *options], tmp_path, PYTHONIOENCODING=encoding)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
        done.stdout.decode(encoding.split(":")[0])
    missing = rscli(["compare", f"no-{name}"], tmp_path, PYTHONIOENCODING=encoding)
    assert missing.returncode == 2
    assert missing.stderr.startswith(b"error: there is no result file")


# --- configurations as editors write them ---


@pytest.mark.parametrize(("name", "text"), [("c.toml", "epochs = 1\n"), ("c.json", '{"epochs": 1}')])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_read(name, text, encoding, tmp_path):
    (tmp_path / name).write_text(text, encoding=encoding)
    assert read_settings(tmp_path / name) == {"epochs": 1}


YAML = ["epochs: 90\n", "---\nepochs: 90\n", "# mine\n\noptimizer:\n  lr: 0.1\n", "- a: 1\n", "lr : 1\nepochs: 2\n"]


@pytest.mark.parametrize("name", ["c.toml", "c.yaml", "c.yml"])
@pytest.mark.parametrize("text", YAML)
def test_yaml_by_mistake_is_named(text, name, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="is YAML"):
        read_settings(tmp_path / name)


@pytest.mark.parametrize("text", ["epochs = \n", "a = 1: 2\n", "[data\nname = 'x: y'\n", "x = '12:30\n"])
def test_broken_toml_is_not_taken_for_yaml(text, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(InputError, match="is not valid TOML"):
        read_settings(tmp_path / "c.toml")


# --- names of files and classes ---


def folder(home: Path, classes: dict[str, list[str]]) -> None:
    for split, names in classes.items():
        for number, name in enumerate(names):
            place = home / split / name
            place.mkdir(parents=True)
            Image.fromarray(np.full((4, 4), 60 + 100 * number, np.uint8)).save(place / "0.png")


@pytest.mark.parametrize("name", ["café", "Å", "한국", "ñandú"])
@pytest.mark.parametrize(("train", "test"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_a_class_is_the_same_however_its_accents_are_kept(tmp_path, name, train, test):
    one, other = (unicodedata.normalize(form, name) for form in (train, test))
    folder(tmp_path, {"train": [one, "dog"], "test": [other, "dog"]})
    dataset = ImageFolder(size=4, channels=1)
    spec = dataset.spec(tmp_path)
    assert spec.class_names == tuple(sorted([same_name(name), "dog"]))
    assert spec.sizes == {"train": 2, "test": 2}
    files = dataset.load("test", tmp_path)
    assert [path.parent.name for path in files.paths] == [other if each != "dog" else "dog" for each in spec.class_names]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_imagenet_finds_the_images_of_a_class_however_its_accents_are_kept(tmp_path, form):
    name = unicodedata.normalize(form, "café")
    folder(tmp_path, {"train": [name, "dog"], "val": [name, "dog"]})
    dataset = ImageNet(classes=2)
    assert [finding.ok for finding in dataset.check(tmp_path)] == [True]
    assert [path.parent.name for path in dataset.load("test", tmp_path).paths] == [name, "dog"]


def test_two_folders_for_one_class_are_refused(tmp_path):
    folder(tmp_path, {"train": [unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")]})
    with pytest.raises(InputError, match="two folders for the class"):
        ImageFolder(size=4, channels=1).spec(tmp_path)


def test_a_latin_1_name_has_a_fingerprint_and_others_keep_theirs(tmp_path):
    folder(tmp_path, {"train": ["cat", "Ünï"]})
    dataset = ImageFolder(size=4, channels=1)
    found, spec = dataset.load("train", tmp_path), dataset.spec(tmp_path)

    before = FileSplit(found.paths, found.labels, spec).fingerprint()
    lines = "".join(f"{path.relative_to(tmp_path / 'train').as_posix()}\t{path.stat().st_size}\n" for path in found.paths)
    assert before == hashlib.sha256(lines.encode() + found.labels.astype("<i8").tobytes()).hexdigest()
    latin = found.paths[0].rename(found.paths[0].with_name("caf\udce9.png"))
    assert FileSplit([latin, found.paths[1]], found.labels, spec).fingerprint() != before


@pytest.mark.parametrize("name", HOSTILE)
def test_a_protocol_holds_any_text(name, tmp_path):
    """A model whose path is not UTF-8 stands in the protocol; what is written must be what is read, and its digest hold."""
    protocol = {"format": 2, "dataset": "digits", "info": {"model": HOSTILE[name], "arch": {"name": HOSTILE[name]}}}
    written = claim(tmp_path / "results.tsv", protocol)
    assert written["info"] == protocol["info"]
    assert read_protocol(tmp_path / "results.tsv") == written
    assert [path.name for path in tmp_path.iterdir()] == ["results.tsv.protocol.json"]


@pytest.mark.parametrize("name", ["[x]", "*x", "[", "**"])
def test_a_name_is_no_option_of_the_line_break_before_it(name, tmp_path):
    for folder_name in ("first", name):
        (tmp_path / folder_name).mkdir()
        (tmp_path / folder_name / "results.tsv").write_text(ROWS)
    text = render(compare([read_results(tmp_path / each) for each in ("first", name)]), "latex")
    assert f"    {{}}{name} &" in text
    assert not re.search(r"\\\\\n\s*[\[*]", text)
