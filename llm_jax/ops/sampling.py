"""Sampling: from logits to the next token. Each filter sets the logits it rejects to minus infinity; they compose."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

# What float32 logits can be divided by, or multiplied: beyond that they become infinite, and their softmax NaN.
TEMPERATURES = (1e-37, 1e37)
PENALTIES = (1e-6, 1e6)
NO_TOKEN = -1  # what a row gets whose logits are not finite


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults draw from the model's own distribution.

    Attributes:
      temperature: divides the logits; below 1 the likely becomes likelier, and 0 always takes the likeliest.
      top_k: only so many of the likeliest tokens may be drawn; None: all. This filter comes first.
      top_p: then only the fewest that have this probability together; None: all.
      min_p: then only those at least this many times as probable as the likeliest; None: all.
      repetition_penalty: above 1, tokens that are in the text already become less likely.

    Raise `ValueError` for a value that is not a number, infinite, or out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        low, high = TEMPERATURES
        if self.temperature != 0 and not _within(self.temperature, low, high):
            raise ValueError(
                f"temperature={self.temperature} is neither 0 nor from {low:g} to {high:g}; 0 is greedy, 1 is the "
                "model's own"
            )
        _check_top_k(self.top_k)
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not (_within(value, 0.0, 1.0) and value > 0):
                raise ValueError(f"{name}={value} is not a probability; use a number above 0 and up to 1")
        low, high = PENALTIES
        if not _within(self.repetition_penalty, low, high):
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} does not lie from {low:g} to {high:g}; 1 is none"
            )


def _check_top_k(k: object) -> None:
    """Raise `ValueError` for anything but None and a whole number from 1 on."""
    if k is not None and not (isinstance(k, int | np.integer) and _within(k, 1.0, math.inf)):
        raise ValueError(f"top_k={k} is no number of tokens to keep; use 1 or more, or leave it out")


def _within(value: object, low: float, high: float) -> bool:
    """Return whether `value` is a number in this range; NaN is in none."""
    return (
        isinstance(value, int | float | np.integer | np.floating)
        and not isinstance(value, bool)
        and bool(low <= value <= high)
    )


def top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Keep the `k` largest logits, and those equal to the k-th (Fan et al. 2018, arXiv:1805.04833)."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keep the fewest tokens that have probability `p` together (Holtzman et al. 2019, arXiv:1904.09751).

    Nothing is sorted, which would cost more than a small model on a CPU: floats that are not negative have
    the order of the integers of their bits, so thirty halvings find exactly where to cut.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # a cut at `low` keeps p or more, a cut at `high` less
        middle = (low + high) // 2
        enough = jnp.where(bits >= middle, probabilities, 0).sum(-1, keepdims=True) >= p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    nothing = jnp.zeros_like(bits[:, :1])
    everything = bits.max(-1, keepdims=True) + 1
    cut, _ = jax.lax.fori_loop(0, 30, halve, (nothing, everything))
    return jnp.where(bits < cut, -jnp.inf, logits)


def min_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keep tokens at least `p` times as probable as the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    return jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


def repetition_penalty(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Divide positive and multiply negative logits of `seen` (Keskar et al. 2019, arXiv:1909.05858)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], seen: Bool[Array, "B V"], sampling: Sampling
) -> Int[Array, " B"]:
    """Sample one token per row. Every row has its own key, so its sample does not depend on its neighbours.

    A row with a NaN among its logits, or with no finite one, has no distribution: it gets `NO_TOKEN`.
    """
    logits = logits.astype(jnp.float32)
    largest = logits.max(-1, keepdims=True)  # NaN where one is
    return jnp.where(jnp.isfinite(largest[:, 0]), _draw(logits, keys, seen, sampling), NO_TOKEN)


def _draw(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], seen: Bool[Array, "B V"], sampling: Sampling
) -> Int[Array, " B"]:
    if sampling.repetition_penalty != 1:
        logits = repetition_penalty(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    # From the largest down: a temperature near 0 gives minus infinities, never two infinities to compare.
    logits = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = min_p(logits, sampling.min_p)
    return jax.vmap(jax.random.categorical)(keys, logits)
