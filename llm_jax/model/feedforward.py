"""The feed-forward layer, plain or gated."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.model.config import ModelConfig
from llm_jax.model.init import normal
from llm_jax.model.taps import tap
from llm_jax.ops.gradient import add_bias, linear, settle
from llm_jax.sharding import constrain

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,  # the tanh form, as GPT-2 has it
    "silu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
}


class FeedForward(nn.Module):
    """`act(x W_up) W_down`, or gated `(act(x W_gate) * (x W_up)) W_down` (Shazeer 2020, arXiv:2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c = self.config
        pre = settle(self._linear("gate" if c.gated else "up", "hidden", x, c.d_model, c.F))
        h = ACTIVATIONS[c.activation](tap(self, "mlp_pre", pre, c.kept))
        if c.gated:
            h = h * settle(self._linear("up", "hidden", x, c.d_model, c.F))
        h = tap(self, "mlp_post", constrain(settle(h), "BLF"), c.kept)
        return constrain(self._linear("down", "residual", h, c.F, c.d_model), "BLD")

    def _linear(self, name: str, role: str, x: Array, fan_in: int, fan_out: int) -> Array:
        w = self.param(f"w_{name}", normal(self.config, role, fan_in), (fan_in, fan_out)).astype(x.dtype)
        y = linear("BLD,DF->BLF", x, w)
        if self.config.bias:
            y = add_bias(y, self.param(f"b_{name}", nn.initializers.zeros, (fan_out,)).astype(x.dtype))
        return y
