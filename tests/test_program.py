"""The program of a config: the same numbers on every mesh, and compiled once."""

import dataclasses
import functools
import logging
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from arrays import first_batches
from tiny_run import tiny

from llm_jax import tree
from llm_jax.config import override
from llm_jax.data.loader import Batch
from llm_jax.model.config import AttentionConfig
from llm_jax.ops.experts import Experts
from llm_jax.ops.mask import Sparse
from llm_jax.runs.checkpoint import Checkpoints, Progress
from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program
from llm_jax.train.step import LossConfig, Scored, TrainState

ONE = MeshConfig(data=1)
DATA = MeshConfig(data=8)
FSDP = MeshConfig(data=1, fsdp=8)
DATA_FSDP = MeshConfig(data=2, fsdp=4)
DATA_TENSOR = MeshConfig(data=4, tensor=2)
TENSOR = MeshConfig(data=1, tensor=2)
FSDP_TENSOR = MeshConfig(data=1, fsdp=4, tensor=2)
ALL_THREE = MeshConfig(data=2, fsdp=2, tensor=2)
CONTEXT = MeshConfig(data=1, context=4)
CONTEXT_TENSOR = MeshConfig(data=2, context=2, tensor=2)
CONTEXT_FSDP_TENSOR = MeshConfig(data=1, fsdp=2, context=2, tensor=2)


@pytest.fixture(scope="module")
def batches(config: RunConfig) -> list[Batch]:
    return first_batches(config, 3)


def trained(
    program: Program, batches: list[Batch], state: TrainState | None = None
) -> tuple[TrainState, list[tuple[float, float]]]:
    """The state after `batches`, and each step's loss and gradient norm."""
    state, curve = state or program.init(), []
    for batch in batches:
        state, metrics = program.train_step(state, batch)
        curve.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return state, curve


@pytest.fixture(scope="module")
def one_device(config: RunConfig, batches: list[Batch]) -> list[tuple[float, float]]:
    return trained(on(config, ONE), batches)[1]


@functools.lru_cache(maxsize=8)
def on(config: RunConfig, mesh: MeshConfig) -> Program:
    """The program of `config` on as many devices as `mesh` has; the tests of a layout share it."""
    sizes = dataclasses.astuple(mesh)
    return Program(config, make_mesh(mesh, jax.devices()[: math.prod(sizes)]))


@pytest.mark.parametrize(
    ("mesh", "another"),
    [
        (DATA_FSDP, DATA_TENSOR),
        pytest.param(CONTEXT_FSDP_TENSOR, CONTEXT, marks=pytest.mark.slow),
        pytest.param(CONTEXT, DATA, marks=pytest.mark.slow),
        pytest.param(CONTEXT_TENSOR, FSDP, marks=pytest.mark.slow),
        pytest.param(DATA_TENSOR, DATA_FSDP, marks=pytest.mark.slow),
        pytest.param(DATA, FSDP, marks=pytest.mark.slow),
        pytest.param(FSDP, DATA, marks=pytest.mark.slow),
        pytest.param(TENSOR, ALL_THREE, marks=pytest.mark.slow),
        pytest.param(ALL_THREE, FSDP_TENSOR, marks=pytest.mark.slow),
        pytest.param(FSDP_TENSOR, DATA, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mesh_trains_as_one_device_does_and_reads_what_another_saved(
    config, batches, one_device, mesh, another, tmp_path
):
    state, curve = trained(on(config, mesh), batches)
    # float32 sums in another order, through three steps of AdamW.
    np.testing.assert_allclose(curve, one_device, rtol=5e-6)

    abstract = on(config, another).abstract_state
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, Progress(step=3))
        checkpoints.wait()
        restored = checkpoints.restore(abstract, print)
    assert restored is not None
    assert tree.fingerprint(restored[0]) == tree.fingerprint(state)
    assert jax.tree.map(lambda x: x.sharding, restored[0]) == jax.tree.map(lambda x: x.sharding, abstract)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [("global+moe",), ("delta", "linear")], ids=str)
def test_experts_and_linear_attention_train_on_a_mesh_as_on_one_device(config: RunConfig, batches, layers):
    experts = Experts(number=4, d_ff=16, shared=1) if "moe" in layers[0] else None
    model = dataclasses.replace(config.model, layers=layers, experts=experts)
    one, mesh = (on(dataclasses.replace(config, model=model), mesh) for mesh in (ONE, ALL_THREE))
    np.testing.assert_allclose(trained(mesh, batches)[1], trained(one, batches)[1], rtol=1e-5)


MIXTURE = Experts(number=8, d_ff=16, shared=1, router_z_loss=0.1)
USE = ("loss", "grad_norm", "balance_loss", "router_z", "expert_busiest", "expert_idle")
EXPERTS = MeshConfig(data=1, expert=8)
EXPERTS_DATA = MeshConfig(data=2, expert=4)
EXPERTS_FSDP = MeshConfig(data=1, fsdp=2, expert=4)
EXPERTS_TENSOR = MeshConfig(data=1, expert=4, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "balance"),
    [(EXPERTS, "bias"), (EXPERTS_DATA, "loss"), (EXPERTS_FSDP, "bias"), (EXPERTS_TENSOR, "loss")],
    ids=str,
)
def test_experts_on_several_devices_train_and_are_used_as_on_one(config: RunConfig, batches, mesh, balance):
    experts = dataclasses.replace(MIXTURE, balance=balance)
    model = dataclasses.replace(config.model, layers=("global+moe",), experts=experts)
    curves = []
    for program in (on(dataclasses.replace(config, model=model), mesh) for mesh in (ONE, mesh)):
        state, curve = program.init(), []
        for batch in batches:
            state, metrics = program.train_step(state, batch)
            curve.append([float(metrics[name]) for name in USE])
        biases = tree.leaves(state.params).get("layers/experts/router_bias")
        curves.append((curve, None if biases is None else np.asarray(biases)))
    (expected, their_biases), (found, biases) = curves
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(biases, their_biases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "positions", "layers", "mesh"),
    [
        ("zigzag", "learned", ("local", "global+moe"), CONTEXT_TENSOR),
        ("zigzag", "alibi", ("global",), CONTEXT_FSDP_TENSOR),
        ("ring", "sinusoidal", ("local",), CONTEXT),
        ("ring", "rotary", ("sparse", "nope"), CONTEXT_TENSOR),
        ("ulysses", "rotary", ("local", "global"), MeshConfig(data=2, fsdp=2, context=2)),
    ],
    ids=str,
)
def test_every_layer_of_a_split_row_knows_where_its_tokens_stand(
    config: RunConfig, batches, how, positions, layers, mesh
):
    attention = AttentionConfig(
        implementation=how,
        window=5 if "local" in layers else None,
        sinks=2 * ("local" in layers),
        sparse=Sparse(block=4, local=1, stride=3) if "sparse" in layers else None,
    )
    experts = Experts(number=4, d_ff=16) if "global+moe" in layers else None
    model = dataclasses.replace(config.model, layers=layers, positions=positions, attention=attention, experts=experts)
    split, one = (dataclasses.replace(config, model=model, loss=LossConfig(chunk=8)) for _ in range(2))
    np.testing.assert_allclose(trained(on(split, mesh), batches)[1], trained(on(one, ONE), batches)[1], rtol=1e-5)


