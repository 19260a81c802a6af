"""What is written for speed is the identity or the sum that it says, forward and backward."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from jax.sharding import NamedSharding

from llm_jax.ops.gradient import add_bias, embed, gradient_after, linear, lookup, over_tokens, settle
from llm_jax.sharding import PARAMETER_AXES, MeshConfig, constrain, make_mesh, spec

X = normal(2, 5, 3, 4)


def test_settling_changes_neither_a_value_nor_its_gradient():
    value, pull = jax.vjp(jax.jit(lambda x: jnp.sin(settle(x))), X)
    np.testing.assert_array_equal(value, jnp.sin(X))
    np.testing.assert_allclose(pull(X)[0], jnp.cos(X) * X, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_is_added_to_every_token_and_its_gradient_is_their_sum(dtype: str):
    x, bias = X.astype(dtype), X[0, 0].astype(dtype)
    value, (to_x, to_bias) = (lambda pair: (pair[0], pair[1](x)))(jax.vjp(add_bias, x, bias))
    np.testing.assert_array_equal(value, x + bias[None, None])
    np.testing.assert_array_equal(to_x, x)
    assert to_bias.dtype == bias.dtype
    exact = np.asarray(x.astype(jnp.float32), np.float64).sum((0, 1))
    np.testing.assert_allclose(
        to_bias.astype(jnp.float32), exact, rtol=1e-5 if dtype == "float32" else 2**-8, atol=1e-5
    )


def test_a_sum_over_many_bfloat16_tokens_is_collected_in_float32():
    ones = jnp.ones((4, 1000, 2), jnp.bfloat16)
    total = over_tokens(ones)
    assert total.dtype == jnp.float32
    assert (total == 4000).all()


@pytest.mark.parametrize(
    ("letters", "inputs", "outputs"),
    [
        ("BLD,DF->BLF", {"D": 3}, {"F": 8}),
        ("BLF,FD->BLD", {"F": 8}, {"D": 3}),
        ("BLD,DKGH->BLKGH", {"D": 3}, {"K": 2, "G": 2, "H": 4}),
        ("BLKGH,KGHD->BLD", {"K": 2, "G": 2, "H": 4}, {"D": 3}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_linear_map_is_its_einsum_forward_and_backward(
    letters: str, inputs: dict[str, int], outputs: dict[str, int], dtype: str
):
    random = np.random.default_rng(0)
    x, w, g = (
        jnp.asarray(random.integers(-3, 4, shape), dtype)  # whole numbers: sums are exact in either dtype
        for shape in [(2, 5, *inputs.values()), (*inputs.values(), *outputs.values()), (2, 5, *outputs.values())]
    )
    value, pull = jax.vjp(lambda x, w: linear(letters, x, w), x, w)
    plain, plain_pull = jax.vjp(lambda x, w: jnp.einsum(letters, x, w), x, w)
    np.testing.assert_array_equal(value, plain)
    for got, wanted in zip(pull(g), plain_pull(g), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def test_a_row_of_a_table_collects_what_its_tokens_bring():
    table, ids = X[0, :, 0], jnp.array([[0, 3, 3], [4, 3, 0]])
    g = jnp.arange(24.0).reshape(2, 3, 4)
    value, pull = jax.vjp(lambda table: lookup(table, ids), table)
    plain, plain_pull = jax.vjp(lambda table: table[ids], table)
    np.testing.assert_array_equal(value, plain)
    np.testing.assert_array_equal(pull(g)[0], plain_pull(g)[0])


def test_a_token_seen_often_gets_its_whole_gradient_in_bfloat16():
    """A sum of a thousand ones in bfloat16 stops at 256, where the next one rounds away."""
    ids = jnp.zeros((1, 1000), jnp.int32)
    gradient = jax.grad(lambda table: lookup(table, ids).sum())(jnp.zeros((2, 1), jnp.bfloat16))
    assert gradient.tolist() == [[1000], [0]]


def test_ids_are_sent_to_the_rows_of_a_split_table_and_the_table_is_not():
    table, ids = (
        normal(48, 64),
        jnp.arange(32).reshape(4, 8) % 11,
    )

    def loss(embed: Callable, table: jax.Array) -> jax.Array:
        return jnp.sin(constrain(embed(table, ids * 4), "BLD")).sum()

    expected = jax.value_and_grad(functools.partial(loss, lookup))(table)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    sharding = NamedSharding(mesh, spec("VD", PARAMETER_AXES))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(functools.partial(loss, embed)), out_shardings=(None, sharding))
        compiled = run.lower(jax.device_put(table, sharding)).compile()
    for mine, theirs in zip(compiled(jax.device_put(table, sharding)), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    sent = re.findall(r"f32\[(\d+),(\d+)\]\S* (?:all-gather|all-to-all|collective-permute)", compiled.as_text() or "")
    assert not sent  # two axes have the table and its gradient, what tokens read has three


def test_a_gradient_after_its_value_is_that_of_the_value_and_waits_for_it():
    x = jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(jax.grad(lambda x: gradient_after(x * x).sum())(x), 2 * x)
    text = jax.jit(jax.grad(lambda x: gradient_after(jnp.exp(x)).sum())).lower(x).as_text()
    assert "stablehlo.subtract" in text  # of the value from itself
    poisoned = jax.grad(lambda x: gradient_after(x / 0).sum())(x)
    assert not np.isfinite(poisoned).any()
