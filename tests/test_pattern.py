"""Where is layer i: every parameter and tap of every layer is where `pattern.py` says, and nowhere else."""

import pytest
from grid import TINY, shapes, tiny

from llm_jax.model.config import TAPS, ModelConfig
from llm_jax.model.pattern import kinds_of, layers_at, layers_with, locate, n_scanned, rows_by_path
from llm_jax.model.stack import slot_of
from llm_jax.ops.config import Experts
from llm_jax.tree import leaves

ODD = tiny(n_layers=5, layers=("delta", "global+moe"), experts=Experts(number=4, d_ff=8))


def test_the_layers_of_a_pattern_are_where_the_picture_says():
    found = [(where.path, where.row) for where in (locate(ODD, layer) for layer in range(5))]
    assert found == [("layers/0", 0), ("layers/1", 0), ("layers/0", 1), ("layers/1", 1), ("layers_4", None)]
    assert [slot_of(ODD, layer % 2, layer) for layer in range(5)] == [0, 0, 1, 1, 2]
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
