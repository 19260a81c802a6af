"""The norms equal their formulas in float64, and their handwritten gradients equal autodiff of those."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.ops.norm import layer_norm, rms_norm

EPS = 1e-3
RNG = np.random.default_rng(0)
X, SCALE, BIAS, COTANGENT = (
    RNG.normal(loc, size=size) for loc, size in ((2, (2, 5, 8)), (1, 8), (0, 8), (0, (2, 5, 8)))
)
Arrays = tuple[jax.Array, jax.Array, jax.Array]


def arrays(dtype: str) -> Arrays:
    return jnp.asarray(X, dtype), jnp.asarray(SCALE, dtype), jnp.asarray(BIAS, dtype)


def plain_rms(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return scale[None, None] * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def plain_layer(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    variance = ((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True)
    return scale[None, None] * (x - x.mean(-1, keepdims=True)) / jnp.sqrt(variance + EPS) + bias[None, None]


NORMS: dict[str, tuple[Callable, Callable]] = {
    "rmsnorm": (lambda x, scale, bias: rms_norm(x, scale, EPS), plain_rms),
    "layernorm": (lambda x, scale, bias: layer_norm(x, scale, bias, EPS), plain_layer),
}


def value_and_gradients(norm: Callable, inputs: Arrays) -> list[np.ndarray]:
    def run(*inputs: jax.Array) -> list[jax.Array]:
        out, pull = jax.vjp(norm, *inputs)
        return [out, *pull(jnp.asarray(COTANGENT, out.dtype))]

    return [np.asarray(x.astype(jnp.float32)) for x in jax.jit(run)(*inputs)]


@pytest.mark.parametrize("name", NORMS)
def test_value_and_gradients_are_those_of_the_formula(name: str):
    ours, plain = NORMS[name]
    both = (value_and_gradients(norm, arrays("float32")) for norm in (ours, plain))
    for mine, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_the_formulas_are_those_of_the_papers():
    rms = np.sqrt((X**2).mean(-1, keepdims=True) + EPS)
    centred = X - X.mean(-1, keepdims=True)
    deviation = np.sqrt(X.var(-1, keepdims=True) + EPS)
    ours, _ = NORMS["rmsnorm"]
    np.testing.assert_allclose(ours(*arrays("float32")), SCALE * X / rms, rtol=1e-5, atol=1e-6)
    ours, _ = NORMS["layernorm"]
    np.testing.assert_allclose(ours(*arrays("float32")), SCALE * centred / deviation + BIAS, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_bfloat16_differs_from_float32_by_its_rounding_only(name: str):
    ours, _ = NORMS[name]
    rounded = [x.astype(jnp.float32) for x in arrays("bfloat16")]
    both = (
        value_and_gradients(ours, arrays("bfloat16")),
        value_and_gradients(ours, (rounded[0], rounded[1], rounded[2])),
    )
    for mine, theirs in zip(*both, strict=True):
        assert np.abs(mine - theirs).max() < 2**-6 * max(1e-6, np.abs(theirs).max())


def test_statistics_of_large_bfloat16_numbers_do_not_overflow_or_cancel():
    x = jnp.asarray(1000 + X, jnp.bfloat16)
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + EPS)
    found = layer_norm(x, jnp.ones(8, jnp.bfloat16), jnp.zeros(8, jnp.bfloat16), EPS).astype(jnp.float32)
    np.testing.assert_allclose(found, expected, atol=0.02)
