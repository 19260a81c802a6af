"""`fit` starts a run and `resume` continues one; both leave a folder that explains itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from llm_jax import log, processes, runtime
from llm_jax.axes import mesh_sizes
from llm_jax.config import replace
from llm_jax.runs import folder as run_folder
from llm_jax.runs.checkpoint import Progress
from llm_jax.runs.code import found_again
from llm_jax.runs.compiling import told
from llm_jax.runs.data import check_given, given_data, open_data, open_run_data
from llm_jax.runs.loop import loop
from llm_jax.runs.pause import update_report
from llm_jax.runs.refusals import check_config, check_layout, disk_failed, moved_away
from llm_jax.runs.run import Run
from llm_jax.runs.session import Callback, Session, on
from llm_jax.train.config import RunConfig
from llm_jax.train.custom import Custom, Loss, takes
from llm_jax.train.optimizer import make_schedule
from llm_jax.train.step import TrainState

Optimizer = optax.GradientTransformation | Callable[[], optax.GradientTransformation]


def fit(
    config: RunConfig,
    folder: str | Path,
    *,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    data: Iterable[str] | Iterable[np.ndarray] | Iterable[int] | None = None,
    metrics: Callback | Sequence[Callback] = (),
    console: Console | None = None,
    command: str = "",
) -> Run:
    """Train a model: start a run of `config` in `folder`, and return it. A failed start leaves nothing there.

    loss: a function `(model, params, batch, key) -> (sum, {name: sum})` in place of `config.loss`, its sums over the
    targets that count (`train/custom.py`).
    optimizer: an optax transformation, or a function that makes one, in place of `config.optimizer`; its learning rate
    is inside.
    data: documents in place of `config.data.uri`: texts, arrays of token ids, or one row of ids with ends of text.
    metrics: callbacks `(step, state, metrics)` after every step. What they return, `{name: scalar}`, is logged, and
    `raise llm_jax.Stop("why")` ends the run with a checkpoint. They see device arrays: one that reads a number makes
    the device wait.
    console: where progress is printed; `Console(quiet=True)` for nowhere.
    command: the command line that the run was started by, for its report.

    Raise `ValueError` for what can't work, `Diverged` after `config.patience` bad steps in a row. Ctrl-C saves a
    checkpoint, and returns.
    """
    check_config(config)
    folder, custom, callbacks = run_folder.as_path(folder), Custom.of(loss, optimizer), _callbacks(metrics)
    processes.from_first(lambda: run_folder.check_free(folder, config))
    console = console or Console(quiet=not processes.is_first())  # one of several speaks
    runtime.start()
    check_before_data(config, custom)
    if data is not None:
        config = replace(config, **{"data.column": None, "data.separator": None})
        config = replace(config, **{"data.uri": given_data(data, config, on(console))})
    session = Session.open(config, folder, console, open_data(config, on(console)), custom, callbacks)
    with told(console), processes.watched(_way_on(folder)):
        state = session.begin()
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        ours = run_folder.identity(folder)
        with run_folder.owned(folder):
            processes.from_first(lambda: run_folder.check_free(folder, config))  # still
            try:
                if processes.is_first():
                    run_folder.create(folder, config, session.shards, command, session.code)
                return _trained(session, state, Progress())
            except BaseException:
                if processes.is_first() and run_folder.identity(folder) == ours and not log.read(folder):
                    run_folder.remove(folder, keep_folder=existed)
                raise


def resume(
    folder: str | Path,
    *,
    steps: int | None = None,
    layout: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    data: Iterable[str] | Iterable[np.ndarray] | Iterable[int] | None = None,
    metrics: Callback | Sequence[Callback] = (),
    console: Console | None = None,
) -> Run:
    """Continue the run in `folder` exactly where it stopped, and return it.

    steps: a new total, in place of the config's.
    layout: mesh axes and what else may change for other devices than before, such as `{"mesh.fsdp": 2}`: the state is
    the same in every layout.
    loss, optimizer: those of the caller's own are imported from where the run has them; what came from a script or a
    notebook has to be given again.
    data: the documents that `fit` was given, once more, where the cache that held them was cleared.
    metrics, console: as for `fit`; callbacks are no part of the run, and are given each time.

    Raise `ValueError` where there is no run, where it is finished, where its data, model or code is no longer what it
    was, and as `fit` does.
    """
    folder, callbacks = run_folder.as_path(folder), _callbacks(metrics)
    old = run_folder.load_config(folder)
    check_layout(folder, layout or {})
    custom = found_again(run_folder.load_code(folder), Custom.of(loss, optimizer), old.model, str(folder))
    config = replace(old, **({} if steps is None else {"steps": steps}), **(layout or {}))
    console = console or Console(quiet=not processes.is_first())  # one of several speaks
    runtime.start()
    check_before_data(config, custom)
    if data is not None:
        check_given(folder, old, given_data(data, old, on(console)))
    with run_folder.owned(folder):
        shards = open_run_data(folder, old, on(console))
        session = Session.open(config, folder, console, shards, custom, callbacks)
        with told(console), processes.watched(_way_on(folder)):
            state, progress = session.restore(old)
            if processes.is_first():
                if lost := log.missing(folder, progress.step):
                    session.say(f"{folder}/{log.FILE} has no row of step {log.spans(lost)}; report.html lacks them too")
                run_folder.save_config(folder, config)
                log.truncate(folder, progress.step)
            return _trained(session, state, progress)


def check_before_data(config: RunConfig, custom: Custom = Custom()) -> None:
    """Raise `ValueError` for what no data can put right: it may take hours to prepare."""
    if custom.optimizer is None:
        make_schedule(config.optimizer, config.steps)
    mesh_sizes(config.mesh, jax.device_count())


def _trained(session: Session, state: TrainState, progress: Progress) -> Run:
    """Run the loop from `state`; the report is written however it ends."""
    folder, checkpoints = session.folder, session.checkpoints
    session.introduce()
    with run_folder.held(folder) as moved:
        try:
            progress = loop(session, state, progress, moved)
        except OSError as error:
            if (now := moved()) is not None:
                raise moved_away(folder, now, checkpoints) from error
            raise disk_failed(folder, error, checkpoints) from error
        finally:
            if moved() is None:
                update_report(session)
    if (best := checkpoints.best()) is not None:
        session.say(f"the best checkpoint is of step {best:,}: generate and evaluate take it")
    return Run(folder, progress=progress, report=session.say)


def _callbacks(given: Any) -> tuple[Callback, ...]:
    """Return `metrics=` as a tuple. Raise `ValueError` for what is no function of three arguments."""
    callbacks = tuple(given) if isinstance(given, list | tuple) else (given,)
    for callback in callbacks:
        if not takes(callback, 3):
            raise ValueError(
                f"metrics={callback!r} is not a function (step, state, metrics) -> {{name: scalar}}, or None"
            )
    return callbacks


def _way_on(folder: Path) -> str:
    return f"start all of them again, with fewer if you like: {run_folder.way_on(folder)}"
