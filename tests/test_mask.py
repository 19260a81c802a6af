"""The mask equals plain loops over booleans."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.ops.mask import Mask, Sparse


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
    with pytest.raises(ValueError, match="2 queries and 3 keys need kv_length for the positions of the queries"):
        Mask().materialise(2, 3)


def test_segments_are_of_all_tokens():
    cached = Mask(segments=jnp.array([[1, 1, 2, 2]]), kv_length=jnp.array([4]))
    with pytest.raises(ValueError, match="segments of 4 tokens don't fit 2 queries and 4 keys"):
        cached.materialise(2, 4)


def test_sinks_are_seen_however_far():
    assert literal(Mask(window=2, sinks=1), 4) == ["1000", "1100", "1110", "1011"]


def test_every_document_has_sinks_of_its_own():
    segments = jnp.array([[1, 1, 1, 2, 2, 2]])
    rows = ["100000", "110000", "111000", "000100", "000110", "000111"]
    assert literal(Mask(segments=segments, window=2, sinks=1), 6) == rows


def test_a_prefix_is_seen_from_before_it_too():
    assert literal(Mask(prefix=jnp.array([[True, True, False, False]])), 4) == ["1100", "1100", "1110", "1111"]


def test_a_prefix_is_seen_by_its_own_document_only():
    both = Mask(prefix=jnp.array([[True, True, False, True, True]]), segments=jnp.array([[1, 1, 1, 2, 2]]))
    assert literal(both, 5) == ["11000", "11000", "11100", "00011", "00011"]


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        (Sparse("strided", 1, local=1, stride=3), ["100000", "010000", "001000", "100100", "010010", "001001"]),
        (Sparse("fixed", 1, stride=3), ["100000", "110000", "111000", "001100", "001110", "001111"]),
        (
            Sparse("bigbird", 1, local=2, first=1, random=0),
            ["100000", "110000", "111000", "101100", "100110", "100011"],
        ),
        (Sparse("strided", 2, local=1, stride=3), ["100000", "110000", "001000", "001100", "000010", "000011"]),
    ],
    ids=lambda value: f"{value.pattern} by {value.block}" if isinstance(value, Sparse) else "",
)
def test_sparse_patterns_are_those_of_the_papers(sparse: Sparse, expected: list[str]):
    assert literal(Mask(sparse=sparse), 6) == expected


def seen(mask: Mask, L: int, S: int, row: int, query: int, key: int) -> bool:
    """May `query` see `key`? One rule a line."""
    position = query if mask.kv_length is None else int(mask.kv_length[row]) - L + query
    ahead = key > position
    if mask.causal and ahead and not (mask.prefix is not None and mask.prefix[row, key]):
        return False
    documents = None if mask.segments is None else mask.segments[row].tolist()
    begin = 0 if documents is None else next(i for i in range(S) if len({*documents[i : key + 1]}) == 1)
    if mask.window is not None and position - key >= mask.window and key - begin >= mask.sinks:
        return False
    if mask.sparse is not None and not mask.sparse.view(S)[position // mask.sparse.block, key // mask.sparse.block]:
        return False
    if mask.kv_length is not None and key >= int(mask.kv_length[row]):
        return False
    return documents is None or documents[query] == documents[key]


@st.composite
def masks(draw: st.DrawFn) -> tuple[Mask, int, int, list[int], list[int]]:
    """A mask of two rows, L, S, and all queries and keys but one each, in any order: of few shapes."""
    L = 5
    segments, kv_length, S = None, None, L
    if draw(st.booleans()):
        S = draw(st.sampled_from([L, L + 3]))
        kv_length = jnp.array(draw(st.lists(st.integers(L, S), min_size=2, max_size=2)), jnp.int32)
    elif draw(st.booleans()):
        row = st.lists(st.integers(0, 2), min_size=L, max_size=L)
        segments = jnp.array([draw(row), draw(row)], jnp.int32)
    prefix = draw(st.none() | st.lists(st.booleans(), min_size=2 * S, max_size=2 * S))
    mask = Mask(
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([2, 1, 3, 7, None])),
        sinks=draw(st.sampled_from([1, 2, 0])),
        sparse=draw(st.none() | st.sampled_from([Sparse("fixed", 2, stride=2), Sparse("bigbird", 1, 1, random=1)])),
        segments=segments,
        prefix=None if prefix is None else jnp.array(prefix).reshape(2, S),
        kv_length=kv_length,
    )
    queries, keys = (draw(st.permutations(range(size)))[1:] for size in (L, S))
    return mask, L, S, queries, keys


@settings(max_examples=80)
@given(masks())
def test_a_mask_equals_its_rules_one_by_one(case: tuple[Mask, int, int, list[int], list[int]]):
    mask, L, S, queries, keys = case
    expected = [[[seen(mask, L, S, row, query, key) for key in keys] for query in queries] for row in range(2)]
    found = mask.materialise(L, S, jnp.array(queries), jnp.array(keys))
    assert np.broadcast_to(found, (2, len(queries), len(keys))).tolist() == expected


@settings(max_examples=60)
@given(masks(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3]))
def test_a_block_that_is_out_of_view_holds_nothing_that_is_seen(case: tuple, rows: int, columns: int):
    mask, L, S, _, _ = case
    seen = np.asarray(mask.materialise(L, S)).any(0)
    for i, j in np.argwhere(~mask.view(L, S, rows, columns)):
        assert not seen[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].any()
