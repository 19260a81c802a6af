"""A batch is a function of seed and step; an epoch is each row once, evaluation each token once."""

import collections
import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import recorded_batches

from llm_jax.data import loader, shards
from llm_jax.data.loader import IGNORE, Batch, DataConfig, Loader, heldout_rows
from llm_jax.data.packing import ranges
from llm_jax.data.prepare import prepare
from llm_jax.ops import loss

LENGTHS = np.random.default_rng(0).integers(1, 40, size=159).tolist()
LENGTHS[0] += -(sum(LENGTHS) - 1) % 16  # windows of 16 have no slack, with ends of text and without
KINDS = ["documents", "windows", "stream"]  # a stream is windows over text without ends


def config(kind: str, **settings: Any) -> DataConfig:
    packing: Any = "documents" if kind == "documents" else "windows"
    small: dict[str, Any] = {"seq_len": 16, "batch_size": 6}
    return DataConfig(packing=packing, end_of_text=kind != "stream", **small | settings)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, shards.TokenStore]:
    """Documents of LENGTHS tokens, each of a character of its own: a token tells which document it is in."""
    folder: Path = tmp_path_factory.mktemp("shards")
    text = "".join(chr(0x4E00 + number) * length for number, length in enumerate(LENGTHS))
    lines = "\n".join(f'{{"text": "{"".join(run)}"}}' for _, run in itertools.groupby(text))
    (folder / "a.jsonl").write_text(lines)
    made = {}
    for kind in KINDS:
        out = folder / kind
        prepare(str(folder / "a.jsonl"), out, tokenizer="char", heldout=0.0, end_of_text=kind != "stream")
        made[kind] = shards.open_shards(out).split("train")
    return made


def equal(a: Batch, b: Batch) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def joined(parts: list[Batch]) -> Batch:
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def row_keys(batches: list[Batch]) -> list[bytes]:
    """What is written in every row."""
    return [
        np.stack([batch.tokens[row], batch.targets[row]]).tobytes()
        for batch in batches
        for row in range(len(batch.tokens))
    ]


def test_every_kind_of_batch_is_bit_for_bit_what_it_was_when_recorded():
    recorded = json.loads(recorded_batches.RECORD.read_text())
    assert {kind: recorded_batches.digests(of) for kind, of in recorded_batches.recorded()} == recorded


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_same_whenever_it_is_asked_for(kind: str, stores):
    first, second = Loader(stores[kind], config(kind)), Loader(stores[kind], config(kind))
    steps = [0, 1, 2 * first.steps_per_epoch, 7]
    batches = {step: first.batch(step) for step in steps}
    assert all(equal(batches[step], second.batch(step)) for step in reversed(steps))
    assert not equal(batches[0], batches[1])
    assert not equal(batches[0], Loader(stores[kind], config(kind, seed=1)).batch(0))


@pytest.mark.parametrize("kind", ["documents", "windows"])
def test_in_tokens_of_ours_an_input_is_what_stands_before_its_target(kind: str, stores):
    """The end of another document before each one, as on a ring."""
    store, ours = stores[kind], Loader(stores[kind], config(kind))
    for step in range(ours.steps_per_epoch):
        spans, batch = ours._spans(step), ours.batch(step)
        read = store.take((ranges(spans.starts, spans.sizes) - 1) % store.n_tokens)
        assert batch.tokens[batch.segments > 0].tolist() == read.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2, 3, 6])
