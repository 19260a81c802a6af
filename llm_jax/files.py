"""Files and folders that appear whole or not at all, JSON that has the expected shape, and one owner for a folder."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock

Types = type | tuple[type, ...]

STALE_SECONDS = 60.0  # no write of ours takes so long; a part that is older belongs to a killed process
ABANDONED_SECONDS = 86_400.0  # whoever fills a folder adds a file more often, should a store not know of locks
NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `path` so that whoever reads it, even after a crash, finds the old content or the new.

    What a killed process left of an earlier write is removed.
    """
    for part in path.parent.glob(f".{_literal(path.name)}.*.part"):
        if _age(part) > STALE_SECONDS:
            part.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _named(path, part), written(part) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Give a new file to write; after the block all of it is on the disk. Raises `OSError`, with its name, if not.

    NumPy's own ways to write one (`tofile`, and `save` to a file) miss a disk that is full by the last few kilobytes.
    """
    with _named(path, path), open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def strict(value: Any) -> Any:
    """Return `value` as JSON has it: NaN and the infinities, for which that has no word, are null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON, whole or not at all."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path, fields: Mapping[str, Types] | None = None, *, advice: str) -> dict[str, Any]:
    """Return the object in the JSON file `path`.

    `fields` are the names it must have, each with the type or types of its value. `advice` is what to do about a bad
    file, and ends the message. Raises `ValueError`, one line, for a file that is missing, is no JSON, or has another
    shape; whatever the file holds, no other exception.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {advice}") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); {advice}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of 5,000 digits, 10,000 brackets
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is not JSON ({reason}); {advice}") from None
    return check_fields(found, fields or {}, str(path), advice=advice)


def check_fields(found: Any, fields: Mapping[str, Types], where: str, *, advice: str) -> dict[str, Any]:
    """Return `found`, an object of JSON with these fields. Raises `ValueError`, naming `where`, for anything else."""
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


@contextmanager
def whole_folder(folder: Path, purpose: str) -> Iterator[Path]:
    """Give a folder to fill, which takes the name `folder` at the end of the block, and is removed if that fails.

    Until then it is a sibling whose name says what it is for, as `.llama.import.x3k2/`; what a killed process left of
    the same purpose is removed first, under another name if it is a day old: a cache may never ask for that one again.
    Raises `OSError` where `folder` exists by then, or can't be made or filled: it names what is in the way as it would
    be called in `folder`.
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
        error.filename = str(folder)  # in place of a name drawn at random
        raise
    try:
        with _named(folder, scratch / "whole"), filelock.FileLock(scratch / "lock"):
            (filling := scratch / "whole").mkdir()
            yield filling
            if folder.is_symlink() or folder.exists():  # a rename replaces an empty folder without a word
                raise FileExistsError(17, "exists by now", str(folder))
            os.rename(filling, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _named(path: Path, scratch: Path) -> Iterator[None]:
    """Let an `OSError` that names nothing, or something in `scratch`, name `path`, which that is to become."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            error.filename = str(error.filename).replace(str(scratch), str(path))
        elif error.strerror is not None:
            error.filename = str(path)
        else:  # a text and no more
            error.args = tuple(str(each).replace(str(scratch), str(path)) for each in error.args)
        raise


def _remove_abandoned(scratch: Path) -> None:
    """Remove the folder of a `whole_folder` whose process has ended: the system releases a lock with its process."""
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
    """Own `folder` among all processes that call this. Raises `BlockingIOError` at once where another one owns it."""
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise BlockingIOError(11, "another process owns it", str(folder)) from None


def _age(path: Path) -> float:
    """Seconds since `path` was written; 0 where it is gone, or not ours to see."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _literal(name: str) -> str:
    """`name` as a pattern that matches itself alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _name(kind: type) -> str:
    return "null" if kind is type(None) else NAMES.get(kind, kind.__name__)
