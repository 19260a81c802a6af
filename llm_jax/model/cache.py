"""The cache: an argument and a result of the forward pass, like every other state."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llm_jax.model.config import SOFTMAX, ModelConfig
from llm_jax.ops.linear_attention import State

Slot = Int[Array, ""] | int  # of which layer, among those of its kind


@struct.dataclass
class Cache:
    """What the tokens seen so far left behind; row b holds `length[b]` of them, left-aligned.

    The N layers of softmax attention keep keys and values, the M of linear attention a state of fixed size and the
    last inputs of their short convolution. Where rotary angles go by the length of a text, `reach` is that of each row
    when it is done: its first keys are rotated as its last queries are. `init_cache` makes it all the room there is.
    """

    k: Float[Array, "N B S K H"]
    v: Float[Array, "N B S K H"]
    state: State
    recent: Float[Array, "M B W K G2 H"]
    length: Int[Array, " B"]
    reach: Int[Array, " B"] | None = None

    def write(self, slot: Slot, k: Float[Array, "B L K H"], v: Float[Array, "B L K H"]) -> "Cache":
        """Puts keys and values of L new tokens behind those of a layer; `advance` counts them in `length`."""

        def put(buffer: Array, new: Array) -> Array:
            return buffer.at[slot, *self._places(new.shape[1])].set(new.astype(buffer.dtype), mode="drop")

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def view(self, slot: Slot) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """All keys and values of a layer, valid up to `length` (and the tokens just written)."""
        return _take(self.k, slot), _take(self.v, slot)

    def remember(self, slot: Slot, state: State, recent: Float[Array, "B W K G2 H"] | None) -> "Cache":
        """Puts the state of a linear layer in the place of the old one."""
        put = lambda buffer, new: buffer if new is None else buffer.at[slot].set(new.astype(buffer.dtype))  # noqa: E731
        states = State(put(self.state.memory, state.memory), put(self.state.normaliser, state.normaliser))
        return dataclasses.replace(self, state=states, recent=put(self.recent, recent))

    def recall(self, slot: Slot) -> tuple[State, Float[Array, "B W K G2 H"]]:
        """The state of a linear layer, and the last inputs of its convolution."""
        return jax.tree.map(lambda buffer: _take(buffer, slot), self.state), _take(self.recent, slot)

    def spread(self, flags: Bool[Array, "B L"]) -> Bool[Array, "B S"]:
        """Flags of L new tokens at the places where their keys are written, False elsewhere."""
        nothing = jnp.zeros((self.k.shape[1], self.k.shape[2]), bool)
        return nothing.at[self._places(flags.shape[1])].set(flags, mode="drop")

    def advance(self, tokens: int | Int[Array, " B"]) -> "Cache":
        """The cache with `tokens` more of what was written counted in every row."""
        return dataclasses.replace(self, length=self.length + tokens)

    def _places(self, L: int) -> tuple[Int[Array, "B 1"], Int[Array, "B L"]]:
        """Rows and columns where L new tokens go."""
        return jnp.arange(len(self.length))[:, None], self.length[:, None] + jnp.arange(L)[None]


def _take(buffer: Array, slot: Slot) -> Array:
    return jax.lax.dynamic_index_in_dim(buffer, slot, keepdims=False)


def init_cache(config: ModelConfig, batch: int, max_len: int) -> Cache:
    """An empty cache for `batch` rows of up to `max_len` tokens, in the dtype of the computation but for states."""
    c = config
    N = sum(c.layer(i).mixer in SOFTMAX for i in range(c.n_layers))
    M, width = c.n_layers - N, c.attention.convolution - 1
    empty = jnp.zeros((N, batch, max_len, c.K, c.H), c.dtype)
    state = State(jnp.zeros((M, batch, c.K, c.H, c.H)), jnp.zeros((M, batch, c.K, c.H)))
    recent = jnp.zeros((M, batch, width, c.K, c.G + 2, c.H), c.dtype)
    reach = jnp.full(batch, max_len, jnp.int32) if c.positions == "rotary" and c.rotary.by_length else None
    return Cache(empty, empty, state, recent, jnp.zeros(batch, jnp.int32), reach)
