"""Write the metrics of a run: to metrics.jsonl always, to the terminal while it runs, to TensorBoard on request."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from llm_jax.files import parse_json, write_whole
from llm_jax.notebook import Cell

Report = Callable[[str], object]  # takes a line for a person


def no_report(line: str) -> None:
    """Say nothing: a `Report` for what nobody has to hear."""


FILE = "metrics.jsonl"
LAST_STEP = 2**31 - 1  # a train state counts in int32


def duration(seconds: int | float) -> str:
    """Return a duration in words: `0:42`, `2:41:07` or `3d 04:12`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{hours // 24}d {hours % 24:02}:{minute:02}"


def quantity(count: int | float) -> str:
    """Return a count in three digits and a suffix: `512`, `38.2k`, `1.23M`, `6.74B`."""
    if not math.isfinite(count) or abs(count) < 999.5:
        return f"{count:.0f}"
    digits, exponent = f"{count:.2e}".split("e")  # rounded first: 999,900 is 1.00M, not 1000k
    thousands = min(int(exponent) // 3, 4)
    whole = int(exponent) - 3 * thousands
    return f"{float(digits) * 10**whole:.{max(0, 2 - whole)}f}{' kMBT'[thousands]}"


def apart(a: float, b: float, form: str = "g", digits: int = 3) -> tuple[str, str]:
    """Format two different numbers with as few digits as show the difference, at least `digits`."""
    pairs = ((f"{a:.{n}{form}}", f"{b:.{n}{form}}") for n in range(digits, 20))
    return next((x, y) for x, y in pairs if x != y)


def visible(text: str) -> str:
    """Return `text` with its control characters as symbols: raw bytes from an untrained model control terminals."""
    pictured = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return re.sub(r"[\x7f-\x9f\ud800-\udfff]", "\ufffd", pictured)


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl, null as NaN. Raise `ValueError` for a damaged row.

    Ignores a last line that a killed run left incomplete. Without the file there are no rows.
    """
    rows = _rows(Path(folder) / FILE)
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def truncate(folder: str | Path, step: int) -> None:
    """Drop every row after `step`, and an incomplete last line: a resumed run writes each step once.

    Raise `ValueError` for a damaged row.
    """
    path = Path(folder) / FILE
    if path.exists():
        write_whole(path, "".join(json.dumps(row) + "\n" for row in _rows(path) if row["step"] <= step))


def missing(folder: str | Path, step: int) -> list[int]:
    """Return the steps up to `step` without a row in a run's metrics.jsonl, which was cut or deleted.

    Raise `ValueError` for a damaged row.
    """
    return sorted(set(range(1, step + 1)) - {row["step"] for row in _rows(Path(folder) / FILE)})


def spans(steps: Sequence[int]) -> str:
    """Return ascending numbers as spans: `1 to 4, 6, 8 to 9`; the first five of many."""
    found: list[list[int]] = []
    for step in steps:
        if found and step == found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    words = [f"{first}" if first == last else f"{first} to {last}" for first, last in found[:5]]
    return ", ".join(words) + ", ..." * (len(found) > 5)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    *lines, _half_written = text.split("\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        row = parse_json(line, {"step": int}, where, advice=f"delete that line, {line[:30]!r}")
        if not 0 <= row["step"] <= LAST_STEP:
            raise ValueError(f"{where}: 'step' is {row['step']}, expected 0 to {LAST_STEP}; delete that line")
        rows.append(row)
    return rows


class MetricsLog:
    """Write rows of numbers to `folder`/metrics.jsonl and show the newest on `console`; a context manager.

    The file is strict JSON: NaN and the infinities are written as null. A row has reached the operating system when
    `write` returns, so a killed process loses none. A `console` of None shows nothing, a `folder` of None writes
    nothing. `tensorboard=True` adds event files in `folder`/tensorboard; raises `ValueError` without the package.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        console: Console | None,
        total_steps: int,
        start_step: int = 0,
        tensorboard: bool = False,
    ) -> None:
        self._path = Path(os.devnull) if folder is None else Path(folder) / FILE
        writes = tensorboard and folder is not None
        self._scalars = _scalar_writer(self._path.with_name("tensorboard")) if writes else None
        self._progress = _Progress(console, total_steps, start_step) if console else None

    def __enter__(self) -> "MetricsLog":
        self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # each line is flushed
        if self._progress and self._progress.live:
            self._progress.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress and self._progress.live:
            self._progress.live.stop()
        if self._scalars:
            self._scalars.close()
        self._file.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the row `step`: scalars of Python, NumPy or JAX (it waits for them), or any JSON."""
        row = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        missing = {name: None for name, value in numbers.items() if not math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **row, **missing}, allow_nan=False) + "\n")
        if self._scalars:
            for name, value in numbers.items():
                self._scalars.add_scalar(name, value, step)
        if self._progress and "loss" in numbers:
            self._progress.update(step, numbers)

    def print(self, text: str) -> None:
        """Show `text`, an evaluation or a sample, above the progress line."""
        if self._progress:
            self._progress.print(visible(text))


def _scalar_writer(folder: Path) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise ValueError('tensorboard=True: not installed; run pip install "llm-jax[tensorboard]"') from error
    return Writer(str(folder))


# What is shown of a row: the field, a label, the value in a fixed width, a unit.
FIELDS: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    ("loss", "loss ", "{:7.4f}".format, ""),
    ("learning_rate", "lr ", "{:.2e}".format, ""),
    ("grad_norm", "grad ", "{:6.3f}".format, ""),
    ("tokens_per_second", "", lambda rate: f"{quantity(rate):>5}", " tok/s"),
    ("peak_fraction", "", "{:3.0%}".format, " of peak"),
    ("skipped", "", "{:.0f}".format, " skipped"),
)


class _Progress:
    """A bar and the newest numbers on a terminal, a line in a notebook, a plain line now and then elsewhere."""

    def __init__(self, console: Console, total: int, start: int) -> None:
        self._console, self._total, self._step = console, total, start
        self._count, self._numbers, self._left = f"{start:,}/{total:,}", Text(), ""
        self._began: tuple[int, float] | None = None  # step and time of the first row, after compiling
        self._printed = (-math.inf, -math.inf)  # step and time of the last plain line
        moving = console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter
        self._cell = Cell() if console.is_jupyter else None
        self.live = Live(console=console, get_renderable=self._bar) if moving else None

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self._began = self._began or (step, now)
        self._step, self._numbers = step, _numbers(row)
        self._count = f"{step:>{len(f'{self._total:,}')},}/{self._total:,}"
        if step > self._began[0]:
            seconds_a_step = (now - self._began[1]) / (step - self._began[0])
            self._left = f"{duration(seconds_a_step * max(0, self._total - step))} left"
        line = f"step {self._count}  {self._numbers}  {self._left}".rstrip()
        if self._cell:
            self._cell.show(line, last=step >= self._total)
            return
        # Where nothing can move, a run prints about twenty lines, and is never silent for over a minute.
        due = step - self._printed[0] >= self._total / 20 or now - self._printed[1] >= 60
        if not self.live and (due or step >= self._total):
            self._printed = (step, now)
            self.print(line)

    def print(self, text: str) -> None:
        # A sample's [brackets] and :colons: are no markup, and piped lines are not wrapped.
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _bar(self) -> Group:
        bar = Table.grid(Column(ratio=1), Column(), Column(), padding=(0, 2, 0, 0), expand=True)
        bar.add_row(ProgressBar(self._total, self._step), self._count, self._left)
        return Group(bar, self._numbers)


def _numbers(row: Mapping[str, Any]) -> Text:
    """Return one line of the fields that `row` has; skipped steps only if there are any."""
    return Text("  ").join(
        Text.assemble((label, "dim"), shown(row[name]), (unit, "dim"))
        for name, label, shown, unit in FIELDS
        if name in row and (name != "skipped" or row[name])
    )
