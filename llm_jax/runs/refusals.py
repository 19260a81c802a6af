"""Why a run stops or does not start, in words: what was expected, what came, and the next move."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.data.loader import Loader
from llm_jax.data.mixture import Mixture
from llm_jax.data.shards import Shards
from llm_jax.runs.checkpoint import Checkpoints, Progress
from llm_jax.runs.diagnose import diagnose
from llm_jax.runs.folder import way_on
from llm_jax.runs.seal import LAYOUT
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program
from llm_jax.train.step import TrainState


class Diverged(ValueError):
    """Loss, gradient or update was not finite for too many steps in a row, or the state itself is not."""


def diverged(
    folder: Path, program: Program, shards: Shards | Mixture, checkpoints: Checkpoints, state: TrainState, at: Progress
) -> Diverged:
    """Say of the last bad step what was read there, what went bad first, and what is left."""
    step = at.step - 1
    store = shards.split("train")
    loader = Loader(store, program.config.data, needs=program.custom.needs)  # of all rows
    documents = loader.documents(step)
    origins = ", ".join(store.origins(documents[:5])) + ", ..." * (len(documents) > 5)
    reason = diagnose(program, state.params, loader.batch(step), step, state.opt_state)
    checkpoints.wait()
    return Diverged(
        f"loss, gradient or update was not finite in {at.skipped_in_a_row} steps in a row; at step {at.step}, on "
        f"documents {origins}: {reason}; {newest_checkpoint(checkpoints)}; start anew with less learning rate and "
        f"init_from={folder}"
    )


def not_saved(error: Exception, checkpoints: Checkpoints) -> Diverged:
    """Say that a state holds a NaN or an infinity."""
    return Diverged(f"{error}; {newest_checkpoint(checkpoints)}; start anew, from other weights or a new seed")


def moved_away(folder: Path, now: str, checkpoints: Checkpoints) -> ValueError:
    """Say that the folder is no longer where it was: a save would begin another one there. Waits for the last save."""
    with contextlib.suppress(OSError):
        checkpoints.finish()
    return ValueError(
        f"{folder} was moved or removed while its run trained; {newest_checkpoint(checkpoints)}, and nothing was "
        f"written elsewhere; continue with: {way_on(now)}"
    )


def disk_failed(folder: Path, error: OSError, checkpoints: Checkpoints) -> ValueError:
    """Say what the disk said, and how to resume."""
    way = f"continue with: {way_on(folder)}" if checkpoints.steps() else "start again"
    said = f"{error.filename or folder}: {error.strerror}" if error.strerror else error  # an open file has no name
    return ValueError(f"{said}; {newest_checkpoint(checkpoints)}; fix this, then {way}")


def newest_checkpoint(checkpoints: Checkpoints) -> str:
    """Say which checkpoint is the last good one."""
    step = checkpoints.newest()
    return "there is no checkpoint yet" if step is None else f"the last good checkpoint is of step {step}"


def check_config(config: Any) -> None:
    """Raise `ValueError` for what `fit` gets in the place of a config: the name of a recipe, or only a model."""
    if not isinstance(config, RunConfig):
        way = f"llm_jax.recipe({config!r})" if isinstance(config, str) else "RunConfig(model=..., data=...)"
        raise ValueError(f"config= takes a RunConfig, got a {type(config).__name__}; give {way}")


def check_can_evaluate(shards: Shards | Mixture, heldout: float) -> None:
    """Raise `ValueError` where nothing is held out, and so no evaluation could be."""
    if not shards.split("heldout").n_documents:
        raise ValueError(f"data.heldout={heldout} leaves nothing to evaluate on; set it above 0")


def check_layout(folder: Path, layout: Mapping[str, object]) -> None:
    """Raise `ValueError` for a change that would make a resumed run another one."""
    if other := [key for key in layout if not f"{key}=".startswith(LAYOUT)]:
        raise ValueError(
            f"{other[0]}={layout[other[0]]}: a run resumes with its own config, of which only {', '.join(LAYOUT)} may "
            f"change; for another one start a new run with init_from={folder}"
        )
