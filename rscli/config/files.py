"""Reads a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rscli.config.decode import LARGEST_JSON, LARGEST_TOML, check_size, decode_json, decode_toml
from rscli.errors import InputError


def read_settings(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; or of a JSON file, such as the `config.json` of a run folder.

    Raises `InputError`, naming the line, if the file is missing or broken.
    """
    form = "JSON" if path.suffix == ".json" else "TOML"
    try:
        check_size(path, LARGEST_JSON if form == "JSON" else LARGEST_TOML)
        text = path.read_text(encoding="utf-8")
        settings = decode_json(text) if form == "JSON" else decode_toml(text)
    except FileNotFoundError as cause:
        raise InputError(f"there is no configuration file {path}", "Check the path after --config.") from cause
    except ValueError as cause:  # both decoders name line and column; text that is not UTF-8 is a ValueError as well
        raise InputError(
            f"{path} is not valid {form}: {cause}", "Mend that line; `rscli presets` shows files to copy from."
        ) from cause
    except OSError as cause:
        raise InputError(f"the configuration file {path} cannot be read: {cause.strerror}") from cause
    if form == "JSON" and isinstance(settings, dict) and isinstance(settings.get("config"), dict):
        settings = settings["config"]  # a run folder keeps the sources of the values beside them
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no table of settings", "A configuration is a table: epochs, batch, [data], [arch], ...")
    return settings
