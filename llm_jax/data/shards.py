"""Token shards: a corpus tokenized once, verified when it is opened, read through memory maps.

meta.json              the manifest: what this is, how it was made, a checksum of every other file
tokenizer/             what made the tokens
train_00000.npy ...    the documents of a split one after the other, as uint16 or uint32
train_offsets.npy      where each document starts, and where the last one ends
train_bytes.npy        how long each document is as UTF-8
train_origins.txt      where each document came from, a line each
heldout_...            likewise
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
import shutil
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64

from llm_jax.config import nearest
from llm_jax.data import sources
from llm_jax.data.sources import Document
from llm_jax.data.task import TaskConfig
from llm_jax.data.tokenizer import Tokenizer, build, encode_all, load
from llm_jax.files import whole_folder, write_json

FORMAT = 1
SPLITS = ("train", "heldout")
SETTINGS = ("tokenizer", "separator", "end_of_text", "heldout", "heldout_by")
SHARD_TOKENS = 1 << 25


@dataclass(frozen=True)
class DataConfig:
    """What is read, how it becomes tokens, what is held out, and how the rest is cut into rows.

    Every field up to `heldout_by` is an argument of `prepare`; `packing` and the rest concern the loader.

    Attributes:
      uri: where the text is: `builtin:python`, a file, folder or pattern, jsonl, parquet, `hf://datasets/...`, or a
        folder that `prepare` made.
      tokenizer: `byte`, `char`, `train:N` (N ids, trained on the text), `gpt2`, `cl100k_base`, `o200k_base`, or a
        folder that holds one.
      separator: text that ends a document, where one file holds many; None: a file, or a record, is a document.
      end_of_text: a token ends each document.
      heldout: share of the documents that is evaluated on and never trained on.
      heldout_by: which these are: chosen by their content (`hash`), or the last (`tail`).
      packing: `documents` puts whole documents into rows, `windows` cuts the stream of tokens evenly.
      seq_len: tokens in a row.
      batch_size: rows in a step, over all processes.
      epochs: how often a run may see each row; None for as often as its steps need.
      seed: of the order of rows.
      task: what is asked of the documents, where it is more than their next token.
    """

    uri: str = sources.BUILTIN
    tokenizer: str = "train:4096"
    separator: str | None = None
    end_of_text: bool = True
    heldout: float = 0.05
    heldout_by: Literal["hash", "tail"] = "hash"
    packing: Literal["documents", "windows"] = "documents"
    seq_len: int = 256
    batch_size: int = 16
    epochs: float | None = None
    seed: int = 0
    task: TaskConfig | None = None

    def __post_init__(self) -> None:
        _check_heldout(self.heldout, self.heldout_by)
        _check_choice("packing", self.packing, ("documents", "windows"))
        for name in ("seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} leaves no tokens; use 1 or more")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"epochs={self.epochs:g} allows no step; use a positive number, or none for no limit")
        if self.task is not None and self.packing != "documents":
            raise ValueError(
                f"a task asks whole documents, and packing={self.packing} cuts them; use packing=documents"
            )
        if self.task is not None and self.task.kind == "translate" and not self.end_of_text:
            raise ValueError("task.kind=translate must learn where an answer ends; set end_of_text=true")

    def ask(self, prompt: str) -> str:
        """`prompt` as a document would begin: as the question of a task, where there is one."""
        return prompt if self.task is None else self.task.ask(prompt)


@dataclass(frozen=True)
class Split:
    """How much a split holds, and the sha256 of each of its files."""

    documents: int
    tokens: int
    bytes: int
    files: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, and how it was made."""

    format: int
    source: str
    separator: str | None
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_text: bool
    heldout: float
    heldout_by: str
    splits: dict[str, Split]


class TokenStore:
    """The tokens of one split, its documents one after the other, in memory maps.

    offsets: where in the stream each document starts, and where the last ends, int64 [n_documents + 1].
    document_bytes: how long each document is as UTF-8, int64 [n_documents].
    """

    def __init__(self, folder: Path, name: str, split: Split) -> None:
        self.n_documents, self.n_tokens, self.n_bytes = split.documents, split.tokens, split.bytes
        self.offsets = _map(folder / f"{name}_offsets.npy")
        self.document_bytes = _map(folder / f"{name}_bytes.npy")
        self._folder, self._origins = folder, folder / f"{name}_origins.txt"
        self._shards = [_map(folder / file) for file in _token_files(name, split)]
        self._starts = np.cumsum([0, *map(len, self._shards)])

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens."""
        return load(self._folder / "tokenizer")

    def read(self, start: int, stop: int) -> Int32[np.ndarray, "n"]:
        """The tokens from `start` up to `stop`, or up to the end of the stream."""
        return self.take(np.arange(start, min(stop, self.n_tokens)))

    def take(self, index: Int64[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
        """The tokens at `index` of the stream, 0 outside of it."""
        tokens = np.zeros(index.shape, np.int32)
        shard_of = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.intersect1d(shard_of, np.arange(len(self._shards))):
            here = shard_of == number
            tokens[here] = self._shards[number][index[here] - self._starts[number]]
        return tokens

    def documents_of(self, index: Int64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """The document of each token at `index`, -1 before the stream and `n_documents` after it."""
        return np.searchsorted(self.offsets, index, side="right") - 1

    def origins(self, documents: Collection[int]) -> list[str]:
        """Where `documents` came from, in their order in the corpus."""
        wanted = set(documents)
        with open(self._origins, encoding="utf-8") as lines:
            return [line.rstrip("\n") for number, line in enumerate(lines) if number in wanted]


class Shards:
    """A folder that `prepare` wrote."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._splits = {name: TokenStore(folder, name, split) for name, split in manifest.splits.items()}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = load(self.folder / "tokenizer")
        if tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            raise ValueError(f"{self.folder / 'tokenizer'} did not make these tokens; prepare the data again")
        return tokenizer

    def split(self, name: Literal["train", "heldout"]) -> TokenStore:
        return self._splits[name]


