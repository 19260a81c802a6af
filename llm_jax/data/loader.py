"""Batches: for training a pure function of seed and step, for evaluation every token once."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import grain
import numpy as np
from jaxtyping import Int64

from llm_jax.data import packing
from llm_jax.data.packing import Plan
from llm_jax.data.shards import SPLITS, DataConfig, TokenStore
from llm_jax.data.task import IGNORE, Task, resolve

__all__ = ["IGNORE", "Batch", "DataConfig", "Loader", "heldout_rows"]

PADDING = -1  # where in the stream a position stands that has no token
CHECKED = 10_000  # documents at once
LAST_STEP = np.iinfo(np.int64).max

Rows = Any  # int32 [B, L] of NumPy or JAX; in a mapped-over batch whatever stands for them, a sharding say


@flax.struct.dataclass
class Batch:
    """Rows of tokens.

    tokens: the inputs, 0 in the padding; each document begins with begin-of-text, where the data has ends of text.
    targets: the token after each, IGNORE where there is none in the same document.
    segments: which document of its row a token belongs to, from 1; 0 in the padding.
    positions: how far a token is from the start of its document in this row.
    documents: the document of each target in the store, -1 where there is none; for evaluation.
    prefix: whether all of its document sees a token, where a task asks for that.

    A stream that is not told apart into documents has neither segments nor positions.
    """

    tokens: Rows
    targets: Rows
    segments: Rows = None
    positions: Rows = None
    documents: Rows = None
    prefix: Rows = None


def tells_documents(config: DataConfig) -> bool:
    """Whether rows say which document a token belongs to."""
    return config.packing == "documents" or config.end_of_text


def as_told(batch: Batch, config: DataConfig) -> Batch:
    """`batch` without the fields that rows of `config` don't have."""
    has_prefix = config.task is not None and config.task.kind == "translate"
    apart = {} if tells_documents(config) else {"segments": None, "positions": None}
    return dataclasses.replace(batch, **apart, **({} if has_prefix else {"prefix": None}))


