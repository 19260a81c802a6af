"""Byte-pair encodings: the merges are those of a plain trainer, and any bytes come back."""

import collections
import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import regex
import requests
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from llm_jax.data import bpe, tokenizer
from llm_jax.data.tokenizer import END_OF_TEXT

TEXT = "The cat sat on the mat; the cats' mat's flat. 123 4567\n\n    def sit(mat):\n        return mat\n" * 20


TEXTS = st.text(max_size=200) | st.lists(st.sampled_from(["the", " cat", "\n", "  ", END_OF_TEXT, "ß", "🐈"])).map(
    "".join
)


@functools.cache
def trained(vocab_size: int = 290) -> bpe.BPETokenizer:
    return bpe.train(vocab_size, [TEXT])


def plain_trainer(pattern: str, texts: list[str], n_merges: int) -> list[bytes]:
    """Byte-pair encoding as one would explain it: count all pairs, merge the commonest, begin again.

    Of equally common pairs the smallest wins, compared by ids.
    """
    words = collections.Counter(word for text in texts for word in regex.findall(pattern, text))
    pieces = {word: list(word.encode()) for word in words}
    entries = [bytes([byte]) for byte in range(256)]
    for _ in range(n_merges):
        pairs: collections.Counter[tuple[int, int]] = collections.Counter()
        for word, ids in pieces.items():
            for pair in itertools.pairwise(ids):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word, ids in pieces.items():
            pieces[word] = merge(ids, best, len(entries))
        entries.append(entries[best[0]] + entries[best[1]])
    return entries


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


@hypothesis.given(st.lists(st.text(alphabet="ab c\n1é", max_size=60), min_size=1, max_size=4), st.integers(257, 290))
def test_training_merges_what_a_plain_trainer_merges(texts: list[str], vocab_size: int):
    ours = bpe.train(vocab_size, texts)
    assert list(ours.table[:-1]) == plain_trainer(ours._encoding._pat_str, texts, vocab_size - 257)


def test_training_on_prose_and_code_merges_what_a_plain_trainer_merges():
    ours = bpe.train(400, [TEXT, plain_trainer.__doc__ or ""])
    expected = plain_trainer(ours._encoding._pat_str, [TEXT, plain_trainer.__doc__ or ""], 400 - 257)
    assert list(ours.table[:-1]) == expected


def test_train_n_has_n_ids_in_all():
    assert trained(290).vocab_size == 290
    assert trained(290).end_of_text == 289


def test_end_of_text_follows_the_last_merge_where_pairs_run_out():
    ours = tokenizer.build("train:4096", lambda: ["ab ab"])
    assert ours.vocab_size == ours.end_of_text + 1 < 4096
    assert ours.table[ours.end_of_text - 1] == b" ab"


@hypothesis.given(TEXTS)
def test_utf8_bytes_encode_as_their_text(text: str):
    np.testing.assert_array_equal(trained().encode_bytes(text.encode()), trained().encode(text))


@hypothesis.given(st.lists(st.sampled_from(["<|fim|>", "<|fim|>x", END_OF_TEXT, "<|", "fim", "|>", " a"])))
def test_all_special_tokens_of_an_encoding_are_read_the_longest_first(words: list[str]):
    ranks, text = trained().ranks, "".join(words)
    specials = {END_OF_TEXT: 300, "<|fim|>": 301, "<|fim|>x": 302}
    ours = bpe.from_ranks("", r50k_pat_str, {**ranks}, specials)
    expected, rest = [], text
    while rest:
        found = next((name for name in sorted(specials, key=len, reverse=True) if rest.startswith(name)), None)
        expected.append(found or rest[0])
        rest = rest.removeprefix(expected[-1])
    plain = itertools.groupby(expected, key=lambda piece: piece if piece in specials else None)
    ids = [
        id
        for name, group in plain
        for id in ([specials[name] for _ in group] if name else ours.encode("".join(group)).tolist())
    ]
    assert ours.encode(text, special=True).tolist() == ids
    assert ours.spelled(text) == next((piece for piece in expected if piece in specials), None)


@hypothesis.given(st.lists(st.sampled_from(["mat", "mat's", "12345", "(", ");", "é", "a\n\nb", "a  b"])))
@pytest.mark.parametrize("pattern", ["trained here", r50k_pat_str])
def test_a_text_in_pieces_has_the_ids_of_the_whole(pattern: str, words: list[str]):
    ours, text = trained(), " ".join(words)
    if pattern == r50k_pat_str:
        specials = ours._encoding._special_tokens
        ours = bpe.from_ranks("", pattern, ours._encoding._mergeable_ranks, specials)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "PIECE_CHARS", 9)
        assert max(map(len, bpe.pieces(text))) <= 9
        assert ours.encode(text).tolist() == ours._encoding.encode_ordinary(text)


def test_a_megabyte_of_blanks_is_encoded():
    text = " " * 1_000_000
    assert trained().decode(trained().encode(text)) == text
    assert bpe.train(259, [text]).vocab_size == 259


def named(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """An encoding made like OpenAI's larger ones: one id before the special tokens stands for nothing."""
    specials = {END_OF_TEXT: len(ranks) + 1, "<|fim|>": len(ranks) + 2}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials)


def test_a_named_encoding_is_tiktokens(monkeypatch, tmp_path):
    encoding = named(trained()._encoding._mergeable_ranks)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    ours = tokenizer.build("gpt2", list)
    assert ours.encode(TEXT + "<|fim|>").tolist() == encoding.encode_ordinary(TEXT + "<|fim|>")
    assert (ours.name, ours.vocab_size, ours.end_of_text) == ("gpt2", encoding.n_vocab, encoding.eot_token)
    assert ours.decode([encoding.eot_token - 1, encoding.eot_token]) == f"\ufffd{END_OF_TEXT}"
    ours.save(tmp_path)
    assert tokenizer.load_tokenizer(tmp_path).fingerprint == ours.fingerprint


def test_an_encoding_that_cannot_be_fetched_names_the_next_moves(monkeypatch):
    def fail(name: str):
        raise requests.ConnectionError("unreachable")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(ValueError, match=r"cannot fetch .* gpt2 .*TIKTOKEN_CACHE_DIR.*train:4096"):
        tokenizer.build("gpt2", list)
