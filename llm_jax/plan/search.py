"""What to change so that a run fits and is fast: mesh, rematerialization, microbatches, batch size.

Arithmetic ranks all choices; the compiler, which is slow and exact, judges the best ones.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from llm_jax.axes import MeshConfig, mesh_sizes
from llm_jax.config import plain
from llm_jax.model.shapes import shapes
from llm_jax.plan.describe import bare_table, metric, title
from llm_jax.plan.estimate import predicted
from llm_jax.plan.plan import Plan, check_host, plan
from llm_jax.plan.topology import Topology
from llm_jax.sharding import ROWS, abstract_mesh, shardings
from llm_jax.train.config import RunConfig
from llm_jax.train.mesh import check_mesh
from llm_jax.train.program import Program

REMATS = ("none", "dots", "full")
LEAN = 0.8  # the compiler may need so much less than arithmetic says, as it keeps less than autodiff asks for


@dataclasses.dataclass(frozen=True)
class Choice:
    """A config to try.

    Attributes:
      changes: the new values by path, as `config.replace` takes them.
      fields: how many fields differ from the config; an axis size of -1 that is spelled out does not.
      config: the config with these values.
      bytes: the memory of a device, by arithmetic.
      seconds_a_token: the time of a device, by arithmetic.
    """

    changes: Mapping[str, Any]
    fields: int
    config: RunConfig
    bytes: float = 0
    seconds_a_token: float = 0

    @property
    def words(self) -> list[str]:
        """The changes as the command line takes them."""
        return [f"{path}={plain(value)}" for path, value in self.changes.items()]


@dataclasses.dataclass(frozen=True)
class Tried:
    """A choice, and its plan; None if the library refuses it, with the reason."""

    choice: Choice
    plan: Plan | None
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether it has a plan, and that fits."""
        return self.plan is not None and self.plan.fits

    @property
    def seconds_a_token(self) -> float:
        """The least time that a step takes per token of its batch; infinite if it can't run."""
        seconds = self.plan and self.plan.step_seconds
        return math.inf if self.plan is None or seconds is None else seconds / self.plan.tokens

    @property
    def name(self) -> str:
        """Its changes as the command line takes them, or that there are none."""
        return " ".join(self.choice.words) or "the config as it is"


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
      tried: all that was compiled, the config itself first.
      left: other choices that may fit, those with the fewest changes first.
      considered: how many choices there were.
    """

    tried: list[Tried]
    left: list[Choice]
    considered: int

    @property
    def fastest(self) -> Tried | None:
        """The one that fits with the least time per token; None if none fits."""
        return min((one for one in self.tried if one.fits), key=lambda one: one.seconds_a_token, default=None)

    @property
    def smallest(self) -> Tried | None:
        """The one that fits and changes the fewest fields; None if none fits."""
        return min((one for one in self.tried if one.fits), key=lambda one: one.choice.fields, default=None)

    @property
    def smaller(self) -> list[Choice]:
        """The choices that may fit and change less than any that was found to fit."""
        return [one for one in self.left if self.smallest is None or one.fields < self.smallest.choice.fields]

    def to_json(self) -> dict[str, Any]:
        """Return a row for each config that was compiled, and the changes of the best, for machines."""
        rows = [
            {
                "changes": one.choice.words,
                "fits": one.fits,
                "needed": one.plan and one.plan.needed,
                "step_seconds": one.plan and one.plan.step_seconds,
                "tokens_per_day": one.plan and one.plan.tokens_per_day,
                "refused": one.reason or None,
            }
            for one in self.tried
        ]
        best = {"fastest": self.fastest, "smallest": self.smallest}
        return {"search": rows} | {name: one and one.choice.words for name, one in best.items()}

    def __rich__(self) -> Group:
        """Show what was tried, and what came of it."""
        table = bare_table("", "right", "right", "right", "dim")
        table.add_row("changes", "memory", "step at best", "tokens a day", "", style="dim")
        for one in self.tried:
            if one.plan is None:
                table.add_row(one.name, "", "", "", f"refused: {one.reason[:60]}")
                continue
            p = one.plan
            verdict = "fits" if p.fits else f"too large by {metric(p.needed - p.limit, 'B')}"
            step = "" if p.step_seconds is None else f"{p.step_seconds * 1e3:,.0f} ms"
            daily = "" if p.tokens_per_day is None else metric(p.tokens_per_day, "")
            memory = metric(p.needed, "B") if p.memory_is_reliable else "too little to tell"
            table.add_row(one.name, memory, step, daily, verdict)
        ends = [Text(f"{len(self.tried)} of {self.considered} choices compiled, in the order of arithmetic", "dim")]
        if self.fastest is None or self.smallest is None:
            ends.append(Text("nothing that was compiled fits; allow more --compiles, or take more chips", "bold red"))
        else:
            ends.append(Text(f"fastest that fits: {self.fastest.name}", "bold"))
            if not self.tried[0].fits:
                known = "that was compiled and fits" if self.smaller else "that makes it fit"
                ends.append(Text(f"smallest change {known}: {self.smallest.name}", "bold"))
        return Group(title("Search"), table, *ends)


def search(
    config: RunConfig,
    topology: Topology,
    compiles: int,
    price: float | None = None,
    folder: Path | None = None,
    report: Callable[[str], object] = print,
) -> Found:
    """Compile `config` and other choices, `compiles` in all: those that should be fastest.

    If the config itself does not fit, every second one is that of the smallest change instead, until the smallest
    change that fits is known. Nothing else is compiled that arithmetic says is slower than what fits already. Raise
    `ValueError` if there is no compiler for `topology`, or it has no host that the config needs.
    """
    devices = topology.devices()  # raises, as without them no choice helps
    check_host(config, topology)
    every = list(choices(config, topology))
    mine = Choice({}, 0, config)
    able = [one for one in every if one.changes and LEAN * one.bytes <= topology.chip.memory]
    fast = sorted(able, key=lambda one: (one.seconds_a_token, one.fields))
    small = sorted(able, key=lambda one: (one.fields, one.seconds_a_token))
    found, take_small = Found([], small, len(every)), itertools.cycle((True, False))

    def attempt(choice: Choice) -> None:
        report(f"compile {len(found.tried) + 1} of {compiles}: {' '.join(choice.words) or 'the config as it is'}")
        try:
            found.tried.append(Tried(choice, plan(choice.config, topology, price, folder)))
        except ValueError as error:
            found.tried.append(Tried(choice, None, str(error)))

    attempt(mine)
    while fast and len(found.tried) < compiles:
        smaller, best = found.smaller, found.fastest
        slower = best is not None and fast[0].seconds_a_token >= best.seconds_a_token
        if slower and not smaller:
            break
        choice = smaller[0] if smaller and (slower or next(take_small)) else fast[0]
        fast.remove(choice)
        small.remove(choice)
        if works(Program.on, choice.config, devices):  # the conditions of attention itself, which are slower to check
            attempt(choice)
    return found


def choices(config: RunConfig, topology: Topology) -> Iterator[Choice]:
    """Yield every mesh that the library can run `config` on, with every rematerialization and number of microbatches.

    So for the whole, a half and a quarter of the batch. The schedule of a pipeline stays.
    """
    c, mine, whole = config.model, mesh_sizes(config.mesh, topology.n_devices), config.data.batch_size
    have = {"model.remat": c.remat, "accumulate": config.accumulate, "data.batch_size": whole}
    models = {remat: dataclasses.replace(c, remat=remat) for remat in sorted({*REMATS, c.remat})}
    laid = [(mesh, abstract_mesh(mesh)) for mesh in splits(topology.n_devices, list(mine))]
    laid = [(mesh, there) for mesh, there in laid if works(shardings, shapes(c), there)]
    for (mesh, there), share in itertools.product(laid, (1, 2, 4)):
        shards = math.prod(mesh[axis] for axis in ROWS)
        if whole % (share * shards):
            continue
        axes = [axis for axis in mesh if mesh[axis] != mine[axis]]
        # A -1 is spelled out as a number, or it would absorb the change of another axis.
        said = {axis: size for axis, size in mesh.items() if size != getattr(config.mesh, axis)} if axes else {}
        sizes = {f"mesh.{axis}": size for axis, size in said.items()}
        rows, chosen = whole // share, MeshConfig(**mesh) if axes else config.mesh
        data = dataclasses.replace(config.data, batch_size=rows)
        for accumulate in divisors(rows // shards):
            divided = dataclasses.replace(config, mesh=chosen, data=data, accumulate=accumulate)
            if not works(check_mesh, divided, there):
                continue
            for remat, model in models.items():
                wanted = {"model.remat": remat, "accumulate": accumulate, "data.batch_size": rows}
                changed = {key: value for key, value in wanted.items() if value != have[key]}
                other = dataclasses.replace(divided, model=model)
                yield Choice(sizes | changed, len(axes) + len(changed), other, *predicted(other, mesh, topology))


def splits(devices: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yield every way to split `devices` over these axes."""
    if not axes:
        yield from [{}] * (devices == 1)
        return
    for size in divisors(devices):
        yield from ({axes[0]: size} | others for others in splits(devices // size, axes[1:]))


def divisors(n: int) -> list[int]:
    """Return the divisors of `n`, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def works(ask: Callable[..., object], *about: Any) -> bool:
    """Return whether `ask` raises no `ValueError`."""
    try:
        ask(*about)
    except ValueError:
        return False
    return True
