"""State that waits in the host's memory, and comes to the device a layer at a time.

A step reads moments once, and float32 weights twice. Brought all at once they take then what they spared before, and
XLA brings an array as a whole, however little of it is read. But of a stack from which a loop takes a slice, and to
which it gives one back, it copies the slices; so the loops here go over the layers.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PyTree

from llm_jax import tree as trees

HOST = "pinned_host"
STACK = "layers"  # in a tree of parameters, those with a leading N
# (params, opt_state, gradients) -> (params, opt_state), of all parameters or of some.
Advance = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


def waiting(layout: PyTree) -> PyTree:
    """The shardings of parameters, or of an optimizer's state, with matrices of stacked layers on the host.

    Biases and scales, of which a layer has a vector, stay: they are small.
    """

    def one(path: str, sharding: NamedSharding) -> NamedSharding:
        *folders, name = path.split("/")
        away = STACK in folders and name.startswith("w_")
        return sharding.with_memory_kind(HOST) if away else sharding

    return trees.map_with_path(one, layout)


def waits(x: Any) -> bool:
    """Whether `x` lies in the host's memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def fetched(stack: PyTree, i: Int[Array, ""]) -> PyTree:
    """Layer `i` of a stack, on the device."""

    def one(x: Array) -> Array:
        return jax.device_put(jax.lax.dynamic_index_in_dim(x, i, keepdims=False), jax.memory.Space.Device)

    return jax.tree.map(one, stack)


def returned(stack: PyTree, layer: PyTree, i: Int[Array, ""]) -> PyTree:
    """A stack, where it lies, with `layer` as its layer `i`."""

    def one(x: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(x, jax.device_put(new, jax.typeof(x).memory_space), i, 0)

    return jax.tree.map(one, stack, layer)


def brought(params: PyTree, form: Callable[[PyTree], PyTree]) -> PyTree:
    """`form(params)`, on the device; where some wait on the host, of one layer after another."""
    if not any(map(waits, jax.tree.leaves(params))):
        return form(params)
    stack = params[STACK]
    layers = jax.lax.map(lambda i: form({STACK: fetched(stack, i)}), jnp.arange(_height(stack)))
    return form(params | {STACK: {}}) | layers


def summed(
    square: Callable[[PyTree, PyTree, PyTree], Float[Array, ""]], params: PyTree, opt_state: PyTree, gradients: PyTree
) -> Float[Array, ""]:
    """Compute `square(params, opt_state, gradients)`, a sum over parameters.

    Where some wait on the host, add it up one layer after another, and bring nothing back.
    """
    given = params, opt_state, gradients
    if not any(map(waits, jax.tree.leaves(given))):
        return square(*given)
    rest, stacks = _split(given)

    def one(i: Int[Array, ""], total: Float[Array, ""]) -> Float[Array, ""]:
        return total + square(*_in_each(lambda tree: fetched(tree, i), stacks))

    return jax.lax.fori_loop(0, _height(params[STACK]), one, square(*rest))


def advanced(advance: Advance, params: PyTree, opt_state: PyTree, gradients: PyTree) -> tuple[PyTree, PyTree]:
    """Compute `advance(params, opt_state, gradients)`; where some wait on the host, one layer after another.

    For an update rule that treats every layer by itself.
    """
    given = params, opt_state, gradients
    if not any(map(waits, jax.tree.leaves(given))):
        return advance(*given)
    rest, (*stacks, slopes) = _split(given)

    def one(i: Int[Array, ""], stacks: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        new = advance(*_in_each(lambda tree: fetched(tree, i), (*stacks, slopes)))
        return _in_each(lambda tree, layer: returned(tree, layer, i), stacks, new)

    layers = jax.lax.fori_loop(0, _height(params[STACK]), one, tuple(stacks))
    return _in_each(operator.or_, advance(*rest), layers)


def _split(given: tuple[PyTree, ...]) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
    """`given` without the stacked layers, and with them alone."""
    rest = _in_each(lambda tree: tree | {STACK: {}}, given)
    return rest, _in_each(lambda tree: {STACK: tree[STACK]}, given)


def _height(stack: PyTree) -> int:
    return len(jax.tree.leaves(stack)[0])


def _in_each(function: Callable[..., PyTree], *trees: Any) -> Any:
    """`function` of each tree of parameters in `trees`. What is beside these, as a count of updates, is the first's."""

    def one(tree: PyTree, *more: PyTree) -> PyTree:
        return function(tree, *more) if _has_stack(tree) else tree

    return jax.tree.map(one, *trees, is_leaf=_has_stack)


def _has_stack(tree: PyTree) -> bool:
    return isinstance(tree, dict) and STACK in tree
