"""Tokenizers that came with a model of Hugging Face."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data.tokenizer import NO_BYTES, Tokenizer

# What says how the model reads and writes; the first is the tokenizer itself.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
TEMPLATES = "additional_chat_templates"  # a folder of more of them, such as those for tools

# Byte-level encodings write a byte as a letter: itself where that can be seen, or one from U+0100 on, in order.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_LETTERS = {byte: chr(byte) for byte in VISIBLE} | {
    byte: chr(0x100 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in VISIBLE)
}


class ImportedTokenizer(Tokenizer):
    """Run by the library `tokenizers` from the model's own tokenizer.json: no id can differ.

    `files` are what there was of `FILES`, kept as they are. Raises `ValueError` where the library is missing or can't
    read them, and for an end that it does not have. A text begins with what the library puts there, if it does.
    """

    def __init__(self, name: str, files: Mapping[str, bytes], end_of_text: int, most: int | None = None) -> None:
        """Added tokens from the id `most` on are left out: a model that only writes text may have no room for them."""
        self.files, self._encoding = files, _encoding(name, files["tokenizer.json"].decode(), most)
        begin_of_text = next(iter(self._encoding.encode("").ids), end_of_text)
        super().__init__(name, _table(self._encoding), end_of_text, begin_of_text)
        if end_of_text >= self.vocab_size:
            raise ValueError(
                f"token {end_of_text} is to end a text, but the tokenizer {name} has the ids 0 to "
                f"{self.vocab_size - 1}; set eos_token_id in config.json"
            )

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of `text`, int32 [n]. Only `special=True` reads special tokens as such, all there are."""
        self._encoding.encode_special_tokens = not special  # their name for taking them as plain text
        return np.array(self._encoding.encode(text, add_special_tokens=False).ids, np.int32)

    def _encode_text(self, text: str) -> np.ndarray:
        return self.encode(text)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of `tokens`, special ones among it, as the library has it."""
        return self._encoding.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into `folder`, for `load`, its own files among it."""
        super().save(folder)
        for name, content in self.files.items():
            (path := Path(folder) / name).parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    def _description(self) -> dict[str, Any]:
        marks = {"begin_of_text": self.begin_of_text, "end_of_text": self.end_of_text}
        return {"kind": "imported", **marks, "ids": self.vocab_size, "sha256": _sha256(self.files)}


def files_in(folder: str | Path) -> dict[str, bytes]:
    """What `folder` has of `FILES`. Raises `ValueError` where the tokenizer itself is not among them."""
    paths = [Path(folder) / name for name in FILES]
    if not paths[0].is_file():
        raise ValueError(f"no tokenizer in {folder}: {paths[0].name} is missing; name the folder of one")
    paths += sorted((Path(folder) / TEMPLATES).glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def load_imported(folder: Path, name: str, description: Mapping[str, Any]) -> ImportedTokenizer:
    """The tokenizer that `save` wrote. Raises `ValueError` where its file is another."""
    files = files_in(folder)
    if _sha256(files) != description["sha256"]:
        raise ValueError(f"{folder} is damaged: its tokenizer.json is another; import the model again")
    return ImportedTokenizer(name, files, description["end_of_text"], description["ids"])


def _sha256(files: Mapping[str, bytes]) -> str:
    return hashlib.sha256(files["tokenizer.json"]).hexdigest()


def _encoding(name: str, text: str, most: int | None) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            f"the tokenizer {name} runs on the library tokenizers; install it: pip install 'llm-jax[hf]'"
        ) from error
    try:
        encoding = tokenizers.Tokenizer.from_str(text if most is None else _within(text, most))
    except Exception as error:  # the library raises no other
        raise ValueError(
            f"the tokenizer.json of {name} can't be read by tokenizers {tokenizers.__version__} ({error}); "
            "update the library, or save the tokenizer again"
        ) from error
    encoding.no_truncation()
    encoding.no_padding()
    return encoding


def _within(text: str, most: int) -> str:
    """A tokenizer.json without its added tokens from the id `most` on."""
    description = json.loads(text)
    added = description.get("added_tokens") or []
    kept = [token for token in added if token["id"] < most]
    return text if kept == added else json.dumps(description | {"added_tokens": kept})


def _table(encoding: Any) -> list[bytes]:
    """The bytes of every id, by how the encoding spells them: in the letters of bytes, or with U+2581 for a blank."""
    letters = {letter: byte for byte, letter in BYTE_LETTERS.items()}
    by_bytes = '"ByteLevel"' in json.dumps(json.loads(encoding.to_str())["decoder"])
    vocabulary = encoding.get_vocab(with_added_tokens=True)
    added = {token.content for token in encoding.get_added_tokens_decoder().values()}
    table = [NO_BYTES] * (max(vocabulary.values()) + 1)
    for entry, token in vocabulary.items():
        if entry in added:
            table[token] = entry.encode()
        elif by_bytes:
            table[token] = bytes(letters[letter] for letter in entry)
        elif re.fullmatch("<0x[0-9A-F]{2}>", entry):
            table[token] = bytes([int(entry[3:5], 16)])
        else:
            table[token] = entry.replace("\u2581", " ").encode()
    return table
