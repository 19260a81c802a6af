"""Write report.html: a run on one page, without scripts or external files, from the files in its folder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import log
from llm_jax.config import plain
from llm_jax.files import read_json, write_whole
from llm_jax.runs.chart import ORANGE, Series, line_chart

Rows = Sequence[Mapping[str, Any]]
Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]
NUMBERS = (
    "loss",
    "heldout_loss",
    "bits_per_byte",
    "heldout_accuracy",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
)
NUMBERS += ("peak_fraction", "step_seconds", "data_wait", "skipped")
# For each source of a mixture: the metric that a row has as `share/NAME`, its column head, its format.
OF_SOURCES = {
    "share": ("share of tokens", "{:.1%}"),
    "heldout_loss": ("held-out loss", "{:.4f}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "heldout_accuracy": ("answers right", "{:.2%}"),
}
SHOWN_SAMPLES = 12  # steps whose samples the page shows

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{style}</style>
<header>
<h1>{name}</h1>
<p>{summary}</p>
</header>
<main>
{headline}
{charts}
{samples}
{config}
{environment}
</main>
</html>
"""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --panel: #f6f7f9; --line: #e3e6ea; --ink: #1c2127; --soft: #5e6873; --blue: #1d63d8;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #111418; --panel: #191d23; --line: #2a3038; --ink: #e4e7eb; --soft: #98a2ad; --blue: #7db1ff; } }
* { box-sizing: border-box; }
body { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 3.5rem 0 1rem; font-size: 1.2rem; letter-spacing: -.01em; }
header p, .note { margin: .3rem 0 0; color: var(--soft); }
code, pre, td { font-family: var(--mono); font-size: .85rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: 1.6rem 1.25rem;
  margin: 2.2rem 0; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; }
dd b { display: block; font-size: 1.75rem; font-weight: 600; line-height: 1.25; letter-spacing: -.02em; }
dd span { color: var(--soft); font-size: .8rem; }
figure { margin: 0; min-width: 0; }
figure > svg { display: block; width: 100%; height: auto; }
figure > svg text { fill: var(--soft); }
figure > svg .title { fill: var(--ink); }
.phone { display: none; }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 2rem;
  margin-top: 2.5rem; }
details { border-top: 1px solid var(--line); }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { display: flex; gap: 1rem; padding: .55rem 0; cursor: pointer; list-style: none; }
summary::-webkit-details-marker { display: none; }
summary::before { content: "›"; width: .6rem; color: var(--soft); }
details[open] > summary::before { rotate: 90deg; }
summary b { flex: none; font-weight: 600; }
summary span { align-self: center; overflow: hidden; color: var(--soft); font: .8rem var(--mono);
  white-space: nowrap; text-overflow: ellipsis; }
details[open] > summary span { visibility: hidden; }
pre { margin: 0 0 1rem; padding: .9rem 1.1rem; border-radius: .5rem; background: var(--panel);
  white-space: pre-wrap; tab-size: 4; }
mark { background: none; color: var(--blue); font-weight: 600; }
table { margin: 0 0 .8rem 1.6rem; border-collapse: collapse; }
td { padding: .12rem 2rem .12rem 0; vertical-align: top; white-space: pre-wrap; }
td:first-child { color: var(--soft); white-space: nowrap; }
@media (max-width: 40rem) { body { padding: 1.75rem 1.1rem 3rem; } dl { grid-template-columns: 1fr 1fr; }
  td { padding-right: 1rem; } .phone { display: block; } .desk { display: none; } }
"""


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html, all or nothing, from its config.json, environment.json and metrics.jsonl.

    Any of the three may be absent: a run that has just begun gets a page with what there is. Raise `ValueError`, and
    leave the page as it was, where one is damaged.
    """
    folder = Path(folder).resolve()
    config, environment = _load(folder / "config.json"), _load(folder / "environment.json")
    rows = log.read(folder)
    numbers = curves_of(rows)
    fields = {
        "name": _text(folder.name),
        "style": STYLE,
        "summary": _summary(rows, config, environment),
        "headline": _headline(numbers),
        "charts": (_charts(numbers) if rows else "") + _section("Sources", _sources(rows)),
        "samples": _section("Samples", _samples([(row["step"], some) for row in rows if (some := _texts(row))])),
        "config": _section("Configuration", _tree("run", config)),
        "environment": _section("Environment", _tree("machine", environment, unfolded=True)),
    }
    write_whole(folder / "report.html", PAGE.format(**fields))
    return folder / "report.html"


