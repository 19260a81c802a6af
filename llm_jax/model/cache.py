"""The KV cache: an argument and a result of the forward pass, like every other state."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from llm_jax.model.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far; row b holds `length[b]` of them, left-aligned."""

    k: Float[Array, "N B S K H"]
    v: Float[Array, "N B S K H"]
    length: Int[Array, " B"]

    def write(self, layer: Int[Array, ""] | int, k: Float[Array, "B L K H"], v: Float[Array, "B L K H"]) -> "KVCache":
        """Puts keys and values of L new tokens behind those of `layer`; `advance` counts them in `length`."""

        def put(buffer: Array, new: Array) -> Array:
            rows = jnp.arange(new.shape[0])[:, None]
            columns = self.length[:, None] + jnp.arange(new.shape[1])[None]
            return buffer.at[layer, rows, columns].set(new.astype(buffer.dtype), mode="drop")

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def view(self, layer: Int[Array, ""] | int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """All keys and values of `layer`, valid up to `length` (and the tokens just written)."""
        return (
            jax.lax.dynamic_index_in_dim(self.k, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.v, layer, keepdims=False),
        )

    def advance(self, tokens: int | Int[Array, " B"]) -> "KVCache":
        """The cache with `tokens` more of what was written counted in every row."""
        return dataclasses.replace(self, length=self.length + tokens)


def init_cache(config: ModelConfig, batch: int, max_len: int) -> KVCache:
    """An empty cache for `batch` rows of up to `max_len` tokens, in the dtype of the computation."""
    shape = (config.n_layers, batch, max_len, config.K, config.H)
    empty = jnp.zeros(shape, config.dtype)
    return KVCache(k=empty, v=empty, length=jnp.zeros(batch, jnp.int32))
