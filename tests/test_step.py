"""One training step: microbatches change nothing, numbers that are not finite touch nothing, metrics say what was."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import TINY, tiny, tokens, weights
from jaxprs import equations

from llm_jax.data.loader import Batch
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts
from llm_jax.ops.loss import IGNORE
from llm_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from llm_jax.train.step import LossConfig, TrainState, cast, init_state, make_gradient, make_loss, make_train_step
from llm_jax.train.update import make_update
from llm_jax.tree import fingerprint, leaves

B, L = 4, 8
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2]] * B)
POSITIONS = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3]] * B)
# Rows with 8, 0, 3 and 5 targets: microbatches of one row have as many tokens to weigh by.
COUNTED = jnp.arange(L)[None] < jnp.array([8, 0, 3, 5])[:, None]
TOKENS = tokens(B, L)
BATCH: Any = Batch(TOKENS, jnp.where(COUNTED, (TOKENS + 1) % 14, IGNORE), SEGMENTS, POSITIONS)

CONFIG = OptimizerConfig(learning_rate=0.01, warmup_steps=4, eps=1e-3)
SCHEDULE = make_schedule(CONFIG, 20)
ADAMW = make_optimizer(CONFIG)
# Where the gradient is what counts, the rule that hands it on.
SGD = optax.sgd(0.1)


def state(params: Any, rule: optax.GradientTransformation = ADAMW) -> TrainState:
    return TrainState(step=jnp.array(2, jnp.int32), params=params, opt_state=rule.init(params))


@functools.cache
def step(accumulate: int) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one step of a transformer, and its metrics."""
    loss_fn = make_loss(Transformer(TINY), LossConfig())
    run = jax.jit(make_train_step(make_gradient(loss_fn, accumulate), make_update(SGD), SCHEDULE))
    return run(state(weights(TINY), SGD), BATCH)


def test_microbatches_give_the_step_of_the_full_batch():
    (whole, metrics), (parts, their_metrics) = step(1), step(4)
    for name, value in metrics.items():
        np.testing.assert_allclose(their_metrics[name], value, rtol=1e-5, err_msg=name)
    for mine, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_over_counted_tokens():
    _, metrics = step(1)

    @jax.jit
    def logarithms(params: Any) -> jax.Array:
        where = {"segments": SEGMENTS, "positions": POSITIONS}
        chances = jax.nn.log_softmax(Transformer(TINY).apply({"params": params}, TOKENS, **where).logits)
        return jnp.take_along_axis(chances, jnp.maximum(BATCH.targets, 0)[..., None], -1)[..., 0]

    right = logarithms(weights(TINY))
    np.testing.assert_allclose(metrics["loss"], -right[COUNTED].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], metrics["loss"], rtol=1e-6)
    assert int(metrics["tokens"]) == TOKENS.size  # all that was read, counted or not
    assert int(metrics["skipped"]) == 0


def test_the_reported_rate_is_that_of_this_step():
    new, metrics = step(1)
    np.testing.assert_allclose(metrics["learning_rate"], 0.01 * 3 / 4, rtol=1e-6)
    assert int(new.step) == 3


def loss_and_gradient(config: LossConfig) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
    loss_fn = jax.value_and_grad(make_loss(Transformer(TINY), config), has_aux=True)
    return jax.jit(loss_fn)(weights(TINY), BATCH, jax.random.key(0))


def test_in_bfloat16_what_moves_by_little_stays_float32():
    config = tiny(layers=("delta+moe",), experts=Experts(number=4, balance="bias"))
    found = {path.split("/")[-1]: str(x.dtype) for path, x in leaves(cast(weights(config), "bfloat16")).items()}
    wide = {name for name, dtype in found.items() if dtype == "float32"}
    assert wide == {"router_bias", "log_rate", "b_decay"}


def test_a_chunked_loss_gives_the_same_loss_and_gradient():
    terms = {"z_loss": 0.1, "label_smoothing": 0.1}
    whole, parts = loss_and_gradient(LossConfig(**terms)), loss_and_gradient(LossConfig(**terms, chunk=2))
    for mine, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    (loss, sums), _ = whole
    assert loss > sums["nll"]
    np.testing.assert_allclose(sums["nll"] / 16, step(1)[1]["nll"], rtol=1e-5)


