"""Attention over rows that lie on several devices gives what attention over whole rows gives."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import attention_inputs, output_and_gradients

from llm_jax.ops.attention import Declined, Scores, attention
from llm_jax.ops.mask import Mask, Sparse
from llm_jax.ops.ring import Ring, chunks_of, zigzag_order
from llm_jax.sharding import MeshConfig, make_mesh

B, L, K, G, H = 2, 16, 4, 2, 8
SEGMENTS = jnp.array([[1] * 5 + [2] * 8 + [3] * 3, [1] * 9 + [2] * 5 + [0] * 2])
PREFIX = jnp.arange(L)[None] < jnp.array([[7], [11]])
CASES: dict[str, tuple[Mask, Scores]] = {
    "causal": (Mask(), Scores()),
    "both ways": (Mask(causal=False), Scores()),
    "window, sinks, soft cap": (Mask(window=3, sinks=2), Scores(scale=0.5, softcap=2.0)),
    "packed": (Mask(segments=SEGMENTS), Scores()),
    "packed, window, sinks": (Mask(window=3, sinks=1, segments=SEGMENTS), Scores()),
    "packed, prefix": (Mask(segments=SEGMENTS, prefix=PREFIX), Scores()),
    "blocks": (Mask(sparse=Sparse("strided", block=2, local=1, stride=3)), Scores()),
    "ALiBi, prefix": (Mask(prefix=PREFIX), Scores(alibi=True)),
}
EVERY = MeshConfig(data=1, context=4, tensor=2)


INPUTS = attention_inputs(B, L, K, G, H)


def split(name: str, case: str, mesh: MeshConfig = EVERY) -> list[np.ndarray]:
    """Output and gradients, in the order of the rows, of `name` on a mesh."""
    mask, scores = CASES[case]
    order = zigzag_order(L, mesh.context) if name == "zigzag" else np.arange(L)
    mask, arrays = jax.tree.map(lambda x: x[:, order], (mask, INPUTS))
    with jax.set_mesh(make_mesh(mesh)):
        found = output_and_gradients(name, mask, scores, arrays)
    return [np.asarray(x)[:, np.argsort(order)] for x in found]


def check(name: str, case: str, mesh: MeshConfig = EVERY) -> None:
    for mine, theirs in zip(
        split(name, case, mesh), output_and_gradients("reference", *CASES[case], INPUTS), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "case"), [("ring", "packed, window, sinks"), ("zigzag", "ALiBi, prefix")])
def test_keys_that_go_around_give_what_whole_rows_give(name: str, case: str):
    check(name, case)


def test_heads_for_tokens_and_back_gives_what_whole_rows_give():
    check("ulysses", "packed, prefix", MeshConfig(data=2, context=2, tensor=2))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["ring", "zigzag", "ulysses"])
def test_every_form_gives_what_whole_rows_give_under_every_mask(name: str, case: str):
    mesh = MeshConfig(data=2, context=2, tensor=2) if name == "ulysses" else EVERY
    if name == "ulysses" and CASES[case][1].alibi:
        with pytest.raises(Declined, match="ulysses has no alibi"):
            split(name, case, mesh)
    else:
        check(name, case, mesh)


def around(chunks: np.ndarray, mask: Mask) -> Ring:
    return Ring(chunks, L // chunks.size, mask.view(L, L, L // chunks.size, L // chunks.size), Scores())


def meetings(ring: Ring) -> list[list[int]]:
    """How many pairs of chunks each device attends to, at each step."""
    held = [np.roll(ring.chunks, step, axis=0) for step in range(ring.devices)]
    return [
        [int(ring.view[np.ix_(mine, other)].sum()) for mine, other in zip(ring.chunks, x, strict=True)] for x in held
    ]


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_zigzag_gives_every_device_the_same_work_at_every_step(devices: int):
    assert meetings(around(chunks_of(devices, 2), Mask())) == [[3] * devices] + [[2] * devices] * (devices - 1)
    plain = np.sum(meetings(around(chunks_of(devices, 1), Mask())), axis=0)
    assert plain.tolist() == list(range(1, devices + 1))


def test_in_the_zigzag_every_token_stands_once():
    assert zigzag_order(16, 4).tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]


def test_keys_that_nobody_sees_are_not_sent():
    assert around(chunks_of(8, 1), Mask()).steps == 8
    assert around(chunks_of(8, 1), Mask(window=3)).steps == 2
    assert around(chunks_of(8, 1), Mask(window=4)).steps == 3
    assert around(chunks_of(8, 1), Mask(window=3, sinks=1)).steps == 8


def test_a_mesh_without_context_takes_a_name_of_the_ring_for_none():
    for name in ("ring", "zigzag", "ulysses"):
        for mine, theirs in zip(
            output_and_gradients(name, Mask(), Scores(), INPUTS),
            output_and_gradients("reference", Mask(), Scores(), INPUTS),
            strict=True,
        ):
            np.testing.assert_array_equal(mine, theirs)


def test_rows_of_a_cache_and_rows_that_do_not_divide_are_declined():
    q, k, v, _ = INPUTS
    with jax.set_mesh(make_mesh(EVERY)):
        for name in ("ring", "zigzag", "ulysses"):
            with pytest.raises(Declined, match=f"{name} is for training, and attends to no cache; generate on a mesh"):
                attention(q, k, v, Mask(kv_length=jnp.array([L, L])), implementation=name)
        with pytest.raises(Declined, match=r"tokens of a zigzag are out of order; look at them with .*=ring"):
            attention(q, k, v, Mask(), implementation="zigzag", tap=lambda name, x: x)
        with pytest.raises(Declined, match="zigzag splits rows into 8 chunks, got 12 tokens; use a multiple of that"):
            attention(q[:, :12], k[:, :12], v[:, :12], Mask(), implementation="zigzag")
        with pytest.raises(Declined, match=r"chunked takes whole rows, .* use one of ring"):
            attention(q, k, v, Mask(), implementation="chunked")


@pytest.mark.parametrize("name", ["zigzag", "ulysses"])
def test_as_many_numbers_are_sent_as_the_page_says(name: str):
    mesh = MeshConfig(data=2, context=2, tensor=2) if name == "ulysses" else EVERY
    n, rows = mesh.context, B // mesh.data
    share = rows * (L // n) * (K // mesh.tensor) * H  # of the keys on a device
    with jax.set_mesh(make_mesh(mesh)):
        text = output_and_gradients.lower(name, Mask(), Scores(), INPUTS).compile().as_text()
    sent = 0
    for shapes, kind in re.findall(r" = (.*?) (collective-permute|all-to-all)\(", text):
        numbers = sum(math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", shapes))
        sent += numbers if kind == "collective-permute" else numbers * (n - 1) // n
    # The backward pass finds the keys that the forward pass sent, where no scan over layers lies between.
    around, home = (n - 1) * 2 * share, n * 2 * share
    assert sent == (2 * (2 + 2 * G) * share * (n - 1) // n if name == "ulysses" else around + home)
