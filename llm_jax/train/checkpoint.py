"""Checkpoints by Orbax: asynchronous, the last few and the best, restored onto whatever mesh is there now."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from llm_jax.train.step import TrainState

FOLDER = "checkpoints"

Report = Callable[[str], None]
Restored = TypeVar("Restored")


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run must remember beside its train state, to go on as if nothing had happened.

    Attributes:
      step: optimizer steps done, and so the position in the data: a batch is a function of (seed, step, process).
      tokens: targets trained on.
      skipped: steps whose loss or gradient was not finite.
      heldout_loss: as last measured at this step; None if it was not.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    heldout_loss: float | None = None


class Checkpoints:
    """The checkpoints of one run folder. A context manager: leaving it waits for the last save."""

    def __init__(self, folder: Path, keep: int = 2, *, read_only: bool = False) -> None:
        options = ocp.CheckpointManagerOptions(
            best_fn=_heldout_loss,
            best_mode="min",
            preservation_policy=AnyPreservationPolicy(
                [LatestN(keep), BestN(get_metric_fn=_heldout_loss, reverse=True, n=1)]
            ),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager((folder / FOLDER).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts to save. Returns once the state is copied, so that its buffers may be donated to the next step."""
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            ),
            metrics={"heldout_loss": progress.heldout_loss},
        )

    def steps(self) -> list[int]:
        """The steps of all finished checkpoints, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def best(self) -> int | None:
        """The step with the least held-out loss; None where none was measured."""
        step = self._manager.best_step()
        return None if step is None or self._manager.metrics(step)["heldout_loss"] is None else step

    def restore(self, abstract: TrainState, report: Report) -> tuple[TrainState, Progress]:
        """The newest state that can be read, laid out as `abstract` says. One that can't be read is named and passed over."""

        def read(step: int) -> tuple[TrainState, Progress]:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    opt_state=ocp.args.StandardRestore(abstract.opt_state),
                    progress=ocp.args.JsonRestore(),
                ),
            )
            progress = Progress(**found.progress)
            number = jax.device_put(jnp.asarray(progress.step, jnp.int32), abstract.step.sharding)
            return TrainState(step=number, params=found.params, opt_state=found.opt_state), progress

        return self._first_readable(self.steps(), read, report)

    def restore_params(self, abstract: PyTree, report: Report, step: int | None = None) -> tuple[PyTree, int]:
        """The weights alone, and their step: those of `step`, or else the best, or else the newest."""
        steps = self.steps()
        if step is not None and step not in steps:
            raise ValueError(f"no checkpoint of step {step}; there are {sorted(steps)}")
        first = self.best() if step is None else step
        order = sorted(steps, key=lambda s: (s != first, -s)) if step is None else [step]

        def read(step: int) -> tuple[PyTree, int]:
            arguments = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=arguments).params, step

        return self._first_readable(order, read, report)

    def _first_readable(self, steps: Sequence[int], read: Callable[[int], Restored], report: Report) -> Restored:
        for step in steps:
            try:
                return read(step)
            # A damaged file surfaces as whatever the reader below met: any Exception means "not this one".
            except Exception as error:
                report(f"checkpoint of step {step} can't be read, passed over ({type(error).__name__}: {_line(error)})")
        raise ValueError(
            f"{self._manager.directory} holds no checkpoint that can be read (tried {list(steps) or 'none'}); "
            "the run has to start again from step 0"
        )


def _heldout_loss(metrics: dict[str, float | None]) -> float:
    loss = metrics["heldout_loss"]
    return math.inf if loss is None else loss


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]
