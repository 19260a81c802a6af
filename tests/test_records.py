"""Rows of every format give the text of one column; what has another shape says so in one line."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from llm_jax.data.addresses import files_at
from llm_jax.data.sources import documents

CHATS = [
    {"id": "a", "conversations": [{"from": "human", "value": "hi"}]},
    {"id": "a", "messages": [{"role": "user", "content": "hi"}]},
    {"prompt": "hi", "chosen": "yes", "rejected": "no"},
]


def texts(uri: object, column: str | None = None, lines: list[str] | None = None) -> list[str]:
    report = (lines if lines is not None else []).append
    return [document.text for document in documents(str(uri), column=column, report=report)]


def write(path: Path, rows: list[Any]) -> Path:
    """`rows` in the format that the name of `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        table = [list(rows[0]), *([row[name] or "" for name in rows[0]] for row in rows)]
        path.write_text("".join(f"{mark.join(map(str, fields))}\n" for fields in table))
    return path


formats = pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])


@formats
def test_text_is_chosen_before_content_before_what_is_named(suffix: str, tmp_path: Path):
    row = {"url": "u", "content": "c", "text": "t", "label": "l"}
    path = write(tmp_path / f"a.{suffix}", [row, row])
    lines: list[str] = []
    assert texts(path, lines=lines) == ["t", "t"]
    assert lines == [f"{path}: the text is the column 'text'"]
    assert texts(path, "label") == ["l", "l"]
    del row["text"]
    assert texts(write(path, [row])) == ["c"]
    del row["content"]
    with pytest.raises(
        ValueError, match=r"no 'text' or 'content' in its first rows, only 'url', 'label'; name the one"
    ):
        texts(write(path, [row]))
    with pytest.raises(ValueError, match=r"has no 'txt' in its first rows, only 'url', 'label'; name one of those"):
        texts(path, "txt")


@formats
def test_rows_without_text_are_counted_and_the_first_is_named(suffix: str, tmp_path: Path):
    rows = [{"text": "a", "url": "u"}, {"text": None, "url": "u"}, {"text": "b", "url": "u"}, {"text": "", "url": "u"}]
    path = write(tmp_path / f"a.{suffix}", rows)
    lines: list[str] = []
    assert texts(path, lines=lines) == ["a", "b"]
    first = {"jsonl": "line 2", "csv": "line 3", "tsv": "line 3"}.get(suffix, "row 2")
    assert lines[1] == f"{path}: 2 of 4 rows have no 'text' (first: {first})"


@formats
def test_a_first_row_without_text_chooses_no_other_column(suffix: str, tmp_path: Path):
    path = write(tmp_path / f"a.{suffix}", [{"text": None, "url": "u"}, {"text": "a", "url": "u"}])
    assert texts(path) == ["a"]
    if suffix in ("jsonl", "json", "parquet"):  # a name without a value is no choice either
        assert texts(write(path, [{"text": None, "content": "c"}])) == ["c"]
        assert texts(write(path, [{"text": None, "content": "c"}, {"text": "a", "content": "c"}])) == ["a"]
    with pytest.raises(ValueError, match=r"no text in it|no 'text' or 'content' in its first rows, only 'text', 'url'"):
        texts(write(path, [{"text": None, "url": "u"}]))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("row", CHATS, ids=lambda row: list(row)[1])
def test_chats_are_refused_by_name_and_never_read_as_something_else(row: dict, suffix: str, tmp_path: Path):
    path = write(tmp_path / f"a.{suffix}", [row])
    with pytest.raises(ValueError, match=rf"a.{suffix} holds chats \('{list(row)[1]}' of .*data.column=NAME"):
        texts(path)
    turns = [name for name, value in row.items() if isinstance(value, list)]
    with (
        pytest.raises(ValueError, match=r"row 1: .* is a chat|line 1: .* is a chat")
        if turns
        else pytest.raises(ValueError)
    ):
        texts(path, (turns or ["gone"])[0])
    assert texts(write(path, [row | {"text": "t"}])) == ["t"]


def test_files_with_other_columns_give_no_text_and_are_named(tmp_path: Path):
    for name in ("labels.jsonl", "b.jsonl"):
        write(tmp_path / name, [{"label": "x", "content": "y"}] if name == "b.jsonl" else [{"label": "x"}] * 3)
    write(tmp_path / "tales.jsonl", [{"text": "once", "content": "z"}])
    lines: list[str] = []
    assert texts(tmp_path, "text", lines) == ["once"]
    assert lines[1] == (
        f"{tmp_path}: 4 of 5 rows have no 'text' (first: b.jsonl, line 1); no row has it in b.jsonl, labels.jsonl"
    )
    lines.clear()
    assert texts(tmp_path, lines=lines) == ["y", "z"]  # the first file that has one of the two decides for all
    assert lines[0] == f"{tmp_path}: the text is the column 'content'"


def test_a_folder_of_json_and_csv_gives_one_column(tmp_path: Path):
    write(tmp_path / "a.csv", [{"text": "a", "n": 1}])
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{"text": "b"}\n{"text": "c"}'))
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    assert texts(tmp_path) == ["a", "b", "c"]


def test_half_characters_that_json_can_spell_are_replaced(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "\\ud83d \\ud83d\\udc08"}')
    assert texts(tmp_path) == ["\ufffd 🐈"]


STRINGS = {
    "string": pyarrow.string(),
    "large": pyarrow.large_string(),
    "view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "large dictionary": pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
}


@pytest.mark.parametrize("kind", STRINGS.values(), ids=STRINGS)
def test_every_encoding_of_strings_in_parquet_is_text(kind: pyarrow.DataType, tmp_path: Path):
    column = pyarrow.array(["a", None, "b", "a"]).cast(kind)
    parquet.write_table(pyarrow.table({"n": range(4), "text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path) == ["a", "b", "a"]


def test_parquet_gives_its_texts_in_order(tmp_path: Path):
    rows = [f"{number}" for number in range(3000)]
    table = pyarrow.table({"id": range(3001), "text": [*rows, None], "lang": ["en"] * 3001})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    assert texts(tmp_path) == rows


@pytest.mark.parametrize("group", [1, 3000])
def test_a_row_of_parquet_that_is_not_utf8_is_named(group: int, tmp_path: Path):
    data = pyarrow.array([b"a"] * 2000 + [b"a\xff"] + [b"c"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": data}), tmp_path / "a.parquet", row_group_size=group)
    with pytest.raises(ValueError, match=r"a.parquet, row 2001: the byte 0xff is not UTF-8; fix the row"):
        texts(tmp_path)


def test_a_parquet_file_that_is_damaged_or_of_another_kind_is_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [b"a"]}), path)
    with pytest.raises(ValueError, match=r"a.parquet, row 1: 'text' is binary, expected a string"):
        texts(path)
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(ValueError, match=r"a.parquet has 2 columns named 'text'"):
        texts(path)
    whole = path.read_bytes()
    for data in (whole[:-9], b"", whole[:40]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a.parquet is damaged: .*; copy or download it again"):
            texts(path)


def test_a_page_of_parquet_that_differs_from_its_checksum_is_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["once upon a time"]})
    parquet.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    path.write_bytes(path.read_bytes().replace(b"once", b"0nce"))
    with pytest.raises(ValueError, match=r"a.parquet is damaged: .*CRC"):
        texts(path)


def test_parquet_without_pyarrow_names_the_extra(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"parquet needs pyarrow; pip install 'llm-jax\[hf\]'"):
        texts(tmp_path)


def test_the_rows_of_a_file_are_told_by_its_name_in_any_case(tmp_path: Path):
    write(tmp_path / "A.jsonl", [{"text": "a"}]).rename(tmp_path / "A.JSONL")
    assert files_at(str(tmp_path))[0].suffix == ".jsonl"
    assert texts(tmp_path) == ["a"]
