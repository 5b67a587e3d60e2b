"""Where the tests find things: the root of the checkout, and the folder of real data beside it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("RSCLI_SHARED", ROOT.parent / "shared"))
"""Real data and published logs, which are no part of the project: it need not exist."""
