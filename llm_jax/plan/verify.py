"""Every mesh gives the result of one device: train a config, shrunk to test size, in each layout of eight devices.

It compares everything that a layout could get wrong: the loss of a batch, the gradient of every parameter, and the
curve of a short training with the config's own optimizer. The devices are simulated on the CPU, by
`runtime.start(devices=8)`.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

from llm_jax.axes import MeshConfig
from llm_jax.config import replace
from llm_jax.data.loader import IGNORE, Batch, select_fields
from llm_jax.model.config import ModelConfig
from llm_jax.model.pattern import n_scanned
from llm_jax.ops.attention import ACROSS
from llm_jax.ops.config import Rotary
from llm_jax.train.config import PipelineConfig, RunConfig
from llm_jax.train.program import Program
from llm_jax.train.step import TrainState
from llm_jax.tree import leaves

DEVICES, STEPS = 8, 20
MICROBATCHES = 4
# How far a layout may be from one device, in float32, where sums run in another order. All are relative: the error of
# the loss, the error of the gradient of each leaf by its norm, the errors of loss and gradient norm at every step.
BOUNDS = {"loss": 1e-6, "gradient": 1e-5, "curve": 1e-4}
# For a mixture of experts: rounding decides a tie of the router, and one of 1,024 tokens that went to another expert
# changed the norm of the gradient by 6e-4.
WITH_TIES = BOUNDS | {"curve": 5e-3}
# The error of a leaf is relative to at least this share of the whole gradient: one that is 0 but for rounding has no
# correct digits.
LEAST = 1e-4

# The learning rate is that of the config over this. With large steps on noise, rounding decides which expert a token of
# so small a model goes to: at the rate of quickstart two curves of eight experts differed by 1e-2 after twenty steps,
# at a tenth by 5e-7.
SLOWER = 10

AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
# Sizes to try; the first that the config supports is used.
ALONE, PAIRS = ((8,), (4,), (2,)), ((4, 2), (2, 4), (2, 2))
# Settings of how an axis splits, besides its size.
WAYS = {
    "context": [{"model.attention.implementation": name} for name in ("ring", "ulysses")],
    "pipeline": [{"pipeline.schedule": "gpipe"}, {"pipeline.chunks": 2}],
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes of more than one device, and settings that go with them."""

    axes: tuple[str, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def meshes(self) -> Iterator[MeshConfig]:
        """Yield the meshes to try, in order of preference."""
        for sizes in ALONE if len(self.axes) == 1 else PAIRS:
            yield MeshConfig(**{"data": 1, **dict(zip(self.axes, sizes, strict=True))})

    def __str__(self) -> str:
        return " x ".join(self.axes) + "".join(
            f", {path.rpartition('.')[2]}={value}" for path, value in self.settings.items()
        )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far a layout is from one device, by the names of its bounds; or why the config does not support it."""

    layout: str
    bounds: dict[str, float]
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    gaps: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    refused: str | None = None

    @property
    def equal(self) -> bool | None:
        """Whether the result is that of one device; None if the layout is refused."""
        return None if self.refused else all(self.gaps[name] <= bound for name, bound in self.bounds.items())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a program computes on the batches of `rows`, from a given state."""

    loss: float
    gradient: PyTree
    curve: Float[np.ndarray, "steps 2"]


def layouts() -> list[Layout]:
    """Return every axis alone, with each of its settings, and every two together."""
    alone = [Layout((axis,), way) for axis in AXES for way in [{}, *WAYS.get(axis, [])]]
    return alone + [Layout(pair) for pair in itertools.combinations(AXES, 2)]


def verify(config: RunConfig, wanted: Sequence[Layout]) -> Iterator[Verdict]:
    """Train `config`, shrunk, on one device and in each layout; yield a verdict for each. Needs `DEVICES` devices."""
    small, bounds = shrunk(config), bounds_of(config)
    one = Program.on_one_device(dataclasses.replace(small, pipeline=PipelineConfig()))
    start = jax.device_get(one.init())
    expected = outcome(one, start)
    for layout in wanted:
        begun = time.monotonic()
        try:
            program = laid_out(small, layout)
        except ValueError as error:
            yield Verdict(str(layout), bounds, refused=str(error))
            continue
        found = outcome(program, start)
        mesh = {axis: size for axis, size in program.mesh.shape.items() if size > 1}
        gaps = {name: gap(found, expected) for name, gap in GAPS.items()}
        yield Verdict(str(layout), bounds, mesh, gaps, seconds=time.monotonic() - begun)


def bounds_of(config: RunConfig) -> dict[str, float]:
    """Return how far the layouts of `config` may be from one device."""
    return BOUNDS if config.model.experts is None else WITH_TIES


def laid_out(small: RunConfig, layout: Layout) -> Program:
    """Return the program on the largest mesh of the layout that it supports. Raise `ValueError` if there is none."""
    small = replace(small, **layout.settings)
    if "pipeline" not in layout.axes:
        small = dataclasses.replace(small, pipeline=PipelineConfig())
    reason: ValueError | None = None
    for mesh in layout.meshes():
        devices = jax.devices()[: int(np.prod(dataclasses.astuple(mesh)))]
        try:
            program = Program.on(dataclasses.replace(small, mesh=mesh), devices)
            program.abstract_state  # noqa: B018 -- raises for sizes that don't divide
        except ValueError as error:
            reason = error  # in the end that of the smallest mesh
        else:
            return program
    assert reason is not None
    raise reason


def outcome(program: Program, start: TrainState, steps: int = STEPS) -> Outcome:
    """Return the loss and gradient of a batch, and the loss and gradient norm of `steps` steps on others."""
    state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), start, program.abstract_state)
    (loss, _), gradient = jax.device_get(program.gradient(state.params, rows(program.config, steps)))
    curve = []
    for step in range(steps):
        state, metrics = program.train_step(state, rows(program.config, step))
        curve.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return Outcome(float(loss), gradient, np.array(curve))


