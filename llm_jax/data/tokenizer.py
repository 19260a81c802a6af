"""Text to token ids and back: tiktoken's encodings, byte-pair encodings trained here, bytes, characters.

A tokenizer is a table, the bytes that each id stands for, and a way to cut text into entries of that table.
It is saved as JSON and ranks (lines of base64 and number, the format tiktoken reads), never pickled.
"""

import base64
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import rustbpe
import tiktoken

from llm_jax.config import nearest

END_OF_TEXT = "<|endoftext|>"
NAMED = ("gpt2", "cl100k_base", "o200k_base")
SPECS = (*NAMED, "byte", "char", "train:4096")

PIECE_CHARS = 400_000  # the regular expressions of an encoding fail on a million blanks
WORD_START = re.compile(r".*\S(?= \S)", re.DOTALL)  # matches up to the last single space between two words
NOT_UTF8 = re.compile(r"([\udc80-\udcff]+)")  # what `surrogateescape` makes of bytes that are not UTF-8
BATCH_CHARS = 1 << 20
BATCHES_ALONE = 8  # done before a pool of processes has started
NO_BYTES = "\ufffd".encode()  # what an id that an encoding leaves out decodes to


class Tokenizer(ABC):
    """What every tokenizer can do. Ids are the positions of `table`, hence below `vocab_size`.

    A text begins behind `begin_of_text`, in training as in writing; None: behind the end of another.
    """

    def __init__(self, name: str, table: Sequence[bytes], end_of_text: int, begin_of_text: int | None = None) -> None:
        self.name = name
        self.table = table
        self.vocab_size = len(table)
        self.end_of_text = end_of_text
        self.begin_of_text = end_of_text if begin_of_text is None else begin_of_text

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of `text`, int32 [n]. Only `special=True` reads `<|endoftext|>` as the special token."""
        if not special:
            return self._encode_text(text)
        first, *others = (self._encode_text(part) for part in text.split(END_OF_TEXT))
        mark = np.array([self.end_of_text], np.int32)
        return np.concatenate([first, *(part for other in others for part in (mark, other))])

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of `tokens`. Raises `ValueError` for an id that is none."""
        return b"".join([self.token_bytes(token) for token in np.asarray(tokens, np.int64).tolist()])

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for. Raises `ValueError` for an id that is none."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"token {token} is not an id of {self.name}, which has 0 to {self.vocab_size - 1}; "
                "decode with the tokenizer that encoded"
            )
        return self.table[token]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that decides ids. The name does not."""
        return _digest(self._description(), _to_lines(self._ranks()))

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into `folder`, for `load`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"name": self.name, "fingerprint": self.fingerprint, "encoding": self._description()}
        (folder / "encoding.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        (folder / "ranks.tiktoken").write_bytes(_to_lines(self._ranks()))

    @abstractmethod
    def _encode_text(self, text: str) -> np.ndarray:
        """The ids of `text`, in which nothing is special."""

    @abstractmethod
    def _description(self) -> dict[str, Any]:
        """All that decides ids, beside the ranks, as JSON."""

    def _ranks(self) -> Mapping[bytes, int]:
        return {}


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al., 2016, on bytes as GPT-2 has it), run by tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.pattern, self.ranks = encoding._pat_str, encoding._mergeable_ranks
        self.special_tokens = encoding._special_tokens
        specials = {name.encode(): token for name, token in self.special_tokens.items()}
        table = [NO_BYTES] * encoding.n_vocab
        for entry, token in [*self.ranks.items(), *specials.items()]:
            table[token] = entry
        super().__init__(encoding.name, table, self.special_tokens[END_OF_TEXT])

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """The ids of any bytes, int32 [n]: UTF-8 as `encode` gives them, each other byte on its own."""
        parts = NOT_UTF8.split(data.decode("utf-8", errors="surrogateescape"))
        encoders = itertools.cycle([self._encode_text, self._encode_odd])  # what splits stands at odd places
        return np.concatenate([encode(part) for encode, part in zip(encoders, parts, strict=False)])

    def _encode_odd(self, text: str) -> np.ndarray:
        data = text.encode("utf-8", errors="surrogateescape")
        return np.array([self._encoding.encode_single_token(bytes([byte])) for byte in data], np.int32)

    def _encode_text(self, text: str) -> np.ndarray:
        parts = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
        return np.concatenate(parts).astype(np.int32)

    def _description(self) -> dict[str, Any]:
        return {"kind": "bpe", "pattern": self.pattern, "special_tokens": self.special_tokens}

    def _ranks(self) -> Mapping[bytes, int]:
        return self.ranks


class ByteTokenizer(Tokenizer):
    """Every byte of the text as UTF-8 is a token; 256 ends a text."""

    def __init__(self) -> None:
        super().__init__("byte", [*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode()], 256)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """The bytes as numbers, int32 [n]."""
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def _encode_text(self, text: str) -> np.ndarray:
        return self.encode_bytes(text.encode())

    def _description(self) -> dict[str, Any]:
        return {"kind": "byte"}


class CharTokenizer(Tokenizer):
    """Every character of an alphabet is a token, by code point; the id after the last ends a text."""

    def __init__(self, alphabet: Iterable[str]) -> None:
        self._alphabet = "".join(sorted(set(alphabet)))
        self._points = np.array([ord(character) for character in self._alphabet], np.uint32)
        table = [*(character.encode() for character in self._alphabet), END_OF_TEXT.encode()]
        super().__init__("char", table, len(self._alphabet))

    def _encode_text(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        tokens = np.searchsorted(self._points, points)
        known = np.append(self._points, np.uint32(0xFFFFFFFF))[tokens] == points
        if not known.all():
            where = int(np.argmin(known))
            raise ValueError(
                f"character {text[where]!r} at position {where} is not among the {len(self._alphabet)} that "
                "the char tokenizer was built on; leave it out, or prepare the data with tokenizer=byte"
            )
        return tokens.astype(np.int32)

    def _description(self) -> dict[str, Any]:
        return {"kind": "char", "alphabet": self._alphabet}


def build(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that `spec` names: one of `SPECS`, or a folder that one was saved in.

    `texts()` gives `char` its alphabet and `train:N` its merges; the others don't call it. N counts the whole
    vocabulary: 256 bytes, the merges, and the end of text. Raises `ValueError` for a spec that names nothing,
    and for an encoding that cannot be fetched.
    """
    kind, _, size = spec.partition(":")
    if spec in NAMED:
        return _named(spec)
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        return CharTokenizer(functools.reduce(set[str].union, texts(), set()))
    if kind == "train" and size.isdecimal():
        return train(int(size), texts())
    if not Path(spec).is_dir():
        raise ValueError(f"unknown tokenizer {spec!r}, and no folder of that name; {nearest(spec, SPECS)}")
    return load(spec)


