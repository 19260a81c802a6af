"""Offloading: state that is kept in host memory, and copied to the device a layer at a time.

A step reads moments once, and float32 weights twice. Copied all at once they would need the device memory that
offloading saved, and XLA copies an array as a whole, however little of it is read. But where a loop reads a slice of a
stack and writes one back, XLA copies slices only; so the loops here run over the layers.
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
Update = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


def host_shardings(shardings: PyTree) -> PyTree:
    """Return shardings of parameters or optimizer state, with the matrices of stacked layers in host memory.

    Biases and scales, one vector a layer, stay on the device: they are small.
    """

    def one(path: str, sharding: NamedSharding) -> NamedSharding:
        *folders, name = path.split("/")
        away = STACK in folders and name.startswith("w_")
        return sharding.with_memory_kind(HOST) if away else sharding

    return trees.map_with_path(one, shardings)


def on_host(x: Any) -> bool:
    """Return whether `x` is in host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def fetch_layer(stack: PyTree, i: Int[Array, ""]) -> PyTree:
    """Return layer `i` of a stack, on the device."""

    def one(x: Array) -> Array:
        return jax.device_put(jax.lax.dynamic_index_in_dim(x, i, keepdims=False), jax.memory.Space.Device)

    return jax.tree.map(one, stack)


def store_layer(stack: PyTree, layer: PyTree, i: Int[Array, ""]) -> PyTree:
    """Return a stack, in its own memory, with `layer` as its layer `i`."""

    def one(x: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(x, jax.device_put(new, jax.typeof(x).memory_space), i, 0)

    return jax.tree.map(one, stack, layer)


def map_layers(params: PyTree, form: Callable[[PyTree], PyTree]) -> PyTree:
    """Return `form(params)` on the device, computed layer by layer where some are in host memory."""
    if not any(map(on_host, jax.tree.leaves(params))):
        return form(params)
    stack = params[STACK]
    layers = jax.lax.map(lambda i: form({STACK: fetch_layer(stack, i)}), jnp.arange(_n_layers(stack)))
    return form(params | {STACK: {}}) | layers


def sum_layers(
    square: Callable[[PyTree, PyTree, PyTree], Float[Array, ""]], params: PyTree, opt_state: PyTree, gradients: PyTree
) -> Float[Array, ""]:
    """Compute `square(params, opt_state, gradients)`, a sum over parameters.

    Where some are in host memory, add it up layer by layer, and write nothing back.
    """
    given = params, opt_state, gradients
    if not any(map(on_host, jax.tree.leaves(given))):
        return square(*given)
    rest, stacks = _split(given)

    def one(i: Int[Array, ""], total: Float[Array, ""]) -> Float[Array, ""]:
        return total + square(*_in_each(lambda tree: fetch_layer(tree, i), stacks))

    return jax.lax.fori_loop(0, _n_layers(params[STACK]), one, square(*rest))


def update_layers(update: Update, params: PyTree, opt_state: PyTree, gradients: PyTree) -> tuple[PyTree, PyTree]:
    """Compute `update(params, opt_state, gradients)`, layer by layer where some are in host memory.

    For an update rule that treats each layer independently.
    """
    given = params, opt_state, gradients
    if not any(map(on_host, jax.tree.leaves(given))):
        return update(*given)
    rest, (*stacks, slopes) = _split(given)

    def one(i: Int[Array, ""], stacks: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        new = update(*_in_each(lambda tree: fetch_layer(tree, i), (*stacks, slopes)))
        return _in_each(lambda tree, layer: store_layer(tree, layer, i), stacks, new)

    layers = jax.lax.fori_loop(0, _n_layers(params[STACK]), one, tuple(stacks))
    return _in_each(operator.or_, update(*rest), layers)


def _split(given: tuple[PyTree, ...]) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
    """Return `given` without the stacked layers, and with them alone."""
    rest = _in_each(lambda tree: tree | {STACK: {}}, given)
    return rest, _in_each(lambda tree: {STACK: tree[STACK]}, given)


def _n_layers(stack: PyTree) -> int:
    return len(jax.tree.leaves(stack)[0])


def _in_each(function: Callable[..., PyTree], *trees: Any) -> Any:
    """Map `function` over the parameter trees in `trees`. Other leaves, such as a step count, come from the first."""

    def one(tree: PyTree, *more: PyTree) -> PyTree:
        return function(tree, *more) if _has_stack(tree) else tree

    return jax.tree.map(one, *trees, is_leaf=_has_stack)


def _has_stack(tree: PyTree) -> bool:
    return isinstance(tree, dict) and STACK in tree
