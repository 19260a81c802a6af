"""Attention in C++, block by block: `attention.h`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax.ops.attention import Declined, Scores
from llm_jax.ops.mask import Mask
from llm_jax.ops.native.build import call, refusal

WIDEST = 256  # heads: what a block of outputs in attention.h has room for


def native(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """Attend block by block with a running softmax, as FlashAttention does (arXiv:2205.14135); memory is linear in L.

    Blocks that no query sees, for order, window or documents, are skipped. Raise `Declined` for what it can't do.
    """
    if (reason := refusal()) is not None:
        raise Declined(f"native: {reason}")
    if q.shape[1] != k.shape[1] or mask.kv_length is not None:
        raise Declined(f"native takes as many keys as queries, and no cache, got {k.shape[1]} and {q.shape[1]}")
    if q.shape[-1] > WIDEST:
        raise Declined(f"native takes heads of at most {WIDEST}, got {q.shape[-1]}")
    if (scale := scores.factor(q.shape[-1])) <= 0:
        raise Declined(f"native takes a positive scale, got {scale}")
    asked = {"sinks": mask.sinks, "sparse": mask.sparse, "prefix": mask.prefix is not None}
    asked |= {"softcap": scores.softcap, "alibi": scores.alibi}
    if beyond := [name for name, value in asked.items() if value]:
        raise Declined(f"native has no {' and no '.join(beyond)}; 'chunked' and 'reference' have")
    segments = jnp.zeros(0, jnp.int32) if mask.segments is None else mask.segments.astype(jnp.int32)
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    out: Array = _attend((scale, mask.causal, mask.window or 0), q32, k32, v32, segments)
    return out.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rules: tuple[float, bool, int], q: Array, k: Array, v: Array, segments: Int[Array, "..."]) -> Array:
    return _forward(rules, q, k, v, segments)[0]


def _attributes(rules: tuple[float, bool, int]) -> dict[str, Any]:
    scale, causal, window = rules
    return {"scale": np.float32(scale), "causal": causal, "window": np.int64(window)}


def _forward(
    rules: tuple[float, bool, int], q: Array, k: Array, v: Array, segments: Array
) -> tuple[Array, tuple[Array, ...]]:
    B, L, K, G, _ = q.shape
    like = q, jax.ShapeDtypeStruct((B, K, G, L), q.dtype)
    out, lse = call("attention", like, q, k, v, segments, **_attributes(rules))
    return out, (q, k, v, segments, out, lse)


def _backward(rules: tuple[float, bool, int], saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, lse = saved
    found = call("attention_backward", (q, k, v), q, k, v, out, lse, g, segments, **_attributes(rules))
    return *found, None


_attend.defvjp(_forward, _backward)
