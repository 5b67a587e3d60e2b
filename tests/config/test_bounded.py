"""Absurd and deep values: whatever a configuration or a model file asks for is bounded before anything is allocated."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from rscli.config.decode import DEEPEST, LARGEST_TOML, BoundError, decode_json, decode_toml
from rscli.config.words import read_word
from rscli.errors import InputError
from rscli.results.protocol import protocol_path, read_protocol

# --- the words of --set ---

WORDS = """7 1e3 true True null none None 2024-01-05 07:32:00 .01 1_000 [1] {} {a=1} [[1]] nan inf -0 0x1f # = a=b 'a 1,2 yes"""

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(WORDS.split()),
    st.from_regex(r"[\[\]{}0-9.,eE_+\-\"'tfn= ]{0,20}", fullmatch=True),
)


@given(TEXTS.map(str.strip))
def test_a_field_of_text_takes_any_text(text):
    for kind in (str, Path):
        found = TypeAdapter(kind).validate_python(read_word(text, kind))
        if text[:1] not in ("'", '"'):
            assert found == kind(text)


@given(TEXTS.map(str.strip))
def test_text_that_may_be_left_out_takes_any_text_but_none(text):
    if text[:1] not in ("'", '"'):
        assert read_word(text, str | None) == (None if text == "none" else text)
    assert read_word(text, Literal["none", "null", "1"] | None) == text or text not in ("none", "null", "1")


@given(TEXTS.map(str.strip).map(lambda text: text.replace("\x7f", "")))
def test_text_in_quotes_is_the_text(text):
    assert read_word(json.dumps(text, ensure_ascii=False), str) == text


@given(st.text(max_size=20).map(str.strip), st.sampled_from([int, float, bool, tuple[int, ...], float | None, dict[str, Any]]))
def test_any_text_is_read_or_left_to_the_field_to_refuse(text, kind):
    try:
        value = read_word(text, kind)
    except BoundError:
        return
    with suppress(ValidationError):
        TypeAdapter(kind).validate_python(value)


@given(st.integers(-(2**63), 2**63 - 1))
def test_whole_numbers_are_read_as_people_write_them(number):
    for text in (f"{number}", f"{number:_}", f"{number:+}", f"0{number}" if number >= 0 else f"{number}"):
        assert read_word(text, int) == number
        assert read_word(text, int | None) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_as_people_write_them(number):
    short = repr(number).replace("0.", ".", 1) if repr(number).startswith(("0.", "-0.")) else repr(number)
    for text in (repr(number), f"{number:e}", short):
        assert read_word(text, float) == float(text)


READ = [
    ("none", Literal["none", "flip"], "none"),
    ("none", float | None, None),
    ("null", tuple[float, ...] | None, None),
    ("None", bool | None, None),
    ("True", bool, True),
    ("no", bool, False),
    ("1e3", int, 1000),
    ("1.5", int, 1.5),
    ("1_000", int, 1000),
    (".01", float, 0.01),
    ("1,5", float, "1,5"),
    ("0,1,2", tuple[int, ...], [0, 1, 2]),
    ("31", tuple[int, ...], [31]),
    ("[.5, .25]", tuple[float, ...], [0.5, 0.25]),
    ("[31, 61]", tuple[int, ...], [31, 61]),
    ("a,b", list[str], ["a", "b"]),
    ("", tuple[int, ...], ""),
    ("True", bool | int | float | str | None, True),
    ("yes", bool | int | float | str | None, "yes"),
    (".5", bool | int | float | str | None, 0.5),
    ("2024-01-05", bool | int | float | str | None, "2024-01-05"),
    ("{a = 1}", dict[str, int], {"a": 1}),
    ("3", Literal[1, 3], 3),
    ("none", Any, None),
    ("stability", Any, "stability"),
]


@pytest.mark.parametrize(("text", "kind", "value"), READ, ids=[f"{text}-{kind}" for text, kind, _ in READ])
def test_a_word_is_read_for_its_field(text, kind, value):
    found = read_word(text, kind)
    assert (found, type(found)) == (value, type(value))


# --- deep, large, twice ---


