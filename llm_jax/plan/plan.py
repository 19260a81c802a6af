"""What a run needs on accelerators that are not here: what fits, what is sent, how fast it can be.

`figures` compiles the very step that trains, for a topology; `plan` reads the compiled program and adds arithmetic; a
console of `rich` prints the `Plan`. Bytes are those of one device, a GB is 1e9 of them.
"""

import dataclasses
import functools
import gzip
import hashlib
import json
import math
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from rich.console import Group
from rich.text import Text

from llm_jax import tree as trees
from llm_jax.files import parse_json, write_whole
from llm_jax.plan import hlo, liveness
from llm_jax.plan.describe import bare_table, metric, shares, title
from llm_jax.plan.estimate import flops_a_token, gradient_bytes, numbers_here
from llm_jax.plan.topology import H100, Topology
from llm_jax.plan.traffic import Traffic, traffic_of
from llm_jax.runtime import cache_folder
from llm_jax.train.config import RunConfig
from llm_jax.train.offload import HOST
from llm_jax.train.program import Program

DAY = 24 * 3600
CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9}  # cycles per second, as far as they are known
# Below these a figure is noise: compilers for accelerators count the memory of small programs badly, and such a short
# step takes longer to start than to run.
LEAST_MEMORY, LEAST_SECONDS = 3e8, 1e-3
BELOW_RESOLUTION = "below what the compiler can tell"


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the compiler says about a program, for one device.

    Attributes:
      arguments: bytes of the state and the batch; the new state overwrites the old one.
      temporary: bytes allocated for everything else, including gaps between arrays.
      needed: bytes allocated in all, which have to fit.
      peak: the largest number of bytes in use at once; on a CPU possibly without temporaries.
      finished: whether there is a program; the compiler gives up on one that is too large.
      text: of the scheduled program, if there is one.
    """

    arguments: int
    temporary: int
    needed: int
    peak: int
    finished: bool
    text: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of a config on a topology. Bytes, FLOPs and seconds are those of one device.

    Attributes:
      peak: the largest number of bytes in use at once; on a CPU unknown, and `needed`.
      parameters: bytes by path.
      host: bytes of the state in the memory of the host; nothing else counts them.
      gradients: bytes of all gradients, which are among the temporaries.
      temporaries: bytes at their peak by module, read from the program text: an estimate of `temporary`.
      traffic: None if the program was too large to compile.
      more: collectives in loops whose length is known only at run time; nothing else counts them.
      flops: of the model, and including recomputation.
      bubble: the share of time in which a stage of a pipeline is idle.
      seconds: a step at the published peak rates of compute, memory and, if known, communication, each by itself.
      cycles: a step as the compiler for TPU estimates it, without kernels.
    """

    topology: str
    devices: int
    chips: int
    mesh: dict[str, int]
    rows: int
    tokens: int
    limit: int
    needed: int
    peak: int
    arguments: int
    temporary: int
    parameters: dict[str, int]
    optimizer: int
    host: int
    gradients: int
    temporaries: dict[str, int]
    traffic: list[Traffic] | None
    more: int
    flops: dict[str, float]
    bubble: float
    seconds: dict[str, float]
    cycles: int
    cycle_seconds: float | None
    price: float | None

    @property
    def fits(self) -> bool:
        """Whether the compiler finished, and a device has the memory that the step needs."""
        return self.traffic is not None and self.needed <= self.limit

    @property
    def waited(self) -> float | None:
        """The seconds of a step in which a device sends and computes nothing, at the published rate of its links.

        The least there is: a collective can also take longer than what is computed beside it. None if it can't run.
        """
        return None if self.traffic is None else sum(one.waited for one in self.traffic)

    @property
    def step_seconds(self) -> float | None:
        """The least that a step takes: the longest of `seconds`, if all else overlaps with it. None if it can't run."""
        return None if self.traffic is None else max(self.seconds.values())

    @property
    def memory_is_reliable(self) -> bool:
        """Whether the compiler's count of bytes is reliable."""
        return self.topology.startswith("cpu") or self.needed >= LEAST_MEMORY

    @property
    def tokens_per_day(self) -> float | None:
        """At best; None if a step can't run, or is too short for a meaningful number."""
        seconds = self.step_seconds
        return None if seconds is None or seconds < LEAST_SECONDS else self.tokens / seconds * DAY

    @property
    def cost(self) -> float | None:
        """The cost of a billion tokens, in the currency of the price."""
        return self.price and self.tokens_per_day and self.price * self.chips * 24 / self.tokens_per_day * 1e9

    def to_json(self) -> dict[str, Any]:
        """Return every field and what follows from them, for machines."""
        more = {
            "fits": self.fits,
            "step_seconds": self.step_seconds,
            "waited_seconds": self.waited,
            "tokens_per_day": self.tokens_per_day,
            "cost_per_billion_tokens": self.cost,
        }
        return dataclasses.asdict(self) | more

    def __rich__(self) -> Group:
        """Show the plan on a `rich` console."""
        return _page(self)


