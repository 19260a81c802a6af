"""The training loop, from top to bottom: a step, what is due after it, and the reasons to stop."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import processes
from llm_jax.log import MetricsLog
from llm_jax.runs.checkpoint import Progress
from llm_jax.runs.meter import Meter
from llm_jax.runs.pause import is_due, pause, save
from llm_jax.runs.refusals import diverged, moved_away
from llm_jax.runs.session import Callback, Session
from llm_jax.runs.signals import Stop, stop_signals
from llm_jax.train.custom import check_metric_name, is_number
from llm_jax.train.step import Metrics, TrainState

Moved = Callable[[], str | None]  # where the run folder was moved to; None while it is where it was


def loop(session: Session, state: TrainState, progress: Progress, moved: Moved) -> Progress:
    """Train from `state` to the last step, or until something asks to stop; return how far it came.

    A step is dispatched before the metrics of the one before it are read: the device never waits for a number that is
    only printed. What is returned has the last held-out loss that was measured. Raise `Diverged` after
    `config.patience` bad steps in a row, and `ValueError` where the run folder is moved away.
    """
    c, checkpoints, stopped = session.config, session.checkpoints, False
    measured = session.last_heldout(progress)
    batches = contextlib.closing(session.loader.batches(progress.step))
    with stop_signals() as stopping, checkpoints, metrics_log(session, progress) as rows, batches as ahead:
        meter = Meter(c, rows, progress, session.loader.token_shares)
        if not checkpoints.steps():  # what a run began from, it need not find again
            save(session, state, progress)
        for batch in meter.timed(ahead):
            state, metrics = session.program.train_step(state, batch)
            if meter.step == progress.step:  # the first step has been traced
                for note in session.program.attention_notes:
                    session.say(note)
            added, stop = call_back(session.callbacks, meter.step + 1, state, metrics)
            if stop is not None:
                session.say(f"step {meter.step + 1:,}: {stop}")
                stopping.ask(stop)
            meter.push(metrics | added)
            if meter.progress.skipped_in_a_row >= c.patience:
                raise diverged(session.folder, session.program, session.shards, checkpoints, state, meter.progress)
            stopped = stopping(meter.step)
            end = meter.step == c.steps or (stopped and processes.from_first(lambda: stopping.reason is not None))
            if stopped or end or is_due(c, meter.step):
                if (now := moved()) is not None:
                    raise moved_away(session.folder, now, checkpoints)
                found = pause(session, state, meter, rows, end=end, last=stopped or end)
                measured = measured if found is None else found
            if stopped or end:
                break
    return dataclasses.replace(meter.progress, heldout_loss=measured, stopped=stopped and meter.step < c.steps)


def metrics_log(session: Session, progress: Progress) -> MetricsLog:
    """Return where the rows of this run go: the first of several processes writes them."""
    folder = session.folder if processes.is_first() else None
    total, tensorboard = session.config.steps, session.config.tensorboard
    return MetricsLog(
        folder, console=session.console, total_steps=total, start_step=progress.step, tensorboard=tensorboard
    )


def call_back(
    callbacks: Sequence[Callback], step: int, state: TrainState, metrics: Metrics
) -> tuple[dict[str, Any], Stop | None]:
    """Return what callbacks add to the metrics of a step, and the first `Stop` that one raised.

    What they return is copied: the next step takes the memory of `state`. Raise `ValueError` for what is not a mapping
    of new names to scalars.
    """
    added: dict[str, Any] = {}
    stop: Stop | None = None
    for callback in callbacks:
        try:
            found: Any = callback(step, state, dict(metrics))
        except Stop as reason:
            stop = stop or reason
            continue
        if found is None:
            continue
        if not isinstance(found, Mapping):
            raise ValueError(f"a callback returned {type(found).__name__}; return {{name: scalar}} or None")
        for name, value in found.items():
            check_metric_name(name, "a callback")
            if name in metrics or name in added:
                raise ValueError(f"a callback returned a metric {name!r}, and there is one so called; rename yours")
            if np.shape(value) != ():
                raise ValueError(f"metric {name!r} of a callback has shape {np.shape(value)}; return a scalar")
            if not is_number(value):
                raise ValueError(f"metric {name!r} of a callback is of type {type(value).__name__}; return a number")
            added[name] = jnp.array(value) if isinstance(value, jax.Array) else np.float64(value)
    return added, stop
