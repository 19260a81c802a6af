"""Parameters and FLOPs are counted as the program has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import GRID, local, shapes, tiny
from hypothesis import given
from hypothesis import strategies as st
from jaxprs import equations, product_flops

from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.model.count import active_parameters, flops_per_token, parameter_counts, parameter_shapes
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts
from llm_jax.recipes import recipes
from llm_jax.runs.start import load_recipe
from llm_jax.tree import count, leaves


def test_parameters_are_counted_by_what_they_are_for():
    """Worked out: D = 24, F = 20, V = 14, six heads of 4 that share three keys; a period and a layer more."""
    config = tiny(
        layers=("global", "local+moe"),
        n_layers=3,
        attention=AttentionConfig(window=3, qk_norm="head"),
        experts=Experts(number=4, active=1, renormalise=False, d_ff=10, shared=2, balance="bias"),
        tied=False,
        positions="learned",
    )
    assert parameter_counts(config) == {
        "embedding": 14 * 24,
        "positions": 10 * 24,
        "attention": 3 * (2 * 24 * 24 + 2 * 24 * 12 + 2 * 4),
        "feedforward": 2 * 3 * 24 * 20,
        "experts": 4 * 3 * 24 * 10 + 3 * 24 * 20 + 24 * 4 + 4,
        "norms": 7 * 24,
        "unembedding": 14 * 24,
    }
    assert sum(parameter_counts(config).values()) - active_parameters(config) == 3 * 3 * 24 * 10


RECIPES = [load_recipe(name).model for name in recipes()]


@pytest.mark.parametrize("config", [*GRID, *RECIPES], ids=[*range(len(GRID)), *recipes()])
def test_shapes_by_arithmetic_are_those_of_the_tree_that_init_makes(config: ModelConfig):
    assert parameter_shapes(config) == {path: leaf.shape for path, leaf in leaves(shapes(config)).items()}
    assert sum(parameter_counts(config).values()) == count(shapes(config))


def test_the_default_feedforward_costs_the_same_gated_or_not():
    for d_model in (192, 768, 1020):
        plain, gated = (tiny(d_model=d_model, d_ff=None, gated=gated).F for gated in (False, True))
        assert plain == 4 * d_model
        assert gated % 64 == 0
        assert 0 <= 3 * gated - 2 * plain < 3 * 64


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated": False, "n_kv_heads": None},
        {"tied": False, "head_dim": 8, "n_kv_heads": 1},
        {"layers": ("global", "nope"), "residual": "sandwich", "n_layers": 3},
    ],
    ids=str,
)
def test_the_counted_flops_are_three_times_those_of_the_forward_products(changes: dict):
    """A program multiplies by every key; the count takes those in view, the causal half and the diagonal."""
    config, L = (
        tiny(max_seq_len=16, attention=AttentionConfig(implementation="reference"), positions="none", **changes),
        16,
    )
    tokens = jax.ShapeDtypeStruct((1, L), jnp.int32)
    program = equations(lambda p, t: Transformer(config).apply({"params": p}, t), shapes(config), tokens)
    forward = product_flops(program)
    unseen = 4 * config.n_layers * config.n_heads * config.H * L * (L - 1) // 2
    assert flops_per_token(config, L) * L == 3 * (forward - unseen)


@given(st.integers(1, 40), st.sampled_from([None, 1, 2, 7, 39, 50]))
def test_the_counted_keys_are_those_that_the_mask_shows(L: int, window: int | None):
    config = tiny() if window is None else local(window)
    distance = np.arange(L)[:, None] - np.arange(L)
    seen = ((distance >= 0) & (distance < (window or L))).sum()
    without = flops_per_token(config, 1) - 12 * config.n_layers * config.n_heads * config.H
    expected = without + 12 * config.n_layers * config.n_heads * config.H * seen / L
    assert abs(flops_per_token(config, L) - expected) <= 1
