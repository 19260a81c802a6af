"""What every tokenizer can do: turn text into token ids and back, and save itself.

A tokenizer is a table, the bytes that each id stands for, and a way to cut text into entries of that table.
It is saved as JSON and ranks (lines of base64 and number, the format that tiktoken reads), never pickled.
"""

import base64
import functools
import hashlib
import json
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.files import write_json, write_whole

END_OF_TEXT = "<|endoftext|>"
NOT_UNICODE = re.compile(r"[\ud800-\udfff]")  # surrogates, halves of a character, which JSON can spell
NO_BYTES = "\ufffd".encode()  # the bytes of an id that an encoding leaves out
MOST_IDS = 1 << 22  # a larger table is a damaged file, and would fill the memory before anything else fails
ENCODING, RANKS = "encoding.json", "ranks.tiktoken"  # the files of a saved tokenizer
DAMAGED = "it is damaged; prepare the data again"


class Tokenizer(ABC):
    """The interface of every tokenizer. Ids are the indices of `table`, hence below `vocab_size`.

    Attributes:
      end_of_text: the token that follows a document.
      end_ids: all tokens that end a generated text, `end_of_text` first.
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

        Raise `ValueError` for text that is not Unicode.
        """
        if not text.isascii() and (half := NOT_UNICODE.search(text)):
            raise ValueError(
                f"character {half[0]!r} at position {half.start()} is no character: half of one, or a byte that is "
                "not UTF-8; take it out"
            )
        return self._encode_specials(text) if special else self._encode_text(text)

    def spelled(self, text: str) -> str | None:
        """Return the first special token that `text` spells, or None."""
        found = self._spelling.search(text)
        return None if found is None else found[0]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of `tokens`; bytes that are not UTF-8 become U+FFFD. Raise like `decode_bytes`."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of `tokens`. Raise `ValueError` for an id outside 0 to `vocab_size - 1`."""
        return b"".join([self.table[token] for token in self._ids_in(tokens)])

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one id stands for. Raise `ValueError` for an id outside 0 to `vocab_size - 1`."""
        [token] = self._ids_in([token])
        return self.table[token]

    def _ids_in(self, tokens: Sequence[int] | np.ndarray) -> list[int]:
        """Return `tokens` as Python integers. Raise `ValueError` for one that is no id."""
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
        return fingerprint_of(self._description(), rank_lines(self._ranks()))

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into `folder`, for `load_tokenizer`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"name": self.name, "fingerprint": self.fingerprint, "encoding": self._description()}
        ends = {} if len(self.end_ids) == 1 else {"end_ids": list(self.end_ids)}  # they decide no id of a text
        write_whole(folder / RANKS, rank_lines(self._ranks()))
        write_json(folder / ENCODING, meta | ends)

    @abstractmethod
    def _encode_text(self, text: str) -> np.ndarray:
        """Return the ids of `text`, with no special tokens."""

    @abstractmethod
    def _description(self) -> dict[str, Any]:
        """Return all that decides ids, besides the ranks, as JSON."""

    def _ranks(self) -> Mapping[bytes, int]:
        return {}

    def _encode_specials(self, text: str) -> np.ndarray:
        """Return the ids of `text`, reading every spelled special token as that token."""
        plain, *others = self._spelling.split(text)
        ids = [self._encode_text(plain)]
        for special, plain in zip(others[::2], others[1::2], strict=True):
            ids += [np.array([self.special_tokens[special]], np.int32), self._encode_text(plain)]
        return np.concatenate(ids)

    @functools.cached_property
    def _spelling(self) -> re.Pattern[str]:
        """A pattern for special tokens, the longest first, in one group, which `split` keeps."""
        names = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})" if names else "((?!))")


def fingerprint_of(description: Mapping[str, Any], ranks: bytes) -> str:
    """Return the fingerprint of a tokenizer with this description and these lines of ranks."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode() + b"\n" + ranks).hexdigest()


def rank_lines(ranks: Mapping[bytes, int]) -> bytes:
    """Return `ranks` in tiktoken's format: a line of base64 and number for each entry, by number."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(entry), rank) for entry, rank in ordered)


def rust_error(error: BaseException) -> str:
    """Return in one line what a library in Rust raised, whose panics are no `Exception`. Re-raises any other error."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return " ".join(str(error).split())
