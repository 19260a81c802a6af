"""A layer of `own_layer.py`: it lies in a file, so that a run can import it again."""

import flax.linen as nn
import jax.numpy as jnp

import llm_jax as lj


class RunningMean(lj.Mixer):
    """Each token reads the mean of its document so far, projected: the cheapest memory there is."""

    @nn.compact
    def __call__(self, x, context, state):
        index = jnp.arange(x.shape[1])
        here = index < (x.shape[1] if context.lengths is None else context.lengths[:, None])  # not padding
        total, count = jnp.cumsum(x * jnp.where(here, 1, 0)[..., None], axis=1), context.positions + 1
        if state is not None:  # text is generated: what came before these tokens
            total = total + state["total"][:, None]
            state = {"total": total[:, -1]}
        elif context.mask.segments is not None:  # a document begins where its positions do
            start = index - context.positions
            before = jnp.take_along_axis(total, jnp.maximum(start - 1, 0)[..., None], axis=1)
            total = total - jnp.where(start[..., None] > 0, before, 0)
        w = self.param("w_out", nn.initializers.normal(0.02), (x.shape[-1], x.shape[-1]))
        return total / count[..., None] @ w.astype(x.dtype), state

    @classmethod
    def init_state(cls, config, rows, size):
        return {"total": jnp.zeros((rows, config.d_model))}
