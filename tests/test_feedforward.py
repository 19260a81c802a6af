"""The feed-forward layer equals its formula in float64, and its gradients those of the plain formula."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from grid import tiny, weights

from llm_jax.model.config import ModelConfig
from llm_jax.model.feedforward import FeedForward, MixtureOfExperts
from llm_jax.ops.experts import Experts
from llm_jax.sharding import MeshConfig, batch_sharding, make_mesh, shardings

X = normal(2, 4, 24, seed=3)

FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
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
    config = tiny(activation=activation, gated=gated, bias="all")
    p = {name: np.asarray(value, np.float64) for name, value in parameters(config).items()}
    x = np.asarray(X, np.float64)
    up = x @ p["w_up"] + p["b_up"]
    hidden = FORMULAS[activation](x @ p["w_gate"] + p["b_gate"]) * up if gated else FORMULAS[activation](up)
    expected = hidden @ p["w_down"] + p["b_down"]
    np.testing.assert_allclose(layer(config)(parameters(config), X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", PLAIN)
def test_its_gradients_are_those_of_the_plain_formula(activation: str):
    config = tiny(activation=activation, bias="all")

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


E, K_ACTIVE = 4, 2


@pytest.mark.parametrize("changes", [{}, {"shared": 2}, {"renormalise": False, "balance": "bias"}], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_a_mixture_is_the_weighted_sum_of_each_tokens_experts(gated: bool, changes: dict):
    """Token by token, in float64."""
    experts = Experts(number=E, active=K_ACTIVE, d_ff=10, **changes)
    config = tiny(layers=("global+moe",), experts=experts, gated=gated)
    params = jax.tree.map(lambda x: x[0], weights(config)["layers"]["experts"])
    y, use = jax.jit(lambda p, x: MixtureOfExperts(config).apply({"params": p}, x))(params, X)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def feedforward(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
        up = x @ w["w_up"]
        return (FORMULAS["silu"](x @ w["w_gate"]) * up if gated else FORMULAS["silu"](up)) @ w["w_down"]

    load = np.zeros(E)
    for row, x in np.ndenumerate(np.empty(X.shape[:2])):
        del x
        token = np.asarray(X[row], np.float64)
        probabilities = np.exp(token @ p["w_router"])
        probabilities /= probabilities.sum()
        chosen = np.argsort(-(probabilities + p.get("router_bias", 0)))[:K_ACTIVE]
        load[chosen] += 1
        shares = probabilities[chosen] / (probabilities[chosen].sum() if experts.renormalise else 1)
        matrices = ({name: w[e] for name, w in p.items() if name in ("w_up", "w_gate", "w_down")} for e in chosen)
        expected = sum(share * feedforward(token, w) for share, w in zip(shares, matrices, strict=True))
        if experts.shared:
            expected = expected + feedforward(token, p["shared"])
        np.testing.assert_allclose(y[row], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(use.load, load)


def test_a_device_sends_its_tokens_and_computes_a_share_of_the_width():
    config = tiny(layers=("global+moe",), experts=Experts(number=E, active=K_ACTIVE, d_ff=10))
    params = jax.tree.map(lambda x: x[0], weights(config)["layers"]["experts"])
    x = normal(8, 4, 24)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y, _ = MixtureOfExperts(config).apply({"params": params}, x)
        return jnp.sin(y).sum()

    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
        found = compiled(params, x)
    for mine, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    text, (mine, everyone) = compiled.as_text(), (8 * 4 * K_ACTIVE // 4, 8 * 4 * K_ACTIVE)
    assert f"f32[{mine},5]" in text
    assert not re.search(rf"f32\[{everyone},(5|10)\]", text)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in (
                MeshConfig(data=4, expert=2),
                MeshConfig(data=2, expert=4),
                MeshConfig(data=1, expert=8),
                MeshConfig(data=1, fsdp=2, expert=4),
                MeshConfig(data=1, expert=4, tensor=2),
                MeshConfig(data=1, context=2, expert=4),
            )
        ),
    ],
    ids=str,
)
def test_tokens_travel_to_experts_and_no_device_has_all_matrices(mesh: MeshConfig):
    config = tiny(layers=("global+moe",), experts=Experts(number=8, d_ff=10))
    even = jax.tree.map(lambda x: x[0], weights(config)["layers"]["experts"])
    favourites = even | {"w_router": jnp.zeros((24, 8)).at[:, :2].set(jnp.array([[2.0, 1.0]]))}
    draw = normal(8, 4, 24)
    # Where the sum of a token is positive, its favourites are the same two experts, which lie on one device.
    inputs = [(even, draw), (favourites, jnp.abs(draw)), (favourites, draw.at[5:].set(jnp.abs(draw[5:])))]

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, use = MixtureOfExperts(config).apply({"params": params}, x)
        return jnp.sin(y).sum() + use.balance_loss + use.z_loss, use

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    devices = make_mesh(mesh)
    split = shardings({"layers": {"experts": even}}, devices)["layers"]["experts"]
    with jax.set_mesh(devices):
        compiled = jax.jit(run, in_shardings=(split, batch_sharding(devices))).lower(even, draw).compile()
        found = [jax.device_get(compiled(*jax.device_put(pair, compiled.input_shardings[0]))) for pair in inputs]
    here = jax.jit(run)
    for mine, pair in zip(found, inputs, strict=True):
        for got, wanted in zip(*map(jax.tree.leaves, (mine, here(*pair))), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert found[1][0][1].load.tolist() == [32, 32, 0, 0, 0, 0, 0, 0]
    text = compiled.as_text()
    main = text[text.index("ENTRY") :]  # without the loops of further rounds
    assert len(re.findall(r"f32\[.* all-to-all\(", main)) == 4  # rows there, results back; and their gradients
    assert not re.search(r"\[8,(24|10|5),(24|10|5)\]", text)
    assert not re.search(r"\[(32|8,4),8\]\S* all-gather", text)  # the probabilities of all tokens


def test_padding_is_not_counted_in_the_load():
    config = tiny(layers=("global+moe",), experts=Experts(number=E, d_ff=10))
    params = jax.tree.map(lambda x: x[0], weights(config)["layers"]["experts"])
    counted = jnp.arange(4)[None] < jnp.array([[3], [1]])
    _, use = jax.jit(lambda p, x: MixtureOfExperts(config).apply({"params": p}, x, counted))(params, X)
    assert use.load.sum() == 2 * 4
