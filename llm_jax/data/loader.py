"""Batches: for training a pure function of seed and step, for evaluation every token once."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import operator
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Int64

from llm_jax.data import packing
from llm_jax.data.config import DataConfig
from llm_jax.data.mixture import Deal
from llm_jax.data.packing import Packing, RowLayout, Spans
from llm_jax.data.shards import SPLITS, SourceSlice, TokenStore
from llm_jax.data.task import IGNORE, Task, resolve
from llm_jax.log import apart, quantity

__all__ = ["IGNORE", "Batch", "DataConfig", "Loader", "heldout_rows"]

CHECKED = 10_000  # documents in memory at once
AHEAD = 4  # batches read before they are asked for

Rows = Any  # int32 [B, L] of NumPy or JAX; in a mapped tree whatever replaces them, such as a sharding


@flax.struct.dataclass
class Batch:
    """Rows of tokens.

    Attributes:
      tokens: the inputs, 0 in the padding; each document begins with begin-of-text if the data has ends of text.
      targets: the token after each, IGNORE if there is none in the same document.
      segments: which document of its row a token belongs to, from 1; 0 in the padding.
      positions: the distance of a token from the start of its document in this row.
      documents: the document of each target in the store, -1 if there is none; for evaluation.
      prefix: whether all tokens of the document attend to a token, if a task needs that.

    A stream that is not segmented into documents has neither segments nor positions.
    """

    tokens: Rows
    targets: Rows
    segments: Rows = None
    positions: Rows = None
    documents: Rows = None
    prefix: Rows = None


def is_segmented(config: DataConfig) -> bool:
    """Return whether rows say which document a token belongs to."""
    return config.packing == "documents" or config.end_of_text


def select_fields(batch: Batch, config: DataConfig, needs: Collection[str] = ()) -> Batch:
    """Return `batch` without the fields that rows of `config` don't have, and nobody `needs`."""
    absent = {"documents"} if is_segmented(config) else {"documents", "segments", "positions"}
    if config.task is None or config.task.kind != "translate":
        absent.add("prefix")
    return dataclasses.replace(batch, **dict.fromkeys(absent - set(needs)))


