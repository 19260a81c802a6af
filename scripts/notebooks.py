"""Write examples/*.ipynb from the scripts beside them, whose cells begin with `# %%`, or `# %% [markdown]` for text.

python scripts/notebooks.py            # after a change of a script; tests/test_examples.py checks that they agree
"""

import json
import re
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def cells(script: str) -> list[tuple[str, str]]:
    """Return the kind, `markdown` or `code`, and the text of each cell of a script."""
    found = []
    for kind, text in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", script, re.MULTILINE | re.DOTALL):
        if kind:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        found.append(("markdown" if kind else "code", text.strip()))
    return found


def notebook(script: str) -> str:
    """Return a script as a notebook of format 4.5, without outputs."""
    made: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells(script)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    whole = {"cells": made, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def scripts() -> list[Path]:
    """Return the scripts that are notebooks; others are modules that these import."""
    return [path for path in sorted(EXAMPLES.glob("*.py")) if path.read_text(encoding="utf-8").startswith("# %%")]


if __name__ == "__main__":
    for path in scripts():
        path.with_suffix(".ipynb").write_text(notebook(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path.with_suffix(".ipynb"))
