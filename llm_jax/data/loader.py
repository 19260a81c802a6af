"""Batches: for training a pure function of seed and step, for evaluation every token once."""

import bisect
import dataclasses
import functools
import hashlib
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import flax.struct
import grain
import numpy as np
from jaxtyping import Int64

from llm_jax.data import packing
from llm_jax.data.config import DataConfig
from llm_jax.data.mixture import Deal
from llm_jax.data.packing import Plan
from llm_jax.data.shards import SPLITS, Part, TokenStore
from llm_jax.data.task import IGNORE, Task, resolve
from llm_jax.log import apart, quantity

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


def as_told(batch: Batch, config: DataConfig, needs: Collection[str] = ()) -> Batch:
    """Return `batch` without the fields that rows of `config` don't have, and nobody `needs`."""
    absent = {"documents"} if tells_documents(config) else {"documents", "segments", "positions"}
    if config.task is None or config.task.kind != "translate":
        absent.add("prefix")
    return dataclasses.replace(batch, **dict.fromkeys(absent - set(needs)))


class Loader:
    """The training batches of a split, or those `rows` of each that one of several processes reads.

    Of a split of several sources each row is of one of them. Batches have the fields that `config` calls for, and those
    that somebody `needs`. Raises `ValueError` if a source is shorter than a row.
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
        self._sources = [_Rows(store, part, config, number) for number, part in enumerate(store.parts)]
        self._deal = Deal(tuple(part.share for part in store.parts))
        self._rows = range(config.batch_size) if rows is None else rows

    @property
    def steps_per_epoch(self) -> int:
        """How many steps it takes until every row of every source was seen."""
        wanted = [source.n_rows for source in self._sources]
        return _first(lambda step: all(map(operator.ge, self._seen(step), wanted)))

    def epochs(self, step: int) -> list[float]:
        """How many epochs of each source lie before `step`."""
        return [seen / source.n_rows for seen, source in zip(self._seen(step), self._sources, strict=True)]

    def position(self, step: int) -> str:
        """Where in its data a run is at `step`, in words: its epoch, or that of each source."""
        if len(self._sources) == 1:
            return f"epoch {self.epochs(step)[0]:.2f}"
        names = [source.name for source in self._sources]
        return "epoch " + ", ".join(
            f"{epochs:.2f} of {name}" for epochs, name in zip(self.epochs(step), names, strict=True)
        )

    def said(self, steps: int) -> list[str]:
        """A line for each source: how often `steps` show it, in tokens too, and of several its share of the rows."""
        several, found = len(self._sources) > 1, zip(self._deal.shares, self._sources, self.epochs(steps), strict=True)
        return [
            (f"{source.name}: {float(share):.1%} of the rows, " if several else "data: ")
            + f"{epochs:.2f} epochs of {source.n_tokens:,} tokens in {source.n_rows:,} rows, "
            f"{quantity(epochs * source.n_tokens)} tokens in all"
            for share, source, epochs in found
        ]

    def token_shares(self, step: int) -> dict[str, float]:
        """Of the tokens before `step` the share of each source, by name; empty where there is only one."""
        if len(self._sources) == 1:
            return {}
        tokens = [source.tokens(seen) for source, seen in zip(self._sources, self._seen(step), strict=True)]
        whole = max(sum(tokens), 1)
        return {source.name: count / whole for source, count in zip(self._sources, tokens, strict=True)}

    def check_horizon(self, steps: int) -> None:
        """Raises `ValueError` if `steps` would show rows of a source more often than the config allows."""
        epochs, batch_size = self._config.epochs, self._config.batch_size
        if epochs is None:
            return
        limits = [round(epochs * source.n_rows) for source in self._sources]
        allowed = _first(lambda step: any(map(operator.gt, self._seen(step), limits))) - 1
        first = next(i for i, seen in enumerate(self._seen(allowed + 1)) if seen > limits[i])
        n_rows, of = self._sources[first].n_rows, f" of {self._sources[first].name}" * (len(limits) > 1)
        if not allowed:
            raise ValueError(
                f"epochs={epochs:g} of {n_rows} rows{of} fill no batch of {batch_size}; lower data.batch_size, or "
                "allow more epochs"
            )
        if steps > allowed:
            more, _ = apart(self.epochs(steps)[first], epochs, "f", 2)
            raise ValueError(
                f"{steps} steps of {batch_size} rows are {more} epochs of {n_rows} rows{of}, "
                f"but epochs={epochs:g} allows {allowed}; use steps={allowed}, more epochs or more text"
            )

    def batch(self, step: int) -> Batch:
        """The rows at `step`, the same whenever and wherever it is asked for."""
        batch = _batch(self._store, self._config, self._task, self._index(step), tell=bool(self._needs))
        return as_told(batch, self._config, self._needs)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """`batch(start)`, `batch(start + 1)` and so on, read ahead on a thread."""
        steps = grain.MapDataset.range(start, LAST_STEP).map(self.batch)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def documents(self, step: int) -> list[int]:
        """Which documents of the store stand in the rows at `step`."""
        index = self._index(step)
        return np.unique(self._store.documents_of(index[index != PADDING])).tolist()

    def _seen(self, step: int) -> list[int]:
        """How many rows of each source lie before `step`."""
        return self._deal.before(step * self._config.batch_size)

    def _index(self, step: int) -> Int64[np.ndarray, "B L"]:
        """Epochs follow each other without a gap: rows that fill no batch begin the next epoch's first."""
        first, places = step * self._config.batch_size, self._places(step)
        dealt = (self._deal.source(first + places[row]) for row in self._rows)
        return _index(self._config, [self._sources[source].spans(number) for source, number in dealt])

    def _places(self, step: int) -> Sequence[int]:
        """Which of the rows dealt to `step` each row of its batch is.

        Sources take rows in turn, and so do microbatches. In an order drawn at every step, each row of the batch is of
        each source as often as its share says: so is, on average, each microbatch and what each device has, though in
        a single step a small one may have rows of few sources.
        """
        size = self._config.batch_size
        if len(self._sources) == 1:
            return range(size)
        return np.argsort(_bits(f"{self._config.seed} mixture {step}").random_raw(size), kind="stable").tolist()


