"""Several sources by weight: which row is of which source is a function of its number, and nothing else."""

import dataclasses
import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.config import DataConfig
from llm_jax.data.loader import IGNORE, Batch, Loader, heldout_rows
from llm_jax.data.mixture import Deal, Mixture, open_folders
from llm_jax.data.prepare import cached_sources, prepare
from llm_jax.data.shards import Shards
from llm_jax.log import quantity
from llm_jax.runs.evaluate import evaluate
from llm_jax.train.step import Scored

SHARES = st.lists(st.integers(1, 1000), min_size=1, max_size=6).map(
    lambda weights: tuple(Fraction(weight, sum(weights)) for weight in weights)
)
LETTERS = "abc"  # the documents of a source are of one letter: a token tells its source
WEIGHTS = ("0.5", "0.2", "0.3")


@settings(max_examples=40)
@given(SHARES, st.sampled_from([0, 1, 977, 10**6, 10**18]))
def test_every_row_is_dealt_to_one_source_and_counts_follow_the_shares(shares: tuple[Fraction, ...], first: int):
    deal = Deal(shares)
    dealt = deal.source(np.arange(first, first + 30))
    for row, source, number in zip(range(first, first + 30), *(x.tolist() for x in dealt), strict=True):
        before, after = deal.before(row), deal.before(row + 1)
        assert sum(before) == row
        assert (before[source], after[source]) == (number, number + 1)
        assert sum(after) - sum(before) == 1
        for place, (count, share) in enumerate(zip(before, shares, strict=True), start=1):
            assert abs(count - row * share) <= Fraction(place, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources, of 300, 40 and 120 documents."""
    folder = tmp_path_factory.mktemp("sources")
    draw = np.random.default_rng(0)
    for letter, count in zip(LETTERS, (300, 40, 120), strict=True):
        texts = [letter * length for length in draw.integers(1, 40, size=count).tolist()]
        (folder / f"{letter}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def config(folder: Path, **changes: Any) -> DataConfig:
    uri = ",".join(f"{folder}/{letter}.jsonl:{weight}" for letter, weight in zip(LETTERS, WEIGHTS, strict=True))
    # Copies of a text stay on one side, and one letter makes few texts: the last documents are held out instead.
    small = {"tokenizer": "byte", "heldout": 0.25, "heldout_by": "tail", "seq_len": 16, "batch_size": 6}
    return DataConfig(uri=uri, **small | changes)


@pytest.fixture(scope="module")
def opened(folder: Path) -> dict[str, Shards | Mixture]:
    """By how rows are cut."""
    made: dict[str, Shards | Mixture] = {}
    for kind in ("documents", "windows", "stream"):
        c = of_kind(folder, kind)
        made[kind] = open_folders(c, cached_sources(c, folder / "cache"))
    return made


def of_kind(folder: Path, kind: str, **changes: Any) -> DataConfig:
    packing = "documents" if kind == "documents" else "windows"
    return config(folder, packing=packing, end_of_text=kind != "stream", **changes)


def sources_of(batch: Batch) -> list[int]:
    """The source of each row, by its letter; a row has no two."""
    letters = [{token - ord("a") for token in row.tolist() if token in (97, 98, 99)} for row in batch.targets]
    assert all(len(found) == 1 for found in letters)
    return [found.pop() for found in letters]


@pytest.mark.parametrize("kind", ["documents", "windows", "stream"])
def test_every_batch_has_rows_by_weight_however_often_a_source_repeats(kind: str, folder: Path, opened):
    c = of_kind(folder, kind, batch_size=10)
    loader = Loader(opened[kind].split("train"), c)
    steps = 4 * loader.steps_per_epoch // 3
    assert min(loader.epochs(steps)) >= 1
    assert max(loader.epochs(steps)) > 2
    counts = np.array([np.bincount(sources_of(loader.batch(step)), minlength=3) for step in range(steps)])
    assert (np.abs(counts - [5, 2, 3]) <= 1).all()
    assert counts.sum(0).tolist() == loader._seen(steps)


def test_an_epoch_of_a_source_has_each_of_its_rows_once(folder: Path, opened):
    """Whatever the batches: the rows of a source, in the order of their numbers."""
    loader = Loader(opened["documents"].split("train"), config(folder))
    for source in loader._sources:
        every = np.arange(2 * source.n_rows)
        spans = source.spans(every, every)
        rows: list[tuple[tuple[int, int], ...]] = [()] * len(every)
        for row, start, stop in zip(*(x.tolist() for x in (spans.rows, spans.starts, spans.stops)), strict=True):
            rows[row] += ((start, stop),)
        epochs = [rows[: source.n_rows], rows[source.n_rows :]]
        assert len(set(epochs[0])) == source.n_rows
        assert set(epochs[0]) == set(epochs[1])
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_the_mixture_is_the_same_however_many_processes_read_it(processes: int, folder: Path, opened):
    c, store = config(folder), opened["documents"].split("train")
    whole = Loader(store, c)
    parts = [Loader(store, c, rows=rows.tolist()) for rows in np.split(np.arange(6), processes)]
    for step in (9, 0, 1000):
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *(part.batch(step) for part in parts))
        assert jax.tree.all(jax.tree.map(np.array_equal, joined, whole.batch(step)))


def test_on_average_each_row_of_a_batch_is_of_each_source_by_its_share(folder: Path, opened):
    """So is each microbatch and device, though two sources take rows in turn, and two microbatches as well."""
    c = config(folder, batch_size=8)
    halves = Mixture(
        [dataclasses.replace(source, share=Fraction(1, 2)) for source in c.sources[:2]], opened["documents"].shards[:2]
    )
    loader = Loader(halves.split("train"), c)
    first = np.array([sources_of(loader.batch(step)) for step in range(400)]) == 0
    assert (np.abs(first.mean(0) - 0.5) < 0.1).all()  # four standard deviations
    assert (first.sum(1) == 4).all()


def test_another_seed_is_another_order_of_the_same_counts(folder: Path, opened):
    store = opened["documents"].split("train")
    found = [sources_of(Loader(store, config(folder, seed=seed)).batch(3)) for seed in (0, 1)]
    assert sorted(found[0]) == sorted(found[1])
    batches = [Loader(store, config(folder, seed=seed)).batch(3).tokens for seed in (0, 1)]
    assert not np.array_equal(*batches)


@pytest.mark.parametrize("kind", ["documents", "windows", "stream"])
def test_token_shares_are_those_of_the_tokens_that_were_read(kind: str, folder: Path, opened):
    loader = Loader(opened[kind].split("train"), of_kind(folder, kind))
    counts = np.zeros(3)
    for step in range(2 * loader.steps_per_epoch):
        assert list(loader.token_shares(step).values()) == pytest.approx((counts / max(counts.sum(), 1)).tolist())
        batch = loader.batch(step)
        read = np.full(batch.tokens.shape, True) if batch.segments is None else batch.segments != 0
        np.add.at(counts, sources_of(batch), read.sum(1))
    assert list(loader.token_shares(0)) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert Loader(opened[kind].shards[0].split("train"), of_kind(folder, kind)).token_shares(7) == {}


def test_a_source_seen_more_often_than_epochs_allow_is_named(folder: Path, opened):
    store = opened["documents"].split("train")
    loader = Loader(store, config(folder, epochs=2.0))
    smallest = loader._sources[1]
    allowed = next(n for n in itertools.count() if loader._seen(n)[1] > 2 * smallest.n_rows) - 1
    loader.check_horizon(allowed)
    message = rf"{allowed + 1} steps .* epochs of {smallest.n_rows} rows of b.jsonl, .* use steps={allowed}"
    with pytest.raises(ValueError, match=message):
        loader.check_horizon(allowed + 1)
    assert f"tokens in {smallest.n_rows:,} rows" in loader.said(allowed)[1]


@pytest.mark.parametrize("kind", ["documents", "windows"])
def test_a_run_says_how_often_it_sees_its_data_and_how_many_tokens(kind: str, folder: Path, opened):
    loader = Loader(opened[kind].shards[0].split("train"), of_kind(folder, kind, batch_size=1))
    steps = loader.steps_per_epoch
    seen = sum(int((loader.batch(step).targets != IGNORE).sum()) for step in range(steps))
    assert loader.said(steps) == [
        f"data: 1.00 epochs of {seen:,} tokens in {steps} rows, {quantity(seen)} tokens in all"
    ]
    assert loader.said(3 * steps)[0].endswith(f", {quantity(3 * seen)} tokens in all")


def test_a_document_knows_its_source(folder: Path, opened):
    store = opened["documents"].split("train")
    documents = [(source.documents.start, source.documents.stop - 1) for source in store.sources]
    origins = store.origins([number for pair in documents for number in pair])
    assert [origin.split("#")[0] for origin in origins] == [f"{letter}.jsonl" for letter in LETTERS for _ in "12"]
    whole = Loader(store, config(folder))
    assert store.origins(whole.documents(3))


def test_held_out_text_is_scored_once_and_each_source_weighs_its_share(folder: Path, opened):
    c, store = config(folder), opened["documents"].split("heldout")
    nats = {97: 1.0, 98: 2.0, 99: 4.0}

    def score(batch: Batch) -> Scored:
        letters = (np.array(sources_of(batch)) + 97)[:, None]
        loss = np.vectorize(nats.get)(np.broadcast_to(letters, batch.targets.shape))
        return Scored(loss.astype(np.float32), np.zeros(loss.shape, bool))

    rows = [batch for batch in heldout_rows(store, c) if (batch.targets != IGNORE).all(1).any()]
    whole = [batch for batch in heldout_rows(store, c) if (batch.targets != IGNORE).any(1).all()]
    assert sum((batch.targets != IGNORE).sum() for batch in heldout_rows(store, c)) == store.n_tokens
    assert np.bincount(sources_of(rows[0]), minlength=3).min() > 0
    result = evaluate(score, whole, store)
    assert result.loss == pytest.approx(0.5 * 1 + 0.2 * 2 + 0.3 * 4)
    assert [source.loss for source in result.sources.values()] == pytest.approx([1, 2, 4])
    assert result.numbers()["heldout_loss/c.jsonl"] == pytest.approx(4)
    assert result.tokens == sum(source.tokens for source in result.sources.values())
    low, high = result.loss_interval or (0.0, 0.0)
    assert low == pytest.approx(result.loss) == pytest.approx(high)  # no doubt within a source, hence none


def test_a_tokenizer_learns_from_all_sources_and_each_is_prepared_once(folder: Path, tmp_path: Path):
    told: list[str] = []
    c = config(folder, tokenizer="train:260")
    first = open_folders(c, cached_sources(c, tmp_path / "one", told.append))
    assert told.count(told[0]) == 1
    again = open_folders(c, cached_sources(c, tmp_path / "two"))
    assert isinstance(first, Mixture)
    assert first.tokenizer.fingerprint == again.tokenizer.fingerprint
    assert {bytes(entry) for entry in first.tokenizer.table} >= {b"aa", b"cc"}
    told.clear()
    other_weights = dataclasses.replace(c, uri=c.uri.replace(":0.2", ":7"))
    assert cached_sources(other_weights, tmp_path / "one", told.append) == first.folders
    assert told == []


def test_folders_of_shards_mix_if_they_have_one_tokenizer(folder: Path, tmp_path: Path):
    learned = config(folder, tokenizer="train:258")
    for name, source, spec in (("a", "a", "train:258"), ("b", "b", "train:258"), ("c", "b", f"{tmp_path}/a/tokenizer")):
        prepare(f"{folder}/{source}.jsonl", tmp_path / name, tokenizer=spec, heldout=0.25, heldout_by="tail")
    own, theirs = (dataclasses.replace(learned, uri=f"{tmp_path}/a:1,{tmp_path}/{other}:1") for other in "bc")
    with pytest.raises(ValueError, match=r"b has the tokens of train:258, and .*a those of .* tokenizer .*a/token"):
        open_folders(own, cached_sources(own, tmp_path / "cache"))
    theirs = dataclasses.replace(theirs, tokenizer=f"{tmp_path}/a/tokenizer")
    assert isinstance(open_folders(theirs, cached_sources(theirs, tmp_path / "cache")), Mixture)
    text = dataclasses.replace(own, uri=f"{tmp_path}/a:1,{folder}/c.jsonl:1")
    with pytest.raises(ValueError, match=r"a has a tokenizer already, .* set data.tokenizer=.*a/tokenizer"):
        cached_sources(text, tmp_path / "cache")
    cached_sources(dataclasses.replace(text, tokenizer=f"{tmp_path}/a/tokenizer"), tmp_path / "cache")


def test_a_separator_cuts_text_and_leaves_records(folder: Path, tmp_path: Path):
    (tmp_path / "c.txt").write_text("one\n\ntwo\n\nthree\n\nfour")
    c = DataConfig(uri=f"{tmp_path}/c.txt:1,{folder}/b.jsonl:1", tokenizer="byte", separator="\n\n", heldout=0.3)
    text, records = open_folders(c, cached_sources(c, tmp_path / "cache")).shards
    assert sum(split.documents for split in text.manifest.splits.values()) == 4
    assert sum(split.documents for split in records.manifest.splits.values()) == 40


@pytest.mark.parametrize("uri", ["{0}/a.jsonl,{0}/b.jsonl", "{0}/a.jsonl,{0}/b.jsonl:0.3", "{0}/x,y:1,{0}/a.jsonl:1"])
def test_sources_without_weights_are_told_how_to_have_them(uri: str, folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no data at .*; several sources have a weight each, as in data.uri="):
        cached_sources(DataConfig(uri=uri.format(folder), tokenizer="byte"), tmp_path)
