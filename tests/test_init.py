"""Every weight has the standard deviation of its role, which keeps activations to scale at any size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import TINY, shapes, tiny, tokens

from llm_jax.model.config import ModelConfig
from llm_jax.model.taps import capture
from llm_jax.model.transformer import Transformer
from llm_jax.tree import leaves, map_with_path


def expected(scheme: str, c: ModelConfig) -> dict[str, float]:
    """What the papers say: embedding, positions, head; readers of the residual stream; writers to it, two a layer."""
    D, depth = c.d_model, (2 * c.n_layers) ** -0.5
    readers = ("w_q", "w_k", "w_v", "w_up", "w_gate")
    if scheme == "gpt2":
        tables = dict.fromkeys(("embedding", "positions", "unembedding"), 0.02)
        return tables | dict.fromkeys(readers, 0.02) | {"w_o": 0.02 * depth, "w_down": 0.02 * depth}
    layers = dict.fromkeys(readers, D**-0.5) | {"w_o": (c.n_heads * c.H) ** -0.5 * depth, "w_down": c.F**-0.5 * depth}
    if scheme == "scaled":
        return layers | {"embedding": 0.02, "positions": 0.02, "unembedding": D**-0.5}
    return layers | {"embedding": 1.0, "positions": 1.0, "unembedding": 1 / D}


def role(path: str) -> str:
    return path.split("/")[-1] if "layers" in path else path.split("/")[0]


@pytest.mark.parametrize("scheme", ["gpt2", "scaled", "mup"])
def test_every_weight_has_the_standard_deviation_of_its_role(scheme: str):
    sizes = {"d_model": 96, "d_ff": 160, "head_dim": 8, "vocab_size": 120, "max_seq_len": 80}
    config = tiny(init=scheme, tied=False, positions="learned", bias="all", **sizes)
    params = jax.jit(Transformer(config, stacked=False).init)(jax.random.key(0), tokens(1, 1))["params"]
    for path, values in leaves(jax.tree.map(np.asarray, params)).items():
        if path.endswith(("scale", "bias")) or "/b_" in path:
            assert (values == path.endswith("scale")).all(), path
        else:
            np.testing.assert_allclose(values.std(), expected(scheme, config)[role(path)], rtol=0.06, err_msg=path)
            assert abs(values.mean()) < 0.06 * values.std(), path


def test_layers_start_different_from_each_other():
    params = jax.jit(Transformer(TINY).init)(jax.random.key(0), tokens(1, 1))["params"]
    first, second = np.asarray(params["layers"]["attention"]["w_q"])
    assert (first != second).mean() > 0.99


@functools.cache
def capturing(config: ModelConfig) -> Any:
    return jax.jit(lambda params: capture(Transformer(config), params, tokens(4, 10)))


def scales(scheme: str, **sizes: Any) -> dict[str, float]:
    """The root mean square of activations of a fresh model, in its last layer and at its end."""
    config, rng = tiny(init="mup", tied=False, n_kv_heads=None, d_ff=None, **sizes), np.random.default_rng(0)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        std = 0 if path.endswith("scale") else expected(scheme, config)[role(path)]
        return jnp.asarray(rng.normal(path.endswith("scale"), std, leaf.shape), jnp.float32)

    taps = capturing(config)(map_with_path(draw, shapes(config)))
    last = {name: taps[name][-1] for name in ("q", "mlp_pre", "mlp_post", "resid_post")}
    return {name: float(np.sqrt(np.square(x).mean())) for name, x in (last | {"logits": taps["logits"]}).items()}


@pytest.mark.parametrize("scheme", ["scaled", "mup"])
def test_activations_keep_their_scale_at_any_depth_and_width(scheme: str):
    base, deep, wide = (scales(scheme, d_model=D, n_layers=N) for D, N in ((48, 2), (48, 32), (384, 2)))
    for name, scale in base.items():
        assert 0.6 < deep[name] / scale < 1.6, (name, scale, deep[name])
        assert wide[name] / scale < 1.6, (name, scale, wide[name])
        assert name == "logits" or wide[name] / scale > 0.6, (name, scale, wide[name])
