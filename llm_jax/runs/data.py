"""The text of a run: prepared on first use, found again later, or other text in the run's tokens."""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import processes, runtime
from llm_jax.data.config import DataConfig, parse_uri
from llm_jax.data.given import stored
from llm_jax.data.loader import IGNORE, Batch, heldout_rows
from llm_jax.data.mixture import Mixture, open_folders
from llm_jax.data.prepare import GIVEN, cached_sources, cuts_of
from llm_jax.data.shards import SPLITS, Shards, TokenStore, is_prepared, open_shards
from llm_jax.log import Report, no_report
from llm_jax.runs import folder as run_folder
from llm_jax.train.config import RunConfig


def open_data(config: RunConfig, report: Report) -> Shards | Mixture:
    """Return the token shards of `config.data`, prepared on first use. Raise `ValueError` for too many ids."""
    shards = open_folders(config.data, _prepared(config, report))
    ids = shards.tokenizer.vocab_size
    if ids > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {ids} ids, but model.vocab_size={config.model.vocab_size}; "
            f"use at least model.vocab_size={-(-ids // 64) * 64}"
        )
    return shards


def _prepared(config: RunConfig, report: Report) -> list[Path]:
    """Return the folders of `config`'s shards, which the first of several processes prepares and the others find."""

    def find() -> list[Path]:
        return cached_sources(config.data, runtime.cache_folder() / "data", report)

    first = [Path(folder) for folder in processes.from_first(lambda: [str(folder) for folder in find()])]
    return first if all(folder.is_dir() for folder in first) else find()  # a cache of this machine's own


def given_data(documents: Any, config: RunConfig, report: Report) -> str:
    """Return the address of documents that a program gives, stored in the cache of this machine."""

    def store() -> str:
        return stored(documents, config.data, runtime.cache_folder() / "data", report)

    address = processes.from_first(store)
    return address if Path(address).exists() else store()  # a cache of this machine's own


def check_given(folder: Path, config: RunConfig, address: str) -> None:
    """Raise `ValueError` unless the documents at `address` are those that the run in `folder` began with."""
    if address != config.data.uri:
        raise ValueError(
            f"data= holds other documents than {folder} was trained on ({config.data.uri}); leave it out, or start a "
            f"new run on these, with init_from={folder} in its config"
        )


def open_run_data(folder: Path, config: RunConfig, report: Report) -> Shards | Mixture:
    """Return the token shards that the run in `folder` began with: where they lay, or prepared again from their source.

    Raise `ValueError` where neither is what it was.
    """
    there, uri = run_folder.shards_folders(folder, config), config.data.uri
    known = all(path.is_dir() for path in there)
    if not known and Path(uri).parent.name == GIVEN and not os.path.exists(uri):
        raise ValueError(
            f"{folder} was trained on documents that a program gave, and {uri} holds them no longer; give them again: "
            f"llm_jax.resume({str(folder)!r}, data=...), or score others: run.evaluate([...])"
        )
    shards = open_folders(config.data, there) if known else open_data(config, report)
    run_folder.check_data(folder, shards)
    return shards


def open_text(uri: str, folder: Path, config: RunConfig, report: Report, column: str | None = None) -> Shards | Mixture:
    """Return the text at `uri` in the tokens of the run in `folder`. Raise `ValueError` for shards that have others.

    Sources that are prepared are taken as they are, and the others have nothing held out: all of both is text to score.
    `column` is that of the sources that have rows.
    """
    sources = parse_uri(uri)
    if is_prepared(uri) or len(sources) == 1:
        return _open_one(uri, folder, config, report, column)
    rows = dataclasses.replace(config, data=dataclasses.replace(config.data, column=column or config.data.column))
    return Mixture(sources, [_open_one(source.uri, folder, rows, report) for source in sources])


def open_documents(documents: Any, folder: Path, config: RunConfig) -> Shards:
    """Return documents that a program gives, as `fit(data=)` takes them, in the tokens of the run in `folder`."""
    own = dataclasses.replace(
        config.data, tokenizer=str(folder / "tokenizer"), heldout=0.0, column=None, separator=None
    )
    config = dataclasses.replace(config, data=own)
    return _open_one(given_data(documents, config, no_report), folder, config, no_report)


def check_address(text: str) -> None:
    """Raise `ValueError` for a text where an address is expected: it has blanks, and leads nowhere."""
    there = os.path.exists(text) or glob(text) or "://" in text or re.search(r":[\d.]+$", text)  # so ends a mixture
    if any(map(str.isspace, text)) and not there:
        raise ValueError(
            f"{text[:40]!r} is no file, folder or pattern here; to score a text itself give a list: [text]"
        )


def _open_one(uri: str, folder: Path, config: RunConfig, report: Report, column: str | None = None) -> Shards:
    if not is_prepared(uri):
        data = dataclasses.replace(config.data, uri=uri, tokenizer=str(folder / "tokenizer"), heldout=0.0)
        data = dataclasses.replace(data, **cuts_of(data, uri))
        data = dataclasses.replace(data, column=column or data.column)
        found = open_data(dataclasses.replace(config, data=data), report)
        assert isinstance(found, Shards)
        return found
    shards, ours = open_shards(uri), run_folder.tokenizer_of_run(folder)
    if shards.tokenizer.fingerprint != ours.fingerprint:
        raise ValueError(
            f"{uri} is in the tokens of {shards.tokenizer.name}, but {folder} knows those of {ours.name}; "
            f"prepare the text with the tokenizer {folder}/tokenizer (--tokenizer), or name the text itself"
        )
    if column not in (None, shards.manifest.column):
        raise ValueError(
            f"{uri} is prepared already, of the column {shards.manifest.column!r}; leave out column={column} (--column)"
        )
    if shards.manifest.end_of_text != config.data.end_of_text:
        raise ValueError(
            f"{uri} has end_of_text={shards.manifest.end_of_text}, but texts of {folder} have "
            f"end_of_text={config.data.end_of_text}; add {'--no-begin' if config.data.end_of_text else '--begin'} "
            f"(from Python begin={not config.data.end_of_text}), or name the text itself"
        )
    return shards


def all_text(data: Shards | Mixture, config: DataConfig) -> tuple[TokenStore, Iterator[Batch]]:
    """Return both splits of `data` as one store, each source a slice of it, and all of their rows."""
    sources, shards = (data.sources, data.shards) if isinstance(data, Mixture) else ((), [data])
    splits = [list(map(one.split, SPLITS)) for one in shards]
    whole = TokenStore.joined(list(map(TokenStore.joined, splits)), sources)
    return whole, all_rows([store for both in splits for store in both], config)


def all_rows(stores: Sequence[TokenStore], config: DataConfig) -> Iterator[Batch]:
    """Yield the batches of each store in turn, as `heldout_rows` cuts them, with document numbers that go through."""
    before = 0
    for store in stores:
        for batch in heldout_rows(store, config) if store.n_documents else ():
            counted = batch.documents != IGNORE
            yield dataclasses.replace(batch, documents=np.where(counted, batch.documents + before, IGNORE))
        before += store.n_documents
