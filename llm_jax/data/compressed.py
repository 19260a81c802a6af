"""The bytes and the text of a file, compressed or not: .gz .bz2 .xz .zst.

A file is complete if its last stream ends at its end, or before zeros where the format allows them. For every
compression, a file that is cut short, damaged or followed by other bytes is a `ValueError` that names the file.
"""

import bz2
import codecs
import contextlib
import itertools
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from llm_jax.data.addresses import File, one_line, reading

BLOCK = 1 << 20  # bytes
PADDED = (".gz", ".xz")  # zeros may follow their streams, to fill a block (gzip's manual; the .xz format, 2.2)
CHUNK = 1 << 12  # compressed bytes at once; zstd may expand them to 128 MiB, the others to less
ZSTD_WINDOW = 1 << 31  # bytes, as `zstd --ultra --long=31` needs


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ValueError("zstd needs a package; pip install zstandard") from None
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()


# Each makes a decompressor of one stream, with `decompress`, `eof` and `unused_data`.
DECODERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # a gzip header, and its checksum
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    ".zst": _zstd,
}


def read_text(file: File) -> Iterator[str]:
    """Yield the text of `file`, a block at a time, with its own line ends. Raise `ValueError` if it is not UTF-8."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    for block in itertools.chain(read_bytes(file), [b""]):
        try:
            text = decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_text(file, f"the byte 0x{error.object[error.start]:02x}, not UTF-8") from None
        if "\0" in text:
            raise _not_text(file, "a zero byte")
        if text:
            yield text


def read_bytes(file: File) -> Iterator[bytes]:
    """Yield the content of `file`, decompressed, in blocks of at least `BLOCK` bytes, except the last one.

    Raise `ValueError` if it can't be read or is damaged.
    """
    pieces, size = [], 0
    for piece in _pieces(file) if file.compression is None else _decompressed(file, DECODERS[file.compression]):
        pieces.append(piece)
        size += len(piece)
        if size >= BLOCK:
            yield b"".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield b"".join(pieces)


@contextlib.contextmanager
def open_seekable(file: File) -> Iterator[IO[bytes]]:
    """Yield the content of `file` to seek in: if compressed, a copy on the disk. Raise like `read_bytes`."""
    if file.compression is not None:
        with tempfile.TemporaryFile() as copy:
            _fill(copy, file)
            yield copy
        return
    with file.open() as raw:
        yield raw


def _fill(copy: IO[bytes], file: File) -> None:
    """Write the content of `file` to `copy`, and rewind it. Raise `ValueError` if the disk is full."""
    try:
        copy.writelines(read_bytes(file))
        copy.seek(0)  # writes what is left in the buffer
    except OSError as error:
        raise ValueError(
            f"{tempfile.gettempdir()} can't hold a copy of {file}, decompressed ({error.strerror}); make room there, "
            "or name a folder on another disk (TMPDIR=FOLDER)"
        ) from error


def _pieces(file: File) -> Iterator[bytes]:
    with file.open() as raw:
        while True:
            with reading(file):
                piece = raw.read(BLOCK)
            if not piece:
                return
            yield piece


def _decompressed(file: File, make: Callable[[], Any]) -> Iterator[bytes]:
    """Yield the content of all streams in `file`; tools such as pigz and `cat` concatenate them."""
    stream, padded = _new(file, make), file.compression in PADDED
    for piece in _pieces(file):
        for start in range(0, len(piece), CHUNK):
            given = piece[start : start + CHUNK]
            while given:
                if stream.eof and not (given := given.lstrip(b"\0") if padded else given):
                    break
                stream = _new(file, make) if stream.eof else stream
                try:
                    made = stream.decompress(given)
                except Exception as error:  # each codec raises its own
                    raise ValueError(f"{file} is damaged: {one_line(error)}; copy or download it again") from error
                given = stream.unused_data if stream.eof else b""
                yield made
    if not stream.eof:
        raise ValueError(
            f"{file} is cut short: it ends before its {file.compression} data do; copy or download it again"
        )


def _new(file: File, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"cannot read {file}: {error}") from None


def _not_text(file: File, found: str) -> ValueError:
    return ValueError(
        f"{file} is not text: found {found}; leave it out (a pattern such as 'folder/**/*.txt' chooses), or convert it "
        "(iconv -t utf8)"
    )
