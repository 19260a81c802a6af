"""Attention over rows that lie on several devices gives what attention over whole rows gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.ops.attention import Declined, Mask, Scores, Sparse, attention
from llm_jax.ops.ring import zigzag_order
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


def inputs() -> list[jax.Array]:
    shapes = ((B, L, K, G, H), (B, L, K, H), (B, L, K, H), (B, L, K, G, H))
    return [
        jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
    ]


def output_and_gradients(name: str, mask: Mask, scores: Scores, arrays: list[jax.Array]) -> list[jax.Array]:
    @jax.jit
    def run(mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> list[jax.Array]:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, scores, implementation=name), q, k, v)
        return [out, *pull(g)]

    return run(mask, *arrays)


def split(name: str, case: str, mesh: MeshConfig = EVERY) -> list[np.ndarray]:
    """Output and gradients, in the order of the rows, of `name` on a mesh."""
    mask, scores = CASES[case]
    order = zigzag_order(L, mesh.context) if name == "zigzag" else np.arange(L)
    mask, arrays = jax.tree.map(lambda x: x[:, order], (mask, inputs()))
    with jax.set_mesh(make_mesh(mesh)):
        found = output_and_gradients(name, mask, scores, arrays)
    return [np.asarray(x)[:, np.argsort(order)] for x in found]


def check(name: str, case: str, mesh: MeshConfig = EVERY) -> None:
    for mine, theirs in zip(
        split(name, case, mesh), output_and_gradients("reference", *CASES[case], inputs()), strict=True
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
