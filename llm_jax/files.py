"""Files and folders that appear whole or not at all, JSON of an expected shape, checksums, and locks on folders."""

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock

Types = type | tuple[type, ...]

STALE_SECONDS = 60.0  # no write takes so long: an older unfinished file belongs to a killed process
ABANDONED_SECONDS = 86_400.0  # a process that fills a folder adds files more often; for file systems without locks
NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `path` so that a reader, even after a crash, finds either the old content or the new.

    Remove what killed processes left of earlier writes. Raise `OSError`, naming `path`, if it can't be written.
    """
    for stale in path.parent.glob(f".{_literal(path.name)}.*.part"):
        if _age(stale) > STALE_SECONDS:
            stale.unlink(missing_ok=True)
    unfinished = path.with_name(f".{path.name}.{scratch_number()}.part")
    try:
        with _named(path, unfinished), written(unfinished) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def scratch_number() -> str:
    """Return digits for the name of an unfinished file, which no other process has, nor another thread of this one."""
    return f"{os.getpid()}{threading.get_ident()}"


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file to write; after the block all of it is on the disk. Raise `OSError`, naming `path`, if not.

    NumPy's own writers (`tofile`, and `save` to a file) don't notice a disk that runs full in the last few kilobytes.
    """
    with _named(path, path), open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def strict(value: Any) -> Any:
    """Return `value` as strict JSON has it: NaN and the infinities become null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON, whole or not at all. Raise like `write_whole`."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path, fields: Mapping[str, Types] | None = None, *, advice: str) -> dict[str, Any]:
    """Return the object in the JSON file `path`.

    `fields` are the names it must have, each with the type or types of its value. `advice` is what to do about a bad
    file, and ends the message. Raise `ValueError`, one line, for a file that is missing, is not JSON, or has another
    shape; no other exception, whatever the file holds.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {advice}") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); {advice}") from None
    return parse_json(content, fields, str(path), advice=advice)


def parse_json(
    content: str | bytes, fields: Mapping[str, Types] | None = None, where: str = "", *, advice: str
) -> dict[str, Any]:
    """Return the object in `content`, JSON in UTF-8. Raise `ValueError`, naming `where`, as `read_json` does."""
    try:
        found = json.loads(content if isinstance(content, str) else content.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of 5,000 digits, 10,000 brackets
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where} is not JSON ({reason}); {advice}") from None
    return check_fields(found, fields or {}, where, advice=advice)


def check_fields(found: Any, fields: Mapping[str, Types], where: str, *, advice: str) -> dict[str, Any]:
    """Return `found`, a JSON object with these fields. Raise `ValueError`, naming `where`, for anything else."""
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds {_name(type(found))}, expected an object; {advice}")
    for name, types in fields.items():
        types = types if isinstance(types, tuple) else (types,)
        if name not in found:
            raise ValueError(f"{where} has no {name!r}; {advice}")
        value = found[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(map(_name, types))
            raise ValueError(f"{where}: {name!r} is {_name(type(value))}, expected {wanted}; {advice}")
    return found


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal. Raise `OSError` if it can't be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(folder: Path, purpose: str) -> Iterator[Path]:
    """Yield a folder to fill, which is renamed to `folder` at the end of the block, and removed if that fails.

    Until then it is a sibling named after its purpose, like `.llama.import.x3k2/`. What a killed process left for the
    same purpose is removed first; under another name if it is a day old, as a cache may never ask for that one again.
    Raise `OSError` if `folder` exists by then, or can't be made or filled; paths inside are named as if in `folder`.
    """
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.{purpose}."
    for stale in parent.glob(f".*.{purpose}.*"):
        if stale.name.startswith(prefix) or _age(stale / "whole") > ABANDONED_SECONDS:
            _remove_abandoned(stale)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        error.filename = str(folder)  # instead of the random name
        raise
    try:
        with _named(folder, scratch / "whole"), filelock.FileLock(scratch / "lock"):
            (filling := scratch / "whole").mkdir()
            yield filling
            if folder.is_symlink() or folder.exists():  # a rename silently replaces an empty folder
                raise FileExistsError(17, "exists by now", str(folder))
            os.rename(filling, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _named(path: Path, scratch: Path) -> Iterator[None]:
    """Make an `OSError` that names nothing, or something in `scratch`, name `path`, which `scratch` will become."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            error.filename = str(error.filename).replace(str(scratch), str(path))
        elif error.strerror is not None:
            error.filename = str(path)
        else:  # a message only
            error.args = tuple(str(each).replace(str(scratch), str(path)) for each in error.args)
        raise


def _remove_abandoned(scratch: Path) -> None:
    """Remove the folder of a `whole_folder` whose process has ended: a lock ends with its process."""
    lock = scratch / "lock"
    if not lock.exists() and _age(scratch) < STALE_SECONDS:
        return  # its owner is about to lock it
    try:
        with filelock.FileLock(lock, timeout=0):
            pass
    except (filelock.Timeout, OSError):
        return
    shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on `folder` in the block. Raise `BlockingIOError` at once if another process holds it."""
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise BlockingIOError(11, "another process owns it", str(folder)) from None


def _age(path: Path) -> float:
    """Return the seconds since `path` was written; 0 if it is gone, or not readable."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _literal(name: str) -> str:
    """Return `name` as a glob pattern that matches only itself."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _name(kind: type) -> str:
    return "null" if kind is type(None) else NAMES.get(kind, kind.__name__)
