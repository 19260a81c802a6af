"""Expert parallelism: rows go to the devices that have their experts, and what these make of them comes back.

Along the mesh axis `expert` lie n devices, each with its own tokens and with E / n of the experts. A device routes its
tokens and sorts their assignments by expert as it would alone, hence by device. An all-to-all sends parts of one size,
fixed at compile time, and parts that hold whatever a router may choose would be n times as large as an even one fills.
So rows travel in rounds (`ROOM`), as many as the fullest part of any device takes: nearly always one, and no token is
dropped. All devices agree on their number, for one that stopped early would be missed in the all-to-all of the others.

The first round is differentiated like any code, and what it keeps follows the rematerialization around it. Those after
it are loops that usually do nothing, forward and backward, and compute their values again on the way back: in the
memory of one round all can be served.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.ops.collectives import manual_axes, manual_axis_size
from llm_jax.ops.experts import Groups, arrange, dispatch, mix, restore

AXIS = "expert"
ROOM = 1.5  # for each device in a round, times what it gets of an even router

# (rows sorted by expert, the number of each, the experts' matrices) -> what the experts make of the rows
Work = Callable[..., Float[Array, "R D"]]
# The tokens, the weights of their assignments, and the matrices of the experts on this device.
Inputs = tuple[Float[Array, "T D"], Float[Array, "T k"], tuple[Float[Array, "_ _ _"], ...]]


def exchange(
    work: Work,
    x: Float[Array, "T D"],
    experts: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    matrices: tuple[Float[Array, "_ _ _"], ...],
) -> Float[Array, "T D"]:
    """The weighted sum of what each token's experts make of it, wherever along `expert` they are."""
    n, A = manual_axis_size(AXIS), experts.size
    room = min(math.ceil(ROOM * A / n), A)
    groups = arrange(experts, n * len(matrices[0]))
    fullest = groups.sizes.reshape(n, -1).sum(1).max()
    rounds = jax.lax.pmax(-(-fullest // room), tuple(sorted(manual_axes())))
    return _in_rounds(functools.partial(_one_round, work, room), rounds, groups, (x, weights, matrices))


def leaving(groups: Groups, n: int, room: int, turn: Int[Array, ""] | int) -> Groups:
    """What goes in round `turn`: of the rows for the experts of each of n devices `room`, behind those of the rounds
    before. Device d gets the rows from `d * room` on; `sizes` [n E/n] are those of its experts among them.
    """
    A, sizes = len(groups.order), groups.sizes.reshape(n, -1)
    ends, skipped = jnp.cumsum(sizes.sum(1)), turn * room
    starts = ends - sizes.sum(1) + skipped
    rows = starts[:, None] + jnp.arange(room)[None]
    order = jnp.where(rows < ends[:, None], groups.order.at[rows].get(mode="clip"), A)
    device = (groups.place[:, None] >= ends[None]).sum(1)
    slot = groups.place - starts[device]
    place = jnp.where((slot >= 0) & (slot < room), device * room + slot, n * room)
    served = jnp.clip(jnp.cumsum(sizes, 1) - skipped, 0, room)
    return Groups(order=order.reshape(-1), place=place, sizes=jnp.diff(served, axis=1, prepend=0))


def arriving(sizes: Int[Array, "n E"], room: int) -> Groups:
    """Rows that came from n devices, `room` from each, of which the first are those of its experts by `sizes`: all of
    them sorted by expert, and the empty ones behind.
    """
    ends = jnp.cumsum(sizes, 1)
    experts = (jnp.arange(room)[None, :, None] >= ends[:, None]).sum(-1)
    groups = arrange(experts.reshape(-1, 1), sizes.shape[1] + 1)
    return dataclasses.replace(groups, sizes=groups.sizes[:-1])


def _one_round(work: Work, room: int, turn: Int[Array, ""] | int, groups: Groups, inputs: Inputs) -> Array:
    """What the assignments that travel in round `turn` bring their tokens."""
    x, weights, matrices = inputs
    sent = leaving(groups, manual_axis_size(AXIS), room, turn)
    rows, here = _swapped(dispatch(x, sent)), arriving(_swapped(sent.sizes), room)
    made = work(dispatch(rows, here), here.sizes, *matrices)
    return mix(_swapped(restore(made, here)), sent, weights)


def _swapped(x: Array) -> Array:
    """What each device along the axis has for this one: part d of `x` goes to device d."""
    return jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(one: Callable[..., Array], rounds: Int[Array, ""], groups: Groups, inputs: Inputs) -> Array:
    return _forward(one, rounds, groups, inputs)[0]


def _forward(one: Callable[..., Array], rounds: Int[Array, ""], groups: Groups, inputs: Inputs) -> tuple[Array, Any]:
    y, pull = jax.vjp(functools.partial(one, 0, groups), inputs)
    y = jax.lax.fori_loop(1, rounds, lambda turn, y: y + one(turn, groups, inputs), y)
    return y, (pull, rounds, groups, inputs)


def _backward(one: Callable[..., Array], saved: Any, g: Array) -> tuple[None, None, Inputs]:
    pull, rounds, groups, inputs = saved

    def add(turn: Array, total: Inputs) -> Inputs:
        (more,) = jax.vjp(functools.partial(one, turn, groups), inputs)[1](g)
        return jax.tree.map(jnp.add, total, more)

    return None, None, jax.lax.fori_loop(1, rounds, add, pull(g)[0])


_in_rounds.defvjp(_forward, _backward)
