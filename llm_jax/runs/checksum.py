"""Check a saved tree leaf by leaf: a checksum of the bits, and whether all numbers are finite."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, UInt32

from llm_jax import tree as trees
from llm_jax.train.offload import fetch_layer, on_host


@jax.jit
def checksums(tree: PyTree) -> dict[str, UInt32[Array, ""]]:
    """Return a checksum of every leaf by path: any flipped bit changes it, no mesh does: integer sums have no order."""
    return {path: _checksum(leaf) for path, leaf in trees.leaves(tree).items()}


def _checksum(x: Array, row: Int[Array, ""] | int = 0) -> UInt32[Array, ""]:
    """Return the sum of all elements' bits, each mixed with its index by MurmurHash3's finalizer, which is one-to-one.

    `row` is the index of `x` in an array in host memory, which is copied to the device a row at a time.
    """
    if on_host(x):
        return jax.lax.map(lambda i: _checksum(fetch_layer(x, i), i), jnp.arange(len(x))).sum(dtype=jnp.uint32)
    if jnp.iscomplexobj(x):
        return _checksum(jnp.stack([x.real, x.imag], axis=-1), row)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool else x
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    index = jnp.full(x.shape, row, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    bits = bits ^ (index * jnp.uint32(0x9E3779B1))
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return (bits ^ (bits >> 16)).sum(dtype=jnp.uint32)


def not_finite(tree: PyTree) -> str | None:
    """Return the path of the first leaf with a NaN or an infinity; None where there is none."""
    return next((path for path, fine in jax.device_get(_finite(tree)).items() if not fine), None)


@jax.jit
def _finite(tree: PyTree) -> dict[str, Bool[Array, ""]]:
    return {path: _all_finite(leaf) for path, leaf in trees.leaves(tree).items()}


def _all_finite(x: Array) -> Bool[Array, ""]:
    if on_host(x):
        return jax.lax.map(lambda i: _all_finite(fetch_layer(x, i)), jnp.arange(len(x))).all()
    return jnp.isfinite(x).all()
