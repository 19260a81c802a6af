"""What every tokenizer can do: each text and byte string comes back, and special tokens are read on request only."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from test_bpe import TEXT, TEXTS, trained

from llm_jax.data import bpe, tokenizer
from llm_jax.data.tokenizer import END_OF_TEXT


@pytest.mark.parametrize("make", [trained, tokenizer.ByteTokenizer])
@hypothesis.given(text=TEXTS)
def test_every_text_comes_back(make, text: str):
    assert make().decode(make().encode(text)) == text


@pytest.mark.parametrize("make", [trained, tokenizer.ByteTokenizer])
@hypothesis.given(data=st.binary(max_size=100) | TEXTS.map(str.encode))
def test_every_byte_string_comes_back(make, data: bytes):
    assert make().decode_bytes(make().encode_bytes(data)) == data


@pytest.mark.parametrize("make", [trained, tokenizer.ByteTokenizer, lambda: tokenizer.CharTokenizer(END_OF_TEXT)])
def test_text_never_makes_a_special_token_unless_asked(make):
    ours, text = make(), f"{END_OF_TEXT}e{END_OF_TEXT}{END_OF_TEXT}"
    assert ours.end_of_text not in ours.encode(text)
    special = ours.encode(text, special=True)
    assert special.tolist() == [ours.end_of_text, *ours.encode("e"), ours.end_of_text, ours.end_of_text]
    assert ours.decode(special) == ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("text", ["\udcff", "a\ud800b"])
def test_text_that_is_not_unicode_is_refused_by_all_alike(text: str):
    for ours in (trained(), tokenizer.ByteTokenizer(), tokenizer.CharTokenizer("ab")):
        with pytest.raises(ValueError, match=r"is no character: half of one, or a byte that is not UTF-8; take it out"):
            ours.encode(text)


def test_ids_are_int32_and_an_empty_text_has_none():
    for ours in (trained(), tokenizer.ByteTokenizer(), tokenizer.CharTokenizer("x")):
        assert ours.encode("").shape == (0,)
        assert {ours.encode(text, special=special).dtype for text in ("", "x") for special in (False, True)} == {
            np.dtype(np.int32)
        }
        assert ours.decode([]) == ""


def test_an_incomplete_character_decodes_to_a_replacement():
    assert tokenizer.ByteTokenizer().decode([*"é".encode()[:1], *b"!"]) == "\ufffd!"


@pytest.mark.parametrize("token", [-1, 257, 2**63, 10**30])
def test_decoding_an_id_outside_the_vocabulary_raises(token: int):
    with pytest.raises(ValueError, match=rf"token {token} is not an id of byte, which has 0 to 256"):
        tokenizer.ByteTokenizer().decode([65, token])


def test_fingerprints_differ_where_ids_do():
    texts = (TEXT, TEXT.upper())
    made = [tokenizer.build(spec, lambda text=text: [text]) for spec in ("char", "train:290") for text in texts]
    assert len({ours.fingerprint for ours in [*made, tokenizer.ByteTokenizer()]}) == 5


def test_a_tokenizer_keeps_the_fingerprint_that_it_had_when_it_was_saved():
    """Shards and runs are known by it: these are from before a tokenizer said what ends a text."""
    pairs = bpe.from_ranks("", r"\w+|\W", {bytes([byte]): byte for byte in range(256)}, {END_OF_TEXT: 256})
    made = [tokenizer.ByteTokenizer(), tokenizer.CharTokenizer("ab"), pairs]
    assert [ours.fingerprint[:8] for ours in made] == ["b187eab7", "f63d932c", "8f6cee14"]