def card(folder: str | Path) -> str:
    """Return a run as HTML for a notebook: its results and its loss curve."""
    folder = Path(folder)
    config, environment = _load(folder / "config.json"), _load(folder / "environment.json")
    rows = log.read(folder)
    numbers = curves_of(rows)
    facts = "".join(
        f"<tr><td>{_text(name)}</td><td><b>{_text(value)}</b></td><td>{_text(note)}</td></tr>"
        for name, value, note in _facts(numbers)
    )
    chart = loss_chart(numbers, width=720, height=280) if rows else ""
    head = f"<b>{_text(str(folder))}</b> {_summary(rows, config, environment)}"
    return f'<div style="max-width: 45rem">{head}<table>{facts}</table>{chart}</div>'


def line_of_run(folder: str | Path) -> str:
    """Return a run as a line for a terminal: its folder, its newest checkpoint, how far it came, and its last loss."""
    folder = Path(folder)
    rows, steps = log.read(folder), _load(folder / "config.json").get("steps", 0)
    saved = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdecimal()]
    said = [f"run {folder}: " + (f"newest checkpoint of step {max(saved):,}" if saved else "no checkpoint yet")]
    if rows:
        said += [f"{rows[-1]['step']:,} of {steps:,} steps", f"last loss {rows[-1].get('loss', math.nan):.4f}"]
    return ", ".join(said)


def curves_of(rows: Rows) -> Curves:
    """Return steps and values of each metric in the rows of `log.read(folder)`; empty if there are none."""
    having = {name: [row for row in rows if isinstance(row.get(name), int | float)] for name in NUMBERS}
    return {
        name: (np.array([row["step"] for row in some], float), np.array([_float(row[name]) for row in some], float))
        for name, some in having.items()
    }


def _float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def loss_chart(numbers: Curves, *, title: str = "Loss", width: int = 960, height: int = 360) -> str:
    """Return the training and held-out loss of a run as SVG."""
    curves = [
        Series("training", *numbers["loss"], mark="faint"),
        Series("smoothed", *smooth(*numbers["loss"])),
        Series("held out", *numbers["heldout_loss"], mark="points", color=ORANGE),
    ]
    axes = {"x_label": "step", "y_label": "nats a token, logarithmic", "log_y": True}
    return line_chart(curves, title=title, width=width, height=height, **axes)


