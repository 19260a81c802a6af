"""Tokenize a source with many workers, in order: processes of this machine, or of a Ray cluster (`cluster.py`).

A job is some files, which the worker reads, or some documents that were read here. Reading and tokenizing are the work:
what is left for the process that writes the shards is to copy numbers. Which jobs there are depends on the workers.
What they return, in the order of the jobs, does not.
"""

import contextlib
import functools
import multiprocessing
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt, UInt64

import llm_jax
from llm_jax.data import cluster
from llm_jax.data.addresses import File
from llm_jax.data.generated import GENERATED
from llm_jax.data.records import Tally
from llm_jax.data.sources import Document, documents, documents_of, hash_of, no_text, open_files
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.log import Report

JOB_BYTES = 1 << 20
ALONE_BYTES = 12 << 20  # processes take longer to start than these take here
WHOLE_BYTES = 32 << 20  # of a file that a worker reads: its tokens wait in memory for those of the files before it
COMPRESSION = 4  # about how much longer the text of a compressed file is

Job = Sequence[File | Document]


@dataclass(frozen=True)
class Reading:
    """What cuts files into documents, and whether text that spells a special token becomes it."""

    separator: str | None
    column: str
    special: bool


@dataclass(frozen=True)
class Encoded:
    """The documents of a job: their ids one after the other, and for each the number of ids, bytes, hash and origin.

    `spells` is the first origin that spells a special token, and the token, where those are read as text.
    """

    ids: UInt[np.ndarray, " n_tokens"]
    sizes: Int64[np.ndarray, " n"]
    bytes: Int64[np.ndarray, " n"]
    hashes: UInt64[np.ndarray, " n"]
    origins: list[str]
    spells: tuple[str, str] | None
    tally: Tally


Begin = Callable[[Job], Callable[[], Encoded]]


def encode_all(
    folder: Path,
    uri: str,
    *,
    separator: str | None = None,
    column: str | None = None,
    special: bool = False,
    workers: int | str | None = None,
    report: Report,
) -> Iterator[Encoded]:
    """Yield the documents of `uri` in their order, with their ids by the tokenizer saved in `folder`.

    `workers` is a number of processes (None: one a core; 1: this one alone), `ray`, or `ray://HOST:PORT`. A text of few
    megabytes is tokenized here. Holds some tens of megabytes a worker. Raise `ValueError` for what can't be read, and
    where a worker dies.
    """
    files, tally = ([], Tally("")) if uri in GENERATED else open_files(uri, separator, column, report)
    sizes = {file: file.size * (COMPRESSION if file.compression else 1) for file in files}
    total, count, told = sum(sizes.values()), 0, special
    reading = Reading(separator, tally.column, special)
    with _started(folder, reading, workers, total) as (number, begin):
        # A worker reads whole files where there are many; of few, some workers would have none. A path of this machine
        # can't be read from another.
        limit = min(WHOLE_BYTES, total // (4 * number)) if "://" in uri or not isinstance(workers, str) else -1
        pieces = _pieces(sizes, limit, separator, tally) if files else documents(uri, separator, column)
        for encoded in _in_order(map(begin, _jobs(pieces, sizes)), 2 * number):
            if encoded.spells is not None and not told:
                told = True
                origin, token = encoded.spells
                report(f"{origin} spells {token}, which is read as text; for the token set data.special=true")
            count += len(encoded.sizes)
            tally.add(encoded.tally)
            yield encoded
    if not count:
        raise no_text(uri)
    if tally.without:
        report(tally.line(uri, len(files)))


def _pieces(sizes: Mapping[File, int], limit: int, separator: str | None, tally: Tally) -> Iterator[File | Document]:
    """Yield each file of at most `limit` bytes, and in place of a larger one its documents, read here."""
    for file, size in sizes.items():
        if size <= limit:
            yield file
        else:
            yield from documents_of(file, separator, tally)


def _jobs(pieces: Iterable[File | Document], sizes: Mapping[File, int]) -> Iterator[Job]:
    """Group `pieces` into jobs of about `JOB_BYTES`."""
    job, size = [], 0
    for piece in pieces:
        job.append(piece)
        size += len(piece.text) if isinstance(piece, Document) else sizes[piece]
        if size >= JOB_BYTES:
            yield job
            job, size = [], 0
    if job:
        yield job


def _in_order(results: Iterable[Callable[[], Encoded]], ahead: int) -> Iterator[Encoded]:
    """Yield what each of `results` returns; `ahead` more of them have begun by then."""
    waiting: deque[Callable[[], Encoded]] = deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


@contextlib.contextmanager
def _started(folder: Path, reading: Reading, workers: int | str | None, total: int) -> Iterator[tuple[int, Begin]]:
    """Yield the number of workers, and a function that begins a job and returns one that waits for its result."""
    number = cores() if workers is None else workers
    if isinstance(number, str):
        saved = {file.name: file.read_bytes() for file in folder.iterdir()}
        with cluster.connected(number, functools.partial(_encode_there, llm_jax.__version__, saved, reading)) as found:
            yield found
    elif number == 1 or (workers is None and total < ALONE_BYTES):
        tokenizer = load_tokenizer(folder)
        yield 1, lambda job: functools.partial(encode, tokenizer, reading, job)
    else:
        spawn = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(number, spawn, initializer=_end_with_parent) as pool:
                try:
                    yield number, lambda job: pool.submit(_encode_here, folder, reading, job).result
                finally:
                    pool.shutdown(cancel_futures=True)
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that tokenizes died: it had too little memory, or your script has no "
                '`if __name__ == "__main__":` around the call, which every process needs'
            ) from error


