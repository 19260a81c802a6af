"""Where text comes from: `documents(uri)` reads it one by one, `fingerprint(uri)` tells its content.

    builtin:python                      the standard library of the Python that runs: always there, offline
    builtin:numbers  builtin:brackets   questions with their answers, made by `generated.py`
    tales.txt   src/**/*.rs   folder    text files: one, those of a pattern, all below a folder
    chats.jsonl   part.parquet          records with a `text` field
    hf://datasets/...   s3://...        any of these at an address that fsspec reads

A file may be compressed (.gz .bz2 .xz .zst).
"""

import hashlib
import io
import itertools
import json
import lzma
import os
import posixpath
import re
import sysconfig
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.compression import compr
from fsspec.implementations.local import LocalFileSystem

from llm_jax.data.generated import GENERATED
from llm_jax.data.tokenizer import END_OF_TEXT

BUILTIN = "builtin:python"
BUILTIN_BYTES = 2_000_000
# Tests and tables teach a model little, and what a machine generated or installed differs between machines.
NOT_BUILTIN = re.compile(
    r"__pycache__|tests?|idlelib|encodings|pydoc_data|lib2to3|distutils|ensurepip|turtledemo|(site|dist)-packages"
    r"|config-.*|_sysconfigdata.*"
)
HIDDEN = re.compile(r"/(\.|__pycache__/)")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell and UTF-8 cannot
BLOCK_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """A text, never empty, and where it stands: its file, and its number in it."""

    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class File:
    """One file of a source; `name` is its path below the folder that all of them share."""

    system: fsspec.AbstractFileSystem
    path: str
    name: str


def documents(uri: str, separator: str | None = None) -> Iterator[Document]:
    r"""The documents of `uri`, in an order that never changes.

    A text file is cut at `<|endoftext|>` where that stands in it, and is one document where it doesn't. With
    a `separator`, `"\n\n"` say, it is cut after every run of that instead: the documents joined are the file.
    Raises `ValueError` for what is missing, empty, damaged, or not text.
    """
    if separator == "":
        raise ValueError(r"separator='' cuts nowhere; use $'\n\n' to cut at blank lines, or leave it out")
    if uri in GENERATED:
        if separator is not None:
            raise ValueError(f"separator={separator!r} cuts text, and {uri} comes as documents; leave it out")
        yield from (Document(text, f"{uri}#{number}") for number, text in enumerate(GENERATED[uri]()))
        return
    empty = True
    for file in _files(uri):
        texts = (text for text in _texts(file, separator) if text)
        for number, text in enumerate(texts):
            empty = False
            yield Document(text, f"{file.name}#{number}")
    if empty:
        raise ValueError(f"{uri} has no text in it: expected at least one document; name another source")


def fingerprint(uri: str) -> str:
    """Hex digest of the content of `uri`; of a remote file, of what its store tells (size, date)."""
    digest = hashlib.sha256()
    if uri in GENERATED:
        digest.update("\0".join(GENERATED[uri]()).encode())
        return digest.hexdigest()
    for file in _files(uri):
        digest.update(file.name.encode() + b"\0")
        if isinstance(file.system, LocalFileSystem):
            with open(file.path, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        else:
            digest.update(str(file.system.ukey(file.path)).encode())
    return digest.hexdigest()


def last_written(uri: str) -> float:
    """When the newest file of `uri` was written, in seconds since 1970; 0 where none is on this machine."""
    if uri in GENERATED or "://" in uri:
        return 0.0
    try:
        return max(os.path.getmtime(file.path) for file in _files(uri))
    except (ValueError, OSError):
        return 0.0


def holds_records(uri: str) -> bool:
    """Whether `uri` names records, such as JSON lines, which no separator cuts."""
    return uri in GENERATED or any(_suffix(file.path) in RECORDS for file in _files(uri))


def _files(uri: str) -> list[File]:
    if uri == BUILTIN:
        return _standard_library()
    try:
        return _files_at(uri)
    except ImportError as error:
        raise ValueError(f"cannot read {uri}: {error}; for hf:// install llm-jax[hf]") from error
    except OSError as error:
        raise ValueError(f"cannot read {uri}: {error}; mend that, or name another address") from error


def _files_at(uri: str) -> list[File]:
    system, path = fsspec.url_to_fs(uri)
    if system.isfile(path):
        paths = [path]
    elif system.isdir(path):
        shown = [found for found in system.find(path) if not HIDDEN.search(found.removeprefix(path))]
        # A data set lies beside its README; a corpus of text files has no records.
        paths = [found for found in shown if _suffix(found) in RECORDS] or shown
    else:
        paths = [found for found in system.glob(path) if system.isfile(found)]
    if not paths:
        known = ", ".join((BUILTIN, *GENERATED))
        raise ValueError(f"no data at {uri!r}; expected a file, a folder, a pattern, an address or {known}")
    root = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return [File(system, path, posixpath.relpath(path, root)) for path in sorted(paths)]


def _standard_library() -> list[File]:
    root = sysconfig.get_path("stdlib")
    paths = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not NOT_BUILTIN.fullmatch(name)]
        sources = [name for name in names if name.endswith(".py") and not NOT_BUILTIN.match(name)]
        paths += [os.path.join(folder, name) for name in sources]
    size = sum(map(os.path.getsize, paths))
    if size < BUILTIN_BYTES:
        raise ValueError(
            f"{BUILTIN} expected {BUILTIN_BYTES:,} bytes or more of Python source in {root}, found {size:,}; "
            "use a Python that comes with its library's source, or name a text file"
        )
    system = fsspec.filesystem("file")
    return [File(system, path, os.path.relpath(path, root)) for path in sorted(paths)]


