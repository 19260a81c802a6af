"""The mixture of experts: which expert serves which token, and products of rows with the matrix of their expert.

Each of T tokens goes to k of E experts, which makes A = T k assignments. `route` chooses, `arrange` sorts the
assignments by expert, `dispatch` copies their rows, `grouped` multiplies each by its expert's matrix, and `mix` adds up
what a token gets back. Every shape is static and no expert has a capacity, so no token is ever dropped (Gale et al.
2022, arXiv:2211.15841).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llm_jax.ops.collectives import shard_map_by_letters
from llm_jax.ops.config import Experts


@struct.dataclass
class Routing:
    """Which experts the tokens go to, and how evenly.

    Attributes:
      experts: the k experts of each token, the most probable first.
      weights: of the outputs of these experts, float32.
      load: counted tokens that each expert serves; a sum, so microbatches add up.
      balance_loss: `E * sum(f * P)`, with f the share of tokens that an expert serves and P its mean probability
        (Fedus et al. 2021, arXiv:2101.03961, eq. 4). Over k choices f sums to k, as in Mixtral: an even router has k.
      z_loss: mean squared log-partition of the router (Zoph et al. 2022, arXiv:2202.08906, eq. 5).
    """

    experts: Int[Array, "*T k"]
    weights: Float[Array, "*T k"]
    load: Float[Array, " E"]
    balance_loss: Float[Array, ""]
    z_loss: Float[Array, ""]


def route(
    logits: Float[Array, "*T E"],
    config: Experts,
    bias: Float[Array, " E"] | None = None,
    counted: Bool[Array, "*T"] | None = None,
) -> Routing:
    """Choose the k best experts by a softmax over all (Mixtral, Jiang et al. 2024, arXiv:2401.04088).

    `bias` is added for the choice alone, not to the weights (Wang et al. 2024, arXiv:2408.15664). Tokens that are not
    `counted`, such as padding, are routed like all others but left out of load and losses. Logits are float32, and on a
    mesh `B L E`.
    """

    def best(scores: Float[Array, "*T E"]) -> Int[Array, "*T k"]:
        return jax.lax.top_k(scores, config.active)[1]

    every = tuple(range(logits.ndim - 1))
    probabilities = jax.nn.softmax(logits, axis=-1)
    scores = probabilities if bias is None else probabilities + jnp.expand_dims(bias, every)
    # The compiler would gather the scores of all tokens on every device, at least on CPU.
    experts = shard_map_by_letters(best, "BSX BSX", jax.lax.stop_gradient(scores))
    chosen = jax.nn.one_hot(experts, config.number)  # a sum with it replaces a gather, and in the gradient a scatter
    weights = (chosen * probabilities[..., None, :]).sum(-1)
    if config.renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    counts = (jnp.ones(logits.shape[:-1]) if counted is None else counted.astype(jnp.float32))[..., None]
    tokens = jnp.maximum(counts.sum(), 1)
    load = (counts * chosen.sum(-2)).sum(every)
    mean = (counts * probabilities).sum(every) / tokens
    log_partition = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return Routing(
        experts=experts,
        weights=weights,
        load=load,
        balance_loss=config.number * (load / tokens * mean).sum(),
        z_loss=(counts * jnp.square(log_partition)).sum() / tokens,
    )


def rebalanced(bias: Float[Array, "*N E"], load: Float[Array, "*N E"], rate: float) -> Float[Array, "*N E"]:
    """Return the next bias: up for experts below the mean load, down for those above (arXiv:2408.15664, alg. 1)."""
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


@struct.dataclass
class Groups:
    """The assignments sorted by expert: first all of expert 0, in the order of their tokens, then all of expert 1.

    Attributes:
      order: row r is assignment `order[r]`, which is choice `order[r] % k` of token `order[r] // k`. If only some
        assignments are served, as in `ops/exchange.py`, there are R rows, and the empty ones have A here.
      row_of: the inverse: assignment a is in row `row_of[a]`, which is R if it is not served.
      sizes: rows of each expert.
    """

    order: Int[Array, " R"]
    row_of: Int[Array, " A"]
    sizes: Int[Array, "*n E"]


def arrange(experts: Int[Array, "T k"], number: int) -> Groups:
    """Sort the assignments to `number` experts."""
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    sizes = (chosen[:, None] == jnp.arange(number)[None]).sum(0)
    return Groups(order=order, row_of=jnp.argsort(order), sizes=sizes)


def dispatch(x: Float[Array, "T D"], groups: Groups) -> Float[Array, "R D"]:
    """Return a row for every assignment, sorted by expert; 0 where there is none."""
    copies = jnp.repeat(x, len(groups.row_of) // len(x), axis=0)
    return _permuted(copies, groups.order, groups.row_of)


def restore(rows: Float[Array, "R D"], groups: Groups) -> Float[Array, "A D"]:
    """Return the row of every assignment, in the order of assignments; 0 where there is none."""
    return _permuted(rows, groups.row_of, groups.order)


def mix(rows: Float[Array, "R D"], groups: Groups, weights: Float[Array, "T k"]) -> Float[Array, "T D"]:
    """Return the weighted sum over each token's experts, added in float32."""
    back = restore(rows, groups).reshape(*weights.shape, -1)
    return (weights[..., None] * back.astype(jnp.float32)).sum(1).astype(rows.dtype)


