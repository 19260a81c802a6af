"""State that waits in the host's memory trains as state on the device does, and leaves room there."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import first_batches
from grid import tiny as tiny_model
from grid import weights
from jax.sharding import NamedSharding, PartitionSpec
from tiny_run import tiny

from llm_jax import runtime, tree
from llm_jax.config import override
from llm_jax.data.loader import Batch
from llm_jax.ops.experts import Experts
from llm_jax.plan.memory import memory
from llm_jax.plan.plan import bytes_here, plan
from llm_jax.plan.topology import parse_topology
from llm_jax.runs.checkpoint import Checkpoints, Progress
from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.train.config import RunConfig
from llm_jax.train.offload import HOST, host_shardings, update_layers
from llm_jax.train.optimizer import OptimizerConfig, make_optimizer
from llm_jax.train.program import Program
from llm_jax.train.step import TrainState, make_train_step
from llm_jax.train.update import make_update

MESH = MeshConfig(data=1, fsdp=2)


@pytest.fixture(scope="module")
def batches(config: RunConfig) -> list[Batch]:
    return first_batches(config, 2)


def on_two(config: RunConfig) -> Program:
    return Program(config, make_mesh(MESH, jax.devices()[:2]))


def trained(program: Program, batches: list[Batch]) -> tuple[TrainState, list[float]]:
    state, losses = program.init(), []
    for batch in batches:
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def on_host(state: TrainState) -> set[str]:
    """The leaves of a state, of the optimizer's too, that wait on the host."""
    return {path for path, leaf in tree.leaves(state).items() if leaf.sharding.memory_kind == HOST}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("offload=state",), marks=pytest.mark.slow),
        pytest.param(("offload=optimizer", "optimizer.name=lion"), marks=pytest.mark.slow),
        pytest.param(("offload=optimizer", "optimizer.name=muon", "model.dtype=bfloat16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_state_on_the_host_trains_as_on_the_device_and_resumes_on_either(config: RunConfig, batches, tmp_path, words):
    waiting = override(config, words)
    plain, waiting = on_two(override(waiting, ["offload=none"])), on_two(waiting)
    (found, losses), (expected, their_losses) = (trained(program, batches) for program in (waiting, plain))
    np.testing.assert_allclose(losses, their_losses, rtol=1e-6)
    for path, x in tree.leaves(expected).items():  # the compiler fuses otherwise, and rounds otherwise
        np.testing.assert_allclose(tree.leaves(found)[path], x, rtol=1e-4, atol=1e-6, err_msg=path)

    away, before = on_host(found), tree.fingerprint(found)
    wanted = {"params", "opt_state"} if "offload=state" in words else {"opt_state"}
    assert {path.partition("/")[0] for path in away} == wanted
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(found, Progress(step=2))
        waiting.train_step(found, batches[0])  # which takes the buffers while they may still be written
        checkpoints.wait()
        for program in (waiting, plain):
            restored = checkpoints.restore(program.abstract_state, print)
            assert restored is not None
            assert tree.fingerprint(restored[0]) == before
            assert on_host(restored[0]) == (away if program is waiting else set())


def test_matrices_of_layers_wait_and_nothing_else_does():
    state = on_two(tiny(Path("nowhere"), offload="state")).abstract_state
    waiting = on_host(state)
    assert {path for path in waiting if path.startswith("params")} == {
        f"params/layers/{name}"
        for name in (
            *(f"attention/w_{letter}" for letter in "qkvo"),
            *(f"feedforward/w_{name}" for name in ("up", "gate", "down")),
        )
    }
    assert len(waiting) == 3 * 7
    plain = on_two(tiny(Path("nowhere"))).abstract_state
    assert bytes_here(state) + bytes_here(state, host=True) == bytes_here(plain)
    assert bytes_here(state, host=True) > bytes_here(plain) / 4


@pytest.mark.parametrize("name", ["adamw", "lion", pytest.param("muon", marks=pytest.mark.slow)])
def test_layers_one_after_the_other_are_updated_as_all_at_once(name: Any):
    """A period of two and a layer more, moments that have seen a step, and a gradient that is clipped."""
    c = tiny_model(layers=("global", "nope+moe"), n_layers=5, experts=Experts(number=2, d_ff=8))
    params, optimizer = weights(c), make_optimizer(OptimizerConfig(name=name, clip=0.1))
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    norm = optax.tree.norm(gradients)

    def advance(params: Any, opt_state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(gradients, opt_state, params, norm=norm)
        return optax.apply_updates(params, updates), opt_state

    at_once = jax.jit(advance)
    expected = at_once(*at_once(params, optimizer.init(params), gradients), gradients)
    on_device = jax.tree.map(lambda x: x.sharding, expected)
    away = jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), params["layers"])
    given = params | {"layers": away}, optimizer.init(params), gradients
    step = jax.jit(lambda *given: update_layers(advance, *given), out_shardings=on_device)
    found = step(*step(*given), gradients)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, x in tree.leaves(expected).items():
        np.testing.assert_allclose(tree.leaves(found)[path], x, rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_layer_whose_update_overflows_keeps_all_others_as_they_were():
    """One of three layers that wait: neither those before it, nor the embedding, nor the count of updates moves."""
    over = optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.where(abs(x) > 100, x * 1e38 * 1e38, x), g))
    rule = optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda _: -1.0), over)
    params = {"embedding": jnp.ones(2), "layers": {"w_x": jnp.ones((3, 2)), "scale": jnp.ones((3, 2))}}

    def slopes(params: Any, batch: Batch, key: jax.Array) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
        found = jax.tree.map(jnp.ones_like, params)
        found["layers"]["w_x"] = found["layers"]["w_x"].at[1].set(batch.tokens[0, 0].astype(jnp.float32))
        return (jnp.float32(1), {}), found

    ids = jnp.ones((1, 4), jnp.int32)
    state = TrainState(jnp.int32(0), params, rule.init(params))
    here = NamedSharding(make_mesh(MeshConfig(), jax.devices()[:1]), PartitionSpec())
    wanted = jax.tree.map(lambda _: here, state)
    wanted = wanted.replace(params=host_shardings(wanted.params), opt_state=host_shardings(wanted.opt_state))
    state = jax.device_put(state, wanted)
    step = jax.jit(
        make_train_step(slopes, make_update(rule), optax.constant_schedule(0.1)), out_shardings=(wanted, None)
    )
    for number, skipped in ((1, 0), (1000, 1)):
        after, metrics = step(state, Batch(ids * number, ids))
        assert on_host(after) == on_host(state) == {"params/layers/w_x", "opt_state/0/trace/layers/w_x"}
        assert int(metrics["skipped"]) == skipped
        moved = {
            path
            for path, x in tree.leaves(after).items()
            if (np.asarray(x) != np.asarray(tree.leaves(state)[path])).any()
        }
        assert moved == ({"step"} if skipped else set(tree.leaves(state)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["offload=state", "mesh.pipeline=2"],
            "offload=state copies one layer after another .* mesh.pipeline=2 .* or ",
        ),
        (["model.remat=offload", "mesh.pipeline=2"], "saves those of stages anyway; set model.remat=full or"),
        (["offload=state", "optimizer.name=adafactor"], "adafactor's state, which is small, .*; use offload=none"),
    ],
    ids=["pipeline", "streams of a pipeline", "adafactor"],
)
def test_what_can_not_be_brought_a_layer_at_a_time_is_refused(changes: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        Program.on(override(tiny(Path("nowhere")), changes))


def test_block_inputs_on_the_host_leave_gradients_as_they_were(config: RunConfig, batches):
    full, away = (override(config, ["accumulate=1", f"model.remat={how}"]) for how in ("full", "offload"))
    programs = map(Program.on_one_device, (full, away))
    gradients = [program.gradient(program.init().params, batches[0])[1] for program in programs]
    for path, x in tree.leaves(gradients[0]).items():
        np.testing.assert_allclose(tree.leaves(gradients[1])[path], x, rtol=1e-5, atol=1e-6, err_msg=path)
    c = config.model
    streams = 4 * c.n_layers * config.data.batch_size * config.data.seq_len * c.d_model
    assert memory(full).kept - memory(away).kept == streams


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPU is not installed")
def test_a_tpu_holds_less_by_what_waits_on_the_host(tmp_path):
    topology = parse_topology("v5e:2x2")
    runtime.start(topology=topology)
    widths = ["model.d_model=1024", "model.n_heads=8", "model.d_ff=4096", "model.n_layers=8", "model.dtype=bfloat16"]
    tokens = ["data.seq_len=512", "model.max_seq_len=512", "accumulate=1", "model.remat=full", "model.dropout=0"]
    config = override(tiny(Path("nowhere")), ["mesh.data=1", "mesh.fsdp=4", *tokens, *widths])
    full, away = (
        plan(override(config, words), topology, folder=tmp_path)
        for words in ([], ["offload=state", "model.remat=offload"])
    )
    streams = 2 * 8 * 4 * 512 * 1024
    assert away.host > 0.9 * full.arguments
    assert full.arguments - away.arguments == pytest.approx(away.host, rel=0.05)
    # Besides a layer of the state there is less at once than the streams leave, and their gaps.
    assert full.needed - away.needed > 0.9 * (away.host + streams)
    assert full.peak - away.peak > 0.9 * (away.host + streams)
