"""Adafactor keeps means of every large matrix, of each layer by itself, where its parameter lies."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import shapes
from jax.sharding import PartitionSpec

from llm_jax.model.config import ModelConfig
from llm_jax.ops.experts import Experts
from llm_jax.sharding import MeshConfig, make_mesh, shardings
from llm_jax.train.factored import scale_by_factored_rms
from llm_jax.train.optimizer import OptimizerConfig, make_optimizer
from llm_jax.tree import count, leaves

# Heads of 16 and three layers: by their size alone the two largest axes of w_q would be D and N, or D and H.
LARGE = ModelConfig(vocab_size=512, d_model=256, n_layers=160, n_heads=16, n_kv_heads=8, d_ff=512, max_seq_len=64)
MIXTURE = ModelConfig(
    vocab_size=512,
    d_model=128,
    n_layers=3,
    n_heads=2,
    max_seq_len=64,
    layers=("global+moe",),
    experts=Experts(number=4, active=2, d_ff=256),
)


def moments(config: ModelConfig) -> Any:
    return jax.eval_shape(make_optimizer(OptimizerConfig(name="adafactor")).init, shapes(config))


@pytest.mark.parametrize("config", [LARGE, MIXTURE], ids=["attention", "experts"])
def test_adafactor_keeps_less_than_two_hundredths_of_what_adam_does(config: ModelConfig):
    assert count(moments(config)) < 0.02 * 2 * count(shapes(config))


def test_a_matrix_is_factored_into_inputs_and_outputs_for_each_layer():
    found = {path.partition("v_")[2]: leaf.shape for path, leaf in leaves(moments(LARGE)).items() if "v_" in path}
    for name, rows, columns in (
        ("layers/attention/w_q", (160, 256), (160, 8, 2, 16)),
        ("layers/attention/w_k", (160, 256), (160, 8, 16)),
        ("layers/attention/w_o", (160, 8, 2, 16), (160, 256)),
        ("layers/feedforward/w_down", (160, 512), (160, 256)),
        ("embedding/table", (512,), (256,)),
    ):
        assert (found[f"row/{name}"], found[f"col/{name}"]) == (rows, columns)
    mixed = {path.partition("v_")[2]: leaf.shape for path, leaf in leaves(moments(MIXTURE)).items()}
    assert [mixed[f"{side}/layers/experts/w_up"] for side in ("row", "col")] == [(3, 4, 128), (3, 4, 256)]


def test_factors_are_split_as_their_parameter_is():
    mesh = make_mesh(MeshConfig(pipeline=2, data=1, fsdp=2, tensor=2))
    found = {path.partition("v_")[2]: x.spec for path, x in leaves(shardings(moments(LARGE), mesh)).items()}
    assert found["row/layers/attention/w_q"] == PartitionSpec("pipeline", "fsdp")
    assert found["col/layers/attention/w_q"] == PartitionSpec("pipeline", "tensor", None, None)
    assert found["row/layers/attention/w_o"] == PartitionSpec("pipeline", "tensor", None, None)
    assert found["col/layers/attention/w_o"] == PartitionSpec("pipeline", "fsdp")


PATH = {"q": "layers/attention/w_q", "up": "layers/experts/w_up", "scale": "layers/attention_norm/scale"}
SHAPES = {"q": (2, 128, 2, 2, 32), "up": (2, 3, 128, 130), "scale": (2, 128)}
COUNTED = {"q": (2,), "up": (2, 3), "scale": (2,)}  # layers, and experts


def grown(values: dict[str, np.ndarray]) -> Any:
    """The tree in which these stand at their paths."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *folders, leaf = PATH[name].split("/")
        room = tree
        for folder in folders:
            room = room.setdefault(folder, {})
        room[leaf] = jnp.asarray(value, jnp.float32)
    return tree


def draw(step: int) -> dict[str, np.ndarray]:
    """A gradient whose layers and experts have quite different sizes: whoever mixes them is seen."""
    rng, found = np.random.default_rng(step), {}
    for name, shape in SHAPES.items():
        lead = COUNTED[name]
        size = 10.0 ** -np.arange(math.prod(lead)).reshape(*lead, *[1] * (len(shape) - len(lead)))
        found[name] = rng.normal(size=shape) * size
    return found


def test_the_update_equals_the_paper_in_float64_matrix_by_matrix():
    rule = scale_by_factored_rms()
    state = rule.init(grown(draw(0)))
    kept: dict[Any, Any] = {}
    for step in range(1, 4):
        given = draw(step)
        found, state = jax.jit(rule.update)(grown(given), state)
        old = 1 - step**-0.8
        for name in ("q", "up"):
            flat = given[name].reshape(-1, 128, math.prod(SHAPES[name][len(COUNTED[name]) + 1 :]))
            mine = np.asarray(leaves(found)[PATH[name]]).reshape(flat.shape)
            for number, g in enumerate(flat):
                row, column = kept.get((name, number), (0.0, 0.0))
                row = old * row + (1 - old) * (g**2 + 1e-30).mean(1)
                column = old * column + (1 - old) * (g**2 + 1e-30).mean(0)
                kept[name, number] = row, column
                update = g / np.sqrt(np.outer(row, column) / row.mean())
                update /= max(1.0, np.sqrt((update**2).mean()))
                np.testing.assert_allclose(mine[number], update, rtol=1e-4, atol=1e-5)


def test_without_factors_it_is_optax_but_for_clipping_by_layer():
    params, rule = grown(draw(0)), scale_by_factored_rms(most=math.inf)
    theirs = optax.scale_by_factored_rms(decay_rate=0.8)
    state, their_state = rule.init(params), theirs.init(params)
    for step in range(1, 3):
        found, state = rule.update(grown(draw(step)), state)
        expected, their_state = theirs.update(grown(draw(step)), their_state, params)
        scale = "layers/attention_norm/scale"
        np.testing.assert_allclose(leaves(found)[scale], leaves(expected)[scale], rtol=1e-5)


def test_a_state_made_outside_of_jit_can_be_donated():
    state = scale_by_factored_rms().init(grown(draw(0)))
    found = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones_like(x), state), donate_argnums=0)(state)
    assert all((x == 1).all() for x in jax.tree.leaves(found))