class Loader:
    """The training batches of a split, or the `rows` of each batch that one of several processes reads.

    If the split has several sources, each row is from one of them. Batches have the fields that `config` calls for, and
    those that somebody `needs`. Raise `ValueError` if a source is shorter than a row.
    """

    def __init__(
        self,
        store: TokenStore,
        config: DataConfig,
        *,
        rows: Sequence[int] | None = None,
        needs: Collection[str] = (),
    ) -> None:
        self._store, self._config, self._task = store, config, task_of(store, config)
        self._needs = needs
        self._sources = [_Rows(store, source, config, number) for number, source in enumerate(store.sources)]
        self._deal = Deal(tuple(source.share for source in store.sources))
        self._rows = np.arange(config.batch_size) if rows is None else np.asarray(rows)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps until every row of every source has been seen."""
        wanted = [source.n_rows for source in self._sources]
        return _first(lambda step: all(map(operator.ge, self._seen(step), wanted)))

    def epochs(self, step: int) -> list[float]:
        """Return how many epochs of each source lie before `step`."""
        return [seen / source.n_rows for seen, source in zip(self._seen(step), self._sources, strict=True)]

    def position(self, step: int) -> str:
        """Return where in its data a run is at `step`, in words: its epoch, or that of each source."""
        if len(self._sources) == 1:
            return f"epoch {self.epochs(step)[0]:.2f}"
        names = [source.name for source in self._sources]
        return "epoch " + ", ".join(
            f"{epochs:.2f} of {name}" for epochs, name in zip(self.epochs(step), names, strict=True)
        )

    def said(self, steps: int) -> list[str]:
        """Return a line for each source: its epochs and tokens in `steps`, and its share of the rows if not alone."""
        several, found = len(self._sources) > 1, zip(self._deal.shares, self._sources, self.epochs(steps), strict=True)
        return [
            (f"{source.name}: {float(share):.1%} of the rows, " if several else "data: ")
            + f"{epochs:.2f} epochs of {source.n_tokens:,} tokens in {source.n_rows:,} rows, "
            f"{quantity(epochs * source.n_tokens)} tokens in all"
            for share, source, epochs in found
        ]

    def token_shares(self, step: int) -> dict[str, float]:
        """Return the share of each source in the tokens before `step`, by name; empty if there is only one."""
        if len(self._sources) == 1:
            return {}
        tokens = [source.tokens(seen) for source, seen in zip(self._sources, self._seen(step), strict=True)]
        whole = max(sum(tokens), 1)
        return {source.name: count / whole for source, count in zip(self._sources, tokens, strict=True)}

    def check_horizon(self, steps: int) -> None:
        """Raise `ValueError` if `steps` would show rows of a source more often than the config allows."""
        epochs, batch_size = self._config.epochs, self._config.batch_size
        if epochs is None:
            return
        limits = [round(epochs * source.n_rows) for source in self._sources]
        allowed = _first(lambda step: any(map(operator.gt, self._seen(step), limits))) - 1
        first = next(i for i, seen in enumerate(self._seen(allowed + 1)) if seen > limits[i])
        n_rows, of = self._sources[first].n_rows, f" of {self._sources[first].name}" * (len(limits) > 1)
        if not allowed:
            raise ValueError(
                f"data.epochs={epochs:g} of {n_rows} rows{of} fill no batch of {batch_size}; lower data.batch_size, or "
                "allow more epochs"
            )
        if steps > allowed:
            more, _ = apart(self.epochs(steps)[first], epochs, "f", 2)
            raise ValueError(
                f"{steps} steps of {batch_size} rows are {more} epochs of {n_rows} rows{of}, "
                f"but data.epochs={epochs:g} allows {allowed}; use steps={allowed}, more epochs or more text"
            )

    def batch(self, step: int) -> Batch:
        """Return the rows at `step`: a pure function of the config, the shards and `step`."""
        return _batch(self._store, self._config, self._task, self._spans(step), len(self._rows), self._needs)

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Yield `batch(start)`, `batch(start + 1)` and so on, read ahead by a thread that ends when this is closed.

        What `batch` raises is raised here, when the batch is asked for.
        """
        steps = itertools.count(start)
        with ThreadPoolExecutor(1, "loader") as thread:
            try:
                ahead = deque(thread.submit(self.batch, step) for step in itertools.islice(steps, AHEAD))
                while True:
                    batch = ahead.popleft().result()
                    # Now, not at the next call: the thread gets Python's lock once the step that follows is dispatched.
                    ahead.append(thread.submit(self.batch, next(steps)))
                    yield batch
            finally:
                thread.shutdown(cancel_futures=True)

    def documents(self, step: int) -> list[int]:
        """Return which documents of the store are in the rows at `step`."""
        spans = self._spans(step).cut(self._store.offsets)
        return np.unique(self._store.documents_of(spans.starts)).tolist()

    def _seen(self, step: int) -> list[int]:
        """Return how many rows of each source lie before `step`."""
        return self._deal.before(step * self._config.batch_size)

    def _spans(self, step: int) -> Spans:
        """Return the spans of the store in the rows at `step`.

        Epochs follow each other without a gap: rows left over from one begin the first batch of the next.
        """
        dealt = step * self._config.batch_size + self._order(step)[self._rows]
        sources, numbers = self._deal.source(dealt)
        grouped = _grouped(sources)
        return Spans.joined([self._sources[source].spans(numbers[here], here) for source, here in grouped])

    def _order(self, step: int) -> Int64[np.ndarray, "batch_size"]:
        """Return which of the rows dealt to `step` each row of its batch is.

        Sources alternate, and so do microbatches. Drawing a new order at every step gives every row of the batch each
        source as often as its share says. So does, on average, every microbatch and device, though in a single step a
        small one may have rows of few sources.
        """
        size = self._config.batch_size
        if len(self._sources) == 1:
            return np.arange(size)
        return np.argsort(_bits(f"{self._config.seed} mixture {step}").random_raw(size), kind="stable")


