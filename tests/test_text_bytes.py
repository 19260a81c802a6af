"""Bits per byte divide by the bytes of the text itself, whatever a tokenizer makes of it."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_jax.data import tokenizer
from llm_jax.data.imported_tokenizer import ImportedTokenizer
from llm_jax.data.loader import IGNORE, Batch, DataConfig, heldout_rows
from llm_jax.data.prepare import prepare
from llm_jax.data.shards import TokenStore, open_shards
from llm_jax.data.task import TaskConfig
from llm_jax.runs.evaluate import Evaluation, evaluate, text_bytes
from llm_jax.train.step import Scored

TEXTS = ["The Ｃat", "of the 𓀀 cat, the cat of", "ATE", "£ ate the", "a cat " * 9]


def imported(*normal: Any) -> ImportedTokenizer:
    """As SentencePiece has it: a character an id, a blank before the text, and one id for what it does not know."""
    library = pytest.importorskip("tokenizers")
    vocab = {entry: number for number, entry in enumerate(["<unk>", "</s>", *"▁abcdefghijklmnopqrstuvwxyzTCA,"])}
    coder = library.Tokenizer(library.models.BPE(vocab, [], unk_token="<unk>"))
    coder.add_special_tokens(["<unk>", "</s>"])
    steps = [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    coder.normalizer = library.normalizers.Sequence([*(step(library.normalizers) for step in normal), *steps])
    coder.decoder = library.decoders.Replace("▁", " ")
    return ImportedTokenizer("llama", {"tokenizer.json": coder.to_str().encode()}, 1)


TOKENIZERS: dict[str, Callable[[], tokenizer.Tokenizer]] = {
    "byte": tokenizer.ByteTokenizer,
    "char": lambda: tokenizer.build("char", lambda: TEXTS),
    "bpe": lambda: tokenizer.build("train:300", lambda: TEXTS * 3),
    "sentencepiece": imported,
    "normalising": lambda: imported(lambda n: n.NFKC(), lambda n: n.Lowercase()),
    "silent": lambda: imported(lambda n: n.Replace("a", "")),
}
OWN = ("byte", "char", "bpe")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenStore]:
    """`TEXTS` in the ids of a tokenizer, prepared once."""
    made: dict[tuple[Any, ...], TokenStore] = {}

    def store(name: str, texts: tuple[str, ...] = tuple(TEXTS), end_of_text: bool = True) -> TokenStore:
        if (name, texts, end_of_text) not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
            TOKENIZERS[name]().save(folder / "tokenizer")
            settings: dict[str, Any] = {"tokenizer": str(folder / "tokenizer"), "end_of_text": end_of_text}
            prepare(str(folder / "a.jsonl"), folder / "shards", heldout=0.0, **settings)
            made[name, texts, end_of_text] = open_shards(folder / "shards").split("train")
        return made[name, texts, end_of_text]

    return store


def one_nat(batch: Batch) -> Scored:
    return Scored(np.ones(batch.targets.shape, np.float32), np.zeros(batch.targets.shape, bool))


def scored(store: TokenStore, batches: int | None = None, **settings: Any) -> Evaluation:
    """One nat a token, over rows of five in batches of two, or as `settings` say."""
    config = DataConfig(**{"seq_len": 5, "batch_size": 2} | settings)
    return evaluate(one_nat, itertools.islice(heldout_rows(store, config), batches), store, config.task)


@pytest.mark.parametrize("packing", ["documents", "windows"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_text_scored_whole_are_those_of_the_text(name: str, packing: Any, stores):
    store = stores(name)
    result = scored(store, packing=packing)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (result.tokens, result.bytes) == (store.n_tokens, size)
    assert result.bits_per_byte == store.n_tokens / math.log(2) / size
    each = np.diff(store.offsets) / math.log(2) / [len(text.encode()) for text in TEXTS]
    low, high = result.bits_per_byte_interval or (0, 0)
    assert each.min() <= low < result.bits_per_byte < high <= each.max()


def test_the_tokens_of_an_imported_tokenizer_spell_other_bytes(stores):
    """Else the tests of this file would prove nothing."""
    for name in TOKENIZERS.keys() - set(OWN):
        store = stores(name)
        spelled = len(store.tokenizer.decode_bytes(store.read(0, store.n_tokens))) - len(b"</s>") * len(TEXTS)
        assert spelled != store.n_bytes


@pytest.mark.parametrize("name", OWN)
def test_of_text_scored_in_part_ours_count_what_the_tokens_spell(name: str, stores):
    store = stores(name)
    for batches in range(1, 6):
        config = DataConfig(seq_len=5, batch_size=2)
        targets = np.concatenate([b.targets for b in itertools.islice(heldout_rows(store, config), batches)])
        spoken = [token for token in targets.flat if token not in (IGNORE, store.tokenizer.end_of_text)]
        assert scored(store, batches).bytes == len(store.tokenizer.decode_bytes(np.array(spoken)))


@pytest.mark.parametrize("name", OWN)
def test_without_ends_of_text_a_first_token_has_no_score_and_no_bytes(name: str, stores):
    store = stores(name, end_of_text=False)
    first = len(store.tokenizer.decode_bytes(store.take(store.offsets[:-1])))
    assert scored(store, end_of_text=False).bytes == store.n_bytes - first


def test_a_document_scored_in_part_has_its_bytes_in_proportion(stores):
    """`▁ÅÅ▁b</s>` spells blank, unk, unk, blank, b: 13 bytes of two that are one, of a text of six."""
    store = stores("sentencepiece", ("ÅÅ b",))
    assert store.read(0, 9).tolist() == [2, 0, 0, 2, 4, 1]
    for tokens, spelled in enumerate((1, 6, 11, 12, 13), start=1):
        (found,) = text_bytes(store, np.array([0]), np.array([float(tokens)]), np.array([float(spelled)]))
        assert found == 6 * spelled / 13
    assert scored(store, seq_len=2).bits_per_byte == 6 / math.log(2) / 6


def test_where_tokens_spell_nothing_each_has_an_equal_share(stores):
    assert scored(stores("silent", ("aaaa", "b" * 9))).bytes == 13
    mute = TokenStore(tokenizer.ByteTokenizer(), [np.full(4, 256, np.uint16)], np.array([0, 4]), np.array([10]), [])
    assert text_bytes(mute, np.array([0]), np.array([3.0]), np.array([0.0])) == [7.5]


def test_an_answer_has_the_bytes_of_the_answer(stores):
    store = stores("byte", ("ab\tcdé", "b\tx"))
    result = scored(store, seq_len=8, task=TaskConfig("translate"))
    assert (result.tokens, result.bytes) == (4 + 1 + 2, 5)


def test_classes_have_no_bytes(stores):
    store = stores("byte", ("ab\tyes", "b\tno"))
    result = scored(store, seq_len=8, task=TaskConfig("classify", answers=("yes", "no")))
    assert (result.bytes, result.bits_per_byte, result.bits_per_byte_interval) == (0, None, None)
