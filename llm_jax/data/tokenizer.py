"""Text to token ids and back: tiktoken's encodings, byte-pair encodings trained here, bytes, characters.

A tokenizer is a table, the bytes that each id stands for, and a way to cut text into entries of that table.
It is saved as JSON and ranks (lines of base64 and number, the format tiktoken reads), never pickled.
"""

import base64
import binascii
import functools
import hashlib
import itertools
import json
import operator
import os
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rustbpe
import tiktoken

from llm_jax.config import nearest
from llm_jax.files import check_fields, read_json, write_json, write_whole

END_OF_TEXT = "<|endoftext|>"
NAMED = ("gpt2", "cl100k_base", "o200k_base")
SPECS = (*NAMED, "byte", "char", "train:4096")

PIECE_CHARS = 400_000  # the regular expressions of an encoding fail on a million blanks
WORD_START = re.compile(r".*\S(?= \S)", re.DOTALL)  # matches up to the last single space between two words
NOT_UNICODE = re.compile(r"[\ud800-\udfff]")  # halves of characters, which JSON can spell
NOT_UTF8 = re.compile(r"([\udc80-\udcff]+)")  # what `surrogateescape` makes of bytes that are not UTF-8
NO_BYTES = "\ufffd".encode()  # what an id that an encoding leaves out decodes to
MOST_IDS = 1 << 22  # a table of more is a damaged file, and would fill the memory before anything else said so
DAMAGED = "it is damaged; prepare the data again"
FIELDS = {  # what encoding.json says of each kind
    "byte": {},
    "char": {"alphabet": str},
    "bpe": {"pattern": str, "special_tokens": dict},
    "imported": {"begin_of_text": int, "end_of_text": int, "ids": int, "sha256": str},
}


