"""Documents from a Python program: stored once, by their content, and read as text and shards are."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from arrays import quiet

from llm_jax.data.config import DataConfig
from llm_jax.data.given import stored
from llm_jax.data.prepare import cached
from llm_jax.data.shards import open_shards
from llm_jax.data.sources import documents
from llm_jax.data.tokenizer import ByteTokenizer

CONFIG = DataConfig(tokenizer="byte", heldout=0.3, seq_len=4)
TEXTS = [f"text number {n}" for n in range(30)]


def test_texts_are_a_file_of_rows_that_is_stored_once(tmp_path: Path):
    address = stored(iter(TEXTS), CONFIG, tmp_path, quiet)
    assert [document.text for document in documents(address)] == TEXTS
    assert stored(TEXTS, CONFIG, tmp_path, quiet) == address != stored(TEXTS[1:], CONFIG, tmp_path, quiet)
    assert len(list((tmp_path / "given").iterdir())) == 2


def test_two_threads_store_their_own_texts(tmp_path: Path):
    texts = [[f"{letter} {n} " * 20 for n in range(4000)] for letter in "ab"]
    with ThreadPoolExecutor(2) as pool:
        addresses = list(pool.map(lambda mine: stored(mine, CONFIG, tmp_path, quiet), texts))
    for mine, address in zip(texts, addresses, strict=True):
        assert [document.text for document in documents(address)] == mine


def test_texts_are_stored_alike_whatever_column_the_config_reads(tmp_path: Path):
    address = stored(TEXTS, DataConfig(tokenizer="byte", column="body"), tmp_path, quiet)
    assert [document.text for document in documents(address)] == TEXTS


def test_too_few_texts_to_hold_one_out_are_said_to_be_too_few(tmp_path: Path):
    config = DataConfig(tokenizer="byte", heldout=0.05, uri=stored(["a text", "another"], CONFIG, tmp_path, quiet))
    message = "data= has 2 documents, of which data.heldout=0.05 by hash leaves 2 to train on and 0 held out; give more"
    with pytest.raises(ValueError, match=message):
        cached(config, tmp_path, quiet)


@pytest.mark.parametrize("by", ["hash", "tail"])
def test_ids_are_shards_of_the_same_documents_however_they_come(tmp_path: Path, by):
    config, coder = DataConfig(tokenizer="byte", heldout=0.3, heldout_by=by, seq_len=4), ByteTokenizer()
    rows = [np.array(coder.encode(text)) for text in TEXTS]
    stream = np.concatenate([np.append(row, coder.end_of_text) for row in rows])
    address = stored(rows, config, tmp_path, quiet)
    for same in (stream, stream.tolist(), jnp.array(stream)):
        assert stored(same, config, tmp_path, quiet) == address
    shards = open_shards(cached(DataConfig(**vars(config) | {"uri": address}), tmp_path, quiet))
    found = [
        coder.decode(np.concatenate(list(store.read_document(n)))[:-1])
        for store in map(shards.split, ("train", "heldout"))
        for n in range(store.n_documents)
    ]
    assert sorted(found) == sorted(TEXTS)
    assert shards.split("train").n_bytes + shards.split("heldout").n_bytes == sum(map(len, TEXTS))


@pytest.mark.parametrize(
    ("given", "tokenizer", "message"),
    [
        ("one text", "byte", "is one text or a path; give a list of texts, or set data.uri"),
        (3, "byte", "3 is no iterable of texts"),
        ([], "byte", "there is no document"),
        (["a", 3], "byte", "document 1 is no text but int"),
        ([[1, 2], [0.5]], "byte", r"document 1 has shape \(1,\) of float64"),
        ([[1], [300]], "byte", "document 1 has the id 300, and the tokenizer byte has 0 to 256"),
        ([{"id": 1, "text": "a"}], "byte", r"a dict with id, text; give the texts: \[row\['text'\] for row in data\]"),
        ({"text": ["a", "b"]}, "byte", r"come as a dict; give the texts of one column: list\(data\['text'\]\)"),
        ([1, 0.5], "byte", r"the ids have shape \(2,\) of float64"),
        (
            [1, 2],
            "byte",
            "data= has 1 documents.*data.heldout=0.05.*cut one without any into pieces: numpy.array_split",
        ),
        ([[1]], "train:300", "data.tokenizer=train:300 would learn from text; name the tokenizer that made them"),
    ],
    ids=["text", "number", "empty", "mixed", "floats", "ids", "rows", "columns", "float ids", "one document", "learns"],
)
def test_what_is_no_data_is_refused(tmp_path: Path, given, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        stored(given, DataConfig(tokenizer=tokenizer, seq_len=4), tmp_path, quiet)
    assert not list(tmp_path.glob("given/*"))
