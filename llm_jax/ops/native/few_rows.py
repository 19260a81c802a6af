"""Products of a few rows in C++: `few_rows.h`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from llm_jax.ops.native.build import call


@jax.custom_vjp
def multiply_few(x: Float[Array, "M I"], w: Shaped[Array, "I O"]) -> Float[Array, "M O"]:
    """Return `x @ w` in float32, where `x` is float32, and `w` float32, bfloat16 or int8."""
    return call("few_rows", jax.ShapeDtypeStruct((len(x), w.shape[1]), jnp.float32), x, w)


def _backward(saved: tuple[Array, Array], g: Float[Array, "M O"]) -> tuple[Array, Array | None]:
    x, w = saved
    return g @ w.T.astype(g.dtype), (x.T @ g).astype(w.dtype) if jnp.issubdtype(w.dtype, jnp.floating) else None


multiply_few.defvjp(lambda x, w: (multiply_few(x, w), (x, w)), _backward)