@jax.custom_vjp
def _permuted(x: Array, order: Array, inverse: Array) -> Array:
    """Return `x[order]`, 0 where that is no row.

    Its gradient is a gather too: autodiff would scatter, as it can't know that no row comes twice.
    """
    whole = len(order) == len(inverse)
    return x.at[order].get(mode="promise_in_bounds" if whole else "fill", fill_value=0)


_permuted.defvjp(
    lambda x, order, inverse: (_permuted(x, order, inverse), (order, inverse)),
    lambda saved, g: (_permuted(g, saved[1], saved[0]), None, None),
)


@jax.custom_vjp
def grouped(x: Float[Array, "A I"], w: Float[Array, "E I O"], sizes: Int[Array, " E"]) -> Float[Array, "A O"]:
    """Multiply every row by the matrix of its group: the first `sizes[0]` rows by `w[0]`, and so on.

    Rows after the last group have no meaning.
    """
    return jax.lax.platform_dependent(x, w, sizes, cpu=_in_blocks, default=jax.lax.ragged_dot)


def _grouped_backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    def ragged(x: Array, w: Array, sizes: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)[1](g)

    dx, dw = jax.lax.platform_dependent(*saved, g, cpu=_in_blocks_backward, default=ragged)
    return dx, dw, None


grouped.defvjp(lambda x, w, sizes: (grouped(x, w, sizes), (x, w, sizes)), _grouped_backward)

# On CPU `ragged_dot` multiplies all rows by all matrices. The loops below take a block of rows at a time and the
# matrix of its group: the work of a dense layer, plus half a block for each group.
BLOCK = 128


def _in_blocks(x: Array, w: Array, sizes: Array) -> Array:
    def expert(y: Array, inputs: tuple[Array, ...]) -> tuple[Array, None]:
        matrix, start, end = inputs

        def step(y: Array, first: Array, own: Array) -> Array:
            return _add(y, first, jnp.where(own, _block(x, first), 0) @ matrix)

        return _fold(step, y, len(x), start, end), None

    ends = jnp.cumsum(sizes)
    y = jnp.zeros((len(x), w.shape[2]), x.dtype)
    return jax.lax.scan(expert, y, (w, ends - sizes, ends))[0]


def _in_blocks_backward(x: Array, w: Array, sizes: Array, g: Array) -> tuple[Array, Array]:
    def expert(dx: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        matrix, start, end = inputs

        def step(sums: tuple[Array, Array], first: Array, own: Array) -> tuple[Array, Array]:
            dx, dw = sums
            dy = jnp.where(own, _block(g, first), 0)
            dw = dw + jnp.matmul(_block(x, first).T, dy, preferred_element_type=jnp.float32)
            return _add(dx, first, dy @ matrix.T), dw

        dx, dw = _fold(step, (dx, jnp.zeros(matrix.shape, jnp.float32)), len(x), start, end)
        return dx, dw.astype(w.dtype)

    ends = jnp.cumsum(sizes)
    return jax.lax.scan(expert, jnp.zeros_like(x), (w, ends - sizes, ends))


def _fold(step: Callable[..., Any], carry: Any, rows: int, start: Array, end: Array) -> Any:
    """Fold `carry = step(carry, first, own)` over the blocks of the rows from `start` to `end`.

    A block begins at row `first`, and `own [block 1]` says which of its rows count: the last block may reach into the
    next group, or starts earlier to end with the array.
    """
    size = min(BLOCK, rows)

    def body(i: Array, carry: Any) -> Any:
        wanted = start + i * size
        first = jnp.minimum(wanted, rows - size)
        row = first + jnp.arange(size)
        return step(carry, first, ((row >= wanted) & (row < end))[:, None])

    return jax.lax.fori_loop(0, (end - start + size - 1) // size, body, carry)


def _block(x: Array, first: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, first, min(BLOCK, len(x)))


def _add(y: Array, first: Array, block: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(y, _block(y, first) + block, first, axis=0)
