"""Which of several processes says what is wrong."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from rscli.cli import one_voice
from rscli.cli.commands import app
from rscli.cli.interrupts import Terminated
from rscli.errors import InputError

WRONG = [["train", "--preset", "none"], ["train", "--none"]]


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """This is the second of two processes; how long it has waited."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    found: list[float] = []
    monkeypatch.setattr(one_voice.time, "sleep", found.append)
    return found


@pytest.mark.parametrize("words", WRONG, ids=["a value", "an option"])
def test_the_second_process_says_what_is_wrong_if_nobody_ends_it(waits, words):
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, waits) == (2, [one_voice.SECONDS])
    assert "none" in result.stderr


@pytest.mark.parametrize("words", WRONG, ids=["a value", "an option"])
def test_it_ends_without_a_word_when_the_first_has_said_it(waits, words, monkeypatch):
    def terminated(_seconds: float) -> None:
        raise Terminated(15)

    monkeypatch.setattr(one_voice.time, "sleep", terminated)
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stderr) == (2, "")


def test_what_it_alone_has_found_it_says_at_once_and_what_all_have_never(waits):
    error = InputError("wrong")
    error.said_by = "this"
    assert one_voice.speaks(error)
    error.said_by = "first"
    assert not one_voice.speaks(error)
    assert waits == []


def test_the_first_process_does_not_wait(waits, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert CliRunner().invoke(app, WRONG[0]).exit_code == 2
    assert waits == []
