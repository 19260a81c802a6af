"""A run: its configuration, and the folder where everything about it lives.

    config.json  environment.json  tokenizer/  checkpoints/<step>/  metrics.jsonl  report.html
"""

import dataclasses
import json
import platform
import runpy
import subprocess
import time
from pathlib import Path

import flax
import jax

from llm_jax.config import checked, from_dict, nearest, to_dict
from llm_jax.data import tokenizer
from llm_jax.data.loader import DataConfig
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.log import write_whole
from llm_jax.model.config import ModelConfig
from llm_jax.sharding import MeshConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.step import LossConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. Two runs of one config on one machine are the same, bit for bit.

    Attributes:
      steps: optimizer steps, each over `data.batch_size` rows.
      accumulate: microbatches a step; each device holds the activations of one.
      evaluate_every, evaluate_batches: when to score held-out text, and how many batches of it.
      checkpoint_every: steps between checkpoints. The last `keep` stay, and the best by held-out loss.
      sample_every, prompts: when to let the model write, and from what; an empty prompt starts a document.
      patience: steps in a row with a loss or gradient that is not finite, before the run stops.
      init_from: a run folder whose weights, and nothing else, this run starts from.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
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
        for name in ("steps", "accumulate", "evaluate_every", "evaluate_batches", "checkpoint_every", "keep", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
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


def recipe_folder() -> Path:
    """`configs/` of the source tree, or of the installed wheel, where it lies inside the package."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipes() -> dict[str, Path]:
    """The recipes that come with the library, by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.py"))}


def recipe_docstring(path: Path) -> str:
    """What a recipe says of itself: the command and the result it gave."""
    return (runpy.run_path(str(path)).get("__doc__") or "").strip()


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
    return (folder / "config.json").is_file()


def load_config(folder: str | Path) -> RunConfig:
    """The config of the run in `folder`. Raises `ValueError` where there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no config.json); start one with: llm-jax train CONFIG --run {folder}")
    try:
        return from_dict(RunConfig, json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it, or start a new run") from error


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of the run in `folder`."""
    return tokenizer.load(Path(folder) / "tokenizer")


def create(folder: Path, config: RunConfig, text: Tokenizer, command: str) -> None:
    """Lays out a run folder. Raises `ValueError` where one exists: a run is never overwritten."""
    if is_run(folder):
        raise ValueError(f"{folder} already holds a run; go on with: llm-jax resume {folder}, or choose another --run")
    folder.mkdir(parents=True, exist_ok=True)
    text.save(folder / "tokenizer")
    write_whole(folder / "environment.json", json.dumps(environment(command), indent=2) + "\n")
    save_config(folder, config)  # last: it makes the folder a run


def save_config(folder: Path, config: RunConfig) -> None:
    """Writes config.json, all of it or nothing."""
    write_whole(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def environment(command: str) -> dict[str, object]:
    """Where a run takes place, for its report."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
    }
