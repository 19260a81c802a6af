"""The feed-forward layer: plain, gated, or a mixture of experts."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from llm_jax.model.config import ModelConfig
from llm_jax.model.init import normal
from llm_jax.model.taps import tap
from llm_jax.ops.activation import ACTIVATIONS
from llm_jax.ops.collectives import shard_map_by_letters
from llm_jax.ops.exchange import serve
from llm_jax.ops.experts import route
from llm_jax.ops.gradient import linears, settle
from llm_jax.sharding import constrain


class FeedForward(nn.Module):
    """`act(x W_up) W_down`, or gated `(act(x W_gate) * (x W_up)) W_down` (Shazeer 2020, arXiv:2002.05202)."""

    config: ModelConfig
    width: int | None = None  # None: F

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c, F = self.config, self.width or self.config.F
        pre, *up = map(settle, self._linears(["gate", "up"] if c.gated else ["up"], "hidden", x, F))
        h = ACTIVATIONS[c.activation](tap(self, "mlp_pre", pre, c.kept))
        h = h * up[0] if c.gated else h
        h = tap(self, "mlp_post", constrain(settle(h), "BLF"), c.kept)
        return self._linears(["down"], "residual", h, c.d_model)[0]

    def _linears(self, names: list[str], role: str, x: Array, width: int) -> list[Array]:
        """Return `x` times `w_{name}` for each name."""
        weights, biases = [], []
        for name in names:
            w = self.param(f"w_{name}", normal(self.config, role, x.shape[-1]), (x.shape[-1], width))
            b = self.param(f"b_{name}", nn.initializers.zeros, (width,)) if self.config.bias == "all" else None
            weights.append(w.astype(x.dtype))
            biases.append(None if b is None else b.astype(x.dtype))
        return linears(["BLF,FD->BLD" if role == "residual" else "BLD,DF->BLF"] * len(names), x, weights, biases)


@struct.dataclass
class Utilisation:
    """How the experts of one layer, or of all layers with experts, were used: fields of `ops/experts.Routing`."""

    load: Float[Array, "*N E"]
    balance_loss: Float[Array, "*N"]
    z_loss: Float[Array, "*N"]


class MixtureOfExperts(nn.Module):
    """Send each token through the few experts that the router chooses, and through the shared ones."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], counted: Bool[Array, "B L"] | None = None
    ) -> tuple[Float[Array, "B L D"], Utilisation]:
        """Return the output, and how the experts were used by the tokens that are `counted` (None: all)."""
        c, e = self.config, self.config.experts
        assert e is not None
        D, F, E = c.d_model, e.d_ff or c.F, e.number
        w_router = self.param("w_router", normal(c, "hidden", D), (D, E)).astype(x.dtype)
        logits = jnp.einsum("BLD,DE->BLE", x, w_router, preferred_element_type=jnp.float32)
        logits = tap(self, "router", constrain(logits, "BSX"))  # few numbers a token: whole on each device of `tensor`
        bias = self.param("router_bias", nn.initializers.zeros, (E,)) if e.balance == "bias" else None
        bias = bias if bias is None else bias.astype(jnp.float32)
        routing = route(logits, e, bias, counted)

        names = ("gate", "up") if c.gated else ("up",)
        matrices = [*(self._matrix(name, D, F, x) for name in names), self._matrix("down", F, D, x)]
        apply = functools.partial(serve, ACTIVATIONS[c.activation])
        wide = "EDF " * len(names)
        y = shard_map_by_letters(apply, f"BSD BSX BSX {wide} EFD BSD", x, routing.experts, routing.weights, *matrices)
        if e.shared:
            y = y + FeedForward(c, e.shared * F, name="shared")(x)
        return constrain(y, "BLD"), Utilisation(routing.load, routing.balance_loss, routing.z_loss)

    def _matrix(self, name: str, fan_in: int, fan_out: int, x: Array) -> Float[Array, "E I O"]:
        assert self.config.experts is not None
        role = normal(self.config, "residual" if name == "down" else "hidden", fan_in)
        return self.param(f"w_{name}", role, (self.config.experts.number, fan_in, fan_out)).astype(x.dtype)
