"""Every text and every byte string comes back; merges are those of a plain trainer; damage is named."""

import collections
import functools
import itertools
import json
import os
import re
import tempfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import regex
import requests
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from llm_jax.data import pool, tokenizer
from llm_jax.data.tokenizer import END_OF_TEXT

TEXT = "The cat sat on the mat; the cats' mat's flat. 123 4567\n\n    def sit(mat):\n        return mat\n" * 20
TEXTS = st.text(max_size=200) | st.lists(st.sampled_from(["the", " cat", "\n", "  ", END_OF_TEXT, "ß", "🐈"])).map(
    "".join
)


@functools.cache
def trained(vocab_size: int = 290) -> tokenizer.BPETokenizer:
    return tokenizer.train(vocab_size, [TEXT])


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
    ours = tokenizer.train(vocab_size, texts)
    assert list(ours.table[:-1]) == plain_trainer(ours._encoding._pat_str, texts, vocab_size - 257)


def test_training_on_prose_and_code_merges_what_a_plain_trainer_merges():
    ours = tokenizer.train(400, [TEXT, plain_trainer.__doc__ or ""])
    expected = plain_trainer(ours._encoding._pat_str, [TEXT, plain_trainer.__doc__ or ""], 400 - 257)
    assert list(ours.table[:-1]) == expected


def test_train_n_has_n_ids_in_all():
    assert trained(290).vocab_size == 290
    assert trained(290).end_of_text == 289


def test_end_of_text_follows_the_last_merge_where_pairs_run_out():
    ours = tokenizer.build("train:4096", lambda: ["ab ab"])
    assert ours.vocab_size == ours.end_of_text + 1 < 4096
    assert ours.table[ours.end_of_text - 1] == b" ab"


@pytest.mark.parametrize("make", [trained, tokenizer.ByteTokenizer])
@hypothesis.given(text=TEXTS)
def test_every_text_comes_back(make, text: str):
    assert make().decode(make().encode(text)) == text


@hypothesis.given(TEXTS)
def test_every_text_of_its_alphabet_comes_back_from_characters(text: str):
    ours = tokenizer.build("char", lambda: [text[::-1], "x"])
    assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == len(set(text + "x")) + 1


@pytest.mark.parametrize("make", [trained, tokenizer.ByteTokenizer])
@hypothesis.given(data=st.binary(max_size=100) | TEXTS.map(str.encode))
def test_every_byte_string_comes_back(make, data: bytes):
    assert make().decode_bytes(make().encode_bytes(data)) == data


@hypothesis.given(TEXTS)
def test_utf8_bytes_encode_as_their_text(text: str):
    np.testing.assert_array_equal(trained().encode_bytes(text.encode()), trained().encode(text))


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


@hypothesis.given(st.lists(st.sampled_from(["<|fim|>", "<|fim|>x", END_OF_TEXT, "<|", "fim", "|>", " a"])))
def test_all_special_tokens_of_an_encoding_are_read_the_longest_first(words: list[str]):
    ranks, text = trained().ranks, "".join(words)
    specials = {END_OF_TEXT: 300, "<|fim|>": 301, "<|fim|>x": 302}
    ours = tokenizer._bpe("", r50k_pat_str, {**ranks}, specials)
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


@hypothesis.given(st.lists(st.sampled_from(["mat", "mat's", "12345", "(", ");", "é", "a\n\nb", "a  b"])))
@pytest.mark.parametrize("pattern", ["trained here", r50k_pat_str])
def test_a_text_in_pieces_has_the_ids_of_the_whole(pattern: str, words: list[str]):
    ours, text = trained(), " ".join(words)
    if pattern == r50k_pat_str:
        specials = ours._encoding._special_tokens
        ours = tokenizer._bpe("", pattern, ours._encoding._mergeable_ranks, specials)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE_CHARS", 9)
        assert max(map(len, tokenizer.pieces(text))) <= 9
        assert ours.encode(text).tolist() == ours._encoding.encode_ordinary(text)


