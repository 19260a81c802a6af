"""The mask of attention: which query may see which key, by rules that kernels can read.

`reference` materialises it as booleans. Others skip whole blocks that no query sees, which `Mask.view` says in NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from llm_jax.ops.config import Sparse


@struct.dataclass
class Mask:
    """Which query may see which key. The fields compose: a key is seen if no field hides it.

    Attributes:
      causal: a query sees no later position.
      window: a query sees only the last `window` positions, itself included.
      sinks: and the first `sinks` of its document, however far (Xiao et al. 2023, arXiv:2309.17453).
      sparse: a query sees only the blocks of this pattern.
      segments: tokens see only their own segment (documents packed in one row). Needs L = S.
      prefix: keys that earlier queries of their document see as well (prefix-LM, Raffel et al. 2019).
      kv_length: row b of a cache holds `kv_length[b]` keys, and its queries are the last L of them.
    """

    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    sinks: int = struct.field(pytree_node=False, default=0)
    sparse: Sparse | None = struct.field(pytree_node=False, default=None)
    segments: Int[Array, "B S"] | None = None
    prefix: Bool[Array, "B S"] | None = None
    kv_length: Int[Array, " B"] | None = None

    def distance(self, L: int, S: int, queries: Array | None = None, keys: Array | None = None) -> Int[Array, "#B l s"]:
        """Return the position of each query minus that of each key. `queries` and `keys` pick some of L and S by index.

        Raise `ValueError` if L and S differ and there is no `kv_length`.
        """
        queries = jnp.arange(L) if queries is None else queries
        keys = jnp.arange(S) if keys is None else keys
        if self.kv_length is not None:
            positions = queries[None] + (self.kv_length - L)[:, None]
        elif L != S:
            raise ValueError(f"{L} queries and {S} keys need kv_length for the positions of the queries")
        else:
            positions = queries[None]
        return positions[:, :, None] - keys[None, None]

    def materialise(
        self, L: int, S: int, queries: Int[Array, " l"] | None = None, keys: Int[Array, " s"] | None = None
    ) -> Bool[Array, "#B l s"]:
        """Return the mask as booleans, True where a query may see a key; `queries` and `keys` as in `distance`.

        Raise `ValueError` for `segments` of another length than L and S.
        """
        distance = self.distance(L, S, queries, keys)
        keys = jnp.arange(S) if keys is None else keys
        mask = jnp.ones(distance.shape, bool)
        if self.causal:
            mask = distance >= 0
            if self.prefix is not None:
                mask |= self.prefix[:, None, keys]
        if self.window is not None:
            near = distance < self.window
            if self.sinks:
                near |= (self.document_positions(S)[:, keys] < self.sinks)[:, None]
            mask &= near
        if self.sparse is not None:
            size = self.sparse.block
            view, last = jnp.asarray(self.sparse.view(-(-S // size))), -(-S // size) - 1
            positions = distance + keys[None, None]
            mask &= view[jnp.clip(positions // size, 0, last), keys[None, None] // size]
        if self.kv_length is not None:
            mask &= keys[None, None] < self.kv_length[:, None, None]
        if self.segments is not None:
            if (self.segments.shape[1],) * 2 != (L, S):
                held = self.segments.shape[1]
                raise ValueError(f"segments of {held} tokens don't fit {L} queries and {S} keys")
            mine = self.segments if queries is None else self.segments[:, queries]
            mask &= mine[:, :, None] == self.segments[:, None, keys]
        return mask

    def document_positions(self, S: int) -> Int[Array, "#B S"]:
        """Return the position of every key in its own document, from 0."""
        positions = jnp.arange(S)[None]
        if self.segments is None:
            return positions
        begins = jnp.pad(self.segments[:, 1:] != self.segments[:, :-1], ((0, 0), (1, 0)))
        return positions - jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)

    def view(self, L: int, S: int, rows: int, columns: int) -> Bool[np.ndarray, "l s"]:
        """Return which blocks of `columns` keys any query of a block of `rows` may see, in NumPy.

        True where only the arrays of the mask can tell.
        """
        query, key = np.arange(0, L, rows)[:, None], np.arange(0, S, columns)[None]
        seen = np.ones((query.size, key.size), bool)
        if self.kv_length is not None:
            return seen
        if self.causal and self.prefix is None:
            seen &= key < query + rows
        if self.window is not None and not (self.sinks and self.segments is not None):
            seen &= (query - key < self.window + columns - 1) | (key < self.sinks)
        if self.sparse is not None and rows == columns == self.sparse.block:
            seen &= self.sparse.view(len(seen))
        return seen