class _Rows:
    """The rows of one source of a store, epoch after epoch."""

    def __init__(self, store: TokenStore, source: SourceSlice, config: DataConfig, number: int) -> None:
        n_tokens = source.tokens.stop - source.tokens.start
        if n_tokens <= config.seq_len:
            where = f" of {source.name}" if len(store.sources) > 1 else ""
            raise ValueError(
                f"{n_tokens} tokens{where} are too few for one row: data.seq_len={config.seq_len} needs "
                f"{config.seq_len + 1} with the last target; use more text or a smaller data.seq_len"
            )
        self.name = source.name
        self.packing, self._start = _packing(store, source, config), source.tokens.start
        self._seed = f"{config.seed} {{}}" + (f" {number}" if number else "")
        self.order = functools.lru_cache(maxsize=2)(self._draw_order)
        self._tokens_before = functools.lru_cache(maxsize=2)(self._count_tokens)

    @property
    def n_rows(self) -> int:
        return self.packing.n_rows

    @property
    def n_tokens(self) -> int:
        """The number of tokens in an epoch."""
        return int(self.packing.sizes.sum())

    def spans(self, numbers: Int64[np.ndarray, "n"], into: Int64[np.ndarray, "n"]) -> Spans:
        """Return the spans in the store of the rows `numbers`, counted over all epochs, as rows `into` of a batch."""
        epochs, rows = np.divmod(numbers, self.n_rows)
        shifts = np.zeros_like(rows)
        for epoch, here in _grouped(epochs):
            order, shift = self.order(epoch)
            rows[here], shifts[here] = order[rows[here]], self._start + shift
        return self.packing.spans(rows, shifts, into)

    def tokens(self, number: int) -> int:
        """Return how many tokens the rows before `number` hold."""
        epoch, row = divmod(number, self.n_rows)
        return epoch * self.n_tokens + int(self._tokens_before(epoch)[row])

    def _count_tokens(self, epoch: int) -> Int64[np.ndarray, " n"]:
        return np.append(0, np.cumsum(self.packing.sizes[self.order(epoch)[0]]))

    def _draw_order(self, epoch: int) -> tuple[Int64[np.ndarray, " n_rows"], int]:
        """Draw the order of the rows in `epoch`, and the shift of its windows.

        Seed and epoch are hashed together: seed 0 in epoch 1 is unrelated to seed 1 in epoch 0.
        """
        bits = _bits(self._seed.format(epoch))
        shift = int(bits.random_raw()) % (self.packing.slack + 1)
        return np.argsort(bits.random_raw(self.n_rows), kind="stable"), shift


def _bits(key: str) -> np.random.Philox:
    """Return a source of raw Philox bits, which NumPy promises not to change; its permutations may."""
    return np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))


def _first(holds: Callable[[int], bool]) -> int:
    """Return the first whole number from which on `holds` is true."""
    size = 1
    while not holds(size):
        size *= 2
    return bisect.bisect_left(range(size), True, key=holds)


def heldout_rows(store: TokenStore, config: DataConfig) -> Iterator[Batch]:
    """Yield the batches of a split, in a fixed order: every token is a target once, if a token precedes it.

    The batches have `documents`. The last one is filled up with empty rows. If there are several sources, the first
    batches mix their rows by their shares, until one runs out.
    """
    sources = store.sources
    task, packings = task_of(store, config), [_packing(store, source, config, partial=True) for source in sources]
    # Packing puts the longest pieces first; a fixed shuffle makes the first batches a sample of the whole.
    orders = [np.argsort(np.random.Philox(key=0).random_raw(packing.n_rows), kind="stable") for packing in packings]
    due = [(np.arange(len(order)) + 0.5) / float(source.share) for order, source in zip(orders, sources, strict=True)]
    number_of = np.repeat(np.arange(len(packings)), [packing.n_rows for packing in packings])
    by_due = np.argsort(np.concatenate(due), kind="stable")
    number_of, row_of = number_of[by_due], np.concatenate(orders)[by_due]
    for first in range(0, len(by_due), config.batch_size):
        chosen = slice(first, first + config.batch_size)
        row, grouped = row_of[chosen], _grouped(number_of[chosen])
        spans = [packings[number].spans(row[here], sources[number].tokens.start, here) for number, here in grouped]
        yield _batch(store, config, task, Spans.joined(spans), config.batch_size, needs=("documents",))


