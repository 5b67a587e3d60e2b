"""Imports plugins in a child process, for listings: whatever a plugin does there (it may end the process), the listing goes on.

rscli's own plugins, and those of files that the user named, are imported right here: they are the program's, or ran already.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rscli.errors import PluginError
from rscli.plugin_files import from_file
from rscli.registry import Entry, description, fix, load_entry

SECONDS = 20.0
"""How long one plugin may take to be imported."""

CHILD = """
import json, sys
task = json.load(sys.stdin)
sys.path[:] = task["path"]
from rscli.distributions import leave_out_broken
leave_out_broken()
from rscli.plugin_trial import answer
answer(task["entries"])
"""


def descriptions(entries: Iterable[Entry], seconds: float = SECONDS) -> dict[Entry, str | PluginError]:
    """The description of each plugin, or the error that its import ends in. Imports nobody else's code into this process."""
    found: dict[Entry, str | PluginError] = {}
    foreign = []
    for entry in entries:
        if entry.package == "rscli" or from_file(entry.version):
            found[entry] = _describe(entry)
        else:
            foreign.append(entry)
    while foreign:  # each child goes on behind the entry that ended the last one
        answered = 0
        for entry, answer in zip(foreign, _child(foreign, seconds), strict=False):
            found[entry] = answer
            answered += 1
        foreign = foreign[answered:]
    return found


def answer(entries: list[dict[str, str]]) -> None:
    """In the child: a line before each import, and one after it, on the stdout that only this function still has."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for fields in entries:
        out.write("null\n")
        out.flush()
        entry = Entry(**fields)
        reply: dict[str, str | None] = {}
        try:
            told = _describe(entry)
            reply = {"description": told} if isinstance(told, str) else {"error": told.message, "hint": told.hint}
        except BaseException as cause:  # this process is here to survive it
            reply = {"error": _ended(entry, f"{type(cause).__name__}: {cause}").message, "hint": fix(entry)}
        out.write(json.dumps(reply) + "\n")
        out.flush()
    os._exit(0)  # threads and exit handlers of plugins have no say


def _describe(entry: Entry) -> str | PluginError:
    try:
        return description(load_entry(entry))
    except PluginError as error:
        return error


def _child(entries: list[Entry], seconds: float) -> Iterator[str | PluginError]:
    """An answer for each of the `entries`, up to the first that ends the child, which is answered, too: at least one."""
    task = json.dumps({"path": sys.path, "entries": [asdict(entry) for entry in entries]})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", CHILD], **pipes, encoding="utf-8") as child:  # type: ignore[call-overload]
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_listen, args=(child.stdout, lines), daemon=True).start()
        try:
            child.stdin.write(task)
            child.stdin.close()
            for entry in entries:
                reply = None
                while reply is None:
                    reply = _parsed(lines.get(timeout=seconds))
                if not reply:
                    yield _ended(entry, _how(child.wait(timeout=seconds)))
                    return
                yield reply["description"] if "description" in reply else PluginError(reply["error"], reply["hint"])
        except (queue.Empty, subprocess.TimeoutExpired):
            yield _ended(entry, f"its import took more than {seconds:g} seconds")
        except BrokenPipeError:
            yield _ended(entries[0], _how(child.wait()))
        finally:
            child.kill()


def _parsed(line: str) -> Any:
    """The answer in a line; None before an import, and {} where the child has ended."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _listen(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _how(code: int) -> str:
    if code >= 0:
        return f"its import ends the process (exit code {code})"
    return f"its import ends the process ({signal.Signals(-code).name})"


def _ended(entry: Entry, reason: str) -> PluginError:
    return PluginError(f"the {entry} does not load: {reason}", fix(entry))
