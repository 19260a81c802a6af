"""Which files an address names: one, those of a pattern or those of a folder, here or on any store of fsspec."""

import contextlib
import os
import posixpath
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from llm_jax.data.generated import GENERATED

BUILTIN = "builtin:python"
BUILTIN_BYTES = 2_000_000
# Tests and tables teach a model little, and generated or installed files differ between machines.
NOT_BUILTIN = re.compile(
    r"__pycache__|tests?|idlelib|encodings|pydoc_data|lib2to3|distutils|ensurepip|turtledemo|(site|dist)-packages"
    r"|config-.*|_sysconfigdata.*"
)
HIDDEN = re.compile(r"/(\.|__pycache__/)")
UNKNOWN = 1 << 40  # bytes, of a file without a size
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
RECORDS = (".jsonl", ".ndjson", ".parquet")  # rows and nothing else
TABLES = (".json", ".csv", ".tsv")  # rows too, but next to prose or code they are settings, or labels
# Files that a folder of tables may hold without being a folder of prose.
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|datasheet|dataset_?infos?|(sha|md)\w*sums?)\b.*", re.I
)


@dataclass(frozen=True, slots=True)
class File:
    """One file of a source; `name` is its path below the folder that all of them share."""

    system: fsspec.AbstractFileSystem
    path: str
    name: str

    def __str__(self) -> str:
        return printable(self.path)

    def open(self) -> Any:
        """Open the stored bytes. Raise `ValueError` if they can't be read."""
        with reading(self):
            return self.system.open(self.path, "rb")

    @property
    def size(self) -> int:
        """The number of stored bytes; `UNKNOWN` if the store doesn't tell. Raise `ValueError` like `open`."""
        with reading(self):
            found = self.system.size(self.path)
        return UNKNOWN if found is None else int(found)

    @property
    def compression(self) -> str | None:
        """The suffix of its compression, such as `.gz`; None if it has none."""
        suffix = posixpath.splitext(self.path)[1].lower()
        return suffix if suffix in COMPRESSIONS else None

    @property
    def suffix(self) -> str:
        """The suffix without that of a compression: `.jsonl` of `chats.jsonl.gz`."""
        return suffix_of(self.path)

    @property
    def holds_records(self) -> bool:
        """Whether it holds rows, by its suffix, and not plain text."""
        return self.suffix in (*RECORDS, *TABLES)


def files_at(uri: str, report: Callable[[str], object] = lambda line: None) -> list[File]:
    """Return the files of `uri`, in an order that never changes; `report` gets a line for what is left out of a folder.

    Raise `ValueError`, one line, if there are none or the store can't be reached.
    """
    if uri == BUILTIN:
        return _standard_library()
    if uri.startswith("data:"):
        raise ValueError(f"cannot read {brief(uri)}: a data: address is no file; save its content as one and name that")
    with reading(uri):
        system, path = fsspec.url_to_fs(uri)
        paths = _paths(system, path, lambda line: report(f"{brief(uri)}: {line}")) if uri.strip() else []
    if not paths:
        known = ", ".join((BUILTIN, *GENERATED))
        raise ValueError(f"no data at {brief(uri)!r}; expected a file, a folder, a pattern, an address or {known}")
    root = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return [File(system, path, printable(posixpath.relpath(path, root))) for path in sorted(paths)]


@contextlib.contextmanager
def reading(what: str | File) -> Iterator[None]:
    """Raise any exception of a file system, and of the packages that it uses, as a `ValueError` of one line."""
    try:
        yield
    except Exception as error:  # each store raises its own
        away = "://" in what if isinstance(what, str) else not isinstance(what.system, LocalFileSystem)
        move = (
            "check the address and the network, or copy the data here" if away else "fix that, or name another address"
        )
        if isinstance(error, ImportError):
            hub = str(what).startswith("hf:")
            move = "pip install 'llm-jax[hf]'" if hub else "install what it needs, or copy the data here"
        elif "Protocol not known" in str(error):
            move = "fsspec reads s3://, gs://, hf://, https:// and more, and a path is a file here"
        raise ValueError(f"cannot read {brief(what)}: {one_line(error)}; {move}") from error


