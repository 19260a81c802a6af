"""What goes into shards comes out of them; whole folders or none; damage is named."""

import contextlib
import dataclasses
import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest

from llm_jax.data import prepare as writing
from llm_jax.data import shards, tokenizer
from llm_jax.data.config import DataConfig, check_heldout
from llm_jax.data.prepare import cached, prepare
from llm_jax.data.shards import open_shards
from llm_jax.data.sources import documents
from llm_jax.data.tokenizer import END_OF_TEXT

STORIES = [f"Story {number} of é and 🐈. " * (number % 7 + 1) for number in range(200)]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write(tmp_path / "corpus.txt", STORIES)


def write(path: Path, stories: list[str]) -> str:
    path.write_text(END_OF_TEXT.join(stories))
    return str(path)


def stories(folder: Path, split: str) -> list[str]:
    """The documents of a split, decoded, with the end of text that follows each."""
    opened = open_shards(folder)
    store = opened.split(split)
    bounds = zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True)
    return [opened.tokenizer.decode(store.read(start, stop)) for start, stop in bounds]


@pytest.mark.parametrize("spec", ["byte", "char", "train:300"])
def test_every_document_comes_back_on_one_side(spec: str, corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer=spec, heldout=0.2)
    train, heldout = (stories(tmp_path / "out", split) for split in shards.SPLITS)
    assert sorted(train + heldout) == sorted(story + END_OF_TEXT for story in STORIES)
    assert 20 < len(heldout) < 60
    assert [story for story in STORIES if story + END_OF_TEXT in train] == [
        story.removesuffix(END_OF_TEXT) for story in train
    ]


def test_without_end_of_text_the_stream_is_the_text(corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer="byte", end_of_text=False, heldout=0.0)
    opened = open_shards(tmp_path / "out")
    store = opened.split("train")
    assert opened.tokenizer.decode(store.read(0, store.n_tokens)) == "".join(STORIES)
    assert opened.split("heldout").n_tokens == 0


def test_the_manifest_counts_what_is_there(corpus: str, tmp_path: Path):
    manifest = prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.2)
    assert open_shards(tmp_path / "out").manifest == manifest
    assert sum(split.documents for split in manifest.splits.values()) == len(STORIES)
    assert sum(split.bytes for split in manifest.splits.values()) == sum(len(story.encode()) for story in STORIES)
    for name, split in manifest.splits.items():
        store = open_shards(tmp_path / "out").split(name)
        assert split.tokens == split.bytes + split.documents  # of bytes, each document has one token more
        assert (store.n_tokens, store.n_documents, store.n_bytes) == (
            split.tokens,
            split.documents,
            split.bytes,
        )
        assert store.document_bytes.tolist() == (np.diff(store.offsets) - 1).tolist()


def test_copies_of_a_document_never_stand_on_both_sides(tmp_path: Path):
    prepare(write(tmp_path / "a.txt", STORIES * 3), tmp_path / "out", tokenizer="byte", heldout=0.3)
    train, heldout = (set(stories(tmp_path / "out", split)) for split in shards.SPLITS)
    assert not train & heldout
    assert len(heldout) > 30


def test_a_document_stays_on_its_side_as_the_corpus_grows(tmp_path: Path):
    for name, part in (("small", STORIES[:100]), ("large", STORIES[::-1])):
        prepare(write(tmp_path / f"{name}.txt", part), tmp_path / name, tokenizer="byte", heldout=0.3)
    for split in shards.SPLITS:
        assert set(stories(tmp_path / "small", split)) < set(stories(tmp_path / "large", split))


def test_the_tail_is_the_last_documents_by_bytes(corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.25, heldout_by="tail")
    train, heldout = (stories(tmp_path / "out", split) for split in shards.SPLITS)
    assert [story.removesuffix(END_OF_TEXT) for story in train + heldout] == STORIES
    size, last = (sum(len(story.encode()) for story in part) for part in (STORIES, STORIES[-len(heldout) :]))
    assert 0.24 * size < last <= 0.25 * size


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_tokens_take_two_bytes_where_every_id_fits(vocab_size: int, dtype: str, tmp_path: Path):
    alphabet = "".join(map(chr, range(0x20000, 0x20000 + vocab_size - 1)))
    text = write(tmp_path / "a.txt", [alphabet])
    prepare(text, tmp_path / "out", tokenizer="char", heldout=0.0)
    assert np.load(tmp_path / "out" / "train_00000.npy").dtype == dtype
    assert open_shards(tmp_path / "out").split("train").read(0, vocab_size).tolist() == list(range(vocab_size))


