"""Text that changes: before, while and after it is prepared."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from llm_jax.data import prepare as writing
from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import cached, cached_sources, prepare
from llm_jax.data.shards import open_shards
from llm_jax.data.sources import fingerprint

TEXT = "".join(f"line {number}\n\n" for number in range(60))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"text number {number}")
    return tmp_path / "text"


def config(uri: Path | str, **changes: Any) -> DataConfig:
    return DataConfig(uri=str(uri), **{"tokenizer": "byte", "heldout": 0.2} | changes)


def write_later(path: Path, text: str) -> None:
    """As an editor does some time after everything else here."""
    path.write_text(text)
    os.utime(path, (time.time() + 60,) * 2)


def test_text_that_changed_since_it_was_cached_is_prepared_again(corpus: Path, tmp_path: Path):
    first = cached(config(corpus), tmp_path / "cache")
    write_later(corpus / "3.txt", "another text")
    assert cached(config(corpus), tmp_path / "cache") != first
    (corpus / "3.txt").write_text("text number 3")
    assert cached(config(corpus), tmp_path / "cache") == first


def test_what_is_said_of_preparing_is_what_is_done(corpus: Path, tmp_path: Path):
    told: list[str] = []
    prepare(str(corpus), tmp_path / "a", tokenizer="char", heldout=0.2, report=told.append)
    assert [line.split(": ")[0] for line in told] == [f"building the tokenizer char from {corpus}", "train", "heldout"]
    told.clear()
    prepare(str(corpus), tmp_path / "b", tokenizer="byte", heldout=0.0, report=told.append)
    assert told == ["tokenizer byte", "tokenized: 290 tokens of 20 documents"]


def test_what_an_older_reader_prepared_is_not_taken_from_the_cache(tmp_path: Path, monkeypatch):
    cache, rows = tmp_path / "cache", tmp_path / "a.jsonl"
    rows.write_text("".join(json.dumps({"id": f"id {n}", "text": f"text {n}"}) + "\n" for n in range(20)))
    wrong = config(rows, column="id")
    key = {name: getattr(wrong, name) for name in writing.SETTINGS if name not in ("column", "special")}
    old = cache / writing._digest(key | {"format": 1, "content": fingerprint(str(rows))})
    prepare(str(rows), old, tokenizer="byte", heldout=0.2, column="id")
    store = open_shards(cached(config(rows), cache)).split("train")
    assert store.tokenizer.decode(store.read(0, store.n_tokens)).startswith("text ")

    (tmp_path / "b.txt").write_text(TEXT)
    mixture = config(f"{rows}:1,{tmp_path}/b.txt:1", tokenizer="char", separator="\n\n")
    before = {*cached_sources(mixture, cache), *cache.glob("tokenizer-*")}
    monkeypatch.setattr(writing, "READER", writing.READER + 1)
    after = {*cached_sources(mixture, cache), *cache.glob("tokenizer-*")} - before
    assert (len(before), len(after)) == (3, 3)


def test_rows_that_an_older_reader_prepared_are_read_and_named(tmp_path: Path):
    (tmp_path / "text").mkdir()
    for name in ("a.jsonl", "b.csv", "text/c.txt", "text/d.json"):
        rows = [json.dumps({"text": f"text {n}"}) for n in range(20)]
        (tmp_path / name).write_text("\n".join(["text", *map(str, range(20))] if name == "b.csv" else rows))
    for source, told in (("a.jsonl", True), ("b.csv", True), ("text/c.txt", False), ("text/d.json", True)):
        out, lines = tmp_path / f"{Path(source).stem}-out", []
        heldout: Any = {"heldout": 0.0}
        prepare(f"{tmp_path}/{source}", out, tokenizer="byte", **heldout)
        of_shards = config(out, **heldout)
        assert cached(of_shards, tmp_path / "cache", lines.append) == out
        assert lines == []
        meta = json.loads((out / "meta.json").read_text())
        del meta["column"], meta["content"]
        (out / "meta.json").write_text(json.dumps(meta))
        assert cached(of_shards, tmp_path / "cache", lines.append) == out
        assert [line.partition(" was ")[0] for line in lines] == [str(out)] * told
        assert all(f"an older reader, which may have read other text of the rows of {tmp_path}" in s for s in lines)


def test_shards_whose_text_has_changed_say_so_and_are_read_as_they_are(corpus: Path, tmp_path: Path):
    told: list[str] = []
    prepare(str(corpus), tmp_path / "out", tokenizer="byte", heldout=0.2)
    of_shards = config(tmp_path / "out")
    os.utime(corpus / "3.txt", (time.time() + 60,) * 2)  # touched, and the same
    assert cached(of_shards, tmp_path / "cache", told.append) == tmp_path / "out"
    assert told == []
    write_later(corpus / "3.txt", "another text")
    assert cached(of_shards, tmp_path / "cache", told.append) == tmp_path / "out"
    (line,) = told
    assert line.startswith(f"{tmp_path}/out is what {corpus} was when it was prepared, and that text has changed since")
    assert "another" not in "".join(
        store.tokenizer.decode(store.read(0, store.n_tokens))
        for store in map(open_shards(tmp_path / "out").split, ("train", "heldout"))
    )
    for path in corpus.iterdir():
        path.unlink()
    assert cached(of_shards, tmp_path / "cache", told.append) == tmp_path / "out"
    assert len(told) == 1  # text that is gone, or on another machine, was not changed


@pytest.mark.parametrize("many", [False, True])
def test_text_that_changes_while_it_is_read_is_not_kept(many: bool, corpus: Path, tmp_path: Path, monkeypatch):
    build = writing.build

    def meanwhile(spec: str, texts: Any) -> Any:
        built = build(spec, texts)
        (corpus / "3.txt").write_text("another text")
        return built

    monkeypatch.setattr(writing, "build", meanwhile)
    (tmp_path / "other.txt").write_text(TEXT)
    uri = f"{corpus}:1,{tmp_path}/other.txt:1" if many else str(corpus)
    spec = "train:258" if many else "byte"
    with pytest.raises(ValueError, match=rf"{corpus} changed while it was read; wait until it is whole"):
        cached_sources(config(uri, tokenizer=spec), tmp_path / "cache")
    assert not any(path.name == "meta.json" for path in (tmp_path / "cache").rglob("*"))
    assert not list((tmp_path / "cache").glob("tokenizer-*"))


def test_a_mixture_is_prepared_source_by_source(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is a mixture, and prepare takes one source; .* --tokenizer A/tokenizer"):
        prepare("a.txt:1,b.txt:2", tmp_path / "out")
    assert not list(tmp_path.iterdir())
