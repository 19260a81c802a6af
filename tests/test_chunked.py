"""Chunked attention: what is computed for which block, and that its gradients lose no digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import attention_inputs, output_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import equations, product_flops

from llm_jax.ops.attention import Scores, attention
from llm_jax.ops.chunked import BANDS, Band, bands
from llm_jax.ops.mask import Mask, Sparse


def everything(band: Band, size: int, L: int, S: int) -> np.ndarray:
    """Which queries of a band get which keys: [l S]."""
    got = np.zeros((len(band.starts), S), int)
    for row, keys in enumerate(np.broadcast_to(band.keys, (len(band.starts), band.keys.shape[-1]))):
        np.add.at(got[row], keys[keys < S], 1)
    return np.repeat(got, size, axis=0)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_every_query_gets_each_key_in_view_once_from_one_band(L: int, size: int, seed: int, square: bool):
    """Without JAX: bands are plain NumPy."""
    S = L if square else L + 5
    rng = np.random.default_rng(seed)
    view = rng.random((-(-L // size), -(-S // size))) < 0.3
    view[:, 0] = True
    found = bands(view, size, S)
    np.testing.assert_array_equal(np.concatenate([band.starts for band in found]), np.arange(0, L, size))
    given = np.concatenate([everything(band, size, L, S) for band in found])
    needed = view.repeat(size, 0).repeat(size, 1)[:, :S]
    assert given.max() == 1
    assert (given >= needed).all()


def test_blocks_share_keys_where_they_see_nearly_the_same_ones():
    causal = bands(np.tri(16, dtype=bool), 4, 64)
    assert len(causal) == BANDS
    assert all(band.shared for band in causal)
    assert [band.keys.size for band in causal] == list(range(8, 65, 8))
    spread = bands(np.eye(16, dtype=bool), 4, 64)
    assert not any(band.shared for band in spread)
    assert {band.keys.shape for band in spread} == {(2, 4)}
    (everyone,) = bands(np.ones((16, 16), bool), 4, 62)
    np.testing.assert_array_equal(everyone.keys, np.arange(62))


@pytest.mark.parametrize(
    ("mask", "L", "S"),
    [
        (Mask(causal=False), 131, 131),
        (Mask(sparse=Sparse("strided", block=8, local=1, stride=4)), 133, 133),
        (Mask(sparse=Sparse("fixed", block=32, stride=2)), 20, 20),
        (Mask(segments=jnp.repeat(jnp.arange(3), 67)[None], window=30, sinks=2), 201, 201),
        (Mask(kv_length=jnp.array([250])), 150, 277),
    ],
    ids=["everything", "sparse", "short of a block", "packed", "cache"],
)
def test_no_length_is_too_odd_for_chunks(mask: Mask, L: int, S: int):
    arrays = attention_inputs(1, L, 1, 2, 8, S)
    both = (output_and_gradients(name, mask, Scores(), arrays) for name in ("reference", "chunked"))
    for exact, found in zip(*both, strict=True):
        np.testing.assert_allclose(found, exact, atol=2e-5 * float(jnp.abs(exact).max()))


def test_many_blocks_lose_no_digits_of_the_gradients_of_keys_and_values():
    """In bfloat16 a sum over 16 blocks, kept in bfloat16, is three times as far off."""
    L, H = 2048, 16
    inputs = attention_inputs(1, L, 1, 1, H, dtype="bfloat16")

    def gradients(name: str, *arrays: jax.Array) -> list[jax.Array]:
        """Those of keys and values."""
        found = output_and_gradients(name, Mask(causal=False), Scores(), arrays)
        return [x.astype(jnp.float32) for x in found[2:]]

    exact = gradients("reference", *(x.astype(jnp.float32) for x in inputs))
    off = {
        name: [float(jnp.square(x - y).mean()) ** 0.5 for x, y in zip(gradients(name, *inputs), exact, strict=True)]
        for name in ("reference", "chunked")
    }
    assert np.less(off["chunked"], 1.5 * np.array(off["reference"])).all(), off


@pytest.mark.parametrize(
    ("mask", "share"),
    [
        (Mask(), 9 / 16),  # each eighth of the row multiplies all keys up to its end
        (Mask(window=128), 15 / 64),
        (Mask(sparse=Sparse("strided", block=128, local=1, stride=4)), 2 / 8),
        (Mask(sparse=Sparse("strided", block=32, local=2, stride=16)), 3 / 32),
        (Mask(causal=False), 1),
    ],
    ids=["causal", "window", "sparse", "sparser", "everything"],
)
def test_what_is_out_of_view_is_never_computed(mask: Mask, share: float):
    L, H = 1024, 32
    q, k = (jax.ShapeDtypeStruct((1, L, *heads, H), jnp.float32) for heads in ((1, 1), (1,)))
    program = equations(lambda q, k, v: attention(q, k, v, mask, implementation="chunked"), q, k, k)
    done = product_flops(program) / (4 * L * L * H)
    assert 0.7 * share < done <= share  # the first rows see less
