"""Experts in the training step: what unevenness costs, and biases that follow the load."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import tiny, tokens, weights

from llm_jax.data.loader import Batch
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts
from llm_jax.ops.loss import IGNORE
from llm_jax.train.balance import rebalance, utilisation
from llm_jax.train.optimizer import OptimizerConfig, make_optimizer
from llm_jax.train.step import (
    LossConfig,
    TrainState,
    make_gradient,
    make_loss,
    make_train_step,
    split_microbatches,
    token_losses,
)
from llm_jax.train.update import make_update
from llm_jax.tree import leaves

TOKENS = tokens(4, 8)
BATCH: Any = Batch(TOKENS, (TOKENS + 1) % 14)
PATTERN: dict[str, Any] = {"layers": ("global+moe", "global"), "n_layers": 3}  # experts in the scan and after it


def mixture(**changes: Any) -> ModelConfig:
    return tiny(**PATTERN, experts=Experts(number=4, d_ff=8, **changes))


def test_the_loss_of_a_mixture_is_cross_entropy_and_its_weighted_penalties():
    config = mixture(balance_weight=0.5, router_z_loss=0.25)
    model, params = Transformer(config), weights(config)
    loss, sums = jax.jit(make_loss(model, LossConfig()))(params, BATCH, jax.random.key(0))
    out = jax.jit(lambda p: token_losses(model, LossConfig(), p, BATCH))(params)
    assert out.use.load.shape == (2, 4)
    assert (out.use.load.sum(-1) == 2 * TOKENS.size).all()
    penalty = 0.5 * out.use.balance_loss.sum() + 0.25 * out.use.z_loss.sum()
    np.testing.assert_allclose(loss, out.loss.sum() + TOKENS.size * penalty, rtol=1e-6)
    np.testing.assert_allclose(sums["balance_loss"], TOKENS.size * out.use.balance_loss.sum(), rtol=1e-6)
    np.testing.assert_array_equal(sums["expert_load"], out.use.load)


def test_without_a_weight_balance_costs_nothing():
    for config in (mixture(balance_weight=0.0), mixture(balance="none"), mixture(balance="bias")):
        loss, sums = jax.jit(make_loss(Transformer(config), LossConfig()))(weights(config), BATCH, jax.random.key(0))
        np.testing.assert_allclose(loss, sums["nll"], rtol=1e-6)


def test_only_biases_move_and_against_the_load_of_their_own_layer():
    config = mixture(balance="bias", bias_rate=0.5)
    load = jnp.array([[4.0, 0.0, 2.0, 2.0], [0.0, 8.0, 0.0, 0.0]])
    before, after = leaves(weights(config)), leaves(rebalance(config, weights(config), load))
    moves = {path: np.asarray(after[path] - x) for path, x in before.items() if (after[path] != x).any()}
    assert list(moves) == ["layers/0/experts/router_bias", "layers_2/experts/router_bias"]
    np.testing.assert_allclose(moves["layers/0/experts/router_bias"], [[-0.5, 0.5, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(moves["layers_2/experts/router_bias"], [0.5, -0.5, 0.5, 0.5], atol=1e-6)


@pytest.mark.slow
def test_a_bias_without_a_gradient_evens_out_the_load():
    config = mixture(balance="bias", bias_rate=0.02)
    model, rule = Transformer(config), make_optimizer(OptimizerConfig(weight_decay=0.5))
    gradient, _ = jax.jit(jax.grad(make_loss(model, LossConfig()), has_aux=True))(
        weights(config), BATCH, jax.random.key(0)
    )
    assert not leaves(gradient)["layers_2/experts/router_bias"].any()
    step = make_train_step(
        make_gradient(make_loss(model, LossConfig()), accumulate=2),
        make_update(rule),
        optax.constant_schedule(1e-4),
        rebalance=lambda params, load: rebalance(config, params, load),
    )
    state = TrainState(jnp.array(0), weights(config), rule.init(weights(config)))
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (60, *x.shape)), BATCH)
    _, metrics = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))(state, repeated)
    assert metrics["expert_busiest"][0] > 1.8
    assert metrics["expert_busiest"][-10:].mean() < 1.4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("balance", "z_loss"), [("loss", 0.0), ("bias", 0.0), ("bias", 0.1)], ids=["balance loss", "bias", "z-loss"]
)
def test_experts_in_microbatches_add_up_to_the_step_of_the_whole_batch(balance: str, z_loss: float):
    """Rows of unequal length, as those of two sources are; with a z-loss all have as many targets.

    The balance loss is of the load of each microbatch alone.
    """
    config = mixture(balance=balance, bias_rate=0.5, router_z_loss=z_loss, shared=1)
    long = jnp.array(np.arange(8) < 1 + 2 * np.arange(4)[:, None]) | (z_loss > 0)
    batch = dataclasses.replace(BATCH, targets=jnp.where(long, BATCH.targets, IGNORE), segments=long.astype(jnp.int32))
    loss, params, key = make_loss(Transformer(config), LossConfig()), weights(config), jax.random.key(0)
    (whole, sums), gradient = jax.jit(make_gradient(loss))(params, batch, key)
    (total, added), parts = jax.jit(make_gradient(loss, accumulate=2))(params, batch, key)
    np.testing.assert_allclose(added["nll"], sums["nll"], rtol=1e-6)
    np.testing.assert_array_equal(added["expert_load"], sums["expert_load"])
    if z_loss:
        np.testing.assert_allclose([total, added["router_z"]], [whole, sums["router_z"]], rtol=1e-5)
    if balance == "bias":
        moved = [leaves(rebalance(config, params, s["expert_load"])) for s in (sums, added)]
        for other, same in ((parts, gradient), moved):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5), other, same)
        return
    alone = jax.lax.map(lambda one: loss(params, one, key)[0], split_microbatches(batch, 2))
    np.testing.assert_allclose(total, alone.sum(), rtol=1e-6)
    assert abs(total - whole) > 1e-6 * abs(whole)


def test_utilisation_tells_the_busiest_and_the_idle():
    found = utilisation(jnp.array([[2.0, 2.0, 2.0, 2.0], [6.0, 0.0, 2.0, 0.0]]))
    assert float(found["expert_busiest"]) == 3
    assert float(found["expert_idle"]) == 0.25
