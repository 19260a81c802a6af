"""Every kind of source gives its documents, and what cannot be read says so in one line."""

import bz2
import gzip
import json
import lzma
import re
import sys
import sysconfig

import fsspec
import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.local import LocalFileSystem

from llm_jax.data import sources
from llm_jax.data.sources import documents, fingerprint
from llm_jax.data.tokenizer import END_OF_TEXT


def texts(uri: object, separator: str | None = None) -> list[str]:
    return [document.text for document in documents(str(uri), separator)]


def origins(uri: object) -> list[str]:
    return [document.origin for document in documents(str(uri))]


def test_the_standard_library_is_always_there_and_the_same():
    first = list(documents("builtin:python"))
    assert sum(len(document.text) for document in first) > 5_000_000
    assert {"argparse.py#0", "json/decoder.py#0"} <= {document.origin for document in first}
    assert not [document for document in first if re.search(r"(^|/)(tests?|site-packages)/", document.origin)]
    assert first == list(documents("builtin:python"))
    assert fingerprint("builtin:python") == fingerprint("builtin:python")


def test_a_python_without_its_source_is_refused_with_the_size(monkeypatch, tmp_path):
    (tmp_path / "os.py").write_text("x" * 1234)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "big.py").write_bytes(b"x" * 3_000_000)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    with pytest.raises(ValueError, match=r"builtin:python expected 2,000,000 bytes .* found 1,234; use a Python"):
        texts("builtin:python")


def test_a_text_file_is_one_document_to_the_byte(tmp_path):
    text = "\r\n é 🐈\u2028 \n\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert texts(tmp_path / "a.txt") == [text]
    assert origins(tmp_path / "a.txt") == ["a.txt#0"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    assert texts(tmp_path / "a.txt") == ["a"]


def test_text_is_cut_where_a_text_ends(tmp_path):
    (tmp_path / "a.txt").write_text(f"{END_OF_TEXT}\none\ntwo\n\n{END_OF_TEXT}\nthree\n{END_OF_TEXT}{END_OF_TEXT}\n")
    assert texts(tmp_path / "a.txt") == ["one\ntwo", "three"]
    assert origins(tmp_path / "a.txt") == ["a.txt#0", "a.txt#1"]


PARTS = st.lists(st.sampled_from(["a", "b\n", "\n", "\n\n", "aa", END_OF_TEXT, "<|end"]), min_size=1).map("".join)


@hypothesis.given(PARTS, st.sampled_from(["\n\n", "a", "aa", "aba", END_OF_TEXT]), st.integers(1, 7))
def test_documents_after_a_separator_are_the_text_whatever_the_blocks(text: str, separator: str, size: int):
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    cut = [part for part in sources._cut_apart(blocks, separator) if part]
    assert "".join(cut) == text
    assert cut == re.findall(rf"(?s).*?(?:{re.escape(separator)})+|.+", text)


@hypothesis.given(PARTS, st.integers(1, 7))
def test_documents_between_ends_of_text_are_what_split_gives_whatever_the_blocks(text: str, size: int):
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    parts = text.split(END_OF_TEXT)
    expected = parts if len(parts) == 1 else [part.strip("\n") for part in parts]
    assert [part for part in sources._cut_apart(blocks, None) if part] == [part for part in expected if part]


def test_a_separator_that_cuts_nowhere_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="separator='' cuts nowhere"):
        texts(tmp_path, "")


def corpus(folder):
    for name in ("b.txt", "a/c.py", "a/d.md", ".git/config", "a/__pycache__/c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_folder_gives_every_file_but_the_hidden(tmp_path):
    assert texts(corpus(tmp_path)) == ["a/c.py", "a/d.md", "b.txt"]
    assert origins(tmp_path) == ["a/c.py#0", "a/d.md#0", "b.txt#0"]


def test_the_order_is_not_that_of_the_file_system(tmp_path, monkeypatch):
    found = LocalFileSystem().find(str(corpus(tmp_path)))
    monkeypatch.setattr(LocalFileSystem, "find", lambda self, path: found[::-1])
    assert texts(tmp_path) == ["a/c.py", "a/d.md", "b.txt"]


def test_a_folder_inside_a_hidden_one_is_not_hidden(tmp_path):
    assert len(texts(corpus(tmp_path / ".cache" / "corpus"))) == 3


def test_a_pattern_gives_the_files_it_matches(tmp_path):
    assert texts(corpus(tmp_path) / "**" / "*.[pm]*") == ["a/c.py", "a/d.md"]


def test_a_folder_with_records_gives_only_those(tmp_path):
    (corpus(tmp_path) / "data.jsonl").write_text('{"text": "record"}')
    assert texts(tmp_path) == ["record"]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files_are_read_and_damaged_ones_named(suffix: str, compress, tmp_path):
    data = compress(json.dumps({"text": "é" * 1000}).encode())
    (tmp_path / f"a.jsonl{suffix}").write_bytes(data)
    assert texts(tmp_path) == ["é" * 1000]
    for damage in (data[:-9], data[:20] + bytes([data[20] ^ 255]) + data[21:], b"not " + data):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(damage)
        with pytest.raises(ValueError, match=rf"a.jsonl{suffix}: .*is it whole"):
            texts(tmp_path)


def test_zstandard_without_its_package_is_named(monkeypatch, tmp_path):
    monkeypatch.delitem(sources.compr, "zstd", raising=False)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ValueError, match="zstd needs a package; install zstandard"):
        texts(tmp_path)


