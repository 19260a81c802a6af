"""One training in JAX and in PyTorch: the same weights, batches, AdamW and schedule; both curves on a page."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from llm_jax.compat.sides import NAMES, Side, Stretch, peak_memory, why_not_compiled
from llm_jax.config import plain, to_dict
from llm_jax.data.loader import Loader
from llm_jax.files import strict, write_json, write_whole
from llm_jax.log import Report, visible
from llm_jax.model.config import own_layers
from llm_jax.runs import folder as run_folder
from llm_jax.runs.chart import GRAY, ORANGE, Series, line_chart
from llm_jax.runs.data import open_data
from llm_jax.runs.report import PAGE, STYLE
from llm_jax.train.config import RunConfig
from llm_jax.train.optimizer import make_schedule
from llm_jax.train.program import Program

WARM_UP = 2  # steps that compile, and count nothing for the speed
ROUNDS = 10
WINDOW = 10  # steps in which the charts show the largest gap


@dataclasses.dataclass(frozen=True)
class Trained:
    """The results of a side.

    Attributes:
      loss: of every step, nats a token.
      grad_norm: of every step, before it is clipped.
      tokens_per_second: of every round.
      first_seconds: the time of the steps before, including compilation.
      imports: bytes of its process after its imports.
      peak: bytes of its process at most.
    """

    loss: list[float]
    grad_norm: list[float]
    tokens_per_second: list[float]
    first_seconds: float
    imports: int
    peak: int

    @classmethod
    def of(cls, stretches: Sequence[Stretch], tokens: int) -> "Trained":
        """Return the results of the stretches of a side, the first of which was its warm-up."""
        return cls(
            loss=[x for stretch in stretches for x in stretch.loss],
            grad_norm=[x for stretch in stretches for x in stretch.grad_norm],
            tokens_per_second=[len(stretch.loss) * tokens / stretch.seconds for stretch in stretches[1:]],
            first_seconds=stretches[0].seconds,
            imports=stretches[0].imports,
            peak=stretches[-1].peak,
        )


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far a side of PyTorch is from ours.

    Attributes:
      loss: the largest distance in nats.
      loss_step: the step of it, from 1.
      grad_norm: the largest distance relative to our norm.
      grad_norm_step: the step of it.
      speed: ours as a multiple of theirs: lowest, median and highest of the rounds.
    """

    loss: float
    loss_step: int
    grad_norm: float
    grad_norm_step: int
    speed: tuple[float, float, float]

    @classmethod
    def between(cls, ours: Trained, theirs: Trained) -> "Gap":
        """Return how far `theirs` is from `ours` at worst, and at which steps; and how many times as fast ours is."""
        loss, norm = distances(ours, theirs, "loss"), distances(ours, theirs, "grad_norm")
        ratios = np.divide(ours.tokens_per_second, theirs.tokens_per_second).tolist()
        speed = min(ratios), statistics.median(ratios), max(ratios)
        return cls(loss.max().item(), loss.argmax().item() + 1, norm.max().item(), norm.argmax().item() + 1, speed)


def distances(ours: Trained, theirs: Trained, number: str) -> Float[np.ndarray, " steps"]:
    """Return how far two curves are apart at every step: loss in nats, gradient norm relative to ours."""
    here, there = np.array(getattr(ours, number)), np.array(getattr(theirs, number))
    return np.abs(there - here) / (here if number == "grad_norm" else 1)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What compare.json holds. The keys of `sides`, `gaps` and `missing`, reasons why one is absent, are in `NAMES`."""

    steps: int
    tokens_per_step: int
    sides: dict[str, Trained]
    gaps: dict[str, Gap]
    missing: dict[str, str]
    config: dict[str, Any]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return what compare.json holds; a number that is not finite is null."""
        return strict(dataclasses.asdict(self))


def compare(config: RunConfig, steps: int, report: Report, *, compiled: bool = True, command: str = "") -> Comparison:
    """Train the first `steps` steps of `config` on each side. Raise `ValueError` for what can't be compared."""
    check_comparable(config, steps)
    peak_memory()  # raises here already, not in another process, if memory can't be measured
    shards = open_data(config, report)
    Loader(shards.split("train"), config.data).check_horizon(steps)
    rates = np.asarray(make_schedule(config.optimizer, config.steps)(jnp.arange(steps))).tolist()
    job = (config, shards.folders, jax.device_get(Program.on(config).init().params), rates)
    why = why_not_compiled() if compiled else "left out by --no-compile"
    missing = {"compiled": why} if why else {}
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(Side(name)) for name in NAMES if name not in missing}
        first = {name: first_steps(side, job, report) for name, side in sides.items()}
        missing |= {name: why for name, why in first.items() if isinstance(why, str)}
        begun = {name: stretch for name, stretch in first.items() if isinstance(stretch, Stretch)}
        rest = alternate({name: sides[name] for name in begun}, steps, report)
    tokens = config.data.batch_size * config.data.seq_len
    trained = {name: Trained.of([begun[name], *rest[name]], tokens) for name in begun}
    return Comparison(
        steps=steps,
        tokens_per_step=tokens,
        sides=trained,
        gaps={name: Gap.between(trained["jax"], side) for name, side in trained.items() if name != "jax"},
        missing=missing,
        config=to_dict(config),
        environment=run_folder.environment(command) | {"torch": importlib.metadata.version("torch")},
    )


