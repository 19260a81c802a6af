"""Several sources in one run: their shards as one store, and which row comes from which source.

A mixture is arithmetic, like a batch: how many of the first n rows a source has is a function of n and the weights.
So the step of a run is its position in every source, and there is no state to save.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from llm_jax.data.config import DataConfig, Source
from llm_jax.data.shards import SPLITS, Shards, TokenStore, open_shards
from llm_jax.data.tokenizer import Tokenizer


class Mixture:
    """The shards of several sources, in the ids of one tokenizer. Raise `ValueError` if their tokenizers differ."""

    def __init__(self, sources: Sequence[Source], shards: Sequence[Shards]) -> None:
        self.sources, self.shards = tuple(sources), tuple(shards)
        first = shards[0]
        for other in shards[1:]:
            if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise ValueError(
                    f"{other.folder} has the tokens of {other.tokenizer.name}, and {first.folder} those of "
                    f"{first.tokenizer.name}; prepare all sources with the tokenizer "
                    f"{first.folder}/tokenizer (--tokenizer)"
                )
        self._splits = {name: TokenStore.joined([s.split(name) for s in shards], sources) for name in SPLITS}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which all sources share."""
        return self.shards[0].tokenizer

    @property
    def folders(self) -> list[Path]:
        """The folder of each source's shards."""
        return [shards.folder for shards in self.shards]

    @property
    def source(self) -> str:
        """Where the text came from."""
        return ", ".join(shards.source for shards in self.shards)

    def split(self, name: Literal["train", "heldout"]) -> TokenStore:
        """Return a split of all sources, as one store."""
        return self._splits[name]


def open_folders(config: DataConfig, folders: Sequence[str | Path]) -> Shards | Mixture:
    """Open the shards of each source of `config`. Raise `ValueError` like `open_shards`, and like `Mixture`."""
    shards = [open_shards(folder) for folder in folders]
    return shards[0] if len(shards) == 1 else Mixture(config.sources, shards)


@dataclass(frozen=True)
class Deal:
    """An endless stream of rows, dealt to sources by their shares, which add up to 1.

    The first source takes a row whenever its count, rounded, grows; the second does so with the remaining rows, and so
    on. Of the first n rows the i-th source has n times its share, within i / 2 rows. All is exact integer arithmetic:
    no n is too large.
    """

    shares: tuple[Fraction, ...]

    @functools.cached_property
    def _ratios(self) -> list[Fraction]:
        """The share that each source takes of the rows that the sources before it leave."""
        return [share / sum(self.shares[number:]) for number, share in enumerate(self.shares)]

    def before(self, row: int) -> list[int]:
        """Return how many of the rows 0 to `row` - 1 each source has; they add up to `row`."""
        counts = []
        for ratio in self._ratios:
            counts.append(_rounded(ratio, row))
            row -= counts[-1]
        return counts

    def source(self, rows: Int64[np.ndarray, "n"]) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Return the source of each of `rows`, and its index among the rows of that source."""
        sources, numbers = np.full(len(rows), -1), np.zeros(len(rows), np.int64)
        left = rows.astype(object)  # Python's integers, which no product overflows
        for source, ratio in enumerate(self._ratios):
            counts = _rounded(ratio, left)
            here = (sources < 0) & (_rounded(ratio, left + 1) > counts)
            sources[here], numbers[here] = source, counts[here]
            left = left - counts
        return sources, numbers


def _rounded(ratio: Fraction, row: Any) -> Any:
    """Return `ratio * row` rounded to the nearest whole number, halves up; `row` may be an array of integers."""
    return (2 * row * ratio.numerator + ratio.denominator) // (2 * ratio.denominator)