def prepare(
    uri: str,
    out: str | Path,
    *,
    tokenizer: str = "train:4096",
    separator: str | None = None,
    end_of_text: bool = True,
    heldout: float = 0.05,
    heldout_by: Literal["hash", "tail"] = "hash",
    report: Callable[[str], object] = lambda line: None,
) -> Manifest:
    """Tokenizes the documents of `uri` into the folder `out`, which appears whole or not at all.

    tokenizer: as `tokenizer.build` takes it; what it learns from text, it learns from all documents.
    separator: as `sources.documents` takes it.
    end_of_text: whether the token of that name follows every document.
    heldout: the fraction held out for evaluation, of whole documents. "hash" chooses them by content, so that
    a document stays on its side as the corpus grows, on one side with its copies; "tail" takes the last.

    Raises `ValueError` if `out` exists, a side of the split stays empty, or the disk is full.
    """
    _check_heldout(heldout, heldout_by)
    read = functools.partial(sources.documents, uri, separator)
    with _new_folder(Path(out)) as folder:
        report(f"building the tokenizer {tokenizer} for {uri}")
        encoder = build(tokenizer, lambda: (document.text for document in read()))
        encoder.save(folder / "tokenizer")
        side = _by_hash(heldout) if heldout_by == "hash" else _by_tail(heldout, read())
        writers = {name: _SplitWriter(folder, name, encoder, end_of_text, report) for name in SPLITS}
        documents, again = itertools.tee(read())
        encoded = encode_all(folder / "tokenizer", (document.text for document in again))
        for document, tokens in zip(documents, encoded, strict=True):
            data = document.text.encode()
            writers[side(data)].add(document, len(data), tokens)
        manifest = Manifest(
            format=FORMAT,
            source=uri,
            separator=separator,
            tokenizer=tokenizer,
            tokenizer_fingerprint=encoder.fingerprint,
            vocab_size=encoder.vocab_size,
            end_of_text=end_of_text,
            heldout=heldout,
            heldout_by=heldout_by,
            splits={name: writer.close() for name, writer in writers.items()},
        )
        _check_sides(manifest)
        write_json(folder / "meta.json", asdict(manifest))
    return manifest


def cached(config: DataConfig, cache_dir: str | Path, report: Callable[[str], object] = lambda line: None) -> Path:
    """The folder of the shards that `config` asks for, prepared into `cache_dir` if they are not there.

    The folder's name is a digest of content and settings. A `uri` that is itself a folder of shards is the
    answer, but raises `ValueError` if it was prepared with other settings.
    """
    settings: dict[str, Any] = {name: getattr(config, name) for name in SETTINGS}
    given = Path(config.uri)
    if (given / "meta.json").is_file():
        _check_agreement(settings, _read_manifest(given))
        return given
    key = settings | {"format": FORMAT, "content": sources.fingerprint(config.uri)}
    if Path(config.tokenizer).is_dir():
        key["tokenizer"] = load(config.tokenizer).fingerprint
    folder = Path(cache_dir) / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    if not folder.exists():
        try:
            prepare(config.uri, folder, **settings, report=report)
        except ValueError:
            if not folder.exists():  # else another process was faster
                raise
    return folder