def train(vocab_size: int, texts: Iterable[str]) -> BPETokenizer:
    """A byte-pair encoding of `vocab_size` ids in all, fewer where `texts` run out of pairs to merge."""
    if vocab_size < 257:
        raise ValueError(
            f"train:{vocab_size} is too small: 256 bytes and {END_OF_TEXT} make 257; use train:4096, or byte"
        )
    trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
    trainer.train_from_iterator((piece for text in texts for piece in pieces(text)), vocab_size - 1)
    ranks = {bytes(entry): rank for entry, rank in trainer.get_mergeable_ranks()}
    return _bpe(f"train:{vocab_size}", trainer.get_pattern(), ranks, {END_OF_TEXT: len(ranks)})


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises `ValueError` where there is none, or a damaged one."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "encoding.json").read_text(encoding="utf-8"))
        name, fingerprint, description = meta["name"], meta["fingerprint"], meta["encoding"]
        ranks = (folder / "ranks.tiktoken").read_bytes()
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ValueError(f"no tokenizer in {folder}: {missing} is missing; name the folder of one") from None
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'encoding.json'} is damaged ({error}); prepare the data again") from None
    if _digest(description, ranks) != fingerprint:
        raise ValueError(f"{folder} is damaged: the tokenizer has another fingerprint; prepare the data again")
    match description["kind"]:
        case "byte":
            return ByteTokenizer()
        case "char":
            return CharTokenizer(description["alphabet"])
        case "imported":
            from llm_jax.data.imported import load_imported  # it knows this file

            return load_imported(folder, name, description)
        case _:
            pattern, specials = description["pattern"], description["special_tokens"]
            return _bpe(name, pattern, _from_lines(ranks), specials)


def encode_all(folder: str | Path, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of every text, in order, by the tokenizer saved in `folder`; of many, by a pool of processes.

    Holds a few megabytes of text at a time. Raises `ValueError` if a process of the pool dies.
    """
    tokenizer, batches = load(folder), _batches(texts)
    for batch in itertools.islice(batches, BATCHES_ALONE):
        yield from map(tokenizer.encode, batch)
    more = next(batches, None)
    if more is None:
        return
    workers = os.cpu_count() or 1
    waiting: deque[Future[list[np.ndarray]]] = deque()
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for batch in itertools.chain([more], batches):
                waiting.append(pool.submit(_encode_batch, folder, batch))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that tokenizes died: it had too little memory, or your script has no "
            '`if __name__ == "__main__":` around the call, which every process needs'
        ) from error


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most `PIECE_CHARS`, each of which an encoding can take in.

    A piece ends before a single space between two words. Every encoding here starts a token at that space,
    so the ids are those of the whole text. Only a text without one, a megabyte of blanks, is cut anywhere.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        words = WORD_START.match(text, start, start + PIECE_CHARS)
        stop = words.end() if words else start + PIECE_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]


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


_load_once = functools.cache(load)


def _encode_batch(folder: str | Path, texts: list[str]) -> list[np.ndarray]:
    return [_load_once(folder).encode(text) for text in texts]


def _named(name: str) -> BPETokenizer:
    try:
        return BPETokenizer(tiktoken.get_encoding(name))
    except OSError as error:  # every failure of the network is one
        raise ValueError(
            f"tiktoken cannot fetch the encoding {name} ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to "
            "a folder where it has done so before, or train one here: tokenizer=train:4096"
        ) from error


def _bpe(name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> BPETokenizer:
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    return BPETokenizer(encoding)


def _digest(description: Mapping[str, Any], ranks: bytes) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode() + b"\n" + ranks).hexdigest()


def _to_lines(ranks: Mapping[bytes, int]) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(entry), rank) for entry, rank in ordered)


def _from_lines(lines: bytes) -> dict[bytes, int]:
    pairs = (line.split() for line in lines.splitlines())
    return {base64.b64decode(entry): int(rank) for entry, rank in pairs}