def test_scores_of_a_split_row_come_back_in_its_order(config: RunConfig, batches: list[Batch]):
    split, whole = on(config, CONTEXT), on(config, ONE)
    found, expected = (program.score(program.init().params, batches[0]) for program in (split, whole))
    np.testing.assert_allclose(found.nll, expected.nll, atol=1e-5)
    np.testing.assert_array_equal(found.likeliest, expected.likeliest)


def test_a_second_trace_of_the_train_step_is_an_error(config: RunConfig, batches: list[Batch]):
    program = on(config, DATA_FSDP)
    state, _ = trained(program, batches[:1])
    with pytest.raises(AssertionError, match="traced > 1 times"):
        program.train_step(state, dataclasses.replace(batches[0], segments=None))


def test_each_program_compiles_its_step_once_after_init_or_restore(config, batches, tmp_path, caplog):
    mesh = make_mesh(DATA_FSDP)
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING, logger="jax"):
            state, _ = trained(Program(config, mesh), batches[:2])
            with Checkpoints(tmp_path) as checkpoints:
                checkpoints.save(state, Progress(step=2))
                checkpoints.wait()
                program = Program(config, mesh)
                restored = checkpoints.restore(program.abstract_state, print)
            assert restored is not None
            trained(program, batches[:2], restored[0])
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [line for line in caplog.messages if line.startswith("Compiling jit(train_step)")]
    assert len(compiled) == 2  # one of each program


def test_scoring_in_microbatches_gives_every_row_its_own_losses(config: RunConfig, batches: list[Batch]):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    whole, parts = (Program(dataclasses.replace(config, accumulate=n), mesh) for n in (1, 4))
    params = whole.init().params
    found, expected = parts.score(params, batches[0]), whole.score(params, batches[0])
    np.testing.assert_allclose(found.nll, expected.nll, atol=1e-5)
    np.testing.assert_array_equal(found.likeliest, expected.likeliest)


@pytest.mark.parametrize("packing", ["documents", "windows"])
def test_the_abstract_batch_is_what_the_loader_gives(config: RunConfig, packing: str):
    changed = override(config, [f"data.packing={packing}"])
    given = Program.on(changed).put(first_batches(changed, 1)[0])
    abstract = Program.on(changed).abstract_batch
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), given) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), abstract
    )


def test_a_step_lowered_for_devices_that_are_given_lies_on_these(config: RunConfig):
    program = Program.on(dataclasses.replace(config, mesh=FSDP_TENSOR), jax.devices()[::-1])
    assert program.mesh.devices.flat[0] == jax.devices()[7]
    assert (
        'sdy.mesh @mesh = <["pipeline"=1, "data"=1, "fsdp"=4, "expert"=1, "context"=1, "tensor"=2]'
        in program.lowered().as_text()
    )


def test_dropout_of_the_pattern_that_none_can_do_is_refused_at_the_start(tmp_path: Path):
    config = tiny(tmp_path)
    for words in (["model.attention.implementation=flash"], ["mesh.context=2"]):
        with pytest.raises(ValueError, match=r"model\.attention\.dropout=0\.1"):
            Program.on(override(config, [*words, "model.attention.dropout=0.1"]))


def test_a_batch_that_is_scored_is_checked_once(config: RunConfig, batches, monkeypatch):
    checked: list[int] = []
    monkeypatch.setattr("llm_jax.train.program.check_batch", lambda batch, model, rows, seq_len: checked.append(rows))
    program = Program.on_one_device(config)
    monkeypatch.setattr(Program, "_score", lambda *_: Scored(np.zeros((1, 1), np.float32), np.zeros((1, 1), bool)))
    program.score({}, batches[0])
    assert checked == [config.data.batch_size]
