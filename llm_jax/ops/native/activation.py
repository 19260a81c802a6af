"""Activation functions in C++: `activation.h`."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llm_jax.ops.native.build import call

# x * sigmoid(slope * x + cubic * x^3)
CURVES = {"silu": (1.0, 0.0), "gelu": (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(name: str, x: Array) -> Array:
    """Return `jax.nn.silu(x)`, or `jax.nn.gelu(x)`, its tanh form, by `name`."""
    return _call(name, x, jnp.zeros(0, x.dtype))


def _call(name: str, x: Array, g: Array) -> Array:
    slope, cubic = map(np.float32, CURVES[name])
    return call("activation", x, x, g, slope=slope, cubic=cubic)


activate.defvjp(lambda name, x: (activate(name, x), x), lambda name, x, g: (_call(name, x, g),))