def figures(program: Program, topology: Topology, folder: Path | None = None) -> Figures:
    """Compile the train step of `program`, or read from `folder` what an earlier compilation gave.

    Raise `ValueError` if the compiler refuses the program, other than for its size.
    """
    lowered = program.lowered()
    folder = folder or cache_folder() / "plans"
    known = [field.name for field in dataclasses.fields(Figures)]
    key = hashlib.sha256("\n".join([lowered.as_text(), str(topology), *_compilers(), *known]).encode()).hexdigest()[:32]
    path = folder / f"{key}.json.gz"
    if path.exists():
        return Figures(**parse_json(gzip.decompress(path.read_bytes()), where=str(path), advice="delete it"))
    found = _compiled(lowered, bytes_here((program.abstract_state, program.abstract_batch)))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, gzip.compress(json.dumps(dataclasses.asdict(found)).encode()))
    return found


def _compilers() -> list[str]:
    """Return everything besides the program that the compiler's result depends on."""
    flags = [f"{name}={os.environ.get(name, '')}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return [*versions(), *flags, H100.read_text()]


def versions() -> list[str]:
    """Return the versions of JAX and of the installed compilers."""
    found = []
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


# How the compilers for TPU say that a program needs too much memory; the number includes state and batch.
TOO_LARGE = r"HLO temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?) of \S+ hbm"


def too_large(message: str) -> int:
    """Return the bytes that a program needs, from the compiler's error that they are too many.

    Raise `ValueError` for any other error, such as a kernel that exceeds the memory on the chip.
    """
    found = re.search(TOO_LARGE, message)
    if found is None:
        first = re.sub(r"^[A-Z_]+: ", "", message.strip().partition("\n")[0])
        raise ValueError(f"the compiler refuses the program: {first[:300]}")
    amount, unit = (x for x in found.groups() if x is not None)
    return int(float(amount) * 2 ** (10 * " KMGT".index(unit or " ")))


def _compiled(lowered: jax.stages.Lowered, arguments: int) -> Figures:
    try:
        return figures_of(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        needed = too_large(str(error))
        return Figures(arguments, needed - arguments, needed, needed, finished=False, text="")


def figures_of(compiled: jax.stages.Compiled) -> Figures:
    """Return what the compiler says about any compiled program. Raise `ValueError` if JAX can't read its text."""
    memory = compiled.memory_analysis()
    assert memory is not None
    given, new = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = given + memory.temp_size_in_bytes + new
    peak = getattr(memory, "peak_memory_in_bytes", 0) - memory.host_argument_size_in_bytes  # which it includes
    peak = peak if given < peak < needed else needed
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        line = f'pip install "jax[tpu]=={jax.__version__}"'
        raise ValueError(f"{', '.join(versions())} are incompatible: {str(error)[:200]}; {line}") from error
    return Figures(given, memory.temp_size_in_bytes, needed, peak, finished=True, text=text)


def bytes_here(tree: PyTree, host: bool = False) -> int:
    """Return the bytes that a device, or the `host` for it, holds of abstract arrays that are sharded on a mesh."""
    here = [leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind == HOST) == host]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in here)