def suffix_of(path: str) -> str:
    """Return the last suffix of `path` in lower case, before that of a compression."""
    stem, suffix = posixpath.splitext(path.lower())
    return posixpath.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def one_line(error: BaseException) -> str:
    """Return the message of `error`, short, with its type if that says more."""
    line = brief(next(iter(str(error).strip().splitlines()), "")).rstrip(".")
    says = isinstance(error, OSError | ImportError | ValueError)
    return line if line and says else f"{type(error).__name__}: {line}".rstrip(": ")


def brief(what: object) -> str:
    """Return `what` as text that fits into a message."""
    text = str(what)
    return printable(text if len(text) <= 200 else f"{text[:160]}...{text[-37:]}")


def printable(name: str) -> str:
    """Return `name` on one line of UTF-8; the name of a file may hold line ends, and bytes that are not text."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def _paths(system: Any, path: str, report: Callable[[str], object]) -> list[str]:
    """Return the files at `path`: itself, those below it, or those it matches as a pattern."""
    if any(character in path for character in "*?[") and not system.exists(path):
        return [found for found in system.glob(path) if system.isfile(found)]
    try:
        kind = system.info(path)["type"]
    except FileNotFoundError:
        return []
    if kind != "directory":
        return [path] if kind == "file" else []
    below = {found: info for found, info in system.find(path, detail=True).items() if _shown(found, path)}
    # A link is of the kind "other", and so is a pipe, whose reader waits forever.
    files = [found for found, info in below.items() if info["type"] == "file" or system.isfile(found)]
    if len(files) < len(below):
        odd = [posixpath.relpath(found, path) for found in sorted(below.keys() - set(files))]
        report(f"left out {_named(odd)}: neither a file nor a folder; name what it leads to")
    chosen = _choose(files)
    if len(chosen) < len(files):
        report(
            f"{len(chosen):,} of {len(files):,} files ({_suffixes(chosen)}); left out "
            f"{_suffixes(set(files) - set(chosen))} (name those you want by a pattern)"
        )
    return chosen


def _shown(path: str, folder: str) -> bool:
    return not HIDDEN.search("/" + path.removeprefix(folder).lstrip("/"))


def _choose(paths: list[str]) -> list[str]:
    """Choose the data among the files of a folder.

    Its records, if it has some: a data set comes with a README. Else its tables, if all other files are about them;
    else its text, without the tables.
    """
    if records := [path for path in paths if suffix_of(path) in RECORDS]:
        return records
    tables = [path for path in paths if suffix_of(path) in TABLES]
    text = [path for path in paths if suffix_of(path) not in TABLES]
    if all(ABOUT.match(posixpath.basename(path)) for path in text):
        return [path for path in tables if not ABOUT.match(posixpath.basename(path))] or text
    return text


def _suffixes(paths: Iterable[str]) -> str:
    counts = Counter(suffix_of(path) or posixpath.basename(path) for path in paths)
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:4]
    named = [brief(f"{number:,} {suffix}") for suffix, number in common]
    return ", ".join([*named, "..."] if len(counts) > len(named) else named)


def _named(names: list[str]) -> str:
    shown = ", ".join(map(brief, names[:3]))
    return f"{shown} and {len(names) - 3:,} more" if len(names) > 3 else shown


def _standard_library() -> list[File]:
    root = sysconfig.get_path("stdlib")
    paths = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not NOT_BUILTIN.fullmatch(name)]
        sources = [name for name in names if name.endswith(".py") and not NOT_BUILTIN.match(name)]
        paths += [os.path.join(folder, name) for name in sources]
    size = sum(map(os.path.getsize, paths))
    if size < BUILTIN_BYTES:
        raise ValueError(
            f"{BUILTIN} expected {BUILTIN_BYTES:,} bytes or more of Python source in {root}, found {size:,}; "
            "use a Python that comes with its library's source, or name a text file"
        )
    system = fsspec.filesystem("file")
    return [File(system, path, os.path.relpath(path, root)) for path in sorted(paths)]
