"""Batches, a pure function of (seed, step, process); and every held-out token once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import flax.struct
import grain
import numpy as np

from llm_jax.data.packing import Packing, Windows, pack, windows
from llm_jax.data.shards import TokenStore

IGNORE = -1


@dataclass(frozen=True)
class DataConfig:
    """What is read, how it is tokenized and split, and how it is cut into rows.

    `batch_size` counts the rows of a step over all processes. `epochs=None` repeats as long as the run lasts.
    """

    uri: str = "builtin:python"
    tokenizer: str = "train:4096"
    separator: str | None = None
    end_of_text: bool = True
    heldout: float = 0.05
    heldout_by: str = "hash"
    packing: str = "documents"
    seq_len: int = 256
    batch_size: int = 16
    epochs: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.packing not in ("documents", "windows"):
            raise ValueError(f"packing={self.packing!r} is unknown; use 'documents' or 'windows'")
        if self.heldout_by not in ("hash", "tail"):
            raise ValueError(f"heldout_by={self.heldout_by!r} is unknown; use 'hash' or 'tail'")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout={self.heldout} is not a fraction; use a number from 0 to below 1, as 0.05")
        for name in ("seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is too small; use 1 or more")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"epochs={self.epochs} allows no step; use a positive number, or None for no limit")


@flax.struct.dataclass
class Batch:
    """Rows of tokens, int32 [B, L] each.

    `targets` is the next token, IGNORE where there is no loss. `segments` counts the documents of a row from 1, and
    is 0 in the padding; `positions` restarts with each document; both are None for a stream without documents.
    `documents` is the document of each target, -1 where there is none; only evaluation has it.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray | None
    positions: np.ndarray | None
    documents: np.ndarray | None = None


class Loader:
    """The training batches of a store, for one of `processes` processes."""

    def __init__(self, store: TokenStore, config: DataConfig, *, process: int = 0, processes: int = 1) -> None:
        if config.batch_size % processes:
            raise ValueError(
                f"batch_size={config.batch_size} does not divide among {processes} processes; "
                f"use {-(-config.batch_size // processes) * processes}"
            )
        if store.n_tokens <= config.seq_len:
            raise ValueError(
                f"the corpus has {store.n_tokens} tokens, but a row of seq_len={config.seq_len} needs "
                f"{config.seq_len + 1}; use a longer text or a shorter seq_len"
            )
        self.store, self.config = store, config
        self._first = process * (config.batch_size // processes)
        self._count = config.batch_size // processes
        self._plan = _plan(store, config)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row was seen at least once."""
        return -(-self._plan.n_rows // self.config.batch_size)

    def epoch(self, step: int) -> float:
        """Epochs seen before `step`."""
        return step * self.config.batch_size / self._plan.n_rows

    def check_horizon(self, steps: int) -> None:
        """Raises ValueError if `steps` need more rows than the allowed epochs have."""
        epochs, n_rows, batch_size = self.config.epochs, self._plan.n_rows, self.config.batch_size
        if epochs is not None and steps * batch_size > epochs * n_rows:
            raise ValueError(
                f"{steps} steps of {batch_size} rows are {steps * batch_size / n_rows:.2f} epochs of {n_rows} rows, but "
                f"epochs={epochs:g}; use at most {int(epochs * n_rows / batch_size)} steps, more data, or more epochs"
            )

    def batch(self, step: int) -> Batch:
        """The rows of this process at `step`."""
        return _batch(self.store, self.config, self._spans(step))

    def documents(self, step: int) -> np.ndarray:
        """The documents of this process's rows at `step`, as sorted indices into the store."""
        indices = np.concatenate([_indices(spans) for spans in self._spans(step)])
        return np.unique(_document_of(self.store, indices))

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """`batch(start)`, `batch(start + 1)`, ..., read ahead on a thread."""
        steps = grain.MapDataset.range(start, np.iinfo(np.int64).max).map(self.batch)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def _spans(self, step: int) -> list[list[tuple[int, int]]]:
        begin = step * self.config.batch_size + self._first
        rows = []
        for place in range(begin, begin + self._count):
            epoch, index = divmod(place, self._plan.n_rows)
            order, shift = self._epoch_order(epoch)
            rows.append(_row_spans(self.store, self._plan, int(order[index]), shift))
        return rows

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, int]:
        """The order of the rows in an epoch, and how far its windows are shifted."""
        digest = hashlib.sha256(f"{self.config.seed} {epoch}".encode()).digest()
        random = np.random.Philox(key=int.from_bytes(digest[:16], "big"))
        slack = self._plan.slack if isinstance(self._plan, Windows) else 0
        shift = int(random.random_raw() % (slack + 1))
        return np.argsort(random.random_raw(self._plan.n_rows), kind="stable"), shift