def test_a_step_with_a_chunked_loss_never_holds_all_logits():
    config = tiny(vocab_size=200, max_seq_len=16)
    batch: Any = Batch(tokens(4, 16), tokens(4, 16), None, None)

    def largest(loss: LossConfig) -> int:
        gradient = jax.grad(make_loss(Transformer(config), loss), has_aux=True)
        program = equations(gradient, weights(config), batch, jax.random.key(0))
        return max(array.aval.size for _, equation in program for array in equation.outvars)

    assert largest(LossConfig()) >= 4 * 16 * 200
    assert largest(LossConfig(chunk=4)) < 4 * 16 * 200


PARAMS = {"layers": {"attention": {"w_x": jnp.array([1.0, 2.0])}}}


def toy(bad: float = 0.0, token: int = 0, batch: Any = BATCH, accumulate: int = 1, seed: int = 0, at: int = 2) -> tuple:
    """State before, state after and metrics of a step over rows that hold `token`, where 13 makes the loss `bad`."""

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        w = params["layers"]["attention"]["w_x"]
        poison = jnp.where((batch.tokens == 13).any(), bad, 0.0)
        return jnp.square(w).sum() + poison * w[0], {"noise": jax.random.uniform(key)}

    before = state(PARAMS).replace(step=jnp.array(at, jnp.int32))
    batch = batch.replace(tokens=jnp.zeros_like(TOKENS).at[1, 0].set(token))
    run = jax.jit(make_train_step(make_gradient(loss_fn, accumulate), make_update(ADAMW), SCHEDULE, seed=seed))
    return before, *run(before, batch)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_changes_no_bit_and_is_counted(bad: float, accumulate: int):
    before, after, metrics = toy(bad, 13, accumulate=accumulate)
    assert fingerprint((after.params, after.opt_state)) == fingerprint((before.params, before.opt_state))
    assert int(after.step) == int(before.step) + 1
    assert int(metrics["skipped"]) == 1


def test_a_skipped_step_moves_the_learning_rate_on():
    """Lion's update of a lone weight is the learning rate itself."""
    lion = make_optimizer(dataclasses.replace(CONFIG, name="lion", weight_decay=0.0))

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return params["layers"]["attention"]["w_x"].sum() * jnp.where(batch.tokens[0, 0] == 13, jnp.nan, 1.0), {}

    run = jax.jit(make_train_step(make_gradient(loss_fn), make_update(lion), SCHEDULE))
    start = state(PARAMS, lion)
    skipped, _ = run(start, BATCH.replace(tokens=TOKENS.at[0, 0].set(13)))
    after, metrics = run(skipped, BATCH.replace(tokens=TOKENS.at[0, 0].set(1)))
    moved = PARAMS["layers"]["attention"]["w_x"] - after.params["layers"]["attention"]["w_x"]
    np.testing.assert_allclose(moved, SCHEDULE(3), rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], SCHEDULE(3))


def test_the_same_step_without_the_bad_token_learns():
    before, after, metrics = toy(float("nan"), 12)
    assert fingerprint(after.params) != fingerprint(before.params)
    assert int(metrics["skipped"]) == 0


def test_a_gradient_that_is_not_finite_is_enough():
    """The square root at 0 is finite and its slope is not."""

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.sqrt(params["layers"]["attention"]["w_x"]).sum(), {}

    before = state({"layers": {"attention": {"w_x": jnp.zeros(2)}}})
    after, metrics = jax.jit(make_train_step(make_gradient(loss_fn), make_update(ADAMW), SCHEDULE))(before, BATCH)
    assert metrics["loss"] == 0
    assert int(metrics["skipped"]) == 1
    assert fingerprint(after.params) == fingerprint(before.params)


def test_an_update_that_is_not_finite_changes_no_bit_and_is_counted():
    """Of one number: nothing of the others, nor of the moments, is taken either."""
    big = optax.stateless(lambda updates, _: jax.tree.map(lambda x: jnp.where(x > 0.2, x * 1e38 * 1e38, x), updates))
    rule = optax.chain(optax.trace(0.9), big)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(params)), {}

    run = jax.jit(make_train_step(make_gradient(loss_fn), make_update(rule), SCHEDULE))
    for other, skipped in ((0.5, 0), (8.0, 1)):
        before = state(PARAMS | {"w_z": jnp.array([0.5, other])}, rule)
        before = before.replace(params=jax.tree.map(lambda x: x * 0.5, before.params))
        after, metrics = run(before, BATCH)
        assert np.isfinite(metrics["grad_norm"])
        assert int(metrics["skipped"]) == skipped
        same = fingerprint((after.params, after.opt_state)) == fingerprint((before.params, before.opt_state))
        assert same == bool(skipped)
        assert int(after.step) == int(before.step) + 1


