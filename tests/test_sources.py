"""Every kind of source gives its documents, and what cannot be read says so in one line."""

import io
import re

import fsspec
import hypothesis
import hypothesis.strategies as st
import pytest
from fsspec.implementations.memory import MemoryFileSystem

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
def test_documents_between_ends_of_text_are_those_of_split_for_any_blocks(text: str, size: int):
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    parts = text.split(END_OF_TEXT)
    expected = parts if len(parts) == 1 else [part.strip("\n") for part in parts]
    assert [part for part in sources._cut_apart(blocks, None) if part] == [part for part in expected if part]


def test_a_separator_that_cuts_nowhere_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="separator='' cuts nowhere"):
        texts(tmp_path, "")


@hypothesis.given(PARTS, st.sampled_from(["\n\n", "\n", "a\n", None]), st.integers(1, 7))
def test_documents_of_a_windows_file_are_those_of_unix(text: str, separator: str | None, size: int):
    def cut(text: str, separator: str | None) -> list[str]:
        blocks = [text[i : i + size] for i in range(0, len(text), size)]
        return [part for part in sources._cut_apart(blocks, separator) if part]

    windows = text.replace("\n", "\r\n")
    expected = [part.replace("\n", "\r\n") for part in cut(text, separator)]
    assert cut(windows, separator) == expected
    assert cut(windows, separator and separator.replace("\n", "\r\n")) == expected


def test_a_separator_for_records_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="holds records; leave it out"):
        texts(tmp_path, "\n")


def test_a_store_that_breaks_off_while_reading_is_one_line(monkeypatch):
    class Body(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise KeyError("line one\n" * 100)

    fsspec.filesystem("memory").pipe("/breaks/a.txt", b"one")
    monkeypatch.setattr(MemoryFileSystem, "_open", lambda self, path, **options: Body())
    with pytest.raises(ValueError, match=r"cannot read /breaks/a.txt: KeyError.*; check the address") as error:
        texts("memory://breaks/a.txt")
    assert len(str(error.value)) < 400


def test_a_remote_file_that_changes_under_its_key_has_another_fingerprint(monkeypatch):
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
