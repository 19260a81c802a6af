"""How a config fits on a mesh: which sizes must divide which, and the token order of rows that devices share."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from llm_jax.data.loader import Batch
from llm_jax.model.config import SOFTMAX, ModelConfig, is_own, own_layers, own_mixer
from llm_jax.model.transformer import Transformer
from llm_jax.ops.attention import Dropout, attention
from llm_jax.ops.mask import Mask
from llm_jax.ops.ring import zigzag_order
from llm_jax.sharding import ROWS, row_shards
from llm_jax.train.config import PipelineConfig, RunConfig
from llm_jax.train.pipeline import Pipeline
from llm_jax.train.timetable import Timetable


@functools.cache
def context_model(model: ModelConfig, context: int) -> ModelConfig:
    """Return the model for rows split over `context` devices: its attention is `zigzag` unless the config names one."""
    if context == 1:
        return model
    named = dataclasses.replace(model.attention, implementation=model.attention.implementation or "zigzag")
    return dataclasses.replace(model, attention=named)


def token_order(model: ModelConfig, L: int, context: int) -> Int[np.ndarray, " L"] | None:
    """Return which token of a row comes at each index, for the `context_model`; None: the usual order."""
    zigzag = context > 1 and context_model(model, context).attention.implementation == "zigzag"
    return zigzag_order(L, context) if zigzag else None


def reorder(batch: Batch, order: Int[np.ndarray, " L"]) -> Batch:
    """Return `batch` with its tokens in `order`, and positions that say where each belongs."""
    if batch.positions is None:
        positions = np.broadcast_to(np.arange(len(order), dtype=np.int32), batch.tokens.shape)
        batch = dataclasses.replace(batch, positions=positions)
    return jax.tree.map(lambda x: x[:, order], batch)


def check_mesh(config: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise `ValueError`, with the nearest value that works, where `config` can't be split over `mesh`.

    The devices need not exist. Nothing is traced, so this takes no time. `shardings` checks widths, and
    `check_attention` attention.
    """
    _check_rows(config, mesh)
    _check_own_layers(config.model, mesh)
    _check_experts(config.model, mesh.shape["expert"])
    _check_tokens(config, mesh)
    _check_stages(config, mesh.shape["pipeline"])


def _check_rows(config: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    size, accumulate, shards = config.data.batch_size, config.accumulate, row_shards(mesh)
    rows, least = size // accumulate, shards * accumulate
    if size % least:
        raise ValueError(
            f"a microbatch of {rows} rows (data.batch_size={size} / accumulate={accumulate}) does not divide over "
            f"{' x '.join(ROWS)} = {shards} devices; use data.batch_size={-(-size // least) * least}"
        )


def _check_own_layers(model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise `ValueError` for a mixer of the user's own on a mesh axis that it does not declare."""
    for path in own_layers(model):
        axes = own_mixer(path).axes
        for axis, size in mesh.shape.items():
            if size > 1 and axis not in axes:
                raise ValueError(
                    f"mesh.{axis}={size}, but layers of {path} are correct on the mesh axes {', '.join(axes)} alone; "
                    f"set mesh.{axis}=1, or add {axis!r} to its `axes` once it is correct there too"
                )


def _check_experts(model: ModelConfig, devices: int) -> None:
    experts = model.experts
    if experts is None and devices > 1:
        raise ValueError(
            f"mesh.expert={devices} has no experts to split; set mesh.expert=1, and mesh.data {devices} times as large"
        )
    if experts is not None and experts.number % devices:
        below = math.gcd(experts.number, devices)
        raise ValueError(
            f"model.experts.number={experts.number} does not divide over mesh.expert={devices}; use "
            f"mesh.expert={below} or model.experts.number={-(-experts.number // devices) * devices}"
        )


def _check_tokens(config: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    n, t, p = (mesh.shape[axis] for axis in ("context", "tensor", "pipeline"))
    model = context_model(config.model, n)
    L, chunk, how, heads = config.data.seq_len, config.loss.chunk, model.attention.implementation, model.K
    least = math.lcm(n * t * p, 2 * n if how == "zigzag" else 1)
    if heads % t:
        raise ValueError(
            f"{heads} key/value heads do not divide over mesh.tensor={t}; use mesh.tensor="
            f"{math.gcd(heads, t)} or model.n_kv_heads={heads + -heads % t}"
        )
    if L % least:
        twice = ", each with two slices of it by zigzag" if least > n * t * p else ""
        raise ValueError(
            f"data.seq_len={L} does not divide over mesh.context={n} x mesh.tensor={t} x mesh.pipeline={p} = "
            f"{n * t * p} devices, which share a row{twice}; use data.seq_len={_nearest(L, least)}"
        )
    if chunk is not None and chunk % (n * t):
        raise ValueError(
            f"loss.chunk={chunk} does not divide over mesh.context={n} x mesh.tensor={t} = {n * t} devices; use "
            f"loss.chunk={_nearest(chunk, n * t)}"
        )
    others = sorted(mixer for mixer in {layer.mixer for layer in model.period} - {*SOFTMAX} if not is_own(mixer))
    if n > 1 and others:
        raise ValueError(
            f"{' and '.join(others)} layers read a row from end to end, and mesh.context={n} splits it; use "
            "mesh.context=1, with more of mesh.fsdp or mesh.tensor"
        )


def _check_stages(config: RunConfig, stages: int) -> None:
    if stages == 1:
        if config.pipeline != PipelineConfig():
            raise ValueError(f"{config.pipeline} has no stages to run on; set mesh.pipeline to their number")
        return
    timetable = Timetable(config.pipeline, stages, config.accumulate)  # these two raise for what they can't do
    Pipeline(Transformer(config.model), config.loss, timetable)
    if config.model.remat == "offload":
        raise ValueError(
            f"model.remat=offload keeps the inputs of layers on the host, and mesh.pipeline={stages} saves those of "
            "stages anyway; set model.remat=full or mesh.pipeline=1"
        )
    if config.offload != "none":
        raise ValueError(
            f"offload={config.offload} copies one layer after another from the host, and mesh.pipeline={stages} "
            "computes several at a time; set offload=none or mesh.pipeline=1"
        )


def check_attention(config: RunConfig, mesh: Mesh) -> None:
    """Raise `ValueError` where attention declines split rows, or dropout. It is traced, which takes time."""
    context, rate = mesh.shape["context"], config.model.attention.dropout
    if context == 1 and not rate:
        return
    model = config.model if context == 1 else context_model(config.model, context)
    shape = row_shards(mesh), config.data.seq_len, model.K
    q, k = (jax.ShapeDtypeStruct((*shape, *x, model.H), model.dtype) for x in ((model.G,), ()))
    choice = {"scores": model.scores, "implementation": model.attention.implementation}

    def attend(q: Array, k: Array) -> Array:
        return attention(q, k, k, Mask(), dropout=Dropout(jax.random.key(0), rate) if rate else None, **choice)

    with jax.set_mesh(mesh):
        jax.eval_shape(attend, q, k)


def _nearest(size: int, least: int) -> str:
    """Name the multiples of `least` around `size`."""
    below = size // least * least
    return " or ".join(str(multiple) for multiple in (below, below + least) if multiple)
