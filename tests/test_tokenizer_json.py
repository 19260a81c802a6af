"""A tokenizer.json that the library would break on, or that is no JSON, is refused in one line."""

import json
from typing import Any

import pytest
from test_imported_tokenizer import END, gpt2_like, opened

from llm_jax.data.imported_tokenizer import ImportedTokenizer


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["added_tokens"][0].update(id=300_000_000), None),  # left out, as one for images is
        (lambda d: d["model"]["vocab"].update(a=300_000_000), "has the id 300000000, where 4194303 is the most"),
        (lambda d: d["model"]["vocab"].update(a=-1), "has -1 for an id, expected an integer from 0 on"),
        (lambda d: d["model"]["vocab"].update(a=True), "has True for an id"),
        (lambda d: d["model"]["vocab"].update(a=5), "has two entries of one id"),
        (lambda d: d["model"]["vocab"].clear() or d["added_tokens"].clear(), "has no entries"),
        (lambda d: d.update(added_tokens={}) or d.pop("model"), "has no 'model'"),
        (lambda d: d.update(added_tokens=[[]]), "a token of added_tokens holds a list, expected an object"),
        (lambda d: d["model"].update(type="Trie"), "a model of the type 'Trie', expected one of BPE"),
        (lambda d: d["model"].update(vocab=[]), "model: 'vocab' is a list, expected an object"),
    ],
)
def test_a_tokenizer_that_would_break_the_library_is_refused_before(change: Any, says: str | None):
    described = json.loads(gpt2_like().to_str())
    change(described)
    data = json.dumps(described).encode()
    if says is None:
        coder = ImportedTokenizer("x", {"tokenizer.json": data}, 1, 2**31 - 1)  # of a model that claims so many
        assert (coder.vocab_size, coder.special_tokens) == (270, {END: 1})
        return
    with pytest.raises(ValueError, match=says):
        ImportedTokenizer("x", {"tokenizer.json": data}, 1)


@pytest.mark.parametrize("data", [b"\xff", b"", b"[" * 100_000, b"[]", b"null", b'{"model": 1' + b"0" * 5000 + b"}"])
def test_a_file_that_is_no_json_object_is_named_in_one_line(data: bytes):
    with pytest.raises(ValueError, match=r"^the tokenizer.json of x .*; download it again, or let transformers save"):
        ImportedTokenizer("x", {"tokenizer.json": data}, 1)
    good = opened(gpt2_like()).files["tokenizer.json"]
    with pytest.raises(ValueError, match=r"^the tokenizer_config.json of x .*; download it again"):
        ImportedTokenizer("x", {"tokenizer.json": good, "tokenizer_config.json": data}, 1)
