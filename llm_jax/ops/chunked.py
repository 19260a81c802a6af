"""Chunked attention: block by block over the queries, with memory linear in L.

Which keys a block of queries needs is known before any array is: `bands` says it in NumPy. A band is a run of blocks
whose keys are the same, or of the same number; each band is one scan, compiled once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llm_jax.ops.attention import Dropout, attend
from llm_jax.ops.config import Scores
from llm_jax.ops.mask import Mask

BLOCK = 128  # queries whose scores exist at one time
BANDS = 8  # at most so many scans over a row
APART = 1.5  # blocks gather keys of their own where together they need more than so many times the keys of one


@dataclasses.dataclass(frozen=True, eq=False)
class Band:
    """A run of blocks of queries that one scan computes.

    Attributes:
      starts: the first query of each of its n blocks.
      keys: [k] the keys that all blocks share, or [n k] those of each block; an index of S or more is no key.
    """

    starts: Int[np.ndarray, " n"]
    keys: Int[np.ndarray, "*n k"]

    @property
    def shared(self) -> bool:
        """Whether all blocks of the band read the same keys."""
        return self.keys.ndim == 1


def bands(view: Bool[np.ndarray, "l s"], size: int, S: int) -> list[Band]:
    """Split a row into bands: `view` says which block of `size` queries sees which block of `size` of the S keys.

    If every block sees every key there is one band. Blocks of keys that no query of a band sees are left out. A band
    shares its keys if its blocks need nearly the same ones; else each block has its own, as many as the neediest has,
    so that some blocks get keys that they don't see.
    """
    return [_band(view[rows], rows * size, size, S) for rows in np.array_split(np.arange(len(view)), _number(view))]


def _number(view: Bool[np.ndarray, "l s"]) -> int:
    return 1 if view.all() else min(BANDS, len(view))


def _band(view: Bool[np.ndarray, "n s"], starts: Int[np.ndarray, " n"], size: int, S: int) -> Band:
    most, together = view.sum(1).max(), np.flatnonzero(view.any(0))
    if len(together) <= APART * most:
        keys = _tokens(together, size)
        return Band(starts, keys[keys < S])
    own = np.argsort(~view, kind="stable")[:, :most]  # the blocks in view first, each in order
    return Band(starts, _tokens(own, size))


def _tokens(blocks: Int[np.ndarray, "*n b"], size: int) -> Int[np.ndarray, "*n k"]:
    """Return the indices of all tokens of `blocks`."""
    return (blocks[..., None] * size + np.arange(size)).reshape(*blocks.shape[:-1], -1)


def chunked(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    scores: Scores,
    *,
    dropout: Dropout | None = None,
) -> Float[Array, "B L K G H"]:
    """Attend block by block over the queries; the backward pass recomputes each block.

    Any mask, and any lengths: a last block that is short is padded with queries of zeros, which see what the last query
    sees, and is cut at the end.
    """
    L, S = q.shape[1], k.shape[1]
    size = min(L, BLOCK if mask.sparse is None else mask.sparse.block)
    padding = -L % size
    # The gradients of keys and values are sums over blocks: in float32, or they would lose digits with every block.
    wide_k, wide_v = k.astype(jnp.float32), v.astype(jnp.float32)
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0), (0, 0))) if padding else q

    def shared(band: Band) -> Array:
        keys = jnp.asarray(band.keys)
        near = (wide_k, wide_v) if keys.size == S else (wide_k[:, keys], wide_v[:, keys])

        def block(_: None, start: Array) -> tuple[None, Array]:
            return None, attend_to(start, queries_of(start), keys, near, None)

        return scan(block, jnp.asarray(band.starts))

    def own(band: Band) -> Array:
        def block(_: None, inputs: tuple[Array, Array]) -> tuple[None, Array]:
            start, index = inputs
            queries, keys = queries_of(start), jnp.minimum(index, S - 1)
            return None, attend_to(start, queries, keys, (wide_k[:, keys], wide_v[:, keys]), index)

        return scan(block, (jnp.asarray(band.starts), jnp.asarray(band.keys)))

    def queries_of(start: Array) -> Array:
        return jnp.minimum(start + jnp.arange(size), L - 1)

    def attend_to(start: Array, queries: Array, keys: Array, near: tuple[Array, Array], index: Array | None) -> Array:
        """Attend with the block of queries from `start`; a key whose `index` is S or more is none, and not seen."""
        k_s, v_s = near[0].astype(k.dtype), near[1].astype(v.dtype)
        q_s = jax.lax.dynamic_slice_in_dim(q, start, size, axis=1)
        seen = mask.materialise(L, S, queries, keys)
        seen = seen if index is None else seen & (index < S)[None, None]
        drop = None if dropout is None else functools.partial(dropout, block=start)
        return attend(q_s, k_s, v_s, seen, mask.distance(L, S, queries, keys), scores, drop=drop)

    def scan(block: Callable[..., Any], blocks: Any) -> Array:
        _, out = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), None, blocks)
        return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])

    found = bands(mask.view(L, S, size, size), size, S)
    return jnp.concatenate([shared(band) if band.shared else own(band) for band in found], axis=1)[:, :L]