def test_reading_crosses_shards_and_ends_with_the_stream(corpus: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_TOKENS", 500)
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.0)
    store = open_shards(tmp_path / "out").split("train")
    assert len(list((tmp_path / "out").glob("train_0*.npy"))) > 10
    whole = store.read(0, store.n_tokens)
    assert tokenizer.ByteTokenizer().decode(whole) == "".join(story + END_OF_TEXT for story in STORIES)
    for start, stop in [(0, 1), (490, 2600), (5, 5), (store.n_tokens - 3, store.n_tokens + 9)]:
        assert store.read(start, stop).tolist() == whole[start:stop].tolist()
    index = np.array([[-1, 0, 700], [store.n_tokens - 1, store.n_tokens, 1]])
    assert store.take(index).tolist() == [[0, whole[0], whole[700]], [whole[-1], 0, whole[1]]]
    assert whole.dtype == np.int32


def test_every_token_knows_its_document(corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.0)
    store = open_shards(tmp_path / "out").split("train")
    of = np.repeat(np.arange(len(STORIES)), [len(story.encode()) + 1 for story in STORIES])
    assert store.documents_of(np.arange(len(of))).tolist() == of.tolist()
    assert store.documents_of(np.array([[-1, 0], [len(of) - 1, len(of)]])).tolist() == [[-1, 0], [199, 200]]


def test_a_document_names_where_it_came_from(corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.2)
    store = open_shards(tmp_path / "out").split("heldout")
    (origin,) = store.origins([3])
    (document,) = [document for document in documents(corpus) if document.origin == origin]
    assert document.text + END_OF_TEXT == stories(tmp_path / "out", "heldout")[3]


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_special_tokens_in_text_are_read_where_asked_and_else_said(tokenizer: str, tmp_path: Path):
    texts, said = [f"one {i}<|endoftext|>two" for i in range(9)], []
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stores = {}
    for special in (False, True):
        out = tmp_path / str(special)
        options = {"tokenizer": tokenizer, "heldout": 0.0, "special": special}
        prepare(str(tmp_path / "a.jsonl"), out, **options, report=said.append if special is False else [].append)
        stores[special] = open_shards(out).split("train")
    ends = [int((store.read(0, 10**6) == store.tokenizer.end_of_text).sum()) for store in stores.values()]
    assert ends == [9, 18]
    warning = "spells <|endoftext|>, which is read as text; for the token set data.special=true"
    assert sum(warning in line for line in said) == 1
    for store in stores.values():
        assert store.tokenizer.decode(store.read(0, int(store.offsets[1]) - 1)) == texts[0]


def test_shards_with_and_without_special_tokens_are_apart(corpus: str, tmp_path: Path):
    config = DataConfig(uri=corpus, tokenizer="byte", heldout=0.2)
    folder = cached(config, tmp_path)
    assert folder != cached(dataclasses.replace(config, special=True), tmp_path)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["special"]  # as it was then
    (folder / "meta.json").write_text(json.dumps(meta))
    assert cached(dataclasses.replace(config, uri=str(folder)), tmp_path) == folder
    with pytest.raises(ValueError, match=r"prepared with .*special=False, and the config has .*special=True"):
        cached(dataclasses.replace(config, uri=str(folder), special=True), tmp_path)


def test_preparing_twice_gives_the_same_bytes(corpus: str, tmp_path: Path):
    first, second = (prepare(corpus, tmp_path / out, tokenizer="train:300", heldout=0.2) for out in ("a", "b"))
    assert first == second


FILES = [
    "train_00000.npy",
    "heldout_00000.npy",
    "train_offsets.npy",
    "heldout_bytes.npy",
    "train_origins.txt",
]


