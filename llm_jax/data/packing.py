"""Which tokens stand in which row: whole documents packed into rows, or windows of one long stream.

Index arithmetic on the token stream, no tokens. A row is a list of spans [start, stop) of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Rows of spans in compressed form: row `r` holds spans `rows[r]` to `rows[r + 1]`.

    `rows`: int64 [n_rows + 1]; `documents`, `starts`, `lengths`: int64 [n_spans], where `starts` counts from the
    beginning of the document.
    """

    rows: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.rows) - 1


@dataclass(frozen=True)
class Windows:
    """Windows of `seq_len` inputs, side by side; `slack` tokens at the end are in no window.

    A window reads one token more than it has inputs: the target of its last.
    """

    n_rows: int
    seq_len: int
    slack: int


def pack(lengths: np.ndarray, seq_len: int) -> Packing:
    """Best-fit-decreasing: the longest document first, each into the fullest row that still has room.

    Only documents longer than `seq_len` are cut, into pieces of `seq_len` and a rest. Documents of one length are
    placed together: where the fullest fitting row has space for q of them, best fit would put all q there.
    """
    documents, starts, sizes = _cut(np.asarray(lengths, np.int64), seq_len)
    order = np.argsort(-sizes, kind="stable")
    row_of = np.empty(len(sizes), np.int64)
    row_of[order] = _best_fit(np.bincount(sizes, minlength=seq_len + 1), seq_len)
    by_row = np.argsort(row_of, kind="stable")
    rows = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    return Packing(rows, documents[by_row], starts[by_row], sizes[by_row])


def windows(n_tokens: int, seq_len: int) -> Windows:
    """As many whole windows of `seq_len` inputs and their targets as `n_tokens` hold."""
    n_rows, slack = divmod(max(n_tokens - 1, 0), seq_len)
    return Windows(n_rows, seq_len, slack)


def _cut(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of at most `seq_len`: their document, start in the document and size."""
    counts = -(-lengths // seq_len)
    documents = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    starts = (np.arange(len(documents)) - first[documents]) * seq_len
    return documents, starts, np.minimum(lengths[documents] - starts, seq_len)


def _best_fit(counts: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of every piece, pieces in decreasing size; `counts[size]` pieces have that size."""
    open_rows: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by the space they have left
    spaces, n_rows, placed = 0, 0, []  # bit s of `spaces`: some row has s left
    for size in range(seq_len, 0, -1):
        left = int(counts[size])
        while left:
            fitting = spaces >> size
            space = size + (fitting & -fitting).bit_length() - 1 if fitting else seq_len
            each = space // size
            wanted = -(-left // each)
            if fitting:
                taken, open_rows[space] = open_rows[space][:wanted], open_rows[space][wanted:]
                spaces ^= 0 if open_rows[space] else 1 << space
            else:
                taken = list(range(n_rows, n_rows + wanted))
                n_rows += wanted
            placed.append(np.repeat(taken, each)[:left])
            used = np.full(len(taken), each)
            used[-1] = len(placed[-1]) - each * (len(taken) - 1)
            for row, many in zip(taken, used.tolist(), strict=True):
                rest = space - many * size
                open_rows[rest].append(row)
                spaces |= 1 << rest
            left -= len(placed[-1])
    return np.concatenate(placed) if placed else np.zeros(0, np.int64)
