"""Tokenize many texts with a pool of processes."""

import functools
import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from llm_jax.data.sources import Document
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARS = 1 << 20
BATCHES_ALONE = 8  # a pool takes longer to start than these take here


def encode_all(folder: str | Path, texts: Iterable[str], *, special: bool = False) -> Iterator[np.ndarray]:
    """Yield the ids of every text, in order, with the tokenizer saved in `folder`; for many texts use a pool.

    Holds a few megabytes of text at a time. Raise `ValueError` if a process of the pool dies.
    """
    tokenizer, batches = load_tokenizer(folder), _batches(texts)
    for batch in itertools.islice(batches, BATCHES_ALONE):
        yield from (tokenizer.encode(text, special=special) for text in batch)
    more = next(batches, None)
    if more is None:
        return
    workers = os.cpu_count() or 1
    waiting: deque[Future[list[np.ndarray]]] = deque()
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, initializer=_end_with_parent) as pool:
            for batch in itertools.chain([more], batches):
                waiting.append(pool.submit(_encode_batch, folder, batch, special))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that tokenizes died: it had too little memory, or your script has no "
            '`if __name__ == "__main__":` around the call, which every process needs'
        ) from error


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def reporting_special_tokens(
    documents: Iterable[Document], tokenizer: Tokenizer, report: Callable[[str], object]
) -> Iterator[Document]:
    """Yield `documents`, and report the first that spells a special token, which is read as plain text."""
    documents = iter(documents)
    for document in documents:
        if found := tokenizer.spelled(document.text):
            report(f"{document.origin} spells {found}, which is read as text; for the token set data.special=true")
            yield document
            break
        yield document
    yield from documents


def _end_with_parent() -> None:
    """End this worker when the process that started it ends, even by SIGKILL: otherwise it waits for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_load_once = functools.cache(load_tokenizer)


def _encode_batch(folder: str | Path, texts: list[str], special: bool) -> list[np.ndarray]:
    return [_load_once(folder).encode(text, special=special) for text in texts]
