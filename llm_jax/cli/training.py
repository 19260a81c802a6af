"""`llm-jax train` and `llm-jax resume`: begin a run, and continue it."""

import functools
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax.cli.shared import config_of, print_json, say
from llm_jax.config import override

if TYPE_CHECKING:
    from rich.console import Console

    from llm_jax.runs.run import Run
    from llm_jax.train.config import RunConfig


def train(args: Namespace) -> int:
    """Start a run of CONFIG, a recipe or a Python file.

    Each key=value changes a field of the config. The run folder will hold everything about the run: config, tokenizer,
    checkpoints, metrics, report. Ctrl-C or SIGTERM saves a checkpoint and stops, with exit status 130 or 143. With
    --resume the same command begins a run and, however often it is stopped, resumes it. With --from the model, its
    tokenizer and its weights are those of another run, imported or trained; data and training are CONFIG's.

      llm-jax train quickstart
      llm-jax train quickstart model.n_layers=8 optimizer.learning_rate=3e-4 --run runs/deeper
      llm-jax train quickstart --from runs/deeper --run runs/again        its model, tokenizer and weights
    """
    return _train(args, None if args.resume else config_of(args))


def _train(args: Namespace, config: "RunConfig | None") -> int:
    """Train, once the config is known to be one: what is imported here takes seconds, which no refusal waits for."""
    from llm_jax import processes, runtime
    from llm_jax.runs import fit
    from llm_jax.runs import folder as run_folder

    folder = Path(args.run or f"runs/{Path(args.config).stem}")
    runtime.start()
    with processes.joined(args.coordinator, args.processes, args.process):
        if args.resume and processes.from_first(lambda: run_folder.is_run(folder)):
            return _resume_or_report(args, folder)
        config = config or config_of(args)
        run = fit.fit(config, folder, console=_console(args), command=args.command)
        return _report(args, folder, _steps_done(run), config.steps)


def _resume_or_report(args: Namespace, folder: Path) -> int:
    """Resume the run in `folder`, which may be finished, and say where the command line differs from its config.

    The run that it started --from is not needed any more.
    """
    from llm_jax.runs import fit
    from llm_jax.runs import folder as run_folder

    old = run_folder.load_config(folder)
    whole = args.source_run is None or run_folder.is_run(Path(args.source_run))
    if changed := run_folder.changed_fields(folder, config_of(args)) if whole else []:
        say(f"{folder} resumes with its own config: {'; '.join(changed[:3])}")
    if (folder / "checkpoints" / str(old.steps)).is_dir():
        say(
            f"{folder} is trained already, to step {old.steps:,}; to train further: llm-jax resume {folder} --steps N; "
            "to train anew, choose another --run"
        )
        return _report(args, folder, old.steps, old.steps)
    return _report(args, folder, _steps_done(fit.resume(folder, console=_console(args))), old.steps)


def resume(args: Namespace) -> int:
    """Resume RUN exactly where it stopped.

    Weights, optimizer, data and metrics continue as if nothing had happened, bit for bit. With --steps the run gets a
    new total, and the learning-rate schedule stretches to it. The mesh may change: sums are then in another order, and
    the last digits differ.

      llm-jax resume runs/quickstart
      llm-jax resume runs/quickstart --steps 4000
      llm-jax resume runs/quickstart mesh.fsdp=4              on other devices, in another layout
    """
    from llm_jax.runs import folder as run_folder

    old, keys = run_folder.load_config(args.run), [word.partition("=")[0] for word in args.assignments]
    changed = override(old, args.assignments)
    return _resume(args, {key: functools.reduce(getattr, key.split("."), changed) for key in keys})


def _resume(args: Namespace, layout: dict[str, Any]) -> int:
    from llm_jax import processes, runtime
    from llm_jax.runs import fit

    runtime.start()
    with processes.joined(args.coordinator, args.processes, args.process):
        run = fit.resume(args.run, steps=args.steps, layout=layout, console=_console(args))
        return _report(args, args.run, _steps_done(run), run.config.steps)


def _steps_done(run: "Run") -> int:
    """Return how many steps a run has done that has just ended."""
    assert run.progress is not None
    return run.progress.step


def _console(args: Namespace) -> "Console":
    """Return the console of a run: standard error where standard output is for JSON; quiet but in one process."""
    from rich.console import Console

    from llm_jax import processes

    return Console(stderr=args.json, quiet=not processes.is_first())


def _report(args: Namespace, folder: Path | str, step: int, steps: int) -> int:
    """Print what the run came to. Return the exit status: not 0 where it was stopped, so that a script stops too."""
    from llm_jax import log, processes
    from llm_jax.runs import signals

    status = 128 + signals.last_signal if step < steps else 0
    if not processes.is_first():
        return status
    if args.json:
        last = [{"step": step}, *log.read(folder)][-1]  # a user may have deleted the metrics
        print_json({"run": str(folder), "steps": steps, **last})
    elif step < steps:
        print(f"stopped at step {step:,} of {steps:,}; resume with: llm-jax resume {folder}")
    else:
        print(f"done; read {folder}/report.html, or generate text: llm-jax generate {folder}")
    return status
