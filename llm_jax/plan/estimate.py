"""What a config would need, send and take on a mesh, by arithmetic alone: in no time, and near enough to order meshes.

What it counts on the wire is what `tests/test_budget.py` finds in compiled programs. A plan takes from here what no
compiled program tells.
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
from llm_jax.model.config import ModelConfig
from llm_jax.model.count import flops_per_token, shapes
from llm_jax.ops.exchange import ROOM
from llm_jax.plan.describe import residual_bytes
from llm_jax.plan.topology import Topology
from llm_jax.sharding import PARAMETER_AXES, TOKENS, MeshConfig, letters_of, spec
from llm_jax.train.config import RunConfig
from llm_jax.train.offload import STACK
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
      float32, and so over `data` where rows are apart.
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
    once = ["pipeline"] + ["data"] * (config.accumulate > 1 and rows_apart(c, mesh))
    times = dict.fromkeys(mesh, config.accumulate * size) | dict.fromkeys(once, 4)
    return {axis: 2 * part[axis] * held(c, mesh, besides=axis) * times[axis] + own.get(axis, 0) for axis in mesh}


def numbers_here(params: PyTree, mesh: Mapping[str, int]) -> float:
    """How many numbers of the parameters a device of `mesh` holds."""
    return _shares(numbers_by_axes(params), mesh)


def numbers_by_axes(params: PyTree) -> Mapping[tuple[str, ...], int]:
    """How many numbers of the parameters are split over which axes of a mesh."""
    found = Counter[tuple[str, ...]]()
    for path, leaf in trees.leaves(params).items():
        axes = spec(letters_of(path, leaf.shape), PARAMETER_AXES)
        found[tuple(axis for axis in axes if axis is not None)] += math.prod(leaf.shape)
    return found


def held(c: ModelConfig, mesh: Mapping[str, int], besides: str = "") -> float:
    """Numbers of the parameters on a device, of those that are not split along the axis `besides`."""
    return _shares({axes: n for axes, n in parameters(c).items() if besides not in axes}, mesh)


def _shares(numbers: Mapping[tuple[str, ...], int], mesh: Mapping[str, int]) -> float:
    return math.fsum(n / math.prod(mesh[axis] for axis in axes) for axes, n in numbers.items())


@functools.cache
def parameters(c: ModelConfig) -> Mapping[tuple[str, ...], int]:
    return numbers_by_axes(shapes(c))


def gradient_bytes(config: RunConfig, mesh: Mapping[str, int]) -> int:
    """Of a number: sums over microbatches are of float32, as parameters are."""
    return 4 if config.accumulate > 1 or mesh["pipeline"] > 1 else jnp.dtype(config.model.dtype).itemsize


def flops_a_token(config: RunConfig, mesh: Mapping[str, int]) -> dict[str, float]:
    """FLOPs of a training step a token: of the model, and with the forward passes that are computed again.

    Rematerialization computes a block again, all but what it keeps: `dots` keeps the matrix products, and named taps
    are counted as if they spared nothing. A chunked loss computes the logits again, a pipeline its layers.
    """
    c, model = config.model, flops_per_token(config.model, config.data.seq_len)
    head = 6 * math.prod(shapes(c)[c.head]["table"].shape)
    again = (model - head) / 3 * (c.remat not in ("none", "dots")) + head / 3 * (config.loss.chunk is not None)
    again += (model - head) / 3 * (mesh["pipeline"] > 1)
    return {"model": float(model), "with recomputation": float(model + again)}


def rate_along(axes: Sequence[str], mesh: Mapping[str, int], topology: Topology) -> float:
    """Bytes a second that a device sends along `axes`; from one slice or node to another by their network."""
    names, sizes = list(mesh), list(mesh.values())
    far = any(mesh[axis] > 1 and math.prod(sizes[names.index(axis) :]) > topology.island for axis in axes)
    return topology.chip.between if far else topology.chip.wire


@functools.cache
def timetable(config: PipelineConfig, stages: int, microbatches: int) -> Timetable:
    return Timetable(config, stages, microbatches)


@functools.cache
def kept_a_row(config: RunConfig) -> int:
    """Bytes that the backward pass holds, under the rematerialization of `config`, whose batch is one row."""
    computed = jax.eval_shape(functools.partial(cast, dtype=config.model.dtype), shapes(config.model))
    return residual_bytes(config, computed, jax.ShapeDtypeStruct((1, config.data.seq_len), jnp.int32))