def first_steps(side: Side, job: tuple[Any, ...], report: Report) -> Stretch | str:
    """Take the steps that compile; return why they failed, for a side that the comparison can do without.

    Raise `ValueError` for a side that it needs.
    """
    report(f"{NAMES[side.name]}: compiles, and takes {WARM_UP} steps")
    try:
        side.begin(*job)
        return side.train(WARM_UP)
    except ValueError as error:
        if side.name == "compiled":
            return str(error)
        raise


def alternate(sides: Mapping[str, Side], steps: int, report: Report) -> dict[str, list[Stretch]]:
    """Take the rest of `steps` in rounds, each with a stretch of every side."""
    taken: dict[str, list[Stretch]] = {name: [] for name in sides}
    for steps_of_round in np.array_split(np.arange(WARM_UP, steps), min(ROUNDS, steps - WARM_UP)):
        for name, side in sides.items():
            taken[name].append(side.train(len(steps_of_round)))
        losses = ", ".join(f"{stretches[-1].loss[-1]:.6f} {NAMES[name]}" for name, stretches in taken.items())
        report(f"step {steps_of_round[-1] + 1:,} of {steps:,}: loss {losses}")
    return taken


def check_comparable(config: RunConfig, steps: int) -> None:
    """Raise `ValueError` for what two sides can't do alike."""
    if not WARM_UP < steps <= config.steps:
        raise ValueError(
            f"steps={steps} (--steps) must lie between {WARM_UP + 1} and the run's own steps={config.steps}"
        )
    for name, rate in (("dropout", config.model.dropout), ("attention.dropout", config.model.attention.dropout)):
        if rate:
            raise ValueError(f"model.{name}={rate}: no two libraries drop the same numbers; set model.{name}=0")
    if own := own_layers(config.model):
        raise ValueError(f"model.layers: {own[0]} has no twin in PyTorch; use kinds of llm_jax, such as global")
    if config.optimizer.name != "adamw":
        raise ValueError(
            f"optimizer.name={config.optimizer.name} has no twin in PyTorch; set optimizer.name=adamw, and an "
            "optimizer.learning_rate that suits it"
        )
    if config.init_from is not None:
        raise ValueError(f"init_from={config.init_from}: both sides start from fresh weights; set init_from=none")
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"both sides are measured on CPU, but JAX runs on {jax.default_backend()}; set JAX_PLATFORMS=cpu before"
        )
    if importlib.util.find_spec("torch") is None:
        raise ValueError("compare trains a twin in PyTorch, which is not installed: pip install 'llm-jax[torch]'")


def facts(c: Comparison) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the table of a comparison, row by row: a label, and the value of each side."""
    sides = c.sides.items()
    yield "tokens a second", {name: f"{statistics.median(side.tokens_per_second):,.0f}" for name, side in sides}
    speeds = {name: "{1:.2f} ({0:.2f} to {2:.2f})".format(*gap.speed) for name, gap in c.gaps.items()}
    yield "llm_jax as a multiple of it", {"jax": "", **speeds}
    yield "first steps, with compiling", {name: f"{side.first_seconds:.1f} s" for name, side in sides}
    yield "peak memory", {name: f"{side.peak / 1e6:,.0f} MB" for name, side in sides}
    yield "of which imports", {name: f"{side.imports / 1e6:,.0f} MB" for name, side in sides}
    yield "loss of the last step", {name: f"{side.loss[-1]:.6f}" for name, side in sides}
    gaps = {name: f"{gap.loss:.1e} nats at step {gap.loss_step:,}" for name, gap in c.gaps.items()}
    yield "largest gap in loss", {"jax": "", **gaps}
    gaps = {name: f"{gap.grad_norm:.1e} of it at step {gap.grad_norm_step:,}" for name, gap in c.gaps.items()}
    yield "largest gap in gradient norm", {"jax": "", **gaps}


def facts_as_text(c: Comparison) -> str:
    """Return the facts as text, with a column for each side."""
    rows = [("", {name: NAMES[name] for name in c.sides}), *facts(c)]
    lines = [what.ljust(30) + "".join(values[name].rjust(28) for name in c.sides) for what, values in rows]
    return "\n".join([*lines, *(f"without {NAMES[name]}: {why}" for name, why in c.missing.items())])


def write(c: Comparison, folder: Path, name: str) -> None:
    """Write compare.json and compare.html into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", c.to_json())
    write_whole(folder / "compare.html", page(c, name))


