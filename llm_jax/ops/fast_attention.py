"""Attention by kernels, all with one signature: our own (flash), JAX's (splash), NVIDIA's (cudnn), OpenXLA's (tokamax).

Each accepts what it can do, and raises `Declined` with the reason for the rest. On a mesh each device runs the kernel
for its own rows and heads.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llm_jax.ops import kernels
from llm_jax.ops.attention import Declined, platform
from llm_jax.ops.collectives import shard_map_by_letters
from llm_jax.ops.config import Scores
from llm_jax.ops.mask import Mask
from llm_jax.ops.position import alibi_slopes

# Sides of a tile; the largest that divides the row is taken. A register of a TPU has 128 lanes, which smaller tiles
# would leave empty; with 1024 the backward pass under all rules exceeds the 16 MiB that a kernel gets on v5e and v5p,
# as it does with wider heads than these.
SIDES = (512, 256, 128)
WIDEST = 256


def by_head(attend: Callable[..., Array]) -> Callable[..., Array]:
    """Return `attend(q [G L H], k [S H], v [S H], of_head, of_row)` for every key/value head of every row of a batch.

    `vmap` adds the two to the grid of a kernel, which is written for one.
    """
    heads = jax.vmap(attend, in_axes=(0, 0, 0, 0, None))
    rows = jax.vmap(heads, in_axes=(0, 0, 0, None, 0))

    def run(q: Array, k: Array, v: Array, *more: Any) -> Array:
        out = rows(q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2), *more)
        return out.transpose(0, 3, 1, 2, 4)

    return run


def accept(name: str, q: Array, k: Array, mask: Mask, scores: Scores, *, can: str, on: str) -> None:
    """Raise `Declined` for what `name` is asked for and can't do. Causal masks, windows and scales all of them can."""
    L, S, here = q.shape[1], k.shape[1], platform()
    if here not in on.split():
        raise Declined(f"{name} runs on {on.replace(' ', ' or ')}, got {here}; leave the implementation open")
    if L != S:
        raise Declined(f"{name} takes as many keys as queries, got {S} and {L}; 'chunked' and 'reference' take any")
    fields = {field.name: getattr(x, field.name) for x in (mask, scores) for field in dataclasses.fields(x)}
    asked = {field for field, value in fields.items() if isinstance(value, jax.Array | np.ndarray) or value}
    if beyond := asked - {"causal", "window", "scale", *can.split()}:
        raise Declined(f"{name} has no {' and no '.join(sorted(beyond))}; 'chunked' and 'reference' have")


def tile_side(name: str, L: int, mask: Mask) -> int:
    """Return the side of a tile for rows of L tokens; a block of a sparse mask is a tile.

    Raise `Declined` if no side divides L.
    """
    sides = SIDES if mask.sparse is None else (mask.sparse.block,)
    if sides[-1] not in SIDES:
        raise Declined(f"{name} takes a sparse.block in {SIDES}, got {sides[-1]}; change it, or take 'chunked'")
    for side in sides:
        if L % side == 0:
            return side
    raise Declined(f"{name} takes a multiple of {sides[-1]} tokens, got {L}; pad rows to {L + -L % sides[-1]}")


def flash(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """Attend by our FlashAttention (arXiv:2205.14135): compiled on TPU, interpreted on CPU, which is for tests.

    Any mask without a cache, any scores, bfloat16 or float32; memory is linear in L, work in the tiles in view. Raise
    `Declined` for anything else.
    """
    accept("flash", q, k, mask, scores, can="sinks sparse segments prefix softcap alibi", on="tpu cpu")
    B, L, K, G, H = q.shape
    if H > WIDEST:
        raise Declined(f"flash takes heads of at most {WIDEST}, got {H}; take 'chunked'")
    side, tags = tile_side("flash", L, mask), kernels.tags_of(mask, B, L)
    tiles = kernels.Tiles(
        side,
        mask.view(L, L, side, side),
        ahead=0 if mask.causal else None,
        window=mask.window,
        softcap=scores.softcap,
    )
    q = q * jnp.asarray(scores.factor(H), q.dtype)
    slopes = jnp.asarray(alibi_slopes(K * G).reshape(K, G, 1, 1), jnp.float32) if scores.alibi else None
    return shard_map_by_letters(
        by_head(functools.partial(kernels.flash, tiles)), "BLKGH BSKH BSKH KG11 BTS BLKGH", q, k, v, slopes, tags
    )


def splash(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """Attend by the TPU kernel that comes with JAX; interpreted on CPU. Raise `Declined` for what it can't do."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    accept("splash", q, k, mask, scores, can="segments softcap", on="tpu cpu")
    (L, G, H), side = (q.shape[1], *q.shape[3:]), tile_side("splash", q.shape[1], mask)
    seen = splash_attention_mask.FullMask((L, L))
    if mask.causal or mask.window is not None:
        reach = None if mask.window is None else mask.window - 1
        seen = splash_attention_mask.LocalMask((L, L), (reach, 0 if mask.causal else None), offset=0)
    attend: Any = splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask([seen] * G),
        block_sizes=splash_attention_kernel.BlockSizes(side, side, side, side, side, side, side, side),
        attn_logits_soft_cap=scores.softcap,
        interpret=platform() == "cpu",
    )
    q, ids = q * jnp.asarray(scores.factor(H), q.dtype), None
    if mask.segments is not None:
        ids = splash_attention_kernel.SegmentIds(mask.segments, mask.segments)
    return shard_map_by_letters(
        by_head(lambda q, k, v, _, ids: attend(q, k, v, ids)), "BLKGH BSKH BSKH KG BS BLKGH", q, k, v, None, ids
    )


def cudnn(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """Attend by NVIDIA's kernel, through `jax.nn.dot_product_attention`. Raise `Declined` for what it can't do."""
    accept("cudnn", q, k, mask, scores, can="", on="gpu")
    if mask.window is not None and not mask.causal:
        raise Declined(f"cudnn has windows under a causal mask only, got window={mask.window} and causal=False")
    B, L, K, G, H = q.shape
    try:
        out = jax.nn.dot_product_attention(
            q.reshape(B, L, K * G, H),
            k,
            v,
            scale=scores.factor(H),
            is_causal=mask.causal,
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError) as reason:  # a dtype, a head size, a missing library
        raise Declined(f"cudnn: {reason}") from reason
    return out.reshape(q.shape)


def tokamax(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """Attend by what openxla/tokamax finds best on this device. Raise `Declined` for what it can't do."""
    accept("tokamax", q, k, mask, scores, can="softcap", on="tpu gpu cpu")
    try:
        from tokamax import dot_product_attention
    except ImportError as reason:
        raise Declined(f"tokamax: {reason}; pip install tokamax (Python 3.12 and JAX 0.11.1, or later)") from reason

    def kernel(q: Array, k: Array, v: Array) -> Array:
        B, L, K, G, H = q.shape
        reach = None if mask.window is None else (mask.window - 1, 0 if mask.causal else L)
        out = dot_product_attention(
            q.reshape(B, L, K * G, H),
            k,
            v,
            scale=scores.factor(H),
            is_causal=mask.causal,
            local_window_size=reach,
            logits_soft_cap=scores.softcap,
        )
        return out.reshape(q.shape)

    return shard_map_by_letters(kernel, "BLKGH BSKH BSKH BLKGH", q, k, v)
