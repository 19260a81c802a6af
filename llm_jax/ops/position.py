"""Where a token stands: rotary embedding and sinusoidal table."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(
    x: Float[Array, "B L *heads H"], positions: Int[Array, "#B L"], theta: float
) -> Float[Array, "B L *heads H"]:
    """Turns pairs `(x[i], x[i + H/2])` by `positions * theta**(-2i/H)` (Su et al. 2021, arXiv:2104.09864).

    Angles are computed in float32 whatever the dtype of `x`: at position 4096 bfloat16 is off by whole turns.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies)
    angles = angles.reshape(*angles.shape[:2], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def sinusoidal(positions: Int[Array, "B L"], d_model: int) -> Float[Array, "B L D"]:
    """Sines then cosines of `positions / 10000**(2i/D)` (Vaswani et al. 2017, arXiv:1706.03762), float32."""
    frequencies = 10_000.0 ** (-jnp.arange(d_model // 2, dtype=jnp.float32) / (d_model // 2))
    angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
