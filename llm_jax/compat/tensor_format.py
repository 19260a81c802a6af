"""How one of their tensors holds ours, in a line of letters.

The letters are the alphabet of `docs/shapes.md`. Parentheses merge several axes into one; brackets concatenate several
of our leaves along an axis:

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
class TensorFormat:
    """The format `text`, for axes of these `sizes`; `ours` are the letters of each of our leaves in it."""

    text: str
    ours: tuple[str, ...]
    sizes: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of their tensor."""
        axes = re.findall(r"\(.*?\)|\[.*?\]|\w", self.text)
        beside = [self._size(re.sub(r"\[.*\]", "", axis)) for axis in axes]
        inside = sum(map(self._size, self._parsed[1]))
        return tuple(size * inside if "[" in axis else size for axis, size in zip(axes, beside, strict=True))

    def split(self, theirs: np.ndarray) -> list[np.ndarray]:
        """Return our leaves, as views of their tensor."""
        before, slices, after = self._parsed
        cuts = np.cumsum([self._size(letters) for letters in slices])
        whole = theirs.reshape(*self._shape(before), cuts[-1], *self._shape(after))
        return [
            _transposed(piece.reshape(self._shape(before + letters + after)), before + letters + after, ours)
            for piece, letters, ours in zip(np.split(whole, cuts[:-1], len(before)), slices, self.ours, strict=True)
        ]

    def join(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """Return their tensor of our leaves: the inverse of `split`."""
        before, slices, after = self._parsed
        pieces = [
            _transposed(leaf, ours, before + letters + after).reshape(*self._shape(before), -1, *self._shape(after))
            for leaf, letters, ours in zip(leaves, slices, self.ours, strict=True)
        ]
        return np.concatenate(pieces, len(before)).reshape(self.shape)

    @property
    def _parsed(self) -> tuple[str, list[str], str]:
        """The letters before the bracket, of each slice in it, and after it; without a bracket, one empty slice."""
        before, _, rest = re.sub(r"[()]", "", self.text).partition("[")
        slices, _, after = rest.partition("]")
        return before, slices.split("|"), after

    def _shape(self, letters: str) -> list[int]:
        return [self.sizes[letter] for letter in letters]

    def _size(self, letters: str) -> int:
        return math.prod(self._shape(re.sub(r"[()]", "", letters)))


def _transposed(x: np.ndarray, axes: str, wanted: str) -> np.ndarray:
    """Return `x`, whose axes are these letters, with its axes in the wanted order."""
    return x.transpose([axes.index(letter) for letter in wanted])
