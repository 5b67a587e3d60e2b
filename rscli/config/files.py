"""Reads a configuration file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rscli.config.decode import LARGEST_JSON, LARGEST_TOML, check_size, decode_json, decode_toml
from rscli.errors import InputError

_YAML = re.compile(r"\A(?:\s|#[^\n]*\n)*(?:---\s|(?:- +)?[\w.\"'-]+ *:(?:\s|\Z))")
"""How YAML begins, after comments: with `---`, or `key:`."""

_IN_TOML = "Write `epochs = 90` for `epochs: 90`, and a section as `[optimizer]`; `rscli presets show NAME` shows a file."


def read_settings(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; or of a JSON file, such as the `config.json` of a run folder.

    Raises `InputError`, naming the line, if the file is missing or broken.
    """
    form = "JSON" if path.suffix == ".json" else "TOML"
    text = ""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a file, so it cannot be a configuration", "Name a TOML or JSON file.")
        check_size(path, LARGEST_JSON if form == "JSON" else LARGEST_TOML)
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a byte order mark
        settings = decode_json(text) if form == "JSON" else decode_toml(text)
    except FileNotFoundError as cause:
        raise InputError(f"there is no configuration file {path}", "Check the path after --config.") from cause
    except ValueError as cause:  # both decoders name line and column; text that is not UTF-8 is a ValueError as well
        if path.suffix.lower() in (".yaml", ".yml") or (form == "TOML" and _YAML.search(text)):
            raise InputError(f"{path} is YAML; a configuration is TOML or JSON", _IN_TOML) from cause
        hint = "Fix that line; `rscli presets show NAME` shows a file to copy from."
        raise InputError(f"{path} is not valid {form}: {cause}", hint) from cause
    except OSError as cause:
        hint = "Check the path after --config, and whether you may read the file."
        raise InputError(f"the configuration file {path} cannot be read: {cause.strerror}", hint) from cause
    if form == "JSON" and isinstance(settings, dict) and isinstance(settings.get("config"), dict):
        settings = settings["config"]  # a run folder keeps the sources of the values beside them
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no table of settings", "A configuration is a table: epochs, batch, [data], [arch], ...")
    return settings
