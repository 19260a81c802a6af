"""A mixer that reads the last few tokens: the gated short convolution of LFM2 (arXiv:2511.23404)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.model.attention import Context
from llm_jax.model.config import ModelConfig
from llm_jax.model.init import normal
from llm_jax.model.mixer import Mixer
from llm_jax.ops.gradient import linear
from llm_jax.ops.linear_attention import short_convolution

State = Float[Array, "B _ D"]  # what the last W - 1 tokens gave to the convolution


class ShortConvolution(Mixer):
    """`(c * convolution(b * v)) W_out`, where b, c and v are linear in x, over `attention.convolution` tokens.

    Each channel has a kernel of its own. It costs less than attention, and a small model knows from its first steps
    which token came before:

        model.layers=llm_jax.model.convolution:ShortConvolution,global
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], context: Context, state: State | None
    ) -> tuple[Float[Array, "B L D"], State | None]:
        c = self.config
        D, W = c.d_model, c.attention.convolution
        where: dict[str, Any] = {"segments": context.mask.segments, "lengths": context.lengths}
        w_in = self.param("w_in", normal(c, "hidden", D), (D, 3, D)).astype(x.dtype)
        w_out = self.param("w_out", normal(c, "residual", D), (D, D)).astype(x.dtype)
        kernel = self.param("w_convolution", nn.initializers.normal(W**-0.5), (W, D)).astype(x.dtype)
        before, after, values = jnp.moveaxis(linear("BLD,DTI->BLTI", x, w_in), 2, 0)
        mixed, recent = short_convolution(before * values, kernel, state, **where)
        return linear("BLI,ID->BLD", after * mixed, w_out), None if state is None else recent

    @classmethod
    def init_state(cls, config: ModelConfig, rows: int, size: int) -> State:
        """Return zeros: nothing came before the first token."""
        return jnp.zeros((rows, config.attention.convolution - 1, config.d_model), config.dtype)
