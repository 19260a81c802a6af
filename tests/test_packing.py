"""Rows hold every token once: packed one after the other, or in windows."""

import bisect

import hypothesis
import hypothesis.strategies as st
import numpy as np

from llm_jax.data.packing import Packing, pack, windows

LENGTHS = st.lists(st.integers(1, 40), max_size=60)
SEQ_LENS = st.integers(1, 20)


def rows(packing: Packing) -> list[list[tuple[int, int]]]:
    return [packing.spans(row) for row in range(packing.n_rows)]


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
        ((_, stop),) = packing.spans(packing.n_rows - 1, packing.slack)
        assert stop == n_targets
