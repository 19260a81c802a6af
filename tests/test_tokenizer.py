"""A tokenizer by its name, and one that was saved: the same again, and damage is named."""

import json
import os
import re
import tempfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from test_bpe import TEXT, trained

from llm_jax.data import tokenizer
from llm_jax.data.tokenizer_interface import END_OF_TEXT, fingerprint_of


@pytest.mark.parametrize("spec", ["byte", "char", "train:290"])
def test_a_saved_tokenizer_is_the_same_when_loaded(spec: str, tmp_path):
    ours = tokenizer.build(spec, lambda: [TEXT])
    ours.save(tmp_path / "a" / "b")
    again = tokenizer.build(str(tmp_path / "a" / "b"), list)
    assert (again.name, again.vocab_size, again.end_of_text) == (ours.name, ours.vocab_size, ours.end_of_text)
    assert again.fingerprint == ours.fingerprint
    np.testing.assert_array_equal(again.encode(TEXT), ours.encode(TEXT))
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "encoding.json",
        "ranks.tiktoken",
    ]


@hypothesis.given(st.sampled_from(["encoding.json", "ranks.tiktoken"]), st.integers(0, 10_000), st.integers(1, 255))
def test_one_changed_byte_in_a_saved_tokenizer_never_changes_an_id(name: str, where: int, flip: int):
    ours = trained(260)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder)
        with open(os.path.join(folder, name), "r+b") as file:
            data = bytearray(file.read())
            data[where % len(data)] ^= flip
            file.seek(0)
            file.write(data)
        try:
            again = tokenizer.load_tokenizer(folder)
        except ValueError as error:
            assert "damaged" in str(error)  # noqa: PT017
        else:
            assert again.fingerprint == ours.fingerprint


def resealed(folder, *, ranks: bytes | None = None, **changes) -> str:
    """Changes what a saved tokenizer says of its encoding, with the digest of a tokenizer that was saved so."""
    meta = json.loads((folder / "encoding.json").read_text())
    meta["encoding"] |= changes
    ranks = (folder / "ranks.tiktoken").read_bytes() if ranks is None else ranks
    meta["fingerprint"] = fingerprint_of(meta["encoding"], ranks)
    (folder / "encoding.json").write_text(json.dumps(meta))
    (folder / "ranks.tiktoken").write_bytes(ranks)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"special_tokens": {END_OF_TEXT: 300_000_000}}, "its ids are not different integers from 0 to 4194303"),
        ({"special_tokens": {END_OF_TEXT: 5}}, "its ids are not different integers"),
        ({"special_tokens": {END_OF_TEXT: True}}, "its ids are not different integers"),
        ({"special_tokens": {"<|end|>": 300}}, "it has no <|endoftext|>"),
        ({"special_tokens": {END_OF_TEXT: 300, "": 301}}, "a special token is not text that can be printed"),
        ({"special_tokens": {END_OF_TEXT: 300, "\ud800": 301}}, "a special token is not text that can be printed"),
        ({"pattern": "("}, "its pattern can't be read"),
        ({"pattern": 3}, "'pattern' is an integer, expected a string"),
        ({"kind": "unigram"}, "of the kind 'unigram', expected one of byte, char, bpe, imported"),
        ({"kind": "byte"}, "has 'pattern', which this version does not know"),
        ({"ranks": b"YQ== 1\n"}, "it has no id for some bytes"),
        ({"ranks": b"YQ== 1 2\n"}, "ranks.tiktoken is no list of base64 and number"),
        ({"ranks": b"\xff 1\n"}, "ranks.tiktoken is no list of base64 and number"),
    ],
)
def test_a_saved_tokenizer_that_cannot_be_is_refused_in_one_line(changes: dict, says: str, tmp_path):
    trained(260).save(tmp_path)
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(says)}[^\n]*prepare the data again$"):
        tokenizer.load_tokenizer(resealed(tmp_path, **changes))


@pytest.mark.parametrize("alphabet", ["ba", "aa", "\ud800"])
def test_a_saved_alphabet_that_cannot_be_is_refused(alphabet: str, tmp_path):
    tokenizer.CharTokenizer("ab").save(tmp_path)
    with pytest.raises(ValueError, match="is no sorted set of characters; it is damaged"):
        tokenizer.load_tokenizer(resealed(tmp_path, alphabet=alphabet))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer in .*: encoding.json is missing"):
        tokenizer.build(str(tmp_path), list)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"of Hugging Face without its model; name a folder of both"):
        tokenizer.build(str(tmp_path), list)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"of Hugging Face, .*: llm-jax import {tmp_path} --run DIR, then name DIR"):
        tokenizer.build(str(tmp_path), list)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt-2", "did you mean 'gpt2'"),
        ("train:many", "unknown tokenizer 'train:many'"),
        ("train:٤٠٩٦", "unknown tokenizer 'train:٤٠٩٦'"),
        ("train:4_096", "unknown tokenizer 'train:4_096'.*did you mean 'train:4096'"),
        ("train:99999999999999999999", "unknown tokenizer 'train:99999999999999999999'"),
        ("train:256", "make 257"),
        ("train:2147483648", "at most 4194304 ids; use train:4096"),
        ("train:" + "9" * 5000, "unknown tokenizer"),
    ],
)
def test_a_spec_that_names_nothing_raises(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        tokenizer.build(spec, list)
