"""A run that is there to be used: its weights, on the devices that are here now."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
from jaxtyping import PyTree

from llm_jax.config import override
from llm_jax.data.loader import heldout_rows
from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.train import run
from llm_jax.train.checkpoint import Checkpoints
from llm_jax.train.evaluate import Evaluation, token_lengths
from llm_jax.train.evaluate import evaluate as measure
from llm_jax.train.loop import open_data
from llm_jax.train.program import Program
from llm_jax.train.run import RunConfig

Report = Callable[[str], object]


def on_one_device(config: RunConfig) -> Program:
    """The program of `config` on the first device, whatever the run was trained on."""
    return Program(config, make_mesh(MeshConfig(), jax.devices()[:1]))


def on_all_devices(config: RunConfig) -> Program:
    """The program of `config` as the run was trained; where its mesh does not fit these devices, on one of them."""
    try:
        return Program.on(config)
    except ValueError:
        return on_one_device(config)


def restore(
    folder: str | Path, program: Program, checkpoint: str = "best", *, report: Report = print
) -> tuple[PyTree, int]:
    """The weights of the run in `folder`, laid out for `program`, and their step.

    `checkpoint` is `best` (by held-out loss; the last where none was measured), `last`, or a step. Raises
    `ValueError` where there is no such checkpoint, or none that can be read.
    """
    with Checkpoints(Path(folder), read_only=True) as checkpoints:
        steps = checkpoints.steps()
        named = {"best": checkpoints.best(), "last": max(steps, default=None)}
        if checkpoint not in named and not checkpoint.isdecimal():
            raise ValueError(
                f"no checkpoint is called {checkpoint!r}; use best, last, or a step out of {sorted(steps)}"
            )
        step = named[checkpoint] if checkpoint in named else int(checkpoint)
        params, step = checkpoints.restore_params(program.abstract_state.params, report, step)
    report(f"{folder}: weights of step {step:,}" + (f" ({checkpoint})" if step == named.get(checkpoint) else ""))
    return params, step


def evaluate(
    folder: str | Path, uri: str | None = None, checkpoint: str = "best", *, report: Report = print
) -> tuple[Evaluation, int]:
    """How well the run in `folder` predicts what it held out, or all the text at `uri`; and the weights' step."""
    config, split = run.load_config(folder), "heldout"
    if uri is not None:
        changes = [f"data.uri={uri}", f"data.tokenizer={folder}/tokenizer", "data.heldout=0"]
        config, split = override(config, changes), "train"
    shards, program = open_data(config, report), on_all_devices(config)
    params, step = restore(folder, program, checkpoint, report=report)
    batches = heldout_rows(shards.split(split), config.data)
    return measure(functools.partial(program.score, params), batches, token_lengths(shards.tokenizer)), step
