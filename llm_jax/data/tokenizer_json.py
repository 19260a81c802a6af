"""A tokenizer.json from elsewhere, read and checked before the library `tokenizers` sees it.

The library takes memory for every id up to the largest, and ends the process, or leaves it in an undefined state, if
some fields contradict each other. Here each of these is a `ValueError`; the library itself refuses the rest.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from llm_jax.data.tokenizer_interface import MOST_IDS
from llm_jax.files import check_fields, parse_json

SAVE_AGAIN = "download it again, or let transformers save the tokenizer again"
TOKEN = {"id": int, "content": str}
VOCABULARY = {"BPE": dict, "WordPiece": dict, "WordLevel": dict, "Unigram": list}  # by the type of the model


def read(name: str, data: bytes, most: int) -> dict[str, Any]:
    """Return the object in a tokenizer.json, without its added tokens from the id `most` on.

    Raise `ValueError`, one line, for data that is no tokenizer.json, has impossible ids, or has more than `most`.
    """
    where = f"the tokenizer.json of {name}"
    found = parse(where, data, {"model": dict})
    added = [] if found.get("added_tokens") is None else found["added_tokens"]
    if not isinstance(added, list):
        raise ValueError(f"{where}: 'added_tokens' is no list; {SAVE_AGAIN}")
    for token in added:
        check_fields(token, TOKEN, f"{where}: a token of added_tokens", advice=SAVE_AGAIN)
    vocabulary = vocabulary_of(found, where)
    ids = [*vocabulary.values(), *(token["id"] for token in added)]
    _check_ids(where, ids, vocabulary)
    largest = max(vocabulary.values(), default=0)
    if largest >= most:
        raise ValueError(
            f"the tokenizer {name} has {largest + 1} ids, but the model has {most}; name another: --tokenizer gpt2, "
            "or a folder"
        )
    _check_merges(where, found["model"])
    for processor in processors_of(found):
        _check_template(where, processor)
    kept = [token for token in added if token["id"] < most]
    return found if kept == added else found | {"added_tokens": kept}


def parse(where: str, data: bytes, fields: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Return the JSON object in `data`, with these fields. Raise `ValueError`, naming `where`, for other data."""
    return parse_json(data, fields, where, advice=SAVE_AGAIN)


def vocabulary_of(found: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return the entries of the model in a tokenizer.json with their ids, without added tokens.

    Raise `ValueError` for a model of an unknown type, and for entries that have no text.
    """
    model = found["model"]
    kind = model.get("type") or ("Unigram" if isinstance(model.get("vocab"), list) else "BPE")
    expected = VOCABULARY.get(kind) if isinstance(kind, str) else None
    if expected is None:
        raise ValueError(
            f"{where} has a model of the type {kind!r}, expected one of {', '.join(VOCABULARY)}; {SAVE_AGAIN}"
        )
    vocab = check_fields(model, {"vocab": expected}, f"{where}: model", advice=SAVE_AGAIN)["vocab"]
    if expected is dict:
        return vocab
    for entry in vocab:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"{where}: an entry of model.vocab is no text with a number; {SAVE_AGAIN}")
    return {entry[0]: number for number, entry in enumerate(vocab)}


def _check_ids(where: str, ids: list[Any], vocabulary: Mapping[str, int]) -> None:
    if not ids:
        raise ValueError(f"{where} has no entries; {SAVE_AGAIN}")
    for token in ids:
        if type(token) is not int or token < 0:
            raise ValueError(f"{where} has {token!r} for an id, expected an integer from 0 on; {SAVE_AGAIN}")
    largest = max(vocabulary.values(), default=0)
    if largest >= MOST_IDS:
        raise ValueError(f"{where} has the id {largest}, where {MOST_IDS - 1} is the most; {SAVE_AGAIN}")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{where} has two entries of one id; {SAVE_AGAIN}")


def _check_merges(where: str, model: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a merge without the prefix that it must have: the library would end the process."""
    prefix = model.get("continuing_subword_prefix")
    if not isinstance(prefix, str) or not prefix:
        return
    merges = model.get("merges")
    for merge in merges if isinstance(merges, list) else []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(pair, list) and len(pair) == 2 and not str(pair[1]).startswith(prefix):
            raise ValueError(f"{where}: {merge!r} in model.merges lacks the prefix {prefix!r}; {SAVE_AGAIN}")


def processors_of(found: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the post-processors of a tokenizer.json in order, a sequence before its members."""
    todo = [found.get("post_processor")]
    while todo:
        processor = todo.pop(0)
        if isinstance(processor, dict):
            inside = processor.get("processors")
            todo[:0] = inside if isinstance(inside, list) else []
            yield processor


def _check_template(where: str, processor: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a template with tokens that it does not describe."""
    if processor.get("type") != "TemplateProcessing":
        return
    known = processor.get("special_tokens")
    for name in ("single", "pair"):
        pieces = processor.get(name)
        for piece in pieces if isinstance(pieces, list) else []:
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if isinstance(token, dict) and not (isinstance(known, dict) and str(token.get("id")) in known):
                raise ValueError(f"{where}: post_processor puts {token.get('id')!r} and has no id for it; {SAVE_AGAIN}")