def test_the_iteration_of_muon_runs_once_a_step_and_is_guarded():
    """The loss has no matrix product, so that all there are in the program are of the update."""
    rule = make_optimizer(dataclasses.replace(CONFIG, name="muon", clip=None))
    params = {"layers": {"attention": {"w_q": jnp.arange(8.0).reshape(1, 4, 1, 1, 2)}}}

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(params)), {}

    def products(function: Any, *given: Any) -> int:
        return jax.jit(function).lower(*given).as_text().count("dot_general")

    step = make_train_step(make_gradient(loss_fn), make_update(rule, hold=True), SCHEDULE)
    alone = products(rule.update, params, rule.init(params), params)
    assert alone > 0
    assert products(step, state(params, rule), BATCH) == alone
    for size, skipped in ((1.0, 0), (1e30, 1)):  # the norm of such parameters is not finite
        before = state(optax.tree.scale(size, params), rule)
        after, metrics = jax.jit(step)(before, BATCH)
        assert int(metrics["skipped"]) == skipped
        same = fingerprint((after.params, after.opt_state)) == fingerprint((before.params, before.opt_state))
        assert same == bool(skipped)


def test_noise_depends_on_seed_and_step_and_each_microbatch_has_its_own():
    def noise(**changes: int) -> float:
        metrics = toy(**changes)[2]
        return float(metrics["noise"]) * int(COUNTED.sum())

    assert noise() == noise()
    assert len({noise(), noise(at=3), noise(seed=1)}) == 3
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(0), 2))
    assert jax.random.uniform(first) != jax.random.uniform(second)
    expected = jax.random.uniform(first) + jax.random.uniform(second)
    np.testing.assert_allclose(noise(accumulate=2), expected, rtol=1e-6)


def test_the_gradient_norm_is_that_of_the_mean_loss_before_clipping():
    *_, metrics = toy()
    np.testing.assert_allclose(metrics["grad_norm"], 2 * np.sqrt(5) / 16, rtol=1e-6)


def test_a_batch_without_a_target_is_finite():
    before, after, metrics = toy(batch=BATCH.replace(targets=jnp.full((B, L), IGNORE)))
    assert int(metrics["skipped"]) == 0
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(after.params["layers"]["attention"]["w_x"]).all()
    assert int(after.step) == int(before.step) + 1


def test_a_fresh_state_is_at_step_zero_and_its_moments_are_float32():
    shapes = jax.eval_shape(lambda key: init_state(Transformer(tiny(dtype="bfloat16")), ADAMW, key), jax.random.key(0))
    assert (shapes.step.shape, shapes.step.dtype) == ((), jnp.int32)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes)} == {"int32", "float32"}
    assert isinstance(optax.tree.get(shapes.opt_state, "mu"), dict)


@pytest.mark.parametrize(
    "changes",
    [{"z_loss": -1.0}, {"z_loss": math.inf}, {"label_smoothing": 1.0}, {"label_smoothing": math.nan}, {"chunk": 0}],
    ids=str,
)
def test_numbers_that_make_no_loss_are_refused(changes: dict[str, Any]):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"loss.{name}.*{value}"):
        LossConfig(**changes)


@pytest.mark.parametrize(("counted", "loss"), [({}, 6 / 8), ({"targets": 3.0}, 2.0), ({"targets": 0.0}, 6.0)], ids=str)
def test_a_loss_is_divided_by_the_targets_that_it_says_it_counted(counted: dict[str, float], loss: float):
    def gradient(params: Any, batch: Batch, key: Any) -> Any:
        return (jnp.float32(6.0), {name: jnp.float32(x) for name, x in counted.items()}), {"w": jnp.full(2, 6.0)}

    state = TrainState(step=jnp.zeros((), jnp.int32), params={"w": jnp.zeros(2)}, opt_state=optax.sgd(1.0).init({}))
    rows = Batch(*(jnp.ones((2, 4), jnp.int32) for _ in range(4)))
    new, metrics = make_train_step(gradient, make_update(optax.sgd(1.0)), None)(state, rows)
    assert float(metrics["loss"]) == loss
    np.testing.assert_allclose(new.params["w"], -loss)
    assert "targets" not in metrics
    assert int(metrics["tokens"]) == 8
