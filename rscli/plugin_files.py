"""Plugins from a file that the user names on the command line, for trying one out before there is a package.

Exactly the named file is run, and only because it was named: a model file or a configuration never makes code run. Every class
in it that is derived from a kind of plugin is known by its name in kebab case: `JensenShannon` is `jensen-shannon`. In place of
a package and its version, runs and model files record the file's name and SHA-256.
"""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from rscli.api import KINDS, Plugin
from rscli.errors import InputError, PluginError, reason
from rscli.registry import Entry, announce, check_contract, from_a_signal

DIGEST = "sha256:"
"""What the version of a plugin from a file begins with."""


def load_plugin_file(path: Path) -> list[Entry]:
    """Runs the file, and makes its plugins known; they are returned.

    Raises `InputError` if it is no Python file that can be read, `PluginError` if it does not run, holds no plugin, or
    one of another contract.
    """
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"--plugin is {path}, but must be a Python file", "As in --plugin ./my_loss.py")
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    module = _run(path, source, digest)
    found = [
        (Entry(one.kind, _kebab(name), path.name, DIGEST + digest, f"{path}:{name}"), one)
        for name, one in vars(module).items()
        if isinstance(one, type) and issubclass(one, Plugin) and one.__module__ == module.__name__
        if getattr(one, "kind", None) in KINDS and not name.startswith("_")
    ]
    if not found:
        kinds = "Loss, NoisyLoss, Attack, Noise, Architecture, Dataset, Certifier, Optimizer, Schedule, Logger or Callback"
        raise PluginError(f"the file {path} defines no plugin", f"A plugin is a class derived from rscli.api's {kinds}.")
    for entry, plugin in found:
        check_contract(entry, plugin)
    for entry, plugin in found:
        announce(entry, plugin)
    return [entry for entry, _ in found]


def from_file(version: str) -> bool:
    """Whether a recorded plugin came from a file: its version is then the file's digest."""
    return version.startswith(DIGEST)


def _run(path: Path, source: bytes, digest: str) -> ModuleType:
    """The module made of `source`: of these bytes, and of no copy that Python may have kept of an older file."""
    name = f"rscli_plugin_file_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # classes are looked up there, by pickle and dataclasses
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException as cause:
        del sys.modules[name]
        if from_a_signal(cause):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == str(path)]
        line = getattr(cause, "lineno", None) or (lines[-1] if lines else None)
        where = f", line {line}" if line else ""
        raise PluginError(f"the plugin file {path}{where} fails to run: {reason(cause)}", "Fix the file.") from cause
    return module


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).replace("_", "-").lower()
