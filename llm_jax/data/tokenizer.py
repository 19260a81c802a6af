"""Text to token ids and back: tiktoken's encodings, byte-pair encodings trained here, bytes, characters.

A tokenizer is its table, the bytes that each id stands for, and a way to cut text into those bytes.
It is saved as JSON and ranks (tiktoken's text format), never pickled.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rustbpe
import tiktoken

END_OF_TEXT = "<|endoftext|>"
NAMED = ("gpt2", "cl100k_base", "o200k_base")
_PIECE_CHARS = 400_000
_LAST_WORD_START = re.compile(r".*\S(?= \S)", re.DOTALL)
_SURROGATES = re.compile(r"([\udc80-\udcff]+)")

Tokens = Sequence[int] | np.ndarray


class Tokenizer(ABC):
    """What every tokenizer does. `table[id]` is the bytes of an id; ids are below `vocab_size = len(table)`."""

    def __init__(self, name: str, table: Sequence[bytes], end_of_text: int) -> None:
        self.name = name
        self.table = table
        self.vocab_size = len(table)
        self.end_of_text = end_of_text

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Token ids of `text`, int32 [n]. Only `special=True` reads `<|endoftext|>` as the special token."""
        if not special:
            return self._encode_text(text)
        mark = np.array([self.end_of_text], np.int32)
        parts = [part for piece in text.split(END_OF_TEXT) for part in (mark, self._encode_text(piece))]
        return np.concatenate(parts[1:])

    def decode(self, tokens: Tokens) -> str:
        """The text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Tokens) -> bytes:
        """The bytes of `tokens`. Raises ValueError for an id outside the vocabulary."""
        return b"".join([self.token_bytes(token) for token in np.asarray(tokens, np.int64).tolist()])

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"token {token} is outside the vocabulary of {self.name!r}, 0 to {self.vocab_size - 1}; "
                "decode with the tokenizer that the tokens were made with"
            )
        return self.table[token]

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into `folder`, for `load`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_ranks(folder / "ranks.tiktoken", self._ranks())
        description = self._description() | {"name": self.name, "fingerprint": self.fingerprint}
        (folder / "encoding.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides ids; the name does not."""
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for token in self.table:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    @abstractmethod
    def _encode_text(self, text: str) -> np.ndarray:
        """Token ids of text in which nothing is special."""

    @abstractmethod
    def _description(self) -> dict[str, Any]:
        """What is saved as JSON beside the ranks."""

    def _ranks(self) -> dict[bytes, int]:
        return {}


class BPETokenizer(Tokenizer):
    """A byte-pair encoding, run by tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        table = [b"\xef\xbf\xbd"] * encoding.n_vocab  # an id that stands for nothing shows as U+FFFD
        specials = {name.encode(): token for name, token in encoding._special_tokens.items()}
        for token_bytes, token in (encoding._mergeable_ranks | specials).items():
            table[token] = token_bytes
        super().__init__(encoding.name, table, encoding._special_tokens[END_OF_TEXT])

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Token ids of any bytes, int32 [n]: UTF-8 as `encode` does, every other byte as itself."""
        parts = _SURROGATES.split(data.decode("utf-8", errors="surrogateescape"))
        encoded = [self._encode_text(text) if i % 2 == 0 else self._single(text) for i, text in enumerate(parts)]
        return np.concatenate(encoded)

    def _single(self, text: str) -> np.ndarray:
        data = text.encode("utf-8", errors="surrogateescape")
        return np.array([self.encoding.encode_single_token(bytes([byte])) for byte in data], np.int32)

    def _encode_text(self, text: str) -> np.ndarray:
        encode = functools.partial(self.encoding.encode_to_numpy, disallowed_special=())
        parts = [encode(piece) for piece in pieces(text)]
        return np.concatenate(parts).astype(np.int32)

    def _description(self) -> dict[str, Any]:
        return {
            "kind": "bpe",
            "pattern": self.encoding._pat_str,
            "special_tokens": self.encoding._special_tokens,
        }

    def _ranks(self) -> dict[bytes, int]:
        return self.encoding._mergeable_ranks


