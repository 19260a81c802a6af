"""`llm-jax prepare` and `llm-jax tokenize` as a user types them."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("evaluate runs/tiny --data rows.jsonl", "--column NAME"),
        ("prepare rows.jsonl --out rows --tokenizer byte", "--column NAME"),
        ("tokenize --train rows.jsonl --out rows", "--column NAME"),
        ("train tiny.py data.uri=rows.jsonl data.separator=none --run rows", "data.column=NAME"),
        ("prepare other.txt --out rows --tokenizer byte", "--separator $'\\n\\n'"),
    ],
)
def test_advice_names_what_the_verb_takes(words: str, advice: str, workspace: Path, error: Any):
    (workspace / "rows.jsonl").write_text('{"txt": "one"}\n{"txt": "two"}\n')
    (workspace / "other.txt").write_text("so ein anderer Text")
    said = error(*words.split())
    assert advice in said
    assert said.count("data.") == advice.count("data.")


@pytest.mark.parametrize("text", ["plain words", "tab\tand\nline", "naïve 漢字 🙂", "<|endoftext|>", ""])
def test_ids_decode_to_the_text_that_they_were(text: str, output: Any):
    found = json.loads(output("tokenize", text, "--tokenizer", "runs/tiny", "--json"))
    assert found["text"] == text
    assert len(found["ids"]) == len(text.encode())
    if text:
        ids = [str(token) for token in found["ids"]]
        assert output("tokenize", "--tokenizer", "runs/tiny", "--decode", *ids) == text + "\n"


def test_only_when_asked_is_text_read_as_the_special_token(output: Any):
    assert json.loads(output("tokenize", "a<|endoftext|>", "--special", "--json"))["ids"] == [97, 256]


def test_a_tokenizer_trained_here_makes_fewer_tokens(workspace: Path, output: Any, error: Any):
    assert output("tokenize", "--train", "text.txt", "--vocab", "300", "--out", "new/tok").startswith("300 ids")
    assert json.loads(output("tokenize", "little", "--tokenizer", "new/tok", "--json"))["ids"] != list(b"little")
    assert "4 tokens" not in output("tokenize", "little model", "--tokenizer", "byte")
    assert "new folder" in error("tokenize", "--train", "text.txt", "--out", "new/tok")
    assert [path.name for path in (workspace / "new").iterdir()] == ["tok"]
