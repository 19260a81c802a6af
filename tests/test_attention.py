"""The mask equals plain loops over booleans, and every implementation equals the reference."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.ops.attention import IMPLEMENTATIONS, Declined, Mask, attention

KEY = jax.random.key(0)


def literal(mask: Mask, L: int, S: int | None = None) -> list[str]:
    """The mask of the first row, a string of 0 and 1 for each query."""
    return ["".join(map(str, row)) for row in mask.materialise(L, S or L)[0].astype(int).tolist()]


def test_a_causal_mask_is_a_triangle():
    assert literal(Mask(), 4) == ["1000", "1100", "1110", "1111"]


def test_a_window_is_a_band():
    assert literal(Mask(window=2), 4) == ["1000", "1100", "0110", "0011"]


def test_without_causality_everything_is_seen():
    assert literal(Mask(causal=False), 3) == ["111", "111", "111"]


def test_packed_documents_are_blocks_and_padding_sees_padding():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    assert literal(Mask(segments=segments), 5) == ["10000", "11000", "00100", "00110", "00001"]


def test_queries_of_a_cache_are_the_last_of_its_keys():
    assert literal(Mask(kv_length=jnp.array([4])), 2, 6) == ["111000", "111100"]
    assert literal(Mask(kv_length=jnp.array([4]), window=2), 2, 6) == ["011000", "001100"]


def test_without_a_cache_there_are_as_many_keys_as_queries():
    with pytest.raises(ValueError, match="2 queries and 3 keys need kv_length to say where the queries stand"):
        Mask().materialise(2, 3)


def test_segments_are_of_all_tokens():
    cached = Mask(segments=jnp.array([[1, 1, 2, 2]]), kv_length=jnp.array([4]))
    with pytest.raises(ValueError, match="segments of 4 tokens can't tell 2 queries and 4 keys apart"):
        cached.materialise(2, 4)


def seen(mask: Mask, L: int, S: int, row: int, query: int, key: int) -> bool:
    """May `query` see `key`? One rule a line."""
    position = query if mask.kv_length is None else int(mask.kv_length[row]) - L + query
    if mask.causal and key > position:
        return False
    if mask.window is not None and position - key >= mask.window:
        return False
    if mask.kv_length is not None and key >= int(mask.kv_length[row]):
        return False
    return mask.segments is None or bool(mask.segments[row, query] == mask.segments[row, key])


@st.composite
def masks(draw: st.DrawFn) -> tuple[Mask, int, int, int, int]:
    """A mask of two rows, L, S, and a block of queries: start and rows."""
    L = 5
    segments, kv_length, S = None, None, L
    if draw(st.booleans()):
        S = draw(st.sampled_from([L, L + 3]))
        kv_length = jnp.array(draw(st.lists(st.integers(L, S), min_size=2, max_size=2)), jnp.int32)
    elif draw(st.booleans()):
        row = st.lists(st.integers(0, 2), min_size=L, max_size=L)
        segments = jnp.array([draw(row), draw(row)], jnp.int32)
    window = draw(st.none() | st.integers(1, 7))
    rows = draw(st.sampled_from([2, L]))
    mask = Mask(draw(st.booleans()), window, segments, kv_length)
    return mask, L, S, draw(st.integers(0, L - rows)), rows


@given(masks())
def test_a_mask_equals_its_rules_one_by_one(case: tuple[Mask, int, int, int, int]):
    mask, L, S, start, rows = case
    expected = [
        [[seen(mask, L, S, row, query, key) for key in range(S)] for query in range(start, start + rows)]
        for row in range(2)
    ]
    found = np.broadcast_to(mask.materialise(L, S, start, rows), (2, rows, S))
    assert found.tolist() == expected


def inputs(L: int, S: int, dtype: str) -> list[jax.Array]:
    """Queries, keys, values and a cotangent: two rows, two key/value heads, three query heads to each."""
    shapes: Sequence[tuple[int, ...]] = ((2, L, 2, 3, 8), (2, S, 2, 8), (2, S, 2, 8), (2, L, 2, 3, 8))
    keys = jax.random.split(KEY, len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def documents(L: int) -> jax.Array:
    return jnp.stack([jnp.repeat(jnp.array([1, 2, 0]), jnp.array([5, L - 7, 2]), total_repeat_length=L)] * 2)


LONG, SHORT = 256, 9
CASES = {
    "causal": (Mask(), LONG, LONG),
    "both ways in a window": (Mask(causal=False, window=100), LONG, LONG),
    "documents": (Mask(segments=documents(LONG)), LONG, LONG),
    "documents in a window": (Mask(segments=documents(LONG), window=3), LONG, LONG),
    "prefill": (Mask(kv_length=jnp.array([256, 300])), LONG, 320),
    "short documents": (Mask(segments=documents(SHORT)), SHORT, SHORT),
    "decode in a window": (Mask(kv_length=jnp.array([2, 9]), window=4), 1, 12),
}


def output_and_gradients(name: str, mask: Mask, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    q, k, v, cotangent = arrays

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, implementation=name), q, k, v)
        return [out, *pull(cotangent)]

    return jax.jit(run)(q, k, v)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Mask, list[jax.Array], list[jax.Array]]:
    """A mask, float32 inputs, and the reference's output and gradients."""
    mask, L, S = CASES[request.param]
    arrays = inputs(L, S, "float32")
    return mask, arrays, output_and_gradients("reference", mask, arrays)


@pytest.mark.parametrize("name", sorted({*IMPLEMENTATIONS} - {"reference"}))
def test_an_implementation_equals_the_reference_or_declines(name: str, case: tuple):
    mask, arrays, expected = case
    try:
        found = output_and_gradients(name, mask, arrays)
    except Declined:
        return
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_is_the_rounding_of_float32(name: str):
    mask, L, S = CASES["documents"]
    arrays = inputs(L, S, "bfloat16")
    exact = output_and_gradients("reference", mask, [x.astype(jnp.float32) for x in arrays])
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention promotes
        found = output_and_gradients(name, mask, arrays)
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == jnp.bfloat16
        error = jnp.abs(mine.astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max()
        assert error < 2**-6, error


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_accepts_a_long_causal_row(name: str):
    q, k, v, _ = inputs(LONG, LONG, "float32")
    assert attention(q, k, v, Mask(), implementation=name).shape == q.shape


def test_an_implementation_that_declines_says_why():
    q, k, v, _ = inputs(SHORT, SHORT, "float32")
    with pytest.raises(Declined, match=f"chunked takes a query length .* got {SHORT}"):
        attention(q, k, v, Mask(), implementation="chunked")


def test_an_unknown_implementation_is_answered_with_the_known_ones():
    q, k, v, _ = inputs(SHORT, SHORT, "float32")
    with pytest.raises(ValueError, match="unknown attention 'flash'; known: reference, "):
        attention(q, k, v, Mask(), implementation="flash")


@pytest.mark.parametrize("L", [SHORT, 1024])
def test_the_default_accepts_every_length(L: int):
    q = jax.ShapeDtypeStruct((2, L, 2, 3, 8), jnp.float32)
    k = v = jax.ShapeDtypeStruct((2, L, 2, 8), jnp.float32)
    assert jax.eval_shape(lambda q, k, v: attention(q, k, v, Mask()), q, k, v).shape == q.shape
