"""What the tests share: the folder of real data that is not part of the project, a small thread pool, and tiny models."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import SHARED, forget_plugins


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


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model file of a small network, alone in its run folder; no test changes it."""
    from runs import trained

    return trained(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture
def plugins_forgotten() -> Iterator[None]:
    """Plugins of files that a test loads are unknown to the next."""
    yield
    forget_plugins()


def pytest_configure(config: pytest.Config) -> None:
    """One thread, in processes of the tests too: many run at once. Ctrl-C is heard, also where a shell's `&` is not."""
    os.environ["OMP_NUM_THREADS"] = "1"
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
