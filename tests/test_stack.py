"""Where is layer i: every parameter and tap of every layer is where `stack.py` says, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import GRID, TINY, shapes, tiny

from llm_jax.model.cache import init_cache
from llm_jax.model.config import TAPS, ModelConfig
from llm_jax.model.stack import gather, kinds_of, layers_at, layers_with, locate, n_scanned, rows_by_path, unstack
from llm_jax.ops.experts import Experts
from llm_jax.tree import leaves

ODD = tiny(n_layers=5, layers=("delta", "global+moe"), experts=Experts(number=4, d_ff=8))


def test_the_layers_of_a_pattern_are_where_the_picture_says():
    found = [(where.path, where.row, where.slot) for where in (locate(ODD, layer) for layer in range(5))]
    assert found == [
        ("layers/0", 0, 0),
        ("layers/1", 0, 0),
        ("layers/0", 1, 1),
        ("layers/1", 1, 1),
        ("layers_4", None, 2),
    ]
    assert kinds_of(ODD) == ["delta", "global+moe", "delta", "global+moe", "delta"]
    assert n_scanned(ODD) == 4
    assert [(where.path, where.row) for where in (locate(TINY, layer) for layer in range(2))] == [
        ("layers", 0),
        ("layers", 1),
    ]


@pytest.mark.parametrize("config", [TINY, ODD], ids=["one kind", "two kinds"])
def test_every_layer_has_parameters_at_its_path_and_row(config: ModelConfig):
    tree = leaves(shapes(config))
    for layer in range(config.n_layers):
        where = locate(config, layer)
        own = {path: leaf for path, leaf in tree.items() if path.startswith(f"{where.path}/")}
        assert any("/experts/" in path for path in own) == where.kind.moe
        assert all(where.row is None or where.row < leaf.shape[0] for leaf in own.values())
        assert all(layers_at(config, path)[where.row or 0] == layer for path in own)


@pytest.mark.parametrize("config", [TINY, ODD, *GRID[:6]], ids=range(8))
def test_layers_of_one_kind_of_memory_have_slots_without_a_gap(config: ModelConfig):
    cache = jax.eval_shape(lambda: init_cache(config, 1, 4))
    located = [locate(config, layer) for layer in range(config.n_layers)]
    softmax = [where.slot for where in located if where.kind.has("pattern")]
    linear = [where.slot for where in located if not where.kind.has("pattern")]
    assert softmax == list(range(cache.k.shape[0]))
    assert linear == list(range(cache.state.memory.shape[0]))


def test_the_rows_of_a_tap_are_those_of_the_layers_that_have_it():
    assert rows_by_path(ODD, "logits") == {"logits": None}
    assert rows_by_path(ODD, "resid_mid") == {
        "layers/0/resid_mid": [0, 2],
        "layers/1/resid_mid": [1, 3],
        "layers_4/resid_mid": [4],
    }
    assert rows_by_path(ODD, "pattern") == {"layers/1/attention/pattern": [0, 1]}
    assert rows_by_path(TINY, "router") == {}
    for tap in TAPS:
        rows = sorted(row for some in rows_by_path(ODD, tap).values() for row in some or [])
        assert rows == list(range(len(layers_with(ODD, tap))))


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
