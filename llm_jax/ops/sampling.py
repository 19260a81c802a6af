"""From logits to the next token. Each filter sets the logits it rejects to minus infinity; they compose."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults draw from the model's own distribution; temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 is greedy, 1 is the model's own")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} keeps no token; use 1 or more, or leave it out")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} is a probability; use a number above 0 and up to 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 is none")


def top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Keeps the `k` largest logits (and those equal to the k-th)."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keeps the smallest set of tokens with probability `p` or more (Holtzman et al. 2019, arXiv:1904.09751)."""
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    threshold = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def min_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keeps tokens at least `p` times as probable as the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    return jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


def repetition_penalty(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Divides positive and multiplies negative logits of seen tokens (Keskar et al. 2019, arXiv:1909.05858)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], seen: Bool[Array, "B V"], sampling: Sampling
) -> Int[Array, " B"]:
    """One token a row. Every row has its own key, so a row's draw does not depend on its neighbours."""
    logits = logits.astype(jnp.float32)
    if sampling.repetition_penalty != 1:
        logits = repetition_penalty(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = min_p(logits, sampling.min_p)
    return jax.vmap(jax.random.categorical)(keys, logits)
