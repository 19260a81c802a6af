"""Stacks of layers: the slot of a layer in the cache; stacks joined, and split into layers. `pattern.py` says where."""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from llm_jax.model.config import ModelConfig
from llm_jax.model.pattern import locate, n_scanned

Index = Int[Array, ""] | int  # of a layer, or of a slot: traced inside the scan


def slot_of(c: ModelConfig, offset: int, layer: Index) -> Index:
    """Return the slot of `layer` in the cache, among layers that keep the same kind of memory.

    The layer may be traced, its offset in the period may not.
    """
    same = [kind.memory == c.period[offset].memory for kind in c.period]
    return layer // len(same) * sum(same) + sum(same[:offset])


def gather(stacks: Sequence[PyTree], rows: Sequence[Sequence[int]]) -> PyTree:
    """Join stacks of some layers each into one of all, in order: `rows[i]` says which rows `stacks[i]` holds."""

    def joined(*arrays: Array) -> Array:
        return jnp.concatenate(arrays)[np.argsort(np.concatenate(rows))]

    return jax.tree.map(joined, *stacks)


def unstack(c: ModelConfig, params: PyTree) -> PyTree:
    """Return the tree that `Transformer(config, stacked=False)` reads: every layer by itself, at `layers_{i}`."""
    flat = {name: tree for name, tree in params.items() if name != "layers"}
    for layer in range(n_scanned(c)):
        where = locate(c, layer)
        stack = functools.reduce(operator.getitem, where.path.split("/"), params)
        flat[f"layers_{layer}"] = jax.tree.map(lambda leaf, row=where.row: leaf[row], stack)
    return flat
