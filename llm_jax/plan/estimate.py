"""The memory, communication and time of a config on a mesh, by arithmetic alone: fast, and good enough to rank meshes.

Its communication agrees with what `tests/test_budget.py` finds in compiled programs. A plan takes from here what no
compiled program says.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from llm_jax import tree as trees
from llm_jax.axes import MeshConfig
from llm_jax.model.config import ModelConfig
from llm_jax.model.count import flops_per_token
from llm_jax.model.shapes import shapes
from llm_jax.ops.exchange import ROOM
from llm_jax.plan.memory import residual_bytes
from llm_jax.plan.topology import Topology
from llm_jax.sharding import PARAMETER_AXES, TOKENS, letters_of, spec
from llm_jax.train.config import PipelineConfig, RunConfig
from llm_jax.train.offload import STACK
from llm_jax.train.step import cast, rows_independent
from llm_jax.train.timetable import Timetable


def predicted(config: RunConfig, mesh: Mapping[str, int], topology: Topology) -> tuple[float, float]:
    """Return the bytes of a device and the seconds per token.

    State and gradients are split by the letters of parameters; what the backward pass keeps is split over tokens,
    `tensor` and stages. A stage also keeps the inputs of the microbatches in flight, and its share of all embedded
    tokens and their gradients. The bubble of a pipeline stretches communication and memory traffic too, because idle
    stages send and read like busy ones.
    """
    c, chip, tokens = config.model, topology.chip, config.data.batch_size * config.data.seq_len
    size, stages = jnp.dtype(c.dtype).itemsize, mesh["pipeline"]
    table = _timetable(config.pipeline, stages, config.accumulate)
    numbers, whole = (numbers_held(c, sizes) for sizes in (mesh, {**mesh, "fsdp": 1}))
    shards = math.prod(mesh[axis] for axis in TOKENS)
    rows = config.data.batch_size / config.accumulate / shards
    alone = dataclasses.replace(
        config, mesh=MeshConfig(), accumulate=1, data=dataclasses.replace(config.data, batch_size=1)
    )
    stream = tokens / shards * c.d_model * size
    kept = rows * kept_a_row(alone) / mesh["tensor"] / stages / table.config.chunks
    kept += (table.held / config.accumulate + 2 / stages) * stream * (stages > 1)
    state = numbers * (12 + size + gradient_bytes(config, mesh))
    if config.offload != "none":
        state -= {"optimizer": 8, "state": 12}[config.offload] * numbers_here({STACK: shapes(c)[STACK]}, mesh)
    share = whole * size
    layer = share / (c.n_layers / stages)

    flops = flops_a_token(config, mesh)["with recomputation"] * tokens / topology.n_devices
    communication = sum(amount / rate_along([axis], mesh, topology) for axis, amount in sent(config, mesh).items())
    memory = (4 * config.accumulate * share + 2 * state) / chip.memory_rate
    seconds = max(flops / chip.flops, communication, memory) / (1 - table.bubble)
    return state + kept + layer, seconds / tokens


def sent(config: RunConfig, mesh: Mapping[str, int]) -> dict[str, float]:
    """Return the bytes that a device sends along each axis, per step.

    - The gradients of whatever an axis doesn't split are summed along it, in each microbatch; over stages once per
      step, in float32, and so over `data` if rows are independent.
    - `fsdp`: weights are gathered for each microbatch, forward and backward, and their gradients reduce-scattered.
    - `tensor`: blocks gather the stream twice and reduce-scatter its sums twice, forward and backward, and three times
      more if they are recomputed.
    - `context`, as a ring: keys and values go around forward and backward, the latter with their gradients, which then
      return; on the stages of a pipeline once more, where a piece is recomputed.
    - `expert`: tokens go to their experts and back, forward, backward, and in recomputation.
    - `pipeline`: the stream and its gradient go from stage to stage, and shares of them to embedding and head.
    """
    c, recomputed = config.model, config.model.remat != "none"
    size, tokens = jnp.dtype(c.dtype).itemsize, config.data.batch_size * config.data.seq_len
    share = {axis: (n - 1) / n for axis, n in mesh.items()}
    each = tokens / math.prod(mesh[axis] for axis in TOKENS) * size
    layers, n, staged = c.n_layers / mesh["pipeline"], mesh["context"], mesh["pipeline"] > 1
    mixtures = layers * sum(layer.moe for layer in c.period) / len(c.period)
    active = 0 if c.experts is None else c.experts.active
    own = {
        "fsdp": 3 * config.accumulate * numbers_held(c, {**mesh, "fsdp": 1}) * size * share["fsdp"],
        "tensor": (8 + 3 * recomputed) * share["tensor"] * layers * each * c.d_model,
        "context": ((3 + staged) * (n - 1) + (n > 1)) * layers * each * 2 * c.K * c.H / mesh["tensor"],
        "expert": 2 * (2 + recomputed) * share["expert"] * mixtures * each * c.d_model * active * ROOM,
        "pipeline": (2 + 4 * share["pipeline"]) * staged * config.pipeline.chunks * each * c.d_model,
    }
    once = ["pipeline"] + ["data"] * (config.accumulate > 1 and rows_independent(c, mesh))
    times = dict.fromkeys(mesh, config.accumulate * size) | dict.fromkeys(once, 4)
    return {
        axis: 2 * share[axis] * numbers_held(c, mesh, besides=axis) * times[axis] + own.get(axis, 0) for axis in mesh
    }


def numbers_here(params: PyTree, mesh: Mapping[str, int]) -> float:
    """Return how many numbers of the parameters a device of `mesh` holds."""
    return _shares(numbers_by_axes(params), mesh)


def numbers_by_axes(params: PyTree) -> Mapping[tuple[str, ...], int]:
    """Return how many numbers of the parameters are split over each set of mesh axes."""
    found = Counter[tuple[str, ...]]()
    for path, leaf in trees.leaves(params).items():
        axes = spec(letters_of(path, leaf.shape), PARAMETER_AXES)
        found[tuple(axis for axis in axes if axis is not None)] += math.prod(leaf.shape)
    return found


def numbers_held(c: ModelConfig, mesh: Mapping[str, int], besides: str = "") -> float:
    """Return how many numbers a device holds of the parameters that the axis `besides` does not split."""
    return _shares({axes: n for axes, n in _parameters(c).items() if besides not in axes}, mesh)


def _shares(numbers: Mapping[tuple[str, ...], int], mesh: Mapping[str, int]) -> float:
    return math.fsum(n / math.prod(mesh[axis] for axis in axes) for axes, n in numbers.items())


@functools.cache
def _parameters(c: ModelConfig) -> Mapping[tuple[str, ...], int]:
    return numbers_by_axes(shapes(c))


def gradient_bytes(config: RunConfig, mesh: Mapping[str, int]) -> int:
    """Return the bytes of a number in a gradient: sums over microbatches are float32, like parameters."""
    return 4 if config.accumulate > 1 or mesh["pipeline"] > 1 else jnp.dtype(config.model.dtype).itemsize


def flops_a_token(config: RunConfig, mesh: Mapping[str, int]) -> dict[str, float]:
    """Return the FLOPs of a training step per token: of the model, and including recomputed forward passes.

    Rematerialization recomputes a block except what it keeps: `dots` keeps the matrix products, and named taps count as
    if they saved nothing. A chunked loss recomputes the logits, a pipeline its layers.
    """
    c, model = config.model, flops_per_token(config.model, config.data.seq_len)
    head = 6 * math.prod(shapes(c)[c.head]["table"].shape)
    again = (model - head) / 3 * (c.remat not in ("none", "dots")) + head / 3 * (config.loss.chunk is not None)
    again += (model - head) / 3 * (mesh["pipeline"] > 1)
    return {"model": float(model), "with recomputation": float(model + again)}


def rate_along(axes: Sequence[str], mesh: Mapping[str, int], topology: Topology) -> float:
    """Return the bytes per second that a device sends along `axes`; between slices or nodes over their network."""
    names, sizes = list(mesh), list(mesh.values())
    far = any(mesh[axis] > 1 and math.prod(sizes[names.index(axis) :]) > topology.island for axis in axes)
    return topology.chip.network_rate if far else topology.chip.link_rate


@functools.cache
def _timetable(config: PipelineConfig, stages: int, microbatches: int) -> Timetable:
    return Timetable(config, stages, microbatches)


@functools.cache
def kept_a_row(config: RunConfig) -> int:
    """Return the bytes that the backward pass keeps of a row, under the rematerialization of `config`."""
    computed = jax.eval_shape(functools.partial(cast, dtype=config.model.dtype), shapes(config.model))
    return residual_bytes(config, computed, jax.ShapeDtypeStruct((1, config.data.seq_len), jnp.int32))
