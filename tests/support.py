"""What tests need without torch: the root of the checkout, the folder of real data, rscli as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("RSCLI_SHARED", ROOT.parent / "shared"))
"""Real data and published logs, which are no part of the project: it need not exist."""


def process(*words: object, cwd: Path, path: Iterable[Path] = (), seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """`rscli` in a process of its own, which finds the packages in `path` first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "rscli", *map(str, words)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=seconds)


def forget_plugins() -> None:
    """Plugins of files are unknown again, as in another process."""
    from rscli import registry

    registry._announced.clear()
    registry.installed.cache_clear()
