"""Collectives by letters: each device gets its shard, sends what it must, and without a mesh nothing happens."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llm_jax.ops.collectives import (
    all_gather,
    all_gather_tokens,
    auto_axis_size,
    manual_axes,
    manual_axis_size,
    psum,
    reduce_scatter_tokens,
    shard_map_by_letters,
)
from llm_jax.plan import hlo
from llm_jax.sharding import PARAMETER_AXES, TOKENS, MeshConfig, make_mesh, spec

EVERY = MeshConfig(data=1, fsdp=2, context=2, tensor=2)


def traced(function: Callable[..., Any], *arrays: jax.Array, mesh: MeshConfig = EVERY) -> None:
    with jax.set_mesh(make_mesh(mesh)):
        jax.eval_shape(function, *arrays)


def test_a_device_sees_its_shard_and_the_axes_that_split_it_are_manual():
    def own(x: jax.Array, w: jax.Array, table: jax.Array) -> jax.Array:
        assert (x.shape, w.shape, table.shape) == ((2, 3, 6), (6, 4), (4, 3))
        assert {"fsdp", "context", "tensor"} < manual_axes()
        assert [manual_axis_size(axis) for axis in ("fsdp", "tensor", "expert")] == [2, 2, 1]
        assert auto_axis_size("tensor") == 1
        return x @ w

    def run(x: jax.Array, w: jax.Array, table: jax.Array) -> jax.Array:
        assert not manual_axes()
        assert [auto_axis_size(axis) for axis in ("fsdp", "tensor", "expert", "nothing")] == [2, 2, 1, 1]
        assert manual_axis_size("tensor") == 1
        return shard_map_by_letters(own, "BSD DF *VD BSF", x, w, table)

    traced(run, jnp.ones((4, 6, 6)), jnp.ones((6, 8)), jnp.ones((8, 6)))


def test_axes_that_are_not_named_by_over_stay_with_the_compiler():
    def own(x: jax.Array) -> jax.Array:
        assert x.shape == (2, 6, 8)
        assert manual_axes() == {"fsdp"}
        assert auto_axis_size("tensor") == 2
        return x

    traced(lambda x: shard_map_by_letters(own, "BLF BLF", x, over=("data", "fsdp")), jnp.ones((4, 6, 8)))


def test_without_a_mesh_every_collective_returns_what_it_is_given():
    x = jnp.ones((2, 4, 6))
    assert shard_map_by_letters(lambda x: psum(x, "tensor"), "BLD BLD", x) is x
    assert all_gather(x, "NVD") is all_gather_tokens(x) is reduce_scatter_tokens(x) is x


def test_a_gathered_parameter_is_whole_and_its_gradient_a_shard_of_the_sum():
    table, x = jnp.arange(48.0).reshape(8, 6), jnp.arange(24.0).reshape(4, 6)

    def loss(table: jax.Array, x: jax.Array) -> jax.Array:
        def own(x: jax.Array, table: jax.Array) -> jax.Array:
            return x @ all_gather(table, "VD").T

        return shard_map_by_letters(own, "BD *VD BX", x, table, over=("data", "fsdp")).sum()

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(table, x).compile()
        value, gradient = compiled(table, x)
    np.testing.assert_allclose(value, (x @ table.T).sum())
    np.testing.assert_allclose(gradient, np.broadcast_to(x.sum(0), table.shape))


@pytest.mark.parametrize(
    ("function", "shardings"),
    [
        (all_gather_tokens, ['{"context", "tensor"}', '{"context"}']),
        (reduce_scatter_tokens, ['{"context"}', '{"context", "tensor"}']),
    ],
)
def test_tokens_are_gathered_or_scattered_over_tensor(function: Callable, shardings: list[str]):
    with jax.set_mesh(make_mesh(EVERY)):
        text = jax.jit(function).lower(jnp.ones((2, 4, 6))).as_text()
    found = re.findall(r"sharding_constraint .*@mesh, \[\{.*?\}, (\{.*?\}), \{\}\]>", text)
    assert found == shardings


def test_the_gradient_of_a_sum_over_devices_sends_nothing():
    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        return (shard_map_by_letters(lambda x: psum(x.sum(0), "tensor"), "FD D", x) * weights).sum()

    x, weights = jnp.ones((4, 3)), jnp.array([1.0, 2, 3])
    with jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])):
        compiled = jax.jit(jax.grad(loss)).lower(x, weights).compile()
        gradient = compiled(x, weights)
    np.testing.assert_array_equal(gradient, np.broadcast_to(weights, x.shape))
    assert "replica_groups={{0,1}}" not in str(compiled.as_text())


def test_a_gather_over_one_axis_sends_nothing_along_another():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    split = NamedSharding(mesh, spec("VD", PARAMETER_AXES))
    table = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)

    def product(table: jax.Array) -> jax.Array:
        gathered = shard_map_by_letters(lambda table: all_gather(table, "VD"), "*VD V_", table, over=TOKENS)
        return jnp.square(gathered).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(product), out_shardings=split).lower(table).compile().as_text()
    sent = hlo.totals(hlo.collectives(hlo.parse(text or ""), mesh.shape))
    assert {axes for _, axes in sent} == {"fsdp"}
    assert sent["all-gather", "fsdp"] == (1, 4 * 64 * 32 / 4)