def loss_gap(found: Outcome, expected: Outcome) -> float:
    """Return the relative error of the loss."""
    return abs(found.loss - expected.loss) / abs(expected.loss)


def gradient_gap(found: Outcome, expected: Outcome) -> float:
    """Return the relative error of the leaf where it is largest."""
    ours, theirs = leaves(found.gradient), leaves(expected.gradient)
    norms = {path: float(np.linalg.norm(leaf)) for path, leaf in theirs.items()}
    least = LEAST * float(np.linalg.norm(list(norms.values())))
    return max(float(np.linalg.norm(ours[path] - leaf)) / max(norms[path], least) for path, leaf in theirs.items())


def curve_gap(found: Outcome, expected: Outcome) -> float:
    """Return the largest relative error of a loss or a gradient norm, over all steps."""
    return float((np.abs(found.curve - expected.curve) / np.abs(expected.curve)).max())


GAPS = {"loss": loss_gap, "gradient": gradient_gap, "curve": curve_gap}
HEAD = f"{'layout':28} {'mesh':24} {'loss':>8} {'gradient':>9} {f'{STEPS} steps':>9}"


def verdict_line(v: Verdict) -> str:
    """Return a verdict as a line of text."""
    if v.refused is not None:
        return f"{v.layout:28} can't be: {v.refused}"
    mesh = " ".join(f"{axis}={size}" for axis, size in v.mesh.items())
    word = "equal" if v.equal else "DIFFERENT"
    loss, gradient, curve = (v.gaps[name] for name in GAPS)
    return f"{v.layout:28} {mesh:24} {loss:8.0e} {gradient:9.0e} {curve:9.0e}  {word}"


