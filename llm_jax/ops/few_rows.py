"""Products of a few rows with a large matrix on a CPU, as fast as memory gives the matrix.

A decoder multiplies each weight by one number for each row of its batch, so reading the weights is the work. XLA gives
a product to one thread if it has a single row, and one thread can't use all of the memory's bandwidth; weights that are
not float32 it first writes out as float32. `native/few_rows.h` shares the matrix among threads, fetches it before it
is needed, and widens weights in registers. Where there is no native code, a sum of a few products that are spelled out
is one loop, which XLA splits over threads, and in which weights widen in registers too.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from llm_jax.ops import native
from llm_jax.ops.attention import platform
from llm_jax.ops.int8 import Quantized

FEW = 8  # rows; more are limited by arithmetic
WEIGHTS = (jnp.float32, jnp.bfloat16, jnp.int8)  # that native code reads


def suits(rows: int, w: Float[Array, "*IO"] | Quantized) -> bool:
    """Return whether `few_rows` is the faster way here.

    Without native code, from two rows on XLA's own product of float32 is as fast.
    """
    if platform() != "cpu" or not jax.sharding.get_abstract_mesh().empty:
        return False
    if native.runs():
        return rows <= FEW
    return rows <= FEW if isinstance(w, Quantized) or w.dtype != jnp.float32 else rows == 1


def linear_of_few(x: Float[Array, "B L *I"], w: Float[Array, "*IO"] | Quantized) -> Float[Array, "B L *O"]:
    """Return the product of `ops/gradient.linear` by `few_rows`: it sums over all axes of `x` but the first two."""
    inputs, outputs = math.prod(x.shape[2:]), w.shape[x.ndim - 2 :]
    y = few_rows(x.reshape(-1, inputs), w.reshape(inputs, math.prod(outputs)))
    return y.reshape(*x.shape[:2], *outputs).astype(x.dtype)


def few_rows(x: Float[Array, "M I"], w: Float[Array, "I O"] | Quantized) -> Float[Array, "M O"]:
    """Return `x @ w` in float32: by native code or by tiles if that `suits`, else by XLA's own product."""
    values = w.values if isinstance(w, Quantized) else w
    fast = suits(len(x), w)
    if fast and native.runs() and values.dtype in WEIGHTS:
        y = native.multiply_few(x.astype(jnp.float32), values)
    elif fast and len(values) % tile(values) == 0:
        y = _by_tiles(x.astype(jnp.float32), values)
    else:
        y = jnp.matmul(x, values.astype(x.dtype), preferred_element_type=jnp.float32)
    return y * w.scale[None] if isinstance(w, Quantized) else y


def tile(w: Array) -> int:
    """Return how many products are spelled out: with twice as many LLVM no longer vectorizes the loop."""
    return 8 if w.dtype == jnp.bfloat16 else 16


def _by_tiles(x: Float[Array, "M I"], w: Shaped[Array, "I O"]) -> Float[Array, "M O"]:
    """Sum the products of each tile in a tree, and then the sums of all tiles."""
    T, number = tile(w), len(w) // tile(w)
    tiles = x.reshape(-1, number, T).transpose(1, 0, 2)[..., None]
    weights = _bits(w).reshape(number, 1, T, -1)
    # Else weights, which no token changes, are widened before the loop over tokens, in memory.
    tiles, weights = jax.lax.optimization_barrier((tiles, weights))
    terms = [tiles[:, :, t] * _widen(weights[:, :, t]) for t in range(T)]
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return jax.lax.optimization_barrier(terms[0]).sum(0)


def _bits(w: Array) -> Array:
    """Return bfloat16 numbers as their bits: XLA would widen all of them before it splits them into tiles."""
    return jax.lax.bitcast_convert_type(w, jnp.uint16) if w.dtype == jnp.bfloat16 else w


def _widen(w: Array) -> Array:
    """Return float32 numbers; the bits of a bfloat16 are the upper half of theirs."""
    if w.dtype != jnp.uint16:
        return w.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)