def test_a_megabyte_of_blanks_is_encoded():
    text = " " * 1_000_000
    assert trained().decode(trained().encode(text)) == text
    assert tokenizer.train(259, [text]).vocab_size == 259


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


def test_fingerprints_differ_where_ids_do():
    texts = (TEXT, TEXT.upper())
    made = [tokenizer.build(spec, lambda text=text: [text]) for spec in ("char", "train:290") for text in texts]
    assert len({ours.fingerprint for ours in [*made, tokenizer.ByteTokenizer()]}) == 5


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
            again = tokenizer.load(folder)
        except ValueError as error:
            assert "damaged" in str(error)  # noqa: PT017
        else:
            assert again.fingerprint == ours.fingerprint


def resealed(folder, *, ranks: bytes | None = None, **changes) -> str:
    """Changes what a saved tokenizer says of its encoding, with the digest of a tokenizer that was saved so."""
    meta = json.loads((folder / "encoding.json").read_text())
    meta["encoding"] |= changes
    ranks = (folder / "ranks.tiktoken").read_bytes() if ranks is None else ranks
    meta["fingerprint"] = tokenizer._digest(meta["encoding"], ranks)
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
        tokenizer.load(resealed(tmp_path, **changes))


@pytest.mark.parametrize("alphabet", ["ba", "aa", "\ud800"])
def test_a_saved_alphabet_that_cannot_be_is_refused(alphabet: str, tmp_path):
    tokenizer.CharTokenizer("ab").save(tmp_path)
    with pytest.raises(ValueError, match="is no sorted set of characters; it is damaged"):
        tokenizer.load(resealed(tmp_path, alphabet=alphabet))


def test_a_tokenizer_keeps_the_fingerprint_that_it_had_when_it_was_saved():
    """Shards and runs are known by it: these are from before a tokenizer said what ends a text."""
    pairs = tokenizer._bpe("", r"\w+|\W", {bytes([byte]): byte for byte in range(256)}, {END_OF_TEXT: 256})
    made = [tokenizer.ByteTokenizer(), tokenizer.CharTokenizer("ab"), pairs]
    assert [ours.fingerprint[:8] for ours in made] == ["b187eab7", "f63d932c", "8f6cee14"]


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


def test_a_character_outside_the_alphabet_is_named():
    for text in ("xxé", "xx\U0010ffff", "xx!"):
        with pytest.raises(ValueError, match=r"character .* at position 2 is not among the 1 .* tokenizer=byte"):
            tokenizer.CharTokenizer("x").encode(text)


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
    assert tokenizer.load(tmp_path).fingerprint == ours.fingerprint


def test_an_encoding_that_cannot_be_fetched_names_the_next_moves(monkeypatch):
    def fail(name: str):
        raise requests.ConnectionError("unreachable")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(ValueError, match=r"cannot fetch .* gpt2 .*TIKTOKEN_CACHE_DIR.*train:4096"):
        tokenizer.build("gpt2", list)


def test_a_pool_encodes_many_texts_as_one_process_does(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "BATCH_CHARS", 1000)
    texts = [TEXT[i : i + 400] for i in range(20)] * 4
    trained().save(tmp_path)
    monkeypatch.setattr(pool, "BATCHES_ALONE", 2)
    encoded = list(pool.encode_all(tmp_path, iter(texts)))
    assert [ids.tolist() for ids in encoded] == [trained().encode(text).tolist() for text in texts]


def die(folder: str, texts: list[str], special: bool):
    os._exit(1)


def test_a_process_that_dies_is_an_error_with_a_next_move(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "BATCHES_ALONE", 0)
    monkeypatch.setattr(pool, "_encode_batch", die)
    trained().save(tmp_path)
    with pytest.raises(ValueError, match=r"a process that tokenizes died.*__main__"):
        list(pool.encode_all(tmp_path, ["text"]))