def heldout_rows(store: TokenStore, config: DataConfig) -> Iterator[Batch]:
    """Every held-out token that has one before it in its row's document, once as a target, in a fixed order."""
    plan = _plan(store, config)
    rows = [_row_spans(store, plan, row, 0) for row in range(plan.n_rows)]
    if isinstance(plan, Windows) and plan.slack:
        rows.append([(plan.n_rows * plan.seq_len, plan.n_rows * plan.seq_len + plan.slack)])
    for first in range(0, len(rows), config.batch_size):
        spans = rows[first : first + config.batch_size]
        yield _batch(store, config, spans + [[]] * (config.batch_size - len(spans)), with_documents=True)


def _plan(store: TokenStore, config: DataConfig) -> Packing | Windows:
    if config.packing == "documents":
        return pack(np.diff(store.offsets), config.seq_len)
    return windows(store.n_tokens, config.seq_len)


def _row_spans(store: TokenStore, plan: Packing | Windows, row: int, shift: int) -> list[tuple[int, int]]:
    if isinstance(plan, Windows):
        start = row * plan.seq_len + shift
        return [(start, start + plan.seq_len)]
    spans = slice(plan.rows[row], plan.rows[row + 1])
    starts = store.offsets[plan.documents[spans]] + plan.starts[spans]
    return list(zip(starts.tolist(), (starts + plan.lengths[spans]).tolist(), strict=True))


def _indices(spans: list[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(start, stop) for start, stop in spans)])


def _document_of(store: TokenStore, indices: np.ndarray) -> np.ndarray:
    return np.searchsorted(store.offsets, indices, side="right") - 1


def _batch(
    store: TokenStore, config: DataConfig, rows: list[list[tuple[int, int]]], with_documents: bool = False
) -> Batch:
    shape = (len(rows), config.seq_len)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    targets, documents = (np.full(shape, IGNORE, np.int32) for _ in range(2))
    apart = config.end_of_text or config.packing == "documents"
    for r, spans in enumerate(rows):
        n = 0
        for start, stop in spans:
            span = slice(n, n + stop - start)
            n = span.stop
            read = store.read(start, min(stop + 1, store.n_tokens))
            of = _document_of(store, np.arange(start, start + len(read)))
            tokens[r, span] = read[: stop - start]
            count = len(read) - 1
            keep = of[1:] == of[:-1] if apart else np.ones(count, bool)
            where = slice(span.start, span.start + count)
            targets[r, where] = np.where(keep, read[1:], IGNORE)
            documents[r, where] = np.where(keep, of[1:], IGNORE)
            inside = of[: stop - start]
            segments[r, span] = inside - inside[0] + 1 + (segments[r, span.start - 1] if span.start else 0)
            positions[r, span] = np.arange(start, stop) - np.maximum(store.offsets[inside], start)
    return Batch(
        tokens=tokens,
        targets=targets,
        segments=segments if apart else None,
        positions=positions if apart else None,
        documents=documents if with_documents else None,
    )
