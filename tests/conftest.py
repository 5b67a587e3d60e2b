"""What the tests share: the folder of real data that is not part of the project, a small thread pool, and tiny models."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from support import SHARED


@pytest.fixture(autouse=True)
def _no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("RSCLI_DATA_DIR", raising=False)
    monkeypatch.delenv("RSCLI_DEBUG", raising=False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and published logs; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder with real data is not here")
    return SHARED


def pytest_configure(config: pytest.Config) -> None:
    """Two threads at most: the suite runs on small machines, in parallel. Ctrl-C is heard, also where a shell's `&` is not."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu skip without one, without importing torch unless there are any."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