def verdicts_to_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the verdicts for machines."""
    layouts = [dataclasses.asdict(verdict) | {"equal": verdict.equal} for verdict in verdicts]
    return {"devices": DEVICES, "steps": STEPS, "layouts": layouts}


def like(size: int, small: int) -> int:
    """Return a size near `small` of the same remainder by eight, so that it divides alike. A size not larger stays."""
    return size if size <= small else small + size % 8


def shrunk(config: RunConfig) -> RunConfig:
    """Return the same kind of run in test size: the same choices, every width and length as small as possible."""
    L, c = like(config.data.seq_len, 32), config.optimizer
    chunk = config.loss.chunk and (L // 2 if L % 2 == 0 else L)
    return dataclasses.replace(
        config,
        model=small_model(config.model, L),
        data=dataclasses.replace(config.data, seq_len=L, batch_size=DEVICES * MICROBATCHES),
        loss=dataclasses.replace(config.loss, chunk=chunk),
        optimizer=dataclasses.replace(c, learning_rate=c.learning_rate / SLOWER, warmup_steps=min(c.warmup_steps, 2)),
        accumulate=MICROBATCHES,
        steps=STEPS,
        init_from=None,
    )


def _shorter(rotary: Rotary, pairs: int, L: int) -> dict[str, Any]:
    """Return the changes to a rotary that scales by length, for `pairs` pairs a head and rows beyond its own length."""
    if rotary.scaling not in ("dynamic", "longrope"):
        return {}
    factors = {name: getattr(rotary, name)[:pairs] for name in ("short_factors", "long_factors")}
    return {"original_len": L // 2, **factors}


def small_model(c: ModelConfig, L: int) -> ModelConfig:
    """Return the same kind of model for rows of L tokens."""
    K, period, attention, experts = like(c.K, 8), len(c.layers), c.attention, c.experts
    if attention.implementation not in ACROSS:  # others may need longer rows, or an accelerator
        attention = dataclasses.replace(attention, implementation=None)
    if attention.window is not None:
        attention = dataclasses.replace(attention, window=min(attention.window, 6), sinks=min(attention.sinks, 2))
    if attention.sparse is not None:
        attention = dataclasses.replace(attention, sparse=dataclasses.replace(attention.sparse, block=4))
    rotary = dataclasses.replace(c.rotary, **_shorter(c.rotary, c.rotary.rotated(like(c.H, 16)) // 2, L))
    if experts is not None:
        number = like(experts.number, 8)
        width = None if experts.d_ff is None else like(experts.d_ff, 32)
        experts = dataclasses.replace(experts, number=number, active=min(experts.active, number), d_ff=width)
    return dataclasses.replace(
        c,
        vocab_size=like(c.vocab_size, 64),
        d_model=like(c.d_model, 32),
        n_layers=like(n_scanned(c) // period, 8) * period + c.n_layers - n_scanned(c),
        n_heads=K * min(c.G, 2),
        n_kv_heads=K,
        head_dim=like(c.H, 16),
        d_ff=like(c.F, 32),
        max_seq_len=L,
        attention=attention,
        rotary=rotary,
        experts=experts,
        dtype="float32",
        unroll=1,
    )


def rows(config: RunConfig, seed: int) -> Batch:
    """Return rows of noise with the fields of the config's data: two documents each, a prefix, the classes."""
    c, data, draw = config.model, config.data, np.random.default_rng(seed)
    B, L, position = data.batch_size, data.seq_len, np.arange(data.seq_len, dtype=np.int32)[None]
    tokens = draw.integers(c.vocab_size, size=(B, L + 1), dtype=np.int32)
    cut = draw.integers(1, L, size=(B, 1))
    second = position >= cut
    positions = np.where(second, position - cut, position).astype(np.int32)
    targets = np.where(position == cut - 1, IGNORE, tokens[:, 1:]).astype(np.int32)
    if c.n_classes is not None:
        targets = np.where(draw.random((B, L)) < 0.2, tokens[:, 1:] % c.n_classes, IGNORE).astype(np.int32)
    seen = positions < draw.integers(1, L, size=(B, 1))
    batch = Batch(tokens[:, :-1], targets, segments=1 + second.astype(np.int32), positions=positions, prefix=seen)
    return select_fields(batch, data)
