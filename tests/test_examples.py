"""The notebooks are their scripts, and do what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from notebooks import cells, notebook, scripts  # noqa: E402

# Every cell as a notebook runs it: what ends one is shown.
RUN = """
import ast, sys
for cell in {cells!r}:
    *body, last = ast.parse(cell).body
    exec(compile(ast.Module(body, []), "cell", "exec"))
    if isinstance(last, ast.Expr):
        print("shown:", repr(eval(compile(ast.Expression(last.value), "cell", "eval"))))
    else:
        exec(compile(ast.Module([last], []), "cell", "exec"))
"""


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.stem)
def test_a_notebook_is_what_its_script_says(script: Path):
    written = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert written == notebook(script.read_text(encoding="utf-8")), "run: python scripts/notebooks.py"
    found = json.loads(written)
    assert (found["nbformat"], found["cells"][0]["cell_type"]) == (4, "markdown")


@pytest.mark.slow
@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_runs(script: Path, tmp_path: Path):
    if "_hf(" in script.read_text(encoding="utf-8"):
        pytest.importorskip("safetensors")
        pytest.importorskip("tokenizers")
    code = [text for kind, text in cells(script.read_text(encoding="utf-8")) if kind == "code"]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{script.parent}",
        "LLM_JAX_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(cells=code)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shown:" in done.stdout
