"""The folder where everything about a run lives.

config.json  data.json  code.json  environment.json  tokenizer/  checkpoints/<step>/  metrics.jsonl  report.html
"""

import contextlib
import dataclasses
import difflib
import glob
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_jax.config import differences, from_dict, to_dict
from llm_jax.data import tokenizer
from llm_jax.data.config import format_uri
from llm_jax.data.mixture import Mixture
from llm_jax.data.shards import Shards
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.files import check_fields, locked, read_json, write_json, write_whole
from llm_jax.train.config import RunConfig

ADVICE = "restore it, or start a new run"  # about a damaged file
# What came with a model that was imported: its config.json, and the tensors that were in another dtype than the rest.
ORIGIN, ORIGIN_DTYPES = "huggingface.json", "huggingface_dtypes.json"
# What `create` lays out before config.json makes a run of it, the first first.
BEGUN = ("environment.json", "data.json", "code.json", "tokenizer", ORIGIN, ORIGIN_DTYPES)


def is_run(folder: Path) -> bool:
    """Return whether `folder` holds a run."""
    return (folder / "config.json").exists()


def check_free(folder: Path, config: RunConfig) -> None:
    """Raise `ValueError` unless `folder` is empty or does not exist: what a run or a user has there stays.

    `create` removes what a process left that was killed while it began a run there. Raise too for a path that is not
    UTF-8: the library that writes checkpoints would say so only after some steps.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{folder.absolute()} is no path in UTF-8, which checkpoints need; choose another folder (--run)"
        ) from None
    if is_run(folder):
        changed = changed_fields(folder, config)
        other = f" of another config ({'; '.join(changed[:3])})" if changed else ""
        raise ValueError(
            f"{folder} already holds a run{other}; continue it: {way_on(folder)}; or choose another folder (--run)"
        )
    if folder.exists() and (not folder.is_dir() or _begun(folder) is None):
        raise ValueError(f"{folder} is not empty, and a run begins in a folder of its own; choose another (--run)")


def as_path(folder: Any) -> Path:
    """Return the path of a run folder. Raise `ValueError` for what is none."""
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"the folder of a run is a path, such as 'runs/a'; got {folder!r}")
    return Path(folder)


def way_on(folder: str | Path) -> str:
    """Return how the run in `folder` is continued, from a shell and from Python."""
    return f"llm-jax resume {folder}, or llm_jax.resume({str(folder)!r})"


def _begun(folder: Path) -> list[Path] | None:
    """Return what is in `folder` if `create` wrote it and did not finish; None if it is anything else."""
    found = [path for path in folder.iterdir() if path.name != ".lock"]
    names = {path.name for path in found if not re.fullmatch(r"\..+\.json\.\d+\.part", path.name)}
    if names and not (names <= {*BEGUN} and _is_environment(folder / BEGUN[0])):
        return None
    return sorted(found, key=lambda path: path.name == BEGUN[0])  # the mark that they are ours is last to go


def _is_environment(path: Path) -> bool:
    """Return whether `path` is the file that `create` writes first; other programs use that name too."""
    try:
        return {"command", "date", "jax"} <= read_json(path, advice=ADVICE).keys()
    except (OSError, ValueError):
        return False


def changed_fields(folder: Path, config: RunConfig) -> list[str]:
    """Return a phrase for each field in which the config of the run in `folder` differs from `config`."""
    return differences(to_dict(load_config(folder)), to_dict(_with_absolute_paths(config)))


def check_run(folder: str | Path) -> None:
    """Raise `ValueError` where `folder` holds no run, and name one nearby."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no run (no config.json); {_way_to_a_run(Path(folder))}")


def load_config(folder: str | Path) -> RunConfig:
    """Return the config of the run in `folder`. Raise `ValueError` where there is none, and name one nearby."""
    check_run(folder)
    path = Path(folder) / "config.json"
    try:
        config = from_dict(RunConfig, read_json(path, advice=ADVICE))
    except ValueError as error:
        found = str(error)
        known = str(path) in found or "can't be imported" in found  # these say what to do
        raise ValueError(found if known else f"{path}: {error}; {ADVICE}") from None
    return config


