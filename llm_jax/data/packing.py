"""Which tokens are in which row: whole documents packed together, or windows of one long stream.

This is arithmetic on lengths; no token is read. A row consists of spans [start, stop) of the token stream, which is
the documents of a split one after the other.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

PADDING = -1  # the start of a span without tokens
Numbers = Int64[np.ndarray, "n"]


@dataclass(frozen=True)
class Spans:
    """Spans of the token stream that fill rows: span i, the tokens [starts[i], stops[i]), is in row `rows[i]`.

    They are sorted by row, and in a row they follow each other. None is empty.
    """

    rows: Numbers
    starts: Numbers
    stops: Numbers

    @classmethod
    def joined(cls, several: Sequence["Spans"]) -> "Spans":
        """Return the spans of `several` sorted by row; those of one row in the order of `several`."""
        if len(several) == 1:
            return several[0]
        rows, starts, stops = (
            np.concatenate([getattr(one, name) for one in several] or [np.zeros(0, np.int64)])
            for name in ("rows", "starts", "stops")
        )
        order = np.argsort(rows, kind="stable")
        return cls(rows[order], starts[order], stops[order])

    @property
    def sizes(self) -> Numbers:
        """The number of tokens in each span."""
        return self.stops - self.starts

    def cut(self, edges: Int64[np.ndarray, "n_edges"]) -> "Spans":
        """Return the spans cut wherever one of `edges` lies inside one; they ascend from 0 to the end of the stream."""
        first = np.searchsorted(edges, self.starts, side="right")
        inside = np.searchsorted(edges, self.stops) - first
        if not inside.any():
            return self
        of, pieces = np.repeat(np.arange(len(inside)), inside + 1), ranges(first - 1, inside + 1)
        starts = np.maximum(self.starts[of], edges[pieces])
        stops = np.minimum(self.stops[of], edges[pieces + 1])
        whole = starts < stops  # of equal edges, which are those of an empty document
        return Spans(self.rows[of][whole], starts[whole], stops[whole])


class RowLayout:
    """Where spans lie in `n_rows` rows of `seq_len` tokens: in their rows from the left, and padding after them.

    The rows are one vector here, one after the other.

    Attributes:
      first: the index of the first token of each span.
      last: the index of the last.
      padding: the index of every position without a token.
    """

    def __init__(self, spans: Spans, n_rows: int, seq_len: int) -> None:
        room = seq_len - np.bincount(spans.rows, spans.sizes, n_rows).astype(np.int64)
        gaps = Spans(np.arange(n_rows), np.full(n_rows, PADDING), PADDING + room)  # one at the end of each row
        both = Spans.joined([spans, gaps])
        self._sizes, self._filled = both.sizes, both.starts != PADDING
        self._begin = np.cumsum(self._sizes) - self._sizes
        self.first = self._begin[self._filled]
        self.last = self.first + spans.sizes - 1
        self.padding = ranges(self._begin[~self._filled], self._sizes[~self._filled])

    def fill(self, tokens: Int32[np.ndarray, "n_tokens"]) -> Int32[np.ndarray, "size"]:
        """Return the tokens of all spans where they belong, 0 in the padding."""
        if not len(self.padding):
            return tokens
        filled = np.zeros(len(tokens) + len(self.padding), np.int32)
        filled[np.repeat(self._filled, self._sizes)] = tokens
        return filled

    def spread(self, values: Numbers, padding: int) -> Int32[np.ndarray, "size"]:
        """Return the value of each span at all of its tokens."""
        found = np.full(len(self._filled), padding, np.int32)
        found[self._filled] = values
        return np.repeat(found, self._sizes)

    def positions(self) -> Int32[np.ndarray, "size"]:
        """Return the distance of each token from the first of its span; padding counts from its own start."""
        begin = np.repeat(self._begin.astype(np.int32), self._sizes)
        return np.arange(len(begin), dtype=np.int32) - begin


def ranges(starts: Numbers, sizes: Numbers) -> Int64[np.ndarray, "total"]:
    """Return `sizes[i]` numbers that count up from `starts[i]`, for one i after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(sizes.sum())


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

    def spans(self, rows: Numbers, shifts: Numbers | int = 0, into: Numbers | None = None) -> Spans:
        """Return the spans of `rows`, shifted right by `shifts` tokens, as the rows `into` (by default 0, 1, ...)."""
        first, count = self.rows[rows], self.rows[rows + 1] - self.rows[rows]
        number = np.repeat(np.arange(len(rows)), count)
        spans, shift = ranges(first, count), np.broadcast_to(shifts, rows.shape)[number]
        return Spans(number if into is None else into[number], self.starts[spans] + shift, self.stops[spans] + shift)


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
