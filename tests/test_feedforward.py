"""The feed-forward layer equals its formula in float64, and its gradients those of the plain formula."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import tiny, weights

from llm_jax.model.config import ModelConfig
from llm_jax.model.feedforward import FeedForward

X = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 24)), jnp.float32)

FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,
}


def parameters(config: ModelConfig) -> dict[str, jax.Array]:
    """Those of the first layer."""
    return {name: stacked[0] for name, stacked in weights(config)["layers"]["feedforward"].items()}


def layer(config: ModelConfig) -> Callable:
    return jax.jit(lambda params, x: FeedForward(config).apply({"params": params}, x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", FORMULAS)
def test_the_layer_equals_its_formula(activation: str, gated: bool):
    config = tiny(activation=activation, gated=gated, bias=True)
    p = {name: np.asarray(value, np.float64) for name, value in parameters(config).items()}
    x = np.asarray(X, np.float64)
    up = x @ p["w_up"] + p["b_up"]
    hidden = FORMULAS[activation](x @ p["w_gate"] + p["b_gate"]) * up if gated else FORMULAS[activation](up)
    expected = hidden @ p["w_down"] + p["b_down"]
    np.testing.assert_allclose(layer(config)(parameters(config), X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", PLAIN)
def test_its_gradients_are_those_of_the_plain_formula(activation: str):
    config = tiny(activation=activation, bias=True)

    def plain(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        def linear(x: jax.Array, name: str) -> jax.Array:
            return x @ p[f"w_{name}"] + p[f"b_{name}"][None, None]

        return linear(PLAIN[activation](linear(x, "gate")) * linear(x, "up"), "down")

    both = [
        jax.jit(jax.grad(lambda p, x, run=run: jnp.sin(run(p, x)).sum(), argnums=(0, 1)))(parameters(config), X)
        for run in (layer(config), plain)
    ]
    for mine, theirs in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_without_biases_nothing_goes_to_nothing():
    config = tiny()
    assert set(parameters(config)) == {"w_up", "w_gate", "w_down"}
    assert (layer(config)(parameters(config), jnp.zeros_like(X)) == 0).all()
