from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from compiler import built

from llm_jax import runtime
from llm_jax.train.config import OptimizerConfig
from llm_jax.train.optimizer import make_optimizer
from llm_jax.train.update import Slope, make_update, native_adamw


@built
@pytest.mark.parametrize("clip", [None, 0.5], ids=["not clipped", "clipped"])
def test_native_adamw_takes_the_steps_of_optax(clip: float | None, monkeypatch: pytest.MonkeyPatch):
    config = OptimizerConfig(clip=clip, weight_decay=0.3, b2=0.9)
    params = {"layers": {"attention": {"w_q": normal(3, 40, 70), "b_q": normal(3, 70, seed=1)}}}
    rule = make_optimizer(config)
    update = jax.jit(native_adamw(config, make_update(rule)))

    def run() -> list[Any]:
        given, found = (params, rule.init(params)), []
        for i in range(4):
            gradients = jax.tree.map(lambda x, i=i: jnp.sin(x + i), params)
            new = update(*given, Slope(gradients, jnp.float32(0.01), jnp.float32(1), jnp.float32(0.1)))
            given = new.params, new.opt_state
            found.append(jax.device_get(new))
        return found

    theirs = run()
    monkeypatch.setattr(runtime, "NATIVE", True)
    jax.clear_caches()
    mine = run()
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for a, b in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@built
@pytest.mark.parametrize(("slope", "rate"), [(np.nan, 0.1), (1.0, 1e25)], ids=["gradient", "update"])
def test_native_adamw_changes_nothing_if_a_number_is_not_finite(
    slope: float, rate: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runtime, "NATIVE", True)
    config = OptimizerConfig()
    params = {"layers": {"attention": {"w_q": normal(2, 40, 20)}}}
    state = make_optimizer(config).init(params)
    gradients = jax.tree.map(lambda x: x.at[0, 0, 0].set(slope), params)
    update = native_adamw(config, make_update(make_optimizer(config)))
    given = Slope(gradients, jnp.float32(1), jnp.float32(1), jnp.float32(rate))
    new = jax.jit(update)(params, state, given)
    assert not new.finite
    for a, b in zip(*map(jax.tree.leaves, ((new.params, new.opt_state), (params, state))), strict=True):
        assert (a == b).all()
