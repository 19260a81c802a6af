"""Attention: one function, one mask, several implementations of the same specification.

`reference` is the specification: plain einsums that hold every score. The others give the same values and
gradients faster or in less memory, and decline, with the reason, what they can't do.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# A finite stand-in for minus infinity: a row that may see nothing gets a uniform pattern instead of NaN.
MASKED = -1e30

Tap = Callable[[str, jax.Array], jax.Array]


class Declined(ValueError):
    """An implementation can't do this case; its message says why."""


@struct.dataclass
class Mask:
    """Who may look at whom. Every field narrows the view; together they compose.

    Attributes:
      causal: a query sees no later position.
      window: a query sees only the last `window` positions, itself included.
      segments: tokens see only their own segment (documents packed in one row). Needs L = S.
      kv_length: row b of a cache holds `kv_length[b]` keys, and its queries are the last L of them.
    """

    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    segments: Int[Array, "B S"] | None = None
    kv_length: Int[Array, " B"] | None = None

    def materialise(
        self, L: int, S: int, start: int | Int[Array, ""] = 0, rows: int | None = None
    ) -> Bool[Array, "#B L S"]:
        """The mask as booleans, True where query l may see key s.

        `start` and `rows` pick a block of `rows` queries out of the L, for implementations that work block by block.
        """
        rows = L if rows is None else rows
        keys = jnp.arange(S)[None, None]
        queries = start + jnp.arange(rows)[None]
        if self.kv_length is not None:
            queries = queries + (self.kv_length - L)[:, None]
        elif L != S:
            raise ValueError(f"{L} queries and {S} keys need kv_length to say where the queries stand")
        if self.segments is not None and (self.segments.shape[1],) * 2 != (L, S):
            raise ValueError(f"segments of {self.segments.shape[1]} tokens can't tell {L} queries and {S} keys apart")
        distance = queries[:, :, None] - keys
        mask = jnp.ones(distance.shape, bool)
        if self.causal:
            mask &= distance >= 0
        if self.window is not None:
            mask &= distance < self.window
        if self.kv_length is not None:
            mask &= keys < self.kv_length[:, None, None]
        if self.segments is not None:
            mine = jax.lax.dynamic_slice_in_dim(self.segments, start, rows, axis=1)
            mask &= mine[:, :, None] == self.segments[:, None, :]
        return mask


class Implementation(Protocol):
    def __call__(
        self, q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask
    ) -> Float[Array, "B L K G H"]: ...


def no_tap(name: str, x: jax.Array) -> jax.Array:
    return x


def attend(q: Array, k: Array, v: Array, mask: Bool[Array, "#B L S"], tap: Tap = no_tap) -> Array:
    """Softmax attention under a materialised mask; logits and softmax are float32 whatever the dtype of `q`."""
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("BLKGH,BSKH->BKGLS", q * jnp.asarray(scale, q.dtype), k, preferred_element_type=jnp.float32)
    scores = tap("attn_scores", scores)
    scores = jnp.where(mask[:, None, None], scores, jnp.asarray(MASKED, scores.dtype))
    pattern = tap("pattern", jax.nn.softmax(scores, axis=-1))
    return jnp.einsum("BKGLS,BSKH->BLKGH", pattern.astype(v.dtype), v)


def reference(q: Array, k: Array, v: Array, mask: Mask, tap: Tap = no_tap) -> Array:
    """The specification: holds all `B K G L S` scores at once."""
    return attend(q, k, v, mask.materialise(q.shape[1], k.shape[1]), tap)


BLOCK = 128  # queries whose scores exist at one time


def chunked(q: Array, k: Array, v: Array, mask: Mask) -> Array:
    """Block by block over the queries, recomputed in the backward pass: memory is linear in L."""
    B, L, K, G, H = q.shape
    if L % BLOCK:
        raise Declined(f"chunked takes a query length that is a multiple of {BLOCK}, got {L}")

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(_: None, start: Array) -> tuple[None, Array]:
        queries = jax.lax.dynamic_slice_in_dim(q, start, BLOCK, axis=1)
        return None, attend(queries, k, v, mask.materialise(L, k.shape[1], start, BLOCK))

    _, blocks = jax.lax.scan(block, None, jnp.arange(0, L, BLOCK))
    return jnp.moveaxis(blocks, 0, 1).reshape(B, L, K, G, H)


IMPLEMENTATIONS: dict[str, Implementation] = {"reference": reference, "chunked": chunked}

LONG = 1024  # from this many queries on the L x S scores, not the arithmetic, set the limit


def attention(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    implementation: str | None = None,
    tap: Tap | None = None,
) -> Float[Array, "B L K G H"]:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): query head (k, g) reads key/value head k.

    `implementation=None` takes `reference` for short rows and `chunked` for long ones; a name takes that one or raises
    `Declined`, a `ValueError`, with the reason. With `tap`, scores and pattern are shown to it, so the reference runs.
    """
    if tap is not None:
        return reference(q, k, v, mask, tap)
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"unknown attention {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}")
        return IMPLEMENTATIONS[implementation](q, k, v, mask)
    if q.shape[1] >= LONG and q.shape[1] % BLOCK == 0:
        return chunked(q, k, v, mask)
    return reference(q, k, v, mask)
