"""Documents that a Python program gives: texts, or token ids. They are stored once, and found again by their content.

A config is JSON, and knows data by an address. So texts become a file of JSON lines and ids a folder of token shards,
both named by a hash of what they hold: the same documents are stored once, and a run that resumes finds them there.
"""

import dataclasses
import hashlib
import itertools
import json
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import GIVEN, SETTINGS, SplitWriter, by_hash, by_tail, check_sides, learns
from llm_jax.data.shards import FORMAT, SPLITS, Manifest, is_prepared
from llm_jax.data.sources import hash_of
from llm_jax.data.tokenizer import Tokenizer, build
from llm_jax.files import scratch_number, whole_folder, write_json, written
from llm_jax.log import Report


def stored(documents: Any, config: DataConfig, cache: Path, report: Report) -> str:
    """Return the address of `documents`, stored in the folder `cache` unless they are there.

    They are an iterable of texts, one array or list of token ids (each document ends with the tokenizer's end of text),
    or an iterable of arrays of ids, a document each. Raise `ValueError` for anything else, for no document, and for ids
    that `config.tokenizer` does not have.
    """
    if isinstance(documents, str | bytes | Path):
        raise ValueError(f"data={str(documents)[:40]!r} is one text or a path; give a list of texts, or set data.uri")
    if isinstance(documents, Mapping) or hasattr(documents, "columns"):  # of pandas: both would be read by their names
        raise ValueError(
            f"documents come as a {type(documents).__name__}; give the texts of one column: list(data['text'])"
        )
    try:
        first, every = _peeked(documents)
    except TypeError:
        raise ValueError(f"{documents!r} is no iterable of texts, nor an array of token ids") from None
    if isinstance(first, str):
        return str(_store_texts(every, cache))
    if isinstance(first, Mapping):
        column = "text" if "text" in first else next(iter(first), "text")
        raise ValueError(
            f"document 0 is a {type(first).__name__} with {', '.join(map(str, first))}; give the texts: "
            f"[row[{column!r}] for row in data]"
        )
    if isinstance(first, numbers.Integral) or getattr(first, "shape", None) == ():
        return str(_store_ids(_cut(_stream(documents, every), _tokenizer(config)), config, cache, report))
    return str(_store_ids(map(np.asarray, every), config, cache, report))


def _stream(documents: Any, every: Iterable[Any]) -> Int[np.ndarray, " n"]:
    """Return token ids that come as an array, or one by one."""
    ids = np.asarray(documents if hasattr(documents, "__array__") else list(every))
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"the ids have shape {ids.shape} of {ids.dtype}; give texts, or one row of whole numbers")
    return ids


def _peeked(documents: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """Return the first document, and an iterator over all."""
    rest = iter(documents)
    for first in rest:
        return first, itertools.chain([first], rest)
    raise ValueError("there is no document; give a list of texts")


def _store_texts(texts: Iterable[Any], cache: Path) -> Path:
    digest, folder = hashlib.sha256(), cache / GIVEN
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{scratch_number()}.part"  # its name is known at the end
    try:
        with written(scratch) as file:
            for number, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"document {number} is no text but {type(text).__name__}, unlike the first")
                line = json.dumps({"text": text}).encode() + b"\n"
                digest.update(line)
                file.write(line)
        return scratch.replace(folder / f"{digest.hexdigest()[:16]}.jsonl")
    finally:
        scratch.unlink(missing_ok=True)


def _tokenizer(config: DataConfig) -> Tokenizer:
    if learns(config.tokenizer):
        raise ValueError(
            f"the documents are token ids, and data.tokenizer={config.tokenizer} would learn from text; name the "
            "tokenizer that made them: gpt2, byte, or the folder of one"
        )
    return build(config.tokenizer, tuple)


def _cut(ids: Int[np.ndarray, " n"], tokenizer: Tokenizer) -> list[Int[np.ndarray, " _"]]:
    """Split a stream into its documents, each without the end-of-text token that ends it."""
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    pieces = np.split(ids, ends + 1)
    return [piece[: len(piece) - (number < len(ends))] for number, piece in enumerate(pieces) if len(piece)]


def _store_ids(documents: Iterable[np.ndarray], config: DataConfig, cache: Path, report: Report) -> Path:
    tokenizer = _tokenizer(config)
    every = [_checked(number, ids, tokenizer) for number, ids in enumerate(documents)]
    settings: dict[str, Any] = {name: getattr(config, name) for name in SETTINGS}
    key = hashlib.sha256(json.dumps([settings | {"tokenizer": tokenizer.fingerprint}, FORMAT]).encode())
    for ids in every:
        key.update(len(ids).to_bytes(8, "big") + ids.astype(np.uint32).tobytes())
    folder = cache / GIVEN / key.hexdigest()[:16]
    if is_prepared(str(folder)):
        return folder
    lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    sizes = [int(lengths[ids].sum()) for ids in every]
    side = _sides(every, sizes, config)
    with whole_folder(folder, "ids") as scratch:
        tokenizer.save(scratch / "tokenizer")
        writers = {name: SplitWriter(scratch, name, tokenizer, config.end_of_text, report, name) for name in SPLITS}
        for number, (ids, size) in enumerate(zip(every, sizes, strict=True)):
            writers[side[number]].add(f"document {number} of those given", size, ids)
        manifest = Manifest(
            format=FORMAT,
            source=f"{len(every)} documents of token ids",
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            splits={name: writer.close() for name, writer in writers.items()},
            **settings,
        )
        check_sides(manifest, given=True)
        write_json(scratch / "meta.json", dataclasses.asdict(manifest))
    return folder


def _checked(number: int, ids: np.ndarray, tokenizer: Tokenizer) -> Int[np.ndarray, " _"]:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"document {number} has shape {ids.shape} of {ids.dtype}; give texts, or rows of ids")
    if len(wrong := ids[(ids < 0) | (ids >= tokenizer.vocab_size)]):
        raise ValueError(
            f"document {number} has the id {wrong[0]}, and the tokenizer {tokenizer.name} has 0 to "
            f"{tokenizer.vocab_size - 1}; set data.tokenizer to the one that made the ids"
        )
    return ids


def _sides(documents: Sequence[np.ndarray], sizes: Sequence[int], config: DataConfig) -> list[str]:
    """Return the split of each document, chosen by the hash of its ids or from the tail, as for text."""
    side = by_hash(config.heldout) if config.heldout_by == "hash" else by_tail(config.heldout, sum(sizes))
    hashes = [hash_of(ids.astype(np.uint32).tobytes()) for ids in documents]
    return list(map(side, hashes, sizes))
