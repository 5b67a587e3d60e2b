"""examples/python_api.py runs, and its figures are what such networks give."""

from __future__ import annotations

import re
import runpy

import pytest

from support import ROOT

EXAMPLE = ROOT / "examples" / "python_api.py"


@pytest.mark.slow
def test_the_example_runs(capsys):
    shared = runpy.run_path(str(EXAMPLE))
    shown = capsys.readouterr().out
    acr = {name: float(figure) for name, figure in re.findall(r"^(\w+) +ACR (0\.\d+)", shown, re.M)}
    assert set(acr) == {"plain", "augmented", "ensemble", "denoised"}
    assert 0.2 < acr["plain"] < acr["augmented"] < 0.25 * 2.8  # at most sigma PhiInv(alpha ** (1 / n)), which is 0.68
    assert acr["denoised"] > acr["plain"]
    assert shared["gain"].low > 0
    assert sum(c.n for c in shared["decided"]) < 50 * 2_000
    assert "refused: image 0 has pixels from 0 to" in shown
