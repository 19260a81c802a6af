"""Rows of JSON, CSV and TSV are read as streams, and a bad one is named by its line."""

import itertools
import json
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from test_records import texts

from llm_jax.data.rows import json_rows

ROWS = st.lists(st.dictionaries(st.sampled_from(["text", "n"]), st.text() | st.none(), min_size=1), max_size=8)


@hypothesis.given(ROWS, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
def test_json_is_read_alike_with_any_indent_and_any_blocks(rows: list, indent: int | None, array: bool, size: int):
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
        ('{"default": {"features": {}}}', "no 'text' or 'content' in its first rows, only 'default'"),
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
        ("Once upon a time,1\nthere was,2\n", "no 'text' or 'content' in its first rows, only 'Once upon a time', '1'"),
        ("text\n", "has no text in it"),
    ],
)
def test_a_table_that_is_not_one_is_named_by_its_line(text: str, message: str, tmp_path: Path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path)
