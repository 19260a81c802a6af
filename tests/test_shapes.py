"""The tree of shapes is that of the parameters, and is traced once for a config."""

import jax
from grid import tiny, tokens

from llm_jax.model.shapes import shapes
from llm_jax.model.transformer import Transformer


def test_the_shapes_are_those_of_the_parameters_and_traced_once():
    config = tiny()
    params = jax.jit(Transformer(config).init)(jax.random.key(0), tokens(1, 4))["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes(config)
    )
    assert shapes(tiny()) is shapes(config)
