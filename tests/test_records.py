"""Rows of every format give the text of one column; what has another shape says so in one line."""

import gzip
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pytest
from pyarrow import parquet

from llm_jax.data.addresses import files_at
from llm_jax.data.rows import json_rows
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
    with pytest.raises(ValueError, match=r"no 'text' or 'content' in its first rows but 'url', 'label'; name the one"):
        texts(write(path, [row]))
    with pytest.raises(ValueError, match=r"has no 'txt' in its first rows but 'url', 'label'; name one of those"):
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
    with pytest.raises(ValueError, match=r"no text in it|no 'text' or 'content' in its first rows but 'text', 'url'"):
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


ROWS = st.lists(st.dictionaries(st.sampled_from(["text", "n"]), st.text() | st.none(), min_size=1), max_size=8)


@hypothesis.given(ROWS, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
def test_json_is_read_alike_in_any_layout_and_any_blocks(rows: list, indent: int | None, array: bool, size: int):
    whole = [json.dumps(row, indent=indent, ensure_ascii=False) for row in rows]
    text = f" [\n{' ,'.join(whole)}] \n" if array else "\r\n".join(whole)
    blocks = (text[i : i + size] for i in range(0, len(text), size))
    assert [row for _, row in json_rows("a.json", blocks)] == rows


def test_a_large_array_is_never_held_whole():
    """Blocks are taken as rows are: of a gigabyte, a few at a time."""
    taken = itertools.count()
    endless = itertools.chain("[", (f'{{"text": "{number}"}},' for number in taken))
    rows = list(itertools.islice(json_rows("a.json", endless), 1000))
    assert rows[-1] == ("row 1000", {"text": "999"})
    assert next(taken) < 1010


BAD_JSON = [
    ('{"text": ', 'line 4: not JSON .*, found \'{"text":'),
    ('["a"]', "line 4: expected an object such as .*, found '"),
    ('"a"', "line 4: expected an object such as"),
    ('{"text": "b"},', "line 4: expected an object such as .*, found ','; fix it"),
    ('{"text": 5}', "line 4: 'text' is a number, expected a string"),
    ('{"text": ["a"]}', "line 4: 'text' is a list, expected a string"),
    ('{"text": {"a": 1}}', "line 4: 'text' is an object, expected a string"),
    ('{"text": true}', "line 4: 'text' is true or false, expected a string"),
    ('{"text": "a\nb"}', "line 4: not JSON"),
    ("[" * 100_000, "line 4: expected an object"),
    ('{"a": ' + "[" * 100_000, "line 4: nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_a_bad_row_is_named_by_its_line(line: str, message: str, tmp_path: Path):
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(f'{{"text": "a"}}\n\n{{"text": "b"}}\n{line}\n')
        with pytest.raises(ValueError, match=rf"{name}, {message}") as error:
            texts(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}', "line 1: expected a comma or the end of the array, found the end"),
        ('[{"text": "a"},]', 'line 1: expected an object such as .*, found "]"'),
        ('[{"text": "a"}] {}', "line 1: expected nothing after the array"),
        ('["a", "b"]', "line 1: expected an object such as"),
        ("5", "line 1: expected an object such as"),
        (
            '{"version": 1, "data": [{"text": "a"}]}',
            r"if 'data' lists the rows, .*: jq -c '.data\[\]' FILE > rows.jsonl",
        ),
        ("[]", "has no text in it"),
        ('{"default": {"features": {}}}', "no 'text' or 'content' in its first rows but 'default'"),
    ],
)
def test_json_of_another_shape_is_named(text: str, message: str, tmp_path: Path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message.replace('"]"', "']'")):
        texts(tmp_path)


def test_no_object_is_read_without_an_end(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("llm_jax.data.rows.ROW_CHARS", 1000)
    (tmp_path / "a.json").write_text('{"data": [' + "1, " * 1_000_000)
    with pytest.raises(ValueError, match=r"line 1: no object ends within 1,000 characters; write one a line, found"):
        texts(tmp_path)


def test_a_missing_brace_is_named_by_its_line_however_much_follows(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("llm_jax.data.rows.ROW_CHARS", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"\n' + '{"text": "c"}\n' * 1000)
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 2: not JSON \(Expecting ',' delimiter, line 3\), found '.*\"b\""
    ):
        texts(tmp_path)


def test_a_row_cut_anywhere_by_blocks_is_no_fault():
    row = '{"a":"\\ud83d\\ude00\\u00e9\\\\","n":[-Infinity,NaN,-1.5e-30,true,false,null,{}],"text":"x"}'
    for text in (row, re.sub(r"([{},:\[\]])", " " * 40 + r"\1" + "\n" * 40, row)):
        for size in (1, 2, 7):
            blocks = (text[i : i + size] for i in range(0, len(text), size))
            ((_, found),) = json_rows("a.json", blocks)
            assert (found["a"], found["text"]) == ("\U0001f600\u00e9\\", "x")


def test_numbers_of_any_length_stand_beside_text(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(f'{{"n": {"9" * 100_000}, "m": NaN, "text": "a"}}')
    assert texts(tmp_path) == ["a"]


def test_half_characters_that_json_can_spell_are_replaced(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "\\ud83d \\ud83d\\udc08"}')
    assert texts(tmp_path) == ["\ufffd 🐈"]


def test_csv_fields_hold_commas_quotes_and_line_ends(tmp_path: Path):
    text = '\ufeffid, text\r\n1,"a, ""b""\r\nc"\r\n\r\n2,d\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert texts(tmp_path) == ['a, "b"\r\nc', "d"]


def test_a_csv_field_is_as_long_as_any_text(tmp_path: Path):
    (tmp_path / "a.csv").write_text(f"text,n\n{'a' * 200_000},1\n")
    assert texts(tmp_path) == ["a" * 200_000]


def test_quotes_in_tsv_are_text(tmp_path: Path):
    (tmp_path / "a.tsv").write_text('n\ttext\n1\t"a" he said, "\n2\tb\n')
    assert texts(tmp_path) == ['"a" he said, "', "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\na, b\n", "line 2: 2 fields, expected 1 as in the header; put a field"),
        ("text,n\na\n", "line 2: 1 fields, expected 2 as in the header"),
        ('n,text\n1,"a\n2,b\n', "line 2: unexpected end of data; fix its quotes"),
        ('n,text\n1,"a"b\n', "line 2: ',' expected after"),
        ("text,text\na,b\n", "line 1: two columns are named 'text'"),
        ("Once upon a time,1\nthere was,2\n", "no 'text' or 'content' in its first rows but 'Once upon a time', '1'"),
        ("text\n", "has no text in it"),
    ],
)
def test_a_table_that_is_not_one_is_named_by_its_line(text: str, message: str, tmp_path: Path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path)


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
