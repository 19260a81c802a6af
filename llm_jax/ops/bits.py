"""Read and write some of a large bfloat16 array on a CPU without widening all of it.

XLA's CPU compiler makes a float32 copy of a whole bfloat16 array to scatter into it: for a decoder that is the cache,
twice a layer for every token. Bits are integers, which it leaves alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.ops.attention import platform


def as_bits(x: Array) -> Array:
    """Return the bits of bfloat16 numbers on a CPU; any other numbers as they are."""
    short = x.dtype == jnp.bfloat16 and platform() == "cpu"
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if short else x


def as_numbers(bits: Array, dtype: Any) -> Array:
    """Return what `as_bits` was given."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
