"""What autodiff gets right but slow, or short of digits: operations with their gradients written by hand.

Forward each computes what its name says; backward each is compared with autodiff by a test.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.sharding import ACTIVATION_AXES, constrain, on_each_device, size_of


def settle(x: Array) -> Array:
    """`x`, and in the backward pass its gradient, computed once.

    On CPU a barrier keeps XLA from deriving a value with several readers anew in each of them: the residual stream
    with the whole chain above it, or the gradient of an activation function once for each matrix product that reads
    it. Other compilers do better without.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda y: y)


@jax.custom_vjp
def in_turn(x: Array) -> Array:
    """`x`, whose gradient waits for it: else a compiler may run a forward pass after the backward pass of it.

    What both read would then stay in memory meanwhile. Where `x` is not finite neither is the gradient.
    """
    return x


in_turn.defvjp(lambda x: (x, x), lambda x, g: (g + (x - x),))


def after(x: Array, y: Array) -> Array:
    """`x`, of the shape of `y`, but on a CPU not before `y` is there.

    Loops that read nothing of each other run at once there, and simulated devices take the collectives of one for those
    of the other: XLA tells them apart by their channel, and all of `shard_map` have the same. An optimization barrier
    is gone before loops are started; a sum with 0 times `y` stays.
    """
    return jax.lax.platform_dependent(x, y, cpu=lambda x, y: x + 0 * jnp.nan_to_num(y), default=lambda x, _: x)


@jax.custom_vjp
def add_bias(x: Float[Array, "B L *O"], bias: Float[Array, "*O"]) -> Float[Array, "B L *O"]:
    """`x + bias`, whose bias gradient is a matrix product rather than a reduction."""
    return x + jnp.broadcast_to(bias, x.shape)


def _add_bias_backward(bias: Array, g: Array) -> tuple[Array, Array]:
    return g, over_tokens(g).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_backward)


def over_tokens(x: Float[Array, "B L *O"]) -> Float[Array, "*O"]:
    """The sum over B and L as a product with ones: a CPU has fast matrix products and slow column sums."""
    return jnp.tensordot(jnp.ones(x.shape[:2], x.dtype), x, axes=2, preferred_element_type=jnp.float32)


def linear(letters: str, x: Float[Array, "B L *I"], w: Float[Array, "*IO"]) -> Float[Array, "B L *O"]:
    """`einsum(letters, x, w)` of a weight that is gathered first, and that has a gradient of its own.

    Where `w` is split over `fsdp`, XLA's compiler for TPU would rather split the product, and pass parts of `w` from
    device to device meanwhile: products of a part are narrow, and slow.

    The weight gradient turns the smaller of its two factors. It sums over tokens, so one of them has to be transposed,
    and XLA takes the first. On a CPU it derives it anew, element by element, while it writes across rows; on a TPU it
    makes a copy. Both are dear for the wide side of a feed-forward layer.
    """
    return _linear(letters, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(letters: str, x: Array, w: Array) -> Array:
    return _linear_forward(letters, x, w)[0]


# The product in the open, not behind `_linear`: rematerialization by "dots" looks for it.
def _linear_forward(letters: str, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    _, weight, _ = _words(letters)
    return jnp.einsum(letters, x, constrain(w, weight)), (x, w)


def _linear_backward(letters: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    (x, w), (inputs, weight, output) = saved, _words(letters)
    dx = jnp.einsum(f"{output},{weight}->{inputs}", g, constrain(w, weight))
    if x.size <= g.size:
        return dx, jnp.einsum(f"{inputs},{output}->{weight}", x, g)
    turned = "".join(sorted(weight, key=inputs.__contains__))
    product, barrier = jnp.einsum(f"{output},{inputs}->{turned}", g, x), jax.lax.optimization_barrier
    kept = jax.lax.platform_dependent(product, cpu=barrier, tpu=barrier, default=lambda y: y)  # or XLA swaps them back
    return dx, jnp.einsum(f"{turned}->{weight}", kept)


_linear.defvjp(_linear_forward, _linear_backward)


def _words(letters: str) -> list[str]:
    """`"BLD,DF->BLF"` in its three words."""
    return letters.replace("->", ",").split(",")


@jax.custom_vjp
def lookup(table: Float[Array, "V D"], ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Take the rows `ids` of a table. The gradient of a row is the sum over all its tokens, collected in float32.

    An id outside the table takes the nearest row.
    """
    return table.at[ids].get(mode="clip")


def _lookup_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    table, ids = saved
    gradient = jnp.zeros(table.shape, jnp.float32).at[ids].add(g.astype(jnp.float32), mode="clip")
    return gradient.astype(table.dtype), None


lookup.defvjp(lambda table, ids: (lookup(table, ids), (table, ids)), _lookup_backward)


def embed(table: Float[Array, "V D"], ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """`lookup` in a table that is split over devices, and stays where it is: ids go there, and rows come back.

    While they are looked up, `fsdp` splits the width in place of the batch, so that of `V D` numbers none is sent, and
    the gradient of a row is summed where it belongs. Over `tensor`, a device adds 0 for the rows that others have.
    """
    rows, tokens = size_of("data") * size_of("expert"), size_of("context") * size_of("tensor")
    uneven = ids.shape[0] % rows or ids.shape[1] % tokens
    if size_of("fsdp") * size_of("tensor") == 1 or uneven:
        return lookup(table, ids)

    def own(table: Array, ids: Array) -> Array:
        place = ids - jax.lax.axis_index("tensor") * len(table)
        mine = (place >= 0) & (place < len(table))
        rows = jnp.where(mine[..., None], lookup(table, place), jnp.zeros((), table.dtype))
        return jax.lax.psum_scatter(rows, "tensor", scatter_dimension=1, tiled=True)

    axes = {**ACTIVATION_AXES, "B": ("data", "expert"), "D": "fsdp"}
    return on_each_device(own, "VD BS BLD", table, ids, axes=axes)
