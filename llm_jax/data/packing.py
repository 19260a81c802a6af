"""Which tokens are in which row: whole documents packed together, or windows of one long stream.

This is arithmetic on lengths; no token is read. A row consists of spans [start, stop) of the token stream, which is
the documents of a split one after the other.
"""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True)
class Packing:
    """The rows of an epoch. Row r consists of the spans `rows[r]` up to `rows[r + 1]`.

    Attributes:
      rows: the first span of each row, and the number of spans.
      starts: the first token of every span, by its index in the stream.
      stops: the index after its last token.
      slack: by how many tokens all spans may be shifted right together.
    """

    rows: Int64[np.ndarray, "n_rows+1"]
    starts: Int64[np.ndarray, "n_spans"]
    stops: Int64[np.ndarray, "n_spans"]
    slack: int = 0

    @property
    def n_rows(self) -> int:
        """The number of rows in an epoch."""
        return len(self.rows) - 1

    @functools.cached_property
    def sizes(self) -> Int64[np.ndarray, " n_rows"]:
        """The number of tokens in each row."""
        before = np.append(0, np.cumsum(self.stops - self.starts))
        return np.diff(before[self.rows])

    def spans(self, row: int, shift: int = 0) -> list[tuple[int, int]]:
        """Return the (start, stop) of every span in `row`, shifted by `shift` tokens."""
        spans = slice(self.rows[row], self.rows[row + 1])
        starts, stops = self.starts[spans] + shift, self.stops[spans] + shift
        return list(zip(starts.tolist(), stops.tolist(), strict=True))


def windows(n_targets: int, seq_len: int, *, partial: bool = False) -> Packing:
    """Return adjacent windows of `seq_len` targets.

    `partial` adds the shorter window at the end, if there is one; otherwise its tokens are slack.
    """
    n_rows, slack = divmod(n_targets, seq_len)
    if partial and slack:
        n_rows, slack = n_rows + 1, 0
    starts = np.arange(n_rows) * seq_len
    return Packing(np.arange(n_rows + 1), starts, np.minimum(starts + seq_len, n_targets), slack)


def pack(lengths: Int64[np.ndarray, "n_documents"], seq_len: int) -> Packing:
    """Pack documents of `lengths` tokens into rows of at most `seq_len`: best fit decreasing (Johnson, 1973).

    Each document, the longest first, goes into the fullest row with room for it, or into a new row. Only a document
    longer than `seq_len` is cut, into full rows and a rest that is packed like a document.
    """
    starts, sizes = _pieces(lengths, seq_len)
    row_of = np.empty_like(sizes)
    row_of[np.argsort(-sizes, kind="stable")] = _best_fit(np.bincount(sizes, minlength=seq_len + 1), seq_len)
    by_row = np.argsort(row_of, kind="stable")
    starts, sizes = starts[by_row], sizes[by_row]
    return Packing(np.append(0, np.cumsum(np.bincount(row_of))), starts, starts + sizes)


def _pieces(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the pieces of every document start in the stream, and their sizes, none above `seq_len`."""
    counts = -(-lengths // seq_len)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # within its document
    start = number * seq_len
    sizes = np.minimum(np.repeat(lengths, counts) - start, seq_len)
    return np.repeat(np.cumsum(lengths) - lengths, counts) + start, sizes


def _best_fit(counts: np.ndarray, seq_len: int) -> np.ndarray:
    """Return the row of every piece, the largest pieces first, given `counts[size]` pieces of each size.

    Pieces of one size are packed together: the row that takes one is then the fullest with room for the next, so it
    takes as many as fit. The work grows with the number of sizes, not of pieces.
    """
    rows: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by space left, the rows that have it
    spaces = 0  # bit s is set where rows[s] is not empty
    n_rows, row_of = 0, [np.zeros(0, np.int64)]
    for size in range(seq_len, 0, -1):
        left = int(counts[size])
        while left:
            fitting = spaces >> size
            space = size + (fitting & -fitting).bit_length() - 1 if fitting else seq_len
            each = space // size
            wanted = -(-left // each)
            if not fitting:
                rows[space] = list(range(n_rows, n_rows + wanted))
                n_rows += wanted
            taken = rows[space][-wanted:]
            del rows[space][-wanted:]
            row_of.append(np.repeat(taken, each)[:left])
            in_last = len(row_of[-1]) - each * (len(taken) - 1)
            rows[space - each * size] += taken[:-1]
            rows[space - in_last * size] += taken[-1:]
            for changed in (space, space - each * size, space - in_last * size):
                spaces = spaces | 1 << changed if rows[changed] else spaces & ~(1 << changed)
            left -= len(row_of[-1])
    return np.concatenate(row_of)
