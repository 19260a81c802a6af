"""The two tokenizers that need no training: one token for each byte, or for each character of an alphabet."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from llm_jax.data.tokenizer_interface import END_OF_TEXT, Tokenizer


class ByteTokenizer(Tokenizer):
    """Every byte of the text in UTF-8 is a token; 256 ends a text."""

    def __init__(self) -> None:
        super().__init__("byte", [*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode()], 256)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Return the bytes as numbers, int32 [n]."""
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
                "the char tokenizer was built on; leave it out, or set data.tokenizer=byte"
            )
        return tokens.astype(np.int32)

    def _description(self) -> dict[str, Any]:
        return {"kind": "char", "alphabet": self._alphabet}
