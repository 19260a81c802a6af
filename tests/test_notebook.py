"""What a notebook shows, without a notebook."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rich.console import Console
from tiny_run import tiny

from llm_jax.log import MetricsLog
from llm_jax.notebook import html_table


def test_a_config_is_a_table_with_bold_where_it_is_not_the_default(tmp_path: Path):
    shown = html_table(tiny(tmp_path, steps=7))
    assert "<td><code>steps</code></td><td><b>7</b></td>" in shown
    assert "<td><code>keep</code></td><td>2</td>" in shown
    assert "optimizer steps, each over" in shown


def test_the_progress_of_a_run_is_one_line_that_is_replaced(tmp_path: Path, monkeypatch):
    seen: list[Any] = []
    handle = SimpleNamespace(update=lambda data, raw: seen.append(data["text/plain"]))
    module = ModuleType("IPython.display")
    module.display = lambda data, raw, display_id: handle  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    with MetricsLog(tmp_path, console=Console(force_jupyter=True), total_steps=500) as rows:
        for step in range(1, 501):
            rows.write(step, {"loss": 1 / step})
    assert seen[0].startswith("step   1/500  loss  1.0000")
    assert seen[-1].startswith("step 500/500  loss  0.0020")
    assert len(seen) < 100  # a browser draws slower than a small model trains