def _way_to_a_run(folder: Path) -> str:
    """Return the runs near `folder` that may be meant, or else how to start one."""
    above = [parent for parent in list(folder.absolute().parents)[:2] if _looks_like_a_run(parent)]
    below = (path.parent for name in ("*/config.json", "*/*/config.json") for path in folder.glob(name))
    inside = sorted(itertools.islice(filter(_looks_like_a_run, below), 100))
    beside = {} if folder.exists() else {path.parent.name: path.parent for path in folder.parent.glob("*/config.json")}
    close = [beside[name] for name in difflib.get_close_matches(folder.name, beside, n=1)]
    if near := above or inside or close:
        return f"did you mean {', or '.join(map(str, near[:3]))}?"
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    run, path = (f" --run {folder}", str(folder)) if free else ("", "runs/a")
    return f"start one with: llm-jax train quickstart{run}, or llm_jax.fit(config, {path!r})"


def _looks_like_a_run(folder: Path) -> bool:
    return is_run(folder) and (folder / "checkpoints").is_dir()  # models elsewhere have a config.json too


def load_code(folder: Path) -> dict[str, dict[str, str | None]]:
    """Return which code of a user's own the run in `folder` was made with; empty if none.

    Raise `ValueError` for a damaged code.json.
    """
    path = folder / "code.json"
    found = read_json(path, advice=ADVICE) if path.exists() else {}
    for name, known in found.items():
        check_fields(known, {"sha256": str}, f"{path}: {name}", advice=ADVICE)
    return {name: {"path": known.get("path"), "sha256": known["sha256"]} for name, known in found.items()}


