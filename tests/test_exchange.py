"""Experts on other devices serve every token as experts here do, in as many rounds as the most uneven routing takes."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normals
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.ops.collectives import shard_map_by_letters
from llm_jax.ops.exchange import ROOM, arriving, exchange, leaving
from llm_jax.ops.experts import arrange, dispatch, grouped, mix
from llm_jax.sharding import MeshConfig, make_mesh

E, k, T, D, F = 8, 2, 32, 6, 4


@st.composite
def choices(draw: st.DrawFn) -> np.ndarray:
    """Two of eight experts for each token; few pairs repeated often leave some experts full and others empty."""
    pairs = draw(st.lists(st.permutations(range(E)), min_size=1, max_size=9))
    return np.resize(np.array(pairs, np.int32)[:, :k], (T, k))


@functools.partial(jax.jit, static_argnums=(1, 2))
def all_rounds(experts: jax.Array, n: int, room: int) -> Any:
    groups = arrange(experts, E)
    return jax.vmap(lambda turn: leaving(groups, n, room, turn))(jnp.arange(math.ceil(T * k / room)))


@given(choices(), st.sampled_from([(2, 10), (4, 7)]))
def test_every_assignment_leaves_once_for_the_device_of_its_expert(experts: np.ndarray, sizes: tuple[int, int]):
    n, room = sizes
    sent, none = jax.tree.map(np.asarray, all_rounds(experts, n, room)), T * k
    rows = sent.order.reshape(-1, n, room)
    np.testing.assert_array_equal(np.sort(rows[rows < none]), np.arange(T * k))
    of = np.append(experts.reshape(-1), E)[rows]
    for device in range(n):
        own = range(device * E // n, (device + 1) * E // n)
        counts = np.stack([(of[:, device] == expert).sum(1) for expert in own], 1)
        np.testing.assert_array_equal(counts, sent.sizes[:, device])
        assert (np.diff(of[:, device]) >= 0).all()  # sorted by expert, and the empty ones last
    for order, place in zip(sent.order, sent.row_of, strict=True):
        np.testing.assert_array_equal(np.append(order, none)[place], np.where(place < n * room, np.arange(none), none))
        assert (place < n * room).sum() == (order < none).sum()


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=3, max_size=3))
def test_what_arrives_is_sorted_by_expert_with_empty_rows_last(sizes: list[list[int]]):
    room = 6
    here = jax.tree.map(np.asarray, jax.jit(arriving, static_argnums=1)(jnp.array(sizes), room))
    experts = np.concatenate([np.repeat(range(3), [*row, room - sum(row)]) for row in sizes])
    np.testing.assert_array_equal(experts[here.order], np.sort(experts))
    np.testing.assert_array_equal(here.order[here.row_of], np.arange(3 * room))
    np.testing.assert_array_equal(here.sizes, np.sum(sizes, 0))


def work(rows: jax.Array, sizes: jax.Array, w_up: jax.Array, w_down: jax.Array) -> jax.Array:
    return grouped(jax.nn.silu(grouped(rows, w_up, sizes)), w_down, sizes)


def here(experts: jax.Array, x: jax.Array, weights: jax.Array, *matrices: jax.Array) -> jax.Array:
    groups = arrange(experts, E)
    return mix(work(dispatch(x, groups), groups.sizes, *matrices), groups, weights)


def elsewhere(experts: jax.Array, x: jax.Array, weights: jax.Array, *matrices: jax.Array) -> jax.Array:
    def one(experts: jax.Array, x: jax.Array, weights: jax.Array, *matrices: jax.Array) -> jax.Array:
        return exchange(work, x, experts, weights, matrices)

    return shard_map_by_letters(one, "BX BD BX EDF EFD BD", experts, x, weights, *matrices)


def stacked(layer: Callable, experts: jax.Array, x: jax.Array, *others: jax.Array) -> jax.Array:
    """Two layers in a scan, with their values computed again in the backward pass."""
    again = jax.checkpoint(lambda x, _: (x + layer(experts, x, *others), None))
    return jax.lax.scan(again, x, length=2)[0]


EVEN = [[0, 2], [4, 6], [1, 3], [5, 7]] * (T // 4)  # on each device
ROUTES = {
    "even": EVEN,
    "two experts of one device for all": [[1, 0]] * T,
    "of two devices": [[0, 7]] * T,
    "uneven for the first half of the rows": [[1, 0]] * (T // 2) + EVEN[: T // 2],
    "uneven for the last device": EVEN[: T - 4] + [[1, 0]] * 4,
}
HOW = {"once": lambda layer: layer, "in a scan": lambda layer: functools.partial(stacked, layer)}


@pytest.mark.parametrize(
    ("mesh", "how"),
    [
        (MeshConfig(data=2, expert=4), "once"),
        pytest.param(MeshConfig(data=1, expert=8), "in a scan", marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, fsdp=2, expert=2), "in a scan", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_experts_elsewhere_compute_what_experts_here_do_for_every_token(mesh: MeshConfig, how: str):
    *inputs, g = normals((T, D), (T, k), (E, D, F), (E, F, D), (T, D))

    def both(layer: Callable) -> Callable:
        """The value and all gradients."""

        @jax.jit
        def run(experts: jax.Array) -> Any:
            out, pull = jax.vjp(functools.partial(HOW[how](layer), experts), *inputs)
            return out, *pull(g)

        return run

    near, far = both(here), both(elsewhere)
    for name, route in ROUTES.items():
        with jax.set_mesh(make_mesh(mesh)):
            found = far(jnp.array(route))
        for got, wanted in zip(found, near(jnp.array(route)), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_an_even_router_takes_one_round_and_all_devices_agree_on_more():
    runs = []

    def counted(rows: jax.Array, sizes: jax.Array, w: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: runs.append(1))
        return grouped(rows, w, sizes)

    @jax.jit
    def run(experts: jax.Array) -> jax.Array:
        def one(experts: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
            return exchange(counted, x, experts, jnp.ones(experts.shape), (w,))

        return shard_map_by_letters(one, "BX BD EDD BD", experts, jnp.ones((T, D)), jnp.ones((E, D, D)))

    A = T * k // 8  # of one device
    for name, rounds in (("even", 1), ("uneven for the last device", math.ceil(A / math.ceil(ROOM * A / 4)))):
        runs.clear()
        with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))):
            jax.block_until_ready(run(jnp.array(ROUTES[name])))
        jax.effects_barrier()
        assert len(runs) == 8 * rounds, name
