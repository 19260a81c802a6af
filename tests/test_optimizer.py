"""Schedules have their shape, update rules equal float64 arithmetic written out, and all of them learn."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import GRID, TINY, shapes, tiny, weights

from llm_jax.model.config import ModelConfig
from llm_jax.ops.experts import Experts
from llm_jax.paths import first_match
from llm_jax.sharding import MATRICES, letters_of
from llm_jax.train.optimizer import OptimizerConfig, decay_mask, make_optimizer, make_schedule
from llm_jax.tree import leaves, map_with_path

NAMES = ("adamw", "lion", "adafactor", "muon")
STEPS = 50


def curve(steps: int = STEPS, **changes: Any) -> np.ndarray:
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **changes), steps)
    return np.array([float(schedule(step)) for step in range(steps)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_every_schedule_warms_up_to_the_peak_and_never_rises_again(schedule: str, warmup: int):
    rates = curve(schedule=schedule, warmup_steps=warmup)
    np.testing.assert_allclose(rates[:warmup], 2.0 * np.arange(1, warmup + 1) / max(1, warmup), rtol=1e-6)
    np.testing.assert_allclose(rates[warmup], 2.0, rtol=1e-6)
    assert (np.diff(rates[warmup:]) <= 1e-6).all()


def test_the_last_step_has_the_final_fraction():
    for schedule in ("cosine", "linear", "wsd"):
        np.testing.assert_allclose(curve(schedule=schedule, warmup_steps=10, final_fraction=0.05)[-1], 0.1, rtol=1e-5)
        np.testing.assert_allclose(curve(schedule=schedule, warmup_steps=40, final_fraction=0.0)[-1], 0, atol=1e-6)
    assert curve(schedule="constant", warmup_steps=10)[-1] == 2.0


def test_cosine_and_linear_pass_the_middle_half_way():
    for schedule in ("cosine", "linear"):
        rates = curve(51, schedule=schedule, warmup_steps=10, final_fraction=0.0)
        np.testing.assert_allclose(rates[30], 1.0, rtol=1e-5)
    expected = [1 + math.cos(math.pi * step / 40) for step in range(41)]
    np.testing.assert_allclose(
        curve(51, schedule="cosine", warmup_steps=10, final_fraction=0.0)[10:], expected, atol=1e-5
    )


def test_warmup_stable_decay_stays_and_then_falls_by_equal_steps():
    rates = curve(schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.0)
    assert (rates[10:40] == 2.0).all()
    np.testing.assert_allclose(np.diff(rates[39:]), -0.2, rtol=1e-4)


def test_schedules_that_do_not_fit_in_the_run_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"warmup_steps=50 leaves nothing of steps=50; set optimizer\.warmup_steps=5"):
        curve(warmup_steps=50)
    with pytest.raises(ValueError, match="warm-up of 45 and decay of 10 steps overlap in a run of steps=50; lower"):
        curve(warmup_steps=45, schedule="wsd")
    assert len(curve(1, warmup_steps=0)) == 1


NAN, INF = math.nan, math.inf
REFUSED = {
    "learning_rate": (0.0, -1.0, INF, NAN, 1e39, 1e-50),
    "clip": (0.0, -1.0, INF, NAN),
    "eps": (0.0, -1e-8, INF, NAN, 1e-46),
    "b1": (1.0, -0.1, 1.5, NAN, 1 - 1e-9),
    "b2": (1.0, -0.1, 1.5, NAN, 1 - 1e-9),
    "weight_decay": (-0.1, INF, NAN),
    "final_fraction": (-0.1, 1.1, NAN),
    "decay_fraction": (-0.1, 1.1, NAN),
    "warmup_steps": (-1,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, some in REFUSED.items() for value in some])
def test_numbers_that_make_weights_no_numbers_or_no_sense_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=f"optimizer.{name}={re.escape(str(value))} (must|is negative)"):
        OptimizerConfig(**{name: value})


def test_every_number_of_the_config_is_looked_at():
    numbers = {field.name for field in dataclasses.fields(OptimizerConfig) if field.type not in (str,)}
    assert numbers - {"name", "schedule"} == set(REFUSED)


@pytest.mark.parametrize("config", GRID, ids=range(len(GRID)))
def test_decay_pulls_matrices_and_token_tables_only(config: ModelConfig):
    for path, decayed in leaves(decay_mask(shapes(config))).items():
        matrix = path.split("/")[-1].startswith("w_")
        assert decayed == (matrix or path in ("embedding/table", "unembedding/table", "classes/table")), path


def test_a_parameter_without_a_decay_row_raises():
    message = "the name of 'layers/attention/gain' does not say whether weight decay applies; end it in w_"
    with pytest.raises(ValueError, match=message):
        decay_mask({"layers": {"attention": {"gain": jnp.zeros(3)}}})


def test_of_a_layer_of_ones_own_the_arrays_of_two_axes_decay():
    leaf = {"Dense_0": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}}
    mask = decay_mask(
        {"layers": {"mixer": leaf}, "layers_4": {"mixer": {"gain": jnp.ones(3), "table": jnp.ones((3, 3))}}}
    )
    assert mask["layers"]["mixer"]["Dense_0"] == {"kernel": True, "bias": False}
    assert mask["layers_4"]["mixer"] == {"gain": False, "table": True}


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_of_other_names_is_one_line_that_names_a_parameter(name: str):
    for tree in ({"dense": {"kernel": jnp.zeros((2, 3))}}, [jnp.zeros(3)]):
        with pytest.raises(ValueError, match=r"dense/kernel|'0'") as error:
            make_optimizer(OptimizerConfig(name=name)).init(tree)
        assert "\n" not in str(error.value)


def test_muon_takes_each_matrix_of_a_block_by_its_inputs_and_outputs():
    found = {}
    experts = {"layers": ("global", "delta+moe"), "n_layers": 3, "experts": Experts(number=4, shared=1)}
    for path, leaf in leaves(shapes(tiny(bias="all", positions="learned", tied=False, **experts))).items():
        pair = first_match(MATRICES, path)
        if pair is not None:
            found["/".join(path.split("/")[-2:])] = pair
            assert set("".join(pair)) <= set(letters_of(path, leaf.shape)), path
    assert found == {
        "attention/w_q": ("D", "KGH"),
        "attention/w_k": ("D", "KH"),
        "attention/w_v": ("D", "KH"),
        "attention/w_o": ("KGH", "D"),
        "attention/w_gate": ("D", "KGH"),
        **{f"{room}/w_{name}": ("D", "F") for room in ("feedforward", "experts", "shared") for name in ("up", "gate")},
        **{f"{room}/w_down": ("F", "D") for room in ("feedforward", "experts", "shared")},
    }


def gradient(step: int) -> Any:
    """Numbers of a gradient, drawn by NumPy, of a norm well above 1."""
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), weights(TINY))


def updated(config: OptimizerConfig, gradients: list[Any], params: Any) -> Any:
    """`params` after one step for each of `gradients`."""
    optimizer, schedule = make_optimizer(config), make_schedule(config, STEPS)

    @jax.jit
    def step(params: Any, state: Any, gradient: Any, rate: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, optax.tree.scale(rate, updates)), state

    state = optimizer.init(params)
    for number, gradient in enumerate(gradients):
        params, state = step(params, state, gradient, schedule(number))
    return params


def by_the_paper(config: OptimizerConfig, gradients: list[Any], params: Any) -> dict[str, np.ndarray]:
    """AdamW or Lion in float64, as the papers write them; clipping first, decoupled decay last."""
    values = {path: np.asarray(w, np.float64) for path, w in leaves(params).items()}
    decayed = leaves(decay_mask(params))
    m, v = ({path: np.zeros_like(w) for path, w in values.items()} for _ in range(2))
    for t, raw in enumerate(gradients, 1):
        g = {path: np.asarray(x, np.float64) for path, x in leaves(raw).items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        rate = config.learning_rate * t / config.warmup_steps
        for path, w in values.items():
            clipped = g[path] * min(1.0, (config.clip or math.inf) / norm)
            if config.name == "lion":
                direction = np.sign(config.b1 * m[path] + (1 - config.b1) * clipped)
                m[path] = config.b2 * m[path] + (1 - config.b2) * clipped
            else:
                m[path] = config.b1 * m[path] + (1 - config.b1) * clipped
                v[path] = config.b2 * v[path] + (1 - config.b2) * clipped**2
                m_hat, v_hat = m[path] / (1 - config.b1**t), v[path] / (1 - config.b2**t)
                direction = m_hat / (np.sqrt(v_hat) + config.eps)
            values[path] = w - rate * (direction + config.weight_decay * decayed[path] * w)
    return values


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_an_update_rule_equals_its_paper_in_float64(name: str, clip: float | None):
    # An epsilon that counts, or Adam would not notice the clipping.
    config = OptimizerConfig(name=name, clip=clip, learning_rate=0.1, warmup_steps=4, eps=1e-2, weight_decay=0.3)
    gradients = [gradient(step) for step in range(3)]
    found, expected = leaves(updated(config, gradients, weights(TINY))), by_the_paper(config, gradients, weights(TINY))
    for path, w in found.items():
        np.testing.assert_allclose(w, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)


MUON = OptimizerConfig(name="muon", clip=None, learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.0)


def change(config: OptimizerConfig, gradient: Any) -> dict[str, np.ndarray]:
    """What one step adds to each parameter."""
    after = leaves(updated(config, [gradient], weights(TINY)))
    return {path: np.asarray(after[path] - w) for path, w in leaves(weights(TINY)).items()}


def matrices(path: str, value: np.ndarray) -> np.ndarray | None:
    """[N, in, out], or None for what Muon leaves to AdamW."""
    pair = first_match(MATRICES, path)
    if pair is None:
        return None
    letters = letters_of(path, value.shape)
    fan_in = math.prod(value.shape[letters.index(letter)] for letter in pair[0])
    return value.reshape(value.shape[0], fan_in, -1)


def test_muon_gives_every_matrix_of_every_layer_singular_values_near_one():
    seen = 0
    for path, value in change(MUON, gradient(0)).items():
        if (matrix := matrices(path, value)) is not None:
            scale = MUON.learning_rate * 0.2 * math.sqrt(max(matrix.shape[1:]))
            singular = np.linalg.svd(matrix / scale, compute_uv=False)
            assert singular.min() > 0.5, path
            assert singular.max() < 1.3, path
            seen += 1
    assert seen == 7


def test_muon_does_not_mix_layers():
    other = map_with_path(lambda path, g: g.at[1].multiply(7.0) if "layers" in path else g, gradient(0))
    before, after = change(MUON, gradient(0)), change(MUON, other)
    for path in before:
        if path.startswith("layers"):
            np.testing.assert_array_equal(before[path][0], after[path][0], err_msg=path)


def test_muon_leaves_the_rest_to_adamw():
    muon = OptimizerConfig(name="muon", learning_rate=0.1, warmup_steps=4, eps=1e-2, weight_decay=0.3)
    gradients = [gradient(step) for step in range(2)]
    found = leaves(updated(muon, gradients, weights(TINY)))
    expected = by_the_paper(muon, gradients, weights(TINY))
    rest = [path for path in found if first_match(MATRICES, path) is None]
    assert len(rest) == 4
    for path in rest:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_muon_takes_five_steps_of_its_iteration():
    """optax takes a number of steps and a list of coefficients, of which the shorter counts: here there is one way."""
    raw = gradient(0)
    found = change(MUON, raw)["layers/feedforward/w_up"]
    a, b, c = 3.4445, -4.7750, 2.0315
    for layer, g in enumerate(np.asarray(raw["layers"]["feedforward"]["w_up"], np.float64)):
        x = g.T / (np.linalg.norm(g) + 1e-8)  # no wider than high: 20 outputs of 24 inputs
        for _ in range(5):
            x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
        expected = -MUON.learning_rate * 0.2 * math.sqrt(max(g.shape)) * x.T
        np.testing.assert_allclose(found[layer], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_comes_closer_to_a_target(name: str):
    target = jax.tree.map(lambda w, g: w + 0.3 * g, weights(TINY), gradient(0))
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=2, weight_decay=0.0)
    optimizer, schedule = make_optimizer(config), make_schedule(config, STEPS)

    def loss(params: Any) -> jax.Array:
        return sum(jnp.square(w - t).sum() for w, t in zip(*map(jax.tree.leaves, (params, target)), strict=True))

    def step(carry: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, optax.tree.scale(schedule(number), updates)), state), value

    start = (weights(TINY), optimizer.init(weights(TINY)))
    losses = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(STEPS))[1])()
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_decay_alone_shrinks_what_the_mask_names_and_nothing_else(name: str):
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5)
    still = jax.tree.map(jnp.zeros_like, weights(TINY))
    after = leaves(updated(config, [still], weights(TINY)))
    for path, w in leaves(weights(TINY)).items():
        factor = 0.95 if leaves(decay_mask(weights(TINY)))[path] else 1.0
        np.testing.assert_allclose(after[path], factor * w, rtol=1e-5, atol=1e-7, err_msg=path)
