"""The program of a config: the same numbers on every mesh, and compiled once."""

import dataclasses
import logging
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import tiny

from llm_jax import tree
from llm_jax.config import override
from llm_jax.data.loader import Batch, Loader
from llm_jax.ops.experts import Experts
from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.train.checkpoint import Checkpoints, Progress
from llm_jax.train.loop import open_data
from llm_jax.train.program import Program
from llm_jax.train.run import RunConfig
from llm_jax.train.step import TrainState

DATA = MeshConfig(data=8)
FSDP = MeshConfig(data=1, fsdp=8)
DATA_FSDP = MeshConfig(data=2, fsdp=4)
DATA_TENSOR = MeshConfig(data=4, tensor=2)
TENSOR = MeshConfig(data=1, tensor=2)
FSDP_TENSOR = MeshConfig(data=1, fsdp=4, tensor=2)
ALL_THREE = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def batches(config: RunConfig) -> list[Batch]:
    loader = Loader(open_data(config, print).split("train"), config.data)
    return [loader.batch(step) for step in range(3)]


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
    return trained(Program(config, make_mesh(MeshConfig(), jax.devices()[:1])), batches)[1]


def on(config: RunConfig, mesh: MeshConfig) -> Program:
    sizes = dataclasses.astuple(mesh)
    return Program(config, make_mesh(mesh, jax.devices()[: math.prod(sizes)]))


@pytest.mark.parametrize(
    ("mesh", "another"),
    [
        (DATA_FSDP, DATA_TENSOR),
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
    one, mesh = (on(dataclasses.replace(config, model=model), mesh) for mesh in (MeshConfig(data=1), ALL_THREE))
    np.testing.assert_allclose(trained(mesh, batches)[1], trained(one, batches)[1], rtol=1e-5)


def test_a_microbatch_that_does_not_divide_over_the_devices_is_an_error_with_the_numbers(config: RunConfig):
    message = (
        r"4 rows \(data.batch_size=16 / accumulate=4\) does not divide over data x fsdp = 8 .*use data.batch_size=32"
    )
    with pytest.raises(ValueError, match=message):
        Program.on(tiny(Path("nowhere"), accumulate=4))


def test_a_second_trace_of_the_train_step_is_an_error(config: RunConfig, batches: list[Batch]):
    program = on(config, DATA)
    state, _ = trained(program, batches)
    half = jax.tree.map(lambda x: x[:, :16], batches[0])
    with pytest.raises(AssertionError, match="traced > 1 times"):
        program.train_step(state, half)


def test_each_program_of_a_process_compiles_its_step_once_after_init_or_restore(config, batches, tmp_path, caplog):
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING, logger="jax"):
            state, _ = trained(on(config, DATA_FSDP), batches)
            with Checkpoints(tmp_path) as checkpoints:
                checkpoints.save(state, Progress(step=3))
                checkpoints.wait()
                program = on(config, DATA_FSDP)
                restored = checkpoints.restore(program.abstract_state, print)
            assert restored is not None
            trained(program, batches, restored[0])
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
    given = Program.on(changed).put(Loader(open_data(changed, print).split("train"), changed.data).batch(0))
    abstract = Program.on(changed).abstract_batch
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), given) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), abstract
    )


def test_a_step_lowered_for_devices_that_are_given_lies_on_these(config: RunConfig):
    program = Program.on(dataclasses.replace(config, mesh=FSDP_TENSOR), jax.devices()[::-1])
    assert program.mesh.devices.flat[0] == jax.devices()[7]
    assert 'sdy.mesh @mesh = <["pipeline"=1, "data"=1, "fsdp"=4, "tensor"=2]' in program.lowered().as_text()