def test_the_batch_is_the_same_however_many_processes_read_it(kind: str, processes: int, stores):
    whole = Loader(stores[kind], config(kind))
    shares = np.split(np.arange(6), processes)
    parts = [Loader(stores[kind], config(kind), rows=share.tolist()) for share in shares]
    for step in (0, whole.steps_per_epoch - 1, 3 * whole.steps_per_epoch):
        assert equal(joined([part.batch(step) for part in parts]), whole.batch(step))


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_shows_every_row_once_in_another_order(kind: str, stores):
    ours = Loader(stores[kind], config(kind, batch_size=1))
    n_rows = ours.steps_per_epoch
    in_order = row_keys(list(heldout_rows(stores[kind], config(kind, batch_size=1))))
    epochs = [row_keys([ours.batch(step) for step in range(e * n_rows, (e + 1) * n_rows)]) for e in range(3)]
    assert all(collections.Counter(epoch) == collections.Counter(in_order) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, in_order]}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_fill_no_batch_begin_the_next_epoch(kind: str, stores):
    singles, fives = (Loader(stores[kind], config(kind, batch_size=size)) for size in (1, 5))
    n_rows = singles.steps_per_epoch
    assert n_rows % 5
    assert fives.steps_per_epoch == n_rows // 5 + 1
    rows = row_keys([fives.batch(step) for step in range(3 * n_rows // 5)])
    assert rows == row_keys([singles.batch(step) for step in range(len(rows))])


def test_an_epoch_of_packed_rows_has_every_token_as_a_target_once(stores):
    store = stores["documents"]
    ours = Loader(store, config("documents", batch_size=1))
    batches = [ours.batch(step) for step in range(ours.steps_per_epoch)]
    seen = np.concatenate([batch.targets[batch.segments > 0] for batch in batches])
    assert sorted(seen.tolist()) == sorted(store.read(0, store.n_tokens).tolist())


def test_windows_shift_from_epoch_to_epoch_and_never_overlap(stores):
    store, seq_len = stores["stream"], 21
    ours = Loader(store, config("stream", batch_size=1, seq_len=seq_len))
    steps, shifts = ours.steps_per_epoch, set()
    for epoch in range(8):
        starts = sorted(ours._spans(epoch * steps + step).starts.item() for step in range(steps))
        assert set(np.diff(starts).tolist()) == {seq_len}
        assert starts[-1] + seq_len < store.n_tokens
        shifts.add(starts[0])
    assert len(shifts) > 3


def test_a_seed_in_its_second_epoch_is_not_the_next_seed_in_its_first(stores):
    a, b = (Loader(stores["documents"], config("documents", batch_size=1, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(a._sources[0].order(1)[0], b._sources[0].order(0)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_the_next_tokens_of_the_same_document(kind: str, stores):
    store = stores[kind]
    whole = store.read(0, store.n_tokens).tolist()
    following = collections.Counter(itertools.pairwise(whole))
    ours = Loader(store, config(kind))
    for batch in (ours.batch(step) for step in range(ours.steps_per_epoch)):
        assert batch.documents is None
        assert {batch.tokens.dtype, batch.targets.dtype} == {np.dtype(np.int32)}
        if kind == "stream":
            assert batch.segments is None
            assert batch.positions is None
            assert (batch.targets != IGNORE).all()
            assert all(pair in following for pair in zip(batch.tokens.flat, batch.targets.flat, strict=True))
            np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        else:
            check_documents(batch, end=max(whole))


def check_documents(batch: Batch, end: int) -> None:
    """Row by row, token by token: what a batch of documents must look like."""
    for tokens, targets, segments, positions in zip(
        batch.tokens, batch.targets, batch.segments, batch.positions, strict=True
    ):
        documents = [list(group) for _, group in itertools.groupby(range(len(tokens)), key=lambda i: segments[i])]
        numbers = [segments[group[0]] for group in documents]
        assert numbers in (list(range(1, len(numbers) + 1)), [*range(1, len(numbers)), 0])
        for number, group in zip(numbers, documents, strict=True):
            if number == 0:
                assert (targets[group] == IGNORE).all()
                assert (tokens[group] == 0).all()
                continue
            assert positions[group].tolist() == list(range(len(group)))
            characters = {token for token in [*tokens[group], *targets[group]] if token != end}
            assert len(characters) <= 1
            assert targets[group[:-1]].tolist() == tokens[group[1:]].tolist()
            assert end not in targets[group[:-1]]


def all_rows(ours: Loader) -> Batch:
    return joined([ours.batch(step) for step in range(ours.steps_per_epoch)])


def test_a_document_begins_with_end_of_text_and_ends_with_it(stores):
    store = stores["documents"]
    rows = all_rows(Loader(store, config("documents", batch_size=1)))
    end = store.read(store.n_tokens - 1, store.n_tokens)[0]
    filled = rows.segments > 0
    assert (rows.tokens[filled] == end).sum() == (rows.targets[filled] == end).sum() == store.n_documents
    assert (rows.positions[filled][rows.tokens[filled] == end] == 0).all()


def test_without_end_of_text_the_first_token_of_a_document_is_no_target(stores):
    store = stores["stream"]
    rows = all_rows(Loader(store, DataConfig(end_of_text=False, seq_len=16, batch_size=1)))
    assert (rows.targets != IGNORE).sum() == store.n_tokens - store.n_documents
    assert (rows.segments > 0).sum() == store.n_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_reading_ahead_gives_the_same_batches_from_any_step(kind: str, stores):
    ours = Loader(stores[kind], config(kind))
    for start in (0, 5):
        ahead = itertools.islice(ours.batches(start), 12)
        assert all(equal(batch, ours.batch(start + i)) for i, batch in enumerate(ahead))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_an_error_in_reading_ahead_is_raised_at_its_step_as_it_is(stores, monkeypatch):
    ours = Loader(stores["stream"], config("stream"))
    read = ours.batch

    def fail(step: int) -> Batch:
        if step == 7:
            raise OSError("the disk is gone")
        return read(step)

    monkeypatch.setattr(ours, "batch", fail)
    batches = ours.batches(5)
    assert all(equal(next(batches), read(step)) for step in (5, 6))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert not readers()


def test_the_reader_stops_a_few_batches_ahead_and_ends_when_it_is_closed(stores, monkeypatch):
    ours, asked = Loader(stores["stream"], config("stream")), []
    monkeypatch.setattr(ours, "batch", asked.append)
    batches = ours.batches()
    next(batches)
    deadline = time.monotonic() + 10
    while len(asked) <= loader.AHEAD and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)
    assert asked == list(range(loader.AHEAD + 1))
    assert len(readers()) == 1
    batches.close()
    assert not readers()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_names_the_documents_in_it(kind: str, stores):
    store = stores[kind]
    ours = Loader(store, config(kind, batch_size=2))
    batch = ours.batch(3)
    tokens = batch.tokens if batch.segments is None else batch.tokens[batch.segments > 0]
    seen = set(tokens.flat) - {len(LENGTHS)}  # the id after the characters ends a text, any of them
    named = set(ours.documents(3))
    assert named == seen if kind == "stream" else named >= seen
    assert len(named) <= tokens.size
    epoch = [ours.documents(step) for step in range(ours.steps_per_epoch)]
    assert set().union(*epoch) >= set(range(store.n_documents - 1))  # a last token may be a target only


@pytest.mark.parametrize("kind", KINDS)
def test_every_held_out_token_is_scored_once_and_knows_its_document(kind: str, stores):
    store, rows = stores[kind], config(kind, seq_len=15)
    assert (store.n_tokens - 1) % 15  # the last window is shorter, with ends of text
    assert store.n_tokens % 15  # and without
    batches = list(heldout_rows(store, rows))
    assert {batch.tokens.shape for batch in batches} == {(6, 15)}
    scored = collections.Counter()
    for batch in batches:
        assert ((batch.documents == IGNORE) == (batch.targets == IGNORE)).all()
        scored.update(zip(batch.documents.flat, batch.targets.flat, strict=True))
    scored.pop((IGNORE, IGNORE), None)
    offsets = store.offsets.tolist()
    expected = collections.Counter(
        (document, token)
        for document, (start, stop) in enumerate(itertools.pairwise(offsets))
        for token in store.read(start, stop).tolist()
    )
    if kind == "stream":
        expected[0, store.read(0, 1)[0]] -= 1  # nothing comes before the first token of all
    assert scored == +expected


def test_a_split_without_documents_has_no_batches(tmp_path):
    (tmp_path / "a.txt").write_text("text enough for one row")
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", tokenizer="byte", heldout=0.0)
    empty = shards.open_shards(tmp_path / "out").split("heldout")
    assert [list(heldout_rows(empty, config(kind))) for kind in KINDS] == [[], [], []]


@pytest.mark.parametrize("kind", KINDS)
def test_a_horizon_beyond_the_allowed_epochs_is_refused_with_the_numbers(kind: str, stores):
    n_rows = Loader(stores[kind], config(kind, batch_size=1)).steps_per_epoch
    ours = Loader(stores[kind], config(kind, epochs=2.5, batch_size=4))
    allowed = round(2.5 * n_rows) // 4
    ours.check_horizon(allowed)
    message = rf"{allowed + 1} steps of 4 rows are 2\.\d\d epochs of {n_rows} rows, .* allows {allowed};"
    with pytest.raises(ValueError, match=message):
        ours.check_horizon(allowed + 1)
    with pytest.raises(ValueError, match=r"fill no batch of .*; lower data.batch_size"):
        Loader(stores[kind], config(kind, epochs=1e-6)).check_horizon(1)
    Loader(stores[kind], config(kind)).check_horizon(10**9)
    assert ours.epochs(0) == [0]
    assert ours.epochs(n_rows) == [4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_shorter_than_a_row_is_refused_with_both_numbers(kind: str, stores):
    n_tokens = stores[kind].n_tokens
    with pytest.raises(
        ValueError, match=rf"{n_tokens} tokens are too few .* data.seq_len={n_tokens} needs {n_tokens + 1}"
    ):
        Loader(stores[kind], config(kind, seq_len=n_tokens))
    assert Loader(stores[kind], config(kind, seq_len=n_tokens - 1)).batch(0).tokens.shape == (6, n_tokens - 1)


def test_the_loss_ignores_what_the_loader_marks():
    assert loader.IGNORE == loss.IGNORE
