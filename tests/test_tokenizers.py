"""Our tokenizers as tokenizer.json have the same ids for the library, and every end of a text is found."""

import pytest
from test_huggingface import TEXT

from llm_jax.compat.tokenizers import files_of, merges_of
from llm_jax.data import bpe, tokenizer
from llm_jax.data.tokenizer import END_OF_TEXT, Tokenizer


def ours() -> list[Tokenizer]:
    """The second has an entry that no merges lead to, which a whole piece of text may be."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"mats": 256}
    odd = bpe.from_ranks("odd", r"\w+|\W", ranks, {END_OF_TEXT: 257})
    return [tokenizer.train(320, [TEXT]), odd, tokenizer.ByteTokenizer(), tokenizer.CharTokenizer(TEXT)]


def test_the_merges_of_an_encoding_are_found_in_its_ranks():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"abc": 4, b"cab": 5, b"abcab": 6}
    assert merges_of(ranks) == [(b"a", b"b"), (b"ab", b"c"), (b"c", b"ab"), (b"abc", b"ab")]


@pytest.mark.parametrize("coder", ours(), ids=lambda coder: coder.name)
def test_our_tokenizers_are_exported_with_the_same_ids(coder: Tokenizer):
    library = pytest.importorskip("tokenizers")
    theirs = library.Tokenizer.from_str(files_of(coder, 64)["tokenizer.json"].decode())
    assert theirs.get_vocab_size() == coder.vocab_size
    for text in (TEXT.replace(END_OF_TEXT, ""), TEXT, "mat" * 9, "  \n", ""):
        ids = coder.encode(text, special=True).tolist()
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    begun = library.Tokenizer.from_str(files_of(coder, 64, begins=True)["tokenizer.json"].decode())
    assert begun.encode("mat").ids == [coder.begin_of_text, *coder.encode("mat").tolist()]
