"""A run: its configuration, and the folder where everything about it lives.

config.json  data.json  environment.json  tokenizer/  checkpoints/<step>/  metrics.jsonl  report.html
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import platform
import runpy
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import flax
import jax

from llm_jax import processes
from llm_jax.config import checked, from_dict, nearest, plain, to_dict
from llm_jax.data import tokenizer
from llm_jax.data.loader import DataConfig
from llm_jax.data.shards import Shards
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.files import locked, read_json, write_json, write_whole
from llm_jax.model.config import ModelConfig
from llm_jax.recipes import recipes
from llm_jax.sharding import MeshConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.step import LossConfig
from llm_jax.train.timetable import PipelineConfig

# What came with a model that was imported: its config.json, and the tensors that were in another dtype than the rest.
ORIGIN, ORIGIN_DTYPES = "huggingface.json", "huggingface_dtypes.json"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. Two runs of one config on one machine are the same, bit for bit.

    Attributes:
      offload: what of stacked layers waits in the host's memory, and is brought a layer at a time: the moments of the
        optimizer, or the whole state, weights too.
      steps: optimizer steps, each over `data.batch_size` rows.
      accumulate: microbatches a step; each device holds the activations of one.
      evaluate_every, evaluate_batches: when to score held-out text, and how many batches of it.
      checkpoint_every: steps between checkpoints. The last `keep` stay, and the best by held-out loss.
      sample_every, prompts: when to let the model write, and from what; an empty prompt starts a document.
      patience: steps in a row with a loss or gradient that is not finite, before the run stops.
      seed: of initial weights and dropout; `data.seed` is that of the order of rows.
      init_from: a run folder whose weights, and nothing else, this run starts from.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    offload: Literal["none", "optimizer", "state"] = "none"
    steps: int = 1000
    seed: int = 0
    accumulate: int = 1
    evaluate_every: int = 250
    evaluate_batches: int = 20
    checkpoint_every: int = 250
    keep: int = 2
    sample_every: int = 250
    prompts: tuple[str, ...] = ("",)
    patience: int = 10
    init_from: str | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "accumulate",
            "evaluate_every",
            "evaluate_batches",
            "checkpoint_every",
            "sample_every",
            "keep",
            "patience",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, value in (("seed", self.seed), ("data.seed", self.data.seed)):
            if not 0 <= value < 2**32:
                raise ValueError(f"{name}={value} must lie between 0 and {2**32 - 1}")
        if self.data.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide data.batch_size={self.data.batch_size}; "
                f"use batch_size={-(-self.data.batch_size // self.accumulate) * self.accumulate}"
            )
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}; set them equal"
            )
        if self.loss.chunk is not None and self.data.seq_len % self.loss.chunk:
            raise ValueError(f"loss.chunk={self.loss.chunk} does not divide data.seq_len={self.data.seq_len}")
        if self.offload != "none" and self.optimizer.name == "adafactor":
            raise ValueError(
                f"offload={self.offload} updates a layer at a time, and adafactor scales its update by all of them; "
                "use offload=none, or optimizer.name=adamw"
            )
        self._check_task()

    def _check_task(self) -> None:
        task, n_classes = self.data.task, self.model.n_classes
        answers = len(task.answers) if task is not None and task.kind == "classify" else None
        if n_classes != answers:
            way = f"set model.n_classes={'none' if answers is None else answers}"
            if answers is None:
                way += ", or data.task.kind=classify"
            raise ValueError(f"model.n_classes={n_classes}, but the data has {answers or 'no'} classes; {way}")
        if n_classes is not None and self.prompts:
            raise ValueError(f"a classifier writes nothing, and prompts={self.prompts} ask it to; set prompts=")


def load_recipe(name: str) -> RunConfig:
    """The config of a recipe, by its name or by the path of a Python file that sets `config = RunConfig(...)`."""
    path = recipes().get(name, Path(name))
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"no recipe or Python file is called {name!r}; {nearest(name, recipes())}")
    config = runpy.run_path(str(path)).get("config")
    if not isinstance(config, RunConfig):
        raise ValueError(f"{path} must set `config = RunConfig(...)`; got {type(config).__name__}")
    return checked(config)


def is_run(folder: Path) -> bool:
    """Whether a run lives in `folder`."""
    return (folder / "config.json").exists()


def check_free(folder: Path, config: RunConfig) -> None:
    """Raises `ValueError` unless `folder` is empty or yet to be made: what a run or a user has there stays."""
    if is_run(folder):
        changed = differences(to_dict(load_config(folder)), to_dict(_with_absolute_paths(config)))
        other = f" of another config ({'; '.join(changed[:3])})" if changed else ""
        raise ValueError(
            f"{folder} already holds a run{other}; go on with it: llm-jax resume {folder}, or choose another --run"
        )
    if folder.exists() and (not folder.is_dir() or any(path.name != ".lock" for path in folder.iterdir())):
        raise ValueError(f"{folder} is not empty, and a run begins in a folder of its own; choose another --run")


def load_config(folder: str | Path) -> RunConfig:
    """The config of the run in `folder`. Raises `ValueError` where there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no config.json); start one with: llm-jax train CONFIG --run {folder}")
    return from_dict(RunConfig, _read_json(path))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of the run in `folder`."""
    return tokenizer.load(Path(folder) / "tokenizer")


def create(folder: Path, config: RunConfig, shards: Shards, command: str) -> None:
    """Lays out the folder of a run that begins. Paths in its config are absolute: it goes on from any place."""
    folder.mkdir(parents=True, exist_ok=True)
    shards.tokenizer.save(folder / "tokenizer")
    write_json(folder / "data.json", data_identity(shards))
    write_json(folder / "environment.json", environment(command))
    for path in (Path(config.init_from or folder) / name for name in (ORIGIN, ORIGIN_DTYPES)):
        if config.init_from is not None and path.is_file():  # it may be exported as what it came as
            write_whole(folder / path.name, path.read_bytes())
    save_config(folder, _with_absolute_paths(config))  # last: it makes the folder a run


def remove(folder: Path, *, keep_folder: bool) -> None:
    """Takes back a run that came to nothing; `keep_folder` leaves the empty folder that it began in."""
    folder = folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    if keep_folder:
        folder.mkdir(exist_ok=True)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Keeps every other process from writing to the run in `folder`. Raises `ValueError` where one does.

    Of the processes of one run the first holds it for all.
    """
    if not processes.is_first():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except BlockingIOError:
            raise ValueError(f"another process trains in {folder}; stop it, or choose another --run") from None
        yield


