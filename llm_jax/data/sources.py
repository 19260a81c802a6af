r"""Where text comes from: `documents(uri)` reads it one by one, `fingerprint(uri)` identifies its content.

    builtin:python                      the standard library of the Python that runs: always there, offline
    builtin:numbers  builtin:brackets   questions with their answers, made by `generated.py`
    tales.txt   src/**/*.rs   folder    text files: one, those of a pattern, all below a folder
    chats.jsonl   part.parquet   a.csv  rows with a column of text (`records.py`)
    hf://datasets/...   s3://...        any of these at an address that fsspec reads (`addresses.py`)

A file may be compressed (.gz .bz2 .xz .zst; `compressed.py`).
"""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fsspec.implementations.local import LocalFileSystem

from llm_jax.data.addresses import BUILTIN, RECORDS, TABLES, File, brief, files_at, reading, suffix_of
from llm_jax.data.compressed import read_text
from llm_jax.data.generated import GENERATED
from llm_jax.data.records import Tally, text_column, texts
from llm_jax.data.tokenizer_interface import END_OF_TEXT

__all__ = ["BUILTIN", "Document", "documents", "fingerprint", "holds_records", "last_written", "names_rows"]

# What shows that a file at an address has changed: not all stores put it into their key.
CHANGES = ("size", "ETag", "Content-MD5", "Digest", "Last-Modified")


@dataclass(frozen=True, slots=True)
class Document:
    """A text, never empty, and where it comes from: its file, and its number in it."""

    text: str
    origin: str


def documents(
    uri: str,
    separator: str | None = None,
    column: str | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> Iterator[Document]:
    r"""Yield the documents of `uri`, in an order that never changes.

    A text file is cut at every `<|endoftext|>`; without any it is one document. With a `separator` such as `"\n\n"` it
    is cut after every run of that instead: the documents joined are the file. A line end in the separator matches
    those of Unix and Windows.

    Of rows, one `column` is read, the same in all files; None: `text`, or else `content`. `report` gets a line that
    says which, how many rows have no text in it, and what is left out of a folder.

    Raise `ValueError` for what is missing, empty, damaged, or not text.
    """
    if uri in GENERATED:
        for name, value in (("separator", separator), ("column", column)):
            if value is not None:
                raise ValueError(f"{name}={value!r} cuts text, and {uri} comes as documents; leave it out")
        yield from (Document(text, f"{uri}#{number}") for number, text in enumerate(GENERATED[uri]()))
        return
    files, tally = open_files(uri, separator, column, report)
    empty = True
    for file in files:
        for document in documents_of(file, separator, tally):
            empty = False
            yield document
    if empty:
        raise no_text(uri)
    if tally.without:
        report(tally.line(uri, len(files)))


def documents_of(file: File, separator: str | None, tally: Tally) -> Iterator[Document]:
    """Yield the documents of one file of a source. Raise like `documents`, and count rows in `tally`."""
    found = (text for text in _texts(file, separator, tally) if text)
    return (Document(text, f"{file.name}#{number}") for number, text in enumerate(found))


def no_text(uri: str) -> ValueError:
    """Return the error of a source without documents."""
    return ValueError(f"{brief(uri)} has no text in it: expected at least one document; name another source")


def hash_of(document: bytes) -> int:
    """Return the first 64 bits of the sha256 of a document."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big")


def fingerprint(uri: str) -> str:
    """Return a hex digest of the content of `uri`; for a remote file, of what its store says (size, date).

    Raise `ValueError` if it can't be read.
    """
    digest = hashlib.sha256()
    if uri in GENERATED:
        digest.update("\0".join(GENERATED[uri]()).encode())
        return digest.hexdigest()
    for file in files_at(uri):
        digest.update(file.name.encode() + b"\0")
        with reading(file):
            if isinstance(file.system, LocalFileSystem):
                with open(file.path, "rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
            else:
                digest.update(str(file.system.ukey(file.path)).encode())
                info = file.system.info(file.path)
                digest.update(str([info.get(name) for name in CHANGES]).encode())
    return digest.hexdigest()


def last_written(uri: str) -> float:
    """Return when the newest file of `uri` was written, in seconds since 1970; 0 if none is on this machine."""
    if uri in GENERATED or "://" in uri:
        return 0.0
    try:
        return max(os.path.getmtime(file.path) for file in files_at(uri))
    except (ValueError, OSError):
        return 0.0


def holds_records(uri: str) -> bool:
    """Return whether `uri` names records, such as JSON lines, which no separator cuts. Raise like `files_at`."""
    return uri in GENERATED or any(file.holds_records for file in files_at(uri))


def names_rows(uri: str) -> bool:
    """Return whether `uri` names rows, by its suffix or by what is on this machine; no remote store is asked."""
    if suffix_of(uri) in (*RECORDS, *TABLES):
        return True
    try:
        return "://" not in uri and uri not in GENERATED and holds_records(uri)
    except (ValueError, OSError):
        return False


def open_files(
    uri: str, separator: str | None, column: str | None, report: Callable[[str], object]
) -> tuple[list[File], Tally]:
    """Return the files of `uri`, and an empty tally of their rows for the column that is their text.

    Raise like `documents`.
    """
    if separator == "":
        raise ValueError(r"separator='' cuts nowhere; use $'\n\n' to cut at blank lines, or leave it out")
    files = files_at(uri, report)
    records = [file for file in files if file.holds_records]
    if column is not None and not records:
        raise ValueError(f"column={column!r} names one of rows, and {brief(uri)} is text without any; leave it out")
    tally = Tally(text_column(uri, records, column) if records else "")
    if records:
        report(f"{brief(uri)}: the text is the column {tally.column!r}")
    return files, tally


def _texts(file: File, separator: str | None, tally: Tally) -> Iterator[str]:
    if not file.holds_records:
        return _cut_apart(read_text(file), separator)
    if separator is not None:
        raise ValueError(f"separator={separator!r} cuts text, and {file} holds records; leave it out")
    return texts(file, tally)


def _cut_apart(blocks: Iterable[str], separator: str | None) -> Iterator[str]:
    """Yield the documents of a text file, as described in `documents`."""
    if separator is not None:
        yield from _cut_after(blocks, separator)
        return
    cut = False
    for piece in _cut_after(blocks, END_OF_TEXT):
        text, mark, _ = piece.partition(END_OF_TEXT)
        cut = cut or bool(mark)
        yield text.strip("\r\n") if cut else text  # the mark is on a line of its own


def _cut_after(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """Yield a text in pieces, each but the last ending with a run of `separator`. Holds one piece and one block."""
    lines = separator.replace("\r\n", "\n").split("\n")  # line ends may be those of Unix or Windows in both
    runs = re.compile("(?:" + r"\r?\n".join(map(re.escape, lines)) + ")+")
    longest = len("\r\n".join(lines))
    # How far `rest` is searched, and the end so far of a run that may continue, 0 if there is none.
    rest, searched, run_end = "", 0, 0
    for block in itertools.chain(blocks, [""]):
        rest += block
        # A run that ends this late may continue in the next block; the empty one is the last.
        last_end = len(rest) - longest if block else len(rest)
        start = 0
        while True:
            run = runs.match(rest, run_end) if run_end else runs.search(rest, searched)
            run_end = run.end() if run else run_end
            if not run_end:
                searched = max(start, len(rest) - longest + 1)
                break
            if run_end > last_end:
                break
            yield rest[start:run_end]
            start, searched, run_end = run_end, run_end, 0
        rest, searched, run_end = rest[start:], max(searched - start, 0), max(run_end - start, 0)
    yield rest
