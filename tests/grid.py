"""Small models over every option: one to start from, and a set in which every pair of options meets."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts
from llm_jax.ops.mask import Sparse
from llm_jax.ops.position import Rotary
from llm_jax.tree import map_with_path

# All sizes differ, so that no two letters can be mistaken for each other.
TINY = ModelConfig(vocab_size=14, d_model=24, n_layers=2, n_heads=6, max_seq_len=10, n_kv_heads=3, d_ff=20)

FACTORS = {"short_factors": (1.0, 1.5, 2.0, 2.5), "long_factors": (2.0, 3.0, 4.0, 5.0)}  # of longrope, for heads of 8

OPTIONS: dict[str, tuple[Any, ...]] = {
    "positions": ("rotary", "alibi", "learned", "sinusoidal", "none"),
    "activation": ("relu", "gelu", "gelu_exact", "silu", "relu2"),
    "remat": ("none", "full", "dots", "offload", "resid_mid,mlp_post"),
    "n_kv_heads": (None, 3, 1),
    "init": ("gpt2", "scaled", "mup"),
    "head_dim": (None, 8),
    "d_ff": (None, 20),
    "layers": (("global",), ("local", "global+moe"), ("delta+moe", "sparse", "linear"), ("nope", "local")),
    "residual": ("pre", "post", "sandwich", "output", "parallel"),
    "norm": ("rmsnorm", "layernorm", "rmsnorm_1p"),
    "rotary": (
        Rotary(),
        Rotary(theta=100.0, fraction=0.5, pairs="interleaved"),
        Rotary(scaling="yarn", factor=4.0, original_len=8),
        Rotary(scaling="dynamic", factor=2.0, original_len=4, pairs="interleaved"),
        Rotary(scaling="longrope", factor=2.0, original_len=4, **FACTORS),
    ),
    "norm_eps": (1e-5, 1e-6),
    "gated": (True, False),
    "bias": ("none", "qkv", "attention", "all"),
    "dropout": (0.0, 0.1),
    "tied": (True, False),
    "n_classes": (None, 3),
    "dtype": ("float32", "bfloat16"),
    "unroll": (1, 2),
    "attention": (
        AttentionConfig(),
        AttentionConfig(qk_norm="head", softcap=5.0, sinks=1),
        AttentionConfig(qk_norm="whole", scale=0.3, dropout=0.1, implementation="reference"),
    ),
    "experts": (Experts(number=4, d_ff=8), Experts(number=3, active=1, renormalise=False, shared=2, balance="bias")),
    "embedding_scale": (1.0, 3.0),
    "logit_softcap": (None, 4.0),
    "residual_scale": (1.0, 0.3),
    "logit_scale": (1.0, 0.25),
}


def tiny(**changes: Any) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def local(window: int, **changes: Any) -> ModelConfig:
    """Every layer sees the last `window` positions."""
    return tiny(layers=("local",), attention=AttentionConfig(window=window), **changes)


def pairwise(options: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few rows of a value for every option, such that any two values of two options meet in one of them."""
    options = dict(sorted(options.items(), key=lambda item: -len(item[1])))  # many values first: fewer rows
    chosen = [(name, value) for name, values in options.items() for value in values]
    pairs = itertools.combinations(chosen, 2)
    missing = {frozenset(pair): pair for pair in pairs if pair[0][0] != pair[1][0]}
    rows = []
    while missing:
        row = dict(next(iter(missing.values())))
        for name, values in options.items():
            if name not in row:
                met = [sum(frozenset({(name, v), item}) in missing for item in row.items()) for v in values]
                row[name] = values[met.index(max(met))]
        for pair in itertools.combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
        rows.append(row)
    return rows


def fitted(row: dict[str, Any]) -> ModelConfig:
    """A row whose options go together: muP has a free head, and only what the layers use is set."""
    layers, attention, rotary = ",".join(row["layers"]), row["attention"], row["rotary"]
    pairs = (row["head_dim"] or TINY.H) // 2
    cut = {name: getattr(rotary, name)[:pairs] for name in FACTORS}
    window, sparse = 3 if "local" in layers else None, Sparse(block=2) if "sparse" in layers else None
    return tiny(
        **row
        | {
            "n_layers": len(row["layers"]) + 1,  # a period, and one layer of the next
            "tied": row["tied"] and row["init"] != "mup",
            "attention": dataclasses.replace(
                attention, window=window, sparse=sparse, sinks=attention.sinks if window else 0
            ),
            "rotary": dataclasses.replace(rotary, **cut),
            "experts": row["experts"] if "moe" in layers else None,
        }
    )


GRID = [fitted(row) for row in pairwise(OPTIONS)]


@functools.cache
def shapes(config: ModelConfig) -> PyTree:
    """The parameters of `config`, shapes only."""
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@functools.cache
def weights(config: ModelConfig) -> PyTree:
    """Parameters of `config`, biases and scales too, drawn by NumPy: no compile, and no two alike."""
    rng = np.random.default_rng(0)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype)
        return jnp.asarray(noise + np.float32(path.endswith("scale")))

    with jax.ensure_compile_time_eval():
        return map_with_path(draw, shapes(config))


def tokens(*shape: int, vocab_size: int = TINY.vocab_size) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(vocab_size, size=shape), jnp.int32)
