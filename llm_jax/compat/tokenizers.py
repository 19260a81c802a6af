"""Our tokenizers as tokenizer.json, for the library `tokenizers` and transformers, and which tokens end a text."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.compat.config_json import short
from llm_jax.compat.outside import read_model_json
from llm_jax.data import tokenizer_json
from llm_jax.data.imported_tokenizer import BYTE_LETTERS, ImportedTokenizer, files_in, named_token
from llm_jax.data.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, Tokenizer
from llm_jax.data.tokenizer_interface import MOST_IDS

A, B = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
PLAIN = {"type": "TemplateProcessing", "single": [A], "pair": [A, B], "special_tokens": {}}  # adds no token
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def files_of(tokenizer: Tokenizer, max_len: int, *, begins: bool = False) -> Mapping[str, bytes]:
    """Return tokenizer files by name: those of an imported tokenizer, or tokenizer.json and its config.

    `begins` makes the tokenizer put begin-of-text before a text, as documents began in training. If an imported one
    does otherwise, only this changes in its files.
    """
    if isinstance(tokenizer, ImportedTokenizer):
        changed = {} if begins == tokenizer.begins else _begun(tokenizer, begins=begins)
        return {**tokenizer.files, **changed}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": _json(description_of(tokenizer, begins=begins)), "tokenizer_config.json": _json(config)}


def ends_of(there: Path) -> tuple[int, ...]:
    """Return the ids that end a text of the model in the folder `there`; empty if none is named.

    They are all that config.json and generation_config.json name, in this order; if these name none, the tokenizer's
    eos_token. Raise `ValueError` for a value that is no id.
    """
    found: list[Any] = []
    for path in (there / "config.json", there / "generation_config.json"):
        ids = read_model_json(path).get("eos_token_id") if path.is_file() else None
        listed = ids if isinstance(ids, list) else [ids]
        if ids is not None and not (listed and all(type(token) is int and token >= 0 for token in listed)):
            raise ValueError(f"{path} has eos_token_id={short(ids)}; expected an id, or a list of ids")
        found += [] if ids is None else listed
    if not found:
        files = files_in(there)
        described = tokenizer_json.read(str(there), files["tokenizer.json"], MOST_IDS)
        named = named_token(str(there), files, described, "eos_token")
        found = [] if named is None else [named]
    return tuple(dict.fromkeys(found))


def description_of(tokenizer: Tokenizer, *, begins: bool) -> dict[str, Any]:
    """Return the tokenizer.json of one of ours: a byte-pair encoding; for bytes and characters one without merges.

    The library skips characters that are not in the alphabet of a `char` tokenizer, for which ours raises.
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
        "post_processor": _beginning_with(PLAIN, END_OF_TEXT, tokenizer.begin_of_text) if begins else None,
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
    """Return the pairs that a byte-pair encoding merges, in order: the two halves of each entry."""
    merges = []
    for entry, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(entry) > 1:
            pieces = [entry[i : i + 1] for i in range(len(entry))]
            while len(pieces) > 2:
                pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(pieces)]
                first = pairs.index(min(pairs))
                if pairs[first] >= rank:
                    break
                pieces[first : first + 2] = [pieces[first] + pieces[first + 1]]
            if len(pieces) == 2:
                merges.append((pieces[0], pieces[1]))
    return merges


def spell(entry: bytes) -> str:
    """Return bytes in the letters of byte-level encodings."""
    return "".join(BYTE_LETTERS[byte] for byte in entry)


def _begun(coder: ImportedTokenizer, *, begins: bool) -> dict[str, bytes]:
    """Return the files of `coder` that say what begins a text, changed to `begin_of_text`, or to nothing."""
    found = tokenizer_json.parse("tokenizer.json", coder.files["tokenizer.json"])
    steps = [step for step in tokenizer_json.processors_of(found) if step["type"] != "Sequence"]
    template = _without(next(map(_template, filter(_adds_tokens, steps)), PLAIN), coder.begin_of_text)
    if begins:
        added = {token["id"]: token["content"] for token in found.get("added_tokens") or []}
        entries = tokenizer_json.vocabulary_of(found, "tokenizer.json")
        texts = {token: text for text, token in entries.items()} | added
        template = _beginning_with(template, texts[coder.begin_of_text], coder.begin_of_text)
    kept = [step for step in steps if step["type"] == "ByteLevel"]
    kept += [_offsets(step) for step in steps if step["type"] == "RobertaProcessing"]
    steps = [*kept, template]
    found["post_processor"] = {"type": "Sequence", "processors": steps} if steps[1:] else template
    files = {"tokenizer.json": _json(found)}
    if (name := "tokenizer_config.json") in coder.files:
        # transformers 4 rebuilds the processor of a Llama from this; 5 does not read it
        files[name] = _json(tokenizer_json.parse(name, coder.files[name]) | {"add_bos_token": begins})
    return files


def _adds_tokens(step: Mapping[str, Any]) -> bool:
    return step["type"] != "ByteLevel"  # which only changes offsets


def _offsets(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Roberta's post-processor does besides adding tokens."""
    return BYTE_LEVEL | {name: step[name] for name in ("add_prefix_space", "trim_offsets")}


def _template(step: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a post-processor as a template; for another kind, with the token that it adds after a text."""
    if step["type"] == "TemplateProcessing":
        return step
    text, token = step["sep"]  # those of Bert and Roberta, which have the same fields
    mark, described = {"SpecialToken": {"id": text, "type_id": 0}}, {"id": text, "ids": [token], "tokens": [text]}
    return PLAIN | {"single": [A, mark], "pair": [A, mark, B, mark], "special_tokens": {text: described}}


def _without(template: Mapping[str, Any], token: int) -> dict[str, Any]:
    """Return a template that adds no `token` before a text."""
    marks = [name for name, each in template["special_tokens"].items() if each["ids"] == [token]]
    pieces = {
        name: [
            piece
            for piece, following in zip(template[name], [*template[name][1:], {}], strict=True)
            if not (piece.get("SpecialToken", {}).get("id") in marks and "Sequence" in following)
        ]
        for name in ("single", "pair")
    }
    return {**template, **pieces}


def _beginning_with(template: Mapping[str, Any], text: str, token: int) -> dict[str, Any]:
    """Return a template that also adds `text`, the string of `token`, before a text."""
    mark, known = {"SpecialToken": {"id": text, "type_id": 0}}, template["special_tokens"]
    pieces = {name: [mark, *template[name]] for name in ("single", "pair")}
    described = {text: {"id": text, "ids": [token], "tokens": [text]}}
    return {**template, **pieces, "special_tokens": {**known, **described}}


def _special(text: str, token: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": text, **flags}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
