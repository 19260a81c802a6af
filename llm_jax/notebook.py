"""What a notebook shows: a config as a table, the progress of a run as a line that is replaced."""

import math
import time
from html import escape
from typing import Any

from llm_jax.config import plain
from llm_jax.keys import REQUIRED, keys, value_at


def html_table(config: Any) -> str:
    """Return a config as a table for a notebook: each key, its value, bold where not the default, and its meaning."""
    rows = []
    for key in keys(type(config)):
        value = value_at(config, key)
        if key.group is None and value is not REQUIRED:
            shown = escape(plain(value))
            shown = shown if key.default == value else f"<b>{shown}</b>"
            rows.append(f"<tr><td><code>{key.name}</code></td><td>{shown}</td><td>{escape(key.meaning)}</td></tr>")
    return f"<table><tr><th>key</th><th>value</th><th>meaning</th></tr>{''.join(rows)}</table>"


class Cell:
    """A line in the output of a notebook's cell, replaced in its position."""

    def __init__(self) -> None:
        from IPython.display import display  # a notebook has it

        self._handle, self._shown = display({"text/plain": ""}, raw=True, display_id=True), -math.inf

    def show(self, text: str, *, last: bool) -> None:
        """Replace the line, twice a second at most: a browser draws slower than a small model trains."""
        if last or time.monotonic() - self._shown >= 0.5:
            self._shown = time.monotonic()
            self._handle.update({"text/plain": text}, raw=True)