def page(c: Comparison, name: str) -> str:
    """Return compare.html: the comparison on one page, without scripts or external files."""
    command, commit, date = (escape(str(c.environment[key])) for key in ("command", "commit", "date"))
    size = f"{c.steps:,} steps of {c.tokens_per_step:,} tokens"
    config = "\n".join(f"{key}={plain(value)}" for key, value in _flat(c.config))
    environment = "\n".join(f"{key:10} {plain(value)}" for key, value in c.environment.items())
    return PAGE.format(
        name=f"{escape(visible(name))} in JAX and in PyTorch",
        style=STYLE + TABLE_STYLE,
        summary=f"{size} · {date} · commit {commit}<br><code>{command}</code>",
        headline=f"<dl>{''.join(_headline(c))}</dl>",
        charts=f"""<figure class="desk">{_losses(c, 960, 360)}</figure>
<figure class="phone">{_losses(c, 360, 280)}</figure>
<div class="small">
<figure>{_gaps(c, "loss", "Gap in loss", "nats")}</figure>
<figure>{_gaps(c, "grad_norm", "Gap in gradient norm", "share of it")}</figure>
</div>""",
        samples=_table(c),
        config=_fold("Configuration", config),
        environment=_fold("Environment", environment),
    )


TABLE_STYLE = """
table.sides { width: 100%; margin: 3rem 0 1rem; }
.sides th, .sides td { padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--line); text-align: right; }
.sides th { font-size: .85rem; font-weight: 600; }
.sides td:first-child { text-align: left; font-family: inherit; }
"""


def _headline(c: Comparison) -> Iterator[str]:
    cell = "<div><dt>{}</dt><dd><b>{}</b><span>{}</span></dd></div>"
    eager = c.gaps["eager"]
    yield cell.format("largest gap in loss", f"{eager.loss:.1e}", f"nats, at step {eager.loss_step:,}")
    yield cell.format("in gradient norm", f"{eager.grad_norm:.1e}", f"of it, at step {eager.grad_norm_step:,}")
    for name, gap in c.gaps.items():
        low, median, high = gap.speed
        yield cell.format(f"against {NAMES[name]}", f"{median:.2f} ×", f"as fast; {low:.2f} to {high:.2f} by round")


def _losses(c: Comparison, width: int, height: int) -> str:
    """Draw our curve as a line, PyTorch's as dots: as two lines one would hide the other."""
    ours, theirs = (np.array(c.sides[name].loss) for name in ("jax", "eager"))
    steps, every = np.arange(1, c.steps + 1), -(-c.steps // 40)
    dots = np.where(steps % every == 0, theirs, np.nan)
    curves = [Series(NAMES["jax"], steps, ours), Series(NAMES["eager"], steps, dots, mark="points", color=ORANGE)]
    label = "nats a token" + f"; of PyTorch every {every}th step" * (every > 1)
    return line_chart(curves, title="Loss", x_label="step", y_label=label, width=width, height=height)


def _gaps(c: Comparison, number: str, title: str, unit: str) -> str:
    """Draw how far PyTorch's curves are from ours, as the largest distance in a few steps: in many it is zero."""
    curves = []
    for name, color in (("compiled", GRAY), ("eager", ORANGE)):
        if name in c.sides:
            distance = np.pad(distances(c.sides["jax"], c.sides[name], number), (WINDOW - 1, 0))
            largest = np.lib.stride_tricks.sliding_window_view(distance, WINDOW).max(-1)
            curves.append(Series(NAMES[name], np.arange(1, c.steps + 1), largest, color=color))
    label = f"{unit}, largest of {WINDOW} steps, logarithmic"
    return line_chart(curves, title=title, x_label="step", y_label=label, log_y=True, width=460, height=260)


def _table(c: Comparison) -> str:
    head = "".join(f"<th>{name}</th>" for name in ["", *(NAMES[name] for name in c.sides)])
    cells = ((what, "".join(f"<td>{values[name]}</td>" for name in c.sides)) for what, values in facts(c))
    rows = "".join(f"<tr><td>{what}</td>{values}</tr>" for what, values in cells)
    notes = "".join(f'<p class="note">{NAMES[name]}: {escape(why)}.</p>' for name, why in c.missing.items())
    return f'<table class="sides"><tr>{head}</tr>{rows}</table>{notes}'


def _fold(title: str, text: str) -> str:
    return f"<details><summary><b>{title}</b></summary><pre>{escape(visible(text))}</pre></details>"


def _flat(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings, by their paths on the command line."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield where + key, value
