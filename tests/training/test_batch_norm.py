"""Shared statistics of batch normalisation: two processes against torch's own layers on all images in one, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import multiprocessing

from normalisers import CASES, a_case, joined_values, norm_peer, whole
from trainees import free_port


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[list[dict[str, torch.Tensor]]]:
    """What each process found for each case."""
    folder = tmp_path_factory.mktemp("found")
    multiprocessing.spawn(norm_peer, (2, free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_two_processes_are_one(found, number):
    case, theirs = CASES[number], [each[number] for each in found]
    ours = whole(case)
    tolerance = {"rtol": case.tolerance, "atol": case.tolerance}
    for name in ("output", "input_grad"):
        joined = torch.cat([each[name] for each in theirs], 1)
        assert torch.allclose(joined.double(), ours[name].double(), **tolerance), name
        assert joined.dtype == ours[name].dtype
    for name in ours.keys() - {"output", "input_grad"}:
        summed = sum(each[name].double() for each in theirs) if name.endswith("_grad") else theirs[1][name].double()
        assert torch.allclose(summed, ours[name].double(), **tolerance), name
    for name in (name for name in ours if name.startswith("buffer")):
        assert torch.equal(theirs[0][name], theirs[1][name]), name


def test_the_cases_would_notice_local_statistics():
    """Each half on its own is far from the whole, so that nothing above holds by chance."""
    case = CASES[0]
    alone = a_case(case)
    halves = torch.cat([alone(each) for each in joined_values(case)[0].split(case.sizes)])
    assert (halves - whole(case)["output"][0]).abs().max() > 0.1
