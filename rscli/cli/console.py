"""rich's console for text that comes from outside: imported when something is shown, since rich takes its time."""

from __future__ import annotations

from typing import Any

from rich.console import Console as RichConsole
from rich.text import Text

from rscli.text import visible


class Console(RichConsole):
    """A console to which strings are data: no markup, no emoji, and nothing that a terminal would obey.

    Colour comes from styles and from `rich.text.Text`. Every string, also in the cells of a table, passes `render_str`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """`text` as it stands, escaped for the eye."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})
