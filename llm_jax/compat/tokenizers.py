"""Our tokenizers as tokenizer.json, which the library `tokenizers` and transformers read, and what ends their texts."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.data import tokenizer_json
from llm_jax.data.imported import BYTE_LETTERS, ImportedTokenizer, files_in, named_token
from llm_jax.data.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, Tokenizer
from llm_jax.files import read_json

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def files_of(tokenizer: Tokenizer, max_len: int, *, begins: bool = False) -> Mapping[str, bytes]:
    """Return tokenizer files by name: those that an imported one came with, or tokenizer.json and its config.

    `begins` has one of ours put begin-of-text before a text, as documents began where the model was trained.
    """
    if isinstance(tokenizer, ImportedTokenizer):
        return tokenizer.files
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": _json(describe(tokenizer, begins=begins)), "tokenizer_config.json": _json(config)}


def ends_of(there: Path) -> tuple[int, ...]:
    """Return the ids that end a text of the model in the folder `there`; none where none is named.

    All that config.json and generation_config.json name, in this order; where they name none, the tokenizer's
    eos_token. Raises `ValueError` for what is no id.
    """
    found: list[Any] = []
    for name in ("config.json", "generation_config.json"):
        if (there / name).is_file():
            ids = read_json(there / name, advice="download it again").get("eos_token_id")
            found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    for token in found:
        if type(token) is not int or token < 0:
            raise ValueError(f"{there} has eos_token_id={token!r}, which is no id; set it in config.json")
    if not found:
        files = files_in(there)
        described = tokenizer_json.read(str(there), files["tokenizer.json"], tokenizer_json.MOST_IDS)
        named = named_token(files, described, "eos_token")
        found = [] if named is None else [named]
    return tuple(dict.fromkeys(found))


def describe(tokenizer: Tokenizer, *, begins: bool) -> dict[str, Any]:
    """Return the tokenizer.json of one of ours: a byte-pair encoding, of bytes and characters one without merges.

    Characters that a `char` tokenizer does not know, for which it raises, theirs passes over.
    """
    merges: list[tuple[str, str]] = []
    pre: dict[str, Any] | None = BYTE_LEVEL
    decoder: dict[str, Any] = BYTE_LEVEL
    specials = {END_OF_TEXT: tokenizer.end_of_text}
    if isinstance(tokenizer, BPETokenizer):
        specials = tokenizer.special_tokens
        merges = [(spell(left), spell(right)) for left, right in merges_of(tokenizer.ranks)]
        vocab = {spell(entry): rank for entry, rank in tokenizer.ranks.items()}
        split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
        pre = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
    elif isinstance(tokenizer, ByteTokenizer):
        vocab = {spell(entry): token for token, entry in enumerate(tokenizer.table[:-1])}
    else:
        vocab = {entry.decode(): token for token, entry in enumerate(tokenizer.table[:-1])}
        pre, decoder = None, {"type": "Fuse"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(text, token) for text, token in sorted(specials.items(), key=lambda item: item[1])],
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": _begin(tokenizer.begin_of_text) if begins else None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that a byte-pair encoding merges, in order: what each entry was just before it became one."""
    merges = []
    for entry, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(entry) > 1:
            parts = [entry[i : i + 1] for i in range(len(entry))]
            while len(parts) > 2:
                pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
                first = pairs.index(min(pairs))
                if pairs[first] >= rank:
                    break
                parts[first : first + 2] = [parts[first] + parts[first + 1]]
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
    return merges


def spell(entry: bytes) -> str:
    """Bytes in the letters that byte-level encodings write them in."""
    return "".join(BYTE_LETTERS[byte] for byte in entry)


def _begin(token: int) -> dict[str, Any]:
    """The post-processor that puts END_OF_TEXT, which is `token`, before a text."""
    mark, text = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [mark, text],
        "pair": [mark, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [token], "tokens": [END_OF_TEXT]}},
    }


def _special(text: str, token: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": text, **flags}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