def tokenizer_of_run(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of the run in `folder`."""
    return tokenizer.load_tokenizer(Path(folder) / "tokenizer")


def create(
    folder: Path, config: RunConfig, shards: Shards | Mixture, command: str, code: Mapping[str, Any] | None = None
) -> None:
    """Lay out the folder of a run that begins. Paths in its config are absolute: it resumes from any directory.

    `code` is the record of the user's own code (`train/custom.py`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in _begun(folder) or ():  # of a process that was killed
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(folder / "environment.json", environment(command))
    write_json(folder / "data.json", data_identity(shards))
    if code:
        write_json(folder / "code.json", code)
    shards.tokenizer.save(folder / "tokenizer")
    for path in (Path(config.init_from or folder) / name for name in (ORIGIN, ORIGIN_DTYPES)):
        if config.init_from is not None and path.is_file():  # it may be exported as what it came as
            write_whole(folder / path.name, path.read_bytes())
    save_config(folder, _with_absolute_paths(config))  # last: it makes the folder a run


def remove(folder: Path, *, keep_folder: bool) -> None:
    """Remove a run that never got started; `keep_folder` leaves the empty folder that it began in."""
    folder = folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    if keep_folder:
        folder.mkdir(exist_ok=True)


def identity(folder: Path) -> tuple[int, int] | None:
    """Return what identifies a folder wherever it is moved to; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Callable[[], str | None]]:
    """Yield a function that says where `folder` was moved to; None while it has not moved."""
    opened = os.open(folder, os.O_RDONLY)  # first: some stores number anew what nobody holds
    ours = identity(folder)

    def moved() -> str | None:
        if identity(folder) == ours:
            return None
        try:
            return os.readlink(f"/proc/self/fd/{opened}")  # Linux alone says it
        except OSError:
            return "FOLDER, as it is called now"

    try:
        yield moved
    finally:
        os.close(opened)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Keep every other process from writing to the run in `folder`. Raise `ValueError` where one does.

    If a run has several processes, the first holds the lock for all.
    """
    from llm_jax import processes  # which imports JAX, as there is an array by now

    if not processes.is_first():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except BlockingIOError:
            raise ValueError(f"another process trains in {folder}; stop it, or choose another folder (--run)") from None
        yield


def save_config(folder: Path, config: RunConfig) -> None:
    """Write config.json, all of it or nothing."""
    write_json(folder / "config.json", to_dict(config))


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    named = config.data.sources
    data = dataclasses.replace(config.data, uri=format_uri([_absolute(source.uri) for source in named], named))
    if data.tokenizer not in tokenizer.SPECS:  # a folder of such a name is not what it means
        data = dataclasses.replace(data, tokenizer=_absolute(data.tokenizer))
    source = config.init_from and _absolute(config.init_from)
    return dataclasses.replace(config, data=data, init_from=source)


def _absolute(name: str) -> str:
    """Return the absolute path, or pattern, if `name` leads somewhere on this machine; else `name`."""
    here = Path(name).exists() or any(glob.iglob(name, recursive=True))
    return os.path.abspath(name) if here else name


def data_identity(data: Shards | Mixture) -> dict[str, Any]:
    """Return what decides the batches besides the config; of a mixture each source by its name, with its share."""
    whole = {"tokenizer": data.tokenizer.fingerprint, "vocab_size": data.tokenizer.vocab_size}
    if isinstance(data, Shards):
        return whole | _content(data)
    named = zip(data.sources, data.shards, strict=True)
    return whole | {
        "sources": {source.name: {"share": str(source.share)} | _content(shards) for source, shards in named}
    }


def _content(shards: Shards) -> dict[str, Any]:
    splits = {
        name: {
            "documents": split.documents,
            "tokens": split.tokens,
            "sha256": hashlib.sha256(json.dumps(sorted(split.files.items())).encode()).hexdigest(),
        }
        for name, split in shards.manifest.splits.items()
    }
    return {"folder": str(shards.folder.absolute()), **splits}


def shards_folders(folder: Path, config: RunConfig) -> list[Path]:
    """Return the folders of the token shards that the run in `folder` began with, by source.

    Raise `ValueError` where it never had any, or data.json is not that of `config`.
    """
    if not (folder / "data.json").exists():
        raise ValueError(
            f"{folder} was imported: it has weights, and neither data nor an optimizer of its own. Train further from "
            f"it: llm-jax train CONFIG --from {folder}, or fit with init_from={str(folder)!r}; evaluate it on your own "
            f"text: llm-jax evaluate {folder} --data URI, or run.evaluate(URI)"
        )
    there, names = _read_data(folder), [source.name for source in config.data.sources]
    sources = there.get("sources", {names[0]: there})
    if list(sources) != names:
        raise ValueError(
            f"{folder / 'data.json'} has the sources {', '.join(sources)}, and config.json {', '.join(names)}; {ADVICE}"
        )
    return [Path(source["folder"]) for source in sources.values()]


def begins(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> bool:
    """Return whether a text of the run in `folder` begins with `tokenizer.begin_of_text`.

    If it was trained here, as its documents did. If it was imported, as the tokenizer itself begins a text: the model
    was trained with that, and transformers does the same.
    """
    return config.data.end_of_text if (folder / "data.json").exists() else tokenizer.begins


def check_data(folder: Path, data: Shards | Mixture) -> None:
    """Raise `ValueError` unless `data` is what the run in `folder` began with, wherever it is stored."""
    changed = differences(without_folders(_read_data(folder)), without_folders(data_identity(data)))
    if changed:
        raise ValueError(
            f"{data.source} is not what {folder} has been trained on: {changed[0]}; restore it, "
            f"or start a new run with init_from={folder}"
        )


def _read_data(folder: Path) -> dict[str, Any]:
    """Return the data.json in `folder`, in which each source has a folder."""
    path = folder / "data.json"
    there = read_json(path, {"tokenizer": str, "vocab_size": int}, advice=ADVICE)
    mixed = "sources" in there
    sources = check_fields(there, {"sources": dict}, str(path), advice=ADVICE)["sources"] if mixed else {"": there}
    for name, source in sources.items():
        check_fields(source, {"folder": str}, f"{path}: sources.{name}" if mixed else str(path), advice=ADVICE)
    return there


def without_folders(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what data.json says of content and weights, without the folders of the shards."""
    return {
        name: without_folders(value) if isinstance(value, Mapping) else value
        for name, value in identity.items()
        if name != "folder" or isinstance(value, Mapping)
    }


def environment(command: str) -> dict[str, object]:
    """Return the environment of a run, for its report."""
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "flax": importlib.metadata.version("flax"),
        **machine(),
    }


def machine() -> dict[str, Any]:
    """Return the part of the environment that decides the last bits of a run."""
    import jax  # which the rest of this file does without, so that refusals need not wait for it

    from llm_jax.ops import native

    devices = [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]
    return {"jax": jax.__version__, "devices": devices, "native": native.used()}


def first_machine(folder: Path) -> dict[str, Any]:
    """Return the machine on which the run in `folder` began. Raise `ValueError` if environment.json does not say."""
    path, fields = folder / "environment.json", {"jax": str, "devices": list}
    found = read_json(path, fields, advice=ADVICE)
    return {name: found[name] for name in fields} | {"native": found.get("native", False)}


def _commit() -> str | None:
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or an installed wheel
        return None
