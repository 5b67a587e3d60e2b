"""Reads a configuration file."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from rscli.errors import InputError
from rscli.system import check_regular, system_error


def read_settings(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; or of a JSON file, such as the `config.json` of a run folder.

    Raises `InputError`, naming the line, if the file is missing or broken.
    """
    form = "JSON" if path.suffix == ".json" else "TOML"
    try:
        check_regular(path, "configuration file", "Check the path after --config.")
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a byte order mark in front
        settings = json.loads(text) if form == "JSON" else tomllib.loads(text)
    except ValueError as cause:  # both decoders name line and column; text that is not UTF-8 is a ValueError as well
        raise _broken(path, form, cause) from cause
    except OSError as cause:
        raise system_error(cause, path, "read the configuration file") from cause
    if form == "JSON" and isinstance(settings, dict) and isinstance(settings.get("config"), dict):
        settings = settings["config"]  # a run folder keeps the sources of the values beside them
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no table of settings", "A configuration is a table: epochs, batch, [data], [arch], ...")
    return settings


_YAML = re.compile(r"^(---|%YAML\b.*|[ \t]*[\w.-]+:([ \t].*)?)$", re.MULTILINE)
"""A line that begins a YAML document, or says `key:` or `key: value`; TOML and JSON have none like it."""


def _broken(path: Path, form: str, cause: ValueError) -> InputError:
    """What is wrong with a file that does not decode: its encoding, that it is YAML, or the line that the decoder names."""
    start = path.read_bytes()[: 2**20]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return InputError(f"{path} is UTF-16 text, not UTF-8", "Save it as UTF-8 in your editor.")
    if path.suffix.lower() in (".yaml", ".yml") or _YAML.search(start.decode("utf-8-sig", "replace").replace("\r\n", "\n")):
        hint = 'Write `epochs = 5` and, for a section, a line [data] above `name = "digits"`; `rscli presets` lists examples.'
        return InputError(f"{path} looks like YAML, and configurations are {form}: {cause}", hint)
    return InputError(
        f"{path} is not valid {form}: {cause}", "Fix that line; `rscli presets show NAME` shows a file to copy from."
    )
