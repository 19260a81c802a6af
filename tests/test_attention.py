"""The mask equals plain loops over booleans. What implementations make of it: `test_conformance.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import equations, product_flops

import llm_jax.ops.attention
import llm_jax.ops.kernels
from llm_jax.ops.attention import IMPLEMENTATIONS, LONG, Declined, Dropout, Mask, Sparse, attention, candidates, heard

SHORT = 9


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


def test_random_blocks_are_as_many_as_were_asked_for_and_stay_where_they_are():
    """Rows of a longer text begin as those of a shorter one, or a cache would change what was seen."""
    sparse = Sparse("bigbird", local=1, first=0, random=3)
    view = sparse.view(64)
    assert (view[:40, :40] == sparse.view(40)).all()
    assert (view[4:].sum(1) == 4).all()
    assert not np.triu(view, 1).any()


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
    """A mask of two rows, L, S, and some of the queries and keys."""
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
        window=draw(st.none() | st.integers(1, 7)),
        sinks=draw(st.integers(0, 2)),
        sparse=draw(st.none() | st.sampled_from([Sparse("fixed", 2, stride=2), Sparse("bigbird", 1, 1, random=1)])),
        segments=segments,
        prefix=None if prefix is None else jnp.array(prefix).reshape(2, S),
        kv_length=kv_length,
    )
    some = [draw(st.permutations(range(size)))[: draw(st.integers(1, size))] for size in (L, S)]
    return mask, L, S, *some


@settings(max_examples=40)
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


def test_an_implementation_that_declines_says_why():
    q = jnp.ones((1, SHORT, 2, 3, 8))
    with pytest.raises(Declined, match=f"flash takes a multiple of 128 tokens, got {SHORT}"):
        attention(q, q[:, :, :, 0], q[:, :, :, 0], Mask(), implementation="flash")


@pytest.mark.parametrize("backend", ["cpu", "tpu", "gpu", "another"])
def test_it_is_said_once_who_attends_and_why_others_declined(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm_jax.ops.attention, "platform", lambda: backend)
    monkeypatch.setattr(llm_jax.ops.kernels, "platform", lambda: backend)
    q, k = (jax.ShapeDtypeStruct((1, 8200, *heads, 8), jnp.float32) for heads in ((2, 1), (2,)))
    said = []
    with heard(said.append):
        for _ in range(2):
            jax.eval_shape(lambda q, k, v: attention(q, k, v, Mask(window=99, sinks=4)), q, k, k)
    reason = {"tpu": "; flash takes a multiple of 128 tokens, got 8200", "gpu": "; cudnn has no sinks"}.get(backend, "")
    assert said == [f"attention over 8,200 tokens: chunked{reason}"]


@pytest.mark.parametrize("backend", ["cpu", "tpu", "gpu", "another"])
@pytest.mark.parametrize("L", [LONG, LONG + 1, 8200])
def test_long_rows_never_hold_all_their_scores(L: int, backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm_jax.ops.attention, "platform", lambda: backend)
    assert candidates(L)[-1] == "chunked"  # which declines nothing
    assert candidates(LONG - 1)[-1] == "reference"


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
    q, k, v, g = (
        jax.random.normal(key, (1, length, *heads, 8))
        for key, length, heads in zip(
            jax.random.split(jax.random.key(0), 4), (L, S, S, L), ((1, 2), (1,), (1,), (1, 2)), strict=True
        )
    )

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> list[list[jax.Array]]:
        found = []
        for name in ("reference", "chunked"):
            out, pull = jax.vjp(lambda *x, name=name: attention(*x, mask, implementation=name), q, k, v)
            found.append([out, *pull(g)])
        return found

    for exact, found in zip(*both(q, k, v), strict=True):
        np.testing.assert_allclose(found, exact, atol=2e-5 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_dropout_zeroes_its_share_of_the_pattern_and_scales_the_rest(name: str):
    """Where all scores are alike and values tell keys apart, what comes out is the pattern."""
    S, rate = 256, 0.25
    q, k, v = jnp.zeros((1, S, 1, 2, S)), jnp.zeros((1, S, 1, S)), jnp.eye(S)[None, :, None]
    drop = Dropout(jax.random.key(0), rate)
    found = attention(q, k, v, Mask(causal=False), implementation=name, dropout=drop)[0, :, 0]
    dropped = np.asarray(found) == 0
    np.testing.assert_allclose(found, np.where(dropped, 0, 1 / (S * (1 - rate))), rtol=1e-5)
    np.testing.assert_allclose(dropped.mean((0, 2)), rate, atol=0.01)
    np.testing.assert_allclose(found.sum(-1).mean(), 1, atol=0.01)  # in the mean nothing changes
    places = [dropped[:128, 0], dropped[128:, 0], dropped[:128, 1]]
    assert len({place.tobytes() for place in places}) == 3, "two blocks, or two heads, share their noise"


@pytest.mark.parametrize("name", sorted(IMPLEMENTATIONS.keys() - {"reference", "chunked"}))
def test_what_holds_no_pattern_declines_dropout(name: str):
    q = jnp.zeros((1, 128, 1, 1, 64))
    with pytest.raises(Declined, match=f"{name} never holds the pattern .*; use model.attention.implementation=refer"):
        attention(q, q[:, :, 0], q[:, :, 0], Mask(), implementation=name, dropout=Dropout(jax.random.key(0), 0.1))


def test_an_unknown_implementation_is_answered_with_the_known_ones():
    q = jnp.ones((1, SHORT, 2, 3, 8))
    with pytest.raises(ValueError, match="unknown attention 'flesh'; known: reference, "):
        attention(q, q[:, :, :, 0], q[:, :, :, 0], Mask(), implementation="flesh")


def test_many_blocks_lose_no_digits_of_the_gradients_of_keys_and_values():
    """In bfloat16 a sum over 16 blocks, kept in bfloat16, is three times as far off."""
    L, H = 2048, 16
    q, k, v, g = (jax.random.normal(key, (1, L, 1, 1, H)) for key in jax.random.split(jax.random.key(0), 4))
    inputs = [x.astype(jnp.bfloat16) for x in (q, k[..., 0, :], v[..., 0, :], g)]

    def gradients(name: str, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> list[jax.Array]:
        pull = jax.vjp(lambda k, v: attention(q, k, v, Mask(causal=False), implementation=name), k, v)[1]
        return [x.astype(jnp.float32) for x in pull(g)]

    exact = gradients("reference", *(x.astype(jnp.float32) for x in inputs))
    off = {
        name: [float(jnp.square(x - y).mean()) ** 0.5 for x, y in zip(gradients(name, *inputs), exact, strict=True)]
        for name in ("reference", "chunked")
    }
    assert np.less(off["chunked"], 1.5 * np.array(off["reference"])).all(), off


@pytest.mark.parametrize("L", [SHORT, 1024, 1025])
def test_the_default_accepts_every_length(L: int):
    q = jax.ShapeDtypeStruct((2, L, 2, 3, 8), jnp.float32)
    k = v = jax.ShapeDtypeStruct((2, L, 2, 8), jnp.float32)
    assert jax.eval_shape(lambda q, k, v: attention(q, k, v, Mask()), q, k, v).shape == q.shape


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
