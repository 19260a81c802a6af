"""Linear attention layers: the projections of attention around a state of fixed size."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.model.attention import Attention, Context
from llm_jax.model.cache import Cache
from llm_jax.model.init import normal
from llm_jax.model.stack import Index
from llm_jax.ops.linear_attention import State, gated_delta_rule, linear_attention, short_convolution
from llm_jax.ops.norm import rms_norm


class LinearAttention(Attention):
    """`linear`: kernelised attention. `delta`: the gated delta rule, as a layer of Gated DeltaNet (arXiv:2412.06464).

    The recurrence knows the order of tokens: positions are not used.
    """

    def _rotate(self, name: str, y: Array, context: Context) -> Array:
        return y

    def _attend(
        self, x: Float[Array, "B L D"], q: Array, k: Array, v: Array, context: Context, slot: Index, cache: Cache | None
    ) -> tuple[Float[Array, "B L K G H"], Cache | None]:
        state, recent = (None, None) if cache is None else cache.recall(slot)
        where: dict[str, Any] = {"segments": context.mask.segments, "lengths": context.lengths}
        if self.mixer == "linear":
            z, state = linear_attention(q, k, v, state, **where)
            return z, None if cache is None else cache.remember(slot, state, None)

        K, G, H, W = *q.shape[2:], self.config.attention.convolution
        kernel = self.param("w_convolution", nn.initializers.normal(W**-0.5), (W, K, G + 2, H)).astype(x.dtype)
        together = jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)
        together, recent = short_convolution(together, kernel, recent, **where)
        together = jax.nn.silu(together)
        q, k, v = together[..., :G, :], together[..., G, :], together[..., G + 1, :]
        log_decay, beta = self._log_decay(x), jax.nn.sigmoid(self._gate("beta", x))
        state = None if state is None else State(state.memory)  # the rule has no normaliser
        z, state = gated_delta_rule(q, k, v, log_decay, beta, state, **where)

        z = rms_norm(z, self.param("z_scale", nn.initializers.ones, (H,)).astype(x.dtype), self.config.norm_eps)
        [gate] = self._project(x, {"gate": (K, G, H)})
        z = z * jax.nn.silu(gate)
        return z, None if cache is None else cache.remember(slot, state, recent)

    def _gate(self, name: str, x: Float[Array, "B L D"]) -> Float[Array, "B L K"]:
        """Return one float32 number for each key/value head."""
        w = self.param(f"w_{name}", normal(self.config, "hidden", x.shape[-1]), (x.shape[-1], self.config.K))
        return jnp.einsum("BLD,DK->BLK", x, w.astype(x.dtype), preferred_element_type=jnp.float32)

    def _log_decay(self, x: Float[Array, "B L D"]) -> Float[Array, "B L K"]:
        """Return the logarithm of the share each head keeps at each token: minus a rate times a time step.

        Both are positive, and start as in Mamba 2 (Dao and Gu 2024, arXiv:2405.21060): rates from 1 to 16, steps from
        0.001 to 0.1.
        """
        K = (self.config.K,)
        rates = self.param(
            "log_rate", lambda key, shape: jnp.log(jax.random.uniform(key, shape, minval=1, maxval=16)), K
        )
        steps = self.param("b_decay", _inverse_softplus_of_steps, K)
        step = jax.nn.softplus(self._gate("decay", x) + steps.astype(jnp.float32)[None, None])
        return -jnp.exp(rates.astype(jnp.float32))[None, None] * step


def _inverse_softplus_of_steps(key: Array, shape: tuple[int, ...]) -> Array:
    steps = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(0.001), maxval=jnp.log(0.1)))
    return steps + jnp.log(-jnp.expm1(-steps))