def open_shards(folder: str | Path) -> Shards:
    """Opens what `prepare` wrote. Raises `ValueError` that names a missing or damaged file."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for split in manifest.splits.values():
        for file, checksum in split.files.items():
            if not (folder / file).is_file() or _sha256(folder / file) != checksum:
                raise ValueError(f"{folder / file} is damaged or missing; delete {folder} and prepare it again")
    return Shards(folder, manifest)


class _SplitWriter:
    """Writes one split. Holds one shard of tokens, and two numbers a document."""

    def __init__(
        self, folder: Path, name: str, encoder: Tokenizer, end_of_text: bool, report: Callable[[str], object]
    ) -> None:
        self._folder, self._name, self._report = folder, name, report
        self._dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32
        self._end = np.array([encoder.end_of_text] if end_of_text else [], self._dtype)
        self._offsets, self._bytes = array("q", [0]), array("q")
        self._tokens: list[np.ndarray] = []
        self._origins: list[str] = []
        self._flushed = 0
        self._files: dict[str, str] = {}

    def add(self, document: Document, n_bytes: int, tokens: np.ndarray) -> None:
        self._tokens += [tokens.astype(self._dtype), self._end]
        self._origins.append(" ".join(document.origin.splitlines()))
        self._offsets.append(self._offsets[-1] + len(tokens) + len(self._end))
        self._bytes.append(n_bytes)
        if self._offsets[-1] - self._flushed >= SHARD_TOKENS:
            self._flush()

    def close(self) -> Split:
        self._flush()
        self._save("offsets", np.array(self._offsets, np.int64))
        self._save("bytes", np.array(self._bytes, np.int64))
        origins = f"{self._name}_origins.txt"
        self._files[origins] = _sha256(self._folder / origins)
        return Split(len(self._bytes), self._offsets[-1], sum(self._bytes), self._files)

    def _flush(self) -> None:
        with open(self._folder / f"{self._name}_origins.txt", "a", encoding="utf-8") as file:
            file.writelines(f"{origin}\n" for origin in self._origins)
        if self._tokens:
            self._save(f"{len(self._files):05d}", np.concatenate(self._tokens))
        self._report(f"{self._name}: {self._offsets[-1]:,} tokens of {len(self._bytes):,} documents")
        self._tokens, self._origins, self._flushed = [], [], self._offsets[-1]

    def _save(self, what: str, values: np.ndarray) -> None:
        file = f"{self._name}_{what}.npy"
        np.save(self._folder / file, values)
        self._files[file] = _sha256(self._folder / file)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end, or vanishes with an error."""
    if out.exists():
        raise ValueError(f"{out} exists already, and shards go into a new folder; delete it or name another")
    try:
        with whole_folder(out, "prepare") as folder:
            yield folder
    except OSError as error:  # what goes wrong in reading is a ValueError
        free = shutil.disk_usage(next(parent for parent in out.absolute().parents if parent.exists())).free
        raise ValueError(
            f"cannot write {out}: {error.strerror or 'no space left'} ({free:,} bytes free without it); make "
            "room, or name another folder"
        ) from error


def _by_hash(heldout: float) -> Callable[[bytes], str]:
    def side(document: bytes) -> str:
        digest = hashlib.sha256(document).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") < heldout * 2**64 else "train"

    return side


def _by_tail(heldout: float, documents: Iterable[Document]) -> Callable[[bytes], str]:
    first = (1 - heldout) * sum(len(document.text.encode()) for document in documents)
    seen = 0

    def side(document: bytes) -> str:
        nonlocal seen
        start, seen = seen, seen + len(document)
        return "heldout" if start >= first else "train"

    return side


def _read_manifest(folder: Path) -> Manifest:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no shards in {folder}: expected a meta.json; write them with llm-jax prepare") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'meta.json'} is damaged ({error}); prepare the data again") from None
    if meta["format"] != FORMAT:
        raise ValueError(f"{folder} has the format {meta['format']}, expected {FORMAT}; prepare the data again")
    return Manifest(**meta | {"splits": {name: Split(**split) for name, split in meta["splits"].items()}})


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; {nearest(value, choices)}")


def _check_heldout(heldout: float, heldout_by: str) -> None:
    _check_choice("heldout_by", heldout_by, ("hash", "tail"))
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout={heldout:g} is not a fraction of the documents; use 0.05, or 0 for none")


def _check_sides(manifest: Manifest) -> None:
    train, heldout = (manifest.splits[name].documents for name in SPLITS)
    if not train or (manifest.heldout and not heldout):
        raise ValueError(
            f"heldout={manifest.heldout:g} by {manifest.heldout_by} leaves {train} documents to train on and "
            f"{heldout} held out; cut the text into more with a separator, such as --separator $'\\n\\n' "
            r"(in a config data.separator=$'\n\n'), or change heldout"
        )


def _check_agreement(settings: Mapping[str, Any], manifest: Manifest) -> None:
    made = {name: getattr(manifest, name) for name in settings}
    folder = Path(settings["tokenizer"])
    if folder.is_dir() and load(folder).fingerprint == manifest.tokenizer_fingerprint:
        made["tokenizer"] = settings["tokenizer"]  # one that is saved is known by its ids, not by its place
    differ = [name for name in settings if made[name] != settings[name]]
    if differ:
        was, asked = (", ".join(f"{name}={of[name]!r}" for name in differ) for of in (made, settings))
        raise ValueError(f"the shards were prepared with {was}, and the config has {asked}; make them agree")


def _token_files(name: str, split: Split) -> list[str]:
    return sorted(file for file in split.files if re.fullmatch(rf"{name}_\d+\.npy", file))


def _map(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
