"""How one of their tensors holds ours, in a line of letters.

The letters are the alphabet of `docs/shapes.md`. Parentheses make one axis of several; brackets put several of our
leaves one behind the other along an axis:

    VD              as ours
    (KGH)D          the heads in one axis: 32 heads of 64 are 2048 rows
    [F|F]D          gate, then up
    (K[GH|H|H])D    for each head its queries, its key, its value
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """The notation `text`, for axes of these `sizes`; `ours` are the letters of each leaf in it."""

    text: str
    ours: tuple[str, ...]
    sizes: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of their tensor."""
        axes = re.findall(r"\(.*?\)|\[.*?\]|\w", self.text)
        beside = [self._size(re.sub(r"\[.*\]", "", axis)) for axis in axes]
        inside = sum(map(self._size, self._parsed[1]))
        return tuple(size * inside if "[" in axis else size for axis, size in zip(axes, beside, strict=True))

    def split(self, theirs: np.ndarray) -> list[np.ndarray]:
        """Our leaves, as views of their tensor."""
        before, parts, after = self._parsed
        cuts = np.cumsum([self._size(part) for part in parts])
        whole = theirs.reshape(*self._shape(before), cuts[-1], *self._shape(after))
        return [
            _turned(piece.reshape(self._shape(before + part + after)), before + part + after, ours)
            for piece, part, ours in zip(np.split(whole, cuts[:-1], len(before)), parts, self.ours, strict=True)
        ]

    def join(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor of our leaves: the inverse of `split`."""
        before, parts, after = self._parsed
        pieces = [
            _turned(leaf, ours, before + part + after).reshape(*self._shape(before), -1, *self._shape(after))
            for leaf, part, ours in zip(leaves, parts, self.ours, strict=True)
        ]
        return np.concatenate(pieces, len(before)).reshape(self.shape)

    @property
    def _parsed(self) -> tuple[str, list[str], str]:
        """Letters before the bracket, of each part in it, and after it; without one, an empty part ends the letters."""
        before, _, rest = re.sub(r"[()]", "", self.text).partition("[")
        parts, _, after = rest.partition("]")
        return before, parts.split("|"), after

    def _shape(self, letters: str) -> list[int]:
        return [self.sizes[letter] for letter in letters]

    def _size(self, letters: str) -> int:
        return math.prod(self._shape(re.sub(r"[()]", "", letters)))


def _turned(x: np.ndarray, axes: str, wanted: str) -> np.ndarray:
    """`x`, whose axes are these letters, with its axes in the order wanted."""
    return x.transpose([axes.index(letter) for letter in wanted])
