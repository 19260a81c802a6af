"""A mixer that reads the last few tokens: the gated short convolution of LFM2 (arXiv:2511.23404)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.model.attention import Context
from llm_jax.model.config import ModelConfig
from llm_jax.model.init import normal
from llm_jax.model.mixer import Mixer
from llm_jax.ops.gradient import linears, settle
from llm_jax.ops.linear_attention import short_convolution

State = Float[Array, "B _ D"]  # what the last W - 1 tokens gave to the convolution


class ShortConvolution(Mixer):
    """`(after * convolution(before * value)) W_out` over `attention.convolution` tokens; all three are linear in x.

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
        before, after, value = map(settle, self._linears(["before", "after", "value"], "hidden", x))
        kernel = self.param("w_convolution", nn.initializers.normal(W**-0.5), (W, D)).astype(x.dtype)
        mixed, recent = short_convolution(before * value, kernel, state, **where)
        [out] = self._linears(["out"], "residual", settle(after * mixed))
        return out, None if state is None else recent

    def _linears(self, names: list[str], role: str, x: Float[Array, "B L D"]) -> list[Float[Array, "B L D"]]:
        D = self.config.d_model
        init = normal(self.config, role, D)
        weights = [self.param(f"w_{name}", init, (D, D)).astype(x.dtype) for name in names]
        return linears(["BLD,DI->BLI"] * len(names), x, weights, [None] * len(names))

    @classmethod
    def init_state(cls, config: ModelConfig, rows: int, size: int) -> State:
        """Return zeros: nothing came before the first token."""
        return jnp.zeros((rows, config.attention.convolution - 1, config.d_model), config.dtype)