@given(st.integers(1, 3000), st.integers(0, 2**12 - 1))
@settings(deadline=None)
def test_any_nesting_is_decoded_or_refused_in_words(depth, mix):
    lists = [bool(mix >> place % 12 & 1) for place in range(depth)]
    as_json = "".join("[" if one else '{"a":' for one in lists) + "1" + "".join("]" if one else "}" for one in reversed(lists))
    as_toml = (
        "a = "
        + "".join("[" if one else "{a = " for one in lists)
        + "1"
        + "".join("]" if one else "}" for one in reversed(lists))
    )
    for decode, text in ((decode_json, as_json), (decode_toml, as_toml), (decode_toml, ".".join(["a"] * depth) + " = 1")):
        if depth <= DEEPEST:
            decode(text)
        elif depth > DEEPEST + 2:
            with pytest.raises(BoundError, match="deep"):
                decode(text)


@pytest.mark.parametrize("digits", [20, 100, 4300, 4301, 100_000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_integers_of_any_length_are_refused_in_words(digits, sign):
    number = sign + "9" * digits
    texts = [(decode_json, f'{{"seed": {number}}}'), (decode_json, f"[[{number}]]"), (decode_toml, f"seed = {number}")]
    for decode, text in [*texts, (decode_toml, f"a = [0x{'9' * digits}]")]:
        with pytest.raises(BoundError, match="64 bits"):
            decode(text)


def test_a_key_twice_is_refused():
    for text in ('{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]'):
        with pytest.raises(ValueError, match="the key 'a' is given twice"):
            decode_json(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_ordinary_json_is_decoded_as_ever(value):
    text = json.dumps(value)
    assert decode_json(text) == json.loads(text)


def test_dots_in_a_text_are_no_key():
    dots = "a." * 100
    for text in (f'a = "{dots}"', f"a = '{dots}'", f'a = """\n{dots}"""', f"a = '''{dots}'''", f"# {dots}\na = 1"):
        assert decode_toml(text)


# --- the real commands ---

RUN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)
from rscli.__main__ import main
sys.exit(main())
"""
LIMITED = [sys.executable, "-c", RUN]


def refused(*words: str | Path, command: list[str] = LIMITED) -> str:
    """What the command says, which must be one message and exit code 2."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 2, (words, done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 8000
    return done.stderr


DEEP = 2000
FILES = {
    "lists.json": '{"a": ' + "[" * DEEP + "]" * DEEP + "}",
    "tables.json": '{"a":' * DEEP + "1" + "}" * DEEP,
    "lists.toml": "a = " + "[" * DEEP + "]" * DEEP,
    "tables.toml": "a = " + "{a = " * DEEP + "1" + "}" * DEEP,
    "dots.toml": ".".join(["a"] * DEEP) + " = 1",
    "head.toml": "[" + ".".join(["a"] * 300_000) + "]",
    "long.toml": f"seed = {'1' * 10**5}",
    "long.json": f'{{"seed": {"1" * 10**5}}}',
    "twice.json": '{"seed": 1, "seed": 2}',
    "large.toml": "#" * (LARGEST_TOML + 1),
    "many.toml": "\n".join(f"key{number} = 1" for number in range(50_000)),
    "tables-of-many.toml": "\n".join(f"[key{number}]\na = 1" for number in range(20_000)),
    "key.toml": "a" * 500_000 + " = 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_train_refuses_an_absurd_configuration(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    refused("train", "--preset", "digits-gaussian-0.25", "--config", tmp_path / name, "--dry-run")


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_a_protocol_is_read_within_bounds(name, tmp_path):
    results = tmp_path / "results.tsv"
    protocol_path(results).write_text(FILES[name], encoding="utf-8")
    with pytest.raises(InputError, match=r"protocol file .* cannot be read: .*(levels deep|64 bits|given twice)"):
        read_protocol(results)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_compare_refuses_an_absurd_protocol(name, tmp_path):
    results = tmp_path / "results.tsv"
    results.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:00:01.0\n", encoding="utf-8")
    protocol_path(results).write_text(FILES[name], encoding="utf-8")
    assert "protocol file" in refused("compare", results)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "seed=" + "[" * DEEP,
        "seed=" + "[" * DEEP + "]" * DEEP,
        "seed=" + "{a=" * DEEP + "1" + "}" * DEEP,
        "arch.kwargs=" + "[" * DEEP + "]" * DEEP,
        "seed=" + "1" * 100_000,
        "seed=0x" + "f" * 100_000,
        ".".join(["a"] * DEEP) + "=1",
        "arch.kwargs." + ".".join(["a"] * DEEP) + "=1",
        "x" * 100_000 + "=1",
    ],
    ids=["open", "lists", "tables", "plugin", "digits", "hex", "key", "plugin-key", "name"],
)
def test_train_refuses_an_absurd_set(text):
    refused("train", "--preset", "digits-gaussian-0.25", "--set", text, "--dry-run")


# --- model cards ---

HUGE = (10**6, 10**9, 2**63 - 1, 10**30)
ODD = (-1, 0, 1.5, "many", None, [], {}, True, 1e308, float("nan"), float("inf"))


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def mutations() -> dict[str, tuple[tuple[Any, ...], Any]]:
    """Where in a card, and what is put there: each of them is to be refused."""
    found: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def put(path: tuple[Any, ...], *values: Any) -> None:
        for value in values:
            found[f"{'.'.join(map(str, path))}={str(value)[:20]}-{len(found)}"] = path, value

    spec = ("spec",)
    for section in ("arch", "noise", "data"):
        put((section,), {}, [], None, 1, "x", {"depth": 8})
        put((section, "name"), None, 1, [], {}, True)
    for section in ("arch", "noise"):
        put((section, "name"), "", "no-such", "a/b/c", "x" * 10_000, ":", "/")
    put(("arch", "depth"), *HUGE, *(v for v in ODD if v is not None), 9998, 10_001, 3)
    put(("noise", "sigma"), *HUGE, -1, 0, "many", None, [], {}, 1e308, float("nan"), float("inf"))
    for place in range(3):
        put((*spec, "shape", place), *HUGE, *(v for v in ODD if v is not True))
    put((*spec, "shape"), [1], [1] * 4, [], None, 28, "28", [1, 65536, 65536])
    put((*spec, "test_transform", "resize"), *HUGE, -1, 0, 1.5, "many", [], {}, 65536, float("nan"))
    put((*spec, "test_transform", "channels"), *HUGE, *(v for v in ODD if v is not True), 2, 3, 4)
    for place in range(2):
        put((*spec, "test_transform", "crop", place), *HUGE, *ODD)
    put((*spec, "test_transform", "crop"), [28], [28] * 3, [], None, 28)
    put((*spec, "test_transform"), None, [], {}, 1, {"channels": 1})
    put((*spec, "augmentation", "padding"), *HUGE, -1, 1.5, "many", None, [], 65536)
    put((*spec, "augmentation"), None, [], 1, {"more": 1})
    put((*spec, "class_names"), [], None, "digits", [1] * 10, ["a"] * 11, ["a"] * 9, ["a"], ["a"] * 10**5, ["a"] * (10**6 + 1))
    put((*spec, "class_names", 0), 1, None, [], "x" * 10**5)
    for name in ("mean", "std"):
        put((*spec, name), [], [0.5, 0.5], None, 0.5, "x", [None], ["x"], [float("nan")], [float("inf")], [1e30], [10**30])
    put((*spec, "std"), [0], [0.0], [-1], [1e-300], [1e-40])
    put(
        (*spec, "sizes"),
        None,
        [],
        {"train": -1},
        {"train": 10**30},
        {"train": 1.5},
        {"train": "x"},
        {str(n): 1 for n in range(1001)},
    )
    put(("plugins",), None, {}, [1], [[]], [{}], [{"kind": "noises"}], [{"kind": "architectures", "name": "x"}], [{"kind": 1}])
    put(("format",), None, 0, -1, 3, 10**30, "1", 1.5)
    put(("epochs",), -1, 10**30, 1.5, "x", [], float("nan"))
    put(("config",), 1, [], "x", _nested(100), _nested(900))
    put(("rscli",), None, 1, [])
    put(("origin",), 1, [], {})
    put(("sha256",), None, 1, [])
    return found


MUTATIONS = mutations()


@pytest.fixture(scope="module")
def parts() -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and the card of a small model."""
    from rscli.config.layers import resolve
    from rscli.training.model_card import model_card
    from rscli.training.trainer import initial_classifier

    sets = ["data.name=digits", "arch.name=cifar-resnet", "arch.depth=8", "noise.sigma=0.25", "loss.name=gaussian"]
    found = resolve(sets=[*sets, "optimizer.lr=0.1"])
    spec = found.dataset.spec(Path()).model_copy(update={"mean": (0.25,), "std": (0.5,)})
    return initial_classifier(found, spec).network.state_dict(), model_card(found, spec, {}).model_dump(mode="json")


def signed(path: Path, tensors: dict[str, Any], card: dict[str, Any], where: tuple[Any, ...] = (), value: Any = None) -> Path:
    """A model file with another value in its card, and the digest that belongs to it."""
    from safetensors.torch import save_file

    from rscli.models.modelfile import content_digest

    card = copy.deepcopy(card)
    if where:
        inner = card
        for part in where[:-1]:
            inner = inner[part]
        inner[where[-1]] = value
    if where != ("sha256",):
        card["sha256"] = content_digest(tensors, card)
    save_file(tensors, path, metadata={"rscli": json.dumps(card)})
    return path


LOAD = """
import json, resource, sys, time
import torch
from pathlib import Path
from rscli.errors import RscliError
from rscli.models.modelfile import load_model
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    start = time.monotonic()
    try:
        load_model(path)
        answer = "loaded"
    except RscliError as error:
        answer = error.exit_code if str(path) in str(error) and len(str(error)) < 8000 else str(error)[:3000]
    except BaseException as error:
        answer = repr(error)[:300]
    print(json.dumps([path.name, answer, time.monotonic() - start]), flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process by Linux's means")
def test_every_absurd_model_card_is_refused_in_words_within_a_gigabyte(parts, tmp_path):
    names = {f"{number:03}": name for number, name in enumerate(MUTATIONS)}
    assert len(names) >= 200
    for number, name in names.items():
        signed(tmp_path / number, *parts, *MUTATIONS[name])
    signed(tmp_path / "whole", *parts)
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, timeout=300, check=False)
    answers = {name: (answer, seconds) for name, answer, seconds in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, (len(answers), done.returncode, done.stderr[-2000:])
    assert answers.pop("whole")[0] == "loaded"
    assert {names[name]: answer for name, (answer, _) in answers.items() if answer != 2} == {}
    assert max(seconds for _, seconds in answers.values()) < 20
    assert len(answers) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("where", [("arch", "depth"), ("spec", "shape", 1), ("config",)], ids=lambda where: where[-1])
def test_certify_and_predict_refuse_an_absurd_model(parts, where, tmp_path):
    value = _nested(900) if where == ("config",) else 10**9
    path = signed(tmp_path / "model.safetensors", *parts, where, value)
    for words in (("certify", path), ("certify", path, "--set", "data.name=digits"), ("predict", path, tmp_path)):
        assert str(path.name) in refused(*words)


def test_another_network_than_the_file_holds_is_refused_before_it_is_initialised(parts, tmp_path):
    from rscli.errors import RscliError
    from rscli.models.modelfile import load_model

    tensors, card = parts
    for number, arch in enumerate(
        (
            {"name": "cifar-densenet", "depth": 994, "growth": 1000},
            {"name": "timm/vit_tiny_patch16_224", "kwargs": {"depth": 10**6}},
            {"name": "timm/vit_tiny_patch16_224", "kwargs": {"embed_dim": 300_000}},
            {"name": "timm/resnet50", "kwargs": {"base_width": 10**6}},
        )
    ):
        path = signed(tmp_path / str(number), tensors, {**card, "arch": arch})
        with pytest.raises(RscliError, match="do not fit its architecture") as error:
            load_model(path)
        assert error.value.exit_code == 2


def test_certify_reads_its_settings_as_train_does(parts, tmp_path):
    from rscli.cli.certify import _settings
    from rscli.errors import ConfigError

    path = signed(tmp_path / "model.safetensors", *parts)
    sets = ["data.name=imagefolder", "data.path=2024-01-05", "data.augment=none", "certifier.early_abstain=True"]
    assert _settings(sets, "cohen", path) == {
        "data": {"name": "imagefolder", "path": "2024-01-05", "augment": "none"},
        "certifier": {"early_abstain": True},
    }
    folder = signed(tmp_path / "folder", *parts, ("data",), {"name": "imagefolder"})
    assert _settings(["data.path=7"], "cohen", folder)["data"] == {"path": "7"}
    with pytest.raises(ConfigError, match="deep"):
        _settings(["certifier.n0=" + "[" * DEEP], "cohen", path)


def test_import_reads_its_settings_as_train_does(parts, tmp_path):
    from safetensors.torch import save_file

    from rscli.models.importing.convert import ImportOptions, import_checkpoint
    from rscli.runtime.progress import Silent

    save_file(parts[0], tmp_path / "weights.safetensors")
    options = {
        "checkpoint": tmp_path / "weights.safetensors",
        "out": tmp_path / "model",
        "dataset": "imagefolder",
        "sigma": 0.25,
    }
    sets = ("data.path=2024-01-05", "data.augment=none", "data.mean=null", "arch.depth=8.0")
    with pytest.raises(InputError, match="2024-01-05"):  # the folder is not there; the settings were taken
        import_checkpoint(ImportOptions(**options, data_dir=tmp_path, arch="cifar-resnet", sets=sets), Silent())
