"""Thousands of damaged and odd files of every format: each gives documents or one line that says what is wrong.

Seeded, so that a failure comes again: its message names the case.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import random
import re
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from llm_jax.data.prepare import prepare
from llm_jax.data.shards import open_shards
from llm_jax.data.sources import documents, fingerprint, holds_records

zstandard = pytest.importorskip("zstandard")
pytestmark = pytest.mark.slow

SECONDS = 60  # for one file, on a machine that does other things too
WORDS = ["once", "upon é", "a 🐈", "", "time, said", 'the "cat"', "and\nthe", "end\r\n", "<|endoftext|>", "x" * 300]
ODD: list[bytes] = [
    b"[" * 5000,
    b'{"a":' * 5000,
    b"9" * 5000,
    b'"',
    b"\0",
    b"\xff",
    b"\r",
    b"\n\n",
    b"\xef\xbb\xbf",
    b'{"text": [{"role": "user", "content": "x"}]}\n',
    b'{"text": 5}\n',
    b'{"messages": null, "content": "c"}\n',
    b"]",
    b",",
    b"\t",
    b"\\ud800",
    b"NaN",
    b"-1e999",
    b"<|endoftext|>",
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def rows(draw: random.Random) -> list[dict[str, Any]]:
    def text() -> str | None:
        return None if draw.random() < 0.1 else " ".join(draw.choices(WORDS, k=draw.randrange(6)))

    name = draw.choice(["text", "text", "content", "body"])
    return [{"id": number, name: text(), "url": "u"} for number in range(draw.randrange(30))]


def as_lines(draw: random.Random) -> bytes:
    return b"".join(json.dumps(row).encode() + draw.choice([b"\n", b"\r\n"]) for row in rows(draw))


def as_array(draw: random.Random) -> bytes:
    found = rows(draw)
    return json.dumps(draw.choice([found, found, {"data": found}]), indent=draw.choice([None, 2])).encode()


def as_table(mark: str) -> Callable[[random.Random], bytes]:
    def make(draw: random.Random) -> bytes:
        fields = [[str(value or "") for value in row.values()] for row in rows(draw)]
        if mark == ",":
            fields = [['"' + field.replace('"', '""') + '"' for field in row] for row in fields]
        else:
            fields = [[" ".join(field.split()) for field in row] for row in fields]
        return "\n".join(map(mark.join, [["id", "text", "url"], *fields])).encode()

    return make


def as_parquet(draw: random.Random) -> bytes:
    table = pyarrow.Table.from_pylist(rows(draw) or [{"text": "a"}])
    out = io.BytesIO()
    options = {"compression": draw.choice(["none", "snappy", "zstd"]), "use_dictionary": draw.random() < 0.5}
    parquet.write_table(table, out, row_group_size=draw.choice([3, 100]), write_page_checksum=True, **options)
    return out.getvalue()


def as_text(draw: random.Random) -> bytes:
    return "".join(draw.choices(WORDS, k=draw.randrange(40))).encode()


MAKE: dict[str, Callable[[random.Random], bytes]] = {
    ".txt": as_text,
    ".jsonl": as_lines,
    ".json": as_array,
    ".csv": as_table(","),
    ".tsv": as_table("\t"),
    ".parquet": as_parquet,
}


def damaged(data: bytes, draw: random.Random) -> bytes:
    """`data` after one or a few accidents."""
    for _ in range(draw.choice([0, 1, 1, 1, 2, 4])):
        start, stop = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        match draw.randrange(7):
            case 0:
                data = data[:start]
            case 1:
                data = data[:start] + data[stop:]
            case 2:
                data = data[:stop] + data[start:]
            case 3 | 4 if data:
                at = min(start, len(data) - 1)
                data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
            case 5:
                data = data[:start] + draw.choice(ODD) + data[start:]
            case _:
                data = data[:start] + draw.randbytes(draw.randrange(9)) + data[stop:]
    return data


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(case: str, read: Callable[[], Any]) -> str:
    """Whether `read` gave something or was refused, in one line; all else fails the test."""
    try:
        with time_limit():
            read()
    except ValueError as error:
        line = str(error)
        assert line.isprintable(), f"{case}: {line!r}"
        assert 10 < len(line) < 1500, f"{case}: {line!r}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"{case}: {error!r}") from error
    return "read"


def check_documents(uri: str, **options: Any) -> None:
    seen = set()
    for document in documents(uri, report=lambda line: line.encode().decode(), **options):
        assert document.text
        document.text.encode()
        assert document.origin not in seen
        seen.add(document.origin)


@pytest.mark.parametrize("suffix", MAKE)
def test_a_damaged_file_gives_documents_or_one_line(suffix: str, tmp_path: Path):
    draw = random.Random(suffix)
    found = []
    for number in range(500):
        compression = draw.choice(["", *COMPRESS])
        data = MAKE[suffix](draw)
        inside = draw.random() < 0.5
        data = damaged(data, draw) if inside else data
        data = COMPRESS[compression](data)
        data = data if inside else damaged(data, draw)
        path = tmp_path / f"a{suffix}{compression}"
        path.write_bytes(data)
        options = draw.choice([{}, {}, {}, {"column": "url"}, {"separator": "\n\n"}])
        found.append(outcome(f"{path.name} of case {number}", lambda: check_documents(str(path), **options)))  # noqa: B023
        path.unlink()
    assert min(found.count("read"), found.count("refused")) > 50


MANY = 4_000_000
LONG = {
    ".txt": [b"\n" * MANY, b"\r" * MANY, b"<|endoftext|>" * (MANY // 13), b"<" * MANY],
    ".json": [
        b" " * MANY,
        b"[" * MANY,
        b'{"a":' * MANY,
        b'{"text": "' + b"\\n" * MANY,
        b"[{}" + b",{}" * (MANY // 800),
    ],
    ".csv": [b"text\n" + b'"' * MANY, b'text\n"' + b"a\n" * MANY, b",".join(b"%d" % n for n in range(MANY // 8))],
    ".tsv": [b"\t" * MANY, b"text\n" * (MANY // 800), b"text" + b"a" * MANY],
}


@pytest.mark.parametrize("suffix", LONG)
def test_much_of_one_thing_takes_no_more_than_its_share_of_time(suffix: str, tmp_path: Path):
    for number, data in enumerate(LONG[suffix]):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(data)
        for options in [{}, {"separator": "\n\n"}] if suffix == ".txt" else [{}]:
            outcome(f"{path.name} of {number}", lambda: check_documents(str(path), **options))  # noqa: B023


NAMES = ["text", "content", "id", "messages", "role", "value", "from", "data", "", "\ud800", "a b"]
SCALARS: list[Any] = [None, True, 0, -(10**400), 1.5, float("nan"), float("-inf"), "", "a", "\ud800é\n", "\0"]


def shape(draw: random.Random, depth: int) -> Any:
    """A value of JSON, whatever it is."""
    kind = draw.randrange(4) if depth else 0
    if kind < 2:
        return draw.choice(SCALARS)
    inner = [shape(draw, depth - 1) for _ in range(draw.randrange(4))]
    return inner if kind == 2 else dict(zip(draw.sample(NAMES, len(inner)), inner, strict=True))


def replaced(text: Any) -> Any:
    """`text` as UTF-8 can spell it; what is no string stays what it is, and equals none."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text) if isinstance(text, str) else text


