"""The attention layer: project, place, attend, project back."""

import flax.linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from llm_jax.model.cache import KVCache
from llm_jax.model.config import ModelConfig
from llm_jax.model.init import normal
from llm_jax.model.taps import tap, tapped
from llm_jax.ops.attention import Mask, attention
from llm_jax.ops.gradient import add_bias, linear
from llm_jax.ops.position import rotary
from llm_jax.sharding import constrain


@struct.dataclass
class Context:
    """What every layer shares: where the tokens stand, whom they may see, whether dropout is on."""

    positions: Int[Array, "#B L"]
    mask: Mask
    train: bool = struct.field(pytree_node=False, default=False)


class Attention(nn.Module):
    """Grouped-query attention, with or without a cache: one path."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], context: Context, layer: Int[Array, ""] | int, cache: KVCache | None
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        c = self.config
        D, K, G, H = c.d_model, c.K, c.G, c.H
        q = constrain(self._project("q", x, (K, G, H)), "BLKGH")
        k = constrain(self._project("k", x, (K, H)), "BLKH")
        v = constrain(self._project("v", x, (K, H)), "BLKH")
        if c.positions == "rotary":
            q, k = (rotary(y, context.positions, c.rope_theta) for y in (q, k))
        q, k, v = tap(self, "q", q, c.kept), tap(self, "k", k, c.kept), tap(self, "v", v, c.kept)

        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cache.view(layer)
        tap_scores = (lambda name, y: tap(self, name, y)) if tapped(self) else None
        z = attention(q, k, v, context.mask, implementation=c.attention, tap=tap_scores)
        z = tap(self, "z", z, c.kept)

        w_o = self.param("w_o", normal(c, "residual", K * G * H), (K, G, H, D)).astype(x.dtype)
        out = linear("BLKGH,KGHD->BLD", z, w_o)
        if c.bias:
            out = add_bias(out, self.param("b_o", nn.initializers.zeros, (D,)).astype(x.dtype))
        return constrain(out, "BLD"), cache

    def _project(self, name: str, x: Float[Array, "B L D"], heads: tuple[int, ...]) -> Array:
        letters = "KGH"[-len(heads) :] if len(heads) == 3 else "KH"
        w = self.param(f"w_{name}", normal(self.config, "hidden", x.shape[-1]), (x.shape[-1], *heads)).astype(x.dtype)
        y = linear(f"BLD,D{letters}->BL{letters}", x, w)
        if self.config.bias:
            y = add_bias(y, self.param(f"b_{name}", nn.initializers.zeros, heads).astype(x.dtype))
        return y