class ByteTokenizer(Tokenizer):
    """Every byte of the UTF-8 text is a token; 256 is the end of text."""

    def __init__(self) -> None:
        super().__init__("byte", [bytes([byte]) for byte in range(256)] + [END_OF_TEXT.encode()], 256)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """The bytes themselves, int32 [n]."""
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def _encode_text(self, text: str) -> np.ndarray:
        return self.encode_bytes(text.encode())

    def _description(self) -> dict[str, Any]:
        return {"kind": "byte"}


class CharTokenizer(Tokenizer):
    """Every character of `alphabet` is a token; the id after them is the end of text."""

    def __init__(self, alphabet: str) -> None:
        self.alphabet = "".join(sorted(set(alphabet)))
        super().__init__("char", [c.encode() for c in self.alphabet] + [END_OF_TEXT.encode()], len(self.alphabet))
        self._points = np.array([ord(c) for c in self.alphabet], np.uint32)

    def _encode_text(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        tokens = np.searchsorted(self._points, points).clip(max=len(self._points) - 1)
        unknown = np.flatnonzero(self._points[tokens] != points)
        if unknown.size:
            raise ValueError(
                f"character {text[unknown[0]]!r} at position {unknown[0]} is not among the {len(self.alphabet)} "
                "characters that the tokenizer was built on; leave it out, or train with tokenizer=byte or train:4096"
            )
        return tokens.astype(np.int32)

    def _description(self) -> dict[str, Any]:
        return {"kind": "char", "alphabet": self.alphabet}


def build(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that `spec` names: `gpt2`, `cl100k_base`, `o200k_base`, `byte`, `char`, `train:N`, or a folder.

    `char` takes its alphabet, and `train:N` its merges, from `texts()`; the others leave it uncalled. `N` counts the
    whole vocabulary: 256 bytes, the merges, and the end of text.
    """
    if spec in NAMED:
        return BPETokenizer(tiktoken.get_encoding(spec))
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        return CharTokenizer("".join(functools.reduce(set.union, texts(), set())))
    if spec.startswith("train:"):
        return train(int(spec.removeprefix("train:")), texts())
    return load(spec)


def train(vocab_size: int, texts: Iterable[str]) -> BPETokenizer:
    """A byte-pair encoding of `vocab_size` ids in all (fewer where the text has too few pairs to merge)."""
    if vocab_size < 257:
        raise ValueError(f"train:{vocab_size} is too small: 256 bytes and {END_OF_TEXT} make 257; use train:4096")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator((piece for text in texts for piece in pieces(text)), vocab_size - 1)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return _encoding(f"train:{vocab_size}", trainer.get_pattern(), ranks, {END_OF_TEXT: len(ranks)})


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises ValueError where `folder` holds none, or a damaged one."""
    folder = Path(folder)
    if not (folder / "encoding.json").is_file():
        raise ValueError(
            f"no tokenizer {str(folder)!r}: expected {', '.join(NAMED)}, byte, char, train:4096, "
            "or a folder that a tokenizer was saved in"
        )
    description = json.loads((folder / "encoding.json").read_text(encoding="utf-8"))
    match description["kind"]:
        case "byte":
            tokenizer = ByteTokenizer()
        case "char":
            tokenizer = CharTokenizer(description["alphabet"])
        case _:
            ranks = _read_ranks(folder / "ranks.tiktoken")
            tokenizer = _encoding(
                description["name"], description["pattern"], ranks, description["special_tokens"]
            )
    if tokenizer.fingerprint != description["fingerprint"]:
        raise ValueError(f"the tokenizer in {folder} is damaged: its fingerprint differs; prepare the data again")
    return tokenizer


def pieces(text: str) -> Iterator[str]:
    """`text` in parts of at most 400,000 characters, which the regular expressions of an encoding can bear.

    A part ends before a single space between words: every encoding starts a token there, so ids are those of
    the whole text. Only text without such a space (a megabyte of blanks) is cut anywhere.
    """
    start = 0
    while len(text) - start > _PIECE_CHARS:
        word = _LAST_WORD_START.match(text, start, start + _PIECE_CHARS)
        stop = word.end() if word else start + _PIECE_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _encoding(name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> BPETokenizer:
    return BPETokenizer(
        tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    )


def _write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    if ranks:
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        path.write_text("".join(lines), encoding="ascii")


def _read_ranks(path: Path) -> dict[bytes, int]:
    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}
