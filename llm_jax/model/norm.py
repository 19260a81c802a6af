"""The norm layer."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.model.config import ModelConfig
from llm_jax.ops.norm import layer_norm, rms_norm


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, with its parameters."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L *heads D"]) -> Float[Array, "B L *heads D"]:
        c = self.config
        if c.norm == "rmsnorm_1p":
            # In float32: near 1, bfloat16 has steps of 1/128, which small weights don't reach.
            scale = 1 + self.param("scale", nn.initializers.zeros, x.shape[-1:]).astype(jnp.float32)
            return rms_norm(x, scale, c.norm_eps)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:]).astype(x.dtype)
        if c.norm == "rmsnorm":
            return rms_norm(x, scale, c.norm_eps)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(x.dtype)
        return layer_norm(x, scale, bias, c.norm_eps)
