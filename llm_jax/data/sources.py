"""Where text comes from: `documents(uri)` reads them one by one, `fingerprint(uri)` says which text it was."""

from __future__ import annotations

import hashlib
import itertools
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_jax.data.tokenizer import END_OF_TEXT

_BUILTIN_SKIPS = re.compile(
    r"(^|/)(tests?|idlelib|encodings|pydoc_data|lib2to3|ensurepip|turtledemo|distutils|site-packages|__pycache__"
    r"|config-[^/]*|_sysconfigdata[^/]*)(/|$)"
)
_BUILTIN_BYTES = 2_000_000
_BLOCK_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it stands."""

    text: str
    origin: str


def documents(uri: str, separator: str | None = None) -> Iterator[Document]:
    """The documents of `uri`, in a fixed order."""
    if uri == "builtin:python":
        return ((Document(text, origin)) for origin, text in _builtin_python())
    return itertools.chain.from_iterable(_text_documents(path, separator) for path in _files(uri))


def fingerprint(uri: str) -> str:
    """Hex digest of the content of `uri`."""
    digest = hashlib.sha256()
    if uri == "builtin:python":
        for origin, text in _builtin_python():
            digest.update(f"{origin}\0{text}\0".encode())
        return digest.hexdigest()
    for path in _files(uri):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _builtin_python() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    found = [(name, _read_source(root / name)) for name in names if not _BUILTIN_SKIPS.search(name)]
    size = sum(len(text) for _, text in found)
    if size < _BUILTIN_BYTES:
        raise ValueError(
            f"builtin:python needs at least {_BUILTIN_BYTES:,} bytes of standard library, but this Python has {size:,} "
            f"in {root}; use a full Python, or name your own text"
        )
    return [(name, text) for name, text in found if text]


def _read_source(path: Path) -> str:
    with tokenize.open(path) as file:
        return file.read()


def _files(uri: str) -> list[Path]:
    path = Path(uri)
    if not path.exists():
        raise ValueError(f"no such data: {uri!r}; expected a file, a folder or builtin:python")
    return sorted(child for child in path.rglob("*") if child.is_file()) if path.is_dir() else [path]


def _text_documents(path: Path, separator: str | None) -> Iterator[Document]:
    with path.open(encoding="utf-8", newline="") as file:
        blocks = iter(lambda: file.read(_BLOCK_CHARS), "")
        for number, text in enumerate(_cut(blocks, separator)):
            yield Document(text, f"{path}#{number}")


def _cut(blocks: Iterable[str], separator: str | None) -> Iterator[str]:
    text = "".join(blocks)
    if separator is None:
        parts = text.split(END_OF_TEXT)
        texts = parts if len(parts) == 1 else [part.strip("\n") for part in parts]
    else:
        ends = [match.end() for match in re.finditer(f"(?:{re.escape(separator)})+", text)]
        texts = [text[start:stop] for start, stop in itertools.pairwise([0, *ends, len(text)])]
    return (text for text in texts if text)
