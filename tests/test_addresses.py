"""Which files an address names, and one line about an address that can't be read."""

import os
import re
import sys
import sysconfig
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from test_sources import origins, texts

from llm_jax.data.addresses import files_at
from llm_jax.data.sources import documents, fingerprint, holds_records


def test_a_python_without_its_source_is_refused_with_the_size(monkeypatch, tmp_path):
    (tmp_path / "os.py").write_text("x" * 1234)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "big.py").write_bytes(b"x" * 3_000_000)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    with pytest.raises(ValueError, match=r"builtin:python expected 2,000,000 bytes .* found 1,234; use a Python"):
        texts("builtin:python")


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


def test_an_address_that_answers_with_an_error_is_named(monkeypatch, tmp_path):
    def glob(self: object, path: str) -> list[str]:
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.glob", glob)
    with pytest.raises(ValueError, match=r"cannot read .*nothing\*: no such data set; fix that"):
        texts(str(tmp_path / "nothing*"))


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


@pytest.mark.parametrize("name", ["missing.txt", "*.txt", "builtin:pyhton", "nowhere/", "[", "a[b"])
def test_what_is_not_there_is_named(name: str, tmp_path):
    with pytest.raises(ValueError, match=r"no data at .*expected a file, a folder"):
        texts(tmp_path / name)
