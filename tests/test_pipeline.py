"""A pipeline gives what one device gives, whatever the schedule and whatever else the mesh splits."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import tiny, tokens, weights
from tiny_run import tiny as tiny_run

from llm_jax.data.loader import Batch
from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts
from llm_jax.ops.loss import IGNORE
from llm_jax.sharding import MeshConfig, batch_sharding, make_mesh, shardings
from llm_jax.train.config import RunConfig
from llm_jax.train.pipeline import Pipeline
from llm_jax.train.program import Program
from llm_jax.train.step import LossConfig, Scored, make_gradient, make_loss
from llm_jax.train.timetable import PipelineConfig, Timetable
from llm_jax.tree import leaves

ROWS, L, M = 16, 8, 4
# Everything that a stage has to get right: layers of two kinds, experts, noise of its own for each layer and
# microbatch, documents in one row, microbatches with different numbers of targets.
MIXED = tiny(
    vocab_size=16,
    n_layers=8,
    n_kv_heads=2,
    layers=("local", "global+moe"),
    attention=AttentionConfig(window=3),
    experts=Experts(number=4, d_ff=8),
    positions="learned",
    dropout=0.2,
)
LOSS = LossConfig(z_loss=0.1, label_smoothing=0.1, chunk=4)
PLAIN = tiny(vocab_size=16, n_layers=8, n_kv_heads=2)


@functools.cache
def batch() -> Batch:
    segments = np.broadcast_to(1 + (np.arange(L) >= 5), (ROWS, L)).astype(np.int32)
    counted = np.arange(L)[None] < np.arange(ROWS)[:, None] % 9
    targets = np.where(counted, tokens(ROWS, L), IGNORE).astype(np.int32)
    positions = np.where(segments == 1, np.arange(L), np.arange(L) - 5).astype(np.int32)
    return Batch(np.asarray(tokens(ROWS, L)), targets, segments, positions)


@functools.cache
def one_device(config: ModelConfig, loss: LossConfig) -> Any:
    """((loss, sums), gradients) without a pipeline."""
    gradient = make_gradient(make_loss(Transformer(config), loss), M)
    return jax.device_get(jax.jit(gradient)(weights(config), jax.tree.map(jnp.asarray, batch()), jax.random.key(3)))


def pipelined(config: ModelConfig, loss: LossConfig, pipeline: PipelineConfig, mesh: MeshConfig) -> Any:
    devices = make_mesh(mesh, jax.devices()[: math.prod(dataclasses.astuple(mesh))])
    run = Pipeline(Transformer(config), loss, Timetable(pipeline, mesh.pipeline, M)).gradient
    params = jax.device_put(weights(config), shardings(weights(config), devices))
    with jax.set_mesh(devices):
        return jax.device_get(jax.jit(run)(params, jax.device_put(batch(), batch_sharding(devices)), jax.random.key(3)))


def check(found: Any, expected: Any) -> None:
    """Equal up to the order of sums in float32: the distance of each leaf, over its size."""
    expected = leaves(expected)
    assert leaves(found).keys() == expected.keys()
    far = {path: np.linalg.norm(leaf - expected[path]) for path, leaf in leaves(found).items()}
    far = {path: distance / np.linalg.norm(expected[path]) for path, distance in far.items()}
    assert max(far.values()) < 1e-5, far


def test_loss_and_gradient_are_those_of_one_device():
    check(pipelined(PLAIN, LOSS, PipelineConfig("1f1b"), MeshConfig(pipeline=2, data=1)), one_device(PLAIN, LOSS))


@pytest.mark.slow
def test_loss_gradient_and_the_use_of_experts_are_those_of_one_device():
    found = pipelined(MIXED, LOSS, PipelineConfig("1f1b", 2), MeshConfig(pipeline=2, data=1))
    check(found, one_device(MIXED, LOSS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "pipeline", "mesh"),
    [
        (PLAIN, PipelineConfig("gpipe"), MeshConfig(pipeline=4, data=1)),
        (PLAIN, PipelineConfig("1f1b"), MeshConfig(pipeline=4, data=2)),
        (PLAIN, PipelineConfig("1f1b", 2), MeshConfig(pipeline=4, data=1, fsdp=2)),
        (PLAIN, PipelineConfig("gpipe", 2), MeshConfig(pipeline=2, data=1, tensor=2)),
        (PLAIN, PipelineConfig("1f1b"), MeshConfig(pipeline=2, data=1, fsdp=2, tensor=2)),
        (dataclasses.replace(PLAIN, residual="post", remat="full"), PipelineConfig(), MeshConfig(pipeline=2, data=1)),
        (MIXED, PipelineConfig("1f1b"), MeshConfig(pipeline=2, data=2, fsdp=2)),
        (dataclasses.replace(MIXED, tied=False), PipelineConfig("gpipe"), MeshConfig(pipeline=2, data=1, tensor=2)),
        (MIXED, PipelineConfig("1f1b"), MeshConfig(pipeline=2, data=1, expert=4)),
        (MIXED, PipelineConfig("1f1b"), MeshConfig(pipeline=2, data=1, expert=2, tensor=2)),
    ],
    ids=range(10),
)
def test_every_schedule_agrees_with_one_device_on_every_mesh(config, pipeline, mesh):
    for loss in (LossConfig(), LOSS)[config is MIXED :]:
        check(pipelined(config, loss, pipeline, mesh), one_device(config, loss))


def run_of(mesh: MeshConfig, model: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    config = tiny_run(Path("nowhere"), mesh=mesh, accumulate=4, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **{"n_layers": 4, **(model or {})}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "pipeline"),
    [
        (MeshConfig(pipeline=4, data=1), PipelineConfig("gpipe")),
        (MeshConfig(pipeline=2, data=2, fsdp=2), PipelineConfig("1f1b")),
        (MeshConfig(pipeline=2, data=1, tensor=2), PipelineConfig("1f1b", 2)),
    ],
    ids=str,
)
def test_twenty_steps_and_a_score_are_those_of_one_device(mesh: MeshConfig, pipeline: PipelineConfig):
    draw = np.random.default_rng(0).integers(256, size=(21, 16, 33)).astype(np.int32)
    *batches, last = [Batch(rows[:, :-1], rows[:, 1:], None, None) for rows in draw]

    def trained(mesh: MeshConfig) -> tuple[list[tuple[float, float]], Scored]:
        config = run_of(mesh, pipeline=pipeline, steps=20)
        program = Program(config, make_mesh(mesh, jax.devices()[: math.prod(dataclasses.astuple(mesh))]))
        state, curve = program.init(), []
        for batch in batches:
            state, metrics = program.train_step(state, batch)
            curve.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return curve, program.score(state.params, last)

    (found, score), (expected, their_score) = trained(mesh), trained(MeshConfig(data=1))
    np.testing.assert_allclose(found, expected, rtol=5e-5)
    np.testing.assert_allclose(score.nll, their_score.nll, rtol=1e-3)
    assert (score.likeliest == their_score.likeliest).mean() > 0.99


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"n_layers": 6}, {}, r"model.n_layers=6 .*mesh.pipeline=4 x pipeline.chunks=1 = 4; use model.n_layers=4 or 8"),
        (
            {"n_layers": 10, "layers": ("global", "nope")},
            {"pipeline": PipelineConfig(chunks=2)},
            r"=10 .*=4 x pipeline.chunks=2 x 2 layers of model.layers = 16; use model.n_layers=16",
        ),
        ({}, {"accumulate": 2}, "accumulate=2 .*use accumulate=4"),
    ],
    ids=str,
)
def test_what_does_not_fit_on_the_stages_is_refused_with_what_does(model, changes, message):
    config = dataclasses.replace(run_of(MeshConfig(pipeline=4), model), **changes)
    with pytest.raises(ValueError, match=message):
        Program.on(config)


def test_rows_that_do_not_divide_over_the_stages_are_refused():
    config = run_of(MeshConfig(pipeline=4))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=30))
    with pytest.raises(ValueError, match=r"data.seq_len=30 .*mesh.pipeline=4 .*use data.seq_len=28 or 32"):
        Program.on(config)


def test_chunks_without_stages_are_refused():
    with pytest.raises(ValueError, match=r"set mesh.pipeline"):
        Program.on(tiny_run(Path("nowhere"), pipeline=PipelineConfig(chunks=2)))


def test_a_stage_holds_its_own_layers_and_their_moments():
    state = Program.on(run_of(MeshConfig(pipeline=4))).abstract_state
    found = {path: leaf for path, leaf in leaves(state).items() if "layers/" in path and leaf.size > 1}
    assert len(found) > 10
    assert all(leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] // 4 for leaf in found.values())
