"""Sampling: from logits to the next token. Each filter sets the logits it rejects to minus infinity; they compose."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
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


@struct.dataclass
class Filters:
    """A `Sampling` as an argument of a compiled program, with its numbers traced.

    What is None is not compiled in, so a program serves every value of the filters that it has. Without a `temperature`
    the likeliest token is taken.
    """

    temperature: Float[Array, ""] | None = None
    top_k: Int[Array, ""] | None = None
    top_p: Float[Array, ""] | None = None
    min_p: Float[Array, ""] | None = None
    repetition_penalty: Float[Array, ""] | None = None


def filters(sampling: Sampling) -> Filters:
    """Return the `Filters` of a `Sampling`; a filter that rejects nothing is left out."""
    neutral = {"repetition_penalty": 1.0} | ({"temperature": 0.0} if sampling.temperature == 0 else {})
    found = {}
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        if value is not None and value != neutral.get(field.name):
            most = np.iinfo(np.int32).max
            found[field.name] = np.int32(min(value, most)) if field.name == "top_k" else np.float32(value)
    return Filters(**found)


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


def top_k(logits: Float[Array, "B V"], k: Int[Array, ""] | int) -> Float[Array, "B V"]:
    """Keep the `k` largest logits, and those equal to the k-th (Fan et al. 2018, arXiv:1805.04833)."""
    least = jnp.minimum(k, logits.shape[-1])
    threshold = _largest_cut(logits, lambda kept: kept.sum(-1, keepdims=True) >= least)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def top_p(logits: Float[Array, "B V"], p: Float[Array, ""] | float) -> Float[Array, "B V"]:
    """Keep the fewest tokens that have probability `p` together (Holtzman et al. 2019, arXiv:1904.09751)."""
    probabilities = jax.nn.softmax(logits, axis=-1)

    def enough(kept: Bool[Array, "B V"]) -> Bool[Array, "B 1"]:
        return jnp.where(kept, probabilities, 0).sum(-1, keepdims=True) >= p

    return jnp.where(probabilities < _largest_cut(probabilities, enough), -jnp.inf, logits)


def _largest_cut(
    x: Float[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B 1"]]
) -> Float[Array, "B 1"]:
    """Return the largest number of each row such that what is not below it is `enough`; all of the row is.

    Nothing is sorted, which would cost more than a small model on a CPU, and no number of tokens is compiled in: floats
    have the order of the integers of their bits, with the bits of negative ones inverted, so 32 halvings of the range
    of integers find exactly where to cut.
    """
    x = x + 0.0  # -0 becomes 0, whose bits differ
    bits, sign = jax.lax.bitcast_convert_type(x, jnp.uint32), jnp.uint32(1 << 31)
    order = jnp.where(bits < sign, bits | sign, ~bits)

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # a cut at `low` keeps enough, a cut at `high` too little
        middle = low + (high - low) // 2
        more = enough(order >= middle)
        return jnp.where(more, middle, low), jnp.where(more, high, middle)

    everything = order.max(-1, keepdims=True) + 1
    cut, _ = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(everything), everything))
    return jax.lax.bitcast_convert_type(jnp.where(cut < sign, ~cut, cut ^ sign), jnp.float32)


def min_p(logits: Float[Array, "B V"], p: Float[Array, ""] | float) -> Float[Array, "B V"]:
    """Keep tokens at least `p` times as probable as the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    return jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


def repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""] | float
) -> Float[Array, "B V"]:
    """Divide positive and multiply negative logits of `seen` (Keskar et al. 2019, arXiv:1909.05858)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Return which rows have a distribution: no NaN among their logits, and a finite one."""
    return jnp.isfinite(logits.max(-1))  # NaN where one is


def filtered(logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, by: Filters) -> Float[Array, "B V"]:
    """Return the float32 logits of the distribution that tokens are drawn from; minus infinity for what is rejected.

    Without a temperature all but the likeliest is rejected.
    """
    logits = _penalized(logits, seen, by)
    if by.temperature is None:
        likeliest = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1])[None] == likeliest, 0, -jnp.inf)
    # From the largest down: a temperature near 0 gives minus infinities, never two infinities to compare.
    logits = (logits - logits.max(-1, keepdims=True)) / by.temperature
    for keep, number in ((top_k, by.top_k), (top_p, by.top_p), (min_p, by.min_p)):
        logits = logits if number is None else keep(logits, number)
    return logits


def _penalized(logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, by: Filters) -> Float[Array, "B V"]:
    logits = logits.astype(jnp.float32)
    if by.repetition_penalty is None:
        return logits
    assert seen is not None
    return repetition_penalty(logits, seen, by.repetition_penalty)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], seen: Bool[Array, "B V"] | None, by: Filters
) -> Int[Array, " B"]:
    """Sample one token per row. Every row has its own key, so its sample does not depend on its neighbours.

    A row with a NaN among its logits, or with no finite one, has no distribution: it gets `NO_TOKEN`.
    """
    if by.temperature is None:
        drawn = jnp.argmax(_penalized(logits, seen, by), axis=-1)
    else:
        drawn = jax.vmap(jax.random.categorical)(keys, filtered(logits, seen, by))
    return jnp.where(finite(logits), drawn, NO_TOKEN)