def save_config(folder: Path, config: RunConfig) -> None:
    """Writes config.json, all of it or nothing."""
    write_json(folder / "config.json", to_dict(config))


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    data = dataclasses.replace(config.data, uri=_absolute(config.data.uri))
    if data.tokenizer not in tokenizer.SPECS:  # a folder of such a name is not what it means
        data = dataclasses.replace(data, tokenizer=_absolute(data.tokenizer))
    source = config.init_from and _absolute(config.init_from)
    return dataclasses.replace(config, data=data, init_from=source)


def _absolute(name: str) -> str:
    """The absolute path, or pattern, where `name` is one that leads somewhere on this machine; else `name`."""
    here = Path(name).exists() or any(glob.iglob(name, recursive=True))
    return os.path.abspath(name) if here else name


def data_identity(shards: Shards) -> dict[str, Any]:
    """What decides the batches, beside the config."""
    splits = {
        name: {
            "documents": split.documents,
            "tokens": split.tokens,
            "sha256": hashlib.sha256(json.dumps(sorted(split.files.items())).encode()).hexdigest(),
        }
        for name, split in shards.manifest.splits.items()
    }
    return {
        "tokenizer": shards.manifest.tokenizer_fingerprint,
        "vocab_size": shards.manifest.vocab_size,
        "folder": str(shards.folder.absolute()),
        **splits,
    }


def shards_folder(folder: Path) -> Path:
    """Where the token shards of the run in `folder` lay when it began. Raises `ValueError` where it never had any."""
    if not (folder / "data.json").exists():
        raise ValueError(
            f"{folder} was imported: it has weights, and neither data nor an optimizer of its own. Train on from it: "
            f"llm-jax train CONFIG --from {folder}; evaluate it on text of yours: llm-jax evaluate {folder} --data URI"
        )
    return Path(_read_json(folder / "data.json")["folder"])


def check_data(folder: Path, shards: Shards) -> None:
    """Raises `ValueError` unless `shards` are what the run in `folder` began with, wherever they lie."""
    there = _read_json(folder / "data.json")
    changed = differences(there, data_identity(shards) | {"folder": there["folder"]})
    if changed:
        raise ValueError(
            f"{shards.manifest.source} is not what {folder} has been trained on: {changed[0]}; restore it, "
            f"or start a new run with init_from={folder}"
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any], where: str = "") -> list[str]:
    """A phrase for each leaf in which two nested mappings differ: `model.n_layers is 4 there, 8 here`."""
    found = []
    for key in [*there, *(key for key in here if key not in there)]:
        a, b = there.get(key), here.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{where}{key} is {_short(a)} there, {_short(b)} here")
    return found


def environment(command: str) -> dict[str, object]:
    """Where a run takes place, for its report."""
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
    }


def changed_environment(folder: Path) -> list[str]:
    """What of the run's first environment decides its bits, and is another here."""
    there, here = _read_json(folder / "environment.json"), environment("")
    return [change for name in ("jax", "devices") for change in differences({name: there[name]}, {name: here[name]})]


def _commit() -> str | None:
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or an installed wheel
        return None


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, advice="restore it, or start a new run")


def _short(value: Any) -> str:
    """Of a long value, such as a digest, the beginning."""
    text = plain(value)
    return text if len(text) < 40 else f"{text[:12]}..."
