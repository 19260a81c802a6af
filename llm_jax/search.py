"""What to change so that a run fits and is fast: meshes, rematerialization, microbatches, batch.

Arithmetic orders all that may be tried; the compiler, which is slow and right, judges the best of it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Group
from rich.text import Text

from llm_jax.config import override
from llm_jax.plan import Plan, flops_a_token, gradient_bytes, numbers_here, plan, rate_along
from llm_jax.sharding import ROWS, MeshConfig, mesh_sizes
from llm_jax.show import columns, metric, residual_bytes, title
from llm_jax.topologies import Topology
from llm_jax.train.count import shapes
from llm_jax.train.run import RunConfig
from llm_jax.train.step import cast

REMATS = ("none", "dots", "full")
LEAN = 0.8  # of what arithmetic counts the compiler may need less, where it keeps less than autodiff asks for


@dataclasses.dataclass(frozen=True)
class Choice:
    """A config that may be tried: what it changes and in how many fields, and what arithmetic says of a device."""

    changes: tuple[str, ...]
    fields: int
    config: RunConfig
    bytes: float = 0
    seconds_a_token: float = 0


@dataclasses.dataclass(frozen=True)
class Tried:
    """A choice, and its plan; None where the library refuses it, for the reason."""

    choice: Choice
    plan: Plan | None
    reason: str = ""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    @property
    def seconds_a_token(self) -> float:
        seconds = self.plan and self.plan.step_seconds
        return math.inf if self.plan is None or seconds is None else seconds / self.plan.tokens

    @property
    def name(self) -> str:
        return " ".join(self.choice.changes) or "the config as it is"


@dataclasses.dataclass(frozen=True)
class Found:
    """All that was compiled, the config itself first, and what else may fit; the fastest, and what changes least."""

    tried: list[Tried]
    left: list[Choice]
    considered: int

    @property
    def fastest(self) -> Tried | None:
        return min((one for one in self.tried if one.fits), key=lambda one: one.seconds_a_token, default=None)

    @property
    def smallest(self) -> Tried | None:
        return min((one for one in self.tried if one.fits), key=lambda one: one.choice.fields, default=None)

    @property
    def smaller(self) -> list[Choice]:
        """What may fit and changes less than all that was found to."""
        return [one for one in self.left if self.smallest is None or one.fields < self.smallest.choice.fields]


def search(
    config: RunConfig,
    topology: Topology,
    compiles: int,
    price: float | None = None,
    folder: Path | None = None,
    report: Callable[[str], object] = print,
) -> Found:
    """Compiles `config`, and others up to `compiles` in all: those that promise to be fastest.

    Where the config itself does not fit, every second one is of the smallest change instead, until it is known which
    change is the smallest that helps. Nothing else is compiled that arithmetic says is slower than what fits already.
    """
    topology.devices()  # where they can't be had no choice helps
    every = list(choices(config, topology))
    mine = Choice((), 0, config)
    able = [one for one in every if one.changes and LEAN * one.bytes <= topology.chip.memory]
    fast = sorted(able, key=lambda one: (one.seconds_a_token, one.fields))
    small = sorted(able, key=lambda one: (one.fields, one.seconds_a_token))
    found, is_turn_of_small = Found([], small, len(every)), itertools.cycle((True, False))

    def attempt(choice: Choice) -> None:
        report(f"compile {len(found.tried) + 1} of {compiles}: {' '.join(choice.changes) or 'the config as it is'}")
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
        choice = smaller[0] if smaller and (slower or next(is_turn_of_small)) else fast[0]
        fast.remove(choice)
        small.remove(choice)
        attempt(choice)
    return found


def choices(config: RunConfig, topology: Topology) -> Iterator[Choice]:
    """Every way to split rows and widths, rematerialize, and part the batch; also of a half and a quarter of the batch.

    Stages, and whatever else the mesh of `config` splits, stay as they are.
    """
    c, mine = config.model, mesh_sizes(config.mesh, topology.n_devices)
    free = mine["data"] * mine["fsdp"] * mine["tensor"]
    splits = [(fsdp, tensor) for tensor in divisors(free) for fsdp in divisors(free // tensor)]
    for (fsdp, tensor), share in itertools.product(splits, (1, 2, 4)):
        mesh = mine | {"data": free // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
        rows, shards = config.data.batch_size // share, math.prod(mesh[axis] for axis in ROWS)
        uneven = any(width % tensor for width in (c.K, c.F, c.vocab_size)) or c.d_model % fsdp
        if config.data.batch_size % share or rows % shards or uneven:
            continue
        for remat, accumulate in itertools.product(sorted({*REMATS, c.remat}), divisors(rows // shards)):
            wanted = {"model.remat": remat, "accumulate": accumulate, "data.batch_size": rows}
            have = {"model.remat": c.remat, "accumulate": config.accumulate, "data.batch_size": config.data.batch_size}
            changed = {key: value for key, value in wanted.items() if value != have[key]}
            axes = [axis for axis in mesh if mesh[axis] != mine[axis]]
            # A -1 is said as a number too, or it would take what is left by the change of another.
            said = {axis: size for axis, size in mesh.items() if size != getattr(config.mesh, axis)} if axes else {}
            sizes = {f"mesh.{axis}": size for axis, size in said.items()}
            changes = tuple(f"{key}={value}" for key, value in (sizes | changed).items())
            other = override(config, changes)
            yield Choice(changes, len(axes) + len(changed), other, *predicted(other, mesh, topology))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def predicted(config: RunConfig, mesh: dict[str, int], topology: Topology) -> tuple[float, float]:
    """Bytes of a device and seconds a token, by arithmetic alone.

    State and gradients are split as the letters of parameters say, what backward passes keep over tokens and `tensor`.
    Weights are gathered for each microbatch, forward and backward, and their gradients parted; blocks that are split
    over `tensor` sum the stream four times, and twice as often while they are computed again.
    """
    c, chip, tokens = config.model, topology.chip, config.data.batch_size * config.data.seq_len
    size = jnp.dtype(c.dtype).itemsize
    numbers, whole = numbers_here(shapes(c), mesh), numbers_here(shapes(c), mesh | {"fsdp": 1})
    stages = mesh["pipeline"]
    bubble = (stages - 1) / (config.pipeline.chunks * config.accumulate + stages - 1)  # as a timetable counts it
    shards = math.prod(mesh[axis] for axis in ROWS) * mesh["context"]
    rows = config.data.batch_size / config.accumulate / shards
    alone = dataclasses.replace(
        config, mesh=MeshConfig(), accumulate=1, data=dataclasses.replace(config.data, batch_size=1)
    )
    kept = rows * kept_a_row(alone) / mesh["tensor"]
    state = numbers * (12 + size + gradient_bytes(config, mesh))
    share = whole * size
    layer = share / (c.n_layers / stages)

    flops = flops_a_token(config, mesh)["with recomputation"] * tokens / topology.n_devices / (1 - bubble)
    gathered = 3 * config.accumulate * share * (mesh["fsdp"] - 1) / mesh["fsdp"]
    replicated = 2 * share / mesh["fsdp"] * (mesh["data"] - 1) / mesh["data"]
    stream = tokens / shards * c.d_model * size * c.n_layers / stages
    sums = (4 + 2 * (c.remat != "none")) * 2 * (mesh["tensor"] - 1) / mesh["tensor"] * stream
    sent = {"fsdp": gathered, "tensor": sums, "data": replicated}
    wire = sum(amount / rate_along([axis], mesh, topology) for axis, amount in sent.items())
    memory = (4 * config.accumulate * share + 2 * state) / chip.memory_rate
    seconds = max(flops / chip.flops, wire, memory)
    return state + kept + layer, seconds / tokens


@functools.cache
def kept_a_row(config: RunConfig) -> int:
    """Bytes that the backward pass holds, under the rematerialization of `config`, whose batch is one row."""
    computed = jax.eval_shape(functools.partial(cast, dtype=config.model.dtype), shapes(config.model))
    return residual_bytes(config, computed, jax.ShapeDtypeStruct((1, config.data.seq_len), jnp.int32))


def render(found: Found) -> Group:
    """What was tried, and what came of it, for a `rich` console."""
    table = columns("", "right", "right", "right", "dim")
    table.add_row("changes", "memory", "step at best", "tokens a day", "", style="dim")
    for one in found.tried:
        if one.plan is None:
            table.add_row(one.name, "", "", "", f"refused: {one.reason[:60]}")
            continue
        p = one.plan
        verdict = "fits" if p.fits else f"too large by {metric(p.needed - p.limit, 'B')}"
        step = "" if p.step_seconds is None else f"{p.step_seconds * 1e3:,.0f} ms"
        daily = "" if p.tokens_per_day is None else metric(p.tokens_per_day, "")
        table.add_row(one.name, metric(p.needed, "B"), step, daily, verdict)
    ends = [Text(f"{len(found.tried)} of {found.considered} choices compiled, in the order of arithmetic", "dim")]
    if found.fastest is None or found.smallest is None:
        ends.append(Text("nothing that was compiled fits; allow more --compiles, or take more chips", "bold red"))
    else:
        ends.append(Text(f"fastest that fits: {found.fastest.name}", "bold"))
        if not found.tried[0].fits:
            known = "that was compiled and fits" if found.smaller else "that makes it fit"
            ends.append(Text(f"smallest change {known}: {found.smallest.name}", "bold"))
    return Group(title("Search"), table, *ends)


def as_json(found: Found) -> dict[str, Any]:
    """A row for each that was compiled, and the changes of the best, for machines."""
    rows = [
        {
            "changes": list(one.choice.changes),
            "fits": one.fits,
            "needed": one.plan and one.plan.needed,
            "step_seconds": one.plan and one.plan.step_seconds,
            "tokens_per_day": one.plan and one.plan.tokens_per_day,
            "refused": one.reason or None,
        }
        for one in found.tried
    ]
    best = {"fastest": found.fastest, "smallest": found.smallest}
    return {"search": rows} | {name: one and list(one.choice.changes) for name, one in best.items()}
