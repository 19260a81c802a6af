"""Cross-entropy over next tokens: plain, and chunked so that the logits of a batch never exist at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from llm_jax.ops import native
from llm_jax.ops.attention import soft_cap
from llm_jax.ops.collectives import all_gather, shard_map_by_letters
from llm_jax.ops.gradient import gradient_after
from llm_jax.sharding import TOKENS, constrain

IGNORE = -1
"""The target of a position that does not count: padding, or the last token of a document."""


def unembed(
    hidden: Float[Array, "*T D"], table: Float[Array, "V D"], softcap: float | None = None
) -> Float[Array, "*T V"]:
    """Return the float32 logits of hidden states, limited to (-softcap, softcap) by tanh if there is one."""
    if native.covers(hidden, table):
        flat = native.matmul(hidden.reshape(-1, table.shape[1]), table, transposed=True)
        return soft_cap(flat.reshape(*hidden.shape[:-1], len(table)), softcap)
    return soft_cap(jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32), softcap)


def in_chunks(x: Shaped[Array, "B L *D"], number: int) -> Shaped[Array, "number B _ *D"]:
    """Split the tokens of every row into chunks, each spread over the row, so that no token of a split row moves."""
    return jnp.moveaxis(x.reshape(len(x), -1, number, *x.shape[2:]), 2, 0)


def whole_rows(x: Shaped[Array, "number B _"]) -> Shaped[Array, "B L"]:
    """Join the chunks of `in_chunks` into rows."""
    return jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1)


def likeliest(
    hidden: Float[Array, "B L D"], table: Float[Array, "V D"], chunk: int, softcap: float | None = None
) -> Int[Array, "B L"]:
    """Return the argmax of the logits of every hidden state, with those of only `B * chunk` in memory at a time."""
    chunks = in_chunks(hidden, hidden.shape[1] // chunk)
    return whole_rows(jax.lax.map(lambda x: unembed(x, table, softcap).argmax(-1), chunks))


def _log_z_and_picked(
    logits: Float[Array, "*T V"], targets: Int[Array, "*T"]
) -> tuple[Float[Array, "*T"], Float[Array, "*T"]]:
    """Return logsumexp of each row of logits, and the logit of its target; 0 for a target that is none of the V."""
    if native.covers(logits):
        return native.log_z_and_picked(logits, targets)
    # A sum with one term: a gather would bring together the logits of a V that is split over devices.
    chosen = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1), jnp.where(chosen, logits, 0).sum(-1)


def cross_entropy(
    logits: Float[Array, "*T V"],
    targets: Int[Array, "*T"],
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, "*T"], Float[Array, "*T"]]:
    """Return (loss, nll) of every token in nats, float32, 0 where the target is IGNORE.

    `nll` is the negative log-likelihood `-log p(target)`, and `loss` the same with the terms below; without any they
    are equal.
    Nothing is raised for a target that is neither IGNORE, which is -1, nor one of the V: it picks no logit, and its
    "likelihood" is exp(-logsumexp(logits)). So it is for PyTorch's -100. `train/batch.py` refuses such batches.
    `label_smoothing` mixes the target with the uniform distribution (Szegedy et al. 2015, arXiv:1512.00567);
    `z_loss` adds `z_loss * logsumexp(logits)**2`, which keeps logits from drifting (PaLM, arXiv:2204.02311).
    """
    logits = logits.astype(jnp.float32)
    counted = targets != IGNORE
    log_z, picked = _log_z_and_picked(logits, targets)
    nll = log_z - picked
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_z - logits.mean(-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    return jnp.where(counted, loss, 0), jnp.where(counted, nll, 0)


def chunked_cross_entropy(
    hidden: Float[Array, "B L D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B L"],
    chunk: int,
    softcap: float | None = None,
    **terms: float,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Return `cross_entropy(unembed(hidden, table, softcap), targets)` with `B * chunk` logits in memory at a time.

    The backward pass recomputes the logits of each chunk. Each device loops over the chunks of its own tokens: the
    table is gathered once before the loop and its gradient reduced once after it, where the compiler would do both with
    every chunk. Over chunks that gradient adds up in float32, or it would lose digits with every chunk; where a device
    has few tokens, the gradients of its logits take less memory than such a sum, and `_stored_logits` makes it in one
    product. Raise `ValueError` unless `chunk` divides L.
    """
    L = hidden.shape[1]
    if L % chunk:
        raise ValueError(f"loss.chunk={chunk} does not divide the row length L={L}; use a divisor of {L}")
    number, score = L // chunk, functools.partial(cross_entropy, **terms)

    def chunk_by_chunk(hidden: Array, table: Array, targets: Array) -> tuple[Array, Array]:
        whole = all_gather(table, "VD")
        if few_tokens(targets.size, whole):
            return _stored_logits(hidden, whole, targets, number, softcap, score)
        wide = whole.astype(jnp.float32)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def one(_: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
            x, y = inputs
            return None, score(constrain(unembed(x, wide.astype(table.dtype), softcap), "BLV"), y)

        _, losses = jax.lax.scan(one, None, (in_chunks(hidden, number), in_chunks(targets, number)))
        return jax.tree.map(whole_rows, losses)

    # Backward, the table's gradient is reduce-scattered before that of `hidden` is used: whole it is as large as many
    # layers.
    hidden, table = jax.lax.optimization_barrier((hidden, table))
    loss, nll = shard_map_by_letters(chunk_by_chunk, "BLD *VD BL BL", hidden, table, targets, over=TOKENS)
    return gradient_after(loss), nll


def few_tokens(tokens: int, table: Float[Array, "V D"]) -> bool:
    """Return whether the gradients of all logits, and the table's, take less memory than the table's in float32."""
    size, D = table.dtype.itemsize, table.shape[1]
    return (tokens + D) * size < 4 * D


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _stored_logits(
    hidden: Float[Array, "B L D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B L"],
    number: int,
    softcap: float | None,
    score: Callable[[Array, Array], tuple[Array, Array]],
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Return `score` of the logits, of one of `number` chunks at a time; `D` is whole on this device.

    The backward pass keeps the gradients of all logits, in the dtype of the table.
    """

    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        x, y = inputs
        return score(constrain(unembed(x, table, softcap), "BLV"), y)

    return jax.tree.map(whole_rows, jax.lax.map(one, (in_chunks(hidden, number), in_chunks(targets, number))))


def _stored_logits_backward(
    number: int, softcap: float | None, score: Any, saved: tuple[Array, Array, Array], g: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden, table, targets = saved

    def one(inputs: tuple[Array, Array, tuple[Array, Array]]) -> tuple[Array, Array]:
        x, y, g = inputs
        logits = constrain(unembed(x, table), "BLV")
        (dlogits,) = jax.vjp(lambda logits: score(soft_cap(logits, softcap), y), logits)[1](g)
        dlogits = constrain(dlogits.astype(table.dtype), "BLV")
        return jnp.einsum("BLV,VD->BLD", dlogits, table), dlogits

    xs = in_chunks(hidden, number)
    dx, dlogits = jax.lax.map(one, (xs, in_chunks(targets, number), jax.tree.map(lambda g: in_chunks(g, number), g)))
    dx = jnp.moveaxis(dx, 0, 2).reshape(hidden.shape)
    return dx, jnp.einsum("NBLV,NBLD->VD", dlogits, xs), None


_stored_logits.defvjp(
    lambda hidden, table, targets, *how: (_stored_logits(hidden, table, targets, *how), (hidden, table, targets)),
    _stored_logits_backward,
)
