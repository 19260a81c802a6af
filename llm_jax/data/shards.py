"""Token shards on disk: a corpus tokenized once, verified when opened, read through memory maps.

A folder holds, for each split, `<split>_00000.npy` ... (token ids), `<split>_offsets.npy` (where each document
starts), `<split>_bytes.npy` (its size as UTF-8), `<split>_origins.txt`; and `tokenizer/`, and `meta.json`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_jax.data import sources
from llm_jax.data.sources import Document
from llm_jax.data.tokenizer import Tokenizer, build, load

if TYPE_CHECKING:
    from llm_jax.data.loader import DataConfig

SPLITS = ("train", "heldout")
_FORMAT = 1
_SHARD_TOKENS = 1 << 25


@dataclass(frozen=True)
class Split:
    """What one split holds, and the sha256 of each of its files."""

    documents: int
    tokens: int
    bytes: int
    files: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds and how it was made: `meta.json`."""

    format: int
    source: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    separator: str | None
    end_of_text: bool
    heldout: float
    heldout_by: str
    splits: dict[str, Split]


class TokenStore:
    """The tokens of one split, one stream through all its shard files."""

    def __init__(self, folder: Path, name: str, split: Split) -> None:
        self.n_documents, self.n_tokens, self.n_bytes = split.documents, split.tokens, split.bytes
        self.offsets: np.ndarray = np.load(folder / f"{name}_offsets.npy", mmap_mode="r")
        self.document_bytes: np.ndarray = np.load(folder / f"{name}_bytes.npy", mmap_mode="r")
        self._shards = [np.load(folder / file, mmap_mode="r") for file in _token_files(name, split)]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of the stream, int32 [stop - start]."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for shard, begin in zip(self._shards[first:], self._starts[first:], strict=False):
            if begin >= stop:
                break
            parts.append(shard[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts).astype(np.int32)


class Shards:
    """A folder that `prepare` wrote."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load(self.folder / "tokenizer")

    def split(self, name: str) -> TokenStore:
        """The tokens of `train` or `heldout`."""
        return TokenStore(self.folder, name, self.manifest.splits[name])


def prepare(
    uri: str,
    out: str | Path,
    *,
    tokenizer: str = "train:4096",
    separator: str | None = None,
    end_of_text: bool = True,
    heldout: float = 0.05,
    heldout_by: str = "hash",
    report: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Tokenizes the documents of `uri` once, into the folder `out`."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already; delete it, or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        folder = Path(name) / "shards"
        report(f"building the tokenizer {tokenizer} on {uri}")
        encoder = build(tokenizer, lambda: (d.text for d in sources.documents(uri, separator)))
        encoder.save(folder / "tokenizer")
        side = _hash_side(heldout) if heldout_by == "hash" else _tail_side(uri, separator, heldout)
        writers = {name: _SplitWriter(folder, name, encoder.vocab_size) for name in SPLITS}
        for document in sources.documents(uri, separator):
            tokens = encoder.encode(document.text)
            if end_of_text:
                tokens = np.append(tokens, np.int32(encoder.end_of_text))
            writers[side(document)].add(document, tokens)
        splits = {name: writer.close() for name, writer in writers.items()}
        manifest = Manifest(
            format=_FORMAT,
            source=uri,
            tokenizer=tokenizer,
            tokenizer_fingerprint=encoder.fingerprint,
            vocab_size=encoder.vocab_size,
            separator=separator,
            end_of_text=end_of_text,
            heldout=heldout,
            heldout_by=heldout_by,
            splits=splits,
        )
        (folder / "meta.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        os.rename(folder, out)
    report(f"wrote {splits['train'].tokens:,} training and {splits['heldout'].tokens:,} held-out tokens")
    return manifest


def cached(config: DataConfig, cache_dir: str | Path, report: Callable[[str], None] = lambda line: None) -> Path:
    """The shards that `config` asks for, prepared into `cache_dir` if they are not there yet."""
    settings = {
        "tokenizer": config.tokenizer,
        "separator": config.separator,
        "end_of_text": config.end_of_text,
        "heldout": config.heldout,
        "heldout_by": config.heldout_by,
    }
    content = [_FORMAT, sources.fingerprint(config.uri), settings]
    folder = Path(cache_dir) / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    if not (folder / "meta.json").exists():
        prepare(config.uri, folder, **settings, report=report)
    return folder


def open_shards(folder: str | Path) -> Shards:
    """Opens what `prepare` wrote, after a look at every file's checksum."""
    folder = Path(folder)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    splits = {name: Split(**split) for name, split in meta.pop("splits").items()}
    manifest = Manifest(**meta, splits=splits)
    for split in splits.values():
        for name, expected in split.files.items():
            if _sha256(folder / name) != expected:
                raise ValueError(f"{folder / name} is damaged: its checksum differs; delete {folder} and prepare again")
    return Shards(folder, manifest)


class _SplitWriter:
    """Writes one split: tokens as they come, one shard at a time; offsets and sizes at the end."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self.folder, self.name = folder, name
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.offsets, self.bytes = array("q", [0]), array("q")
        self.pending: list[np.ndarray] = []
        self.n_pending = 0
        self.files: dict[str, str] = {}
        self.n_shards = 0

    def add(self, document: Document, tokens: np.ndarray) -> None:
        self.pending.append(tokens.astype(self.dtype))
        self.n_pending += len(tokens)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.bytes.append(len(document.text.encode()))
        if self.n_pending >= _SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        self.save(f"{self.name}_{self.n_shards:05d}.npy", np.concatenate(self.pending))
        self.n_shards += 1
        self.pending, self.n_pending = [], 0

    def save(self, file: str, values: np.ndarray) -> None:
        np.save(self.folder / file, values)
        self.files[file] = _sha256(self.folder / file)

    def close(self) -> Split:
        if self.pending:
            self.flush()
        self.save(f"{self.name}_offsets.npy", np.array(self.offsets, np.int64))
        self.save(f"{self.name}_bytes.npy", np.array(self.bytes, np.int64))
        return Split(len(self.bytes), self.offsets[-1], sum(self.bytes), self.files)


def _hash_side(heldout: float) -> Callable[[Document], str]:
    def side(document: Document) -> str:
        digest = hashlib.sha256(document.text.encode()).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") < heldout * 2**64 else "train"

    return side


def _tail_side(uri: str, separator: str | None, heldout: float) -> Callable[[Document], str]:
    total = sum(len(document.text.encode()) for document in sources.documents(uri, separator))
    position = 0

    def side(document: Document) -> str:
        nonlocal position
        start, position = position, position + len(document.text.encode())
        return "heldout" if start >= (1 - heldout) * total else "train"

    return side


def _token_files(name: str, split: Split) -> Iterator[str]:
    return (file for file in sorted(split.files) if file[len(name) + 1].isdigit())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
