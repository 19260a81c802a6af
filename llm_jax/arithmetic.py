"""What a config would need, send and take on a mesh, by arithmetic alone: in no time, and near enough to order meshes.

What it counts on the wire is what `tests/test_budget.py` finds in compiled programs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llm_jax.model.config import ModelConfig
from llm_jax.ops.exchange import ROOM
from llm_jax.plan import flops_a_token, gradient_bytes, numbers_by_axes, numbers_here, rate_along
from llm_jax.sharding import TOKENS, MeshConfig
from llm_jax.show import residual_bytes
from llm_jax.topologies import Topology
from llm_jax.train.count import shapes
from llm_jax.train.offload import STACK
from llm_jax.train.run import RunConfig
from llm_jax.train.step import cast, rows_apart
from llm_jax.train.timetable import PipelineConfig, Timetable


def predicted(config: RunConfig, mesh: Mapping[str, int], topology: Topology) -> tuple[float, float]:
    """Bytes of a device and seconds a token, by arithmetic alone.

    State and gradients are split as the letters of parameters say, what backward passes keep over tokens, `tensor` and
    stages; a stage keeps the inputs of what is under way, and its share of all embedded tokens and their gradients.
    A pipeline's wire and memory are stretched by its bubble too, for idle stages send and read as busy ones do.
    """
    c, chip, tokens = config.model, topology.chip, config.data.batch_size * config.data.seq_len
    size, stages = jnp.dtype(c.dtype).itemsize, mesh["pipeline"]
    table = timetable(config.pipeline, stages, config.accumulate)
    numbers, whole = (held(c, sizes) for sizes in (mesh, {**mesh, "fsdp": 1}))
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
    wire = sum(amount / rate_along([axis], mesh, topology) for axis, amount in sent(config, mesh).items())
    memory = (4 * config.accumulate * share + 2 * state) / chip.memory_rate
    seconds = max(flops / chip.flops, wire, memory) / (1 - table.bubble)
    return state + kept + layer, seconds / tokens


def sent(config: RunConfig, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes that a device sends along each axis.

    - Whatever an axis doesn't split has its gradients summed along it, in each microbatch; over stages once, in
      float32, and so over `data` where nothing else splits and rows are apart.
    - `fsdp`: weights are gathered for each microbatch, forward and backward, and their gradients parted.
    - `tensor`: blocks gather the stream twice and part its sums twice, forward and backward, and three times more where
      they are computed again.
    - `context`, as a ring: keys and values go around forward and backward, and their gradients with them and home; on
      the stages of a pipeline once more, where a piece is computed again.
    - `expert`: tokens go to their experts and back, forward, backward, and where they are computed again.
    - `pipeline`: the stream and its gradient go from stage to stage, shares of them to embedding and head.
    """
    c, again = config.model, config.model.remat != "none"
    size, tokens = jnp.dtype(c.dtype).itemsize, config.data.batch_size * config.data.seq_len
    part = {axis: (n - 1) / n for axis, n in mesh.items()}
    each = tokens / math.prod(mesh[axis] for axis in TOKENS) * size
    layers, n, staged = c.n_layers / mesh["pipeline"], mesh["context"], mesh["pipeline"] > 1
    mixtures = layers * sum(layer.moe for layer in c.period) / len(c.period)
    active = 0 if c.experts is None else c.experts.active
    own = {
        "fsdp": 3 * config.accumulate * held(c, {**mesh, "fsdp": 1}) * size * part["fsdp"],
        "tensor": (8 + 3 * again) * part["tensor"] * layers * each * c.d_model,
        "context": ((3 + staged) * (n - 1) + (n > 1)) * layers * each * 2 * c.K * c.H / mesh["tensor"],
        "expert": 2 * (2 + again) * part["expert"] * mixtures * each * c.d_model * active * ROOM,
        "pipeline": (2 + 4 * part["pipeline"]) * staged * config.pipeline.chunks * each * c.d_model,
    }
    alone = mesh["data"] == math.prod(mesh.values())
    once = ["pipeline"] + ["data"] * (config.accumulate > 1 and alone and rows_apart(c))
    times = dict.fromkeys(mesh, config.accumulate * size) | dict.fromkeys(once, 4)
    return {axis: 2 * part[axis] * held(c, mesh, besides=axis) * times[axis] + own.get(axis, 0) for axis in mesh}


def held(c: ModelConfig, mesh: Mapping[str, int], besides: str = "") -> float:
    """Numbers of the parameters on a device, of those that are not split along the axis `besides`."""
    parts = {axes: n for axes, n in parameters(c).items() if besides not in axes}
    return math.fsum(n / math.prod(mesh[axis] for axis in axes) for axes, n in parts.items())


@functools.cache
def parameters(c: ModelConfig) -> Mapping[tuple[str, ...], int]:
    return numbers_by_axes(shapes(c))


@functools.cache
def timetable(config: PipelineConfig, stages: int, microbatches: int) -> Timetable:
    return Timetable(config, stages, microbatches)


@functools.cache
def kept_a_row(config: RunConfig) -> int:
    """Bytes that the backward pass holds, under the rematerialization of `config`, whose batch is one row."""
    computed = jax.eval_shape(functools.partial(cast, dtype=config.model.dtype), shapes(config.model))
    return residual_bytes(config, computed, jax.ShapeDtypeStruct((1, config.data.seq_len), jnp.int32))