def check_host(config: RunConfig, topology: Topology) -> None:
    """Raise `ValueError` if the config keeps something on the host, and `topology` is described without one."""
    if topology.kind in ("cpu", "h100") and (config.offload != "none" or config.model.remat == "offload"):
        raise ValueError(
            f"a plan for {topology} has no host memory; set offload=none, and model.remat=full where it is offload"
        )


def plan(config: RunConfig, topology: Topology, price: float | None = None, folder: Path | None = None) -> Plan:
    """Return the plan of a step of `config` on `topology`; `price` is that of a chip per hour.

    Raise `ValueError` like `figures`, `check_host`, `Topology.devices` and `Program.on`.
    """
    check_host(config, topology)
    program = Program.on(config, topology.devices())
    found = figures(program, topology, folder)
    module = hlo.parse(found.text) if found.finished else None
    mesh, state = dict(program.mesh.shape), program.abstract_state
    rows, tokens = config.data.batch_size, config.data.batch_size * config.data.seq_len
    sent = hlo.collectives(module, mesh) if module else []
    traffic = traffic_of(sent, mesh, topology) if module else None
    cycles = hlo.cycles(module) if module else 0
    flops = {name: n * tokens / topology.n_devices for name, n in flops_a_token(config, mesh).items()}
    bubble = 0.0 if program.pipeline is None else program.pipeline.timetable.bubble
    seconds = {
        "compute": flops["with recomputation"] / topology.chip.flops / (1 - bubble),
        "memory": memory_bytes(config, program) / topology.chip.memory_rate,
    }
    clock = CLOCKS.get(topology.kind)
    return Plan(
        topology=str(topology),
        devices=topology.n_devices,
        chips=topology.n_chips,
        mesh={axis: size for axis, size in mesh.items() if size > 1},
        rows=rows,
        tokens=tokens,
        limit=int(topology.chip.memory),
        needed=found.needed,
        peak=found.needed if topology.kind == "cpu" else found.peak,
        arguments=found.arguments,
        temporary=found.temporary,
        parameters={path: bytes_here(leaf) for path, leaf in trees.leaves(state.params).items()},
        optimizer=bytes_here(state.opt_state),
        host=bytes_here(state, host=True),
        gradients=int(numbers_here(state.params, mesh) * gradient_bytes(config, mesh)),
        temporaries=dict(liveness.by_module(liveness.live(module)).most_common()) if module else {},
        traffic=traffic,
        more=sum(one.count is None for one in sent),
        flops=flops,
        bubble=bubble,
        seconds=seconds if traffic is None else seconds | {"communication": sum(one.seconds for one in traffic)},
        cycles=cycles,
        cycle_seconds=cycles / clock if clock and cycles else None,
        price=price,
    )


def memory_bytes(config: RunConfig, program: Program) -> float:
    """Return the least bytes to and from memory: for weights and optimizer, without activations.

    Each pass of each microbatch reads the gathered weights: forward, backward for the gradients of inputs and for those
    of weights, and once more for recomputation. The optimizer reads weights, gradients and moments, and writes weights
    and moments; what is kept on the host passes through.
    """
    c, mesh, state = config.model, program.mesh.shape, program.abstract_state
    passes = 3 + (c.remat not in ("none", "dots"))
    whole = numbers_here(state.params, dict(mesh) | {"fsdp": 1}) * jax.numpy.dtype(c.dtype).itemsize
    gradients = numbers_here(state.params, mesh) * gradient_bytes(config, mesh)
    return passes * config.accumulate * whole + 2 * (bytes_here(state) + bytes_here(state, host=True)) + gradients


