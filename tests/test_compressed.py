"""What is compressed is read to its end; what is cut short, damaged or followed by something else is named."""

import bz2
import gzip
import lzma
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from tiny_run import largest_file

from llm_jax.data.addresses import File
from llm_jax.data.compressed import open_seekable
from llm_jax.data.sources import documents

TEXT = "".join(random.Random(0).choices("abcdé🐈 \n", k=20_000))


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


CODECS = [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
codecs = pytest.mark.parametrize(("suffix", "compress"), CODECS, ids=[suffix for suffix, _ in CODECS])
Compress = Callable[[bytes], bytes]


def read(uri: object) -> str:
    return "".join(document.text for document in documents(str(uri)))


@codecs
def test_all_streams_of_a_file_are_read(suffix: str, compress: Compress, tmp_path: Path):
    data = TEXT.encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(data[:7001]) + compress(b"") + compress(data[7001:]))
    assert read(path) == TEXT
    path.write_bytes(compress(b"a" * 5_000_000))  # a few bytes that make many
    assert read(path) == "a" * 5_000_000


@codecs
def test_a_file_that_is_cut_short_anywhere_is_named(suffix: str, compress: Compress, tmp_path: Path):
    first, second = compress(TEXT.encode()), compress(TEXT.encode())
    path = tmp_path / f"a.txt{suffix}"
    sizes = [0, 1, len(first) // 2, len(first) - 1, len(first) + 3, len(first + second) - 1]
    for size in sizes:
        path.write_bytes((first + second)[:size])
        with pytest.raises(ValueError, match=rf"a.txt{suffix} is cut short: .*; copy or download it again"):
            read(path)


@codecs
def test_a_byte_that_differs_is_named(suffix: str, compress: Compress, tmp_path: Path):
    data = compress(TEXT.encode())
    path = tmp_path / f"a.txt{suffix}"
    for at in (0, len(data) // 3, len(data) // 2, len(data) - 6):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        with pytest.raises(ValueError, match=rf"a.txt{suffix} is (damaged|cut short): .*again"):
            read(path)


@pytest.mark.parametrize(("suffix", "compress"), [CODECS[0], CODECS[2]], ids=[".gz", ".xz"])
def test_zeros_that_a_format_allows_between_and_after_streams_are_skipped(
    suffix: str, compress: Compress, tmp_path: Path
):
    path = tmp_path / f"a.txt{suffix}"
    for size in (4, 5000):  # more than is read at once
        path.write_bytes(compress(b"abc") + bytes(size) + compress(b"de") + bytes(size))
        assert read(path) == "abcde"
        path.write_bytes(compress(b"abc") + bytes(size) + b"something else")
        with pytest.raises(ValueError, match=r"is (damaged|cut short): .*again"):
            read(path)


@codecs
@pytest.mark.parametrize("more", [bytes(64) + b"!", b"something else", b"\x1f\x8b"], ids=["zeros", "text", "gzip"])
def test_what_follows_the_last_stream_is_named(suffix: str, compress: Compress, more: bytes, tmp_path: Path):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(b"abc") + more)
    with pytest.raises(ValueError, match=rf"a.txt{suffix} is (damaged|cut short): .*again"):
        read(path)


@codecs
def test_a_compressed_file_at_an_address_is_held_to_the_same(suffix: str, compress: Compress):
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/compressed/a.txt{suffix}", compress(TEXT.encode()))
    assert read(f"memory://compressed/a.txt{suffix}") == TEXT
    memory.pipe(f"/compressed/a.txt{suffix}", compress(TEXT.encode())[:-9])
    with pytest.raises(ValueError, match="is cut short"):
        read(f"memory://compressed/a.txt{suffix}")


def test_parquet_inside_of_a_compression_is_read(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert read(tmp_path / "b.parquet.gz") == "ab"


def test_zstandard_without_its_package_is_named(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ValueError, match=r"cannot read .*a.jsonl.zst: zstd needs a package; pip install zstandard"):
        read(tmp_path)


def test_a_disk_that_can_not_hold_the_copy_of_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"a" * 50_000))
    file = File(fsspec.filesystem("file"), str(tmp_path / "a.parquet.gz"), "a.parquet.gz")
    says = f"^{tmp_path} can't hold a copy of {file}, decompressed .File too large.; make room there, or"
    with largest_file(40_000), pytest.raises(ValueError, match=says), open_seekable(file):
        pass
    with open_seekable(file) as copy:
        assert copy.read() == b"a" * 50_000
