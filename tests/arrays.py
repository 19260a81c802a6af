"""What several test files compute with: arrays drawn by NumPy, which compile nothing, batches, and a quiet report."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.data.loader import Batch, Loader
from llm_jax.ops.attention import Scores, attention
from llm_jax.ops.mask import Mask
from llm_jax.runs.data import open_data
from llm_jax.train.config import RunConfig


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Draw an array of normal numbers; the same shape and seed give the same ones."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def normals(*shapes: Sequence[int], seed: int = 0) -> list[jax.Array]:
    """Draw an array of normal numbers for each shape, no two of them alike."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def attention_inputs(
    B: int, L: int, K: int, G: int, H: int, S: int | None = None, dtype: str = "float32"
) -> list[jax.Array]:
    """Draw queries BLKGH, keys and values BSKH, and a cotangent of the output; S is L where it isn't given."""
    queries, keys = (B, L, K, G, H), (B, S or L, K, H)
    return [x.astype(dtype) for x in normals(queries, keys, keys, queries)]


@functools.partial(jax.jit, static_argnames=("name", "scores"))
def output_and_gradients(name: str, mask: Mask, scores: Scores, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the output of the implementation `name`, and the gradients of queries, keys and values."""
    q, k, v, cotangent = arrays
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, scores, implementation=name), q, k, v)
    return [out, *pull(cotangent)]


def first_batches(config: RunConfig, number: int) -> list[Batch]:
    """Return the first batches that a run of `config` trains on."""
    loader = Loader(open_data(config, quiet).split("train"), config.data)
    return [loader.batch(step) for step in range(number)]


def quiet(line: str) -> None:
    """Drop a line of a report."""
