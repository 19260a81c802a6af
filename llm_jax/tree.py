"""Pytrees by path. A leaf's path, such as `layers/attention/w_q`, is the public name of a parameter."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

Value = TypeVar("Value")


def path_name(path: Sequence[Any]) -> str:
    """Return a JAX key path as text: `layers/attention/w_q`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of `tree` by path, in the order of `jax.tree.leaves`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Return the tree of `function(path, leaf)` for every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_name(path), leaf), tree)


def count(tree: Any) -> int:
    """Return how many numbers `tree` holds. Works on `jax.ShapeDtypeStruct` leaves too."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def fingerprint(tree: Any) -> str:
    """Return a hash of every path, shape, dtype and bit in `tree`: equal fingerprints are equal trees."""
    digest = hashlib.sha256()
    for path, leaf in leaves(tree).items():
        array = np.asarray(leaf)
        digest.update(f"{path} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
