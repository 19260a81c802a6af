"""Slots of the cache have no gap, and stacks are joined, and split into layers, in the order of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import GRID, TINY, shapes, tiny

from llm_jax.model.cache import init_cache
from llm_jax.model.config import ModelConfig
from llm_jax.model.pattern import locate
from llm_jax.model.stack import gather, slot_of, unstack
from llm_jax.ops.experts import Experts
from llm_jax.tree import leaves

ODD = tiny(n_layers=5, layers=("delta", "global+moe"), experts=Experts(number=4, d_ff=8))


@pytest.mark.parametrize("config", [TINY, ODD, *GRID[:6]], ids=range(8))
def test_layers_of_one_kind_of_memory_have_slots_without_a_gap(config: ModelConfig):
    cache = jax.eval_shape(lambda: init_cache(config, 1, 4))
    slots: dict[bool, list] = {True: [], False: []}  # of softmax attention, and of linear
    for layer in range(config.n_layers):
        offset = layer % len(config.layers)
        slots[locate(config, layer).kind.has("pattern")].append(slot_of(config, offset, layer))
    assert slots[True] == list(range(cache.k.shape[0]))
    assert slots[False] == list(range(cache.state.memory.shape[0]))


def test_gathered_stacks_are_in_the_order_of_layers():
    stacks = [{"x": jnp.array([0.0, 2])}, {"x": jnp.array([1.0, 3])}, {"x": jnp.array([4.0])}]
    np.testing.assert_array_equal(gather(stacks, [range(0, 4, 2), range(1, 4, 2), [4]])["x"], np.arange(5.0))


def test_unstacked_layers_are_the_rows_of_the_stacks():
    tree = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape), shapes(ODD))
    flat = unstack(ODD, tree)
    assert [name for name in flat if name.startswith("layers")] == [f"layers_{layer}" for layer in (4, 0, 1, 2, 3)]
    for path, leaf in leaves({f"layers_{layer}": flat[f"layers_{layer}"] for layer in range(4)}).items():
        layer, name = int(path[len("layers_")]), path.partition("/")[2]
        np.testing.assert_array_equal(leaf, leaves(tree)[f"layers/{layer % 2}/{name}"][layer // 2])
    assert flat["layers_4"] is tree["layers_4"]
