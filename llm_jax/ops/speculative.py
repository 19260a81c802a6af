"""Speculative sampling: a draft proposes tokens, the model reads them at once, and keeps as many as it may.

Whatever the draft proposes, the tokens that come out have the model's own distribution (Leviathan et al. 2023,
arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318): a drafted token x is kept with probability min(1, p(x) / q(x)),
where p is the model's distribution and q the draft's, and the first that is not kept is replaced by one from what the
draft proposes too rarely, max(p - q, 0).
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

NGRAM = 3  # tokens at the end of a text whose earlier occurrence `look_up` looks for, at most


@struct.dataclass
class Verified:
    """How many of its drafted tokens each row keeps, and the token that follows these."""

    kept: Int[Array, " B"]
    token: Int[Array, " B"]


def acceptance(p: Float[Array, "*B V"], q: Float[Array, "*B V"], drafted: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Return the probability of keeping each drafted token."""
    chosen = drafted[..., None]
    of_p, of_q = (jnp.take_along_axis(x, chosen, axis=-1)[..., 0] for x in (p, q))
    return jnp.minimum(1, of_p / jnp.where(of_q > 0, of_q, 1))


def remainder(p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Return the distribution of the token after a refusal, not normalized: what the draft proposes too rarely.

    If rounding leaves nothing of it, p and q are equal, and it is p.
    """
    more = jnp.maximum(p - q, 0)
    return jnp.where(more.sum(-1, keepdims=True) > 0, more, p)


def verify(
    p: Float[Array, "B T V"],
    q: Float[Array, "B G V"],
    drafted: Int[Array, "B G"],
    keys: Key[Array, "B T"],
) -> Verified:
    """Decide on G drafted tokens of each row, where p is known after each of them and before the first: T = G + 1.

    A row's `keys` belong to the indices of its tokens in the text, so that it draws the same in any batch.
    """
    rows, G = jnp.arange(len(p)), drafted.shape[1]
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0))))(keys[:, :G])
    keeps = uniform < acceptance(p[:, :G], q, drafted)  # never where p has a NaN
    kept = jnp.cumprod(keeps, axis=1).sum(1)
    after = jnp.concatenate([remainder(p[:, :G], q), p[:, G:]], axis=1)[rows, kept]
    draw = jax.vmap(lambda key, weights: jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(weights)))
    return Verified(kept, draw(keys[rows, kept], after))


def look_up(text: Int[Array, "B S"], length: Int[Array, " B"], number: int) -> Int[Array, "B G"]:
    """Draft `number` tokens: what followed the latest of the longest matches of the end of each text, up to NGRAM long.

    A text is the first `length` tokens of its row. A match near the end is continued as if the text repeated itself
    from there on. Without a match anything is drafted (Saxena 2023, "prompt lookup decoding").
    """
    index = jnp.arange(text.shape[1])[None]
    rows, last = jnp.arange(len(text))[:, None], length[:, None] - 1
    matched, longest = jnp.ones(text.shape, bool), jnp.zeros(text.shape, jnp.int32)
    for back in range(NGRAM):  # is the token `back` before this one the one that is `back` before the end?
        before = jnp.roll(text, back, axis=1)
        same = before == text[rows, jnp.maximum(last - back, 0)]
        matched &= same & (index >= back) & (last >= back) & (index < last)
        longest += matched.astype(jnp.int32)
    found = (longest * text.shape[1] + index).argmax(1)[:, None]
    found = jnp.where(longest.max(1)[:, None] > 0, found, jnp.maximum(last - 1, 0))
    period = jnp.maximum(last - found, 1)
    return text[rows, jnp.clip(found + 1 + jnp.arange(number)[None] % period, 0, text.shape[1] - 1)]
