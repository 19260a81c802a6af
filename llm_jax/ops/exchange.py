"""Expert parallelism: rows are sent to the devices that have their experts, and what these compute is sent back.

Along the mesh axis `expert` there are n devices, each with its own tokens and with E / n of the experts. Each device
routes its tokens and sorts their assignments by expert, hence by device, as it would alone. An all-to-all sends shards
of one size, fixed at compile time, and shards that hold whatever a router may choose would be n times as large as an
even one fills. So rows are sent in rounds of `ROOM`, as many as the fullest shard of any device takes: nearly always
one, and no token is dropped. All devices agree on the number of rounds, for an all-to-all needs all of them.

The first round is differentiated like any code, and what it keeps follows the rematerialization around it. Later rounds
are loops that usually do nothing, forward and backward, and recompute their values in the backward pass: the memory of
one round serves all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.ops.collectives import manual_axes, manual_axis_size, psum
from llm_jax.ops.experts import Groups, arrange, dispatch, grouped, mix, restore

AXIS = "expert"
ROOM = 1.5  # rows for each device in a round, relative to what an even router sends it

# (rows sorted by expert, the number of each, the matrices of the experts) -> the rows that the experts compute
Compute = Callable[..., Float[Array, "R D"]]
# The tokens, the weights of their assignments, and the matrices of the experts on this device.
Inputs = tuple[Float[Array, "T D"], Float[Array, "T k"], tuple[Float[Array, "_ _ _"], ...]]


def serve(
    activation: Callable[[Array], Array],
    x: Float[Array, "B L D"],
    experts: Int[Array, "B L X"],
    weights: Float[Array, "B L X"],
    *matrices: Float[Array, "E _ _"],
) -> Float[Array, "B L D"]:
    """Return the weighted sum of what the X experts of each token compute, on each device for its own tokens.

    A device with all experts sorts its tokens by expert, and sends none. Over `tensor` each device has a shard of the
    experts' width, and the sum is over these too.
    """
    tokens, chosen, shares = (y.reshape(-1, y.shape[-1]) for y in (x, experts, weights))
    work = functools.partial(_apply, activation)
    if manual_axis_size(AXIS) > 1:
        out = exchange(work, tokens, chosen, shares, matrices)
    else:
        groups = arrange(chosen, len(matrices[0]))
        out = mix(work(dispatch(tokens, groups), groups.sizes, *matrices), groups, shares)
    return psum(out.reshape(x.shape), "tensor")


def _apply(
    activation: Callable[[Array], Array],
    rows: Float[Array, "R D"],
    sizes: Int[Array, " E"],
    *matrices: Float[Array, "E _ _"],
) -> Float[Array, "R D"]:
    """Apply to each row its expert's feed-forward; rows are sorted by expert."""
    *ups, down = matrices
    h, *more = (grouped(rows, matrix, sizes) for matrix in ups)
    h = activation(h)
    for other in more:  # gated
        h = h * other
    return grouped(h, down, sizes)


def exchange(
    work: Compute,
    x: Float[Array, "T D"],
    experts: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    matrices: tuple[Float[Array, "_ _ _"], ...],
) -> Float[Array, "T D"]:
    """Return the weighted sum of what each token's experts compute, on whichever device along `expert` they are."""
    n, A = manual_axis_size(AXIS), experts.size
    room = min(math.ceil(ROOM * A / n), A)
    groups = arrange(experts, n * len(matrices[0]))
    fullest = groups.sizes.reshape(n, -1).sum(1).max()
    rounds = jax.lax.pmax(-(-fullest // room), tuple(sorted(manual_axes())))
    return _in_rounds(functools.partial(_one_round, work, room), rounds, groups, (x, weights, matrices))


def leaving(groups: Groups, n: int, room: int, index: Int[Array, ""] | int) -> Groups:
    """Return the rows to send in round `index`: for each of n devices the next `room` of the rows of its experts.

    Device d gets the rows from `d * room` on; `sizes` [n E/n] says how many of them each of its experts has.
    """
    A, sizes = len(groups.order), groups.sizes.reshape(n, -1)
    ends, skipped = jnp.cumsum(sizes.sum(1)), index * room
    starts = ends - sizes.sum(1) + skipped
    rows = starts[:, None] + jnp.arange(room)[None]
    order = jnp.where(rows < ends[:, None], groups.order.at[rows].get(mode="clip"), A)
    device = (groups.row_of[:, None] >= ends[None]).sum(1)
    own = groups.row_of - starts[device]  # the index among the rows for that device
    row_of = jnp.where((own >= 0) & (own < room), device * room + own, n * room)
    served = jnp.clip(jnp.cumsum(sizes, 1) - skipped, 0, room)
    return Groups(order=order.reshape(-1), row_of=row_of, sizes=jnp.diff(served, axis=1, prepend=0))


def arriving(sizes: Int[Array, "n E"], room: int) -> Groups:
    """Sort the rows that came from n devices by expert, the empty ones last.

    Each device sent `room` rows, of which the first are those of its experts by `sizes`.
    """
    ends = jnp.cumsum(sizes, 1)
    experts = (jnp.arange(room)[None, :, None] >= ends[:, None]).sum(-1)
    groups = arrange(experts.reshape(-1, 1), sizes.shape[1] + 1)
    return dataclasses.replace(groups, sizes=groups.sizes[:-1])


def _one_round(work: Compute, room: int, index: Int[Array, ""] | int, groups: Groups, inputs: Inputs) -> Array:
    """Return what the assignments of round `index` add to their tokens [T D]."""
    x, weights, matrices = inputs
    sent = leaving(groups, manual_axis_size(AXIS), room, index)
    rows, here = _all_to_all(dispatch(x, sent)), arriving(_all_to_all(sent.sizes), room)
    out = work(dispatch(rows, here), here.sizes, *matrices)
    return mix(_all_to_all(restore(out, here)), sent, weights)


def _all_to_all(x: Array) -> Array:
    """Send shard d of `x` to device d along the axis, and return what each device sent to this one."""
    return jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(one: Callable[..., Array], rounds: Int[Array, ""], groups: Groups, inputs: Inputs) -> Array:
    return _forward(one, rounds, groups, inputs)[0]


def _forward(one: Callable[..., Array], rounds: Int[Array, ""], groups: Groups, inputs: Inputs) -> tuple[Array, Any]:
    y, pull = jax.vjp(functools.partial(one, 0, groups), inputs)
    y = jax.lax.fori_loop(1, rounds, lambda index, y: y + one(index, groups, inputs), y)
    return y, (pull, rounds, groups, inputs)


def _backward(one: Callable[..., Array], saved: Any, g: Array) -> tuple[None, None, Inputs]:
    pull, rounds, groups, inputs = saved

    def add(index: Array, total: Inputs) -> Inputs:
        (more,) = jax.vjp(functools.partial(one, index, groups), inputs)[1](g)
        return jax.tree.map(jnp.add, total, more)

    return None, None, jax.lax.fori_loop(1, rounds, add, pull(g)[0])


_in_rounds.defvjp(_forward, _backward)