def _page(p: Plan) -> Group:
    gb = functools.partial(metric, unit="B")
    spare, needed = p.limit - p.needed, f"{gb(p.needed)} allocated" if p.memory_is_reliable else f"{BELOW_RESOLUTION},"
    in_use = f", {gb(p.peak)} in use at the peak" if p.memory_is_reliable and p.peak < p.needed else ""
    verdict = f"fits, with {gb(spare)} to spare" if p.fits else f"does not fit, by {gb(-spare)}"
    mesh = ", ".join(f"{axis} {size}" for axis, size in p.mesh.items()) or "one device"
    memory = {"weights": sum(p.parameters.values()), "optimizer": p.optimizer}
    if p.memory_is_reliable:
        memory |= {"batch": p.arguments - sum(memory.values()), "temporary": p.temporary}
    largest = dict(sorted(p.parameters.items(), key=lambda item: -item[1])[:8])
    rest = sum(p.parameters.values()) - sum(largest.values())
    pages = [
        Text(f"{p.topology}: {verdict}", style="bold green" if p.fits else "bold red"),
        Text(f"{p.devices} devices ({mesh}), {p.rows} rows, {p.tokens:,} tokens a step; all below is of one device"),
        title(f"Memory: {needed} of {gb(p.limit)}{in_use}"),
        shares(memory, gb),
        *([Text(f"on the host: {gb(p.host)}, fetched a layer at a time", "dim")] if p.host else []),
        Text("weights, by path", style="dim"),
        shares(largest | {"others": rest}, gb),
    ]
    if p.temporaries and p.memory_is_reliable:
        estimate = gb(sum(p.temporaries.values()))
        shown = dict(list(p.temporaries.items())[:10])
        others = sum(list(p.temporaries.values())[10:])
        pages += [
            Text(
                f"temporary at the peak, as read from the program: {estimate}; all gradients: {gb(p.gradients)}", "dim"
            ),
            shares(shown | {"others": others}, gb),
        ]
    return Group(*pages, *_communication(p), *_time(p))


def _communication(p: Plan) -> list[Any]:
    if p.traffic is None:
        return [title("Communication: the compiler gave up before it knew")]
    table = bare_table("", "", "right", "right", "right", "right", "right")
    table.add_row("collective", "axes", "times", "sent", "overlapped", "at best", "waited", style="dim")
    for one in p.traffic:
        share, times = f"{one.overlapped / one.bytes:.0%}", (_seconds(one.seconds), _seconds(one.waited))
        table.add_row(one.kind, one.axes or "?", f"{one.count:,}", metric(one.bytes, "B"), share, *times)
    pages = [title(f"Communication: {metric(sum(one.bytes for one in p.traffic), 'B')} sent a step"), table]
    if p.more:
        pages.append(Text(f"{p.more} more in loops whose length is known only at run time", "dim"))
    return pages


def _time(p: Plan) -> list[Any]:
    table = bare_table("", "right", "")
    for name, seconds in p.seconds.items():
        remarks = ["the longest"] * (seconds == p.step_seconds)
        remarks += [f"{p.bubble:.1%} of it bubble"] * (name == "compute" and p.bubble > 0)
        table.add_row(name, _seconds(seconds), ", ".join(remarks))
    if p.traffic and p.waited:
        sent, alone = sum(one.bytes for one in p.traffic), sum(one.bytes - one.overlapped for one in p.traffic)
        beside = f"nothing is computed beside {metric(alone, 'B')} of {metric(sent, 'B')} sent"
        table.add_row("  waited for", _seconds(p.waited), beside)
    if p.cycle_seconds is not None:
        table.add_row("cycles", _seconds(p.cycle_seconds), f"{p.cycles / 1e6:,.0f} million by the compiler, no kernels")
    work = bare_table("", "right")
    for name, flops in p.flops.items():
        work.add_row(name, metric(flops, "FLOP"))
    pages = [title("Compute of a step"), work, title("Time of a step at published peaks"), table]
    if p.tokens_per_day is None:
        return pages if p.step_seconds is None else [*pages, Text(f"tokens a day: {BELOW_RESOLUTION}")]
    ends = f"{metric(p.tokens_per_day, 'tokens')} a day at best"
    if p.cost is not None:
        ends += f"; a billion tokens for {p.cost:,.2f} at {p.price:,.2f} a chip and hour"
    return [*pages, Text(ends)]


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds > 1e-4 else f"{seconds * 1e6:,.1f} us"
