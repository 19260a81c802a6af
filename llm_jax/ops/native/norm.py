"""Norms in C++: `norm.h`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llm_jax.ops.native.build import call


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm_rows(
    x: Float[Array, "*rows D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float, center: bool
) -> Float[Array, "*rows D"]:
    """Return what `ops/norm.layer_norm` does; without `center` the mean is taken as 0, as `rms_norm` does."""
    return _forward(x, scale, bias, eps, center)[0]


def _forward(x: Array, scale: Array, bias: Array, eps: float, center: bool) -> tuple[Array, tuple[Array, ...]]:
    row = jax.ShapeDtypeStruct(x.shape[:-1], jnp.float32)
    y, mean, inverse = call("norm", (x, row, row), x, scale, bias, eps=np.float32(eps), center=center)
    return y, (x, scale, mean, inverse)


def _backward(eps: float, center: bool, saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, scale, _, _ = saved
    dx, of_scale, of_bias = call("norm_backward", (x, scale, scale), *saved, g, eps=np.float32(eps), center=center)
    return dx, of_scale, of_bias


norm_rows.defvjp(_forward, _backward)
