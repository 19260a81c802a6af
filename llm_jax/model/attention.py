"""The attention layer: project, rotate, attend, project back."""

import dataclasses
from collections.abc import Mapping

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
from llm_jax.ops.gradient import linear, linears
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
        q, k, v = self._project(x, {"q": (K, G, H), "k": (K, H), "v": (K, H)})
        q, k, v = constrain(q, "BLKGH"), constrain(k, "BLKH"), constrain(v, "BLKH")
        q, k = self._rotate("q", q, context), self._rotate("k", k, context)
        q, k, v = tap(self, "q", q, c.kept), tap(self, "k", k, c.kept), tap(self, "v", v, c.kept)
        z, cache = self._attend(x, q, k, v, context, slot, cache)
        z = tap(self, "z", constrain(z, "BLKGH"), c.kept)

        w_o = self.param("w_o", normal(c, "residual", K * G * H), (K, G, H, D)).astype(x.dtype)
        b_o = self._bias("o", (D,), x) if c.bias in ("attention", "all") else None
        return linear("BLKGH,KGHD->BLD", z, w_o, b_o), cache

    def _project(self, x: Float[Array, "B L D"], heads: Mapping[str, tuple[int, ...]]) -> list[Array]:
        """Return `x` times `w_{name}` for each name, with heads as the last axes of the result."""
        letters, weights, biases = [], [], []
        for name, shape in heads.items():
            each = "KGH" if len(shape) == 3 else "KH"
            letters.append(f"BLD,D{each}->BL{each}")
            init = normal(self.config, "hidden", x.shape[-1])
            weights.append(self.param(f"w_{name}", init, (x.shape[-1], *shape)).astype(x.dtype))
            biases.append(self._bias(name, shape, x) if self.config.bias != "none" else None)
        return linears(letters, x, weights, biases)

    def _bias(self, name: str, shape: tuple[int, ...], x: Array) -> Array:
        return self.param(f"b_{name}", nn.initializers.zeros, shape).astype(x.dtype)

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