class _Rows:
    """The rows of one source of a store, epoch after epoch."""

    def __init__(self, store: TokenStore, part: Part, config: DataConfig, number: int) -> None:
        n_tokens = part.tokens.stop - part.tokens.start
        if n_tokens <= config.seq_len:
            where = f" of {part.name}" if len(store.parts) > 1 else ""
            raise ValueError(
                f"{n_tokens} tokens{where} are too few for one row: seq_len={config.seq_len} needs "
                f"{config.seq_len + 1} with the last target; use more text or a smaller seq_len"
            )
        self.name = part.name
        self.plan, self._start = _plan(store, part, config), part.tokens.start
        self._seed = f"{config.seed} {{}}" + (f" {number}" if number else "")
        self.order = functools.lru_cache(maxsize=2)(self._draw_order)
        self._tokens_before = functools.lru_cache(maxsize=2)(self._count_tokens)

    @property
    def n_rows(self) -> int:
        return self.plan.n_rows

    @property
    def n_tokens(self) -> int:
        """The tokens of an epoch."""
        return int(self.plan.sizes.sum())

    def spans(self, number: int) -> list[tuple[int, int]]:
        """Where in the store the tokens of the row `number` stand, counted over all epochs."""
        epoch, row = divmod(number, self.n_rows)
        order, shift = self.order(epoch)
        return self.plan.spans(int(order[row]), self._start + shift)

    def tokens(self, number: int) -> int:
        """How many tokens the rows before `number` hold."""
        epoch, row = divmod(number, self.n_rows)
        return epoch * self.n_tokens + int(self._tokens_before(epoch)[row])

    def _count_tokens(self, epoch: int) -> Int64[np.ndarray, " n"]:
        return np.append(0, np.cumsum(self.plan.sizes[self.order(epoch)[0]]))

    def _draw_order(self, epoch: int) -> tuple[Int64[np.ndarray, " n_rows"], int]:
        """The order of the rows in `epoch`, and the shift of its windows.

        Seed and epoch are hashed together: seed 0 in epoch 1 has nothing of seed 1 in epoch 0.
        """
        bits = _bits(self._seed.format(epoch))
        shift = int(bits.random_raw()) % (self.plan.slack + 1)
        return np.argsort(bits.random_raw(self.n_rows), kind="stable"), shift


def _bits(key: str) -> np.random.Philox:
    """A source of Philox's raw bits, which NumPy promises not to change; its permutations may."""
    return np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))


def _first(holds: Callable[[int], bool]) -> int:
    """The first whole number at which something holds that holds from then on."""
    size = 1
    while not holds(size):
        size *= 2
    return bisect.bisect_left(range(size), True, key=holds)


def heldout_rows(store: TokenStore, config: DataConfig) -> Iterator[Batch]:
    """The batches of a split, in a fixed order: every token is a target once, if there is one before it to read.

    The batches have `documents`. The last one is filled up with empty rows. Of several sources the first batches have
    rows by their shares, until one has no more.
    """
    task, plans = task_of(store, config), [_plan(store, part, config, partial=True) for part in store.parts]
    # A packed plan has its longest pieces first; shuffled, and always alike, its first batches are a sample of it all.
    orders = [np.argsort(np.random.Philox(key=0).random_raw(plan.n_rows), kind="stable") for plan in plans]
    due = [(np.arange(len(order)) + 0.5) / float(part.share) for order, part in zip(orders, store.parts, strict=True)]
    source = np.repeat(np.arange(len(plans)), [plan.n_rows for plan in plans])
    turns = np.argsort(np.concatenate(due), kind="stable")
    dealt = np.stack([source, np.concatenate(orders)], axis=1)[turns]
    for first in range(0, len(dealt), config.batch_size):
        rows = dealt[first : first + config.batch_size].tolist()
        spans = [plans[number].spans(row, store.parts[number].tokens.start) for number, row in rows]
        yield _batch(store, config, task, _index(config, spans + [[]] * (config.batch_size - len(rows))))


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


def _plan(store: TokenStore, part: Part, config: DataConfig, *, partial: bool = False) -> Plan:
    """The rows of a source of `store`, whose tokens count from 0."""
    if config.packing == "documents":
        offsets = store.offsets[part.documents.start : part.documents.stop + 1]
        return packing.pack(np.diff(offsets), config.seq_len)
    n_tokens = part.tokens.stop - part.tokens.start
    n_targets = n_tokens if config.end_of_text else max(n_tokens - 1, 0)
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


def _batch(
    store: TokenStore, config: DataConfig, task: Task | None, index: Int64[np.ndarray, "B L"], tell: bool = False
) -> Batch:
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
    if not (tell or tells_documents(config)):
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
