"""A token gets what its experts give, weighted as the router says: none is dropped, and no form of it differs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, normals
from hypothesis import given
from hypothesis import strategies as st
from jaxprs import equations

from llm_jax.ops.experts import (
    BLOCK,
    Experts,
    _grouped_backward,
    _in_blocks,
    _in_blocks_backward,
    arrange,
    dispatch,
    grouped,
    mix,
    rebalanced,
    route,
)

# Routing

routed = jax.jit(route, static_argnames="config")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("config", [Experts(5, 3), Experts(5, 2, renormalise=False), Experts(5, 1, renormalise=False)])
def test_routing_is_what_a_loop_over_the_tokens_does(config: Experts, biased: bool):
    logits, bias, counted = normal(40, 5), normal(5, seed=1) / 5 if biased else None, np.arange(40) % 10 < 7
    load, share, squares = np.zeros(5), np.zeros(5), 0.0
    routing = routed(logits, config, bias, jnp.asarray(counted))
    for t, row in enumerate(np.asarray(logits, np.float64)):
        probabilities = np.exp(row) / np.exp(row).sum()
        best = np.argsort(-(probabilities + (np.asarray(bias) if biased else 0)))[: config.active]
        weights = probabilities[best] / (probabilities[best].sum() if config.renormalise else 1)
        assert routing.experts[t].tolist() == best.tolist()
        np.testing.assert_allclose(routing.weights[t], weights, rtol=1e-5)
        if counted[t]:
            load[best] += 1
            share += probabilities / counted.sum()
            squares += np.log(np.exp(row).sum()) ** 2
    np.testing.assert_array_equal(routing.load, load)
    np.testing.assert_allclose(routing.balance_loss, 5 * (load / counted.sum() * share).sum(), rtol=1e-5)
    np.testing.assert_allclose(routing.z_loss, squares / counted.sum(), rtol=1e-5)


@pytest.mark.parametrize("active", [1, 2, 4])
def test_the_balance_loss_is_k_for_an_even_router_and_else_more(active: int):
    config = Experts(4, active, renormalise=False)
    even = 1e-3 * jnp.stack([jnp.roll(jnp.arange(4.0), shift) for shift in range(4)])
    np.testing.assert_allclose(routed(even, config).balance_loss, active, rtol=1e-5)
    if active < 4:
        favourite = routed(even + 2 * jnp.eye(4)[:1], config)
        assert favourite.balance_loss > active
        collapsed = routed(jnp.broadcast_to(50 * jnp.eye(4)[:1], (9, 4)), config)
        np.testing.assert_allclose(collapsed.balance_loss, 4, rtol=1e-5)


def test_descent_on_the_balance_loss_evens_out_the_load():
    config, logits = Experts(4, 2), normal(256, 4) + 3 * jnp.eye(4)[:1]
    loss = jax.jit(jax.grad(lambda shift: routed(logits + shift[None], config).balance_loss))
    shift = jnp.zeros(4)
    for _ in range(100):
        shift -= 0.2 * loss(shift)
    before, after = (routed(logits + s[None], config).load for s in (jnp.zeros(4), shift))
    assert before.max() > 240
    assert after.max() < 160  # an even load is 128


def test_the_bias_evens_out_the_load_and_leaves_the_weights_as_they_are():
    config, logits = Experts(4, 2, renormalise=False, balance="bias"), normal(256, 4) + jnp.eye(4)[:1]
    step = jax.jit(lambda bias: rebalanced(bias, routed(logits, config, bias).load, 0.005))
    bias = jnp.zeros(4)
    for _ in range(200):
        bias = step(bias)
    routing = routed(logits, config, bias)
    assert routed(logits, config).load.max() > 180
    assert jnp.abs(routing.load - 128).max() <= 8
    plain = jnp.take_along_axis(jax.nn.softmax(logits), routing.experts, axis=-1)
    np.testing.assert_allclose(routing.weights, plain, rtol=1e-6)
    to_bias = jax.grad(lambda bias: routed(logits, config, bias).weights.sum())(bias)
    assert not to_bias.any()


def test_rebalancing_moves_the_bias_of_each_layer_against_its_load():
    load = jnp.array([[0.0, 2, 4], [3, 3, 3]])
    np.testing.assert_array_equal(rebalanced(jnp.ones((2, 3)), load, 0.5), [[1.5, 1, 0.5], [1, 1, 1]])


def test_tokens_that_are_not_counted_go_their_way_but_are_not_measured():
    config, logits = Experts(4, 2), normal(30, 4)
    some = routed(logits, config, counted=jnp.arange(30) < 20)
    first, everything = routed(logits[:20], config), routed(logits, config)
    np.testing.assert_array_equal(some.experts, everything.experts)
    np.testing.assert_array_equal(some.weights, everything.weights)
    for name in ("load", "balance_loss", "z_loss"):
        np.testing.assert_allclose(getattr(some, name), getattr(first, name), rtol=1e-6)
    nobody = routed(logits, config, counted=jnp.zeros(30, bool))
    assert (nobody.balance_loss, nobody.z_loss, nobody.load.sum()) == (0, 0, 0)


def test_loads_of_microbatches_add_up_to_the_load_of_the_batch():
    config, logits = Experts(4, 2), normal(30, 4)
    parts = [routed(part, config).load for part in (logits[:7], logits[7:])]
    np.testing.assert_array_equal(sum(parts), routed(logits, config).load)
    assert routed(logits, config).load.sum() == 60


# The way to the experts and back


@st.composite
def choices(draw: st.DrawFn) -> np.ndarray:
    """k of 4 experts for each of 96 tokens; few orders repeated often leave some experts full and others empty."""
    orders = draw(st.lists(st.permutations(range(4)), min_size=1, max_size=9))
    return np.resize(np.array(orders, np.int32), (96, 4))[:, : draw(st.integers(1, 3))]


@given(choices())
def test_every_assignment_has_one_row_among_those_of_its_expert(experts: np.ndarray):
    groups = jax.tree.map(np.asarray, jax.jit(arrange, static_argnums=1)(experts, 4))
    np.testing.assert_array_equal(np.sort(groups.order), np.arange(experts.size))
    np.testing.assert_array_equal(groups.row_of[groups.order], np.arange(experts.size))
    np.testing.assert_array_equal(np.repeat(np.arange(4), groups.sizes), experts.reshape(-1)[groups.order])
    for rows in np.split(groups.order, np.cumsum(groups.sizes)):
        assert (np.diff(rows) > 0).all()


@jax.jit
def tenfold(x: jax.Array, experts: jax.Array) -> jax.Array:
    """Expert e multiplies a token by 10**e."""
    groups, w = arrange(experts, 4), jnp.array([1.0, 10, 100, 1000])[:, None, None]
    return mix(grouped(dispatch(x, groups), w, groups.sizes), groups, jnp.ones(experts.shape))


@given(choices())
def test_no_token_is_dropped_however_many_choose_an_expert(experts: np.ndarray):
    x = np.arange(1, 97, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(tenfold(x, experts), x * (10**experts).sum(1, keepdims=True))


def sparse(x: jax.Array, weights: jax.Array, w_up: jax.Array, w_down: jax.Array, experts: jax.Array) -> jax.Array:
    groups = arrange(experts, len(w_up))
    h = jax.nn.silu(grouped(dispatch(x, groups), w_up, groups.sizes))
    return mix(grouped(h, w_down, groups.sizes), groups, weights)


def dense(x: jax.Array, weights: jax.Array, w_up: jax.Array, w_down: jax.Array, experts: jax.Array) -> jax.Array:
    """The definition: every expert works on every token, and the weight of one not chosen is 0."""
    shares = (jax.nn.one_hot(experts, len(w_up)) * weights[..., None]).sum(1)
    h = jax.nn.silu(jnp.einsum("TD,EDF->ETF", x, w_up))
    return jnp.einsum("TE,ETF,EFD->TD", shares, h, w_down)


def stacked(layer: Callable, *inputs: jax.Array) -> jax.Array:
    """Two layers in a scan, with their values computed again in the backward pass."""
    x, *others = inputs
    return jax.lax.scan(jax.checkpoint(lambda x, _: (x + layer(x, *others), None)), x, length=2)[0]


HOW = {"once": lambda layer: layer, "in a scan": lambda layer: functools.partial(stacked, layer)}
ROUTES = {
    "even": [[t % 5, (t + 1 + t // 5 % 4) % 5] for t in range(200)],
    "one expert for all": [[3]] * 300,
    "two for all": [[4, 0]] * 150,
    "none for some": [[1, 3, 4], [3, 1, 4]] * 50,
    "a single token": [[2, 0]],
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("experts", ROUTES.values(), ids=ROUTES)
def test_sparse_experts_are_dense_ones_whose_weights_are_mostly_zero(experts: list, how: Callable):
    experts = jnp.array(experts)
    row = (len(experts), 6)
    x, weights, w_up, w_down, g = normals(row, experts.shape, (5, 6, 7), (5, 7, 6), row)
    inputs = x, weights, w_up / 2, w_down / 2
    (value, gradients), (wanted, wanted_gradients) = (
        jax.jit(lambda *inputs, f=how(f): (lambda out, pull: (out, pull(g)))(*jax.vjp(f, *inputs)))(*inputs)
        for f in (lambda *x: sparse(*x, experts), lambda *x: dense(*x, experts))
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)
    for got, wish in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, wish, rtol=1e-4, atol=1e-4 * jnp.abs(wish).max())


def test_rows_travel_by_gathers_alone_forward_and_backward():
    experts = jnp.array(ROUTES["even"])
    x, weights = normals((200, 6), (200, 2))

    def there_and_back(x: jax.Array, weights: jax.Array) -> jax.Array:
        groups = arrange(experts, 5)
        return mix(dispatch(x, groups), groups, weights).sum()

    names = [e.primitive.name for _, e in equations(jax.grad(there_and_back, (0, 1)), x, weights)]
    assert names.count("gather") == 4
    assert not [name for name in names if "scatter" in name]


def test_weights_and_sums_of_bfloat16_rows_stay_in_float32():
    groups = arrange(jnp.array([[0, 1]]), 2)
    weights = jnp.array([[1 + 2**-9, -1.0]])
    out = mix(dispatch(jnp.ones((1, 2), jnp.bfloat16), groups), groups, weights)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 2**-9)  # in bfloat16 1 + 2**-9 is 1


# Products by group

SIZES = {
    "within a block": [3, 0, 5, 1],
    "blocks that straddle": [BLOCK + 1, 0, 5, 2 * BLOCK],
    "whole blocks": [BLOCK, 2 * BLOCK, BLOCK, 0],
    "all in one": [0, 0, 3 * BLOCK - 1, 0],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_blocks_and_ragged_dot_give_the_products_of_a_loop(sizes: list[int], dtype: str):
    random = np.random.default_rng(0)
    x, w, g = (random.integers(-3, 4, shape) for shape in [(sum(sizes), 6), (4, 6, 9), (sum(sizes), 9)])
    y, dx, dw = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w)
    for e, (start, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
        own = slice(start, start + size)
        y[own], dx[own], dw[e] = x[own] @ w[e], g[own] @ w[e].T, x[own].T @ g[own]
    x, w, g, sizes = jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(g, dtype), jnp.array(sizes)
    ragged, pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)
    blocks = _in_blocks(x, w, sizes), *_in_blocks_backward(x, w, sizes, g)
    for got in (blocks, (ragged, *pull(g))):
        for value, wanted in zip(got, (y, dx, dw), strict=True):  # whole numbers: exact in float32, rounded once
            assert value.dtype == dtype
            np.testing.assert_array_equal(value, jnp.asarray(wanted, dtype))


def test_a_matrix_collects_in_float32_what_many_blocks_bring():
    """In bfloat16 256 and ten times 1 is 256."""
    x = jnp.repeat(jnp.array([256 / BLOCK, 1 / BLOCK], jnp.bfloat16), np.array([BLOCK, 10 * BLOCK]))[:, None]
    to_w = jax.grad(lambda w: grouped(x, w, jnp.array([len(x)])).sum())(jnp.ones((1, 1, 1), jnp.bfloat16))
    assert to_w.item() == 266


@pytest.mark.parametrize(("platform", "ragged"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_accelerators_get_ragged_dot_and_a_cpu_its_blocks(platform: str, ragged: bool):
    (x, w, g), sizes = normals((9, 6), (3, 6, 7), (9, 7)), jnp.array([4, 0, 5])
    for product in (lambda x, w, _: grouped(x, w, sizes), lambda x, w, g: _grouped_backward((x, w, sizes), g)):
        program = jax.jit(product).trace(x, w, g).lower(lowering_platforms=(platform,)).as_text()
        assert ("ragged_dot" in program, "while" in program) == (ragged, not ragged)


# The oracle


@pytest.mark.slow
def test_a_mixtral_block_and_its_balance_loss_give_the_same_numbers():
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    E, k, D, F, T = 6, 2, 16, 24, 50
    settings = mixtral.MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=k, experts_implementation="eager"
    )
    x, w_router, w_gate, w_up, w_down = normals((T, D), (D, E), (E, D, F), (E, D, F), (E, F, D))
    block = mixtral.MixtralSparseMoeBlock(settings).eval()
    block.load_state_dict(
        {
            "gate.weight": torch.tensor(np.array(w_router.T)),
            "experts.gate_up_proj": torch.tensor(np.array(jnp.concatenate([w_gate, w_up], -1).swapaxes(1, 2))),
            "experts.down_proj": torch.tensor(np.array(w_down.swapaxes(1, 2))),
        }
    )
    routing = routed(x @ w_router, Experts(E, k))
    groups = arrange(routing.experts, E)
    rows = dispatch(x, groups)
    h = jax.nn.silu(grouped(rows, w_gate, groups.sizes)) * grouped(rows, w_up, groups.sizes)
    out = mix(grouped(h, w_down, groups.sizes), groups, routing.weights)
    with torch.no_grad():
        wanted = block(torch.tensor(np.array(x))[None])[0]
    np.testing.assert_allclose(out, wanted.numpy(), rtol=1e-4, atol=1e-3)

    counted = jnp.arange(T) < 40
    for mask in (None, counted):
        loss = mixtral.load_balancing_loss_func(
            (torch.tensor(np.array(x @ w_router)),), E, k, None if mask is None else torch.tensor(np.array(mask))[None]
        )
        measured = routed(x @ w_router, Experts(E, k), counted=mask).balance_loss
        np.testing.assert_allclose(measured, loss.item(), rtol=1e-5)