class Loader:
    """The training batches of a split, or those `rows` of each that one of several processes reads.

    Raises `ValueError` if the split is shorter than a row.
    """

    def __init__(self, store: TokenStore, config: DataConfig, *, rows: Sequence[int] | None = None) -> None:
        if store.n_tokens <= config.seq_len:
            raise ValueError(
                f"{store.n_tokens} tokens are too few for one row: seq_len={config.seq_len} needs "
                f"{config.seq_len + 1} with the last target; use more text or a smaller seq_len"
            )
        self._store, self._config, self._task = store, config, task_of(store, config)
        self._plan = _plan(store, config)
        self._rows = range(config.batch_size) if rows is None else rows
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    @property
    def steps_per_epoch(self) -> int:
        """How many steps it takes until every row was seen."""
        return -(-self._plan.n_rows // self._config.batch_size)

    def epoch(self, step: int) -> float:
        """How many epochs lie before `step`."""
        return step * self._config.batch_size / self._plan.n_rows

    def check_horizon(self, steps: int) -> None:
        """Raises `ValueError` if `steps` would show rows more often than the config allows."""
        epochs, batch_size, n_rows = self._config.epochs, self._config.batch_size, self._plan.n_rows
        if epochs is None:
            return
        allowed = round(epochs * n_rows) // batch_size
        if not allowed:
            raise ValueError(
                f"epochs={epochs:g} of {n_rows} rows fill no batch of {batch_size}; lower data.batch_size, or allow "
                "more epochs"
            )
        if steps > allowed:
            raise ValueError(
                f"{steps} steps of {batch_size} rows are {self.epoch(steps):.2f} epochs of {n_rows} rows, "
                f"but epochs={epochs:g} allows {allowed}; use steps={allowed}, more epochs or more text"
            )

    def batch(self, step: int) -> Batch:
        """The rows at `step`, the same whenever and wherever it is asked for."""
        batch = _batch(self._store, self._config, self._task, self._index(step))
        return dataclasses.replace(batch, documents=None)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """`batch(start)`, `batch(start + 1)` and so on, read ahead on a thread."""
        steps = grain.MapDataset.range(start, LAST_STEP).map(self.batch)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def documents(self, step: int) -> list[int]:
        """Which documents of the store stand in the rows at `step`."""
        index = self._index(step)
        return np.unique(self._store.documents_of(index[index != PADDING])).tolist()

    def _index(self, step: int) -> Int64[np.ndarray, "B L"]:
        """Epochs follow each other without a gap: rows that fill no batch begin the next epoch's first."""
        first = step * self._config.batch_size
        rows = []
        for epoch, row in (divmod(first + place, self._plan.n_rows) for place in self._rows):
            order, shift = self._order(epoch)
            rows.append(self._plan.spans(int(order[row]), shift))
        return _index(self._config, rows)

    def _draw_order(self, epoch: int) -> tuple[Int64[np.ndarray, "n_rows"], int]:
        """The order of the rows in `epoch`, and the shift of its windows.

        Seed and epoch are hashed together: seed 0 in epoch 1 has nothing of seed 1 in epoch 0. The order
        comes of Philox's raw bits, which NumPy promises not to change; its permutations may.
        """
        digest = hashlib.sha256(f"{self._config.seed} {epoch}".encode()).digest()
        bits = np.random.Philox(key=int.from_bytes(digest[:16], "big"))
        shift = int(bits.random_raw()) % (self._plan.slack + 1)
        return np.argsort(bits.random_raw(self._plan.n_rows), kind="stable"), shift


def heldout_rows(store: TokenStore, config: DataConfig) -> Iterator[Batch]:
    """The batches of a split, in a fixed order: every token is a target once, if there is one before it to read.

    The batches have `documents`. The last one is filled up with empty rows.
    """
    plan, task = _plan(store, config, partial=True), task_of(store, config)
    # A packed plan has its longest pieces first; shuffled, and always alike, its first batches are a sample of it all.
    order = np.argsort(np.random.Philox(key=0).random_raw(plan.n_rows), kind="stable").tolist()
    for first in range(0, plan.n_rows, config.batch_size):
        rows = order[first : first + config.batch_size]
        spans = [plan.spans(row) for row in rows] + [[]] * (config.batch_size - len(rows))
        yield _batch(store, config, task, _index(config, spans))


@functools.lru_cache(maxsize=len(SPLITS))  # every evaluation asks
def task_of(store: TokenStore, config: DataConfig) -> Task | None:
    """What `config` asks of the documents of `store`, in its tokens. Raises `ValueError` for one that can't answer."""
    if config.task is None:
        return None
    task = resolve(config.task, store.tokenizer, special=config.special)
    for first in range(0, store.n_documents, CHECKED):  # so that no more than a part is in memory
        offsets = store.offsets[first : first + CHECKED + 1]
        wrong = task.misfit(store.read(int(offsets[0]), int(offsets[-1])), offsets - offsets[0], config.seq_len)
        if wrong is not None:
            document, reason = wrong
            raise ValueError(f"{store.origins([first + document])[0]} is no question with its answer: {reason}")
    return task


def _plan(store: TokenStore, config: DataConfig, *, partial: bool = False) -> Plan:
    if config.packing == "documents":
        return packing.pack(np.diff(store.offsets), config.seq_len)
    n_targets = store.n_tokens if config.end_of_text else max(store.n_tokens - 1, 0)
    return packing.windows(n_targets, config.seq_len, partial=partial)


def _index(config: DataConfig, rows: Sequence[list[tuple[int, int]]]) -> Int64[np.ndarray, "B L"]:
    """Where in the stream each token of a batch stands: the spans of its row in turn, then padding."""
    index = np.full((len(rows), config.seq_len), PADDING)
    for row, spans in zip(index, rows, strict=True):
        place = 0
        for start, stop in spans:
            row[place : place + stop - start] = np.arange(start, stop)
            place += stop - start
    return index


def _batch(store: TokenStore, config: DataConfig, task: Task | None, index: Int64[np.ndarray, "B L"]) -> Batch:
    """Inputs and targets, a token apart.

    With end-of-text tokens `index` is where the targets stand, and the input before a document is what the tokenizer
    begins a text with: of ours the end of another. So every token of a document is a target. Without them `index` is
    where the inputs stand, and a document's last token has no target.
    Of these targets a task keeps those that it asks for.
    """
    filled, document = index != PADDING, store.documents_of(index)
    inputs = index - 1 if config.end_of_text else index
    targets = index if config.end_of_text else index + 1
    whole = config.packing == "documents"
    tokens = store.take(inputs)
    if config.end_of_text:
        tokens = np.where(store.offsets[document] == index, store.tokenizer.begin_of_text, tokens)
    counted = filled & (store.documents_of(targets) == document) if whole else filled
    batch = Batch(
        tokens=np.where(filled, tokens, 0).astype(np.int32),
        targets=np.where(counted, store.take(targets), IGNORE).astype(np.int32),
        documents=np.where(counted, store.documents_of(targets), IGNORE).astype(np.int32),
    )
    if not tells_documents(config):
        return batch
    place = np.broadcast_to(np.arange(config.seq_len), index.shape)
    first = np.diff(document, axis=1, prepend=-2) != 0
    start = np.maximum.accumulate(np.where(first, place, 0), axis=1)
    batch = dataclasses.replace(
        batch,
        segments=np.where(filled, np.cumsum(first, axis=1), 0).astype(np.int32),
        positions=(place - start).astype(np.int32),
    )
    if task is None:
        return batch
    asked = task.asked(batch.tokens, batch.targets, batch.segments)
    return dataclasses.replace(batch, targets=asked.targets, prefix=asked.prefix)
