"""The feed-forward layer: plain, gated, or a mixture of experts."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llm_jax.model.config import ModelConfig
from llm_jax.model.init import normal
from llm_jax.model.taps import tap
from llm_jax.ops.collectives import manual_axis_size, psum, reduce_scatter_tokens, shard_map_by_letters
from llm_jax.ops.exchange import exchange
from llm_jax.ops.experts import arrange, dispatch, grouped, mix, route
from llm_jax.ops.gradient import add_bias, linear, settle
from llm_jax.sharding import constrain

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,  # the tanh form, as GPT-2 has it
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
}


class FeedForward(nn.Module):
    """`act(x W_up) W_down`, or gated `(act(x W_gate) * (x W_up)) W_down` (Shazeer 2020, arXiv:2002.05202)."""

    config: ModelConfig
    width: int | None = None  # None: F

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c, F = self.config, self.width or self.config.F
        pre = settle(self._linear("gate" if c.gated else "up", "hidden", x, c.d_model, F))
        h = ACTIVATIONS[c.activation](tap(self, "mlp_pre", pre, c.kept))
        if c.gated:
            h = h * settle(self._linear("up", "hidden", x, c.d_model, F))
        h = tap(self, "mlp_post", constrain(settle(h), "BLF"), c.kept)
        return self._linear("down", "residual", h, F, c.d_model)

    def _linear(self, name: str, role: str, x: Array, fan_in: int, fan_out: int) -> Array:
        w = self.param(f"w_{name}", normal(self.config, role, fan_in), (fan_in, fan_out)).astype(x.dtype)
        y = linear("BLF,FD->BLD" if role == "residual" else "BLD,DF->BLF", x, w)
        y = reduce_scatter_tokens(y) if role == "residual" else y
        if self.config.bias == "all":
            y = add_bias(y, self.param(f"b_{name}", nn.initializers.zeros, (fan_out,)).astype(x.dtype))
        return y


@struct.dataclass
class Utilisation:
    """How the experts of one layer, or of all layers with experts, were used: fields of `ops/experts.Routing`."""

    load: Float[Array, "*N E"]
    balance_loss: Float[Array, "*N"]
    z_loss: Float[Array, "*N"]


def serve(
    activation: Callable[[Array], Array],
    x: Float[Array, "B L D"],
    experts: Int[Array, "B L X"],
    weights: Float[Array, "B L X"],
    *matrices: Float[Array, "E _ _"],
) -> Float[Array, "B L D"]:
    """Return the weighted sum of what the X experts of each token compute, on each device for its own tokens.

    A device with all experts sorts its tokens by expert, and sends none. Over `tensor` each device has a shard of the
    experts' width, and the sum is over these too.
    """
    tokens, chosen, shares = (y.reshape(-1, y.shape[-1]) for y in (x, experts, weights))
    work = functools.partial(_apply, activation)
    if manual_axis_size("expert") > 1:
        out = exchange(work, tokens, chosen, shares, matrices)
    else:
        groups = arrange(chosen, len(matrices[0]))
        out = mix(work(dispatch(tokens, groups), groups.sizes, *matrices), groups, shares)
    return psum(out.reshape(x.shape), "tensor")


def _apply(
    activation: Callable[[Array], Array],
    rows: Float[Array, "R D"],
    sizes: Int[Array, " E"],
    *matrices: Float[Array, "E _ _"],
) -> Float[Array, "R D"]:
    """Apply to each row its expert's feed-forward; rows are sorted by expert."""
    *ups, down = matrices
    h, *more = (grouped(rows, matrix, sizes) for matrix in ups)
    h = activation(h)
    for other in more:  # gated
        h = h * other
    return grouped(h, down, sizes)


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
