"""The smallest run that has everything: packed documents, accumulation, dropout, epochs that end inside a batch."""

import contextlib
import dataclasses
import hashlib
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from arrays import quiet
from rich.console import Console

from llm_jax import log
from llm_jax.data.loader import DataConfig
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.infer.generate import Sampler
from llm_jax.model.config import ModelConfig
from llm_jax.runs.checkpoint import Checkpoints, Progress
from llm_jax.runs.evaluate import Evaluation
from llm_jax.runs.run import Run
from llm_jax.train.config import RunConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.program import Program
from llm_jax.train.step import TrainState

TIMES = {"tokens_per_second", "step_seconds", "peak_fraction", "data_wait"}  # what no two runs have in common


def write_corpus(folder: Path, documents: int = 40, seed: int = 0) -> Path:
    """Texts of 5 to 40 characters, one a file: about 36 rows of 32 tokens, some documents longer than a row."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for number in range(documents):
        text = "".join(draw.choice("abcdefgh ") for _ in range(draw.randrange(5, 40)))
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def tiny(corpus: Path, **changes: Any) -> RunConfig:
    """Eight steps of sixteen rows."""
    config = RunConfig(
        model=ModelConfig(vocab_size=264, d_model=32, n_layers=2, n_heads=2, max_seq_len=32, d_ff=32, dropout=0.1),
        data=DataConfig(uri=str(corpus), tokenizer="byte", heldout=0.2, seq_len=32, batch_size=16),
        optimizer=OptimizerConfig(warmup_steps=2),
        steps=8,
        accumulate=2,
        evaluate_every=4,
        evaluate_batches=1,
        checkpoint_every=3,
        prompts=(),
    )
    return dataclasses.replace(config, **changes)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as on a disk that is full by then."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def evaluated(
    folder: str | Path, uri: str | None = None, checkpoint: str = "best", **options: Any
) -> tuple[Evaluation, int]:
    """How well the run in `folder` predicts text, and the step of its weights."""
    run = Run.open(folder, checkpoint, report=quiet)
    return run.evaluate(uri, **options), run.step


def generate(config: ModelConfig, params: Any, tokenizer: Tokenizer, prompts: Any, **options: Any) -> list[str]:
    """The continuations of `prompts`; `options` are those of a sampler and of its stream."""
    return sampler(config, params, tokenizer, options).generate(prompts, **options)


def sampler(config: ModelConfig, params: Any, tokenizer: Tokenizer, options: dict[str, Any]) -> Sampler:
    """A sampler, by the `options` that are its own, which it takes out of the rest."""
    own = {name: options.pop(name) for name in ("begin", "special", "task") if name in options}
    return Sampler(config, params, tokenizer, **own)


def console() -> Console:
    """A console that `said` reads."""
    return Console(file=io.StringIO(), width=200)


def said(by: Console) -> str:
    return by.file.getvalue()


def batch_hash(batch: Any) -> str:
    digest = hashlib.sha256()
    for x in jax.tree.leaves(batch):
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()


def rows(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says that does not depend on the machine's speed."""
    return [{name: x for name, x in row.items() if name not in TIMES} for row in log.read(folder)]


def last_checkpoint(folder: Path, config: RunConfig) -> tuple[TrainState, Progress]:
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(Program.on(config).abstract_state, print)
    assert restored is not None
    return restored
