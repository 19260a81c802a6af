"""Tokenizers that came with a Hugging Face model, run by its library `tokenizers`."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data import tokenizer_json
from llm_jax.data.tokenizer_interface import MOST_IDS, NO_BYTES, Tokenizer, rust_error
from llm_jax.files import write_whole

# The files that say how the model reads and writes; the first is the tokenizer itself.
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
TEMPLATES = "additional_chat_templates"  # a folder of more templates, such as those for tools

# Byte-level encodings write a byte as a letter: itself if that is visible, or the next one from U+0100 on.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_LETTERS = {byte: chr(byte) for byte in VISIBLE} | {
    byte: chr(0x100 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in VISIBLE)
}

PROBES = 1000  # texts to try until one has tokens


class ImportedTokenizer(Tokenizer):
    """The model's own tokenizer.json, run by the library: no id can differ.

    `files` are those of `FILES` that the model has, unchanged. `begins` is whether the library puts a token before a
    text, as the post_processor of tokenizer.json says: with such a file, transformers 5 does not read add_bos_token
    either. Tokens that the library puts after a text are not added to a prompt.
    """

    def __init__(
        self,
        name: str,
        files: Mapping[str, bytes],
        end_of_text: int,
        most: int | None = None,
        *,
        end_ids: Sequence[int] = (),
        begin_of_text: int | None = None,
    ) -> None:
        """Read the tokenizer, without its added tokens from the id `most` on.

        A text-only model may have no embeddings for those. `begin_of_text` is by default the token that the library
        puts before a text, else the files' bos_token, else `end_of_text`. Raise `ValueError` if the library is
        missing, if the files can't be read, and for an end or a beginning that is none of their ids.
        """
        self.files = files
        found = tokenizer_json.read(name, files["tokenizer.json"], MOST_IDS if most is None else min(most, MOST_IDS))
        self._encoding = _encoding(name, found)
        table = _table(self._encoding, found)
        before = _before(name, self._encoding)
        if len(before) > 1:
            raise ValueError(
                f"the tokenizer {name} puts {len(before)} tokens before a text, and at most one can begin it here; "
                "change the post_processor in its tokenizer.json"
            )
        if begin_of_text is None:
            begin_of_text = before[0] if before else named_token(name, files, found, "bos_token")
        added = self._encoding.get_added_tokens_decoder()
        super().__init__(
            name,
            table,
            end_of_text,
            end_ids=end_ids,
            begin_of_text=begin_of_text,
            begins=bool(before),
            special_tokens={token.content: id for id, token in added.items() if token.special and token.content},
        )
        for token, purpose, field in [
            *((token, "end", "eos_token_id in config.json") for token in self.end_ids),
            (self.begin_of_text, "begin", "bos_token in tokenizer_config.json"),
        ]:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token {token} is to {purpose} a text, but the tokenizer {name} has the ids 0 to "
                    f"{self.vocab_size - 1}; set {field}"
                )

    def _encode_text(self, text: str) -> np.ndarray:
        return self._ids(text, special=False)

    def _encode_specials(self, text: str) -> np.ndarray:
        return self._ids(text, special=True)

    def _ids(self, text: str, *, special: bool) -> np.ndarray:
        self._encoding.encode_special_tokens = not special  # the library's name for reading them as plain text
        return np.array(_encoded(self.name, self._encoding, text, alone=False).ids, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of `tokens`, special ones included, as the library decodes it. Raise like `decode_bytes`."""
        return self._encoding.decode(self._ids_in(tokens), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into `folder`, for `load_tokenizer`, with its own files."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (path := Path(folder) / name).parent.mkdir(exist_ok=True)
            write_whole(path, content)
        super().save(folder)

    def _description(self) -> dict[str, Any]:
        marks = {"begin_of_text": self.begin_of_text, "end_of_text": self.end_of_text}
        return {"kind": "imported", **marks, "ids": self.vocab_size, "sha256": _sha256(self.files)}


def files_in(folder: str | Path) -> dict[str, bytes]:
    """Return those of `FILES` that `folder` has. Raise `ValueError` if the tokenizer itself is missing."""
    paths = [Path(folder) / name for name in FILES]
    if not paths[0].is_file():
        raise ValueError(f"no tokenizer in {folder}: {paths[0].name} is missing; name the folder of one")
    paths += sorted((Path(folder) / TEMPLATES).glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def load_imported(folder: Path, name: str, description: Mapping[str, Any], ends: Any) -> ImportedTokenizer:
    """Return the tokenizer that `save` wrote, with its `ends`. Raise `ValueError` if its file has changed."""
    files = files_in(folder)
    if _sha256(files) != description["sha256"]:
        raise ValueError(f"{folder} is damaged: its tokenizer.json has changed; import the model again")
    if not (isinstance(ends, list) and all(type(token) is int for token in ends)):
        raise ValueError(f"{folder / 'encoding.json'}: 'end_ids' is no list of ids; import the model again")
    end, begin, ids = (description[field] for field in ("end_of_text", "begin_of_text", "ids"))
    return ImportedTokenizer(name, files, end, ids, end_ids=ends, begin_of_text=begin)


def named_token(name: str, files: Mapping[str, bytes], found: Mapping[str, Any], role: str) -> int | None:
    """Return the id of the token that the files name for `role`, such as eos_token; None if there is none.

    `found` is their tokenizer.json. Raise `ValueError` if the name is not text.
    """
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        where = f"the {file} of {name}"
        token = tokenizer_json.parse(where, files[file]).get(role) if file in files else None
        text = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(text, str):
            raise ValueError(f"{where} has {role}={token!r:.100}, expected a string; {tokenizer_json.SAVE_AGAIN}")
        if text is not None:
            added = {token["content"]: token["id"] for token in found.get("added_tokens") or []}
            return (tokenizer_json.vocabulary_of(found, "tokenizer.json") | added).get(text)
    return None


def _sha256(files: Mapping[str, bytes]) -> str:
    return hashlib.sha256(files["tokenizer.json"]).hexdigest()


def _encoding(name: str, found: Mapping[str, Any]) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            f"the tokenizer {name} runs on the library tokenizers; install it: pip install 'llm-jax[hf]'"
        ) from error
    try:
        encoding = tokenizers.Tokenizer.from_str(json.dumps(found))
    except BaseException as error:
        reason = rust_error(error)
        raise ValueError(
            f"the tokenizer.json of {name} can't be read by tokenizers {tokenizers.__version__} ({reason}); "
            "update the library, or save the tokenizer again"
        ) from error
    encoding.no_truncation()
    encoding.no_padding()
    return encoding


def _encoded(name: str, encoding: Any, text: str, *, alone: bool) -> Any:
    """Return the library's encoding of a text, with the tokens that it puts around a text that is `alone`."""
    try:
        return encoding.encode(text, add_special_tokens=alone)
    except BaseException as error:
        reason = rust_error(error)
        raise ValueError(f"the tokenizer {name} can't read {text[:40]!r} ({reason}); use another text") from error


def _before(name: str, encoding: Any) -> list[int]:
    """Return the ids that the library puts before a text."""
    texts = itertools.chain(["a"], encoding.get_vocab(with_added_tokens=True))
    for text in itertools.islice(texts, PROBES):
        found = _encoded(name, encoding, text, alone=True)
        if any(sequence is not None for sequence in found.sequence_ids):
            inside = itertools.takewhile(lambda pair: pair[1] is None, zip(found.ids, found.sequence_ids, strict=True))
            return [token for token, _ in inside]
    return []


def _table(encoding: Any, found: Mapping[str, Any]) -> list[bytes]:
    """Return the bytes of every id, which the encoding spells in byte letters, or with U+2581 for a blank.

    An entry of a byte-level vocabulary with other letters, such as a reserved one, stands for itself.
    """
    letters = {letter: byte for byte, letter in BYTE_LETTERS.items()}
    by_bytes = '"ByteLevel"' in json.dumps(found.get("decoder"))
    vocabulary = encoding.get_vocab(with_added_tokens=True)
    added = {token.content for token in encoding.get_added_tokens_decoder().values()}
    table = [NO_BYTES] * (max(vocabulary.values()) + 1)
    for entry, token in vocabulary.items():
        if entry in added or (by_bytes and not letters.keys() >= set(entry)):
            table[token] = entry.encode()
        elif by_bytes:
            table[token] = bytes(letters[letter] for letter in entry)
        elif re.fullmatch("<0x[0-9A-F]{2}>", entry):
            table[token] = bytes([int(entry[3:5], 16)])
        else:
            table[token] = entry.replace("\u2581", " ").encode()
    return table
