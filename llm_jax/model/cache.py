"""The cache: an argument and a result of the forward pass, like every other state."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from llm_jax.model.config import ModelConfig, own_mixer
from llm_jax.model.pattern import n_remembering
from llm_jax.model.stack import Index
from llm_jax.ops.bits import as_bits, as_numbers
from llm_jax.ops.linear_attention import State


@struct.dataclass
class Cache:
    """What layers remember of the tokens so far; row b holds `length[b]` of them, left-aligned.

    The N layers of softmax attention keep keys and values, head by head, as attention multiplies them. The M layers of
    linear attention keep a state of fixed size and the last inputs of their short convolution. Layers of a user's own
    keep what they like, in `own` by import path.
    Where rotary angles depend on the length of a text, `reach` is the length of each row when it is done, so that its
    first keys are rotated as its last queries are; `init_cache` sets it to the size of the cache.
    """

    k: Float[Array, "N B K S H"]
    v: Float[Array, "N B K S H"]
    state: State
    recent: Float[Array, "M B W K G2 H"]
    length: Int[Array, " B"]
    reach: Int[Array, " B"] | None = None
    own: dict[str, PyTree] = dataclasses.field(default_factory=dict)

    def write(self, slot: Index, k: Float[Array, "B L K H"], v: Float[Array, "B L K H"]) -> "Cache":
        """Write keys and values of L new tokens after those in a slot; `advance` adds them to `length`."""

        def put(buffer: Array, new: Array) -> Array:
            rows, columns = self._indices(new.shape[1])
            bits = as_bits(buffer).at[slot, rows, :, columns].set(as_bits(new.astype(buffer.dtype)), mode="drop")
            return as_numbers(bits, buffer.dtype)

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def keys_values(self, slot: Index) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Return all keys and values in a slot, valid up to `length` plus the tokens just written."""
        return jnp.swapaxes(_take(self.k, slot), 1, 2), jnp.swapaxes(_take(self.v, slot), 1, 2)

    def remember(self, slot: Index, state: State, recent: Float[Array, "B W K G2 H"] | None) -> "Cache":
        """Replace the state of a linear layer, and unless it is None the last inputs of its convolution."""

        def put(buffer: Array, new: Array) -> Array:
            return buffer.at[slot].set(new.astype(buffer.dtype))

        old, memory = self.state.normaliser, put(self.state.memory, state.memory)
        normaliser = old if old is None or state.normaliser is None else put(old, state.normaliser)
        recent = self.recent if recent is None else put(self.recent, recent)
        return dataclasses.replace(self, state=State(memory, normaliser), recent=recent)

    def recall(self, slot: Index) -> tuple[State, Float[Array, "B W K G2 H"]]:
        """Return the state of a linear layer, and the last inputs of its convolution."""
        return jax.tree.map(lambda buffer: _take(buffer, slot), self.state), _take(self.recent, slot)

    def own_state(self, path: str, slot: Index) -> PyTree:
        """Return the state of a layer of the mixer `path`."""
        return jax.tree.map(lambda buffer: _take(buffer, slot), self.own[path])

    def keep_own(self, path: str, slot: Index, state: PyTree) -> "Cache":
        """Replace the state of a layer of the mixer `path`."""
        kept = jax.tree.map(lambda buffer, new: buffer.at[slot].set(new.astype(buffer.dtype)), self.own[path], state)
        return dataclasses.replace(self, own=self.own | {path: kept})

    def spread(self, flags: Bool[Array, "B L"]) -> Bool[Array, "B S"]:
        """Return flags of L new tokens at the indices where their keys are written, and False elsewhere."""
        nothing = jnp.zeros((self.k.shape[1], self.k.shape[3]), bool)
        return nothing.at[self._indices(flags.shape[1])].set(flags, mode="drop")

    def advance(self, tokens: int | Int[Array, " B"]) -> "Cache":
        """Return the cache with `tokens` more counted in every row, which `write` has written."""
        return dataclasses.replace(self, length=self.length + tokens)

    def resized(self, size: int) -> "Cache":
        """Return the cache with room for keys and values of `size` tokens a row; those past it are dropped."""

        def fit(buffer: Array) -> Array:
            kept = buffer[:, :, :, :size]
            return jnp.pad(kept, ((0, 0), (0, 0), (0, 0), (0, size - kept.shape[3]), (0, 0)))

        return dataclasses.replace(self, k=fit(self.k), v=fit(self.v))

    def _indices(self, L: int) -> tuple[Int[Array, "B 1"], Int[Array, "B L"]]:
        """Return the rows and columns of L new tokens."""
        return jnp.arange(len(self.length))[:, None], self.length[:, None] + jnp.arange(L)[None]


def _take(buffer: Array, slot: Index) -> Array:
    return as_numbers(jax.lax.dynamic_index_in_dim(as_bits(buffer), slot, keepdims=False), buffer.dtype)


def init_cache(config: ModelConfig, batch: int, max_len: int) -> Cache:
    """Return an empty cache for `batch` rows of up to `max_len` tokens: `config.dtype`, but states are float32."""
    c, layers = config, n_remembering(config)
    N, M, width = layers.pop("keys", 0), layers.pop("state", 0), c.attention.convolution - 1
    empty = jnp.zeros((N, batch, c.K, max_len, c.H), c.dtype)
    state = State(jnp.zeros((M, batch, c.K, c.H, c.H)), jnp.zeros((M, batch, c.K, c.H)))
    recent = jnp.zeros((M, batch, width, c.K, c.G + 2, c.H), c.dtype)
    reach = jnp.full(batch, max_len, jnp.int32) if c.positions == "rotary" and c.rotary.by_length else None
    own = {path: _repeated(own_mixer(path).init_state(c, batch, max_len), n) for path, n in layers.items()}
    return Cache(empty, empty, state, recent, jnp.zeros(batch, jnp.int32), reach, own)


def _repeated(state: PyTree, layers: int) -> PyTree:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), state)