class Tokenizer(ABC):
    """What every tokenizer can do. Ids are the positions of `table`, hence below `vocab_size`.

    Attributes:
      end_of_text: the token that follows a document.
      end_ids: all tokens that end a text that is being generated, `end_of_text` first.
      begin_of_text: the token that a document begins with in training; by default the end of another.
      begins: whether the tokenizer itself, used alone, puts `begin_of_text` before a text.
      special_tokens: the tokens that text may spell, and their ids.
    """

    def __init__(
        self,
        name: str,
        table: Sequence[bytes],
        end_of_text: int,
        *,
        end_ids: Sequence[int] = (),
        begin_of_text: int | None = None,
        begins: bool = False,
        special_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self.table = table
        self.vocab_size = len(table)
        self.end_of_text = end_of_text
        self.end_ids = tuple(dict.fromkeys([end_of_text, *end_ids]))
        self.begin_of_text = end_of_text if begin_of_text is None else begin_of_text
        self.begins = begins
        self.special_tokens = {END_OF_TEXT: end_of_text} if special_tokens is None else special_tokens

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Return the ids of `text`, int32 [n]. Only `special=True` reads what spells a special token as that token.

        Raises `ValueError` for text that is not Unicode.
        """
        if not text.isascii() and (half := NOT_UNICODE.search(text)):
            raise ValueError(
                f"character {half[0]!r} at position {half.start()} is no character: half of one, or a byte that is "
                "not UTF-8; take it out"
            )
        return self._encode_specials(text) if special else self._encode_text(text)

    def spelled(self, text: str) -> str | None:
        """Return the first special token that `text` spells, or None where it spells none."""
        found = self._spelling.search(text)
        return None if found is None else found[0]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of `tokens`; bytes that are not UTF-8 become U+FFFD. Raises as `decode_bytes`."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of `tokens`. Raises `ValueError` for an id outside 0 to `vocab_size - 1`."""
        return b"".join([self.table[token] for token in self._ids_in(tokens)])

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one id stands for. Raises `ValueError` for an id outside 0 to `vocab_size - 1`."""
        [token] = self._ids_in([token])
        return self.table[token]

    def _ids_in(self, tokens: Sequence[int] | np.ndarray) -> list[int]:
        """Return `tokens` as Python integers, known to be ids."""
        ids = tokens.tolist() if isinstance(tokens, np.ndarray) else [*tokens]
        for token in ids:
            if not (hasattr(token, "__index__") and 0 <= token < self.vocab_size):
                raise ValueError(
                    f"token {token} is not an id of {self.name}, which has 0 to {self.vocab_size - 1}; "
                    "decode with the tokenizer that encoded"
                )
        return [operator.index(token) for token in ids]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that decides ids. The name does not."""
        return _digest(self._description(), _to_lines(self._ranks()))

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into `folder`, for `load`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"name": self.name, "fingerprint": self.fingerprint, "encoding": self._description()}
        ends = {} if len(self.end_ids) == 1 else {"end_ids": list(self.end_ids)}  # they decide no id of a text
        write_whole(folder / "ranks.tiktoken", _to_lines(self._ranks()))
        write_json(folder / "encoding.json", meta | ends)

    @abstractmethod
    def _encode_text(self, text: str) -> np.ndarray:
        """The ids of `text`, in which nothing is special."""

    @abstractmethod
    def _description(self) -> dict[str, Any]:
        """All that decides ids, beside the ranks, as JSON."""

    def _ranks(self) -> Mapping[bytes, int]:
        return {}

    def _encode_specials(self, text: str) -> np.ndarray:
        """The ids of `text`, in which all `special_tokens` are special."""
        plain, *others = self._spelling.split(text)
        ids = [self._encode_text(plain)]
        for special, plain in zip(others[::2], others[1::2], strict=True):
            ids += [np.array([self.special_tokens[special]], np.int32), self._encode_text(plain)]
        return np.concatenate(ids)

    @functools.cached_property
    def _spelling(self) -> re.Pattern[str]:
        """Matches a special token, the longest that begins where it does; one group, which `split` keeps."""
        names = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})" if names else "((?!))")


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al., 2016, on bytes as GPT-2 has it), run by tiktoken."""

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
        """The ids of any bytes, int32 [n]: UTF-8 as `encode` gives them, each other byte on its own."""
        parts = NOT_UTF8.split(data.decode("utf-8", errors="surrogateescape"))
        encoders = itertools.cycle([self._encode_text, self._encode_odd])  # what splits stands at odd places
        return np.concatenate([encode(part) for encode, part in zip(encoders, parts, strict=False)])

    def _encode_odd(self, text: str) -> np.ndarray:
        data = text.encode("utf-8", errors="surrogateescape")
        return np.array([self._encoding.encode_single_token(bytes([byte])) for byte in data], np.int32)

    def _encode_text(self, text: str) -> np.ndarray:
        try:
            parts = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
        except BaseException as error:
            raise ValueError(f"the tokenizer {self.name} can't read {text[:40]!r} ({library_said(error)})") from error
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
    if kind == "train" and re.fullmatch("[0-9]{1,18}", size):
        return train(int(size), texts())
    if not os.path.isdir(spec):  # of a name that no file could have, too
        raise ValueError(f"unknown tokenizer {spec!r}, and no folder of that name; {nearest(spec, SPECS)}")
    return load(spec)


def train(vocab_size: int, texts: Iterable[str]) -> BPETokenizer:
    """A byte-pair encoding of `vocab_size` ids in all, fewer where `texts` run out of pairs to merge."""
    if vocab_size < 257:
        raise ValueError(
            f"train:{vocab_size} is too small: 256 bytes and {END_OF_TEXT} make 257; use train:4096, or byte"
        )
    if vocab_size > MOST_IDS:
        raise ValueError(f"train:{vocab_size} is too large: a table has at most {MOST_IDS} ids; use train:4096")
    trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
    trainer.train_from_iterator((piece for text in texts for piece in pieces(text)), vocab_size - 1)
    ranks = {bytes(entry): rank for entry, rank in trainer.get_mergeable_ranks()}
    return _bpe(f"train:{vocab_size}", trainer.get_pattern(), ranks, {END_OF_TEXT: len(ranks)})


def load(folder: str | Path) -> Tokenizer:
    """Return the tokenizer that `save` wrote. Raises `ValueError`, one line, where there is none, or a damaged one."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file() and not (folder / "encoding.json").exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds a tokenizer of Hugging Face without its model; name a folder of both")
        raise ValueError(
            f"{folder} holds a tokenizer of Hugging Face, which comes with its model: llm-jax import "
            f"{shlex.quote(str(folder))} --run DIR, then name DIR/tokenizer"
        )
    for file in ("encoding.json", "ranks.tiktoken"):
        if not (folder / file).is_file():
            raise ValueError(f"no tokenizer in {folder}: {file} is missing; name the folder of one")
    path = folder / "encoding.json"
    meta = read_json(path, {"name": str, "fingerprint": str, "encoding": dict}, advice=DAMAGED)
    description, ranks = meta["encoding"], (folder / "ranks.tiktoken").read_bytes()
    where = f"{path}: encoding"
    kind = check_fields(description, {"kind": str}, where, advice=DAMAGED)["kind"]
    if kind not in FIELDS:
        raise ValueError(f"{where} is of the kind {kind!r}, expected one of {', '.join(FIELDS)}; {DAMAGED}")
    check_fields(description, FIELDS[kind], where, advice=DAMAGED)
    if extra := description.keys() - FIELDS[kind].keys() - {"kind"}:
        raise ValueError(f"{where} has {min(extra)!r}, which this version does not know; {DAMAGED}")
    if _digest(description, ranks) != meta["fingerprint"]:
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
            from llm_jax.data.imported import load_imported  # it knows this file

            return load_imported(folder, meta["name"], description, meta.get("end_ids", []))
        case _:
            specials = description["special_tokens"]
            encoding = _checked_encoding(folder, meta["name"], description["pattern"], ranks, specials)
            return BPETokenizer(encoding)


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


def library_said(error: BaseException) -> str:
    """Return in a line what a library in Rust raised, whose panics are no `Exception`. Raises any other error again."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return " ".join(str(error).split())


def _from_lines(lines: bytes) -> dict[bytes, int]:
    pairs = (line.split() for line in lines.splitlines())
    return {base64.b64decode(entry, validate=True): int(rank) for entry, rank in pairs}


def _checked_encoding(
    folder: Path, name: str, pattern: str, lines: bytes, specials: Mapping[str, Any]
) -> tiktoken.Encoding:
    """Return the encoding of a saved tokenizer. Raises `ValueError` for one that tiktoken would break on."""
    try:
        ranks = _from_lines(lines)
    except (ValueError, binascii.Error):
        raise ValueError(f"{folder / 'ranks.tiktoken'} is no list of base64 and number; {DAMAGED}") from None
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
            return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={**specials})
        except ValueError as error:
            reason = f"its pattern can't be read: {' '.join(str(error).split())[:100]}"
    raise ValueError(f"{folder} is damaged: {reason}; prepare the data again")