def workers_of(asked: int | str | None) -> int | str | None:
    """Return the workers that a caller or a command line asks for. Raise `ValueError` for what can't be had."""
    if isinstance(asked, str) and asked.isdecimal():
        asked = int(asked)
    if isinstance(asked, str):
        cluster.check(asked)
    elif asked is not None and asked < 1:
        raise ValueError(f"workers={asked} tokenizes nothing; use 1 or more, or leave it out for one a core")
    return asked


def cores() -> int:
    """Return how many cores this process may use."""
    return getattr(os, "process_cpu_count", os.cpu_count)() or 1  # since Python 3.13


def encode(tokenizer: Tokenizer, reading: Reading, job: Job) -> Encoded:
    """Read and tokenize a job."""
    tally, spells = Tally(reading.column), None
    ids: list[np.ndarray] = []
    counts, origins = [], []
    for piece in job:
        for document in [piece] if isinstance(piece, Document) else documents_of(piece, reading.separator, tally):
            if not reading.special and spells is None and (token := tokenizer.spelled(document.text)):
                spells = document.origin, token
            ids.append(tokenizer.encode(document.text, special=reading.special))
            data = document.text.encode()
            counts.append((len(ids[-1]), len(data), hash_of(data)))
            origins.append(document.origin)
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    sizes, lengths, hashes = (
        np.array([count[i] for count in counts], kind_of) for i, kind_of in enumerate((np.int64, np.int64, np.uint64))
    )
    joined = np.concatenate([np.zeros(0, np.int32), *ids]).astype(kind)
    return Encoded(joined, sizes, lengths, hashes, origins, spells, tally)


def _end_with_parent() -> None:
    """End this worker when the process that started it ends, even by SIGKILL: otherwise it waits for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_load_once = functools.lru_cache(maxsize=1)(load_tokenizer)


def _encode_here(folder: Path, reading: Reading, job: Job) -> Encoded:
    return encode(_load_once(folder), reading, job)


def _encode_there(version: str, saved: Mapping[str, bytes], reading: Reading, job: Job) -> Encoded:
    """Encode on a machine that has neither the shards nor the tokenizer, whose files are `saved`."""
    if llm_jax.__version__ != version:
        raise ValueError(
            f"a machine of the Ray cluster has llm-jax {llm_jax.__version__}, and this one {version}; install the same "
            "there"
        )
    return encode(_load_sent(tuple(saved.items())), reading, job)


@functools.lru_cache(maxsize=1)
def _load_sent(saved: tuple[tuple[str, bytes], ...]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in saved:
            (Path(folder) / name).write_bytes(content)
        return load_tokenizer(folder)
