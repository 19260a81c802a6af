"""Layer norm and RMS norm, with gradients of their own.

XLA's CPU compiler turns the gradient of autodiff into several reductions that each read their whole input; the form
below saves two numbers a token, and is the same mathematics (a test compares it with autodiff).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.ops import native
from llm_jax.ops.gradient import add_bias, over_tokens


def rms_norm(x: Float[Array, "B L *heads D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "B L *heads D"]:
    """Return `scale * x / sqrt(mean(x^2) + eps)` (Zhang and Sennrich 2019, arXiv:1910.07467).

    Statistics are float32; the product with `scale` is in the dtype of `scale`, the result in that of `x`.
    """
    if native.covers(x, scale):
        return native.norm_rows(x, scale, jnp.zeros_like(scale), eps, False)
    return _norm(x, scale, eps, False)


def layer_norm(
    x: Float[Array, "B L *heads D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "B L *heads D"]:
    """Return `scale * (x - mean) / sqrt(var + eps) + bias` (Ba et al. 2016, arXiv:1607.06450).

    Statistics are float32.
    """
    if native.covers(x, scale, bias):
        return native.norm_rows(x, scale, bias, eps, True)
    return add_bias(_norm(x, scale, eps, True), jnp.broadcast_to(bias, x.shape[2:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _norm(x: Array, scale: Array, eps: float, center: bool) -> Array:
    return _norm_forward(x, scale, eps, center)[0]


def _norm_forward(x: Array, scale: Array, eps: float, center: bool) -> tuple[Array, tuple[Array, ...]]:
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True) if center else jnp.zeros((1,) * x.ndim, jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + eps)
    unit = ((y - mean) * inverse).astype(scale.dtype)
    return (unit * _along(x, scale)).astype(x.dtype), (x, scale, mean, inverse)


def _norm_backward(eps: float, center: bool, saved: tuple[Array, ...], g: Array) -> tuple[Array, Array]:
    x, scale, mean, inverse = saved
    unit = (x.astype(jnp.float32) - mean) * inverse
    g = g.astype(jnp.float32)
    inner = g * _along(x, scale.astype(jnp.float32))
    dx = inner - unit * (inner * unit).mean(-1, keepdims=True)
    if center:
        dx = dx - inner.mean(-1, keepdims=True)
    by_head = over_tokens(g * unit)  # heads share their scale
    return (dx * inverse).astype(x.dtype), by_head.sum(tuple(range(by_head.ndim - 1))).astype(scale.dtype)


def _along(x: Array, scale: Array) -> Array:
    """Return `scale` with the rank of `x`, along its last axis."""
    return scale.reshape((1,) * (x.ndim - 1) + scale.shape)


_norm.defvjp(_norm_forward, _norm_backward)
