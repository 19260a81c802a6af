"""The weights of a run, on the devices that are here now."""

from pathlib import Path

import jax
from jaxtyping import PyTree

from llm_jax import runtime
from llm_jax.log import Report
from llm_jax.runs.checkpoint import Checkpoints
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program


def on_one_device(config: RunConfig) -> Program:
    """Return the program of `config` on the first device, whatever the run was trained on."""
    runtime.start()
    return Program.on_one_device(config)


def on_the_host(config: RunConfig) -> Program:
    """Return the program of `config` in the memory of the host, which holds what an accelerator may not."""
    runtime.start()
    return Program.on_one_device(config, jax.local_devices(backend="cpu")[0])


def on_all_devices(config: RunConfig) -> Program:
    """Return the program of `config` as the run was trained; where its mesh does not fit here, on one device."""
    runtime.start()
    try:
        return Program.on(config)
    except ValueError:
        return on_one_device(config)


def weights(
    folder: str | Path, program: Program, checkpoint: str = "best", *, report: Report = print
) -> tuple[PyTree, int]:
    """Return the weights of the run in `folder`, laid out for `program`, and their step.

    `checkpoint` is `best` (by held-out loss; the last where none was measured), `last`, or a step. One of the first
    two that is damaged is named, and passed over for the newest. Raise `ValueError` where there is no such checkpoint,
    or none that can be read.
    """
    with Checkpoints(Path(folder), read_only=True) as checkpoints:
        params, step = checkpoints.restore_params(program.abstract_state.params, report, checkpoint)
    report(f"{folder}: weights of step {step:,}")
    return params, step
