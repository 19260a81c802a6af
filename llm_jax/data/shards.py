"""Token shards: a corpus tokenized once by `prepare.py`, verified when opened, read through memory maps.

meta.json              the manifest: what this is, how it was made, a checksum of every other file
tokenizer/             the tokenizer that made the tokens
train_00000.npy ...    the documents of a split one after the other, as uint16 or uint32
train_offsets.npy      where each document starts, and where the last one ends, in tokens
train_bytes.npy        the length of each document in UTF-8
train_origins.txt      where each document came from, one line each
heldout_...            the same for the held-out split
"""

import dataclasses
import re
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from jaxtyping import Int32, Int64

from llm_jax.data.config import Source
from llm_jax.data.packing import Spans, ranges
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.files import Types, check_fields, read_json, sha256_of

FORMAT = 1
SPLITS = ("train", "heldout")
ADVICE = "prepare the data again"
READ_TOKENS = 1 << 22  # read at once, however long a document is


@dataclass(frozen=True)
class Split:
    """The size of a split, and the sha256 of each of its files."""

    documents: int
    tokens: int
    bytes: int
    files: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, and how it was made. `content` is the fingerprint of its text."""

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
    content: str | None = None
    column: str | None = None  # None in older shards, which were read as None is read today
    special: bool = False


@dataclass(frozen=True)
class SourceSlice:
    """One source in a store: its share of the rows, and which documents and tokens of the store are its own."""

    name: str
    share: Fraction
    documents: slice
    tokens: slice


class TokenStore:
    """The tokens of one split, its documents one after the other, in memory maps.

    Attributes:
      offsets: where in the stream each document starts, and where the last ends, int64 [n_documents + 1].
      document_bytes: the length of each document in UTF-8, int64 [n_documents].
      sources: the slices of the sources in it, in order; a folder of shards has one source.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        shards: Sequence[np.ndarray],
        offsets: Int64[np.ndarray, " n+1"],
        document_bytes: Int64[np.ndarray, " n"],
        origins: Sequence[tuple[Path, int]],
        sources: Sequence[SourceSlice] = (),
    ) -> None:
        self.tokenizer, self.offsets, self.document_bytes = tokenizer, offsets, document_bytes
        self.n_documents, self.n_tokens, self.n_bytes = len(document_bytes), int(offsets[-1]), int(document_bytes.sum())
        whole = SourceSlice("", Fraction(1), slice(0, self.n_documents), slice(0, self.n_tokens))
        self.sources = tuple(sources) or (whole,)
        self._shards, self._origins = list(shards), list(origins)
        self._starts = np.cumsum([0, *map(len, self._shards)])

    @classmethod
    def joined(cls, stores: Sequence["TokenStore"], sources: Sequence[Source] = ()) -> "TokenStore":
        """Concatenate `stores` of one tokenizer; each is a slice of the result if `sources` name them."""
        documents = np.cumsum([0, *(store.n_documents for store in stores)]).tolist()
        tokens = np.cumsum([0, *(store.n_tokens for store in stores)]).tolist()
        spans = [list(map(slice, edges, edges[1:])) for edges in (documents, tokens)]
        starts = [store.offsets[:-1] + start for store, start in zip(stores, tokens, strict=False)]
        return cls(
            stores[0].tokenizer,
            [shard for store in stores for shard in store._shards],
            np.concatenate([*starts, tokens[-1:]]),
            np.concatenate([store.document_bytes for store in stores]),
            [file for store in stores for file in store._origins],
            [SourceSlice(source.name, source.share, *span) for source, *span in zip(sources, *spans, strict=False)],
        )

    def read(self, start: int, stop: int) -> Int32[np.ndarray, "n"]:
        """Return the tokens from `start` up to `stop`, or up to the end of the stream."""
        found = [shard[max(start - first, 0) : max(stop - first, 0)] for first, shard in self._located(start, stop)]
        return np.concatenate([np.zeros(0, np.uint16), *found]).astype(np.int32)

    def _located(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the shards that hold tokens from `start` up to `stop`, each after the index of its first token."""
        first = max(int(np.searchsorted(self._starts, start, side="right")) - 1, 0)
        for begin, shard in zip(self._starts[first:].tolist(), self._shards[first:], strict=False):
            if begin >= stop:
                return
            yield begin, shard

    def read_spans(self, spans: Spans) -> Int32[np.ndarray, "n"]:
        """Return the tokens of `spans`, one span after the other."""
        if len(self._shards) == 1:  # one gather, however many and short they are
            return self._shards[0][ranges(spans.starts, spans.sizes)].astype(np.int32)
        spans = spans.cut(self._starts)
        shard_of = np.searchsorted(self._starts, spans.starts, side="right") - 1
        edges = [(edge - self._starts[shard_of]).tolist() for edge in (spans.starts, spans.stops)]
        found = [self._shards[n][start:stop] for n, start, stop in zip(shard_of.tolist(), *edges, strict=True)]
        return np.concatenate(found).astype(np.int32)

    def read_document(self, document: int) -> Iterator[Int32[np.ndarray, "n"]]:
        """Yield the tokens of `document`, some millions at a time."""
        start, stop = self.offsets[document : document + 2].tolist()
        yield from (self.read(at, min(at + READ_TOKENS, stop)) for at in range(start, stop, READ_TOKENS))

    def take(self, index: Int64[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
        """Return the tokens at `index` of the stream, 0 outside of it."""
        tokens = np.zeros(index.shape, np.int32)
        shard_of = np.searchsorted(self._starts, index, side="right") - 1
        for number in set(shard_of.ravel().tolist()).intersection(range(len(self._shards))):
            here = shard_of == number
            tokens[here] = self._shards[number][index[here] - self._starts[number]]
        return tokens

    def documents_of(self, index: Int64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """Return the document of each token at `index`, -1 before the stream and `n_documents` after it."""
        return np.searchsorted(self.offsets, index, side="right") - 1

    def origins(self, documents: Collection[int]) -> list[str]:
        """Return where `documents` came from, in their order in the corpus."""
        wanted, found, first = set(documents), [], 0
        for path, count in self._origins:
            with open(path, encoding="utf-8") as lines:
                found += [line.rstrip("\n") for number, line in enumerate(lines, start=first) if number in wanted]
            first += count
        return found


class Shards:
    """A folder that `prepare` wrote."""

    def __init__(self, folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self.folder, self.manifest, self.tokenizer = folder, manifest, tokenizer
        self._splits = {name: _open_split(folder, name, split, tokenizer) for name, split in manifest.splits.items()}

    @property
    def folders(self) -> list[Path]:
        """The folder, in a list because a mixture has several."""
        return [self.folder]

    @property
    def source(self) -> str:
        """Where the text came from."""
        return self.manifest.source

    def split(self, name: Literal["train", "heldout"]) -> TokenStore:
        """Return the tokens of a split."""
        return self._splits[name]


def open_shards(folder: str | Path) -> Shards:
    """Open what `prepare` wrote.

    Raise `ValueError`, one line, for a file that is missing or damaged, and for a manifest that contradicts the files
    next to it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for split in manifest.splits.values():
        for file, checksum in split.files.items():
            if not (folder / file).is_file() or sha256_of(folder / file) != checksum:
                raise ValueError(f"{folder / file} is damaged or missing; delete {folder} and prepare it again")
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(f"{folder / 'tokenizer'} did not make these tokens; {ADVICE}")
    if tokenizer.vocab_size != manifest.vocab_size:
        raise _contradicted(folder, "vocab_size", manifest.vocab_size, tokenizer.vocab_size, "the tokenizer")
    return Shards(folder, manifest, tokenizer)


def is_prepared(uri: str) -> bool:
    """Return whether `uri` is a folder of token shards."""
    return (Path(uri) / "meta.json").is_file()


def names_a_column(folder: Path) -> bool:
    """Return whether the manifest in `folder` has a `column`, even null; those of version 0.1.0 have none."""
    return "column" in read_json(folder / "meta.json", advice=ADVICE)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in `folder`. Raise `ValueError`, one line, if there is none, or it has another shape."""
    path = folder / "meta.json"
    if not path.is_file():
        raise ValueError(f"no shards in {folder}: expected a meta.json; write them with llm-jax prepare")
    meta = read_json(path, {"format": int}, advice=ADVICE)
    if meta["format"] != FORMAT:
        raise ValueError(f"{folder} has the format {meta['format']}, expected {FORMAT}; {ADVICE}")
    splits = check_fields(meta, {"splits": dict}, str(path), advice=ADVICE)["splits"]
    check_fields(splits, dict.fromkeys(SPLITS, dict), f"{path}: splits", advice=ADVICE)
    known = {name: _checked(Split, splits[name], f"{path}: splits.{name}") for name in SPLITS}
    for name, split in known.items():
        _check_files(path, name, split)
    return _checked(Manifest, meta | {"splits": known}, str(path))


def _checked(cls: type[Any], values: Any, where: str) -> Any:
    """Return a `cls` of the JSON `values`, each checked for its type; fields of later versions are ignored."""
    hints = get_type_hints(cls)
    needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    wanted = {name: _types(hint) for name, hint in hints.items() if name in needed or name in values}
    check_fields(values, wanted, where, advice=ADVICE)
    return cls(**{name: values[name] for name in wanted})


def _types(hint: Any) -> Types:
    """Return the types that JSON has for an annotated type."""
    if isinstance(hint, types.UnionType):
        return get_args(hint)
    return (int, float) if hint is float else get_origin(hint) or hint


def _check_files(path: Path, name: str, split: Split) -> None:
    fixed = {f"{name}_offsets.npy", f"{name}_bytes.npy", f"{name}_origins.txt"}
    for file, checksum in split.files.items():
        if (file not in fixed and not _holds_tokens(name, file)) or not isinstance(checksum, str):
            raise ValueError(f"{path}: splits.{name}.files names {file!r}, which is none of its files; {ADVICE}")
    if missing := fixed - split.files.keys():
        raise ValueError(f"{path}: splits.{name}.files has no {min(missing)}; {ADVICE}")


def _open_split(folder: Path, name: str, split: Split, tokenizer: Tokenizer) -> TokenStore:
    """Open the store of a split, after counting everything that the manifest and the offsets claim."""
    offsets, document_bytes = (_map(folder / f"{name}_{what}.npy", "i8") for what in ("offsets", "bytes"))
    shards = [_map(folder / file, "u2", "u4") for file in sorted(split.files) if _holds_tokens(name, file)]
    origins = folder / f"{name}_origins.txt"
    counted = {
        "documents": {f"{name}_bytes.npy": len(document_bytes), origins.name: _lines(origins)},
        "tokens": {"its shards": sum(map(len, shards))},
        "bytes": {f"{name}_bytes.npy": int(document_bytes.sum())},
    }
    for what, counts in counted.items():
        for where, count in counts.items():
            if getattr(split, what) != count:
                raise _contradicted(folder, f"splits.{name}.{what}", getattr(split, what), count, where)
    edges = len(offsets) == split.documents + 1 and (offsets[0], offsets[-1]) == (0, split.tokens)
    if not edges or (np.diff(offsets) < 0).any() or document_bytes.min(initial=0) < 0:
        raise ValueError(f"{folder / name}_offsets.npy does not divide {split.tokens} tokens; {ADVICE}")
    largest = max((int(shard.max(initial=0)) for shard in shards), default=0)
    if largest >= tokenizer.vocab_size:
        raise ValueError(
            f"{folder}: {name} has the token {largest}, and its tokenizer has 0 to {tokenizer.vocab_size - 1}; {ADVICE}"
        )
    return TokenStore(tokenizer, shards, offsets, document_bytes, [(origins, split.documents)])


def _contradicted(folder: Path, field: str, said: int, found: int, where: str) -> ValueError:
    return ValueError(f"{folder / 'meta.json'} says {field}={said}, but {where} has {found}; {ADVICE}")


def _holds_tokens(name: str, file: str) -> bool:
    return re.fullmatch(rf"{name}_\d+\.npy", file) is not None


def _map(path: Path, *kinds: str) -> np.ndarray:
    """Map the vector in `path` into memory."""
    try:
        found = np.asarray(np.load(path, mmap_mode="r"))
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no array ({error}); {ADVICE}") from None
    if found.ndim != 1 or found.dtype.str[1:] not in kinds:
        raise ValueError(f"{path} holds {found.dtype.name} {found.shape}, expected a vector of integers; {ADVICE}")
    return found


def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