def test_json_of_any_shape_gives_the_strings_of_one_column_or_one_line():
    draw, found = random.Random("shapes"), []
    memory = fsspec.filesystem("memory")
    for _ in range(3000):
        values = [shape(draw, 4) for _ in range(draw.randrange(4))]
        if draw.random() < 0.7:
            odd = draw.choice([4, 6])
            texts = ["a", "\ud800é\n", "", None, 5, [{"from": "x", "value": "y"}]][:odd]
            values = [value | {"text": draw.choice(texts)} for value in values if isinstance(value, dict)]
        whole = json.dumps(values) if draw.random() < 0.5 else "\n".join(map(json.dumps, values))
        memory.pipe("/shapes/a.json", whole.encode())
        given: list[str] = []
        found.append(outcome(whole, lambda: given.extend(one.text for one in documents("memory://shapes"))))  # noqa: B023
        if found[-1] == "read":
            columns = [[row.get(name) for row in values] for name in ("text", "content")]
            assert given in [list(map(replaced, filter(None, column))) for column in columns]
    assert min(found.count("read"), found.count("refused")) > 50


def test_any_folder_gives_documents_or_one_line(tmp_path: Path):
    """Names that say one thing and contents that are another; patterns; and the two questions that come first."""
    draw = random.Random("folders")
    suffixes = [*MAKE, ".md", ".py", "", ".JSON", ".gz", ".zst", ".tar.gz"]
    for number in range(250):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in draw.choices(["a", "b", "README", "dataset_infos", ".hidden", "c/d", "[e]*?"], k=draw.randrange(5)):
            path = folder / f"{name}{draw.choice(suffixes)}{draw.choice(['', '', *COMPRESS])}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(damaged(draw.choice(list(MAKE.values()))(draw), draw))
        uri = str(folder) + draw.choice(["", "/", "/*", "/**", "/*.json*", "/[ab]*", "/[e]*?.txt"])
        for read in (check_documents, fingerprint, holds_records):
            outcome(f"{uri} with {sorted(folder.rglob('*'))}", lambda: read(uri))  # noqa: B023
        shutil.rmtree(folder)


def test_any_address_gives_documents_or_one_line(tmp_path: Path, monkeypatch):
    draw = random.Random("addresses")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "zipped")
    starts = ["", "memory://", "zip://", "tar://", "data:", "reference://", "dir://", "simplecache::", "foo://", "a::"]
    tokens = [
        "a.txt",
        "a.zip",
        "a",
        "*",
        "?",
        "[",
        "]",
        "::",
        "://",
        ":",
        "@",
        "#",
        "%00",
        "\0",
        "\n",
        "\udcff",
        "é",
        "x" * 300,
    ]
    for number in range(1500):
        uri = draw.choice(starts) + draw.choice(["a", "b"]) + "".join(draw.choices(tokens, k=draw.randrange(5)))
        for read in (check_documents, fingerprint, holds_records):
            outcome(f"{uri!r} of case {number}", lambda: read(uri))  # noqa: B023


def test_what_is_prepared_of_damaged_files_opens_or_was_refused(tmp_path: Path):
    draw = random.Random("prepare")
    found = []
    for number in range(60):
        suffix = draw.choice(list(MAKE))
        path, out = tmp_path / f"a{suffix}", tmp_path / "out"
        path.write_bytes(damaged(MAKE[suffix](draw), draw))
        tokenizer = draw.choice(["byte", "char", "train:300"])
        made = outcome(f"case {number}", lambda: prepare(str(path), out, tokenizer=tokenizer, heldout=0.0))  # noqa: B023
        found.append(made)
        assert out.exists() == (made == "read")
        if made == "read":
            store = open_shards(out).split("train")
            texts = [document.text for document in documents(str(path))]
            assert store.n_documents == len(texts)
            assert store.document_bytes.tolist() == [len(text.encode()) for text in texts]
            shutil.rmtree(out)
        path.unlink()
    assert min(found.count("read"), found.count("refused")) > 10