@pytest.mark.parametrize("name", FILES)
def test_damage_names_the_file(name: str, corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.2)
    path = tmp_path / "out" / name
    data = path.read_bytes()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name} is damaged or missing; delete"):
            open_shards(tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged or missing; delete"):
        open_shards(tmp_path / "out")


def test_a_tokenizer_that_did_not_make_the_tokens_is_refused(corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.2)
    tokenizer.CharTokenizer("ab").save(tmp_path / "out" / "tokenizer")
    with pytest.raises(ValueError, match="did not make these tokens"):
        _ = open_shards(tmp_path / "out").tokenizer


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (None, "no shards in .* expected a meta.json"),
        ("{", "is not JSON"),
        ('{"format": 0}', "format 0, expected 1"),
    ],
)
def test_a_folder_that_is_no_shards_says_what_is_wrong(meta: str | None, message: str, tmp_path: Path):
    if meta is not None:
        (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(ValueError, match=message):
        open_shards(tmp_path)


def test_an_existing_folder_is_left_alone(corpus: str, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        prepare(corpus, tmp_path / "out", tokenizer="byte")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"No space left on device \([\d,]+ bytes free without it\); make",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; fix that, or name another folder$"),
    ],
)
def test_a_full_disk_leaves_no_files(error: OSError, reason: str, corpus: str, tmp_path: Path, monkeypatch):
    save, room = np.save, iter([True, False])

    def until_full(path: Path, values: np.ndarray) -> None:
        if not next(room):
            raise error
        save(path, values)

    monkeypatch.setattr(np, "save", until_full)
    with pytest.raises(ValueError, match=rf"cannot write .*out: {reason}"):
        prepare(corpus, tmp_path / "deep" / "out", tokenizer="byte")
    assert not list((tmp_path / "deep").iterdir())


def test_a_source_that_breaks_off_leaves_no_files(corpus: str, tmp_path: Path):
    with open(corpus, "ab") as file:
        file.write(b"\xff")
    with pytest.raises(ValueError, match="is not text"):
        prepare(corpus, tmp_path / "out", tokenizer="byte")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heldout": 0.05}, "leaves 1 documents to train on and 0 held out; cut .* separator"),
        ({"heldout": 0.05, "heldout_by": "tail"}, "leaves 1 documents to train on and 0 held out"),
        ({"heldout": 0.999999999}, "leaves 0 documents to train on and 1 held out"),
        ({"heldout": 1.0}, "heldout=1 is not a fraction"),
    ],
)
def test_a_split_without_two_sides_is_refused(settings: dict, message: str, tmp_path: Path):
    text = write(tmp_path / "one.txt", ["one story"])
    with pytest.raises(ValueError, match=message):
        prepare(text, tmp_path / "out", tokenizer="byte", **settings)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_choice_names_the_nearest():
    with pytest.raises(ValueError, match="heldout_by='tial' is not known; did you mean 'tail'"):
        check_heldout(0.1, "tial")


def config(uri: str, **settings) -> DataConfig:
    return DataConfig(uri=uri, tokenizer="byte", heldout=0.2, **settings)


def test_a_cached_corpus_is_prepared_once(corpus: str, tmp_path: Path):
    lines: list[str] = []
    folder = cached(config(corpus), tmp_path / "cache", lines.append)
    assert lines
    told = len(lines)
    other_rows = config(corpus, seq_len=9, batch_size=1, packing="windows", seed=1)
    assert cached(other_rows, tmp_path / "cache", lines.append) == folder
    assert len(lines) == told
    assert open_shards(folder).manifest.source == corpus


def test_another_content_or_setting_is_cached_apart(corpus: str, tmp_path: Path):
    cache = tmp_path / "cache"
    settings = [{}, {"end_of_text": False}, {"separator": " 1"}, {"heldout_by": "tail"}]
    folders = [cached(config(corpus, **other), cache) for other in settings]
    write(Path(corpus), [*STORIES, "one more"])
    folders.append(cached(config(corpus), cache))
    assert len(set(folders)) == 5


def rows(path: Path) -> str:
    path.write_text("".join(json.dumps({"text": story, "title": story[:9]}) + "\n" for story in [*STORIES, ""]))
    return str(path)