def _grouped(numbers: Int64[np.ndarray, " n"]) -> list[tuple[int, Int64[np.ndarray, " _"]]]:
    """Return each number that occurs, and where."""
    return [(number, np.flatnonzero(numbers == number)) for number in sorted(set(numbers.tolist()))]


@functools.lru_cache(maxsize=len(SPLITS))  # every evaluation calls it
def task_of(store: TokenStore, config: DataConfig) -> Task | None:
    """Return the task of `config` in the tokens of `store`. Raise `ValueError` for a document that misfits it."""
    if config.task is None:
        return None
    task = resolve(config.task, store.tokenizer, special=config.special)
    for first in range(0, store.n_documents, CHECKED):  # not all in memory at once
        offsets = store.offsets[first : first + CHECKED + 1]
        wrong = task.misfit(store.read(int(offsets[0]), int(offsets[-1])), offsets - offsets[0], config.seq_len)
        if wrong is not None:
            document, reason = wrong
            raise ValueError(f"{store.origins([first + document])[0]} is not a question and its answer: {reason}")
    return task


def _packing(store: TokenStore, source: SourceSlice, config: DataConfig, *, partial: bool = False) -> Packing:
    """Return the rows of a source of `store`; its tokens count from 0."""
    if config.packing == "documents":
        offsets = store.offsets[source.documents.start : source.documents.stop + 1]
        return packing.pack(np.diff(offsets), config.seq_len)
    n_tokens = source.tokens.stop - source.tokens.start
    n_targets = n_tokens if config.end_of_text else max(n_tokens - 1, 0)
    return packing.windows(n_targets, config.seq_len, partial=partial)


def _batch(
    store: TokenStore, config: DataConfig, task: Task | None, spans: Spans, n_rows: int, needs: Collection[str] = ()
) -> Batch:
    """Return the batch of `spans` in `n_rows` rows; targets are one token after the inputs.

    With end-of-text tokens `spans` are those of the targets, and the input before a document is the tokenizer's
    begin-of-text, for our own tokenizers the end of another text: every token of a document is a target. Without them
    `spans` are those of the inputs, and the last token of a packed document has no target. A task keeps some of the
    targets.

    No line here is run for each token, or each row: a number of a span is repeated over its tokens.
    """
    if segmented := bool(needs) or is_segmented(config):
        spans = spans.cut(store.offsets)  # each within one document
    layout, document = RowLayout(spans, n_rows, config.seq_len), store.documents_of(spans.starts)
    read = layout.fill(store.read_spans(spans))
    if config.end_of_text:
        tokens, targets, of_target = np.roll(read, 1), read, layout.spread(document, IGNORE)
        begins = store.offsets[document] == spans.starts
        tokens[layout.first] = np.where(begins, store.tokenizer.begin_of_text, store.take(spans.starts - 1))
    else:
        tokens, targets, of_target = read, np.roll(read, -1), layout.spread(document, IGNORE)
        after = store.documents_of(spans.stops)
        ends = (after != document) & (config.packing == "documents")
        targets[layout.last] = np.where(ends, IGNORE, store.take(spans.stops))
        of_target[layout.last] = np.where(ends, IGNORE, after)
    tokens[layout.padding], targets[layout.padding] = 0, IGNORE
    fields = {"tokens": tokens, "targets": targets, "documents": of_target}
    if segmented:
        number = np.arange(len(document)) - np.searchsorted(spans.rows, spans.rows)  # of each span in its row
        fields |= {"segments": layout.spread(number + 1, 0), "positions": layout.positions()}
    batch = Batch(**{name: values.reshape(n_rows, config.seq_len) for name, values in fields.items()})
    if task is not None:
        selected = task.select(batch.tokens, batch.targets, batch.segments)
        batch = dataclasses.replace(batch, targets=selected.targets, prefix=selected.prefix)
    return select_fields(batch, config, needs)
