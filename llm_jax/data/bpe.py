"""Byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909; on bytes, as in GPT-2), run by tiktoken.

The merges are those of a published encoding, or are trained here, by rustbpe.
"""

import base64
import binascii
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rustbpe
import tiktoken

from llm_jax.data.tokenizer_interface import (
    DAMAGED,
    END_OF_TEXT,
    MOST_IDS,
    NO_BYTES,
    RANKS,
    Tokenizer,
    rust_error,
)

PIECE_CHARS = 400_000  # the regular expressions of an encoding fail on a million blanks
WORD_START = re.compile(r".*\S(?= \S)", re.DOTALL)  # matches up to the last single space between two words
NOT_UTF8 = re.compile(r"([\udc80-\udcff]+)")  # what `surrogateescape` makes of bytes that are not UTF-8


class BPETokenizer(Tokenizer):
    """A byte-pair encoding of tiktoken.

    Attributes:
      pattern: the regular expression that cuts text into words, within which pairs are merged.
      ranks: the id of each entry; the pair whose merge has the lowest id is merged first.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.pattern, self.ranks = encoding._pat_str, encoding._mergeable_ranks
        special_tokens = encoding._special_tokens
        specials = {name.encode(): token for name, token in special_tokens.items()}
        table = [NO_BYTES] * encoding.n_vocab
        for entry, token in [*self.ranks.items(), *specials.items()]:
            table[token] = entry
        super().__init__(encoding.name, table, special_tokens[END_OF_TEXT], special_tokens=special_tokens)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Return the ids of any bytes, int32 [n]: UTF-8 like `encode`, each other byte on its own."""
        spans = NOT_UTF8.split(data.decode("utf-8", errors="surrogateescape"))
        encoders = itertools.cycle([self._encode_text, self._encode_each_byte])  # `split` alternates them
        return np.concatenate([encode(span) for encode, span in zip(encoders, spans, strict=False)])

    def _encode_each_byte(self, text: str) -> np.ndarray:
        data = text.encode("utf-8", errors="surrogateescape")
        return np.array([self._encoding.encode_single_token(bytes([byte])) for byte in data], np.int32)

    def _encode_text(self, text: str) -> np.ndarray:
        try:
            ids = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
        except BaseException as error:
            raise ValueError(f"the tokenizer {self.name} can't read {text[:40]!r} ({rust_error(error)})") from error
        return np.concatenate(ids).astype(np.int32)

    def _description(self) -> dict[str, Any]:
        return {"kind": "bpe", "pattern": self.pattern, "special_tokens": self.special_tokens}

    def _ranks(self) -> Mapping[bytes, int]:
        return self.ranks


def train(vocab_size: int, texts: Iterable[str]) -> BPETokenizer:
    """Train a byte-pair encoding of `vocab_size` ids in all, or fewer if `texts` run out of pairs to merge.

    Raise `ValueError` for a size below 257 (256 bytes and the end of text) or above `MOST_IDS`.
    """
    if vocab_size < 257:
        raise ValueError(
            f"train:{vocab_size} is too small: 256 bytes and {END_OF_TEXT} make 257; use train:4096, or byte"
        )
    if vocab_size > MOST_IDS:
        raise ValueError(f"train:{vocab_size} is too large: a table has at most {MOST_IDS} ids; use train:4096")
    trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
    trainer.train_from_iterator((piece for text in texts for piece in pieces(text)), vocab_size - 1)
    ranks = {bytes(entry): rank for entry, rank in trainer.get_mergeable_ranks()}
    return from_ranks(f"train:{vocab_size}", trainer.get_pattern(), ranks, {END_OF_TEXT: len(ranks)})


def published(name: str) -> BPETokenizer:
    """Return one of tiktoken's encodings. Raise `ValueError` if it can't be downloaded."""
    try:
        return BPETokenizer(tiktoken.get_encoding(name))
    except OSError as error:  # every failure of the network is one
        raise ValueError(
            f"tiktoken cannot fetch the encoding {name} ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to "
            "a folder where it has done so before, or train one here: data.tokenizer=train:4096"
        ) from error


def from_ranks(name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> BPETokenizer:
    """Return the tokenizer of these ranks and special tokens."""
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    return BPETokenizer(encoding)


def load_bpe(folder: Path, name: str, pattern: str, lines: bytes, specials: Mapping[str, Any]) -> BPETokenizer:
    """Return the tokenizer saved in `folder`. Raise `ValueError` for one that tiktoken would fail on."""
    try:
        ranks = _ranks_in(lines)
    except (ValueError, binascii.Error):
        raise ValueError(f"{folder / RANKS} is no list of base64 and number; {DAMAGED}") from None
    ids = [*ranks.values(), *specials.values()]
    reason = None
    if not all(type(token) is int and 0 <= token < MOST_IDS for token in ids) or len(set(ids)) < len(ids):
        reason = f"its ids are not different integers from 0 to {MOST_IDS - 1}"
    elif any(bytes([byte]) not in ranks for byte in range(256)):
        reason = "it has no id for some bytes"
    elif END_OF_TEXT not in specials:
        reason = f"it has no {END_OF_TEXT}"
    elif not all(text and text.isprintable() for text in specials):
        reason = "a special token is not text that can be printed"
    if reason is None:
        try:
            return from_ranks(name, pattern, ranks, {**specials})
        except ValueError as error:
            reason = f"its pattern can't be read: {' '.join(str(error).split())[:100]}"
    raise ValueError(f"{folder} is damaged: {reason}; prepare the data again")


def pieces(text: str) -> Iterator[str]:
    """Yield `text` in pieces of at most `PIECE_CHARS` characters, each of which an encoding can process.

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


def _ranks_in(lines: bytes) -> dict[bytes, int]:
    pairs = (line.split() for line in lines.splitlines())
    return {base64.b64decode(entry, validate=True): int(rank) for entry, rank in pairs}
