"""The tree of parameters as shapes, as `init` makes it: traced, so nothing is allocated."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Transformer


@functools.cache
def shapes(c: ModelConfig) -> PyTree:
    """Return the tree of parameters as shapes."""
    return jax.eval_shape(Transformer(c).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
