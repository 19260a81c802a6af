"""Bytes and characters as tokens: every text of the alphabet comes back."""

import hypothesis
import pytest
from test_bpe import TEXTS

from llm_jax.data import tokenizer


@hypothesis.given(TEXTS)
def test_every_text_of_its_alphabet_comes_back_from_characters(text: str):
    ours = tokenizer.build("char", lambda: [text[::-1], "x"])
    assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == len(set(text + "x")) + 1


def test_a_character_outside_the_alphabet_is_named():
    for text in ("xxé", "xx\U0010ffff", "xx!"):
        with pytest.raises(ValueError, match=r"character .* at position 2 is not among the 1 .* data.tokenizer=byte"):
            tokenizer.CharTokenizer("x").encode(text)
