"""Positions of tokens: rotary embedding and its scalings, ALiBi slopes, sinusoidal table."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax.ops.config import Rotary


def rotary(
    x: Float[Array, "B L *heads H"],
    positions: Int[Array, "#B L"],
    config: Rotary,
    length: int | Int[Array, " B"] = 0,
) -> Float[Array, "B L *heads H"]:
    """Rotate the pairs of the first R numbers of every head by their angles at `positions`.

    Where `config.by_length`, angles depend on `length`. They are computed in float32 whatever the dtype of `x`: at
    position 4096 bfloat16 is off by whole turns.
    """
    frequencies = jnp.asarray(config.frequencies(x.shape[-1], length), jnp.float32)
    half, of_rows = frequencies.shape[-1], frequencies.ndim == 2
    angles = positions.astype(jnp.float32)[..., None] * (frequencies[:, None] if of_rows else frequencies[None, None])
    angles = angles.reshape(*angles.shape[:2], *(1,) * (x.ndim - 3), half)
    cos, sin = ((f(angles) * config.scale).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    if config.pairs == "halves":
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    first, second, rest = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
    together = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([together.reshape(*x.shape[:-1], 2 * half), rest], axis=-1)


def alibi_slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """Return how much each head takes off a score per position of distance (Press et al. 2021, arXiv:2108.12409).

    They are `2**(-8 i / heads)` for a power of two; else those of the power below, and every other one of the power
    above. The paper looks back only; keys that are seen ahead, as in a prefix, lose as much.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([slopes, between[: heads - power]])


def sinusoidal(positions: Int[Array, "B L"], d_model: int) -> Float[Array, "B L D"]:
    """Return sines then cosines of `positions / 10000**(2i/D)` (Vaswani et al. 2017, arXiv:1706.03762), float32."""
    frequencies = 10_000.0 ** (-jnp.arange(d_model // 2, dtype=jnp.float32) / (d_model // 2))
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
