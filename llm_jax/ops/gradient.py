"""Operations with gradients of their own, where autodiff is right but slow, or loses digits.

Forward, each computes what its name says; backward, a test compares each with autodiff.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.ops import native
from llm_jax.ops.collectives import auto_axis_size, reduce_scatter_tokens, shard_map_by_letters
from llm_jax.ops.few_rows import linear_of_few, suits
from llm_jax.ops.int8 import Quantized
from llm_jax.sharding import ACTIVATION_AXES, constrain


def settle(x: Array) -> Array:
    """Return `x`, and see to it that it and its gradient are computed once.

    On CPU a barrier keeps XLA from recomputing a value in each of its readers: the residual stream with the whole chain
    before it, or the gradient of an activation function for each matrix product that reads it. Other compilers do
    better without.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda y: y)


@jax.custom_vjp
def gradient_after(x: Array) -> Array:
    """Return `x`, and let its gradient wait for it: a compiler may else run this forward pass after its backward pass.

    What both read would stay in memory until then. Where `x` is not finite neither is the gradient.
    """
    return x


gradient_after.defvjp(lambda x: (x, x), lambda x, g: (g + (x - x),))


def after(x: Array, y: Array) -> Array:
    """Return `x`, but on a CPU not before `y` is computed; both have the same shape.

    Independent loops run at the same time there, and simulated devices confuse the collectives of one with those of the
    other: XLA distinguishes them by channel, and all collectives of `shard_map` have the same. An optimization barrier
    is removed before loops are scheduled; a sum with 0 times `y` stays.
    """
    return jax.lax.platform_dependent(x, y, cpu=lambda x, y: x + 0 * jnp.nan_to_num(y), default=lambda x, _: x)


@jax.custom_vjp
def add_bias(x: Float[Array, "B L *O"], bias: Float[Array, "*O"]) -> Float[Array, "B L *O"]:
    """Return `x + bias`; the gradient of the bias is a matrix product rather than a reduction."""
    return x + jnp.broadcast_to(bias, x.shape)


def _add_bias_backward(bias: Array, g: Array) -> tuple[Array, Array]:
    return g, over_tokens(g).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_backward)


def over_tokens(x: Float[Array, "B L *O"]) -> Float[Array, "*O"]:
    """Sum over B and L, as a product with ones: a CPU has fast matrix products and slow column sums."""
    return jnp.tensordot(jnp.ones(x.shape[:2], x.dtype), x, axes=2, preferred_element_type=jnp.float32)


def linear(
    letters: str,
    x: Float[Array, "B L *I"],
    w: Float[Array, "*IO"] | Quantized,
    bias: Float[Array, "*O"] | None = None,
) -> Float[Array, "B L *O"]:
    """Return `einsum(letters, x, w) + bias`, with the weight gathered first, and a weight gradient of its own.

    If `w` is split over `fsdp`, XLA's compiler for TPU would rather split the product, and send shards of `w` from
    device to device meanwhile: products with a shard are narrow, and slow.

    The weight gradient transposes the smaller of its two factors. It sums over tokens, so one of them must be
    transposed, and XLA takes the first. A CPU recomputes it, element by element, and writes it across rows; a TPU makes
    a copy. Both are expensive for the wide side of a feed-forward layer. On one CPU device `ops/native` transposes
    nothing.

    The few rows of a decoder, and quantized weights, are multiplied by `ops/few_rows.py` instead. What goes to the
    residual stream, BLD, is summed over `tensor` before the bias is added.
    """
    return linears([letters], x, [w], [bias])[0]


