"""The variables of torchrun, as clusters leave them: understood, or refused in one line that names them."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rscli.errors import InputError, Stopped
from rscli.runtime import rendezvous
from rscli.runtime.signals import StopRequest
from rscli.runtime.torchrun import Launch, launched, local_rank, patience
from rscli.smoothing import work_queue
from rscli.smoothing.work_queue import Together, join

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
ODD = ["two", "-1", "1.5", "0x2", "٣", "1e3", "99999999999999999999", "+", "2 3", "nan"]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ODD)
def test_odd_numbers_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"the environment variable {name} is ") as caught:
        launched({**WHOLE, name: value})
    assert value in caught.value.message
    assert "torchrun" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', but must be a whole number of 1 or more"),
        ({"RANK": "2"}, "RANK is '2', but must be a whole number from 0 to 1, as WORLD_SIZE is 2"),
        ({"RANK": "3", "WORLD_SIZE": "1"}, "RANK is '3', but must be a whole number from 0 to 0, as WORLD_SIZE is 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', but must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        ({"RANK": ""}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"MASTER_ADDR": " "}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
    ],
)
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(InputError) as caught:
        launched({**WHOLE, **changes})
    assert said in caught.value.message


@pytest.mark.parametrize(
    "environment", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"RANK": "0"}, {"RANK": "", "WORLD_SIZE": "1"}]
)
def test_one_process_is_alone_without_a_word(environment):
    assert launched(environment) == Launch()


@pytest.mark.parametrize("rank", ["3", "x", "-1"])
def test_a_leftover_rank_is_ignored_with_a_note(rank):
    found = launched({"RANK": rank, "WORLD_SIZE": ""})
    assert (found.rank, found.world) == (0, 1)
    assert f"RANK is {rank!r}, but WORLD_SIZE is not set: RANK is ignored" in (found.note or "")


TEXTS = st.none() | st.sampled_from(["", " ", "0", "1", "2", "3", "29500", *ODD]) | st.text(max_size=5)


@given(TEXTS, TEXTS, TEXTS, TEXTS)
@example("2", "1", "localhost", "29500")
def test_whatever_the_variables_say_it_is_understood_or_refused(world, rank, address, port):
    names = {"WORLD_SIZE": world, "RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": port}
    try:
        found = launched({name: value for name, value in names.items() if value is not None})
    except InputError:
        return
    assert 0 <= found.rank < found.world
    assert found.world == 1 or (found.address and 1 <= found.port <= 65535)


def test_other_numbers():
    assert (local_rank({}), local_rank({"LOCAL_RANK": ""}), local_rank({"LOCAL_RANK": "3"})) == (0, 0, 3)
    assert (patience({}), patience({"RSCLI_RENDEZVOUS_SECONDS": "7"})) == (600, 7)
    for call, name in ((local_rank, "LOCAL_RANK"), (patience, "RSCLI_RENDEZVOUS_SECONDS")):
        with pytest.raises(InputError, match=name):
            call({name: "soon"})


# --- meeting -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def surroundings(monkeypatch: pytest.MonkeyPatch, port: int, rank: int, **changes: str) -> None:
    found = {**WHOLE, "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **changes}
    for name, value in {"RSCLI_RENDEZVOUS_SECONDS": "1", **found}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "SAY_SECONDS", 0.3)


def test_two_processes_meet(monkeypatch, port):
    surroundings(monkeypatch, port, 0, RSCLI_RENDEZVOUS_SECONDS="20")
    monkeypatch.setattr(rendezvous, "SAY_SECONDS", 5.0)
    found: list[Together] = []
    launches = [Launch(rank, 2, "127.0.0.1", port) for rank in (1, 0)]
    monkeypatch.setattr(work_queue, "launched", launches.pop)
    threads = [threading.Thread(target=lambda: found.append(join(print, StopRequest())), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(ranks.rank for ranks in found) == [0, 1]


@pytest.mark.parametrize(
    ("rank", "what"), [(0, "1 of 2 processes to join at 127.0.0.1:"), (1, "the first of 2 processes, at 127.0.0.1:")]
)
def test_who_waits_in_vain_says_for_what_and_gives_up(monkeypatch, port, rank, what):
    surroundings(monkeypatch, port, rank)
    said: list[str] = []
    begun = time.monotonic()
    with pytest.raises(InputError) as caught:
        join(said.append, StopRequest())
    assert time.monotonic() - begun < 15
    assert len(said) == 1
    assert said[0].startswith(f"waiting for {what}")
    assert caught.value.message.startswith(f"waited 1 seconds for {what}")
    assert "RSCLI_RENDEZVOUS_SECONDS" in (caught.value.hint or "")


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_can_be_stopped(monkeypatch, port, rank):
    surroundings(monkeypatch, port, rank)
    stop = StopRequest()
    stop.requested = True
    with pytest.raises(Stopped, match="stopped while waiting for"):
        join(print, stop)


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        surroundings(monkeypatch, taken.getsockname()[1], 0)
        with pytest.raises(InputError, match=r"cannot listen on the port MASTER_PORT = \d+: Address already in use"):
            join(print, StopRequest())


@pytest.mark.parametrize("address", ["no.such.host.invalid", "a b", "x" * 300])
def test_an_address_that_nobody_knows(monkeypatch, port, address):
    surroundings(monkeypatch, port, 1, MASTER_ADDR=address)
    with pytest.raises(InputError, match="MASTER_ADDR is"):
        join(print, StopRequest())
