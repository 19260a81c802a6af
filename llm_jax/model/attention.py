"""The attention layer: project, rotate, attend, project back."""

import dataclasses

import flax.linen as nn
import jax
from flax import struct
from jaxtyping import Array, Float, Int

from llm_jax.model.cache import Cache
from llm_jax.model.config import ModelConfig
from llm_jax.model.init import normal
from llm_jax.model.norm import Norm
from llm_jax.model.stack import Index
from llm_jax.model.taps import scores_are_tapped, tap
from llm_jax.ops.attention import Dropout, attention
from llm_jax.ops.collectives import reduce_scatter_tokens
from llm_jax.ops.gradient import add_bias, linear
from llm_jax.ops.mask import Mask
from llm_jax.ops.position import rotary
from llm_jax.sharding import constrain


@struct.dataclass
class Context:
    """What all layers share.

    Attributes:
      positions: of the tokens in their documents.
      mask: which tokens may see which.
      lengths: how many tokens of each row count, the rest is padding; None: all.
      reach: how long each row may become, for rotary angles that depend on it; None: as long as it is.
      train: whether dropout is on.
    """

    positions: Int[Array, "#B L"]
    mask: Mask
    lengths: Int[Array, " B"] | None = None
    reach: Int[Array, " B"] | None = None
    train: bool = struct.field(pytree_node=False, default=False)


class Attention(nn.Module):
    """Grouped-query attention of one kind of mixer; with or without a cache it is one code path."""

    config: ModelConfig
    mixer: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], context: Context, slot: Index, cache: Cache | None
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        c = self.config
        D, K, G, H = c.d_model, c.K, c.G, c.H
        q = constrain(self._project("q", x, (K, G, H)), "BLKGH")
        k = constrain(self._project("k", x, (K, H)), "BLKH")
        v = constrain(self._project("v", x, (K, H)), "BLKH")
        q, k = self._rotate("q", q, context), self._rotate("k", k, context)
        q, k, v = tap(self, "q", q, c.kept), tap(self, "k", k, c.kept), tap(self, "v", v, c.kept)
        z, cache = self._attend(x, q, k, v, context, slot, cache)
        z = tap(self, "z", constrain(z, "BLKGH"), c.kept)

        w_o = self.param("w_o", normal(c, "residual", K * G * H), (K, G, H, D)).astype(x.dtype)
        out = reduce_scatter_tokens(linear("BLKGH,KGHD->BLD", z, w_o))
        if c.bias in ("attention", "all"):
            out = add_bias(out, self.param("b_o", nn.initializers.zeros, (D,)).astype(x.dtype))
        return out, cache

    def _project(self, name: str, x: Float[Array, "B L D"], heads: tuple[int, ...]) -> Array:
        """Return `x` times `w_{name}`, with heads as its last axes."""
        letters = "KGH" if len(heads) == 3 else "KH"
        w = self.param(f"w_{name}", normal(self.config, "hidden", x.shape[-1]), (x.shape[-1], *heads)).astype(x.dtype)
        y = linear(f"BLD,D{letters}->BL{letters}", x, w)
        if self.config.bias != "none":
            y = add_bias(y, self.param(f"b_{name}", nn.initializers.zeros, heads).astype(x.dtype))
        return y

    def _rotate(self, name: str, y: Array, context: Context) -> Array:
        """Norm queries or keys, and rotate them by their positions, if the config asks for it."""
        c = self.config
        if c.attention.qk_norm != "none":
            norm = Norm(c, name=f"{name}_norm")
            y = norm(y) if c.attention.qk_norm == "head" else norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape)
        if c.positions != "rotary" or self.mixer == "nope":
            return y
        reach = y.shape[1] if context.reach is None else context.reach
        return rotary(y, context.positions, c.rotary.local if self.mixer == "local" else c.rotary, reach)

    def _attend(
        self, x: Float[Array, "B L D"], q: Array, k: Array, v: Array, context: Context, slot: Index, cache: Cache | None
    ) -> tuple[Float[Array, "B L K G H"], Cache | None]:
        """Return what the heads of `x` read, and the cache with the new keys and values."""
        c, mask = self.config, context.mask
        if self.mixer == "local":
            mask = dataclasses.replace(mask, window=c.attention.window, sinks=c.attention.sinks)
        elif self.mixer == "sparse":
            mask = dataclasses.replace(mask, sparse=c.attention.sparse)
        if cache is not None:
            cache = cache.write(slot, k, v)
            k, v = cache.keys_values(slot)
        tap_scores = (lambda name, y: tap(self, name, y)) if scores_are_tapped(self) else None
        how = c.attention.implementation
        dropout = self._dropout(context, slot)
        return attention(q, k, v, mask, c.scores, implementation=how, tap=tap_scores, dropout=dropout), cache

    def _dropout(self, context: Context, slot: Index) -> Dropout | None:
        """Return the dropout of the pattern in training, with a key for each layer."""
        rate = self.config.attention.dropout
        if rate == 0 or not context.train:
            return None
        return Dropout(jax.random.fold_in(self.make_rng("dropout"), slot), rate)