def smooth(steps: np.ndarray, values: np.ndarray, points: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Return a running median at up to `points` steps, over 4 % of the run, or less near its fast beginning.

    A few outliers don't move it; where a whole window is not finite it is NaN.
    """
    n = len(values)
    centers = np.unique(np.linspace(0, n - 1, min(n, points)).round().astype(int))
    windows = [values[i - half : i + half + 1] for i in centers for half in [min(i // 4, n // 50)]]
    finite = [window[np.isfinite(window)] for window in windows]
    return steps[centers], np.array([np.median(window) if len(window) else np.nan for window in finite])


def _load(path: Path) -> dict[str, Any]:
    return read_json(path, advice="restore it, or delete it for a page without") if path.exists() else {}


def _summary(rows: Rows, config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    steps = config.get("steps")
    total = f" of {steps:,}" if isinstance(steps, int) else ""
    step = f"step {rows[-1]['step']:,}{total}" if rows else "no step yet"
    date, commit, command = (environment.get(name) for name in ("date", "commit", "command"))
    line = " · ".join(_text(str(fact)) for fact in (step, date, commit and f"commit {commit}") if fact)
    return line + (f"<br><code>{_text(str(command))}</code>" if command else "")


def _headline(numbers: Curves) -> str:
    cell = "<div><dt>{}</dt><dd><b>{}</b><span>{}</span></dd></div>"
    return f"<dl>{''.join(cell.format(*fact) for fact in _facts(numbers))}</dl>"


def _facts(numbers: Curves) -> Iterator[tuple[str, str, str]]:
    """Yield the results and the cost of a run: name, value, note."""
    loss, heldout, bits = (numbers[name] for name in ("loss", "heldout_loss", "bits_per_byte"))
    _, right = numbers["heldout_accuracy"]
    finite = {name: values[np.isfinite(values)] for name, (_, values) in numbers.items()}
    if len(loss[1]):
        yield "training loss", f"{smooth(*loss)[1][-1]:.4f}", "smoothed"
    if len(heldout[1]):
        yield "held-out loss", f"{heldout[1][-1]:.4f}", _best(*heldout)
    if len(bits[1]):
        yield "bits per byte", f"{bits[1][-1]:.4f}", "held out"
    if len(right):
        yield "answers right", f"{right[-1]:.2%}", "held out"
    if len(tokens := finite["tokens"]):
        yield "tokens seen", log.quantity(tokens[-1]), f"{tokens[-1]:,.0f}"
    if len(rate := finite["tokens_per_second"]):
        peak = finite["peak_fraction"]
        note = f"{np.median(peak):.0%} of peak" if len(peak) else "median"
        yield "tokens a second", log.quantity(float(np.median(rate))), note
    if len(seconds := finite["step_seconds"]):
        waited = finite["data_wait"][1:].sum() / seconds.sum()  # without the first, which the reader begins with
        note = f", {waited:.0%} waiting for data" if waited > 0.01 else ""
        yield "time", log.duration(seconds.sum()), f"in training steps{note}"
    if (skipped := finite["skipped"]).any():
        yield "skipped steps", f"{skipped[-1]:,.0f}", "loss, gradient or update not finite"


def _best(steps: np.ndarray, loss: np.ndarray) -> str:
    best = int(np.argmin(np.where(np.isfinite(loss), loss, np.inf)))
    return "its best" if best == len(loss) - 1 else f"best {loss[best]:.4f} at step {steps[best]:,.0f}"


def _charts(numbers: Curves) -> str:
    return f"""<figure class="desk">{loss_chart(numbers)}</figure>
<figure class="phone">{loss_chart(numbers, width=360, height=280)}</figure>
<div class="small">
{_small(numbers["learning_rate"], "Learning rate", "", from_zero=True)}
{_small(numbers["grad_norm"], "Gradient norm", "before clipping, logarithmic", log_y=True)}
{_small(numbers["tokens_per_second"], "Throughput", "tokens a second", from_zero=True)}
</div>"""


def _small(column: tuple[np.ndarray, np.ndarray], title: str, unit: str, **axis: bool) -> str:
    curves = [Series(title, *column, mark="faint"), Series(title, *smooth(*column))]
    chart = line_chart(curves, title=title, x_label="step", y_label=unit, width=320, height=230, **axis)
    return f"<figure>{chart}</figure>"


def _sources(rows: Rows) -> str:
    """Return a table of a mixture: a line a source, the newest value of each metric of `OF_SOURCES`."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        for key, number in row.items():
            what, slash, source = key.partition("/")
            if slash and what in OF_SOURCES and isinstance(number, int | float):
                found.setdefault(source, {})[what] = OF_SOURCES[what][1].format(_float(number))
    heads = [what for what in OF_SOURCES if any(what in numbers for numbers in found.values())]
    lines = [["", *(OF_SOURCES[what][0] for what in heads)]]
    lines += [[source, *(numbers.get(what, "") for what in heads)] for source, numbers in found.items()]
    cells = ("".join(f"<td>{_text(cell)}</td>" for cell in line) for line in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>" if found else ""


def _texts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the prompts of a row, and what the model generated after each."""
    found = row.get("samples")
    samples = [sample for sample in found if isinstance(sample, dict)] if isinstance(found, list) else []
    pairs = [(sample.get("prompt"), sample.get("text")) for sample in samples]
    return [(prompt, text) for prompt, text in pairs if isinstance(prompt, str) and isinstance(text, str)]


def _samples(rows: Sequence[tuple[int, list[tuple[str, str]]]]) -> str:
    """Return the samples from the first step to the last, which is unfolded."""
    picked = sorted({round(index) for index in np.linspace(0, len(rows) - 1, SHOWN_SAMPLES)}) if rows else []
    folds = []
    for index in picked:
        step, texts = rows[index]
        beginning = " ".join(texts[0][1].split())[:200]
        body = "".join(f"<pre><mark>{_text(prompt)}</mark>{_text(text)}</pre>" for prompt, text in texts)
        folds.append(_fold(f"step {step:,}", beginning, body, unfolded=index == len(rows) - 1))
    left_out = f'<p class="note">{len(picked)} of {len(rows)} steps; all are in metrics.jsonl.</p>'
    return "".join(folds) + left_out * (len(picked) < len(rows))


def _tree(name: str, values: Mapping[str, Any], unfolded: bool = False) -> str:
    """Return a fold with a table of `values`, followed by a fold for each value that is a mapping."""
    leaves = {key: plain(value) for key, value in values.items() if not isinstance(value, Mapping)}
    cells = "".join(f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in leaves.items())
    preview = "  ".join(f"{key}={value}" for key, value in leaves.items())
    branches = [_tree(key, value) for key, value in values.items() if isinstance(value, Mapping)]
    return "".join([_fold(name, preview, f"<table>{cells}</table>", unfolded) if leaves else "", *branches])


def _fold(name: str, preview: str, body: str, unfolded: bool = False) -> str:
    summary = f"<summary><b>{_text(name)}</b><span>{_text(preview)}</span></summary>"
    return f"<details{' open' * unfolded}>{summary}{body}</details>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _text(text: str) -> str:
    return escape(log.visible(text))
