"""Tokenizers: text to token ids and back. `build` makes one by its name, `load_tokenizer` reads one that was saved.

    byte  char                byte_char.py            one token for each byte, or for each character
    gpt2  ...  train:4096     bpe.py                  byte-pair encodings, published or trained here
    (of an imported model)    imported_tokenizer.py   its own tokenizer.json, run by Hugging Face's library

`tokenizer_interface.py` defines what all of them can do.
"""

import functools
import os
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from llm_jax.config import nearest
from llm_jax.data import bpe, imported_tokenizer
from llm_jax.data.bpe import BPETokenizer, train
from llm_jax.data.byte_char import ByteTokenizer, CharTokenizer
from llm_jax.data.tokenizer_interface import (
    DAMAGED,
    ENCODING,
    END_OF_TEXT,
    NOT_UNICODE,
    RANKS,
    Tokenizer,
    fingerprint_of,
)
from llm_jax.files import check_fields, read_json

__all__ = [
    "END_OF_TEXT",
    "NAMED",
    "SPECS",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Tokenizer",
    "build",
    "load_tokenizer",
    "open_tokenizer",
    "train",
]

NAMED = ("gpt2", "cl100k_base", "o200k_base")
SPECS = (*NAMED, "byte", "char", "train:4096")
FIELDS = {  # what encoding.json holds for each kind
    "byte": {},
    "char": {"alphabet": str},
    "bpe": {"pattern": str, "special_tokens": dict},
    "imported": {"begin_of_text": int, "end_of_text": int, "ids": int, "sha256": str},
}


def build(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Return the tokenizer that `spec` names: one of `SPECS`, or a folder with a saved one.

    `texts()` gives `char` its alphabet and `train:N` its merges; the others don't call it. N counts the whole
    vocabulary: 256 bytes, the merges, and the end of text. Raise `ValueError` for a spec that names nothing,
    and for an encoding that can't be downloaded.
    """
    kind, _, size = spec.partition(":")
    if spec in NAMED:
        return bpe.published(spec)
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        return CharTokenizer(functools.reduce(set[str].union, texts(), set()))
    if kind == "train" and re.fullmatch("[0-9]{1,18}", size):
        return train(int(size), texts())
    if not os.path.isdir(spec):  # False also for a name that no file can have
        raise ValueError(f"unknown tokenizer {spec!r}, and no folder of that name; {nearest(spec, SPECS)}")
    return load_tokenizer(spec)


def open_tokenizer(name: str | Path, texts: Iterable[str] = ()) -> Tokenizer:
    """Return a tokenizer by its name (`gpt2`, `byte`, `train:4096`, ...), or that of a run or of prepared data.

    `char` and `train:N` learn from `texts`. Raise `ValueError` for a name that is none, with those that are.
    """
    inside = Path(name) / "tokenizer"
    return load_tokenizer(inside) if inside.is_dir() else build(str(name), lambda: texts)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer that `save` wrote. Raise `ValueError`, one line, if there is none or it is damaged."""
    folder = Path(folder)
    _check_complete(folder)
    path = folder / ENCODING
    meta = read_json(path, {"name": str, "fingerprint": str, "encoding": dict}, advice=DAMAGED)
    description, ranks = meta["encoding"], (folder / RANKS).read_bytes()
    where = f"{path}: encoding"
    kind = check_fields(description, {"kind": str}, where, advice=DAMAGED)["kind"]
    if kind not in FIELDS:
        raise ValueError(f"{where} is of the kind {kind!r}, expected one of {', '.join(FIELDS)}; {DAMAGED}")
    check_fields(description, FIELDS[kind], where, advice=DAMAGED)
    if extra := description.keys() - FIELDS[kind].keys() - {"kind"}:
        raise ValueError(f"{where} has {min(extra)!r}, which this version does not know; {DAMAGED}")
    if fingerprint_of(description, ranks) != meta["fingerprint"]:
        raise ValueError(f"{folder} is damaged: the tokenizer has another fingerprint; prepare the data again")
    match kind:
        case "byte":
            return ByteTokenizer()
        case "char":
            alphabet = description["alphabet"]
            if alphabet != "".join(sorted(set(alphabet))) or NOT_UNICODE.search(alphabet):
                raise ValueError(f"{where}: 'alphabet' is no sorted set of characters; {DAMAGED}")
            return CharTokenizer(alphabet)
        case "imported":
            return imported_tokenizer.load_imported(folder, meta["name"], description, meta.get("end_ids", []))
        case _:
            specials = description["special_tokens"]
            return bpe.load_bpe(folder, meta["name"], description["pattern"], ranks, specials)


def _check_complete(folder: Path) -> None:
    """Raise `ValueError` unless `folder` has the files of a saved tokenizer."""
    if (folder / "tokenizer.json").is_file() and not (folder / ENCODING).exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds a tokenizer of Hugging Face without its model; name a folder of both")
        raise ValueError(
            f"{folder} holds a tokenizer of Hugging Face, which comes with its model: llm-jax import "
            f"{shlex.quote(str(folder))} --run DIR, then name DIR/tokenizer"
        )
    for file in (ENCODING, RANKS):
        if not (folder / file).is_file():
            raise ValueError(f"no tokenizer in {folder}: {file} is missing; name the folder of one")