def _texts(file: File, separator: str | None) -> Iterator[str | None]:
    read = RECORDS.get(_suffix(file.path))
    if read is None:
        return _cut_apart(_blocks(file), separator)
    if separator is not None:
        raise ValueError(f"separator={separator!r} cuts text, and {file.path} holds records; leave it out")
    return read(file)


def _suffix(path: str) -> str:
    """What a file holds, whatever compresses it: `.jsonl` of `chats.jsonl.gz`."""
    stem, suffix = posixpath.splitext(path)
    return posixpath.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def _open(file: File) -> Any:
    compression = COMPRESSIONS.get(posixpath.splitext(file.path)[1])
    if compression not in compr:
        raise ValueError(f"cannot read {file.path}: {compression} needs a package; install zstandard")
    return file.system.open(file.path, "rb", compression=compression)


def _blocks(file: File) -> Iterator[str]:
    """The text of a file, a block at a time, line ends as they are."""
    try:
        with _open(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            while block := text.read(BLOCK_CHARS):
                if "\0" in block:
                    raise _not_text(file, "a zero byte")
                yield block
    except UnicodeDecodeError as error:
        raise _not_text(file, f"the byte 0x{error.object[error.start]:02x}, not UTF-8") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"cannot read {file.path}: {error}; is it whole?") from error


def _not_text(file: File, found: str) -> ValueError:
    return ValueError(f"{file.path} is not text: found {found}; choose by a pattern, such as 'folder/**/*.txt'")


def _cut_apart(blocks: Iterable[str], separator: str | None) -> Iterator[str]:
    """The documents of a text file, as `documents` says."""
    if separator is not None:
        yield from _cut_after(blocks, separator)
        return
    cut = False
    for part in _cut_after(blocks, END_OF_TEXT):
        text, mark, _ = part.partition(END_OF_TEXT)
        cut = cut or bool(mark)
        yield text.strip("\n") if cut else text  # the mark stands on a line of its own


def _cut_after(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """A text in parts, each but the last ending with a run of `separator`. Holds one part and one block."""
    runs = re.compile(f"(?:{re.escape(separator)})+")
    rest, searched = "", 0
    for block in itertools.chain(blocks, [""]):
        rest += block
        # A run that ends so late may go on in the next block; there is none after the empty one.
        last_end = len(rest) - len(separator) if block else len(rest)
        start = 0
        for run in runs.finditer(rest, searched):
            searched = run.start()
            if run.end() > last_end:
                break
            yield rest[start : run.end()]
            start = run.end()
        else:
            searched = max(start, len(rest) - len(separator) + 1)
        rest, searched = rest[start:], searched - start
    yield rest


def _json_lines(file: File) -> Iterator[str | None]:
    column, number = None, 1
    for lines in _cut_after(_blocks(file), "\n"):
        where = f"{file.path}, line {number},"
        number += lines.count("\n")
        if not lines.strip():
            continue
        try:
            record = json.loads(lines)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error.msg}); expected one object a line") from None
        if not isinstance(record, dict):
            raise ValueError(f'{where} is not an object; expected one a line, such as {{"text": "..."}}')
        if column is None:
            column = _text_field(record, [name for name in record if isinstance(record[name], str)], where)
        text = record.get(column, ...)
        if not isinstance(text, str | None):
            raise ValueError(f"{where} has no string in its field {column!r}; mend the line or take it out")
        yield text and SURROGATE.sub("\ufffd", text)


def _parquet(file: File) -> Iterator[str | None]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        raise ValueError(f"cannot read {file.path}: parquet needs pyarrow; install llm-jax[hf]") from error
    try:
        with _open(file) as raw:
            table = parquet.ParquetFile(raw)
            kinds = {field.name: field.type for field in table.schema_arrow}
            strings = [name for name, kind in kinds.items() if types.is_string(kind) or types.is_large_string(kind)]
            column = _text_field(list(kinds), strings, file.path)
            if column not in strings:
                raise ValueError(f"{file.path} holds {kinds[column]} in its column {column!r}; make them strings")
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"cannot read {file.path}: {error}; is it whole?") from error


RECORDS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}


def _text_field(names: Collection[str], strings: list[str], where: str) -> str:
    """`text`, or else the only field that holds strings."""
    if "text" in names:
        return "text"
    if len(strings) != 1:
        found = ", ".join(map(repr, names)) or "none"
        raise ValueError(f"{where} has no field 'text' but {found}; rename the one to train on")
    return strings[0]
