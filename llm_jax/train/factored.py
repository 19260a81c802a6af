"""Adafactor's second moment: for a matrix the means over its rows and over its columns, instead of every element.

The letters of a parameter say which axes are its input and which its output. So a matrix of attention is one matrix,
whatever its heads; layers and experts are never mixed; and the factors are sharded like the parameter. (optax factors
the two largest axes, wherever they are.)
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from llm_jax import tree as trees
from llm_jax.paths import first_match
from llm_jax.sharding import MATRICES, TABLES, letters_of, own_letters

LEAST = 128  # a matrix with fewer inputs or outputs is kept whole: there is little to save


class FactoredState(NamedTuple):
    """The second moments, in the tree of the parameters; a scalar where a parameter has none.

    Attributes:
      step: the number of updates so far.
      v_row: squared gradients of a matrix averaged over its outputs, one an input.
      v_col: squared gradients averaged over the inputs, one an output.
      v: squared gradients of each element of a parameter that is not factored.
    """

    step: Int[Array, ""]
    v_row: PyTree
    v_col: PyTree
    v: PyTree


def sides(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the input axes and the output axes of the parameter at `path`; None where it is no matrix.

    Of a layer of the user's own nobody knows them, whatever its parameters are called.
    Raise `ValueError` for a rank other than the number of its letters.
    """
    pair = first_match((*TABLES, *MATRICES), path)
    if pair is None or own_letters(path, shape) is not None:
        return None
    letters = letters_of(path, shape)
    if len(letters) != len(shape):
        raise ValueError(f"{path} has shape {shape}, but its letters are {letters!r}; give it an axis for each")
    rows, columns = (tuple(map(letters.index, side)) for side in pair)
    return rows, columns


def factors(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the same for a matrix that is large enough to be factored; None where the moment is kept whole."""
    found = sides(path, shape)
    large = found is not None and all(math.prod(shape[axis] for axis in side) >= LEAST for side in found)
    return found if large else None


def scale_by_factored_rms(decay: float = 0.8, floor: float = 1e-30, most: float = 1.0) -> optax.GradientTransformation:
    """Return Adafactor's scaling: divide by the root of the second moment, and clip the update to an RMS of `most`.

    The moment of step t is a running mean with decay `1 - t**-decay`; a factored one is the outer product of its two
    means over their common mean. The RMS is that of one matrix of one layer (Shazeer and Stern 2018, arXiv:1804.04235,
    algorithms 4 and 5).
    """

    def init(params: PyTree) -> FactoredState:
        def moments(path: str, w: Array) -> tuple[Array, Array, Array]:
            axes = factors(path, w.shape)
            if axes is None:
                return jnp.zeros(()), jnp.zeros(()), jnp.zeros_like(w)
            row, column = (jnp.zeros(np.delete(w.shape, gone), w.dtype) for gone in reversed(axes))
            return row, column, jnp.zeros(())  # each its own buffer, so that the state can be donated

        return FactoredState(jnp.zeros((), jnp.int32), *_unzip(trees.map_with_path(moments, params), params, 3))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, FactoredState]:
        step = state.step + 1
        old = 1 - step.astype(jnp.float32) ** -decay

        def one(path: str, g: Array, *moments: Array) -> tuple[Array, ...]:
            axes, (row, column, whole) = factors(path, g.shape), moments
            mean = functools.partial(_mixed, old, jnp.square(g) + floor)
            if axes is None:
                whole = mean(whole, ())
                return _limited(g * jax.lax.rsqrt(whole), of_a_layer(path, g.shape), most), row, column, whole
            rows, columns = axes
            row, column = mean(row, columns), mean(column, rows)
            by_row, by_column = jnp.expand_dims(row, columns), jnp.expand_dims(column, rows)
            scale = jax.lax.rsqrt(by_row / by_row.mean(rows, keepdims=True)) * jax.lax.rsqrt(by_column)
            return _limited(g * scale, (*rows, *columns), most), row, column, whole

        found = jax.tree_util.tree_map_with_path(
            lambda path, *leaves: one(trees.path_name(path), *leaves), updates, state.v_row, state.v_col, state.v
        )
        scaled, *moments = _unzip(found, updates, 4)
        return scaled, FactoredState(step, *moments)

    return optax.GradientTransformation(init, update)


def of_a_layer(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes of the parameter at `path` within one layer and one expert."""
    if (found := sides(path, shape)) is not None:
        return found[0] + found[1]
    stacked = len(shape) > 0 and letters_of(path, shape).startswith("N")
    return tuple(range(stacked, len(shape)))


def _mixed(old: Float[Array, ""], squares: Array, moment: Array, axes: tuple[int, ...]) -> Array:
    return old * moment + (1 - old) * (squares.mean(axes) if axes else squares)


def _limited(update: Array, axes: tuple[int, ...], most: float) -> Array:
    """Return `update` scaled down to a root mean square of `most` along `axes` where it has more."""
    rms = jnp.sqrt(jnp.square(update).mean(axes, keepdims=True))
    return update / jnp.maximum(1.0, rms / most)


def _unzip(found: PyTree, like: PyTree, number: int) -> list[PyTree]:
    """Split a tree of tuples, one at each leaf of `like`, into a list of trees."""
    tuples = jax.tree.structure(like).flatten_up_to(found)
    return [jax.tree.unflatten(jax.tree.structure(like), [each[i] for each in tuples]) for i in range(number)]