def test_another_column_is_other_shards(tmp_path: Path):
    source, cache = rows(tmp_path / "a.jsonl"), tmp_path / "cache"
    by_text, by_title = (cached(config(source, column=column), cache) for column in (None, "title"))
    assert by_text != by_title
    assert open_shards(by_title).manifest.column == "title"
    assert {len(story) for story in stories(by_title, "train")} == {len(STORIES[0][:9] + END_OF_TEXT)}
    with pytest.raises(ValueError, match=r"prepared with column='title', and the config has column=None; make them"):
        cached(config(str(by_title)), cache)


def test_shards_from_before_columns_are_read(corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.2)
    path = tmp_path / "out" / "meta.json"
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "column"})
    )
    assert cached(config(str(tmp_path / "out")), tmp_path / "cache") == tmp_path / "out"


def test_what_a_source_tells_is_said_once_however_often_it_is_read(tmp_path: Path):
    lines: list[str] = []
    source = rows(tmp_path / "a.jsonl")
    prepare(source, tmp_path / "out", tokenizer="train:300", heldout=0.2, heldout_by="tail", report=lines.append)
    told = [line for line in lines if line.startswith(source)]
    assert told == [
        f"{source}: the text is the column 'text'",
        f"{source}: 1 of 201 rows have no 'text' (first: line 201)",
    ]


def test_a_folder_of_shards_is_its_own_cache(corpus: str, tmp_path: Path):
    out = tmp_path / "out"
    prepare(corpus, out, tokenizer="byte", heldout=0.2)
    assert cached(config(str(out)), tmp_path / "cache") == out
    with pytest.raises(ValueError, match=r"prepared with end_of_text=True, and the config has end_of_text=False"):
        cached(config(str(out), end_of_text=False), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_saved_tokenizer_agrees_with_shards_of_its_ids_in_any_folder(corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.2)
    for spec, agrees in (("byte", True), ("char", False)):
        tokenizer.build(spec, lambda: STORIES).save(tmp_path / spec)
        there = dataclasses.replace(config(str(tmp_path / "out")), tokenizer=str(tmp_path / spec))
        with contextlib.nullcontext() if agrees else pytest.raises(ValueError, match="prepared with tokenizer='byte'"):
            assert cached(there, tmp_path / "cache") == tmp_path / "out"


def test_whoever_prepares_a_cached_corpus_first_is_believed(corpus: str, tmp_path: Path, monkeypatch):
    def slower(uri: str, out: Path, **settings):
        prepare(uri, out, **settings)  # another process
        return prepare(uri, out, **settings)

    monkeypatch.setattr(writing, "prepare", slower)
    assert open_shards(cached(config(corpus), tmp_path / "cache")).manifest.source == corpus


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 0}, "data.seq_len=0 leaves no tokens"),
        ({"batch_size": 0}, "data.batch_size=0 leaves no tokens"),
        ({"epochs": 0.0}, "data.epochs=0 allows no step"),
        ({"heldout": -0.1}, "heldout=-0.1 is not a fraction"),
    ],
)
def test_a_config_that_leaves_nothing_is_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(**settings)


def test_the_manifest_is_plain_json(corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.2)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["splits"]["train"]["files"].keys() >= {"train_00000.npy", "train_offsets.npy"}
    assert not list((tmp_path / "out").rglob("*.pkl"))


