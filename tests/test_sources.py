"""Every kind of source gives its documents, and what cannot be read says so in one line."""

import io
import os
import re
import sys
import sysconfig
from typing import Any

import fsspec
import hypothesis
import hypothesis.strategies as st
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from llm_jax.data import sources
from llm_jax.data.addresses import files_at
from llm_jax.data.sources import documents, fingerprint, holds_records
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
    found: Any = LocalFileSystem().find(str(corpus(tmp_path)), detail=True)
    monkeypatch.setattr(LocalFileSystem, "find", lambda self, path, detail: dict(reversed(found.items())))
    assert texts(tmp_path) == ["a/c.py", "a/d.md", "b.txt"]


def test_a_folder_inside_a_hidden_one_is_not_hidden(tmp_path):
    assert len(texts(corpus(tmp_path / ".cache" / "corpus"))) == 3


def test_a_pattern_gives_the_files_it_matches(tmp_path):
    assert texts(corpus(tmp_path) / "**" / "*.[pm]*") == ["a/c.py", "a/d.md"]


FOLDERS = [
    (["a.jsonl", "b.csv", "README.md", "notes.txt", "c.parquet"], ["a.jsonl", "c.parquet"]),
    (["a.csv", "b.JSON.GZ", "LICENSE", "readme.txt", "dataset_infos.json"], ["a.csv", "b.JSON.GZ"]),
    (["main.py", "package.json", "labels.csv", "README.md"], ["README.md", "main.py"]),
    (["README.md", "LICENSE"], ["LICENSE", "README.md"]),
    (["notes.md", "index.json"], ["notes.md"]),
]


@pytest.mark.parametrize(("names", "taken"), FOLDERS)
def test_a_folder_gives_its_rows_or_its_text_and_says_what_it_leaves_out(names: list[str], taken: list[str], tmp_path):
    lines: list[str] = []
    for name in names:
        (tmp_path / name).write_text("")
    assert [file.name for file in files_at(str(tmp_path), lines.append)] == taken
    left = re.compile(f".*: {len(taken)} of {len(names)} files .*; left out .* by a pattern.")
    assert [bool(left.fullmatch(line)) for line in lines] == [True] * (len(taken) < len(names))


def test_a_pipe_or_a_folder_that_is_a_link_is_left_out_by_name(tmp_path):
    lines: list[str] = []
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    assert [document.text for document in documents(str(tmp_path), report=lines.append)] == ["a", "a"]
    assert "left out loop, nowhere, pipe: neither a file nor a folder" in lines[0]


def test_a_file_name_that_is_no_text_is_spelt_in_one_line(tmp_path):
    odd = os.fsdecode(b"a\xff\n.txt")
    (tmp_path / odd).write_text("a")
    assert origins(tmp_path) == [r"a\udcff\n.txt#0"]
    assert fingerprint(str(tmp_path))
    (tmp_path / odd).write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"a\\udcff\\n.txt is not text: found a zero byte"):
        texts(tmp_path)


@hypothesis.given(PARTS, st.sampled_from(["\n\n", "\n", "a\n", None]), st.integers(1, 7))
def test_documents_of_a_windows_file_are_those_of_unix(text: str, separator: str | None, size: int):
    def cut(text: str, separator: str | None) -> list[str]:
        blocks = [text[i : i + size] for i in range(0, len(text), size)]
        return [part for part in sources._cut_apart(blocks, separator) if part]

    windows = text.replace("\n", "\r\n")
    expected = [part.replace("\n", "\r\n") for part in cut(text, separator)]
    assert cut(windows, separator) == expected
    assert cut(windows, separator and separator.replace("\n", "\r\n")) == expected


def test_an_address_that_answers_with_an_error_is_named(monkeypatch, tmp_path):
    def glob(self: object, path: str) -> list[str]:
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.glob", glob)
    with pytest.raises(ValueError, match=r"cannot read .*nothing\*: no such data set; fix that"):
        texts(str(tmp_path / "nothing*"))


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
    with pytest.raises(ValueError, match=r"cannot read hf://datasets/x/y: .*pip install 'llm-jax\[hf\]'"):
        texts("hf://datasets/x/y")


ADDRESSES = [
    ("foo://bar", "Protocol not known: foo; fsspec reads s3://"),
    ("data:,abc", "a data: address is no file; save its content"),
    ("dir://x", "AttributeError: .*; check the address"),
    ("reference://x", "TypeError: .*; check the address"),
    ("zip://a.txt::/nowhere/a.zip", "No such file or directory.*; check the address"),
    ("ftp://localhost:1/x", "refused; check the address and the network, or copy the data here"),
    ("a\0b", "null (byte|character).*; fix that"),
    ("x" * 5000, "File name too long"),
]


@pytest.mark.parametrize(("uri", "message"), ADDRESSES)
def test_an_address_that_cannot_be_read_says_why_in_one_short_line(uri: str, message: str):
    for read in (texts, fingerprint, holds_records):
        with pytest.raises(ValueError, match=rf"cannot read .*{message}") as error:
            read(uri)
        assert len(str(error.value)) < 700
        assert str(error.value).isprintable()


def test_a_store_that_breaks_off_while_reading_is_one_line(monkeypatch):
    class Body(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise KeyError("line one\n" * 100)

    fsspec.filesystem("memory").pipe("/breaks/a.txt", b"one")
    monkeypatch.setattr(MemoryFileSystem, "_open", lambda self, path, **options: Body())
    with pytest.raises(ValueError, match=r"cannot read /breaks/a.txt: KeyError.*; check the address") as error:
        texts("memory://breaks/a.txt")
    assert len(str(error.value)) < 400


def test_a_remote_file_that_changes_has_another_fingerprint_though_its_key_stays(monkeypatch):
    """As of HTTP, whose key is the address."""
    info = {"name": "/x/a.txt", "type": "file", "size": 3, "ETag": "1"}
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: dict(info))
    monkeypatch.setattr(MemoryFileSystem, "ukey", lambda self, path: "the address")
    before = fingerprint("memory://x/a.txt")
    assert fingerprint("memory://x/a.txt") == before
    info["ETag"] = "2"
    assert fingerprint("memory://x/a.txt") != before


def test_a_column_of_text_without_rows_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for uri in (str(tmp_path), "builtin:numbers"):
        with pytest.raises(ValueError, match=r"column='x' .*; leave it out"):
            list(documents(uri, column="x"))


@pytest.mark.parametrize("name", ["missing.txt", "*.txt", "builtin:pyhton", "nowhere/", "[", "a[b"])
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
    with pytest.raises(ValueError, match=rf"a.txt is not text: found {found}; leave it out"):
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
