"""A mixer of a user's own, for the tests: each token reads the mean of what its document has had so far."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import llm_jax as lj


class Average(lj.Mixer):
    """Projects the running mean of a document: a sum and a count are its state."""

    @nn.compact
    def __call__(self, x: jax.Array, context: Any, state: Any) -> tuple[jax.Array, Any]:
        D = x.shape[-1]
        w = self.param("w_out", nn.initializers.normal(D**-0.5), (D, D)).astype(x.dtype)
        counted = jnp.ones(x.shape[:2]) if context.mask.segments is None else context.mask.segments.astype(jnp.float32)
        if context.lengths is not None:
            counted = jnp.where(jnp.arange(x.shape[1])[None] < context.lengths[:, None], counted, 0)
        segments = counted if context.mask.segments is not None else jnp.ones_like(counted)
        same = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))
        seen = same * (counted[:, None, :] > 0)
        total, count = jnp.einsum("BLS,BSD->BLD", seen.astype(x.dtype), x), seen.sum(-1).astype(x.dtype)
        if state is not None:
            total, count = total + state["total"][:, None].astype(x.dtype), count + state["count"][:, None]
            last = jnp.where(counted > 0, jnp.arange(x.shape[1])[None], 0).max(1)
            rows = jnp.arange(len(x))
            state = {"total": total[rows, last].astype(jnp.float32), "count": count[rows, last].astype(jnp.float32)}
        return total / jnp.maximum(count, 1)[..., None] @ w, state

    @classmethod
    def init_state(cls, config: lj.ModelConfig, rows: int, size: int) -> Any:
        return {"total": jnp.zeros((rows, config.d_model)), "count": jnp.zeros(rows)}


class Forgetful(lj.Mixer):
    """Trains, and can't generate."""

    @nn.compact
    def __call__(self, x: jax.Array, context: Any, state: Any) -> tuple[jax.Array, Any]:
        return x * self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(x.dtype)[None, None], state