def edited(folder: Path, path: str, value: object) -> None:
    """Changes a field of meta.json; `...` takes it out."""
    meta = json.loads((folder / "meta.json").read_text())
    *groups, last = path.split("/")
    place = meta
    for group in groups:
        place = place[group]
    place[last] = value
    if value is ...:
        del place[last]
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 3, "says vocab_size=3, but the tokenizer has 257"),
        ("splits/train/tokens", 10**15, "says splits.train.tokens=1000000000000000, but its shards has"),
        ("splits/heldout/documents", 2, "says splits.heldout.documents=2, but heldout_bytes.npy has"),
        ("splits/train/bytes", 0, "says splits.train.bytes=0, but train_bytes.npy has"),
        ("splits/train/documents", "many", "'documents' is a string, expected an integer"),
        ("splits/train/tokens", True, "'tokens' is true or false, expected an integer"),
        ("splits/train/files", ["train_00000.npy"], "'files' is a list, expected an object"),
        ("splits/train/files/..%2fother.npy", "0" * 64, "names '..%2fother.npy', which is none of its files"),
        ("splits/train/files/train_offsets.npy", ..., "has no train_offsets.npy"),
        ("splits/train/files/train_offsets.npy", 7, "names 'train_offsets.npy', which is none"),
        ("splits/heldout", ..., "splits has no 'heldout'"),
        ("splits", [], "'splits' is a list, expected an object"),
        ("format", "1", "'format' is a string, expected an integer"),
        ("heldout", None, "'heldout' is null, expected an integer or a number"),
        ("tokenizer_fingerprint", ..., "has no 'tokenizer_fingerprint'"),
    ],
)
def test_a_manifest_that_is_untrue_is_refused_in_a_line(
    field: str, value: object, message: str, corpus: str, tmp_path: Path
):
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.2)
    edited(tmp_path / "out", field, value)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_shards(tmp_path / "out")
    assert "prepare the data again" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "meta", ["[]", "3", "null", '"a"', "{}", "[" * 10_000, '{"format": ' + "9" * 5000 + "}", "\xff"]
)
def test_a_manifest_of_any_other_shape_is_refused_in_a_line(meta: str, tmp_path: Path):
    (tmp_path / "meta.json").write_bytes(meta.encode("latin-1"))
    with pytest.raises(ValueError, match=r"meta.json .*; prepare the data again$"):
        open_shards(tmp_path)


def replaced(folder: Path, name: str, values: np.ndarray) -> None:
    """Puts other numbers into a file, with their checksum, as who made both could."""
    np.save(folder / name, values)
    edited(folder, f"splits/{name.split('_')[0]}/files/{name}", shards.sha256_of(folder / name))


def test_files_of_no_text_are_refused_though_their_checksums_are_right(corpus: str, tmp_path: Path):
    folder = tmp_path / "out"
    prepare(corpus, folder, tokenizer="byte", heldout=0.2)
    tokens, offsets = (np.load(folder / f"train_{what}.npy") for what in ("00000", "offsets"))
    beyond, back = tokens.copy(), offsets.copy()
    beyond[5], back[3] = 257, back[9]
    for name, values, message in (
        ("train_00000.npy", beyond, "train has the token 257, and its tokenizer has 0 to 256"),
        ("train_00000.npy", tokens.astype(np.int64), r"holds int64 \(.*\), expected a vector"),
        ("train_00000.npy", tokens[None], "expected a vector"),
        ("train_00000.npy", tokens[1:], "says splits.train.tokens="),
        ("train_offsets.npy", back, "does not divide"),
        ("train_offsets.npy", offsets + 1, "does not divide"),
        ("train_offsets.npy", offsets[:-1], "does not divide"),
        ("train_bytes.npy", np.zeros(3, np.int64), "says splits.train.documents="),
    ):
        kept = (folder / name).read_bytes(), (folder / "meta.json").read_text()
        replaced(folder, name, values)
        with pytest.raises(ValueError, match=message):
            open_shards(folder)
        (folder / name).write_bytes(kept[0])
        (folder / "meta.json").write_text(kept[1])
    open_shards(folder)


def test_a_file_that_is_no_array_is_named(corpus: str, tmp_path: Path):
    prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.2)
    (tmp_path / "out" / "train_bytes.npy").write_bytes(b"no array")
    edited(tmp_path / "out", "splits/train/files/train_bytes.npy", shards.sha256_of(tmp_path / "out/train_bytes.npy"))
    with pytest.raises(ValueError, match=r"train_bytes.npy is no array .*; prepare the data again"):
        open_shards(tmp_path / "out")


def test_a_manifest_of_before_or_after_this_version_opens(corpus: str, tmp_path: Path):
    manifest = prepare(corpus, tmp_path / "out", tokenizer="byte", heldout=0.2)
    edited(tmp_path / "out", "content", ...)
    edited(tmp_path / "out", "invented_later", 7)
    assert open_shards(tmp_path / "out").manifest == dataclasses.replace(manifest, content=None)
