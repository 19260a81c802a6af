"""Whatever a tokenizer's files hold, there is a tokenizer, or one line that says what is wrong, within a second."""

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_imported_tokenizer import END, gpt2_like, llama2_like, t5_like

from llm_jax.data import tokenizer
from llm_jax.data.imported_tokenizer import ImportedTokenizer
from llm_jax.data.tokenizer_interface import Tokenizer, fingerprint_of

SECONDS = 12.0  # a fuzzer's
ODD: list[Any] = [
    *(None, True, -1, 0, 1.5, 1e308, 300_000_000, 2**31, 2**32, 2**63, 10**30, float("nan"), float("inf")),
    *("", "a", "\ud800", "\0", "x" * 1000, [], {}, [[]], ["a", "b"], [0, 1], {"type": "ByteLevel"}, {"id": 1}),
]


def mutated(value: Any, draw: random.Random) -> Any:
    """`value` of JSON, in which one to three entries are gone, replaced, doubled, renamed or a little off."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        parent, key, node = None, None, value
        for _ in range(draw.randrange(1, 6)):
            keys = [*node] if isinstance(node, dict) else [*range(len(node))] if isinstance(node, list) else []
            if not keys:
                break
            parent, key = node, draw.choice(keys)
            node = parent[key]
        if parent is not None:
            change(parent, key, draw)
    return value


def change(parent: Any, key: Any, draw: random.Random) -> None:
    node, how = parent[key], draw.randrange(5)
    if how == 0:
        del parent[key]
    elif how <= 2:
        parent[key] = copy.deepcopy(draw.choice(ODD))
    elif how == 3 and isinstance(parent, dict):
        parent[draw.choice(["x", "", "type", "id", "vocab", "kind"])] = parent.pop(key)
    elif how == 3:
        parent.append(copy.deepcopy(node))
    elif isinstance(node, int) and not isinstance(node, bool):
        parent[key] = node + draw.choice([-1, 1, 10, 1000])
    else:
        parent[key] = node + draw.choice(["a", "", " "]) if isinstance(node, str) else [copy.deepcopy(node)]


def cut(data: bytes, draw: random.Random) -> bytes:
    """`data`, broken off or with a byte changed, one time in ten."""
    if draw.randrange(10):
        return data
    where = draw.randrange(len(data))
    return data[:where] if draw.randrange(2) else data[:where] + bytes([draw.randrange(256)]) + data[where + 1 :]


def fuzz(open_one: Callable[[random.Random], Tokenizer]) -> tuple[int, int]:
    """Opens and uses tokenizers for a while; how many opened, and how many were refused."""
    opened, refused, deadline = 0, 0, time.monotonic() + SECONDS
    for seed in range(100_000):
        start, message = time.process_time(), "opened"
        try:
            coder = open_one(random.Random(seed))
            ids = coder.encode(f"The cat's mat{END} ß", special=bool(seed % 2))
            assert len(coder.decode(ids)) >= 0
            assert len(coder.decode_bytes(ids)) >= 0
            opened += 1
        except ValueError as error:
            message = str(error)
            refused += 1
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        assert "\n" not in message, f"seed {seed}: {message}"
        assert time.process_time() - start < 1, f"seed {seed} took too long: {message}"
        if time.monotonic() > deadline:
            break
    return opened, refused


@pytest.mark.slow
def test_a_mutated_encoding_json_is_read_or_refused(tmp_path: Path):
    kinds = [tokenizer.train(260, ["The cat's mat"]), tokenizer.ByteTokenizer(), tokenizer.CharTokenizer("The cat's m")]
    seeds = []
    for coder in kinds:
        coder.save(tmp_path)
        seeds.append(((tmp_path / "encoding.json").read_bytes(), (tmp_path / "ranks.tiktoken").read_bytes()))

    def open_one(draw: random.Random) -> Tokenizer:
        text, ranks = draw.choice(seeds)
        meta, ranks = mutated(json.loads(text), draw), cut(ranks or b" ", draw)
        if draw.randrange(3) and isinstance(meta, dict):  # else the digest refuses most
            encoding = meta.get("encoding")
            meta["fingerprint"] = fingerprint_of(encoding if isinstance(encoding, dict) else {}, ranks)
        (tmp_path / "encoding.json").write_bytes(cut(json.dumps(meta).encode(), draw))
        (tmp_path / "ranks.tiktoken").write_bytes(ranks)
        return tokenizer.load_tokenizer(tmp_path)

    opened, refused = fuzz(open_one)
    assert min(opened, refused) > 10


@pytest.mark.slow
def test_a_mutated_tokenizer_json_is_read_or_refused():
    """The library itself is not tested: what would break it is refused before it is asked."""
    seeds = [json.loads(make().to_str()) for make in (gpt2_like, llama2_like, t5_like)]
    beside = {"bos_token": {"content": "<s>"}, "eos_token": END, "add_bos_token": True}

    def open_one(draw: random.Random) -> Tokenizer:
        data = cut(json.dumps(mutated(draw.choice(seeds), draw)).encode(), draw)
        other = draw.choice(["tokenizer_config.json", "special_tokens_map.json"])
        files = {"tokenizer.json": data, other: cut(json.dumps(mutated(beside, draw)).encode(), draw)}
        return ImportedTokenizer("x", files, 1, draw.choice([280, 10**9]))

    opened, refused = fuzz(open_one)
    assert min(opened, refused) > 10