def linears(
    letters: Sequence[str],
    x: Float[Array, "B L *I"],
    weights: Sequence[Float[Array, "..."] | Quantized],
    biases: Sequence[Float[Array, "..."] | None],
) -> list[Float[Array, "B L ..."]]:
    """Return `linear` of one `x` by each weight: native code multiplies by all at once."""
    rows, inputs = x.shape[0] * x.shape[1], math.prod(x.shape[2:])
    dense = [w for w in weights if not isinstance(w, Quantized) and not suits(rows, w)]
    if len(dense) == len(weights) and native.covers(x, *dense):
        flat = [None if b is None else b.reshape(-1) for b in biases]
        found = native.matmuls(x.reshape(rows, inputs), [w.reshape(inputs, -1) for w in dense], flat)
        return [y.reshape(*x.shape[:2], *w.shape[x.ndim - 2 :]) for y, w in zip(found, dense, strict=True)]
    return [_product(*given, x) for given in zip(letters, weights, biases, strict=True)]


def _product(letters: str, w: Array | Quantized, bias: Array | None, x: Array) -> Array:
    few = isinstance(w, Quantized) or suits(x.shape[0] * x.shape[1], w)
    y: Array = linear_of_few(x, w) if few else _linear(letters, x, w)
    y = reduce_scatter_tokens(y) if letters.endswith("->BLD") else y
    return y if bias is None else add_bias(y, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(letters: str, x: Array, w: Array) -> Array:
    return _linear_forward(letters, x, w)[0]


# The product is visible, not inside a call of `_linear`: rematerialization by "dots" looks for it.
def _linear_forward(letters: str, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    _, weight, _ = _words(letters)
    return jnp.einsum(letters, x, constrain(w, weight)), (x, w)


def _linear_backward(letters: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    (x, w), (inputs, weight, output) = saved, _words(letters)
    dx = jnp.einsum(f"{output},{weight}->{inputs}", g, constrain(w, weight))
    if x.size <= g.size:
        return dx, jnp.einsum(f"{inputs},{output}->{weight}", x, g)
    transposed = "".join(sorted(weight, key=inputs.__contains__))
    product, barrier = jnp.einsum(f"{output},{inputs}->{transposed}", g, x), jax.lax.optimization_barrier
    kept = jax.lax.platform_dependent(product, cpu=barrier, tpu=barrier, default=lambda y: y)  # or XLA swaps them back
    return dx, jnp.einsum(f"{transposed}->{weight}", kept)


_linear.defvjp(_linear_forward, _linear_backward)


def _words(letters: str) -> list[str]:
    """Split `"BLD,DF->BLF"` into its three words."""
    return letters.replace("->", ",").split(",")


@jax.custom_vjp
def lookup(table: Float[Array, "V D"], ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Return the rows `ids` of a table. The gradient of a row is the sum over all its tokens, added in float32.

    An id outside the table takes the nearest row.
    """
    return table.at[ids].get(mode="clip")


def _lookup_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    table, ids = saved
    gradient = jnp.zeros(table.shape, jnp.float32).at[ids].add(g.astype(jnp.float32), mode="clip")
    return gradient.astype(table.dtype), None


lookup.defvjp(lambda table, ids: (lookup(table, ids), (table, ids)), _lookup_backward)


def embed(table: Float[Array, "V D"], ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Look up `ids` in a table that is split over devices and is not gathered: ids are sent, and rows come back.

    During the lookup `fsdp` splits the width instead of the batch, so that none of the `V D` numbers is sent, and the
    gradient of a row is summed on the devices that hold it. Over `tensor`, a device adds 0 for rows that others hold.
    """
    data, fsdp, expert, context, tensor = map(auto_axis_size, ("data", "fsdp", "expert", "context", "tensor"))
    uneven = ids.shape[0] % (data * expert) or ids.shape[1] % (context * tensor)
    if fsdp * tensor == 1 or uneven:
        return lookup(table, ids)

    def own(table: Array, ids: Array) -> Array:
        index = ids - jax.lax.axis_index("tensor") * len(table)
        mine = (index >= 0) & (index < len(table))
        rows = jnp.where(mine[..., None], lookup(table, index), jnp.zeros((), table.dtype))
        return jax.lax.psum_scatter(rows, "tensor", scatter_dimension=1, tiled=True)

    axes = {**ACTIVATION_AXES, "B": ("data", "expert"), "D": "fsdp"}
    return shard_map_by_letters(own, "VD BS BLD", table, ids, axes=axes)
