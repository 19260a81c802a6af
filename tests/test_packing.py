"""Rows hold every token once: packed one after the other, or in windows."""

import bisect
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np

from llm_jax.data.packing import Packing, Spans, pack, windows

LENGTHS = st.lists(st.integers(1, 40), max_size=60)
SEQ_LENS = st.integers(1, 20)


def rows(packing: Packing, shift: int = 0) -> list[list[tuple[int, int]]]:
    found: list[list[tuple[int, int]]] = [[] for _ in range(packing.n_rows)]
    spans = packing.spans(np.arange(packing.n_rows), shift)
    for row, start, stop in zip(*(x.tolist() for x in (spans.rows, spans.starts, spans.stops)), strict=True):
        found[row].append((start, stop))
    return found


def best_fit(lengths: list[int], seq_len: int) -> list[list[int]]:
    """Best fit, the longest first, piece by piece: the sizes in every row."""
    pieces = [min(seq_len, length - start) for length in lengths for start in range(0, length, seq_len)]
    rows: list[list[int]] = []
    for piece in sorted(pieces, reverse=True):
        room = [row for row in rows if seq_len - sum(row) >= piece]
        fullest = max(room, key=sum, default=None)
        if fullest is None:
            rows.append([piece])
        else:
            fullest.append(piece)
    return rows


@hypothesis.given(LENGTHS, SEQ_LENS)
def test_packing_is_best_fit_with_the_longest_first(lengths: list[int], seq_len: int):
    packed = rows(pack(np.array(lengths, np.int64), seq_len))
    filled = [sum(stop - start for start, stop in row) for row in packed]
    assert sorted(filled) == sorted(map(sum, best_fit(lengths, seq_len)))  # which of two equal rows does not matter


@hypothesis.given(LENGTHS, SEQ_LENS)
def test_packing_cuts_no_document_that_fits_a_row_and_loses_no_token(lengths: list[int], seq_len: int):
    offsets = np.cumsum([0, *lengths]).tolist()
    spans = sorted(span for row in rows(pack(np.array(lengths, np.int64), seq_len)) for span in row)
    assert [token for start, stop in spans for token in range(start, stop)] == list(range(offsets[-1]))
    for start, stop in spans:
        document = bisect.bisect_right(offsets, start) - 1
        assert stop <= offsets[document + 1]
        assert (start - offsets[document]) % seq_len == 0


def test_packing_fills_rows_of_prose_almost_wholly():
    lengths = np.random.default_rng(0).geometric(1 / 300, size=20_000)
    packing = pack(lengths, 1024)
    assert lengths.sum() / (packing.n_rows * 1024) > 0.999


@hypothesis.given(st.integers(0, 200), SEQ_LENS)
def test_windows_hold_every_target_once(n_targets: int, seq_len: int):
    whole, all_of_it = windows(n_targets, seq_len), windows(n_targets, seq_len, partial=True)
    targets = [target for row in rows(all_of_it) for start, stop in row for target in range(start, stop)]
    assert targets == list(range(n_targets))
    assert rows(whole) == [[(start, stop)] for row in rows(all_of_it) for start, stop in row if stop - start == seq_len]


@hypothesis.given(st.integers(0, 200), SEQ_LENS)
def test_windows_shifted_by_all_their_slack_end_with_the_last_target(n_targets: int, seq_len: int):
    packing = windows(n_targets, seq_len)
    assert 0 <= packing.slack < seq_len
    if packing.n_rows:
        ((_, stop),) = rows(packing, packing.slack)[-1]
        assert stop == n_targets


EDGES = st.lists(st.integers(0, 30), max_size=8).map(lambda inside: np.array(sorted([0, *inside, 30]), np.int64))


@hypothesis.given(EDGES, st.lists(st.tuples(st.integers(0, 29), st.integers(1, 30)), max_size=6))
def test_spans_are_cut_at_every_edge_inside_and_nowhere_else(edges: np.ndarray, given: list[tuple[int, int]]):
    """An edge that comes twice, as where a document is empty, cuts once."""
    starts = np.array([start for start, _ in given], np.int64)
    stops = np.minimum(starts + [size for _, size in given], 30).astype(np.int64)
    cut = Spans(np.arange(len(given)), starts, stops).cut(edges)
    expected = []
    for row, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        bounds = [start, *sorted({edge for edge in edges.tolist() if start < edge < stop}), stop]
        expected += [(row, *pair) for pair in itertools.pairwise(bounds)]
    assert list(zip(cut.rows.tolist(), cut.starts.tolist(), cut.stops.tolist(), strict=True)) == expected