def test_records_give_their_text_and_skip_what_has_none(tmp_path):
    lines = [
        '{"id": "x", "text": "a\\nb"}',
        "",
        '{"text": null}',
        '{"text": "\\ud83d \\ud83d\\udc08"}',
        '{"text": ""}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert texts(tmp_path) == ["a\nb", "\ufffd 🐈"]
    assert origins(tmp_path) == ["a.jsonl#0", "a.jsonl#1"]


def test_the_only_field_of_strings_is_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1, "content": "a"}\n{"n": 2, "content": "b"}\n')
    assert texts(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 4, is not JSON"),
        ('["a"]', "line 4, is not an object"),
        ('{"text": 5}', "line 4, has no string in its field 'text'"),
        ('{"body": "a"}', "line 4, has no string in its field 'text'"),
    ],
)
def test_a_bad_record_is_named_by_its_line(line: str, message: str, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n\n{{"text": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"a.jsonl, {message}"):
        texts(tmp_path)


def test_records_with_several_texts_name_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "a", "body": "b"}')
    with pytest.raises(ValueError, match=r"has no field 'text' but 'title', 'body'; rename"):
        texts(tmp_path)


def test_parquet_gives_its_texts_in_order(tmp_path):
    rows = [f"{number}" for number in range(3000)]
    table = pyarrow.table({"id": range(3001), "text": [*rows, None], "lang": ["en"] * 3001})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    (tmp_path / "README.md").write_text("about it")
    assert texts(tmp_path) == rows


def test_a_parquet_file_cut_short_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    assert texts(tmp_path) == ["a"]
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cannot read .*a.parquet: .*is it whole"):
        texts(tmp_path)


def test_parquet_reads_large_strings_and_names_a_column_of_something_else(tmp_path):
    large = pyarrow.array(["a", "b"], pyarrow.large_string())
    pyarrow.parquet.write_table(pyarrow.table({"content": large}), tmp_path / "a.parquet")
    assert texts(str(tmp_path / "a.parquet")) == ["a", "b"]
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet holds binary in its column 'text'; make them strings"):
        texts(str(tmp_path / "b.parquet"))


def test_an_address_that_answers_with_an_error_is_named(monkeypatch, tmp_path):
    def glob(self: object, path: str) -> list[str]:
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.glob", glob)
    with pytest.raises(ValueError, match=r"cannot read .*nothing\*: no such data set; mend that"):
        texts(str(tmp_path / "nothing*"))


def test_parquet_without_pyarrow_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"parquet needs pyarrow; install llm-jax\[hf\]"):
        texts(tmp_path)


def test_a_separator_for_records_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="holds records; leave it out"):
        texts(tmp_path, "\n")


def test_an_address_that_fsspec_reads_is_a_source():
    memory = fsspec.filesystem("memory")
    memory.pipe("/sources/x/a.txt", b"one")
    memory.pipe("/sources/x/b.txt", b"two")
    assert texts("memory://sources/x") == ["one", "two"]
    assert texts("memory://sources/*/b.txt") == ["two"]
    before = fingerprint("memory://sources/x")
    memory.pipe("/sources/x/b.txt", b"three")
    assert fingerprint("memory://sources/x") != before


def test_an_address_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"cannot read hf://datasets/x/y: .*install llm-jax\[hf\]"):
        texts("hf://datasets/x/y")


@pytest.mark.parametrize("name", ["missing.txt", "*.txt", "builtin:pyhton", "nowhere/"])
def test_what_is_not_there_is_named(name: str, tmp_path):
    with pytest.raises(ValueError, match=r"no data at .*expected a file, a folder"):
        texts(tmp_path / name)


def test_what_is_empty_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(f"\n{END_OF_TEXT}\n")
    with pytest.raises(ValueError, match="has no text in it"):
        texts(tmp_path)


@pytest.mark.parametrize(("data", "found"), [(b"a\0b", "a zero byte"), (b"\x89PNG\r\n", "the byte 0x89, not UTF-8")])
def test_what_is_binary_is_named_with_the_byte(data: bytes, found: str, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a.txt is not text: found {found}; choose by a pattern"):
        texts(tmp_path)


def test_a_fingerprint_follows_the_content_and_the_names(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    before = fingerprint(str(tmp_path))
    (tmp_path / "a.txt").touch()
    assert fingerprint(str(tmp_path)) == before
    (tmp_path / "a.txt").rename(tmp_path / "a.jsonl")
    renamed = fingerprint(str(tmp_path))
    (tmp_path / "a.jsonl").write_text("b")
    assert len({before, renamed, fingerprint(str(tmp_path))}) == 3
