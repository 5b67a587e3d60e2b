"""Running out of memory: recognised, and said in one line."""

from __future__ import annotations

import pytest
import torch

from rscli.runtime.memory import enough_memory, out_of_memory


def test_a_cpu_that_is_out_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="the shapes do not fit"), enough_memory(torch.device("cpu"), "it", "Hint."):
        raise RuntimeError("the shapes do not fit")
