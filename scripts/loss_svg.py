"""Draw the loss curve of a run, as the README shows it.

.venv/bin/python scripts/loss_svg.py runs/quickstart docs/loss.svg
"""

import sys
from pathlib import Path

from llm_jax import log
from llm_jax.runs.report import curves_of, loss_chart


def main(run: str, out: str) -> None:
    chart = loss_chart(curves_of(log.read(run)), title=f"Loss of {Path(run).name}", width=720, height=300)
    Path(out).write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
